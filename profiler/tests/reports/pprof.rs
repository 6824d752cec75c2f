//! The pprof report, read by `go tool pprof`.

use std::path::{Path, PathBuf};
use std::process::Command;

use deferprof::profile::Profile;
use deferprof::report::{Format, Options};

use crate::common::{api, bytes};

/// The Go root of a toolchain that brings pprof prebuilt (Go 1.24 and older), or any other one.
fn go_root() -> Option<PathBuf> {
    let home = std::env::var_os("HOME")?;
    let toolchains = Path::new(&home).join(".cache/deferprof/go");
    let mut roots: Vec<_> = std::fs::read_dir(toolchains)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path().join("go")))
        .filter(|root| root.join("bin/go").exists())
        .collect();
    let prebuilt = |root: &PathBuf| {
        let tools = std::fs::read_dir(root.join("pkg/tool")).into_iter();
        tools
            .flatten()
            .flatten()
            .any(|tools| tools.path().join("pprof").exists())
    };
    roots.sort_by_key(|root| (!prebuilt(root), root.clone()));
    roots.into_iter().next()
}

/// What `go tool pprof` prints about a profile, or `None` without a Go toolchain.
fn go_tool_pprof(name: &str, profile: &Profile, arguments: &[&str]) -> Option<String> {
    let Some(root) = go_root() else {
        eprintln!("Skipped: there is no Go toolchain in ~/.cache/deferprof/go to read the file.");
        return None;
    };
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.pb.gz"));
    std::fs::write(&file, bytes(profile, Format::Pprof, &Options::default()).0).unwrap();
    let output = Command::new(root.join("bin/go"))
        .args(["tool", "pprof"])
        .args(arguments)
        .arg(&file)
        .env("GOROOT", &root)
        .env("GOTOOLCHAIN", "local")
        .env("PPROF_BINARY_PATH", "/nowhere")
        .env("TZ", "UTC")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    Some(stdout)
}

/// Whether the words stand in one line of the text.
#[track_caller]
fn assert_line(text: &str, words: &[&str]) {
    let found = text
        .lines()
        .any(|line| words.iter().all(|word| line.contains(word)));
    assert!(found, "no line with {words:?} in:\n{text}");
}

#[test]
fn go_reads_counts_and_functions() {
    let top = ["-top", "-sample_index=registered", "-nodefraction=0"];
    let Some(text) = go_tool_pprof("top", &api(), &top) else {
        return;
    };
    assert_line(&text, &["Type: registered"]);
    assert_line(&text, &["Duration: 10s", "Total samples = 3510000"]);
    assert_line(
        &text,
        &["2000000", "56.98%", "2900000", "net/http.(*conn).serve"],
    );
    assert_line(
        &text,
        &["1000000", "28.49%", "1500000", "main.(*Server).handle"],
    );
    assert_line(&text, &["500000", "14.25%", "store.(*Tx).Commit"]);
    assert_line(&text, &["570000", "16.24%", "main.main"]);
    assert_line(
        &text,
        &["900000", "net/http.HandlerFunc.ServeHTTP (inline)"],
    );
}

#[test]
fn cost_is_the_default_and_labels_select() {
    let arguments = ["-top", "-unit=us", "-tagfocus=mechanism=heap"];
    let Some(text) = go_tool_pprof("tags", &api(), &arguments) else {
        return;
    };
    assert_line(&text, &["Type: cost"]);
    // 20 of 29.7 ms.
    assert_line(&text, &["20000us", "67.34%", "29700us total"]);
    assert_line(&text, &["20000us", "67.34%", "main.(*Server).handle"]);
}

#[test]
fn locations_have_addresses_lines_and_inlined_calls() {
    let Some(text) = go_tool_pprof("raw", &api(), &["-raw"]) else {
        return;
    };
    assert_line(&text, &["registered/count cost/nanoseconds[dflt]"]);
    assert_line(&text, &["Period: 1"]);
    assert_line(&text, &["Time: 2026-11-22 03:00:00"]);
    assert_line(
        &text,
        &[
            "0x4a1b2c M=1 main.(*Server).handle /src/api/main.go:120",
            "s=110",
        ],
    );
    // Two lines of one location: the inlined call first.
    assert_line(
        &text,
        &[
            "0x5b2200 M=1 net/http.HandlerFunc.ServeHTTP",
            "server.go:2322",
        ],
    );
    assert_line(
        &text,
        &["             net/http.(*conn).serve", "server.go:2102"],
    );
    assert_line(
        &text,
        &["1: 0x0/0x0/0x0 /srv/api/bin/api abc/def [FN][FL][LN][IN]"],
    );
    assert_line(
        &text,
        &["mechanism:[heap] reason:[loop] site:[main.(*Server).handle#1]"],
    );
}

#[test]
fn a_profile_without_stacks_is_one_too() {
    let mut profile = api();
    profile.stacks = None;
    profile.frames = None;
    let arguments = ["-traces", "-sample_index=registered"];
    let Some(text) = go_tool_pprof("alone", &profile, &arguments) else {
        return;
    };
    assert_line(&text, &["1000000", "main.(*Server).handle"]);
    assert_line(&text, &["2000000", "net/http.(*conn).serve"]);
    profile.sites.clear();
    let Some(text) = go_tool_pprof("empty", &profile, &["-top"]) else {
        return;
    };
    assert_line(&text, &["flat%"]);
}
