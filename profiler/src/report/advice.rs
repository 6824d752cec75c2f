//! Why a site is not open-coded, and what to do about it: a sentence for each reason, and for each
//! site the story that its figures tell.

use deferprof_symbols::{Mechanism, Reason};

use super::text::{clean, count, rate, share, time};
use crate::profile::{Histogram, ProfileSite, WhyNotOpenCoded};

/// A resource held longer than this at its 99th percentile is worth a word, in ns.
const LONG_HOLD: u64 = 1_000_000;

/// A saving of less than this is not worth a change, in ns of CPU time a second: 0.001 % of a core.
const WORTH_A_CHANGE: f64 = 10_000.0;

/// The explanation under a table, or `None` for a word that this version does not know.
pub(super) fn sentence(reason: &WhyNotOpenCoded) -> Option<&'static str> {
    let WhyNotOpenCoded::Rule(reason) = reason else {
        return None;
    };
    Some(match reason {
        Reason::Loop => {
            "the statement stands in a loop, so every turn takes a record; \
             move the loop's body into a function of its own"
        }
        Reason::LoopInFunction => {
            "another defer of the function stands in a loop, which bars open coding for all of them; \
             move that loop's body into a function of its own"
        }
        Reason::Over8Defers => "the function has more than 8 defers; split it",
        Reason::ReturnsTimesDefers => {
            "the function's returns times its defers exceed 15; join returns or split it"
        }
        Reason::OptimizationsOff => "the package was compiled with -N; build it without",
        Reason::Race => "the race detector turns open coding off; build without -race",
        Reason::ResultsEscape => {
            "a result of the function lives on the heap, because its address is taken; \
             return a copy instead"
        }
        Reason::RangeFunc => {
            "the statement stands in the body of a range-over-func loop, \
             so every turn takes a record; move the body into a function of its own"
        }
        Reason::RangeFuncInFunction => {
            "another defer of the function stands in a range-over-func body; \
             move that body into a function of its own"
        }
        Reason::OldRelease => "Go 1.13 and older know no open coding; build with a newer release",
        _ => return None,
    })
}

/// What the figures of a site say, and what to do: `heap record per iteration, 31 % pool misses,
/// 80.0 k/s: move the body into a function`. `seconds` is how long it was watched, if at all.
pub(super) fn story(site: &ProfileSite, seconds: Option<f64>) -> String {
    let mut facts = vec![record(site)];
    if let Some(pool) = site.pool {
        let records = [pool.hit, pool.refill, pool.miss].map(|n| n as f64);
        let all: f64 = records.iter().sum();
        if pool.miss > 0 && pool.miss as f64 >= all / 100.0 {
            facts.push(format!("{} pool misses", share(pool.miss as f64, all)));
        }
    }
    if let Some(seconds) = seconds {
        facts.push(format!("{}/s", rate(site.count() as f64 / seconds)));
    }
    if let Some(ran) = site.ran {
        for (calls, path) in [(ran.panic, "panics"), (ran.goexit, "Goexit")] {
            if calls > 0 && calls as f64 >= ran.total() as f64 / 100.0 {
                let part = share(calls as f64, ran.total() as f64);
                facts.push(format!("{part} run by {path}"));
            }
        }
    }
    if let Some(pending) = site.pending.filter(|&n| n > 0) {
        facts.push(format!("{} still pending at the end", count(pending)));
    }
    let time_of = |which: fn(&crate::profile::Latency) -> Option<Histogram>| {
        let told = |h: &Histogram| h.count > 0 && !below_floor(h, 99);
        site.latency_ns.as_ref().and_then(which).filter(told)
    };
    if let Some(call) = time_of(|latency| latency.call).filter(|h| h.p99 >= LONG_HOLD) {
        facts.push(format!("the call takes {} at p99", time(call.p99 as f64)));
    }
    let held = time_of(|latency| latency.held).filter(|h| h.p99 >= LONG_HOLD);
    if let Some(held) = held {
        facts.push(format!("held {} at p99", time(held.p99 as f64)));
    }

    let mut actions = Vec::new();
    if site.info.mechanism != Mechanism::OpenCoded {
        let worth = match (site.saving_ns, seconds) {
            (Some(ns), Some(seconds)) => ns / seconds >= WORTH_A_CHANGE,
            _ => true,
        };
        match site.info.reason.as_ref().and_then(action) {
            Some(action) if worth => actions.push(action.to_owned()),
            Some(_) if held.is_none() => actions.push("too rare to be worth a change".to_owned()),
            _ => {}
        }
    }
    if held.is_some() {
        actions.push(release(site.info.callee.as_deref()));
    }
    if actions.is_empty() && site.info.mechanism == Mechanism::OpenCoded {
        actions.push("as cheap as a defer can be".to_owned());
    }
    match actions.is_empty() {
        true => facts.join(", "),
        false => format!("{}: {}", facts.join(", "), actions.join(", and ")),
    }
}

/// Whether the value that so many percent are at most is too short to tell from the probes' own cost.
/// Those below the floor are the smallest, so it is one of them if they are as many.
pub(super) fn below_floor(histogram: &Histogram, percent: u64) -> bool {
    let [below, all] = [histogram.below_floor, histogram.count].map(u128::from);
    below > 0 && below * 100 >= all * u128::from(percent)
}

