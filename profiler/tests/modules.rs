//! Go code in libraries: a program in C that has loaded a Go c-shared library, whose counts must equal
//! those that the library made itself; and a Go program with a plugin, where `--module` chooses.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use deferprof_fixtures::{Arch, Fixture, Options, Running, Toolchain};
use support::{Deferprof, or_skip, uprobes_work};

/// A folder that goes away with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("deferprof-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Runs a compiler; what it says is the reason to skip the test where it fails for want of a part.
fn built(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Copies a fixture with the package that counts into a module of its own, and adds a file.
fn copied(fixture: &Fixture, folder: &Path, extra: &str) {
    let source = fixture.source.parent().unwrap();
    for (from, to) in [(source, "main"), (&source.join("../truth"), "truth")] {
        fs::create_dir_all(folder.join(to)).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let file = entry.unwrap().path();
            fs::copy(&file, folder.join(to).join(file.file_name().unwrap())).unwrap();
        }
    }
    fs::write(folder.join("main/extra.go"), extra).unwrap();
    fs::write(
        folder.join("go.mod"),
        "module deferprof/fixtures\n\ngo 1.21\n",
    )
    .unwrap();
}

fn go_build(toolchain: &Toolchain, folder: &Path, mode: &str, output: &str) -> Result<(), String> {
    built(
        toolchain
            .command(Arch::host())
            .args(["build", "-buildvcs=false", "-o", output])
            .arg(format!("-buildmode={mode}"))
            .arg("./main")
            .env("CGO_ENABLED", "1")
            .current_dir(folder),
    )
}

/// Registered counts of the fixture's own functions by line.
fn counts(profile: &serde_json::Value) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    for site in profile["sites"].as_array().unwrap() {
        if site["file"].as_str().unwrap().ends_with("main/main.go") {
            *counts.entry(site["line"].as_u64().unwrap()).or_default() +=
                site["registered"].as_u64().unwrap();
        }
    }
    counts
}

#[test]
fn a_go_library_in_a_c_program_is_counted() {
    if !uprobes_work() {
        return;
    }
    for release in ["1.21", "1.27"] {
        let Some(toolchain) = or_skip(release, Toolchain::find(release)) else {
            continue;
        };
        let folder = Folder::new("c-shared");
        let folder = &folder.0;
        copied(
            &Fixture::find("f3").unwrap(),
            folder,
            "package main\n\nimport \"C\"\n\n//export Work\nfunc Work() { main() }\n",
        );
        fs::write(
            folder.join("host.c"),
            "extern void Work(void);\nint main(void) { Work(); return 0; }\n",
        )
        .unwrap();
        let host = folder.join("host");
        let compiled = go_build(&toolchain, folder, "c-shared", "libwork.so").and_then(|()| {
            built(
                Command::new("gcc")
                    .args(["-o", "host", "host.c", "libwork.so", "-Wl,-rpath,$ORIGIN"])
                    .current_dir(folder),
            )
        });
        if let Err(reason) = compiled {
            println!("go{release}: skipped: no C toolchain: {reason}");
            continue;
        }
        let (expected, profile) = recorded(&host, &[]);
        assert_eq!(counts(&profile), expected, "go{release}");
        let library = folder.join("libwork.so");
        assert_eq!(profile["target"]["exe"], library.to_str().unwrap());
        println!("go{release}: {expected:?}");
    }
}

#[test]
fn a_plugin_is_counted_where_it_is_chosen() {
    const HOST: &str = r#"package main

import "plugin"

func main() {
	p, err := plugin.Open("work.so")
	if err != nil {
		panic(err)
	}
	work, err := p.Lookup("Work")
	if err != nil {
		panic(err)
	}
	work.(func())()
}
"#;
    if !uprobes_work() {
        return;
    }
    // Plugins of 1.19 have no build info.
    for release in ["1.19", "1.21", "1.27"] {
        let Some(toolchain) = or_skip(release, Toolchain::find(release)) else {
            continue;
        };
        let folder = Folder::new("plugin");
        let folder = &folder.0;
        copied(
            &Fixture::find("f3").unwrap(),
            folder,
            "package main\n\nfunc Work() { main() }\n",
        );
        let host = folder.join("host");
        let compiled = go_build(&toolchain, folder, "plugin", "work.so").and_then(|()| {
            for file in fs::read_dir(folder.join("main")).unwrap() {
                fs::remove_file(file.unwrap().path()).unwrap();
            }
            fs::write(
                folder.join("main/main.go"),
                HOST.replace("work.so", folder.join("work.so").to_str().unwrap()),
            )
            .unwrap();
            go_build(&toolchain, folder, "exe", "host")
        });
        if let Err(reason) = compiled {
            println!("go{release}: skipped: no C toolchain: {reason}");
            continue;
        }
        let (expected, profile) = recorded(&host, &["--module=work.so"]);
        assert_eq!(counts(&profile), expected, "go{release}");
        println!("go{release}: {expected:?}");
    }
}

/// Attaches to a program that works on command: its truth by line, and the profile.
fn recorded(host: &Path, arguments: &[&str]) -> (BTreeMap<u64, u64>, serde_json::Value) {
    let options = Options::default().n(200).wait().hold();
    let mut running = Running::start(host, &options).unwrap();
    // `doctor` looks at what `attach` would profile without a choice.
    let doctor = Command::new(env!("CARGO_BIN_EXE_deferprof"))
        .args(["doctor", "--format=json", &running.pid().to_string()])
        .output()
        .unwrap();
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let is_chosen = !arguments.is_empty();
    let mut arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
    arguments.push("--format=json".to_owned());
    let mut deferprof = Deferprof::attach(&arguments, running.pid());
    deferprof.wait_until_attached();
    running.go().unwrap();
    let truth = running.truth().unwrap();
    deferprof.interrupt();
    let (_, profile) = deferprof.output_and_profile();
    running.finish().unwrap();
    if !is_chosen {
        assert_eq!(doctor["target"]["exe"], profile["target"]["exe"]);
        let sites = profile["sites"].as_array().unwrap().len();
        assert!(doctor["target"]["sites"].as_u64().unwrap() >= sites as u64);
    } else {
        let warnings = doctor["problems"].to_string();
        assert!(warnings.contains("work.so"), "{warnings}");
    }
    let mut expected: BTreeMap<u64, u64> = BTreeMap::new();
    for ((_, line), count) in truth.by_place() {
        *expected.entry(u64::from(line)).or_default() += count.registered;
    }
    assert!(expected.values().sum::<u64>() > 100, "{expected:?}");
    (expected, profile)
}
