//! What a scan finds against what the compiler says it did (`-d=defer`), for the fixtures and for
//! the Go toolchain's own programs.
//!
//! The compiler lists what it compiles, the linker keeps less: of the list only those lines count
//! that have code in the binary, by its DWARF line table. A function with a defer is never inlined,
//! so that is exact. A stripped build is compared with the line table of its twin with DWARF.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use deferprof_fixtures::{
    Arch, Build, CompilerDefer, Error, Fixture, Toolchain, compiler_defers, lines_in_binary,
    toolchain_program,
};
use deferprof_symbols::{Binary, Inventory, Mechanism};

/// (file, line) → the mechanisms of the statements there.
type Places = BTreeMap<(String, u32), BTreeSet<String>>;

fn scan(path: &Path) -> Inventory {
    let bytes = std::fs::read(path).unwrap();
    let binary = Binary::parse(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    binary.inventory().unwrap()
}

fn found(inventory: &Inventory, keep: impl Fn(&str) -> bool) -> Places {
    let mut places = Places::new();
    for site in inventory.sites.iter().filter(|s| keep(&s.file)) {
        // The compiler calls range-func defers heap-allocated, too.
        let mechanism = match site.mechanism {
            Mechanism::RangeFunc => Mechanism::Heap,
            other => other,
        };
        let place = (site.file.clone(), site.line);
        places
            .entry(place)
            .or_default()
            .insert(mechanism.to_string());
    }
    places
}

fn expected(defers: &[CompilerDefer], lines: &BTreeSet<(String, u32)>) -> Places {
    let mut places = Places::new();
    for defer in defers {
        let place = (defer.file.clone(), defer.line);
        if lines.contains(&place) {
            places
                .entry(place)
                .or_default()
                .insert(defer.mechanism.to_string());
        }
    }
    places
}

/// Asserts equality, naming the first differences.
fn compare(what: &str, found: &Places, expected: &Places) {
    assert!(!expected.is_empty(), "{what}: the oracle is empty");
    let missing: Vec<_> = expected
        .iter()
        .filter(|(k, v)| found.get(*k) != Some(*v))
        .collect();
    let extra: Vec<_> = found
        .iter()
        .filter(|(k, v)| expected.get(*k) != Some(*v))
        .collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "{what}: {} places expected, {} found; missing {:?}; extra {:?}",
        expected.len(),
        found.len(),
        &missing[..missing.len().min(5)],
        &extra[..extra.len().min(5)],
    );
    println!("{what}: {} places agree", expected.len());
}

