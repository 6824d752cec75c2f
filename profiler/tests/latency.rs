//! Latencies. Fixtures with holds and deferred calls of known length measure them with their own
//! clock, and the profile must agree: the only test in which a time is asserted. It is compared with
//! what the fixture saw of the same executions, not with the length that was meant, so a busy machine
//! spoils little; what is spoiled is tried again, and every attempt is printed. Every figure must be
//! right once: a bias is wrong in all attempts, a disturbance is not.

mod support;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;

use deferprof_fixtures::{Build, Fixture, Measured, Options, Ran, RuntimeTruth, Toolchain, Truth};
use serde_json::Value;
use support::{
    Deferprof, as_the_runtime_names_it, deferprof, full, measures_ran, or_skip, site_at,
};

const ATTEMPTS: u32 = 3;

fn build(fixture: &str, release: &str, build: &Build) -> Option<PathBuf> {
    let what = format!("{fixture} go{release}");
    let toolchain = or_skip(&what, Toolchain::find(release))?;
    or_skip(
        &what,
        Fixture::find(fixture).unwrap().build(&toolchain, build),
    )
}

fn record(binary: &std::path::Path, options: &Options, flags: &[&str]) -> (Value, Truth) {
    let mut arguments = vec!["--format=json".to_owned()];
    arguments.extend(flags.iter().map(ToString::to_string));
    let mut deferprof = Deferprof::run(&arguments, binary, &options.arguments());
    let (output, profile) = deferprof.output_and_profile();
    (profile, serde_json::from_str(&output).unwrap())
}

/// Half of the profile's values, and 99 % of them, are where the fixture's own are. Returns a line for
/// people, and whether it is so.
///
/// The median: within 2 % or 1 µs of the fixture's inner one, whichever is larger. The last
/// percentile: within 5 % or 1 µs of the interval from the fixture's inner one to its outer one,
/// since a disturbance between the two clock readings, and in a probe, is in one of them only.
fn agrees(site: &Value, which: &str, own: Measured) -> (String, bool) {
    let histogram = &site["latency_ns"][which];
    let value = |name: &str| histogram[name].as_u64().unwrap_or(0);
    let (p50, p99) = (value("p50"), value("p99"));
    let slack = |of: u64, percent: u64| (of * percent / 100).max(1000);
    let (inner, outer) = (own.inner, own.outer);
    let median = p50.abs_diff(inner.p50) <= slack(inner.p50, 2);
    let low = inner.p99.saturating_sub(slack(inner.p99, 5));
    let high = outer.p99 + slack(outer.p99, 5);
    let last = (low..=high).contains(&p99);
    let count = value("count") == own.count;
    let line = format!(
        "{:10} {which}: p50 {p50} against {}{}; p99 {p99} against {}…{}{}; count {} of {}",
        site["mechanism"].as_str().unwrap_or_default(),
        inner.p50,
        if median { "" } else { " WRONG" },
        inner.p99,
        outer.p99,
        if last { "" } else { " WRONG" },
        value("count"),
        own.count
    );
    (line, median && last && count)
}

fn known_lengths(fixture: &str, release: &str, flags: &[&str]) {
    if !measures_ran() {
        return;
    }
    let Some(binary) = build(fixture, release, &Build::default()) else {
        return;
    };
    let mut attempts = String::new();
    let mut right = BTreeSet::new();
    for attempt in 1..=ATTEMPTS {
        let (profile, truth) = record(&binary, &Options::default().n(100), flags);
        let mut wrong = BTreeSet::new();
        let _ = writeln!(
            attempts,
            "{fixture} go{release} {flags:?}, attempt {attempt}:"
        );
        for own in &truth.sites {
            let site = site_at(&profile, &own.function, own.line);
            assert_eq!(site["registered"], own.registered, "{site}");
            let own_line = own.line;
            if let Some(times) = own.times {
                for (which, own) in [("held", times.held), ("call", times.call)] {
                    let (line, agrees) = agrees(site, which, own);
                    let _ = writeln!(attempts, "  {line}");
                    let figure = (own_line, which);
                    match agrees {
                        true => right.insert(figure),
                        false => wrong.insert(figure),
                    };
                }
            }
        }
        assert_eq!(lost(&profile), 0, "{fixture}: {}", profile["loss"]);
        if wrong.is_subset(&right) {
            println!("{attempts}");
            return;
        }
        let _ = writeln!(attempts, "  wrong on these lines: {wrong:?}");
    }
    panic!("{attempts}");
}

