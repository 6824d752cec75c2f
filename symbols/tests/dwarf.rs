//! The runtime's structures as a binary's DWARF has them: what is read against what binutils reads, and
//! the tables for binaries without it against those with it, for every release and architecture.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use deferprof_fixtures::{Arch, Build, Fixture, Toolchain};
use deferprof_symbols::{Binary, fuzzing};

#[test]
fn amd64() {
    all_agree(Arch::Amd64);
}

#[test]
fn arm64() {
    all_agree(Arch::Arm64);
}

fn all_agree(arch: Arch) {
    let fixture = Fixture::find("f3").unwrap();
    let mut compared = 0;
    for toolchain in Toolchain::all() {
        let build = Build::arch(arch);
        let with = fixture.build(&toolchain, &build).unwrap();
        let bytes = std::fs::read(&with).unwrap();
        let members: BTreeMap<_, _> = fuzzing::dwarf_members(&bytes).into_iter().collect();
        assert_eq!(members, by_readelf(&with), "{toolchain} {arch}");

        let without = fixture.build(&toolchain, &build.ldflags("-s -w")).unwrap();
        let without = std::fs::read(without).unwrap();
        assert!(fuzzing::dwarf_members(&without).is_empty());
        let (with, without) = (
            Binary::parse(&bytes).unwrap(),
            Binary::parse(&without).unwrap(),
        );
        let pools = [&with, &without].map(|b| b.pool_probes().map(|p| p.local).ok());
        assert_eq!(pools[0], pools[1], "{toolchain} {arch}");
        let runs = [&with, &without].map(|b| b.run_probes(&[]).map(|r| r.layout).ok());
        assert_eq!(runs[0], runs[1], "{toolchain} {arch}");
        println!(
            "{toolchain} {arch}: {} members, {:?}, {:?}",
            members.len(),
            pools[0],
            runs[0]
        );
        compared += usize::from(pools[0].is_some() && runs[0].is_some());
    }
    if compared == 0 {
        println!("{arch}: skipped: no toolchain from 1.18 on is here");
    }
}

/// The members of the same structures, as `readelf` of binutils prints them.
fn by_readelf(binary: &Path) -> BTreeMap<String, u64> {
    const STRUCTURES: [&str; 5] = ["g", "m", "p", "_defer", "_panic"];
    let output = Command::new("readelf")
        .arg("--debug-dump=info")
        .arg(binary)
        .output()
        .expect("binutils");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut members = BTreeMap::new();
    let (mut structure, mut member) = (None, None);
    let (mut level, mut tag) = (0, "");
    for line in text.lines() {
        // ` <2><81d6f>: Abbrev Number: 23 (DW_TAG_member)`
        if let Some((depth, rest)) = line
            .trim()
            .strip_prefix('<')
            .and_then(|l| l.split_once('>'))
            && let Ok(depth) = depth.parse::<u32>()
            && let Some((_, entry)) = rest.split_once(": Abbrev Number: ")
        {
            level = depth;
            tag = entry
                .split_once('(')
                .map_or("", |(_, t)| t.trim_end_matches(')'));
            member = None;
            if level == 1 {
                structure = None;
            }
        } else if let Some((_, name)) = line.split_once("DW_AT_name        : ") {
            match (level, tag) {
                (1, "DW_TAG_structure_type") => {
                    let inside = name.trim().strip_prefix("runtime.");
                    structure = inside.filter(|name| STRUCTURES.contains(name));
                }
                (2, "DW_TAG_member") => member = Some(name.trim()),
                _ => {}
            }
        } else if let Some((_, offset)) = line.split_once("DW_AT_data_member_location: ")
            && let (Some(structure), Some(member)) = (structure, member)
        {
            let offset = offset.trim().parse().unwrap();
            members.insert(format!("runtime.{structure}.{member}"), offset);
        }
    }
    assert!(
        members.len() > 50,
        "readelf shows {} members",
        members.len()
    );
    members
}