/// Unwraps, or prints why the case is skipped.
fn or_skip<T>(what: &str, result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) if error.is_skip() => {
            println!("{what}: skipped: {error}");
            None
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

fn fixtures(arch: Arch) {
    for toolchain in Toolchain::all() {
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        for fixture in Fixture::all().unwrap() {
            let what = format!("{} go{} {arch}", fixture.name, toolchain.release);
            let plain = Build::arch(arch);
            let Some(binary) = or_skip(&what, fixture.build(&toolchain, &plain)) else {
                continue;
            };
            let defers = compiler_defers(&toolchain, &fixture, &plain).unwrap();
            let lines = lines_in_binary(&binary).unwrap();
            let expected = expected(&defers, &lines);
            if expected.is_empty() {
                println!("{what}: no defers");
                continue;
            }
            let files: BTreeSet<&str> = expected.keys().map(|(file, _)| file.as_str()).collect();
            let inventory = scan(&binary);
            assert_eq!(inventory.warnings, Vec::<String>::new(), "{what}");
            compare(
                &what,
                &found(&inventory, |file| files.contains(file)),
                &expected,
            );
            for site in reasons(&what, &fixture, &toolchain, &inventory) {
                *seen.entry(site).or_default() += 1;
            }
        }
        // Each rule that a program's default flags can hit was hit.
        let missing: Vec<_> = [
            "loop",
            "loop-in-function",
            "over-8-defers",
            "returns-times-defers",
            "results-escape",
            "range-func",
            "range-func-in-function",
        ]
        .into_iter()
        .filter(|rule| toolchain.release.minor >= 23 || !rule.starts_with("range-func"))
        .filter(|rule| !seen.contains_key(*rule))
        .collect();
        assert!(missing.is_empty(), "{toolchain} {arch}: {missing:?}");
        println!("{toolchain} {arch}: sites by reason: {seen:?}");
    }
    for minor in (13..=27).filter(|minor| Toolchain::find(&format!("1.{minor}")).is_err()) {
        println!(
            "go1.{minor} {arch}: skipped: no toolchain here; releases.rs has its esbuild, if any"
        );
    }
}

/// Compares the reasons with those that the fixture's source gives for this release, and returns
/// them.
fn reasons(
    what: &str,
    fixture: &Fixture,
    toolchain: &Toolchain,
    inventory: &Inventory,
) -> Vec<String> {
    let expected = fixture.expected(toolchain.release, &Build::default());
    let source = fixture.source.to_string_lossy();
    let mut reasons = Vec::new();
    for site in inventory.sites.iter().filter(|s| s.file == source) {
        let line = expected.iter().find(|e| e.line == site.line);
        let line = line.unwrap_or_else(|| panic!("{what}: {} has no marker", site.id));
        let reason = site.reason.map(|reason| reason.to_string());
        assert_eq!(reason, line.reason, "{what}: {}", site.id);
        reasons.extend(reason);
    }
    reasons
}

#[test]
fn fixtures_on_amd64() {
    fixtures(Arch::Amd64);
}

#[test]
fn fixtures_on_arm64() {
    fixtures(Arch::Arm64);
}

/// A program of the toolchain, with DWARF and without. Returns the number of its places.
fn program(name: &str, toolchain: &Toolchain, arch: Arch) -> usize {
    let what = format!("cmd/{name} {toolchain} {arch}");
    let plain = toolchain_program(toolchain, name, &Build::arch(arch)).unwrap();
    let expected = expected(&plain.defers, &lines_in_binary(&plain.binary).unwrap());
    let inventory = scan(&plain.binary);
    assert_eq!(inventory.warnings, Vec::<String>::new(), "{what}");
    compare(&what, &found(&inventory, |_| true), &expected);

    let stripped = Build::arch(arch).ldflags("-s -w");
    let stripped = toolchain_program(toolchain, name, &stripped).unwrap();
    let inventory = scan(&stripped.binary);
    assert!(inventory.binary.stripped);
    compare(
        &format!("{what} -s -w"),
        &found(&inventory, |_| true),
        &expected,
    );
    expected.len()
}

/// The sample that always runs.
fn sampled(name: &str, release: &str, arch: Arch) {
    let what = format!("cmd/{name} go{release} {arch}");
    if let Some(toolchain) = or_skip(&what, Toolchain::find(release)) {
        program(name, &toolchain, arch);
    }
}

macro_rules! toolchain_tests {
    ($($test:ident: $name:literal $release:literal $arch:ident;)*) => {
        $(#[test] fn $test() { sampled($name, $release, Arch::$arch); })*
    };
}

toolchain_tests! {
    go_1_21: "go" "1.21" Amd64;
    go_1_27: "go" "1.27" Amd64;
    compile_1_21: "compile" "1.21" Amd64;
    compile_1_27: "compile" "1.27" Amd64;
    link_1_27: "link" "1.27" Amd64;
    vet_1_27: "vet" "1.27" Amd64;
    gofmt_1_21: "gofmt" "1.21" Amd64;
    gofmt_1_27: "gofmt" "1.27" Amd64;
    gofmt_1_21_arm64: "gofmt" "1.21" Arm64;
    gofmt_1_27_arm64: "gofmt" "1.27" Arm64;
    go_1_27_arm64: "go" "1.27" Arm64;
}

/// Every program of every toolchain, where `DEFERPROF_MATRIX=full` asks for it.
fn every_program(arch: Arch) {
    if std::env::var("DEFERPROF_MATRIX").as_deref() != Ok("full") {
        return println!("{arch}: skipped: only a sample runs without DEFERPROF_MATRIX=full");
    }
    let mut table = String::new();
    for toolchain in Toolchain::all() {
        table += &format!("| {toolchain} | {arch} |");
        for name in ["go", "compile", "link", "vet"] {
            table += &format!(" {} |", program(name, &toolchain, arch));
        }
        table += "\n";
    }
    println!("{table}");
}

#[test]
fn every_program_on_amd64() {
    every_program(Arch::Amd64);
}

#[test]
fn every_program_on_arm64() {
    every_program(Arch::Arm64);
}
