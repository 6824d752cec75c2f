//! Programs that were not written to be profiled: the `go` command as it is distributed, and one built
//! by releases older than any toolchain at hand.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use deferprof_fixtures::Toolchain;
use deferprof_symbols::{Binary, Site};
use support::{deferprof, or_skip, uprobes_work};

#[test]
fn the_go_command_is_profiled_with_stacks_that_add_up() {
    if !uprobes_work() {
        return;
    }
    let Some(toolchain) = or_skip("go", Toolchain::newest()) else {
        return;
    };
    let folder = std::env::temp_dir().join(format!("deferprof-real-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("go.json");
    // It starts children, which are other processes: only its own defers count.
    let output = deferprof()
        .args(["run", "--stacks", "-o"])
        .arg(&file)
        .arg("--")
        .arg(toolchain.go())
        .args(["list", "-deps", "-export", "fmt"])
        .env("GOROOT", &toolchain.root)
        .env("GOTOOLCHAIN", "local")
        .env("GO111MODULE", "off")
        .env("GOCACHE", folder.join("cache"))
        .output()
        .unwrap();
    let profile = std::fs::read(&file);
    std::fs::remove_dir_all(&folder).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        shown.starts_with("errors\n") || shown.contains("\nfmt\n"),
        "{shown}"
    );
    assert!(shown.contains("MECHANISM"), "{shown}");

    let profile: serde_json::Value = serde_json::from_slice(&profile.unwrap()).unwrap();
    let mut registered: BTreeMap<&str, u64> = BTreeMap::new();
    for site in profile["sites"].as_array().unwrap() {
        let count = site["registered"].as_u64().unwrap();
        if count > 0 {
            registered.insert(site["id"].as_str().unwrap(), count);
        }
    }
    assert!(registered.len() > 50, "only {} sites ran", registered.len());
    let mut stacked: BTreeMap<&str, u64> = BTreeMap::new();
    for stack in profile["stacks"].as_array().unwrap() {
        let site = stack["site"].as_str().unwrap();
        *stacked.entry(site).or_default() += stack["registered"].as_u64().unwrap();
    }
    assert_eq!(stacked, registered, "{:?}", profile["warnings"]);
    // The build starts one process for each package it compiles, and waits for each.
    assert!(
        registered.keys().any(|id| id.starts_with("os/exec.")),
        "{registered:?}"
    );
}

/// Events of the kernel's own at the sites of an executable; they are gone when this is dropped.
struct Events {
    group: String,
    count: usize,
}

const TRACEFS: &str = "/sys/kernel/tracing";

/// The kernel's profile names no groups: the names must be of this process alone.
fn event(number: usize) -> String {
    format!("t{}_{number}", std::process::id())
}

impl Events {
    fn at(binary: &Path, sites: &[Site]) -> Self {
        let events = Self {
            group: format!("deferprof_test_{}", std::process::id()),
            count: sites.len(),
        };
        for (number, site) in sites.iter().enumerate() {
            let (path, offset) = (binary.display(), site.registration.offset.0);
            let define = format!("p:{}/{} {path}:{offset:#x}", events.group, event(number));
            events.command(&define).unwrap();
        }
        std::fs::write(events.switch(), "1").unwrap();
        events
    }

    fn switch(&self) -> String {
        format!("{TRACEFS}/events/{}/enable", self.group)
    }

    fn command(&self, command: &str) -> std::io::Result<()> {
        let file = format!("{TRACEFS}/uprobe_events");
        let mut file = File::options().append(true).open(file)?;
        file.write_all(command.as_bytes())
    }

    /// How often each was hit.
    fn hits(&self) -> Vec<u64> {
        let text = std::fs::read_to_string(format!("{TRACEFS}/uprobe_profile")).unwrap();
        let counts = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace().rev();
            let count = words.next()?.parse().ok()?;
            Some((words.next()?, count))
        });
        let counts: BTreeMap<&str, u64> = counts.collect();
        let events = (0..self.count).map(event);
        events.map(|event| counts[event.as_str()]).collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        std::fs::write(self.switch(), "0").ok();
        for number in 0..self.count {
            let remove = format!("-:{}/{}", self.group, event(number));
            self.command(&remove).ok();
        }
    }
}

#[test]
fn executables_of_old_releases_are_counted_as_the_kernel_counts() {
    if !uprobes_work() {
        return;
    }
    if !Path::new(TRACEFS).join("uprobe_profile").exists() {
        return println!("skipped: tracefs is not mounted; scripts/test mounts it");
    }
    let old = deferprof_fixtures::cache().join("ibazel/amd64");
    for (version, release) in [
        ("0.0.1", "go1.7.3"),
        ("0.1.1", "go1.9.2"),
        ("0.9.1", "go1.11.5"),
        ("0.10.3", "go1.12.5"),
    ] {
        let binary = old.join(version).join("ibazel");
        if cfg!(not(target_arch = "x86_64")) || !binary.exists() {
            println!("{release}: skipped: run `fixtures/download/npm ibazel` to fetch it");
            continue;
        }
        let bytes = std::fs::read(&binary).unwrap();
        let inventory = Binary::parse(&bytes).unwrap().inventory().unwrap();
        assert_eq!(inventory.binary.go_version, release);
        // The kernel takes long to remove an event: those at the sites of a few packages will do.
        let packages = ["internal/poll.", "sync.", "syscall."];
        let mut sites = inventory.sites;
        sites.retain(|site| packages.iter().any(|p| site.function.starts_with(p)));
        let events = Events::at(&binary, &sites);
        let file = std::env::temp_dir().join(format!("{}.json", events.group));
        let mut command = deferprof();
        command.args(["run", "-o"]).arg(&file).arg("--");
        let output = command.arg(&binary).arg("version").output().unwrap();
        let hits = events.hits();
        drop(events);

        let profile = std::fs::read(&file);
        std::fs::remove_file(&file).ok();
        let said = String::from_utf8_lossy(&output.stderr);
        let profile: serde_json::Value = serde_json::from_slice(&profile.expect(&said)).unwrap();
        let ids = sites.iter().map(|site| site.id.0.as_str());
        let expected: BTreeMap<&str, u64> = ids.zip(hits).collect();
        let mut registered = BTreeMap::new();
        for site in profile["sites"].as_array().unwrap() {
            registered.insert(
                site["id"].as_str().unwrap(),
                site["registered"].as_u64().unwrap(),
            );
        }
        registered.retain(|id, _| expected.contains_key(id));
        assert_eq!(registered, expected, "{release}");
        assert!(
            expected.values().sum::<u64>() > 3,
            "{release}: {expected:?}"
        );
        let warnings = profile["warnings"].to_string();
        assert!(warnings.contains("best effort"), "{release}: {warnings}");
    }
}
