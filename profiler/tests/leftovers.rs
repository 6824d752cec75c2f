//! A killed deferprof leaves no breakpoint; a trace event's definition it leaves, and the next one
//! that makes any removes it. tracefs is mounted in a mount namespace of the test's own if need be.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use deferprof_fixtures::{Build, Fixture, Options, Running, Toolchain};
use nix::sys::signal::Signal;
use support::{Deferprof, or_skip, uprobes_work};

const TRACEFS: &str = "/sys/kernel/tracing";

/// A command that runs with tracefs mounted. `None`, with the reason printed, where that cannot be.
fn with_tracefs() -> Option<Command> {
    let events = Path::new(TRACEFS).join("uprobe_events");
    if events.exists() {
        return Some(Command::new("env"));
    }
    let mounted = format!("mount -t tracefs nodev {TRACEFS} && exec \"$0\" \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &mounted]);
    let mut test = Command::new("unshare");
    let test = test.args(["--mount", "sh", "-c", &mounted, "test", "-w"]);
    let works = test.arg(events).stderr(Stdio::null()).status();
    if works.is_ok_and(|status| status.success()) {
        return Some(command);
    }
    println!("skipped: there is no tracefs here, and it cannot be mounted");
    None
}

/// The lines of uprobe_events that are one deferprof's.
fn events(pid: nix::unistd::Pid) -> usize {
    let mut cat = with_tracefs().unwrap();
    let output = cat.args(["cat", &format!("{TRACEFS}/uprobe_events")]);
    let text = String::from_utf8(output.output().unwrap().stdout).unwrap();
    let name = format!("deferprof/p{pid}_");
    text.lines().filter(|line| line.contains(&name)).count()
}

#[test]
fn the_trace_event_of_a_killed_deferprof_is_removed_by_the_next() {
    if !uprobes_work() || with_tracefs().is_none() {
        return;
    }
    let Some(toolchain) = or_skip("f3", Toolchain::newest()) else {
        return;
    };
    let fixture = Fixture::find("f3").unwrap();
    let Some(binary) = or_skip("f3", fixture.build(&toolchain, &Build::default())) else {
        return;
    };
    let mut running = Running::start(&binary, &Options::default().wait().hold()).unwrap();
    let attach = || {
        let mut command = with_tracefs().unwrap();
        command.arg(env!("CARGO_BIN_EXE_deferprof"));
        command.args(["attach", "--verbose", "--format=json"]);
        command.args(["--link=trace_event", "--include=^main\\."]);
        command.arg(running.pid().to_string());
        let mut attach = Deferprof::start(command);
        attach.wait_until_attached();
        attach
    };

    let mut killed = attach();
    let dead = killed.pid();
    killed.signal(Signal::SIGKILL);
    killed.finish();
    assert!(events(dead) > 0, "a killed deferprof cannot clean up");

    let mut next = attach();
    assert_eq!(events(dead), 0, "the next one removes what is left");
    assert!(events(next.pid()) > 0);
    running.go().unwrap();
    let truth = running.truth().unwrap();
    next.interrupt();
    let (_, profile) = next.output_and_profile();
    assert_eq!(events(next.pid()), 0, "and leaves nothing itself");
    let sites = profile["sites"].as_array().unwrap().iter();
    let registered = sites.map(|site| site["registered"].as_u64().unwrap());
    assert_eq!(registered.sum::<u64>(), truth.registered());
    running.finish().unwrap();
}
