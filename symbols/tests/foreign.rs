//! Binaries that the tables do not cover: of a newer release, obfuscated, packed, without build info.
//! Made of fixtures whose bytes are changed where the difference would be.

use deferprof_fixtures::{Arch, Build, Fixture, Toolchain};
use deferprof_symbols::{Binary, Error, Inventory, Mechanism};

/// A stripped fixture's bytes, and the toolchain's release; `None`, saying why, without a toolchain.
fn fixture(release: &str, arch: Arch) -> Option<(Vec<u8>, String)> {
    let toolchain = match Toolchain::find(release) {
        Ok(toolchain) => toolchain,
        Err(reason) => {
            println!("go{release}: skipped: {reason}");
            return None;
        }
    };
    let build = Build::arch(arch).ldflags("-s -w");
    let path = Fixture::find("rules").unwrap().build(&toolchain, &build);
    let path = path.unwrap();
    Some((std::fs::read(path).unwrap(), toolchain.to_string()))
}

/// Every place of `text`.
fn places(bytes: &[u8], text: &[u8]) -> Vec<usize> {
    let windows = bytes.windows(text.len()).enumerate();
    let found = windows.filter(|(_, window)| *window == text);
    found.map(|(at, _)| at).collect()
}

fn first(bytes: &[u8], text: &[u8]) -> usize {
    let place = bytes.windows(text.len()).position(|window| window == text);
    place.unwrap_or_else(|| panic!("there is no {:?}", String::from_utf8_lossy(text)))
}

/// The bytes with another version of the same length, in the build info and wherever it points.
fn renamed(bytes: &[u8], old: &str, new: &str) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let mut bytes = bytes.to_vec();
    for at in places(&bytes, old.as_bytes()) {
        bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
    }
    bytes
}

/// A release that the table will not know for long, as long as `version`.
fn newer(version: &str) -> String {
    format!("go1.99.{}", "0".repeat(version.len() - "go1.99.".len()))
}

#[test]
fn a_newer_release_that_looks_the_same_works_with_a_warning() {
    for arch in [Arch::Amd64, Arch::Arm64] {
        let Some((bytes, version)) = fixture("1.27", arch) else {
            continue;
        };
        let sites = |bytes: &[u8]| {
            let inventory = Binary::parse(bytes).unwrap().inventory().unwrap();
            let sites = inventory.sites.into_iter();
            let sites: Vec<_> = sites.map(|s| (s.id, s.mechanism, s.pc)).collect();
            (sites, inventory.warnings)
        };
        let (known, warnings) = sites(&bytes);
        assert!(warnings.is_empty());
        let (new, warnings) = sites(&renamed(&bytes, &version, &newer(&version)));
        assert_eq!(new, known);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("newer than this deferprof knows"));
    }
}

/// Real differences: what older releases did where a newer one is expected to do as 1.27 does.
#[test]
fn a_newer_release_that_differs_is_refused() {
    for release in ["1.15", "1.19", "1.21", "1.22", "1.24", "1.26"] {
        for arch in [Arch::Amd64, Arch::Arm64] {
            let Some((bytes, version)) = fixture(release, arch) else {
                continue;
            };
            let bytes = renamed(&bytes, &version, &newer(&version));
            let error = Binary::parse(&bytes)
                .and_then(|binary| binary.inventory())
                .unwrap_err();
            assert!(
                matches!(error, Error::NewRelease { .. } | Error::Damaged { .. }),
                "{error:?}"
            );
            println!("{version} {arch}: {error}");
        }
    }
}

/// A record that has grown is seen in the code of `deferprocStack`, though all tables are in order.
#[test]
fn a_newer_release_with_another_record_is_refused() {
    let Some((bytes, version)) = fixture("1.27", Arch::Amd64) else {
        return;
    };
    let mut bytes = renamed(&bytes, &version, &newer(&version));
    // mov %rcx,0x20(%rax); movq $0,0x28(%rax): the link and the head.
    let stores = b"\x48\x89\x48\x20\x48\xc7\x40\x28\0\0\0\0";
    let at = first(&bytes, stores);
    bytes[at + 3] = 0x28;
    bytes[at + 7] = 0x30;
    let error = Binary::parse(&bytes).unwrap().inventory().unwrap_err();
    assert!(
        error.to_string().contains("deferprocStack stores at"),
        "{error}"
    );
    println!("{error}");
}

