//! The command line as users meet it when things go wrong: a sentence, the right exit status,
//! nothing on standard output, nothing left behind.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use deferprof_fixtures::{Arch, Build, Fixture, Options, Running, Toolchain};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Deferprof, deferprof, or_skip, output, uprobes_work};

/// A folder that is removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("deferprof-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts status, an empty standard output, and one sentence with these words in it.
#[track_caller]
fn refuses(output: &Output, status: i32, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(
        output.stdout.is_empty(),
        "{:?}",
        String::from_utf8_lossy(&output.stdout)
    );
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("deferprof: ") || status == 2, "{said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said:?}");
    }
}

fn fixture(name: &str) -> Option<PathBuf> {
    let toolchain = or_skip(name, Toolchain::newest())?;
    or_skip(
        name,
        Fixture::find(name)
            .unwrap()
            .build(&toolchain, &Build::default()),
    )
}

#[test]
fn files_that_are_no_go_binaries_are_refused() {
    let folder = Folder::new("no-go");
    let elf = fs::read("/proc/self/exe").unwrap();
    let mut riscv = elf.clone();
    riscv[18] = 243;
    let mut small = elf.clone();
    small[4] = 1;
    let mut big = elf[..4096].to_vec();
    big[5] = 2;
    let packed = [&elf[..], b"UPX!"].concat();
    let cases: [(&str, &[u8], i32, &str); 9] = [
        ("empty", b"", 1, "not an ELF file"),
        ("text", b"hello\n", 1, "not an ELF file"),
        ("script", b"#!/bin/sh\n", 1, "not an ELF file"),
        ("header", b"\x7fELF\x02\x01\x01", 1, "cut off"),
        ("rust", &elf, 1, "not a Go binary"),
        ("riscv", &riscv, 3, "RISC-V"),
        ("small", &small, 3, "32-bit"),
        ("big", &big, 3, "big-endian"),
        ("packed", &packed, 3, "upx -d"),
    ];
    for (name, bytes, status, words) in cases {
        let file = folder.file(name, bytes);
        refuses(&output(&["scan", &file]), status, &[words, &file]);
    }
    refuses(
        &output(&["scan", &folder.path("missing")]),
        1,
        &["No such file", "missing"],
    );
    refuses(
        &output(&["scan", folder.0.to_str().unwrap()]),
        1,
        &["folder"],
    );
    nix::unistd::mkfifo(
        Path::new(&folder.path("pipe")),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    refuses(&output(&["scan", &folder.path("pipe")]), 1, &["pipe"]);
}

#[test]
fn a_binary_cut_off_anywhere_is_an_error_or_a_list_with_a_warning() {
    let Some(binary) = fixture("f0") else { return };
    let bytes = fs::read(&binary).unwrap();
    let folder = Folder::new("cut");
    let whole = output(&["scan", "--format=json", binary.to_str().unwrap()]).stdout;
    for length in (0..bytes.len()).step_by(64 * 1024) {
        let file = folder.file("cut", &bytes[..length]);
        let output = output(&["scan", "--format=json", &file]);
        match output.status.code() {
            Some(0) => {
                // What the loader maps is whole: only sections behind it can be missing.
                let (cut, whole): (serde_json::Value, serde_json::Value) = (
                    serde_json::from_slice(&output.stdout).unwrap(),
                    serde_json::from_slice(&whole).unwrap(),
                );
                assert_eq!(cut["sites"], whole["sites"], "{length} bytes");
            }
            Some(1) => refuses(&output, 1, &[&file]),
            other => panic!("{length} bytes: exit status {other:?}: {}", stderr(&output)),
        }
    }
}

#[test]
fn bad_usage_is_status_2() {
    let folder = Folder::new("usage");
    for arguments in [
        &["attach"][..],
        &["attach", "0"],
        &["attach", "-5"],
        &["attach", "x"],
        &["attach", "99999999999"],
        &["attach", "--duration=0", "1"],
        &["attach", "--duration=soon", "1"],
        &["attach", "--include=(", "1"],
        &["run"],
        &["scan"],
        &["frobnicate"],
        &["attach", "-o", "profile", "1"],
        &["attach", "-o", "a.svg", "-o", "a.svg", "1"],
    ] {
        let output = deferprof()
            .args(arguments)
            .current_dir(&folder.0)
            .output()
            .unwrap();
        refuses(&output, 2, &[]);
    }
    assert_eq!(
        fs::read_dir(&folder.0).unwrap().count(),
        0,
        "something was left behind"
    );
}

#[test]
fn processes_that_cannot_be_watched_are_named() {
    // The largest pid is 2^22.
    refuses(&output(&["attach", "4194304"]), 1, &["no process 4194304"]);
    // A kernel thread: kthreadd, where this pid namespace shows it.
    if fs::read_to_string("/proc/2/comm").is_ok_and(|c| c.trim() == "kthreadd") {
        refuses(&output(&["attach", "2"]), 1, &["kernel thread"]);
    } else {
        println!("no kernel thread is visible here: that case is skipped");
    }
    // A process that is not Go: this test.
    let own = std::process::id().to_string();
    refuses(&output(&["attach", &own]), 1, &["not a Go binary"]);
    // A thread of it.
    let thread = std::thread::spawn(|| {
        let id = nix::unistd::gettid().to_string();
        refuses(&output(&["attach", &id]), 1, &["is a thread of process"]);
    });
    thread.join().unwrap();
    // A zombie.
    let mut child = Command::new("true").spawn().unwrap();
    let stat = format!("/proc/{}/stat", child.id());
    while !fs::read_to_string(&stat).unwrap().contains(") Z ") {
        std::thread::yield_now();
    }
    refuses(
        &output(&["attach", &child.id().to_string()]),
        1,
        &["zombie"],
    );
    child.wait().unwrap();
}

/// An unprivileged user, as far as system calls are concerned.
const NOBODY: u32 = 65534;

#[test]
fn without_rights_it_says_which_and_how_to_get_them() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: only root can become another user");
        return;
    }
    let Some(binary) = fixture("f3") else { return };
    // The program and the binary must be readable for everybody: under /tmp they are.
    let folder = Folder::new("rights");
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path("deferprof");
    fs::copy(env!("CARGO_BIN_EXE_deferprof"), &program).unwrap();
    let target = folder.path("f3");
    fs::copy(&binary, &target).unwrap();
    let as_nobody = |arguments: &[&str]| {
        Command::new(&program)
            .args(arguments)
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .unwrap()
    };
    // A scan needs none.
    assert_eq!(as_nobody(&["scan", &target]).status.code(), Some(0));
    // Another user's process.
    let running = Running::start(Path::new(&target), &Options::default().wait()).unwrap();
    let pid = running.pid().to_string();
    refuses(
        &as_nobody(&["attach", &pid]),
        3,
        &["not permitted", "root", &pid],
    );
    // Its own, but without the right to load eBPF programs.
    refuses(&as_nobody(&["run", "--", &target]), 3, &["cap_bpf", "sudo"]);
    // A file that may not be read.
    fs::set_permissions(&target, fs::Permissions::from_mode(0o711)).unwrap();
    refuses(
        &as_nobody(&["scan", &target]),
        3,
        &["Permission denied", &target],
    );
}

