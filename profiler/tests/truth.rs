//! The whole line against the truth: for every fixture the profile's counts equal those that the
//! fixture made itself, for every site of its main package, exactly; started by `run`, and attached
//! to before the work starts; through uprobe_multi and through perf-event links.

mod support;

use std::collections::BTreeMap;

use deferprof_fixtures::{Build, Fixture, Options, Toolchain, Truth};
use support::{How, as_the_runtime_names_it, or_skip, uprobes_work};

/// Registered counts by function and line, of functions of package main.
fn counts(profile: &serde_json::Value) -> BTreeMap<(String, u64), u64> {
    let mut counts = BTreeMap::new();
    for site in profile["sites"].as_array().unwrap() {
        let function = site["function"].as_str().unwrap();
        if function.starts_with("main.") {
            let place = (
                as_the_runtime_names_it(function),
                site["line"].as_u64().unwrap(),
            );
            *counts.entry(place).or_default() += site["registered"].as_u64().unwrap();
        }
    }
    counts
}

fn expected(truth: &Truth) -> BTreeMap<(String, u64), u64> {
    let places = truth.by_place().into_iter();
    places
        .map(|((function, line), c)| ((function, u64::from(line)), c.registered))
        .collect()
}

/// The kernel takes a tenth of a second to close each perf-event link: of the releases, the oldest
/// and the newest stand for all, unless `DEFERPROF_FULL` is set.
fn affordable(release: &str, link: &str) -> bool {
    let full = std::env::var_os("DEFERPROF_FULL").is_some();
    let affordable = full || link != "perf" || ["1.21", "1.27"].contains(&release);
    if !affordable {
        println!("go{release} {link}: left to DEFERPROF_FULL=1");
    }
    affordable
}

fn compare(release: &str, how: How, link: &str) {
    if !uprobes_work() || !affordable(release, link) {
        return;
    }
    let mut compared = 0;
    let Some(toolchain) = or_skip(release, Toolchain::find(release)) else {
        return;
    };
    for fixture in Fixture::all().unwrap() {
        let what = format!("{} go{release} {how:?} {link}", fixture.name);
        let Some(binary) = or_skip(&what, fixture.build(&toolchain, &Build::default())) else {
            continue;
        };
        let mut options = Options::default();
        if fixture.name == "shop" {
            options = options.seconds(0.5);
        }
        let mut arguments = vec!["--format=json".to_owned(), format!("--link={link}")];
        if link == "perf" {
            // Each probe is a link of its own there: the fixture's registrations will do.
            let few = [r"--include=^main\.", "--no-ran", "--no-pool"];
            arguments.extend(few.map(str::to_owned));
        }
        let (profile, truth) = how.record(&arguments, &binary, &options);
        let (found, expected) = (counts(&profile), expected(&truth));
        // Sites that the truth does not name may be there (other instantiations) but never ran.
        let ran: BTreeMap<_, _> = found
            .iter()
            .filter(|(k, n)| **n > 0 || expected.contains_key(*k))
            .collect();
        let expected: BTreeMap<_, _> = expected.iter().collect();
        assert_eq!(ran, expected, "{what}");
        assert_eq!(profile["loss"]["dropped"], 0, "{what}");
        compared += expected.len();
    }
    assert!(compared > 100, "only {compared} places were compared");
    println!("go{release} {how:?} {link}: {compared} places agree");
}

macro_rules! matrix {
    ($($test:ident: $release:literal $how:ident $link:literal;)*) => {
        $(#[test] fn $test() { compare($release, How::$how, $link); })*
    };
}

matrix! {
    run_multi_1_21: "1.21" Run "multi";
    run_multi_1_23: "1.23" Run "multi";
    run_multi_1_25: "1.25" Run "multi";
    run_multi_1_27: "1.27" Run "multi";
    run_perf_1_21: "1.21" Run "perf";
    run_perf_1_23: "1.23" Run "perf";
    run_perf_1_25: "1.25" Run "perf";
    run_perf_1_27: "1.27" Run "perf";
    attach_multi_1_21: "1.21" Attach "multi";
    attach_multi_1_23: "1.23" Attach "multi";
    attach_multi_1_25: "1.25" Attach "multi";
    attach_multi_1_27: "1.27" Attach "multi";
    attach_perf_1_21: "1.21" Attach "perf";
    attach_perf_1_23: "1.23" Attach "perf";
    attach_perf_1_25: "1.25" Attach "perf";
    attach_perf_1_27: "1.27" Attach "perf";
}