/// Makes the names that start so others of the same length.
fn obfuscate(bytes: &mut [u8], package: &str) {
    for at in places(bytes, package.as_bytes()) {
        for byte in bytes[at + 1..].iter_mut().take_while(|byte| **byte != 0) {
            *byte = byte.rotate_left(3) | 0x40;
        }
    }
}

/// Where also the runtime's names are others.
#[test]
fn obfuscated_names_leave_the_open_coded_sites() {
    for arch in [Arch::Amd64, Arch::Arm64] {
        let Some((mut bytes, _)) = fixture("1.27", arch) else {
            continue;
        };
        let sorted = |sites: Vec<deferprof_symbols::Site>| {
            let open = sites.iter().filter(|s| s.mechanism == Mechanism::OpenCoded);
            let mut open: Vec<_> = open.map(|site| site.pc).collect();
            open.sort_unstable();
            open
        };
        let all = sorted(Binary::parse(&bytes).unwrap().inventory().unwrap().sites);
        obfuscate(&mut bytes, "\0runtime.");
        obfuscate(&mut bytes, "\0main.");
        let inventory = Binary::parse(&bytes).unwrap().inventory().unwrap();
        let warning = inventory.warnings.first().unwrap();
        assert!(warning.contains("obfuscated"), "{warning}");
        assert!(!all.is_empty());
        assert_eq!(inventory.sites.len(), all.len(), "{arch}");
        assert_eq!(sorted(inventory.sites), all, "{arch}");
    }
}