#[test]
fn outputs_that_cannot_be_written_are_told_before_the_recording() {
    let Some(binary) = fixture("f3") else { return };
    let folder = Folder::new("outputs");
    let missing = folder.path("no/such/folder/a.svg");
    let run = |file: &str| output(&["run", "-o", file, "--", binary.to_str().unwrap()]);
    refuses(&run(&missing), 1, &[&missing, "cannot be written"]);
    fs::create_dir(folder.path("folder.svg")).unwrap();
    refuses(&run(&folder.path("folder.svg")), 1, &["folder.svg"]);
}

#[test]
fn run_says_why_a_program_cannot_be_run() {
    let folder = Folder::new("run");
    refuses(
        &output(&["run", "--", "no-such-program-anywhere"]),
        1,
        &["PATH"],
    );
    refuses(
        &output(&["run", "--", "./no-such-file"]),
        1,
        &["No such file"],
    );
    let script = folder.file("script", b"#!/bin/sh\nexit 0\n");
    refuses(&output(&["run", "--", &script]), 1, &["script"]);
    if !uprobes_work() {
        return;
    }
    let Some(binary) = fixture("f3") else { return };
    let plain = folder.path("f3");
    fs::copy(&binary, &plain).unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    refuses(
        &output(&["run", "--", &plain]),
        3,
        &["cannot be executed", &plain],
    );
    // Another architecture's binary is scanned, but cannot be executed here.
    let toolchain = Toolchain::newest().unwrap();
    let arm = Fixture::find("f3")
        .unwrap()
        .build(&toolchain, &Build::arch(Arch::Arm64))
        .unwrap();
    assert_eq!(
        output(&["scan", arm.to_str().unwrap()]).status.code(),
        Some(0)
    );
    refuses(
        &output(&["run", "--", arm.to_str().unwrap()]),
        1,
        &["cannot be executed"],
    );
}