/// What kind of record, and by which rule.
fn record(site: &ProfileSite) -> String {
    use Mechanism::{Heap, OpenCoded, RangeFunc, Stack};
    let mechanism = site.info.mechanism;
    let rule = match &site.info.reason {
        Some(WhyNotOpenCoded::Rule(reason)) => Some(*reason),
        Some(WhyNotOpenCoded::Other(word)) => {
            return format!("{mechanism} record ({})", clean(word));
        }
        None => None,
    };
    match (mechanism, rule) {
        (OpenCoded, _) => "open-coded".to_owned(),
        (Heap, Some(Reason::Loop)) => "heap record per iteration".to_owned(),
        (RangeFunc, _) => "heap record per iteration of a range-over-func loop".to_owned(),
        (Heap | Stack, rule) => {
            let why = rule.and_then(|rule| {
                Some(match rule {
                    Reason::LoopInFunction => " because of another defer in a loop",
                    Reason::Over8Defers => " because the function has more than 8 defers",
                    Reason::ReturnsTimesDefers => {
                        " because of the function's many returns and defers"
                    }
                    Reason::OptimizationsOff => " because of -N",
                    Reason::Race => " because of -race",
                    Reason::ResultsEscape => " because a result lives on the heap",
                    Reason::RangeFuncInFunction => {
                        " because of another defer in a range-over-func loop"
                    }
                    Reason::OldRelease => " because of the old Go release",
                    _ => return None,
                })
            });
            format!("{mechanism} record{}", why.unwrap_or_default())
        }
    }
}

/// What to do about a reason, in a few words.
fn action(reason: &WhyNotOpenCoded) -> Option<&'static str> {
    let WhyNotOpenCoded::Rule(reason) = reason else {
        return None;
    };
    Some(match reason {
        Reason::Loop | Reason::RangeFunc => "move the body into a function",
        Reason::LoopInFunction | Reason::RangeFuncInFunction => {
            "move that loop's body into a function"
        }
        Reason::Over8Defers => "split the function",
        Reason::ReturnsTimesDefers => "join returns or split the function",
        Reason::OptimizationsOff => "build without -N",
        Reason::Race => "build without -race",
        Reason::ResultsEscape => "return a copy of the result",
        Reason::OldRelease => "build with a newer Go",
        _ => return None,
    })
}

/// What to do about a long hold.
fn release(callee: Option<&str>) -> String {
    let method = callee.and_then(|callee| callee.rsplit('.').next());
    let verb = match method {
        Some("Unlock" | "RUnlock") => "unlock",
        Some("Close") => "close",
        Some("Rollback" | "Commit") => "end the transaction",
        _ => "let go",
    };
    format!("{verb} earlier")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(change: serde_json::Value) -> ProfileSite {
        let mut site = serde_json::json!({
            "id": "main.f#1", "function": "main.f", "file": "/main.go", "line": 3, "pc": "0x1000",
            "mechanism": "heap", "reason": "loop", "callee": null, "bit": null,
            "registered": 800_000, "cost_ns": 2e7, "saving_ns": 1.9e7,
        });
        let fields = site.as_object_mut().unwrap();
        fields.extend(change.as_object().unwrap().clone());
        serde_json::from_value(site).unwrap()
    }

    fn histogram(p50: u64, p99: u64, below_floor: u64) -> serde_json::Value {
        serde_json::json!({"count": 100, "below_floor": below_floor, "min": 1, "p50": p50,
            "p90": p50, "p99": p99, "p999": p99, "max": p99, "mean": p50})
    }

    #[test]
    fn the_figures_tell_a_story() {
        let told = |change| story(&site(change), Some(10.0));
        let miss = serde_json::json!({"pool": {"hit": 500_000, "refill": 52_000, "miss": 248_000}});
        assert_eq!(
            told(miss),
            "heap record per iteration, 31.0 % pool misses, 80.0 k/s: move the body into a function"
        );
        let open =
            serde_json::json!({"mechanism": "open-coded", "reason": null, "saving_ns": null});
        assert_eq!(
            told(open),
            "open-coded, 80.0 k/s: as cheap as a defer can be"
        );
        let held = serde_json::json!({
            "mechanism": "open-coded", "reason": null, "saving_ns": null,
            "callee": "sync.(*Mutex).Unlock",
            "latency_ns": {"call": histogram(90, 200, 0), "held": histogram(2000, 12_000_000, 0)},
        });
        assert_eq!(
            told(held),
            "open-coded, 80.0 k/s, held 12.0 ms at p99: unlock earlier"
        );
        let both = serde_json::json!({
            "mechanism": "stack", "reason": "over-8-defers", "callee": "os.(*File).Close",
            "ran": {"return": 700_000, "panic": 90_000, "goexit": 0}, "pending": 10_000,
            "latency_ns": {"call": histogram(90, 3_000_000, 0), "held": histogram(2000, 5_000_000, 0)},
        });
        assert_eq!(
            told(both),
            "stack record because the function has more than 8 defers, 80.0 k/s, \
             11.4 % run by panics, 10.0 k still pending at the end, \
             the call takes 3.00 ms at p99, held 5.00 ms at p99: \
             split the function, and close earlier"
        );
        let rare = serde_json::json!({"registered": 20, "cost_ns": 500.0, "saving_ns": 490.0});
        assert_eq!(
            told(rare),
            "heap record per iteration, 2.00/s: too rare to be worth a change"
        );
        let later = serde_json::json!({"reason": "a-rule-of-2031"});
        assert_eq!(told(later), "heap record (a-rule-of-2031), 80.0 k/s");
    }

    #[test]
    fn times_below_the_floor_say_nothing() {
        let h = |p50, p99, below| serde_json::from_value(histogram(p50, p99, below)).unwrap();
        assert!(below_floor(&h(5, 300, 50), 50));
        assert!(!below_floor(&h(5, 300, 49), 50));
        assert!(!below_floor(&h(5, 300, 98), 99));
        assert!(below_floor(&h(5, 300, 99), 99));
    }
}
