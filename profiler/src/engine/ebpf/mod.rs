//! Uprobes that count in the kernel.
//!
//! One program runs at every hit of every probe. Its cookie says what the instruction stands for, and
//! it adds 1 to counters of each CPU; nothing is sent anywhere, user space reads the counters when it
//! wants to. Probes are put in place one after another, so all of them count from one instant on
//! that user space chooses.
//! Kernel side: ebpf/src/main.rs.

mod counters;
mod latency;
mod links;
mod multi;
mod object;
mod perf;
mod place;
mod points;
mod pool;
mod run;
mod sys;
mod tracefs;

use std::os::fd::{AsFd as _, OwnedFd};

use deferprof_ebpf_common::name;

use self::{
    counters::{Counters, Wanted},
    links::Links,
    object::{Loaded, Options},
    points::Points,
    sys::Map,
};
pub(crate) use self::{links::has_cookies, object::in_initial_pid_namespace};
use super::{Counts, EngineError, InstructionCost, LinkChoice, LinkKind, Request};

/// Probes that are attached. Dropping it detaches them, and the kernel does if this process dies.
#[derive(Debug)]
pub struct Session {
    links: Links,
    probes: usize,
    counting: Map,
    kind: LinkKind,
    counters: Counters,
    /// Counts how often the kernel left it out.
    program: OwnedFd,
}

impl Request<'_> {
    /// What the kernel does at a site's probe; only times depend on it.
    fn cost(&self, site: u32) -> InstructionCost {
        let about = self.sites_cost.get(site as usize);
        about.copied().unwrap_or(InstructionCost::Emulated)
    }
}

impl Session {
    /// Attaches probes to a process.
    ///
    /// # Errors
    ///
    /// [`EngineError`] says what is missing and how to get it. Nothing stays attached then.
    pub fn attach(request: &Request<'_>) -> Result<Self, EngineError> {
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
        let points = Points::new(request)?;
        let (kind, mut loaded) = load(request, &points)?;
        loaded.fill(request, &points)?;
        if links::addresses(kind, points.placed.len()) > 0 {
            let addresses = place::addresses(request.executable, &points.placed, request.pid)?;
            loaded.know(&addresses, &points.placed)?;
        }
        let path = sys::path_of(request.executable);
        let links = Links::attach(kind, &loaded.program, &path, &points.placed, request.pid)?;
        let wanted = Wanted {
            stacks: request.stacks.is_some(),
            pool: request.more.pool.is_some(),
            runs: request.more.runs.is_some(),
            latency: request.more.latency.is_some(),
        };
        let session = Self {
            links,
            probes: points.placed.len(),
            counting: object::take(&mut loaded.maps, name::COUNTING)?,
            kind,
            counters: Counters::new(loaded.maps, request.sites, wanted)?,
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

    /// How many instructions are probed.
    pub fn probes(&self) -> usize {
        self.probes
    }

    /// How often all sites together registered so far.
    ///
    /// # Errors
    ///
    /// [`EngineError::System`] if the kernel refuses to let a map be read.
    pub fn registered(&self) -> Result<u64, EngineError> {
        self.counters.registered()
    }

    /// What was counted so far. The target goes on meanwhile: stacks are read before sites, so
    /// that a site's stacks never add up to more than its count.
    ///
    /// # Errors
    ///
    /// As [`Session::registered`].
    pub fn read(&self) -> Result<Counts, EngineError> {
        self.counters.read(self.program.as_fd())
    }

    /// Detaches, and returns the final counts: nothing changes while they are read, so for every
    /// site the stacks' sum and the lost stacks are exactly the count.
    ///
    /// # Errors
    ///
    /// As [`Session::registered`]. It is detached all the same.
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

/// How many instructions a request probes, and how many of these the kernel emulates.
///
/// # Errors
///
/// [`EngineError::InvalidProbe`] if one instruction would have to answer too many questions.
pub fn probes(request: &Request<'_>) -> Result<(usize, usize), EngineError> {
    let points = Points::new(request)?;
    let emulated = points
        .placed
        .iter()
        .filter(|placed| !placed.cookie.is_single_stepped());
    Ok((points.placed.len(), emulated.count()))
}

/// Tells whether links of a kind work here, by loading a program for them and asking for one.
///
/// # Errors
///
/// Why they do not.
pub fn supports(kind: LinkKind) -> Result<(), EngineError> {
    load_for(kind, Options::default(), 1).map(drop)
}

/// Loads the program for the link that was asked for, or for the best that works.
fn load(request: &Request<'_>, points: &Points) -> Result<(LinkKind, Loaded), EngineError> {
    let probes = points.placed.len();
    let load = |kind| Ok((kind, load_for(kind, Options::of(request, points), probes)?));
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

fn load_for(kind: LinkKind, mut options: Options, probes: usize) -> Result<Loaded, EngineError> {
    let multi = kind == LinkKind::UprobeMulti;
    options.multi = multi;
    options.addresses = links::addresses(kind, probes);
    let loaded = object::load(&options).map_err(|error| match error {
        // The program for these links takes its cookie: what the verifier says of that is no help.
        EngineError::Rejected { source, .. } if multi && !has_cookies() => {
            links::no_uprobe_multi(&source)
        }
        error => error,
    })?;
    links::is_supported(kind, &loaded.program)?;
    Ok(loaded)
}
