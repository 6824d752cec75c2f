//! Release × architecture × shape, as `matrix.txt` lists them, against the compiler's own list of
//! defers and against the reasons that the fixtures' markers give. Every cell runs or says why not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use deferprof_fixtures::{
    Arch, Build, Fixture, Release, Toolchain, compiler_defers, lines_in_binary,
};
use deferprof_symbols::{Binary, Error, Inventory, Mechanism};

/// What is done to a binary once it is built.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Nothing,
    Strip,
    NoHeaders,
    Rename,
}

struct Shape {
    name: String,
    releases: std::ops::RangeInclusive<u32>,
    archs: Vec<Arch>,
    build: Build,
    then: Then,
}

fn shapes() -> Vec<Shape> {
    let lines = include_str!("matrix.txt").lines();
    lines
        .filter(|l| !l.starts_with('#') && !l.trim().is_empty())
        .map(shape)
        .collect()
}

fn shape(line: &str) -> Shape {
    let mut words = line.split_whitespace();
    let mut next = || {
        words
            .next()
            .unwrap_or_else(|| panic!("{line}: a column is missing"))
    };
    let (name, releases, archs) = (next().to_owned(), next(), next());
    let (first, last) = releases.split_once("..").unwrap();
    let arch = |name: &str| match name {
        "amd64" => Arch::Amd64,
        "arm64" => Arch::Arm64,
        other => panic!("{line}: no architecture {other}"),
    };
    let (mut build, mut then) = (Build::default(), Then::Nothing);
    for word in words {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let value = value.replace('_', " ");
        match (key, value.as_str()) {
            ("ldflags", flags) => build = build.ldflags(flags),
            ("gcflags", flags) => build = build.gcflags(flags),
            ("buildmode", mode) => build = build.buildmode(mode),
            ("trimpath", _) => build = build.trimpath(),
            ("race", _) => build = build.race(),
            ("cgo", _) => build.cgo = true,
            ("env", setting) => {
                let (name, value) = setting.split_once('=').unwrap();
                build.env.push((name.to_owned(), value.to_owned()));
            }
            ("then", "strip") => then = Then::Strip,
            ("then", "no-headers") => then = Then::NoHeaders,
            ("then", "rename") => then = Then::Rename,
            _ => panic!("{line}: what is {word}?"),
        }
    }
    Shape {
        name,
        releases: first.parse().unwrap()..=last.parse().unwrap(),
        archs: archs.split(',').map(arch).collect(),
        build,
        then,
    }
}

/// (file's last two parts, line) → mechanisms.
type Places = BTreeMap<(String, u32), BTreeSet<String>>;

fn short(file: &str) -> String {
    let mut parts: Vec<&str> = file.rsplit('/').take(2).collect();
    parts.reverse();
    parts.join("/")
}

fn processed(path: &Path, arch: Arch, then: Then) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    match then {
        Then::Nothing => {}
        Then::Strip => {
            let program = match arch {
                Arch::Amd64 => "strip",
                Arch::Arm64 => "aarch64-linux-gnu-strip",
            };
            let output = std::env::temp_dir().join(format!("stripped-{}", std::process::id()));
            let status = Command::new(program)
                .arg("-o")
                .arg(&output)
                .arg(path)
                .status();
            if status.is_ok_and(|s| s.success()) {
                bytes = std::fs::read(&output).unwrap();
                std::fs::remove_file(&output).unwrap();
            } else {
                println!("there is no working {program} here: not stripped");
            }
        }
        Then::NoHeaders => {
            // e_shoff, e_shentsize, e_shnum, e_shstrndx; the table itself is at the end.
            bytes[40..48].fill(0);
            bytes[58..64].fill(0);
        }
        Then::Rename => {
            for name in [
                ".gopclntab",
                ".go.buildinfo",
                ".noptrdata",
                ".go.module",
                ".data.rel.ro",
            ] {
                let places: Vec<usize> = (0..bytes.len() - name.len())
                    .filter(|at| bytes[*at..].starts_with(name.as_bytes()))
                    .collect();
                for at in places {
                    bytes[at + 1] = b'X';
                }
            }
        }
    }
    bytes
}

