//! Uprobes that count in the kernel.
//!
//! One program runs at every hit. Its cookie says which site it is, and it adds 1 to that site's
//! per-CPU counter; nothing is sent anywhere, user space reads the counters when it wants to.
//! Another program is on the runtime's rare paths ([`pool`]). Probes are put in place one after
//! another, so all of them count from one instant on that user space chooses.
//! Kernel side: ebpf/src/main.rs.

mod counters;
mod links;
mod multi;
mod object;
mod perf;
mod pool;
mod sys;

use std::os::fd::{AsFd as _, OwnedFd};

use deferprof_ebpf_common::{Role, name};

use self::{
    counters::Counters,
    links::Links,
    object::{Loaded, Options},
    pool::PoolCounters,
    sys::Map,
};
use super::{Counts, EngineError, LinkChoice, LinkKind, PoolRequest, Request};

/// Probes that are attached. Dropping it detaches them, and the kernel does if this process dies.
#[derive(Debug)]
pub struct Session {
    links: (Links, Option<Links>),
    counting: Map,
    kind: LinkKind,
    counters: Counters,
    /// Counts how often the kernel left it out.
    program: OwnedFd,
}

impl Session {
    /// Attaches probes to a process.
    ///
    /// # Errors
    ///
    /// [`EngineError`] says what is missing and how to get it. Nothing stays attached then.
    pub fn attach(request: &Request<'_>) -> Result<Self, EngineError> {
        Self::attach_with_pool(request, None)
    }

    /// Attaches probes to a process, and to the runtime's rare paths.
    ///
    /// # Errors
    ///
    /// As [`Session::attach`].
    pub fn attach_with_pool(
        request: &Request<'_>,
        pool: Option<&PoolRequest<'_>>,
    ) -> Result<Self, EngineError> {
        let outside = request
            .probes
            .iter()
            .find(|probe| probe.site >= request.sites);
        if let Some(probe) = outside {
            return Err(EngineError::UnknownSite {
                offset: probe.offset,
                site: probe.site,
                sites: request.sites,
            });
        }
        let (kind, mut loaded) = load(request, pool)?;
        let path = sys::path_of(request.executable);
        let links = Links::attach(
            kind,
            &loaded.program,
            &path,
            request.probes,
            request.pid,
            Role::Registered,
        )?;
        let (mut pool_links, mut pool_counters) = (None, None);
        if let (Some(pool), Some(program)) = (pool, loaded.pool) {
            pool::fill(&loaded.maps, pool)?;
            let probes = pool::probes(pool);
            let links = Links::attach(kind, &program, &path, &probes, request.pid, Role::Pool)?;
            pool_links = Some(links);
            let counters = PoolCounters::new(&mut loaded.maps, program, request.sites)?;
            pool_counters = Some(counters);
        }
        let counting = loaded.maps.remove(name::COUNTING);
        let stacks = request.stacks.is_some();
        let session = Self {
            links: (links, pool_links),
            counting: counting.ok_or_else(|| EngineError::Object {
                origin: "of this session".into(),
                reason: format!("it has no map `{}`", name::COUNTING),
            })?,
            kind,
            counters: Counters::new(loaded.maps, request.sites, stacks, pool_counters)?,
            program: loaded.program,
        };
        session.count(true)?;
        Ok(session)
    }

    /// Starts or stops all counting at one instant.
    fn count(&self, counts: bool) -> Result<(), EngineError> {
        let value = u64::from(counts).to_ne_bytes().to_vec();
        self.counting
            .update(&0_u32.to_ne_bytes(), value)
            .map_err(|error| EngineError::system("start or stop the eBPF counters", error))
    }

    /// Which kind of link it uses.
    pub fn link(&self) -> LinkKind {
        self.kind
    }

    /// What was counted so far. The target goes on meanwhile: stacks are read before sites, so
    /// that a site's stacks never add up to more than its count.
    ///
    /// # Errors
    ///
    /// [`EngineError::System`] if the kernel refuses to let a map be read.
    pub fn read(&self) -> Result<Counts, EngineError> {
        self.counters.read(self.program.as_fd())
    }

    /// Detaches, and returns the final counts: nothing changes while they are read, so for every
    /// site the stacks' sum and the lost stacks are exactly the count.
    ///
    /// # Errors
    ///
    /// As [`Session::read`]. It is detached all the same.
    pub fn detach(self) -> Result<Counts, EngineError> {
        self.count(false)?;
        let Self {
            links,
            counters,
            program,
            ..
        } = self;
        // Returns when no program runs any more: the kernel waits for them (uprobe_unregister).
        drop(links);
        counters.read(program.as_fd())
    }
}

/// Tells whether links of a kind work here, by loading a program for them and asking for one.
///
/// # Errors
///
/// Why they do not.
pub fn supports(kind: LinkKind) -> Result<(), EngineError> {
    load_for(kind, 0, 1, None, None).map(drop)
}

/// Loads the program for the link that was asked for, or for the best that works.
fn load(
    request: &Request<'_>,
    pool: Option<&PoolRequest<'_>>,
) -> Result<(LinkKind, Loaded), EngineError> {
    let tgid = request.pid.as_raw() as u32;
    let stacks = request.stacks.map(std::num::NonZeroU32::get);
    let pool = pool.map(pool::Sizes::of);
    let load = |kind| Ok((kind, load_for(kind, tgid, request.sites, stacks, pool)?));
    match request.link {
        LinkChoice::Only(kind) => load(kind),
        LinkChoice::Auto => match load(LinkKind::UprobeMulti) {
            Err(EngineError::NotSupported { .. } | EngineError::Rejected { .. }) => {
                load(LinkKind::PerfEvent)
            }
            result => result,
        },
    }
}

fn load_for(
    kind: LinkKind,
    tgid: u32,
    sites: u32,
    stacks: Option<u32>,
    pool: Option<pool::Sizes>,
) -> Result<Loaded, EngineError> {
    let loaded = object::load(&Options {
        tgid,
        sites,
        stacks,
        multi: kind == LinkKind::UprobeMulti,
        pool,
    })?;
    links::is_supported(kind, &loaded.program)?;
    Ok(loaded)
}