#[test]
fn run_passes_the_programs_exit_status_on_and_writes_every_format() {
    if !uprobes_work() {
        return;
    }
    let Some(binary) = fixture("exit") else {
        return;
    };
    let folder = Folder::new("formats");
    let bare = Command::new(&binary)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    let files: Vec<String> = ["a.json", "a.folded", "a.svg", "a.pb.gz", "a.txt"]
        .map(|f| folder.path(f))
        .into();
    let mut arguments = vec!["run".to_owned(), "--stacks".to_owned()];
    for file in &files {
        arguments.extend(["-o".to_owned(), file.clone()]);
    }
    arguments.extend(["--".to_owned(), binary.to_str().unwrap().to_owned()]);
    let output = deferprof().args(&arguments).output().unwrap();
    assert_eq!(output.status.code(), bare.code(), "{}", stderr(&output));
    for file in &files {
        assert!(fs::metadata(file).unwrap().len() > 100, "{file}");
    }
    assert_eq!(
        fs::read_dir(&folder.0).unwrap().count(),
        files.len(),
        "temporary files are left"
    );
    // The saved profile shows the same again.
    let again = text(&["report", "--format=folded", &files[0]]);
    assert_eq!(again, fs::read_to_string(&files[1]).unwrap());
    refuses(&support::output(&["report", &files[2]]), 1, &[&files[2]]);
}

fn text(arguments: &[&str]) -> String {
    let output = output(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_target_that_is_killed_or_whose_file_is_deleted_is_still_reported() {
    if !uprobes_work() {
        return;
    }
    let Some(binary) = fixture("f3") else { return };
    let folder = Folder::new("deleted");
    let copy = folder.path("f3");
    fs::copy(&binary, &copy).unwrap();
    let options = Options::default().wait().hold();
    let mut running = Running::start(Path::new(&copy), &options).unwrap();
    // Replaced by another program before deferprof looks: the running one counts.
    fs::remove_file(&copy).unwrap();
    fs::write(&copy, b"#!/bin/sh\n").unwrap();
    let mut deferprof = Deferprof::attach(&["--format=json".to_owned()], running.pid());
    deferprof.wait_until_attached();
    running.go().unwrap();
    let truth = running.truth().unwrap();
    kill(Pid::from_raw(running.pid() as i32), Signal::SIGKILL).unwrap();
    let (_, profile) = deferprof.output_and_profile();
    let registered: u64 = profile["sites"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|s| s["function"] == "main.f3")
        .map(|s| s["registered"].as_u64().unwrap())
        .sum();
    assert_eq!(registered, truth.registered());
}

#[test]
fn a_stopped_target_is_said_to_be_stopped() {
    if !uprobes_work() {
        return;
    }
    let Some(binary) = fixture("f3") else { return };
    let running = Running::start(&binary, &Options::default().wait()).unwrap();
    let pid = Pid::from_raw(running.pid() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let stat = format!("/proc/{pid}/stat");
    while !fs::read_to_string(&stat).unwrap().contains(") T ") {
        std::thread::yield_now();
    }
    let output = output(&["attach", "--duration=200ms", &pid.to_string()]);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        stderr(&output).contains("is stopped"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn signals_end_a_recording_with_its_report() {
    if !uprobes_work() {
        return;
    }
    let Some(binary) = fixture("f3") else { return };
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let running = Running::start(&binary, &Options::default().wait()).unwrap();
        let mut deferprof = Deferprof::attach(&["--format=json".to_owned()], running.pid());
        deferprof.wait_until_attached();
        deferprof.signal(signal);
        let (_, profile) = deferprof.output_and_profile();
        assert!(profile["window"]["observed_ns"].as_u64().unwrap() > 0);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let Some(binary) = fixture("shop") else {
        return;
    };
    let mut child = deferprof()
        .args(["scan", "--format=json", binary.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(output.stderr.is_empty(), "{}", stderr(&output));
}
