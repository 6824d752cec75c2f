//! Deferred calls by path against the truth: for every fixture the profile's `ran` and `pending` equal
//! what the fixture counted itself, for every site of its main package, exactly; and on a runtime
//! whose `panic.go` counts, the sums equal what the runtime says it ran, panicked and recovered.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use deferprof::engine::LinkKind;
use deferprof_fixtures::{
    Build, Fixture, Options, Ran, RuntimeRan, RuntimeTruth, Toolchain, Truth,
};
use serde_json::Value;
use support::{Deferprof, How, as_the_runtime_names_it, deferprof, full, measures_ran, or_skip};

/// Registered, ran by path, and pending.
type Place = (u64, Ran, Option<u64>);

fn ran(site: &Value) -> Ran {
    serde_json::from_value(site["ran"].clone()).unwrap_or_else(|_| panic!("no ran: {site}"))
}

/// By function and line, of functions of package main.
fn found(profile: &Value, how: How) -> BTreeMap<(String, u64), Place> {
    let mut places = BTreeMap::<_, Place>::new();
    for site in profile["sites"].as_array().unwrap() {
        let function = site["function"].as_str().unwrap();
        if !function.starts_with("main.") {
            continue;
        }
        let line = site["line"].as_u64().unwrap();
        let sum = places
            .entry((as_the_runtime_names_it(function), line))
            .or_default();
        sum.0 += site["registered"].as_u64().unwrap();
        sum.1 += ran(site);
        let pending = site["pending"].as_u64();
        assert_eq!(pending.is_some(), how == How::Run, "{site}");
        sum.2 = pending.map(|pending| pending + sum.2.unwrap_or(0));
    }
    places
}

fn expected(truth: &Truth, how: How) -> BTreeMap<(String, u64), Place> {
    let places = truth.by_place().into_iter();
    places
        .map(|((function, line), c)| {
            let pending = (how == How::Run).then(|| c.registered - c.ran.total());
            ((function, u64::from(line)), (c.registered, c.ran, pending))
        })
        .collect()
}

/// The oldest and the newest, and those between at which the runtime changed; all with
/// `DEFERPROF_FULL`.
fn affordable(release: &str) -> bool {
    let affordable = full() || ["1.19", "1.21", "1.23", "1.25", "1.27"].contains(&release);
    if !affordable {
        println!("go{release}: left to DEFERPROF_FULL=1");
    }
    affordable
}

