//! Why the sites of a function are not open-coded: the compiler's rules, read backwards.
//!
//! The rules stand in `cmd/compile/internal/walk/stmt.go` (`walkStmt`, ODEFER) and
//! `cmd/compile/internal/ssagen/ssa.go` (`buildssa`), unchanged in substance from 1.14 to 1.27.

use crate::buildinfo::BuildInfo;
use crate::calls::Callee;
use crate::release::Release;
use crate::{Mechanism, Reason};

/// `maxOpenDefers` in the compiler.
const MOST_OPEN: usize = 8;
/// The compiler's bound on return statements times defers.
const MOST_PRODUCT: usize = 15;

/// What the rules look at, for one function without open coding.
pub(crate) struct Facts<'a> {
    pub release: Release,
    /// What [`optimizations_off`] says of the build.
    pub optimizations_off: bool,
    /// What the function calls.
    pub calls: &'a [Callee],
    /// The mechanisms of its sites.
    pub mechanisms: &'a [Mechanism],
}

/// The reason for one site of mechanism `mechanism`; `None` for open-coded ones. `of_stack` is the
/// reason for the stack sites of its function.
pub(crate) fn of(
    release: Release,
    mechanism: Mechanism,
    of_stack: Option<Reason>,
) -> Option<Reason> {
    match mechanism {
        _ if release.knows_only_the_heap() => Some(Reason::OldRelease),
        Mechanism::OpenCoded => None,
        Mechanism::Heap => Some(Reason::Loop),
        Mechanism::RangeFunc => Some(Reason::RangeFunc),
        Mechanism::Stack => of_stack,
    }
}

/// Why a function has stack sites, if it has: one reason for all of them.
pub(crate) fn of_stack(facts: &Facts<'_>) -> Option<Reason> {
    let has_some = facts.mechanisms.contains(&Mechanism::Stack);
    has_some.then(|| rule(facts))
}

/// The rule that such a function falls under.
fn rule(facts: &Facts<'_>) -> Reason {
    let calls = |callee| facts.calls.iter().filter(|c| **c == callee).count();
    let has = |mechanism| facts.mechanisms.contains(&mechanism);
    let sites = facts.mechanisms.len();
    if facts.release.minor < 14 {
        return Reason::OldRelease;
    }
    if calls(Callee::Race) > 0 {
        return Reason::Race;
    }
    if facts.optimizations_off {
        return Reason::OptimizationsOff;
    }
    if has(Mechanism::RangeFunc) || calls(Callee::StartsRangeFunc) > 0 {
        return Reason::RangeFuncInFunction;
    }
    if has(Mechanism::Heap) {
        return Reason::LoopInFunction;
    }
    if sites > MOST_OPEN {
        return Reason::Over8Defers;
    }
    // Every return calls deferreturn; so do the recovery epilogues, one a site up to 1.24, then
    // one a function.
    let epilogues = if facts.release.recovery_epilogue_per_site() {
        sites
    } else {
        1
    };
    let returns = calls(Callee::DeferReturn).saturating_sub(epilogues);
    // A result on the heap is allocated by the function. One that allocates nothing must have had
    // returns that were removed as unreachable after they had been counted.
    let allocates = calls(Callee::NewObject) + calls(Callee::AlwaysReturns) > 0;
    if returns.saturating_mul(sites) > MOST_PRODUCT || !allocates {
        return Reason::ReturnsTimesDefers;
    }
    Reason::ResultsEscape
}

/// Whether the build settings turn optimizations off (`-gcflags=-N` or `-d=noopendefer`).
pub(crate) fn optimizations_off(build: &BuildInfo) -> bool {
    build.setting("-gcflags").is_some_and(|flags| {
        let flags = flags.split_once('=').map_or(flags, |(pattern, rest)| {
            if pattern.starts_with('-') {
                flags
            } else {
                rest
            }
        });
        flags
            .split_ascii_whitespace()
            .any(|flag| flag == "-N" || flag.contains("noopendefer"))
    })
}
