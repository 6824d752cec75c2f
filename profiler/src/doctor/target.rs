//! What can be profiled of one process.

use std::{collections::BTreeMap, fs, os::fd::AsFd as _};

use deferprof_symbols::Binary;
use nix::unistd::Pid;
use serde::Serialize;

use super::{Link, Problem};
use crate::engine::{LinkChoice, Questions, ebpf};
use crate::target::{GoModule, Process};

/// How many sites there are of each mechanism.
pub type Mechanisms = BTreeMap<String, u64>;

/// A process.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Target {
    /// Its id.
    pub pid: i32,
    /// The file of its Go code: what it executes, or a library that it has loaded.
    pub exe: String,
    /// The Go release that built it.
    pub go_version: String,
    /// Its architecture, by Go's name.
    pub arch: String,
    /// How many sites it has.
    pub sites: u64,
    /// The same by mechanism.
    pub mechanisms: Mechanisms,
    /// How many instructions an `attach` without options probes.
    pub probes: u64,
    /// How many of the probes are on instructions that the kernel emulates.
    pub emulated: u64,
    /// The debugger or tracer that holds it, if one does.
    pub tracer: Option<i32>,
    /// Whether it is stopped: nothing of it runs.
    pub stopped: bool,
}

impl Target {
    /// Looks at a process. What is wrong with it, but not so that nothing can be said of it, comes
    /// along.
    pub(super) fn gather(pid: Pid, links: &[Link]) -> Result<(Self, Vec<Problem>), Problem> {
        let blocked = |what: String| Problem {
            blocks: true,
            what,
            fix: None,
        };
        let process = Process::open(pid).map_err(|error| blocked(error.to_string()))?;
        let module = GoModule::of(&process, None).map_err(|error| Problem {
            fix: matches!(error, crate::target::TargetError::NotPermitted { .. })
                .then(|| format!("sudo deferprof attach {pid}")),
            ..blocked(error.to_string())
        })?;
        let others = module.warning();
        let executable = module.file;
        let exe = executable.path().display().to_string();
        let unusable =
            |error: deferprof_symbols::Error| blocked(format!("{exe} cannot be profiled: {error}"));
        let binary = Binary::parse(executable.bytes()).map_err(unusable)?;
        let inventory = binary.inventory().map_err(unusable)?;
        let mut mechanisms = Mechanisms::new();
        for site in &inventory.sites {
            *mechanisms.entry(site.mechanism.to_string()).or_default() += 1;
        }
        // What a recording without flags asks; of what this binary does not tell it warns itself.
        let mut questions = Questions::new(&binary, &inventory.sites);
        questions.ask_pool(&binary).ok();
        questions.ask_runs(&binary, &inventory.sites).ok();
        let request = questions.request(executable.as_fd(), pid, None, LinkChoice::Auto, None);
        let (probes, emulated) =
            ebpf::probes(&request).map_err(|error| blocked(error.to_string()))?;
        let target = Self {
            pid: pid.as_raw(),
            go_version: binary.go_version().to_owned(),
            arch: binary.architecture().to_string(),
            sites: inventory.sites.len() as u64,
            mechanisms,
            probes: probes as u64,
            emulated: emulated as u64,
            tracer: tracer(pid),
            stopped: process.is_stopped(),
            exe,
        };
        let mut problems: Vec<_> = inventory
            .warnings
            .iter()
            .cloned()
            .chain(others)
            .map(|warning| Problem::warning(warning, None))
            .collect();
        problems.extend(target.problems(links));
        Ok((target, problems))
    }

    fn problems(&self, links: &[Link]) -> Vec<Problem> {
        let pid = self.pid;
        let mut problems = Vec::new();
        if self.sites == 0 {
            problems.push(Problem {
                blocks: true,
                what: "the binary has no defers".to_owned(),
                fix: None,
            });
        }
        if let Some(tracer) = self.tracer {
            let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            problems.push(Problem::warning(
                format!(
                    "process {pid} is traced by process {tracer} ({}): a breakpoint of a debugger \
                     on a probed instruction hides the probe's hits, and the target stops with it.",
                    name.trim()
                ),
                Some(format!("kill {tracer}")),
            ));
        }
        if self.stopped {
            problems.push(Problem::warning(
                crate::target::stopped(pid),
                Some(format!("kill -CONT {pid}")),
            ));
        }
        let working = links.iter().filter(|link| link.works);
        if working.clone().count() == 1
            && working.clone().any(|link| link.kind == "perf_event")
            && self.probes > 100
        {
            problems.push(Problem::warning(
                format!(
                    "with perf events alone {} probes cannot be attached at once: choose defers \
                     with --include and --exclude.",
                    self.probes
                ),
                Some(format!("deferprof attach --include '^main\\.' {pid}")),
            ));
        }
        problems
    }
}

/// The process that traces another. The kernel names the thread of it that does.
fn tracer(pid: Pid) -> Option<i32> {
    let thread = status(pid.as_raw(), "TracerPid:").filter(|thread| *thread != 0)?;
    status(thread, "Tgid:").or(Some(thread))
}

/// A number of /proc/<pid>/status.
fn status(pid: i32, field: &str) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(field))?;
    value.trim().parse().ok()
}
