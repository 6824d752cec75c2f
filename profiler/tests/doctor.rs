//! `deferprof doctor PID`: what it says of a process, against what the tests did to it.

mod support;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use deferprof_fixtures::{Build, Fixture, Options, Running, Toolchain};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::{or_skip, output, uprobes_work};

/// A fixture that waits; `None`, with the reason printed, where it cannot be profiled.
fn waiting() -> Option<Running> {
    if !uprobes_work() {
        return None;
    }
    let toolchain = or_skip("f3", Toolchain::newest())?;
    let fixture = Fixture::find("f3").unwrap();
    let binary = or_skip("f3", fixture.build(&toolchain, &Build::default()))?;
    Some(Running::start(&binary, &Options::default().wait()).unwrap())
}

fn doctor(pid: u32) -> (Value, Option<i32>) {
    let output = output(&["doctor", "--format=json", &pid.to_string()]);
    (
        serde_json::from_slice(&output.stdout).unwrap(),
        output.status.code(),
    )
}

/// `doctor`, as soon as it says that.
fn doctor_until(pid: u32, says: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let (report, _) = doctor(pid);
        if says(&report["target"]) {
            return report;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{report:#}");
    }
}

/// The problem whose fix starts so.
fn problem<'a>(report: &'a Value, fix: &str) -> &'a Value {
    let mut problems = report["problems"].as_array().unwrap().iter();
    let found = problems.find(|it| it["fix"].as_str().is_some_and(|it| it.starts_with(fix)));
    found.unwrap_or_else(|| panic!("no problem is mended by {fix}: {report:#}"))
}

#[test]
fn a_process_that_only_waits() {
    let Some(running) = waiting() else { return };
    let (report, status) = doctor(running.pid());
    assert_eq!(status, Some(0));
    assert_eq!(report["ready"], true);
    let target = &report["target"];
    assert_eq!(target["pid"], running.pid());
    assert_eq!(target["tracer"], Value::Null);
    assert_eq!(target["stopped"], false);
    let mechanisms = target["mechanisms"].as_object().unwrap();
    let sum: u64 = mechanisms.values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(target["sites"], sum);
    // As many probes as an attach says that it put in place.
    let pid = running.pid().to_string();
    let attach = output(&["attach", "--verbose", "--duration=1ms", &pid]);
    let said = String::from_utf8(attach.stderr).unwrap();
    let expected = format!(": attached {} probes ", target["probes"]);
    assert!(said.contains(&expected), "{expected:?} is not in {said}");
}

#[test]
fn a_stopped_process_and_how_to_let_it_go_on() {
    let Some(running) = waiting() else { return };
    let pid = Pid::from_raw(running.pid() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let report = doctor_until(running.pid(), |target| target["stopped"] == true);
    assert_eq!(report["ready"], true, "{report:#}");
    let problem = problem(&report, "kill -CONT");
    assert_eq!(problem["blocks"], false);
    let what = problem["what"].as_str().unwrap();
    // `attach` says the same.
    let attach = output(&["attach", "--duration=1ms", &pid.to_string()]);
    let said = String::from_utf8(attach.stderr).unwrap();
    assert!(said.contains(what), "{what:?} is not in {said:?}");
    let fix = problem["fix"].as_str().unwrap();
    assert!(
        Command::new("sh")
            .args(["-c", fix])
            .status()
            .unwrap()
            .success()
    );
    doctor_until(running.pid(), |target| target["stopped"] == false);
}

/// A tracer; it ends when dropped, and so does the tracing.
struct Tracer(Child);

impl Drop for Tracer {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Traces a process (PTRACE_SEIZE) from a second thread, as debuggers do that are written in Go.
const TRACE: &str = "
import ctypes, sys, threading, time
def trace():
    libc = ctypes.CDLL(None)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    assert libc.ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0
    time.sleep(100)
threading.Thread(target=trace).start()
";

#[test]
fn a_traced_process_and_by_whom() {
    let Some(running) = waiting() else { return };
    let pid = running.pid().to_string();
    let tracer = Command::new("python3")
        .args(["-c", TRACE, &pid])
        .stdin(Stdio::null())
        .spawn();
    let Ok(tracer) = tracer else {
        println!("skipped: there is no python3 here to trace the target");
        return;
    };
    let tracer = Tracer(tracer);
    let by = tracer.0.id();
    let report = doctor_until(running.pid(), |target| target["tracer"] == by);
    let problem = problem(&report, &format!("kill {by}"));
    assert_eq!(problem["blocks"], false);
    let what = problem["what"].as_str().unwrap();
    assert!(what.contains(&format!("process {by} (python3")), "{what}");
    // It is a matter of care, not of permission.
    assert_eq!(report["ready"], true, "{report:#}");
    drop(tracer);
    doctor_until(running.pid(), |target| target["tracer"].is_null());
}

#[test]
fn a_process_that_has_no_defers_to_profile() {
    let mut child = Command::new("sleep").arg("100").spawn().unwrap();
    let (report, status) = doctor(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(status, Some(3), "{report:#}");
    assert_eq!(report["ready"], false);
    let (report, status) = doctor(child.id());
    assert_eq!(status, Some(3), "{report:#}");
    let what = report["problems"][0]["what"].as_str().unwrap();
    assert!(what.contains("there is no process"), "{what}");
}