/// Checks one fixture in one cell; `Err` is the reason to skip it.
fn check(
    cell: &str,
    shape: &Shape,
    toolchain: &Toolchain,
    build: &Build,
    fixture: &str,
) -> Result<usize, String> {
    let fixture = Fixture::find(fixture).unwrap();
    let path = match fixture.build(toolchain, build) {
        Ok(path) => path,
        Err(reason) if reason.is_skip() => return Err(reason.to_string()),
        // A C toolchain that lacks something (static libraries, the race detector's runtime).
        Err(error) if build.cgo => {
            let error = error.to_string();
            return Err(format!(
                "cannot be linked here: {}",
                error.lines().last().unwrap_or("")
            ));
        }
        Err(error) => panic!("{cell}: {error}"),
    };
    // A stripped binary has the same code as its twin with DWARF.
    let twin = Build {
        ldflags: build.ldflags.replace("-s -w", ""),
        ..build.clone()
    };
    let twin = fixture.build(toolchain, &twin).map_err(|e| e.to_string())?;
    let lines: BTreeSet<(String, u32)> = lines_in_binary(&twin)
        .unwrap()
        .into_iter()
        .map(|(file, line)| (short(&file), line))
        .collect();
    // What only the linker sees does not change the compiler's list.
    let compiled = Build {
        ldflags: String::new(),
        trimpath: false,
        ..build.clone()
    };
    let listed = match compiler_defers(toolchain, &fixture, &compiled) {
        Ok(listed) => listed,
        Err(error) => return Err(format!("the compiler lists nothing: {error}")),
    };
    let mut expected = Places::new();
    for defer in listed {
        let place = (short(&defer.file), defer.line);
        if lines.contains(&place) {
            expected
                .entry(place)
                .or_default()
                .insert(defer.mechanism.to_string());
        }
    }
    let bytes = processed(&path, build.arch, shape.then);
    let binary = Binary::parse(&bytes).unwrap_or_else(|e| panic!("{cell}: {e}"));
    let inventory = binary.inventory().unwrap();
    assert_eq!(inventory.warnings, Vec::<String>::new(), "{cell}");
    let files: BTreeSet<&str> = expected.keys().map(|(file, _)| file.as_str()).collect();
    let mut found = Places::new();
    for site in inventory
        .sites
        .iter()
        .filter(|s| files.contains(short(&s.file).as_str()))
    {
        let mechanism = match site.mechanism {
            // The compiler calls them heap-allocated.
            Mechanism::RangeFunc => Mechanism::Heap,
            other => other,
        };
        found
            .entry((short(&site.file), site.line))
            .or_default()
            .insert(mechanism.to_string());
        // The position of a site is in its function, and findable again by its address.
        let frames = binary.frames(site.pc);
        let last = frames
            .last()
            .unwrap_or_else(|| panic!("{cell}: no frame at {}", site.pc));
        assert_eq!(last.function, site.function, "{cell}");
    }
    assert_eq!(found, expected, "{cell}");
    reasons(cell, &fixture, toolchain, build, &inventory);
    Ok(expected.len())
}

/// The reasons against the markers of the fixture's source, or against what the flags imply.
fn reasons(
    cell: &str,
    fixture: &Fixture,
    toolchain: &Toolchain,
    build: &Build,
    inventory: &Inventory,
) {
    let main = format!("{}/main.go", fixture.name);
    let expected = fixture.expected(toolchain.release, build);
    for site in inventory.sites.iter().filter(|s| short(&s.file) == main) {
        let Some(expected) = expected.iter().find(|e| e.line == site.line) else {
            continue;
        };
        let reason = site.reason.map(|reason| reason.to_string());
        let forced = match site.mechanism {
            Mechanism::Stack if build.race => Some("race"),
            // Up to 1.17 the flags are not in the build info.
            Mechanism::Stack if build.unoptimized() && toolchain.release < Release::new(18) => {
                continue;
            }
            Mechanism::Stack if build.unoptimized() => Some("optimizations-off"),
            _ => None,
        };
        match (&expected.reason, forced) {
            (_, Some(forced)) => assert_eq!(reason.as_deref(), Some(forced), "{cell} {}", site.id),
            (Some(_), None) => assert_eq!(reason, expected.reason, "{cell} {}", site.id),
            (None, None) => {}
        }
    }
}

/// Small fixtures that have every mechanism and reason between them: the cells take turns.
const FIXTURES: [&str; 7] = [
    "returns",
    "conditionals",
    "closures",
    "frames",
    "nested",
    "methods",
    "panics",
];

