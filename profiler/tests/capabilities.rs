//! With capabilities taken away, deferprof works or says which one is missing; `setpriv` (util-linux)
//! takes them.

mod support;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use deferprof_fixtures::{Build, Fixture, Options, Running, Toolchain, Truth};
use serde_json::Value;
use support::{Deferprof, or_skip, uprobes_work};

/// A user who is not root, by number: nobody.
const USER: u32 = 65534;

const BOTH: &str = "-all,+bpf,+perfmon";

/// deferprof and a fixture where every user can execute them. Removed when dropped.
struct Place {
    folder: PathBuf,
    fixture: PathBuf,
}

impl Place {
    /// `None`, with the reason printed, where nothing of this can be tried.
    fn new(name: &str) -> Option<Self> {
        if !uprobes_work() || !nix::unistd::Uid::effective().is_root() {
            println!("skipped: this is not root, or uprobes do not work here");
            return None;
        }
        if let Err(error) = Command::new("setpriv").arg("--version").output() {
            println!("skipped: setpriv cannot be run: {error}");
            return None;
        }
        let toolchain = or_skip("f3", Toolchain::newest())?;
        let fixture = Fixture::find("f3").unwrap();
        let binary = or_skip("f3", fixture.build(&toolchain, &Build::default()))?;
        let folder = format!("deferprof-capabilities-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        fs::create_dir_all(&folder).unwrap();
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&folder, open).unwrap();
        let place = Self {
            fixture: folder.join("f3"),
            folder,
        };
        fs::copy(binary, &place.fixture).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_deferprof"), place.deferprof()).unwrap();
        Some(place)
    }

    fn deferprof(&self) -> PathBuf {
        self.folder.join("deferprof")
    }

    /// deferprof, started through setpriv with these options.
    fn with(&self, options: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(options).arg(self.deferprof()).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// A script that executes the fixture the same way: a process may only be looked into by one
    /// that has its capabilities, or CAP_SYS_PTRACE.
    fn fixture_as(&self, options: &[&str]) -> PathBuf {
        let script = self.folder.join("f3.sh");
        let (options, fixture) = (options.join(" "), self.fixture.display());
        let text = format!("#!/bin/sh\nexec setpriv {options} {fixture} \"$@\"\n");
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        script
    }

    fn run(&self, options: &[&str]) -> Output {
        let fixture = self.fixture.to_str().unwrap();
        let run = ["run", "--format=json", "--", fixture, "-n", "5"];
        self.with(options, &run).output().unwrap()
    }

    fn doctor(&self, options: &[&str], arguments: &[&str]) -> (Value, Option<i32>) {
        let mut command = self.with(options, &["doctor", "--format=json"]);
        let output = command.args(arguments).output().unwrap();
        let report = serde_json::from_slice(&output.stdout).unwrap();
        (report, output.status.code())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).ok();
    }
}

/// What deferprof counted of f3's function equals what it counted itself.
fn agree(profile: &Value, truth: &Truth) {
    let sites = profile["sites"].as_array().unwrap().iter();
    let registered = sites
        .filter(|site| site["function"] == "main.f3")
        .map(|site| site["registered"].as_u64().unwrap());
    assert_eq!(registered.sum::<u64>(), truth.registered());
}

/// `run`, `attach` and `doctor` work.
fn works(place: &Place, options: &[&str]) {
    let run = place.run(options);
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(0), "{options:?}: {said}");

    let wait = Options::default().n(5).wait().hold();
    let mut running = Running::start(&place.fixture_as(options), &wait).unwrap();
    let pid = running.pid().to_string();
    let attach = ["attach", "--verbose", "--format=json", &pid];
    let mut attach = Deferprof::start(place.with(options, &attach));
    attach.wait_until_attached();
    running.go().unwrap();
    let truth = running.truth().unwrap();
    // Not by a signal of ours: deferprof may be another user's.
    running.finish().unwrap();
    agree(&attach.output_and_profile().1, &truth);

    let (report, status) = place.doctor(options, &[]);
    assert_eq!(status, Some(0), "{options:?}: {report:#}");
    assert_eq!(report["ready"], true, "{options:?}: {report:#}");
}

/// `run`, `attach` and `doctor` say the same sentence, which names the capabilities, and `doctor` how
/// to get them.
fn is_refused(place: &Place, options: &[&str], missing: &str) {
    let (report, status) = place.doctor(options, &[]);
    assert_eq!(status, Some(3), "{options:?}: {report:#}");
    assert_eq!(report["ready"], false);
    let problem = &report["problems"][0];
    let what = problem["what"].as_str().unwrap();
    assert!(what.contains(&format!("It lacks {missing}.")), "{what}");
    let fix = problem["fix"].as_str().unwrap();
    assert!(fix.starts_with("sudo setcap cap_bpf"), "{fix}");

    let fixture = place.fixture_as(options);
    let running = Running::start(&fixture, &Options::default().wait()).unwrap();
    let pid = running.pid().to_string();
    let attach = place.with(options, &["attach", "--duration=1ms", &pid]);
    for output in [place.run(options), { attach }.output().unwrap()] {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{options:?}: {said}");
        assert!(said.contains(what), "not the same: {said:?}, {what:?}");
    }
}

