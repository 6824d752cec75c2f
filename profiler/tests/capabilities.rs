//! With capabilities taken away, deferprof works or says which one is missing; `setpriv` (util-linux)
//! takes them.

mod support;

use std::process::{Command, Output};

use deferprof_fixtures::{Build, Fixture, Toolchain};
use support::{or_skip, uprobes_work};

/// `deferprof ARGUMENTS` with a bounding set as setpriv(1) writes it.
fn with(set: &str, arguments: &[&str]) -> Option<Output> {
    let output = Command::new("setpriv")
        .arg(format!("--bounding-set={set}"))
        .arg(env!("CARGO_BIN_EXE_deferprof"))
        .args(arguments)
        .output();
    match output {
        Ok(output) => Some(output),
        Err(error) => {
            println!("skipped: setpriv cannot be run: {error}");
            None
        }
    }
}

fn check(set: &str, missing: &[&str]) {
    if !uprobes_work() || !nix::unistd::Uid::effective().is_root() {
        println!("skipped: this is not root, or uprobes do not work here");
        return;
    }
    let Some(toolchain) = or_skip("f3", Toolchain::newest()) else {
        return;
    };
    let fixture = Fixture::find("f3").unwrap();
    let Some(binary) = or_skip("f3", fixture.build(&toolchain, &Build::default())) else {
        return;
    };
    let binary = binary.to_str().unwrap();
    let Some(run) = with(set, &["run", "--format=json", "--", binary, "-n", "5"]) else {
        return;
    };
    let Some(doctor) = with(set, &["doctor", "--format=json"]) else {
        return;
    };
    let said = String::from_utf8_lossy(&run.stderr);
    let status = if missing.is_empty() { 0 } else { 3 };
    assert_eq!(run.status.code(), Some(status), "{set}: {said}");
    assert_eq!(doctor.status.code(), Some(status), "{set}");
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!(report["ready"], missing.is_empty(), "{set}");
    for capability in missing {
        assert!(said.contains(capability), "{set}: {said}");
        let problem = &report["problems"][0];
        let what = problem["what"].as_str().unwrap();
        assert!(
            said.contains(what),
            "not the same sentence: {said:?}, {what:?}"
        );
        assert!(
            problem["fix"]
                .as_str()
                .unwrap()
                .starts_with("sudo setcap cap_bpf")
        );
    }
}

#[test]
fn one_capability_less_works_where_another_stands_for_it() {
    for set in ["-bpf", "-perfmon", "-sys_ptrace", "-sys_admin"] {
        check(set, &[]);
    }
}

#[test]
fn without_a_capability_and_its_stand_in_the_message_names_it() {
    check("-bpf,-sys_admin", &["cap_bpf"]);
    check("-perfmon,-sys_admin", &["cap_perfmon"]);
    check("-all", &["cap_bpf,cap_perfmon"]);
}

#[test]
fn two_capabilities_are_enough() {
    check("-all,+bpf,+perfmon", &[]);
}
