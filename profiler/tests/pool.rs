//! Pool outcomes against the runtime itself: fixtures on a runtime whose `panic.go` counts hits,
//! refills, misses and spills agree exactly with the profile, in all and by statement.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use deferprof_fixtures::{Build, Fixture, RuntimeTruth, Toolchain};
use serde_json::Value;
use support::{as_the_runtime_names_it, deferprof, or_skip, uprobes_work};

/// Records a run on many Ps; the profile and what the runtime counted.
fn record(binary: &Path, link: &str) -> (Value, RuntimeTruth) {
    let name = binary.file_name().unwrap().to_string_lossy();
    let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{link}.json"));
    let output = deferprof()
        .env("GOMAXPROCS", "16")
        .args(["run", "--link", link, "-o"])
        .arg(&profile)
        .args(["--include", "."])
        .arg("--")
        .arg(binary)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let truth = RuntimeTruth::read(binary, &stderr).unwrap();
    let text = std::fs::read(&profile).unwrap();
    (serde_json::from_slice(&text).unwrap(), truth)
}

/// Hits, refills and misses by function and line, of statements that took records.
fn outcomes(profile: &Value) -> BTreeMap<(String, u64), [u64; 3]> {
    let mut outcomes = BTreeMap::new();
    for site in profile["sites"].as_array().unwrap() {
        let heap = ["heap", "range-func"].contains(&site["mechanism"].as_str().unwrap());
        assert_eq!(heap, !site["pool"].is_null(), "{site}");
        if !heap || site["registered"] == 0 {
            continue;
        }
        let function = as_the_runtime_names_it(site["function"].as_str().unwrap());
        let place = (function, site["line"].as_u64().unwrap());
        let sum: &mut [u64; 3] = outcomes.entry(place).or_default();
        for (sum, name) in sum.iter_mut().zip(["hit", "refill", "miss"]) {
            *sum += site["pool"][name].as_u64().unwrap();
        }
    }
    outcomes
}

fn compare(release: &str, link: &str, buildmode: &str, fixtures: &[&str]) {
    if !uprobes_work() {
        return;
    }
    let Some(toolchain) = or_skip(release, Toolchain::find(release)) else {
        return;
    };
    for fixture in fixtures {
        let what = format!("{fixture} go{release} {link} {buildmode}");
        let fixture = Fixture::find(fixture).unwrap();
        let build = fixture.build(&toolchain, &Build::default().counted().buildmode(buildmode));
        let Some(binary) = or_skip(&what, build) else {
            continue;
        };
        let (profile, truth) = record(&binary, link);
        let mut expected = BTreeMap::new();
        for site in &truth.sites {
            let sum: &mut [u64; 3] = expected
                .entry((site.function.clone(), u64::from(site.line)))
                .or_default();
            for (sum, count) in sum.iter_mut().zip(site.outcomes) {
                *sum += count;
            }
        }
        assert_eq!(outcomes(&profile), expected, "{what}");
        let runtime = &profile["runtime"];
        assert_eq!(runtime["refill"], truth.refill, "{what}");
        assert_eq!(runtime["miss"], truth.miss, "{what}");
        assert_eq!(runtime["spill"], truth.spill, "{what}");
        let stack: u64 = profile["sites"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|site| site["mechanism"] == "stack")
            .map(|site| site["registered"].as_u64().unwrap())
            .sum();
        assert_eq!(stack, truth.stack, "{what}");
        println!(
            "{what}: {} hits, {} refills, {} misses, {} spills, {} stack records agree",
            truth.hit, truth.refill, truth.miss, truth.spill, truth.stack
        );
        if fixture.name == "storm" {
            let all = [truth.refill, truth.miss, truth.spill];
            assert!(all.iter().all(|count| *count > 100), "{what}: {truth:?}");
        }
    }
}

const FIXTURES: &[&str] = &[
    "storm",
    "stress",
    "rangefunc",
    "panics",
    "goexit",
    "recursion",
];

macro_rules! matrix {
    ($($test:ident: $release:literal $link:literal $mode:literal $fixtures:expr;)*) => {
        $(#[test] fn $test() { compare($release, $link, $mode, $fixtures); })*
    };
}

matrix! {
    multi_1_19: "1.19" "multi" "exe" &["storm"];
    multi_1_21: "1.21" "multi" "exe" FIXTURES;
    multi_1_22: "1.22" "multi" "exe" &["storm"];
    multi_1_23: "1.23" "multi" "exe" FIXTURES;
    multi_1_24: "1.24" "multi" "exe" &["rangefunc"];
    multi_1_25: "1.25" "multi" "exe" FIXTURES;
    multi_1_26: "1.26" "multi" "exe" &["storm"];
    multi_1_27: "1.27" "multi" "exe" FIXTURES;
    multi_pie_1_21: "1.21" "multi" "pie" &["storm"];
    multi_pie_1_27: "1.27" "multi" "pie" &["storm", "rangefunc"];
    perf_1_27: "1.27" "perf" "exe" &["storm", "rangefunc"];
}
