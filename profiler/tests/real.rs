//! Programs that were not written to be profiled: the `go` command as it is distributed.

mod support;

use std::collections::BTreeMap;

use deferprof_fixtures::Toolchain;
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
