//! What makes a target report hits: the question that is put to an engine, and what comes back.
//!
//! The one engine so far is [`ebpf`]: uprobes that count in the kernel. Nothing in this module
//! says so; an engine that patches the target would answer the same [`Request`] with the same
//! [`Counts`].

mod calibrate;
pub mod ebpf;
mod error;
pub mod features;
mod latency;
mod pool;
mod probed_loop;
mod questions;
mod run;

use std::{num::NonZeroU32, os::fd::BorrowedFd};

use deferprof_symbols::{PoolProbes, Probe, VirtualAddress};
use nix::unistd::Pid;

pub use self::{
    calibrate::{Calibration, Taxes, calibrate, calibrate_latency},
    ebpf::Session,
    error::{Capability, EngineError},
    latency::{Distribution, LatencyCounts, LatencyRequest, Times},
    pool::{PoolCounts, PoolOutcomes},
    questions::Questions,
    run::{ExitProbe, InstructionCost, Ran, RunCounts, RunRequest},
};
pub(crate) use self::{ebpf::in_initial_pid_namespace, error::setting, questions::takes_record};

/// How many different stacks are kept when the caller has no opinion. In the kernel a stack takes
/// about 1.1 KB, and 8 bytes more for each CPU: 18 MB.
pub const DEFAULT_STACKS: NonZeroU32 = NonZeroU32::new(16 * 1024).expect("not zero");

/// What an engine is asked to do.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The target's executable: the probes' offsets are offsets in this file. Open it as
    /// `/proc/<pid>/exe` so that it is the very inode that the target runs.
    pub executable: BorrowedFd<'a>,
    /// The target's thread group. It may be a child that has not executed the file yet; the probes
    /// take effect when it does. All its threads count, also later ones; its children do not.
    pub pid: Pid,
    /// Where to count, and for which site. A site may have several probes.
    pub probes: &'a [Probe],
    /// How many sites there are: every [`Probe::site`] is less.
    pub sites: u32,
    /// What the kernel does at each site's probe, by site; empty if all are emulated, or if neither
    /// times nor costs are of interest.
    pub sites_cost: &'a [InstructionCost],
    /// How many different stacks to keep, `None` to take none: that makes a hit cheaper.
    pub stacks: Option<NonZeroU32>,
    /// How to attach.
    pub link: LinkChoice,
    /// What else to ask.
    pub more: More<'a>,
}

/// What an engine may be asked beside how often sites register. Each question costs the target more.
#[derive(Clone, Copy, Debug, Default)]
pub struct More<'a> {
    /// Where each site's calls return to, as linked, and the site: those of the runtime that
    /// register, and those of functions whose entry is probed.
    pub returns: &'a [(VirtualAddress, u32)],
    /// The runtime's rare paths, to tell where records came from.
    pub pool: Option<&'a PoolProbes>,
    /// When deferred calls are made.
    pub runs: Option<RunRequest<'a>>,
    /// How long all of it takes. Without `runs` there is only the time to register.
    pub latency: Option<LatencyRequest<'a>>,
}

/// Which kind of link to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkChoice {
    /// The best that works here.
    #[default]
    Auto,
    /// This one or an error.
    Only(LinkKind),
}

/// How programs are attached to instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LinkKind {
    /// One link for all probes (Linux 6.6).
    UprobeMulti,
    /// One trace event for all probes, which are told apart by address (Linux 5.4).
    TraceEvent,
    /// A perf event for each probe. Detaching one takes up to 100 ms.
    PerfEvent,
}

impl LinkKind {
    /// All of them, the best first.
    pub const ALL: [Self; 3] = [Self::UprobeMulti, Self::TraceEvent, Self::PerfEvent];

    /// The name that reports and `doctor` use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UprobeMulti => "uprobe_multi",
            Self::TraceEvent => "trace_event",
            Self::PerfEvent => "perf_event",
        }
    }
}

/// What an engine has counted since it was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// By site: how often its statement executed.
    pub registered: Vec<u64>,
    /// How many hits the target has paid for.
    pub hits: u64,
    /// How many of these were of instructions that the kernel single-steps.
    pub single_stepped: u64,
    /// Each stack of each site. Empty if none were asked for.
    pub stacks: Vec<StackCount>,
    /// By site: how many of `registered` are in no stack. Once detached, for every site
    /// `registered` = its stacks' sum + `stacks_lost`. Empty if no stacks were asked for.
    pub stacks_lost: Vec<u64>,
    /// Where heap records came from; `None` if not asked for.
    pub pool: Option<PoolCounts>,
    /// When deferred calls were made; `None` if not asked for.
    pub runs: Option<RunCounts>,
    /// How long it took; `None` if not asked for.
    pub latency: Option<LatencyCounts>,
    /// What was not counted, and why.
    pub loss: Loss,
}

/// How often one site's statement executed under one stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackCount {
    /// The site.
    pub site: u32,
    /// Runtime addresses, leaf first: the probed instruction itself, then return addresses.
    pub frames: Vec<u64>,
    /// Whether callers may be missing: there are more than 127 frames, or one could not be read.
    pub truncated: bool,
    /// How often.
    pub registered: u64,
}

/// What was not counted, by reason. All but the first say that numbers are incomplete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loss {
    /// Hits by other processes, which are none of ours. Not a loss.
    pub foreign: u64,
    /// Hits that named no site of the session. Counted in `hits` alone.
    pub unknown_site: u64,
    /// Hits that the kernel did not report, because a program was running on that CPU already.
    pub missed: u64,
    /// Stacks beyond the number asked for, [`Request::stacks`].
    pub stacks_full: u64,
    /// Stacks given up because too many threads were preempted amid a hit on one CPU.
    pub stack_busy: u64,
}

impl Loss {
    /// Hits that are in no site's count.
    pub fn hits(&self) -> u64 {
        self.unknown_site + self.missed
    }

    /// Hits that are in their site's count but in no stack.
    pub fn stacks(&self) -> u64 {
        self.stacks_full + self.stack_busy
    }
}
