//! Deferred calls in a recording: what to ask the engine, and how its answers enter the profile.

use deferprof_symbols::{ProbePoint, Site};

use crate::engine::{Counts, Distribution, InstructionCost, Questions, Taxes, takes_record};
use crate::profile::{Histogram, Latency, Panics, Ran};

/// How often one site's deferred call was made.
pub(super) fn of_site(counts: &Counts, questions: &Questions, index: usize) -> Option<Ran> {
    let runs = counts.runs.as_ref()?;
    if runs.unreadable > 0 || counts.loss.missed > 0 || !questions.sees_runs(index) {
        return None;
    }
    let ran = runs.ran.get(index)?;
    Some(Ran {
        r#return: ran.on_return,
        panic: ran.on_panic,
        goexit: ran.on_goexit,
    })
}

/// The panics of the whole process.
pub(super) fn panics(counts: &Counts) -> Option<Panics> {
    let runs = counts.runs.as_ref()?;
    Some(Panics {
        started: runs.panicked,
        recovered: runs.recovered,
    })
}

/// The times of one site.
pub(super) fn latency(counts: &Counts, index: usize, site: &Site, taxes: Taxes) -> Option<Latency> {
    let times = counts.latency.as_ref()?.sites.get(index)?;
    use InstructionCost::{Emulated, SingleStepped};
    let stepped = |point: ProbePoint| !point.kind.is_emulated();
    let mut exits = site.exits.iter().filter(|exit| exit.entered.is_none());
    let exits_step = exits.any(|exit| exit.start.is_some_and(stepped));
    let called = if exits_step { SingleStepped } else { Emulated };
    // A record is held from within the runtime.
    let held = match takes_record(site) {
        true => Emulated,
        false => InstructionCost::of(&site.registration),
    };
    Some(Latency {
        register: takes_record(site).then(|| histogram(&times.register, taxes.floor_ns(Emulated))),
        call: Some(histogram(&times.call, taxes.floor_ns(called))),
        held: Some(histogram(&times.held, taxes.floor_ns(held))),
    })
}

/// Ends without a start, and deferred calls that were not seen to return: they panicked, ended the
/// goroutine or the process, or are still under way.
pub(super) fn unmatched(counts: &Counts) -> Option<u64> {
    let (latency, runs) = (counts.latency.as_ref()?, counts.runs.as_ref()?);
    let made: u64 = runs
        .ran
        .iter()
        .map(|ran| ran.on_return + ran.on_panic + ran.on_goexit)
        .sum();
    let returned: u64 = latency.sites.iter().map(|site| site.call.count()).sum();
    Some(latency.unmatched + made.saturating_sub(returned))
}

fn histogram(times: &Distribution, floor_ns: u64) -> Histogram {
    let quantile = |share| times.quantile(share).unwrap_or(0);
    let (min, max) = times.range().unwrap_or((0, 0));
    Histogram {
        count: times.count(),
        below_floor: times.below(floor_ns),
        min,
        p50: quantile(0.5),
        p90: quantile(0.9),
        p99: quantile(0.99),
        p999: quantile(0.999),
        max,
        mean: times.mean().unwrap_or(0.0),
    }
}

/// What to say of deferred calls that no site was seen to register.
pub(super) fn unknown(counts: &Counts) -> Option<String> {
    let unknown = counts.runs.as_ref()?.unknown;
    (unknown > 0).then(|| {
        format!(
            "{unknown} deferred calls are in no site's `ran`: of other Go code in the process, or \
             registered in range-over-func bodies before the recording began"
        )
    })
}

/// What is not certain, a sentence each.
pub(super) fn doubts(counts: &Counts, questions: &Questions, sites: usize) -> Vec<String> {
    let mut sentences = Vec::new();
    let mut say = |count: u64, what: &str| {
        if count > 0 {
            sentences.push(format!("{count} {what}"));
        }
    };
    if let Some(runs) = &counts.runs {
        say(
            runs.unreadable,
            "deferred calls could not be told, so `ran` is left out: the target's memory could not be read",
        );
        say(
            runs.records_full,
            "range-over-func defers had no room: their calls are not in `ran`",
        );
        let blind = (0..sites)
            .filter(|site| !questions.sees_runs(*site))
            .count();
        say(
            blind as u64,
            "sites have an exit that cannot be probed: their `ran` is left out",
        );
    }
    if let Some(latency) = &counts.latency {
        say(
            latency.in_flight_full,
            "times are missing: too many defers were held at once",
        );
        say(
            latency.buckets_full,
            "times are missing: too many different ones",
        );
        say(
            latency.evicted,
            "times are missing: there were too many goroutines",
        );
    }
    sentences
}
