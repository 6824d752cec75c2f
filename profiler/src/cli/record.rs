//! `attach` and `run`: scan, arm the probes, wait, disarm, report.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use deferprof_symbols::Binary;
use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::args::{AttachArgs, RunArgs};
use super::error::UsageError;
use super::output::Outputs;
use super::plan::{Armed, Plan};
use super::progress::Progress;
use crate::profile::{Target, Window};
use crate::target::{Executable, GoModule, PausedChild, Process, Signals, TargetError, Wake, wait};

/// How often the progress line is renewed.
const TICK: Duration = Duration::from_millis(500);

/// `deferprof attach`.
pub fn attach(args: &AttachArgs) -> anyhow::Result<()> {
    let signals = Signals::take()?;
    let outputs = Outputs::open(&args.record.show)?;
    let mut progress = Progress::new(args.record.verbose);
    let process = Process::open(Pid::from_raw(args.pid))?;
    let module = GoModule::of(&process, args.module.as_deref())?;
    if let Some(warning) = module.warning() {
        progress.say(&format!("warning: {warning}"));
    }
    let executable = module.file;
    let binary = parse(&executable)?;
    let plan = Plan::new(&binary, &args.record, &mut progress)?;
    if process.is_stopped() {
        progress.say(&crate::target::stopped(args.pid));
    }
    let costs = plan.calibrate(&mut progress)?;
    let armed = plan.arm(&executable, process.pid(), &costs, &mut progress)?;
    let started = Started::now();
    let hold = |progress: &mut Progress| {
        armed.hold(
            &process,
            &signals,
            &started,
            args.record.duration,
            progress,
            |wake| matches!(wake, Wake::Signal { .. }).then_some(()),
        )
    };
    let held = hold(&mut progress);
    let observed = started.elapsed();
    // What the target is called is asked for while it may still be there.
    let arguments = process.arguments();
    let measured = armed.disarm(&mut progress)?;
    held?;
    let profile = plan.profile(measured, costs, started.window(observed), false, |binary| {
        Target {
            pid: args.pid.unsigned_abs(),
            exe: executable.path().display().to_string(),
            args: arguments,
            go_version: binary.go_version().to_owned(),
            arch: binary.architecture().to_string(),
            build_id: binary.build_id(),
        }
    });
    outputs.write(&profile)
}

/// `deferprof run`; the exit status is the program's.
pub fn run(args: &RunArgs) -> anyhow::Result<u8> {
    let signals = Signals::take()?;
    let outputs = Outputs::open(&args.record.show)?;
    let mut progress = Progress::new(args.record.verbose);
    let [name, ..] = args.program.as_slice() else {
        return Err(UsageError("give the program to run behind --".to_owned()).into());
    };
    let path = PausedChild::find(name)?;
    let executable = Executable::open(&path)?;
    if executable.bytes().starts_with(b"#!") {
        return Err(TargetError::Script(path).into());
    }
    let binary = parse(&executable)?;
    let plan = Plan::new(&binary, &args.record, &mut progress)?;
    let costs = plan.calibrate(&mut progress)?;
    let child = PausedChild::spawn(&path, &args.program, signals.mask_before())?;
    let process = Process::open(child.pid())?;
    let armed = plan.arm(&executable, process.pid(), &costs, &mut progress)?;
    let started = Started::now();
    let pid = child.release()?;
    let mut signalled = false;
    let held = armed.hold(
        &process,
        &signals,
        &started,
        args.record.duration,
        &mut progress,
        |wake| {
            let Wake::Signal { signal, by_process } = wake else {
                return None;
            };
            // The terminal sends its signals to the program as well; others only we have seen. The
            // program decides; whoever asks twice wants an end of the recording at least.
            if by_process || signal == Signal::SIGTERM {
                kill(pid, signal).ok();
            }
            std::mem::replace(&mut signalled, true).then_some(())
        },
    );
    let observed = started.elapsed();
    let measured = armed.disarm(&mut progress)?;
    let ended = held?;
    if ended == Held::TimeOver {
        progress.detail("the time is over; waiting for the program to end");
    }
    let profile = plan.profile(measured, costs, started.window(observed), true, |binary| {
        Target {
            pid: pid.as_raw().unsigned_abs(),
            exe: executable.path().display().to_string(),
            args: args
                .program
                .iter()
                .map(|a| a.to_string_lossy().into_owned())
                .collect(),
            go_version: binary.go_version().to_owned(),
            arch: binary.architecture().to_string(),
            build_id: binary.build_id(),
        }
    });
    let written = outputs.write(&profile);
    // A recording that stopped before the program does not stop the program.
    let status = match ended {
        Held::Stopped => 128 + Signal::SIGINT as u8,
        Held::Ended | Held::TimeOver => forward_until_exit(pid, &process, &signals)?,
    };
    written.map(|()| status)
}

/// Waits for the program, passing signals on, and gives its exit status.
fn forward_until_exit(pid: Pid, process: &Process, signals: &Signals) -> anyhow::Result<u8> {
    loop {
        match wait(Some(process.as_fd()), signals, Duration::MAX)? {
            Wake::Ended => return Ok(PausedChild::exit_status(pid)),
            Wake::Signal { signal, by_process } if by_process || signal == Signal::SIGTERM => {
                kill(pid, signal).ok();
            }
            Wake::Signal { .. } | Wake::Timeout => {}
        }
    }
}

fn parse(executable: &Executable) -> anyhow::Result<Binary<'_>> {
    Binary::parse(executable.bytes())
        .with_context(|| format!("{} cannot be profiled", executable.path().display()))
}

/// How a recording ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// The target ended.
    Ended,
    /// `--duration` is over.
    TimeOver,
    /// We were told to stop.
    Stopped,
}

/// When a recording started, on both clocks.
struct Started {
    instant: Instant,
    timestamp: Timestamp,
}

impl Started {
    fn now() -> Self {
        Self {
            instant: Instant::now(),
            timestamp: Timestamp::now(),
        }
    }

    fn elapsed(&self) -> Duration {
        self.instant.elapsed()
    }

    fn window(&self, observed: Duration) -> Window {
        let ns = u64::try_from(observed.as_nanos()).unwrap_or(u64::MAX);
        Window {
            start: self.timestamp,
            duration_ns: ns,
            observed_ns: ns,
        }
    }
}

impl Armed {
    /// Waits while the target runs. `stop` says whether a wake ends the recording.
    fn hold(
        &self,
        process: &Process,
        signals: &Signals,
        started: &Started,
        limit: Option<Duration>,
        progress: &mut Progress,
        mut stop: impl FnMut(Wake) -> Option<()>,
    ) -> anyhow::Result<Held> {
        loop {
            let left = limit.map(|limit| limit.saturating_sub(started.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Held::TimeOver);
            }
            let tick = if progress.is_live() {
                TICK
            } else {
                Duration::MAX
            };
            let timeout = left.map_or(tick, |left| left.min(tick));
            match wait(Some(process.as_fd()), signals, timeout)? {
                Wake::Ended => return Ok(Held::Ended),
                wake if stop(wake).is_some() => return Ok(Held::Stopped),
                Wake::Timeout if progress.is_live() => {
                    let registered = self.session.registered()?;
                    progress.update(started.elapsed(), limit, registered);
                }
                _ => {}
            }
        }
    }
}
