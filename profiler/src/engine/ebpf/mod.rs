//! Uprobes that count in the kernel.
//!
//! One program runs at every hit. Its cookie says which site it is, and it adds 1 to that site's
//! per-CPU counter; nothing is sent anywhere, user space reads the counters when it wants to.
//! Another program is on the runtime's rare paths (`pool`). Probes are put in place one after
//! another, so all of them count from one instant on that user space chooses.
//! Kernel side: ebpf/src/main.rs.

mod counters;
mod group;
mod links;
mod multi;
mod object;
mod perf;
mod place;
mod pool;
mod sys;
mod tracefs;

use std::os::fd::{AsFd as _, OwnedFd};

use deferprof_ebpf_common::{Role, name};

use self::{
    counters::Counters,
    group::Groups,
    links::Links,
    object::{Loaded, Options},
    pool::PoolCounters,
    sys::Map,
};
pub(crate) use self::{links::has_cookies, object::in_initial_pid_namespace};
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
    /// Where instructions are counted instead of sites.
    groups: Option<Groups>,
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
        let mut groups = None;
        let (mut probes, mut sites) = (request.probes, request.sites);
        if links::addresses(kind, probes.len()) > 0 {
            let groups = groups.insert(Groups::new(probes, sites));
            (probes, sites) = (&groups.probes, groups.probes.len() as u32);
            loaded.know(
                &place::addresses(request.executable, probes, request.pid)?,
                probes,
            )?;
        }
        let links = Links::attach(
            kind,
            &loaded.program,
            &path,
            probes,
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
            counters: Counters::new(loaded.maps, sites, stacks, pool_counters)?,
            program: loaded.program,
            groups,
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
        let counts = self.counters.read(self.program.as_fd())?;
        Ok(by_site(self.groups.as_ref(), counts))
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
            groups,
            ..
        } = self;
        // Returns when no program runs any more: the kernel waits for them (uprobe_unregister).
        drop(links);
        Ok(by_site(groups.as_ref(), counters.read(program.as_fd())?))
    }
}

fn by_site(groups: Option<&Groups>, counts: Counts) -> Counts {
    match groups {
        Some(groups) => groups.spread(counts),
        None => counts,
    }
}

/// Tells whether links of a kind work here, by loading a program for them and asking for one.
///
/// # Errors
///
/// Why they do not.
pub fn supports(kind: LinkKind) -> Result<(), EngineError> {
    load_for(kind, 0, 1, 1, None, None).map(drop)
}

/// Loads the program for the link that was asked for, or for the best that works.
fn load(
    request: &Request<'_>,
    pool: Option<&PoolRequest<'_>>,
) -> Result<(LinkKind, Loaded), EngineError> {
    let tgid = request.pid.as_raw() as u32;
    let stacks = request.stacks.map(std::num::NonZeroU32::get);
    let probes = request.probes.len();
    let pool = pool.map(pool::Sizes::of);
    let load = |kind| {
        let loaded = load_for(kind, tgid, request.sites, probes, stacks, pool)?;
        Ok((kind, loaded))
    };
    match request.link {
        LinkChoice::Only(kind) => load(kind),
        LinkChoice::Auto => {
            let mut reasons = Vec::new();
            for kind in LinkKind::ALL {
                match load(kind) {
                    Ok(_) if kind == LinkKind::PerfEvent && probes > MOST_PERF_EVENTS => {
                        return Err(too_many(probes, reasons));
                    }
                    Err(
                        reason @ (EngineError::NotSupported { .. } | EngineError::Rejected { .. }),
                    ) if kind != LinkKind::PerfEvent => reasons.push(reason),
                    result => return result,
                }
            }
            Err(too_many(probes, reasons))
        }
    }
}

/// Detaching one takes up to 100 ms, during which nobody on the machine can attach any.
const MOST_PERF_EVENTS: usize = 100;

/// The refusal to attach a perf event for each of many probes.
fn too_many(probes: usize, reasons: Vec<EngineError>) -> EngineError {
    let reasons: Vec<_> = reasons.iter().map(EngineError::to_string).collect();
    EngineError::NotSupported {
        action: format!("attach {probes} probes at once"),
        reason: format!(
            "{}. Each probe would be a perf event, and detaching them would block all tracing on \
             this machine for about {} seconds; choose at most {MOST_PERF_EVENTS} defers with \
             --include and --exclude",
            reasons.join("; "),
            probes.div_ceil(10),
        ),
    }
}

fn load_for(
    kind: LinkKind,
    tgid: u32,
    sites: u32,
    probes: usize,
    stacks: Option<u32>,
    pool: Option<pool::Sizes>,
) -> Result<Loaded, EngineError> {
    let addresses = links::addresses(kind, probes);
    let multi = kind == LinkKind::UprobeMulti;
    let loaded = object::load(&Options {
        tgid,
        sites: if addresses > 0 { addresses } else { sites },
        stacks,
        multi,
        addresses,
        // Without cookies its probes cannot be told from those of sites.
        pool: pool.filter(|_| addresses == 0),
    });
    let loaded = loaded.map_err(|error| match error {
        // The program for these links takes its cookie: what the verifier says of that is no help.
        EngineError::Rejected { source, .. } if multi && !has_cookies() => {
            links::no_uprobe_multi(&source)
        }
        error => error,
    })?;
    links::is_supported(kind, &loaded.program)?;
    Ok(loaded)
}