/// Whether this kind of link can be had here; says so where not.
fn link_works(link: &str) -> bool {
    let kind = match link {
        "trace" => LinkKind::TraceEvent,
        _ => LinkKind::UprobeMulti,
    };
    match deferprof::engine::ebpf::supports(kind) {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

fn compare(release: &str, how: How, link: &str, only: &[&str]) {
    if !measures_ran() || !affordable(release) || !link_works(link) {
        return;
    }
    let Some(toolchain) = or_skip(release, Toolchain::find(release)) else {
        return;
    };
    let mut compared = 0;
    for fixture in Fixture::all().unwrap() {
        if !only.is_empty() && !only.contains(&fixture.name.as_str()) {
            continue;
        }
        let what = format!("{} go{release} {how:?} {link}", fixture.name);
        let Some(binary) = or_skip(&what, fixture.build(&toolchain, &Build::default())) else {
            continue;
        };
        let options = match fixture.name.as_str() {
            "shop" => Options::default().seconds(0.5),
            _ => Options::default(),
        };
        let arguments = ["--format=json".to_owned(), format!("--link={link}")];
        let (profile, truth) = how.record(&arguments, &binary, &options);
        let expected = expected(&truth, how);
        let mut found = found(&profile, how);
        // Sites that the truth does not name may be there (other instantiations) but never ran.
        found.retain(|place, counts| {
            expected.contains_key(place) || counts.0 > 0 || counts.1.total() > 0
        });
        for (place, expected) in &expected {
            assert_eq!(
                found.get(place),
                Some(expected),
                "{what}: {place:?}: registered, ran, pending"
            );
        }
        assert_eq!(found.len(), expected.len(), "{what}: {found:?}");
        assert_eq!(profile["loss"]["dropped"], 0, "{what}");
        compared += expected.len();
    }
    assert!(compared > 0, "nothing was compared");
    println!("go{release} {how:?} {link}: {compared} places agree");
}

/// The sums over all sites of these mechanisms.
fn sum(profile: &Value, mechanisms: &[&str]) -> Ran {
    let mut sum = Ran::default();
    for site in profile["sites"].as_array().unwrap() {
        if mechanisms.contains(&site["mechanism"].as_str().unwrap()) {
            sum += ran(site);
        }
    }
    sum
}

fn counted(release: &str, link: &str, fixtures: &[&str]) {
    if !measures_ran() || !affordable(release) || !link_works(link) {
        return;
    }
    let Some(toolchain) = or_skip(release, Toolchain::find(release)) else {
        return;
    };
    for fixture in fixtures {
        let what = format!("{fixture} go{release} {link}");
        let fixture = Fixture::find(fixture).unwrap();
        let build = fixture.build(&toolchain, &Build::default().counted());
        let Some(binary) = or_skip(&what, build) else {
            continue;
        };
        let name = binary.file_name().unwrap().to_string_lossy();
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ran-{name}-{link}.json"));
        let output = deferprof()
            .args(["run", "--link", link, "-o"])
            .arg(&file)
            .arg("--")
            .arg(&binary)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{what}: {stderr}");
        let truth = RuntimeTruth::read(&binary, &stderr).unwrap();
        let profile: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();

        let records = sum(&profile, &["heap", "stack", "range-func"]);
        let open = sum(&profile, &["open-coded"]);
        let by_runtime = |ran: RuntimeRan| Ran {
            r#return: ran.r#return,
            panic: ran.panic,
            goexit: ran.goexit,
        };
        assert_eq!(records, by_runtime(truth.ran_records), "{what}: records");
        // On a return the functions' own code makes most of the calls: at least the runtime's.
        assert!(open.r#return >= truth.ran_open.r#return, "{what}");
        assert_eq!(
            (open.panic, open.goexit),
            (truth.ran_open.panic, truth.ran_open.goexit),
            "{what}: open-coded"
        );
        let panics = &profile["panics"];
        assert_eq!(panics["started"], truth.panics, "{what}");
        assert_eq!(panics["recovered"], truth.resumed, "{what}");
        println!("{what}: {truth:?}");
    }
}

const COUNTED: &[&str] = &[
    "storm",
    "stress",
    "rangefunc",
    "panics",
    "goexit",
    "unwind",
    "recursion",
];

macro_rules! matrix {
    ($($test:ident: $release:literal $how:ident $link:literal $only:expr;)*) => {
        $(#[test] fn $test() { compare($release, How::$how, $link, $only); })*
    };
}

macro_rules! runtime {
    ($($test:ident: $release:literal $link:literal;)*) => {
        $(#[test] fn $test() { counted($release, $link, COUNTED); })*
    };
}

matrix! {
    run_1_18: "1.18" Run "multi" &[];
    run_1_19: "1.19" Run "multi" &[];
    run_1_20: "1.20" Run "multi" &[];
    run_1_21: "1.21" Run "multi" &[];
    run_1_22: "1.22" Run "multi" &[];
    run_1_23: "1.23" Run "multi" &[];
    run_1_24: "1.24" Run "multi" &[];
    run_1_25: "1.25" Run "multi" &[];
    run_1_26: "1.26" Run "multi" &[];
    run_1_27: "1.27" Run "multi" &[];
    run_trace_1_27: "1.27" Run "trace" &[];
    attach_1_19: "1.19" Attach "multi" &["panics", "goexit", "unwind", "frames", "returns"];
    attach_1_21: "1.21" Attach "multi" &["panics", "goexit", "unwind", "frames", "returns"];
    attach_1_27: "1.27" Attach "multi" &[];
}

runtime! {
    counted_1_19: "1.19" "multi";
    counted_1_21: "1.21" "multi";
    counted_1_22: "1.22" "multi";
    counted_1_23: "1.23" "multi";
    counted_1_24: "1.24" "multi";
    counted_1_25: "1.25" "multi";
    counted_1_26: "1.26" "multi";
    counted_1_27: "1.27" "multi";
}

/// What was not asked for is null, not 0.
#[test]
fn without_ran_and_without_pool() {
    if !measures_ran() {
        return;
    }
    let Some(toolchain) = or_skip("1.27", Toolchain::find("1.27")) else {
        return;
    };
    let fixture = Fixture::find("goexit").unwrap();
    let Some(binary) = or_skip("goexit", fixture.build(&toolchain, &Build::default())) else {
        return;
    };
    for flags in [
        &["--no-ran", "--no-pool"][..],
        &["--no-ran"],
        &["--no-pool"],
    ] {
        let mut arguments = vec!["--format=json".to_owned()];
        arguments.extend(flags.iter().map(ToString::to_string));
        let mut deferprof = Deferprof::run(&arguments, &binary, &[]);
        let (output, profile) = deferprof.output_and_profile();
        let truth: Truth = serde_json::from_str(&output).unwrap();
        let mut registered = 0;
        for site in profile["sites"].as_array().unwrap() {
            for field in ["ran", "pending"] {
                let asked = !flags.contains(&"--no-ran");
                assert_eq!(!site[field].is_null(), asked, "{flags:?}: {field}: {site}");
            }
            let pool = !flags.contains(&"--no-pool") && site["mechanism"] == "heap";
            assert_eq!(!site["pool"].is_null(), pool, "{flags:?}: {site}");
            assert!(site["latency_ns"].is_null(), "{flags:?}: {site}");
            if site["function"].as_str().unwrap().starts_with("main.") {
                registered += site["registered"].as_u64().unwrap();
            }
        }
        let asked = !flags.contains(&"--no-ran");
        assert_eq!(!profile["panics"].is_null(), asked, "{flags:?}");
        let asked = !flags.contains(&"--no-pool");
        assert_eq!(!profile["runtime"].is_null(), asked, "{flags:?}");
        assert_eq!(registered, truth.registered(), "{flags:?}");
    }
}