/// What the profile says it missed, of all kinds.
fn lost(profile: &Value) -> u64 {
    ["dropped", "evicted", "unmatched"]
        .iter()
        .map(|kind| profile["loss"][kind].as_u64().unwrap())
        .sum()
}

/// Every time that was not taken is owned up to: a count is that of the statement, or of the calls, or
/// lower by what is unmatched. Exactly equal where `whole`.
fn counts_add_up(what: &str, profile: &Value, whole: bool) {
    let mut missing = 0;
    let mut where_missing = String::new();
    for site in profile["sites"].as_array().unwrap() {
        let latency = &site["latency_ns"];
        let registered = site["registered"].as_u64().unwrap();
        let ran: Ran = serde_json::from_value(site["ran"].clone()).unwrap();
        let record = ["heap", "range-func"].contains(&site["mechanism"].as_str().unwrap());
        assert!(record || latency["register"].is_null(), "{what}: {site}");
        for (which, expected, there) in [
            ("register", registered, record),
            ("call", ran.total(), true),
            ("held", ran.total(), true),
        ] {
            if !there || latency[which].is_null() && expected == 0 {
                continue;
            }
            let count = latency[which]["count"]
                .as_u64()
                .unwrap_or_else(|| panic!("{what}: no {which}: {site}"));
            assert!(
                count <= expected,
                "{what}: {count} of {expected} {which}: {site}"
            );
            assert!(
                !whole || count == expected,
                "{what}: {count} of {expected} {which}: {site}"
            );
            missing += expected - count;
            if count < expected {
                let id = &site["id"];
                let _ = write!(where_missing, "\n  {id} {which}: {count} of {expected}");
            }
            ordered(what, &latency[which]);
        }
    }
    assert!(
        missing <= lost(profile),
        "{what}: {missing} times are missing, and {} said so:{where_missing}",
        profile["loss"]
    );
}

fn ordered(what: &str, histogram: &Value) {
    if histogram["count"] == 0 {
        return;
    }
    let values: Vec<u64> = ["min", "p50", "p90", "p99", "p999", "max"]
        .iter()
        .map(|name| histogram[name].as_u64().unwrap())
        .collect();
    assert!(values.is_sorted(), "{what}: {histogram}");
    let mean = histogram["mean"].as_f64().unwrap();
    // Buckets round by at most 3 %.
    assert!(
        values[0] as f64 <= mean * 1.04 + 1.0 && mean <= values[5] as f64 * 1.04 + 1.0,
        "{what}: {histogram}"
    );
    assert!(
        histogram["below_floor"].as_u64() <= histogram["count"].as_u64(),
        "{what}: {histogram}"
    );
}

/// Fixtures in which every deferred call returns, and nothing is pending: nothing may be unmatched.
const UNDISTURBED: &[&str] = &[
    "conditionals",
    "returns",
    "methods",
    "closures",
    "generics",
    "nested",
    "recursion",
    "frames",
    "mutex",
];

/// And those in which calls end by a panic or by Goexit, or never come.
const DISTURBED: &[&str] = &["panics", "goexit", "unwind", "rangefunc", "stress", "exit"];

fn counts(release: &str) {
    if !measures_ran() {
        return;
    }
    for (fixtures, whole) in [(UNDISTURBED, true), (DISTURBED, false)] {
        for fixture in fixtures {
            let what = format!("{fixture} go{release}");
            let Some(binary) = build(fixture, release, &Build::default()) else {
                continue;
            };
            // Sites of main only: goroutines of the library may wait for ever.
            let flags = ["--latency", "--include", r"^main\."];
            let (profile, truth) = record(&binary, &Options::default(), &flags);
            for (place, counts) in truth.by_place() {
                let ran = profile["sites"].as_array().unwrap().iter().filter(|site| {
                    let function = as_the_runtime_names_it(site["function"].as_str().unwrap());
                    (function.as_str(), site["line"].as_u64())
                        == (place.0.as_str(), Some(u64::from(place.1)))
                });
                let mut sum = Ran::default();
                for site in ran {
                    sum += serde_json::from_value(site["ran"].clone()).unwrap();
                }
                assert_eq!(sum, counts.ran, "{what}: {place:?}");
            }
            counts_add_up(&what, &profile, whole);
            if whole {
                assert_eq!(lost(&profile), 0, "{what}: {}", profile["loss"]);
            }
            println!("{what}: {}", profile["loss"]);
        }
    }
}