fn run(arch: Arch) {
    let full = std::env::var("DEFERPROF_MATRIX").is_ok_and(|v| v == "full");
    let toolchains = Toolchain::all();
    let (mut ran, mut skipped) = (0, 0);
    for (column, toolchain) in toolchains.iter().enumerate().rev() {
        for (row, shape) in shapes().iter().enumerate() {
            let cell = format!("{} go{} {arch}", shape.name, toolchain.release);
            let newest = column + 1 == toolchains.len() && arch == Arch::Amd64;
            // Builds without optimizations or with -race compile the standard library anew.
            let costly = shape.build.race || shape.build.gcflags.starts_with("all");
            let sampled = newest
                || !costly && (row + usize::from(arch == Arch::Arm64)) % toolchains.len() == column;
            let reason = if !shape.archs.contains(&arch) {
                Some("it needs a C toolchain for this architecture".to_owned())
            } else if !shape.releases.contains(&toolchain.release.minor) {
                Some("this release cannot build it".to_owned())
            } else if !full && !sampled {
                Some("it is not in the sample: DEFERPROF_MATRIX=full".to_owned())
            } else {
                None
            };
            if let Some(reason) = reason {
                println!("{cell}: skipped: {reason}");
                skipped += 1;
                continue;
            }
            let build = Build {
                arch,
                ..shape.build.clone()
            };
            let one = FIXTURES.iter().cycle().skip(row + column).take(1);
            // All of them together would take hours; `rules` has every mechanism and reason.
            let others = if full {
                &["rules", "rangefunc"][..]
            } else {
                &[]
            };
            for fixture in one.chain(others) {
                match check(
                    &format!("{cell} {fixture}"),
                    shape,
                    toolchain,
                    &build,
                    fixture,
                ) {
                    Ok(places) => {
                        println!("{cell} {fixture}: {places} places agree");
                        ran += 1;
                    }
                    Err(reason) => {
                        println!("{cell} {fixture}: skipped: {reason}");
                        skipped += 1;
                    }
                }
            }
        }
    }
    println!("{arch}: {ran} ran, {skipped} skipped");
    assert!(ran > 0 || toolchains.is_empty());
}

#[test]
fn amd64() {
    run(Arch::Amd64);
}

#[test]
fn arm64() {
    run(Arch::Arm64);
}

/// What UPX leaves of an executable: program headers, its marker, and no pclntab to be found.
#[test]
fn what_a_packer_leaves_is_named() {
    let Ok(toolchain) = Toolchain::newest() else {
        return println!("skipped: no toolchain");
    };
    let fixture = Fixture::find("conditionals").unwrap();
    let build = Build::default().ldflags("-s -w");
    let mut bytes = std::fs::read(fixture.build(&toolchain, &build).unwrap()).unwrap();
    // Compressed data looks random; the headers and the marker behind them stay.
    let mut random = 1u32;
    for byte in &mut bytes[1024..] {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (random >> 24) as u8;
    }
    bytes[40..48].fill(0);
    bytes[58..64].fill(0);
    assert_eq!(Binary::parse(&bytes).unwrap_err(), Error::NotGo);
    bytes[800..804].copy_from_slice(b"UPX!");
    let error = Binary::parse(&bytes).unwrap_err();
    assert!(matches!(error, Error::Packed("UPX", _)), "{error}");
}

/// Packed by UPX itself: named as such, and the command that the error gives makes it readable again.
#[test]
fn packed_executables_are_named() {
    let upx = deferprof_fixtures::cache().join("upx/usr/bin/upx-ucl");
    if !upx.exists() {
        return println!("skipped: run `fixtures/download/upx` to fetch it");
    }
    let run = |option: &str, path: &Path| {
        let mut upx = Command::new(&upx);
        let output = upx.args(["-q", option]).arg(path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        std::fs::read(path).unwrap()
    };
    let Ok(toolchain) = Toolchain::newest() else {
        return println!("skipped: no toolchain");
    };
    let fixture = Fixture::find("conditionals").unwrap();
    let folder = std::env::temp_dir().join(format!("deferprof-upx-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for arch in [Arch::Amd64, Arch::Arm64] {
        let build = Build::arch(arch).ldflags("-s -w");
        let plain = fixture.build(&toolchain, &build).unwrap();
        let path = folder.join(format!("{arch:?}"));
        std::fs::copy(&plain, &path).unwrap();
        let error = Binary::parse(&run("-1", &path)).unwrap_err();
        assert!(
            matches!(error, Error::Packed("UPX", "upx -d BINARY")),
            "{error}"
        );
        assert_eq!(run("-d", &path), std::fs::read(&plain).unwrap());
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
