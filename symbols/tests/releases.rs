//! Releases for which no toolchain is at hand: executables from npm, one by one site against
//! `objdump_oracle.py`, which has its own reader of pclntab and takes the code from objdump.
//!
//! `fixtures/download/npm` fetches them; what is not there is skipped and said so.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use deferprof_fixtures::cache;
use deferprof_symbols::{Binary, Mechanism};

fn is_here(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// What the script says: the sites as its lines, and the number each function declares.
fn oracle(binary: &Path) -> (Vec<String>, BTreeMap<String, usize>) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/objdump_oracle.py");
    let output = Command::new("python3")
        .arg(script)
        .arg(binary)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}", binary.display());
    let (mut sites, mut declared) = (Vec::new(), BTreeMap::new());
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        match line
            .strip_prefix("declared ")
            .and_then(|rest| rest.split_once(' '))
        {
            Some((entry, count)) => {
                declared.insert(entry.to_owned(), count.parse().unwrap());
            }
            None => sites.push(line.to_owned()),
        }
    }
    sites.sort();
    (sites, declared)
}

/// `release` is what the executable must have been built by.
fn agrees(program: &str, arch: &str, version: &str, release: &str) {
    let binary = cache().join(program).join(arch).join(version).join(program);
    let what = format!("{program} {version} {arch} ({release})");
    if !binary.exists() {
        return println!("{what}: skipped: run `fixtures/download/npm` to fetch it");
    }
    let objdump = if arch == "arm64" {
        "aarch64-linux-gnu-objdump"
    } else {
        "objdump"
    };
    for program in ["python3", objdump] {
        if !is_here(program) {
            return println!("{what}: skipped: there is no {program} here");
        }
    }
    let bytes = std::fs::read(&binary).unwrap();
    let parsed = Binary::parse(&bytes).unwrap();
    let built_by = parsed.go_version().to_owned();
    assert!(
        built_by == release || built_by.starts_with(&format!("{release}.")),
        "{what}: {built_by}"
    );
    let inventory = parsed.inventory().unwrap();
    let is_expected = |warning: &String| program == "ibazel" && warning.contains("best effort");
    let unexpected = inventory.warnings.iter().filter(|w| !is_expected(w));
    assert_eq!(
        unexpected.collect::<Vec<_>>(),
        Vec::<&String>::new(),
        "{what}"
    );
    let (expected, declared) = oracle(&binary);
    let mut found = Vec::new();
    let mut open: BTreeMap<String, usize> = BTreeMap::new();
    for site in &inventory.sites {
        let bit = site.bit.map_or("-".to_owned(), |bit| bit.to_string());
        found.push(format!(
            "{} {} {bit} {}:{}",
            site.pc, site.mechanism, site.file, site.line
        ));
        if site.mechanism == Mechanism::OpenCoded {
            *open.entry(site.function_entry.to_string()).or_default() += 1;
        }
    }
    found.sort();
    assert!(
        expected.len() > 20,
        "{what}: the oracle found {}",
        expected.len()
    );
    let differences: Vec<_> = found
        .iter()
        .filter(|f| expected.binary_search(f).is_err())
        .map(|f| format!("+{f}"))
        .chain(
            expected
                .iter()
                .filter(|e| found.binary_search(e).is_err())
                .map(|e| format!("-{e}")),
        )
        .take(6)
        .collect();
    assert!(differences.is_empty(), "{what}: {differences:#?}");
    assert_eq!(found.len(), expected.len(), "{what}");
    assert_eq!(
        open, declared,
        "{what}: open-coded sites a function, and what funcdata declares"
    );
    println!("{what}: {built_by}: {} sites agree", found.len());
}

macro_rules! binaries {
    ($($test:ident: $program:literal $arch:literal $version:literal $release:literal;)*) => {
        $(#[test] fn $test() { agrees($program, $arch, $version, $release); })*
    };
}

binaries! {
    amd64_1_7: "ibazel" "amd64" "0.0.1" "go1.7";
    amd64_1_9: "ibazel" "amd64" "0.1.1" "go1.9";
    amd64_1_11: "ibazel" "amd64" "0.9.1" "go1.11";
    amd64_1_12: "ibazel" "amd64" "0.10.3" "go1.12";
    amd64_1_13: "esbuild" "amd64" "0.1.0" "go1.13";
    amd64_1_14: "esbuild" "amd64" "0.5.0" "go1.14";
    amd64_1_15: "esbuild" "amd64" "0.8.0" "go1.15";
    amd64_1_16: "esbuild" "amd64" "0.9.0" "go1.16";
    amd64_1_17: "esbuild" "amd64" "0.14.0" "go1.17";
    amd64_1_18: "esbuild" "amd64" "0.14.30" "go1.18";
    amd64_1_19: "esbuild" "amd64" "0.15.0" "go1.19";
    amd64_1_20: "esbuild" "amd64" "0.17.10" "go1.20";
    amd64_1_23: "esbuild" "amd64" "0.25.0" "go1.23";
    arm64_1_14: "esbuild" "arm64" "0.4.0" "go1.14";
    arm64_1_15: "esbuild" "arm64" "0.8.9" "go1.15";
    arm64_1_16: "esbuild" "arm64" "0.11.20" "go1.16";
    arm64_1_17: "esbuild" "arm64" "0.14.0" "go1.17";
    arm64_1_18: "esbuild" "arm64" "0.14.30" "go1.18";
    arm64_1_19: "esbuild" "arm64" "0.15.0" "go1.19";
    arm64_1_20: "esbuild" "arm64" "0.17.10" "go1.20";
    arm64_1_23: "esbuild" "arm64" "0.25.0" "go1.23";
}