#[test]
fn one_capability_less_works_where_another_stands_for_it() {
    let Some(place) = Place::new("one") else {
        return;
    };
    for set in ["-bpf", "-perfmon", "-sys_ptrace", "-sys_admin"] {
        works(&place, &[&format!("--bounding-set={set}")]);
    }
}

#[test]
fn without_a_capability_and_its_stand_in_the_message_names_it() {
    let Some(place) = Place::new("stand-in") else {
        return;
    };
    for (set, missing) in [
        ("-bpf,-sys_admin", "cap_bpf"),
        ("-perfmon,-sys_admin", "cap_perfmon"),
        ("-all", "cap_bpf,cap_perfmon"),
    ] {
        is_refused(&place, &[&format!("--bounding-set={set}")], missing);
    }
}

#[test]
fn two_capabilities_are_enough() {
    let Some(place) = Place::new("two") else {
        return;
    };
    works(&place, &[&format!("--bounding-set={BOTH}")]);
}

#[test]
fn two_capabilities_are_enough_for_a_user_and_its_own_target() {
    let Some(place) = Place::new("user") else {
        return;
    };
    let user = format!("--reuid={USER}");
    let group = format!("--regid={USER}");
    let (inheritable, ambient) = (
        format!("--inh-caps={BOTH}"),
        format!("--ambient-caps={BOTH}"),
    );
    let options = [&user, &group, "--clear-groups", &inheritable, &ambient];
    works(&place, &options);
}

#[test]
fn a_user_without_capabilities_is_told_which() {
    let Some(place) = Place::new("nobody") else {
        return;
    };
    let user = format!("--reuid={USER}");
    let options = [&user, "--clear-groups"];
    let (report, status) = place.doctor(&options, &[]);
    assert_eq!(status, Some(3), "{report:#}");
    let what = report["problems"][0]["what"].as_str().unwrap();
    assert!(what.contains("It lacks cap_bpf,cap_perfmon."), "{what}");
    let run = place.run(&options);
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(3), "{said}");
    assert!(said.contains(what), "not the same: {said:?}, {what:?}");
}

#[test]
fn a_process_of_more_capabilities_takes_cap_sys_ptrace() {
    let Some(place) = Place::new("more") else {
        return;
    };
    let running = Running::start(&place.fixture, &Options::default().wait()).unwrap();
    let pid = running.pid().to_string();
    let attach = ["attach", "--duration=1ms", &pid];
    let less = place.with(&["--bounding-set=-sys_ptrace"], &attach);
    let less = { less }.output().unwrap();
    let said = String::from_utf8_lossy(&less.stderr);
    assert_eq!(less.status.code(), Some(3), "{said}");
    assert!(said.contains("CAP_SYS_PTRACE"), "{said}");
}

#[test]
fn another_users_process_takes_cap_sys_ptrace() {
    let Some(place) = Place::new("other") else {
        return;
    };
    let mut target = of_the_user(&place.fixture);
    let pid = target.id().to_string();
    let attach = |set: &str| {
        let attach = ["attach", "--duration=10ms", &pid];
        place.with(&[set], &attach).output().unwrap()
    };
    let all = attach("--bounding-set=+all");
    let less = attach("--bounding-set=-sys_ptrace");
    let (report, status) = place.doctor(&["--bounding-set=-sys_ptrace"], &[&pid]);
    target.kill().unwrap();
    target.wait().unwrap();
    let said = String::from_utf8_lossy(&all.stderr);
    assert_eq!(all.status.code(), Some(0), "{said}");
    let said = String::from_utf8_lossy(&less.stderr);
    assert_eq!(less.status.code(), Some(3), "{said}");
    let names = ["CAP_SYS_PTRACE", &format!("user {USER}")];
    assert!(names.iter().all(|name| said.contains(name)), "{said}");
    assert_eq!(status, Some(3), "{report:#}");
    let problem = &report["problems"][0];
    let what = problem["what"].as_str().unwrap();
    assert!(said.contains(what), "not the same: {said:?}, {what:?}");
    let fix = format!("sudo deferprof attach {pid}");
    assert_eq!(problem["fix"], fix.as_str());
}

/// A fixture that waits and belongs to the user.
fn of_the_user(fixture: &Path) -> Child {
    let mut child = Command::new(fixture)
        .arg("-wait")
        .uid(USER)
        .gid(USER)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.as_mut().unwrap());
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}
