//! Uprobes that count in the kernel.
//!
//! One program runs at every hit. Its cookie says which site it is, and it adds 1 to that site's
//! per-CPU counter; nothing is sent anywhere, user space reads the counters when it wants to.
//! Kernel side: ebpf/src/main.rs.

mod counters;
mod links;
mod multi;
mod object;
mod perf;
mod sys;

use std::os::fd::{AsFd as _, OwnedFd};

use self::{
    counters::Counters,
    links::Links,
    object::{Loaded, Options},
};
use super::{Counts, EngineError, LinkChoice, LinkKind, Request};

/// Probes that are attached. Dropping it detaches them, and the kernel does if this process dies.
#[derive(Debug)]
pub struct Session {
    links: Links,
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
        let (kind, loaded) = load(request)?;
        let links = Links::attach(
            kind,
            &loaded.program,
            &sys::path_of(request.executable),
            request.probes,
            request.pid,
        )?;
        Ok(Self {
            links,
            kind,
            counters: Counters::new(loaded.maps, request.sites, request.stacks.is_some())?,
            program: loaded.program,
        })
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
    load_for(kind, 0, 1, None).map(drop)
}

/// Loads the program for the link that was asked for, or for the best that works.
fn load(request: &Request<'_>) -> Result<(LinkKind, Loaded), EngineError> {
    let tgid = request.pid.as_raw() as u32;
    let stacks = request.stacks.map(std::num::NonZeroU32::get);
    let load = |kind| Ok((kind, load_for(kind, tgid, request.sites, stacks)?));
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
) -> Result<Loaded, EngineError> {
    let loaded = object::load(&Options {
        tgid,
        sites,
        stacks,
        multi: kind == LinkKind::UprobeMulti,
    })?;
    links::is_supported(kind, &loaded.program)?;
    Ok(loaded)
}
