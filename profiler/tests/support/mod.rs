//! Running the built `deferprof` from tests.

#![expect(dead_code, reason = "each test program uses a part of this")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use deferprof_fixtures::{Options, Running, Truth};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How a recording is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    Run,
    Attach,
}

impl How {
    /// Records a fixture from its first deferred call to its last: the profile, and the truth.
    pub fn record(
        self,
        arguments: &[String],
        binary: &Path,
        options: &Options,
    ) -> (serde_json::Value, Truth) {
        match self {
            Self::Run => {
                let mut deferprof = Deferprof::run(arguments, binary, &options.arguments());
                let (output, profile) = deferprof.output_and_profile();
                (profile, serde_json::from_str(&output).unwrap())
            }
            Self::Attach => {
                let options = options.clone().wait().hold();
                let mut running = Running::start(binary, &options).unwrap();
                let mut deferprof = Deferprof::attach(arguments, running.pid());
                deferprof.wait_until_attached();
                running.go().unwrap();
                let truth = running.truth().unwrap();
                deferprof.interrupt();
                let (_, profile) = deferprof.output_and_profile();
                running.finish().unwrap();
                (profile, truth)
            }
        }
    }
}

/// A hang is a failure, not a wait.
const PATIENCE: Duration = Duration::from_secs(120);

/// The program under test.
pub fn deferprof() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deferprof"));
    command.env_remove("COLUMNS").stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn output(arguments: &[&str]) -> Output {
    deferprof().args(arguments).output().unwrap()
}

/// Whether uprobes can be used here; says so where they cannot, once a process.
pub fn uprobes_work() -> bool {
    static WORK: OnceLock<bool> = OnceLock::new();
    *WORK.get_or_init(|| {
        let works = deferprof::engine::LinkKind::ALL
            .iter()
            .any(|kind| deferprof::engine::ebpf::supports(*kind).is_ok());
        if !works {
            println!("skipped: uprobes with eBPF do not work here (not root, or an old kernel)");
        }
        works
    })
}

/// Whether uprobes can be used and this `deferprof` measures more than counts; says so where not.
pub fn measures_ran() -> bool {
    static MEASURES: OnceLock<bool> = OnceLock::new();
    uprobes_work()
        && *MEASURES.get_or_init(|| {
            let help = output(&["run", "--help"]).stdout;
            let measures = String::from_utf8_lossy(&help).contains("--latency");
            if !measures {
                println!("skipped: `deferprof run` has no --latency yet");
            }
            measures
        })
}

/// Whether the whole matrix is asked for.
pub fn full() -> bool {
    std::env::var_os("DEFERPROF_FULL").is_some()
}

/// Unwraps, or prints why the case is skipped.
pub fn or_skip<T>(what: &str, result: deferprof_fixtures::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) if error.is_skip() => {
            println!("{what}: skipped: {error}");
            None
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

/// The runtime shows `[...]` for type arguments (`funcNameForPrint`), so the truth does.
pub fn as_the_runtime_names_it(function: &str) -> String {
    match (function.find('['), function.rfind(']')) {
        (Some(open), Some(close)) if open < close => {
            format!("{}[...{}", &function[..open], &function[close..])
        }
        _ => function.to_owned(),
    }
}

/// The site of a function, as the runtime names it, and line; for fixtures with one site a line.
pub fn site_at<'a>(
    profile: &'a serde_json::Value,
    function: &str,
    line: u32,
) -> &'a serde_json::Value {
    let sites = profile["sites"].as_array().unwrap();
    let site = sites.iter().find(|site| {
        as_the_runtime_names_it(site["function"].as_str().unwrap()) == function
            && site["line"] == line
    });
    site.unwrap_or_else(|| panic!("no site in {function} on line {line}"))
}

/// A `deferprof` that records.
pub struct Deferprof {
    child: Child,
    errors: Receiver<String>,
    said: Vec<String>,
}

impl Deferprof {
    /// `deferprof run ARGUMENTS -- BINARY PROGRAM_ARGUMENTS`.
    pub fn run(arguments: &[String], binary: &Path, program: &[String]) -> Self {
        let mut command = deferprof();
        command
            .arg("run")
            .arg("--verbose")
            .args(arguments)
            .arg("--")
            .arg(binary)
            .args(program);
        Self::start(command)
    }

    /// `deferprof attach ARGUMENTS PID`.
    pub fn attach(arguments: &[String], pid: u32) -> Self {
        let mut command = deferprof();
        command
            .arg("attach")
            .arg("--verbose")
            .args(arguments)
            .arg(pid.to_string());
        Self::start(command)
    }

    /// Any command that becomes one.
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, errors) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            errors,
            said: Vec::new(),
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Waits until the probes are in place.
    pub fn wait_until_attached(&mut self) {
        loop {
            let Ok(line) = self.errors.recv_timeout(PATIENCE) else {
                panic!("deferprof did not attach; it said {:#?}", self.said);
            };
            let attached = line.contains(": attached ");
            self.said.push(line);
            if attached {
                return;
            }
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        self.signal(Signal::SIGINT);
    }

    /// Waits for its end: the exit status, standard output and standard error.
    pub fn finish(&mut self) -> (i32, String, String) {
        let mut stdout = String::new();
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut stdout)
            .unwrap();
        let status = self.child.wait().unwrap();
        while let Ok(line) = self.errors.recv_timeout(Duration::from_secs(5)) {
            self.said.push(line);
        }
        (status.code().unwrap_or(-1), stdout, self.said.join("\n"))
    }

    /// Waits for its end: what the program printed before the profile, and the profile.
    pub fn output_and_profile(&mut self) -> (String, serde_json::Value) {
        let (status, stdout, stderr) = self.finish();
        assert_eq!(status, 0, "{stderr}");
        let start = stdout
            .find("{\"schema\":")
            .or_else(|| stdout.find("{\n  \"schema\":"));
        let start = start.unwrap_or_else(|| panic!("no profile in {stdout:?}; {stderr}"));
        let (before, profile) = stdout.split_at(start);
        let truth = before
            .lines()
            .rfind(|l| l.starts_with("{\"fixture\""))
            .unwrap_or_default();
        (truth.to_owned(), serde_json::from_str(profile).unwrap())
    }
}

impl Drop for Deferprof {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
