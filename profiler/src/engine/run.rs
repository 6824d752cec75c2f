//! When deferred calls are made, as a question to an engine and its answer.

use deferprof_symbols::{Entered, FileOffset, RunProbes};

/// What an engine needs to tell when deferred calls are made. It finds the sites of records by
/// [`More::returns`](super::More::returns).
#[derive(Clone, Copy, Debug)]
pub struct RunRequest<'a> {
    /// The runtime's loops; `None` to see only what exit code itself calls.
    pub probes: Option<&'a RunProbes>,
    /// The exit code's own calls.
    pub exits: &'a [ExitProbe],
    /// The functions that exit code calls. [`More::returns`](super::More::returns) has the return
    /// addresses of these calls.
    pub entries: &'a [Entered],
}

/// A call that exit code makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitProbe {
    /// Executed when the call is about to be made; `None` if its function's entry is probed.
    pub start: Option<(FileOffset, InstructionCost)>,
    /// Executed when it has returned; for times only.
    pub end: Option<(FileOffset, InstructionCost)>,
    /// The site.
    pub site: u32,
}

/// What the kernel does at a probed instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionCost {
    /// It emulates it: one trap.
    Emulated,
    /// It single-steps it: two traps.
    SingleStepped,
}

impl InstructionCost {
    /// The cost of a probe point.
    pub fn of(point: &deferprof_symbols::ProbePoint) -> Self {
        match point.kind.is_emulated() {
            true => Self::Emulated,
            false => Self::SingleStepped,
        }
    }
}

/// How often a site's deferred call was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// On a return.
    pub on_return: u64,
    /// While panicking.
    pub on_panic: u64,
    /// In `runtime.Goexit`.
    pub on_goexit: u64,
}

/// How often deferred calls were made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunCounts {
    /// By site.
    pub ran: Vec<Ran>,
    /// Panics that started.
    pub panicked: u64,
    /// Panics that were recovered.
    pub recovered: u64,
    /// Calls of no site that was asked for, or of one that registered before the counting began in
    /// a range-over-func body.
    pub unknown: u64,
    /// Calls of which the target's memory could not be read. Not 0: no site's count is certain.
    pub unreadable: u64,
    /// Records of range-over-func bodies that had no room: so many of their calls are in `unknown`.
    pub records_full: u64,
}