/// Everything at once, and the program is none the worse for it.
fn storm(release: &str, seconds: f64) {
    if !measures_ran() {
        return;
    }
    let build_flags = Build::default().counted();
    let Some(binary) = build("storm", release, &build_flags) else {
        return;
    };
    let what = format!("storm go{release} for {seconds} s");
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join(format!("storm-{release}.json"));
    // Its exit status is passed on: it is 3 if a deferred call computed something wrong.
    let output = deferprof()
        .env("GOMAXPROCS", "16")
        .args(["run", "--latency", "--stacks", "--include", ".", "-o"])
        .arg(&file)
        .arg("--")
        .arg(&binary)
        .args(Options::default().seconds(seconds).arguments())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {stderr}");
    let runtime = RuntimeTruth::read(&binary, &stderr).unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let truth = stdout.lines().find(|l| l.starts_with("{\"fixture\""));
    let truth: Truth = serde_json::from_str(truth.unwrap()).unwrap();
    let profile: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();

    for own in &truth.sites {
        let site = site_at(&profile, &own.function, own.line);
        assert_eq!(site["registered"], own.registered, "{what}: {site}");
        let ran: Ran = serde_json::from_value(site["ran"].clone()).unwrap();
        assert_eq!(ran, own.ran, "{what}: {site}");
        assert_eq!(site["pending"], 0, "{what}: {site}");
    }
    assert_eq!(profile["panics"]["started"], runtime.panics, "{what}");
    assert_eq!(profile["panics"]["recovered"], runtime.resumed, "{what}");
    assert_eq!(profile["runtime"]["miss"], runtime.miss, "{what}");
    assert_eq!(profile["loss"]["dropped"], 0, "{what}");
    counts_add_up(&what, &profile, false);
    // The deferred call of `falling` panics again: its end is not seen. All others return.
    let panicking = truth.sites.iter().max_by_key(|site| site.line).unwrap();
    assert_eq!(panicking.function, "main.falling");
    let unmatched = profile["loss"]["unmatched"].as_u64().unwrap();
    println!(
        "{what}: {} registered, {unmatched} unmatched, {runtime:?}",
        truth.registered()
    );
    // At most each of them once, and what is under way in the library as the program ends.
    assert!(
        unmatched <= panicking.ran.total() + 64,
        "{what}: {unmatched} unmatched"
    );
}

macro_rules! known {
    ($($test:ident: $fixture:literal $release:literal $($flag:literal)*;)*) => {
        $(#[test] fn $test() { known_lengths($fixture, $release, &["--latency", $($flag),*]); })*
    };
}

known! {
    holds_1_19: "holds" "1.19";
    holds_1_21: "holds" "1.21";
    holds_1_27: "holds" "1.27";
    holds_with_stacks_1_27: "holds" "1.27" "--stacks";
    holds_range_1_23: "holdsrange" "1.23";
    holds_range_1_27: "holdsrange" "1.27";
}

#[test]
fn counts_1_19() {
    if full() {
        counts("1.19");
    } else {
        println!("left to DEFERPROF_FULL=1");
    }
}

#[test]
fn counts_1_21() {
    counts("1.21");
}

#[test]
fn counts_1_25() {
    if full() {
        counts("1.25");
    } else {
        println!("left to DEFERPROF_FULL=1");
    }
}

#[test]
fn counts_1_27() {
    counts("1.27");
}

#[test]
fn storm_1_27() {
    storm("1.27", if full() { 60.0 } else { 5.0 });
}

#[test]
fn storm_1_21() {
    if full() {
        storm("1.21", 60.0);
    } else {
        println!("left to DEFERPROF_FULL=1");
    }
}