/// What garble's linker does (`internal/linker/patches` of 0.9 to 0.16): a magic number of the build's own,
/// and in each `_func` an entry that only its own runtime can read. The build info names no release.
fn garbled(bytes: &[u8], version: &str) -> Vec<u8> {
    const KEY: u32 = 0x9e37_79b1;
    let mut bytes = renamed(bytes, version, &format!("{:<1$}", "unknown", version.len()));
    let magics: [&[u8]; 2] = [b"\xf1\xff\xff\xff\0\0", b"\xf0\xff\xff\xff\0\0"];
    let headers = magics.iter().flat_map(|magic| places(&bytes, magic));
    let header = headers.max_by_key(|at| word(&bytes, at + 8)).unwrap();
    bytes[header..header + 4].copy_from_slice(&0x1234_5678u32.to_le_bytes());
    let functab = header + word(&bytes, header + 64) as usize;
    for index in 0..word(&bytes, header + 8) as usize {
        let func = functab + half(&bytes, functab + 8 * index + 4) as usize;
        let entry = half(&bytes, func) ^ half(&bytes, func + 4).wrapping_mul(KEY);
        bytes[func..func + 4].copy_from_slice(&entry.to_le_bytes());
    }
    obfuscate(&mut bytes, "\0main.");
    bytes
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn garbled_executables_have_all_their_sites() {
    for release in [
        "1.19", "1.21", "1.22", "1.23", "1.24", "1.25", "1.26", "1.27",
    ] {
        for arch in [Arch::Amd64, Arch::Arm64] {
            let Some((bytes, version)) = fixture(release, arch) else {
                continue;
            };
            let inventory = |bytes: &[u8]| {
                let binary = Binary::parse(bytes);
                let binary = binary.unwrap_or_else(|error| panic!("{version} {arch}: {error}"));
                binary.inventory().unwrap()
            };
            let facts = |inventory: &Inventory| {
                let sites = inventory.sites.iter();
                let sites = sites.map(|s| (s.pc, s.mechanism, s.reason, s.bit, s.registration));
                let mut sites: Vec<_> = sites.collect();
                sites.sort_by_key(|site| site.0);
                sites
            };
            let garbled = garbled(&bytes, &version);
            // Without section headers the table is searched for.
            let mut headless = garbled.clone();
            headless[40..48].fill(0);
            headless[58..64].fill(0);
            let garbled = inventory(&garbled);
            assert_eq!(facts(&inventory(&headless)), facts(&garbled));
            assert_eq!(
                facts(&garbled),
                facts(&inventory(&bytes)),
                "{version} {arch}"
            );
            assert_eq!(garbled.binary.go_version, format!("go{release}"));
            assert_eq!(garbled.warnings.len(), 1, "{:?}", garbled.warnings);
            assert!(garbled.warnings[0].contains("obfuscated"));
        }
    }
}

/// `garble -tiny` leaves no names of the runtime's own; another tool may leave no table at all.
#[test]
fn what_is_obfuscated_further_is_named() {
    let Some((bytes, version)) = fixture("1.27", Arch::Amd64) else {
        return;
    };
    let garbled = garbled(&bytes, &version);
    let mut nameless = garbled.clone();
    obfuscate(&mut nameless, "\0runtime.");
    let mut tableless = garbled;
    let header = first(&tableless, &0x1234_5678u32.to_le_bytes());
    tableless[header + 64..header + 72].fill(0xff);
    for bytes in [nameless, tableless] {
        let error = Binary::parse(&bytes).unwrap_err();
        assert!(matches!(error, Error::Obfuscated(_)), "{error}");
        println!("{error}");
    }
}

/// A release that is only guessed may be a newer one.
#[test]
fn what_may_be_newer_is_not_asked_for_its_structures() {
    for (release, is_known) in [("1.26", true), ("1.27", false)] {
        let Some((bytes, version)) = fixture(release, Arch::Amd64) else {
            continue;
        };
        let garbled = garbled(&bytes, &version);
        let binary = Binary::parse(&garbled).unwrap();
        let inventory = binary.inventory().unwrap();
        assert_eq!(binary.pool_probes().is_ok(), is_known, "{release}");
        assert_eq!(binary.run_probes(&inventory.sites).is_ok(), is_known);
        assert_eq!(inventory.warnings[0].contains("or newer"), !is_known);
    }
}

/// Releases older than the table, and what looks like a table in what is not Go's.
#[test]
fn what_is_older_or_no_go_is_named() {
    let own = std::env::current_exe().unwrap();
    let mut bytes = std::fs::read(own).unwrap();
    assert_eq!(Binary::parse(&bytes).unwrap_err(), Error::NotGo);
    let Some((table, _)) = fixture("1.27", Arch::Amd64) else {
        return;
    };
    // Ours ends with names of symbols, which nothing asks for here: a table takes their place.
    let header = first(&table, b"\xf1\xff\xff\xff\0\0\x01\x08");
    let mut table = table[header..header + (1 << 19)].to_vec();
    table[0] = 0x12;
    let load = first(&bytes, b"\x01\0\0\0\x05\0\0\0");
    let start = word(&bytes, load + 8) as usize;
    let end = start + word(&bytes, load + 32) as usize;
    assert!(end - start > table.len());
    bytes[start.next_multiple_of(64)..][..table.len()].copy_from_slice(&table);
    assert_eq!(Binary::parse(&bytes).unwrap_err(), Error::NotGo);

    let old = deferprof_fixtures::cache().join("ibazel/amd64/0.0.1/ibazel");
    if !old.exists() {
        return println!("go1.7.3: skipped: run `fixtures/download/npm ibazel` to fetch it");
    }
    let older = renamed(&std::fs::read(old).unwrap(), "go1.7.3", "go1.6.3");
    let error = Binary::parse(&older).unwrap_err();
    assert!(matches!(error, Error::UnknownRelease { .. }), "{error}");
}

/// A new magic number means a new format, whatever it looks like.
#[test]
fn a_newer_release_with_another_magic_number_is_refused() {
    let Some((bytes, version)) = fixture("1.27", Arch::Amd64) else {
        return;
    };
    let mut bytes = renamed(&bytes, &version, &newer(&version));
    let header = first(&bytes, b"\xf1\xff\xff\xff\0\0\x01\x08");
    bytes[header] = 0xf2;
    let error = Binary::parse(&bytes).unwrap_err();
    assert!(matches!(error, Error::NewRelease { .. }), "{error}");
    println!("{error}");
}
