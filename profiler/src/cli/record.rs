//! `attach` and `run`: scan, arm the probes, wait, disarm, report.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use deferprof_symbols::{Binary, Frame, Inventory, Probe, Site, VirtualAddress};
use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::args::{AttachArgs, RecordArgs, RunArgs};
use super::error::UsageError;
use super::output::Outputs;
use super::pool::{self, PoolPlan};
use super::progress::Progress;
use crate::engine::{
    Calibration, Counts, DEFAULT_STACKS, EngineError, LinkChoice, LinkKind, Request, Session,
    calibrate,
};
use crate::profile::{self, Profile, RawStack, Recording, SiteCount, Target, Window};
use crate::target::{Executable, PausedChild, Process, Signals, TargetError, Wake, wait};

/// How often the progress line is renewed.
const TICK: Duration = Duration::from_millis(500);

/// `deferprof attach`.
pub fn attach(args: &AttachArgs) -> anyhow::Result<()> {
    let signals = Signals::take()?;
    let outputs = Outputs::open(&args.record.show)?;
    let mut progress = Progress::new(args.record.verbose);
    let process = Process::open(Pid::from_raw(args.pid))?;
    let executable = process.executable()?;
    let binary = parse(&executable)?;
    let plan = Plan::new(&binary, &args.record, &mut progress)?;
    if process.is_stopped() {
        progress.say(&crate::target::stopped(args.pid));
    }
    let calibration = plan.calibrate(&mut progress)?;
    let armed = plan.arm(&executable, process.pid(), &mut progress)?;
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
    let profile = plan.profile(measured, calibration, started.window(observed), |binary| {
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
    let calibration = plan.calibrate(&mut progress)?;
    let child = PausedChild::spawn(&path, &args.program, signals.mask_before())?;
    let process = Process::open(child.pid())?;
    let armed = plan.arm(&executable, process.pid(), &mut progress)?;
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
    let profile = plan.profile(measured, calibration, started.window(observed), |binary| {
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

/// What to probe in one binary.
struct Plan<'a> {
    binary: &'a Binary<'a>,
    sites: Vec<Site>,
    probes: Vec<Probe>,
    pool: PoolPlan,
    warnings: Vec<String>,
    stacks: bool,
    link: LinkChoice,
}

/// Probes in place.
struct Armed {
    session: Session,
    probes: usize,
}

/// What came of a recording.
struct Measured {
    counts: Counts,
    link: LinkKind,
    probes: usize,
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

impl<'a> Plan<'a> {
    fn new(
        binary: &'a Binary<'a>,
        args: &RecordArgs,
        progress: &mut Progress,
    ) -> anyhow::Result<Self> {
        let start = Instant::now();
        let Inventory {
            sites,
            mut warnings,
            ..
        } = binary.inventory()?;
        progress.detail(&format!(
            "found {} sites in {:.1?}",
            sites.len(),
            start.elapsed()
        ));
        let all = sites.len();
        let wanted = |site: &Site| {
            args.include
                .as_ref()
                .is_none_or(|regex| regex.is_match(&site.function))
                && !args
                    .exclude
                    .as_ref()
                    .is_some_and(|regex| regex.is_match(&site.function))
        };
        let sites: Vec<Site> = sites.into_iter().filter(wanted).collect();
        if sites.is_empty() {
            let message = match all {
                0 => "the binary has no defers".to_owned(),
                _ => {
                    format!("none of the binary's {all} defers is left by --include and --exclude")
                }
            };
            return Err(UsageError(message).into());
        }
        let (pool, without) = PoolPlan::new(binary, &sites);
        warnings.extend(without);
        for warning in &warnings {
            progress.say(&format!("warning: {warning}"));
        }
        let probes = (0u32..)
            .zip(&sites)
            .map(|(site, s)| Probe {
                offset: s.registration.offset,
                site,
            })
            .collect();
        let (stacks, link) = (args.stacks, args.link.into());
        Ok(Self {
            binary,
            sites,
            probes,
            pool,
            warnings,
            stacks,
            link,
        })
    }

    fn stacks(&self) -> Option<std::num::NonZeroU32> {
        self.stacks.then_some(DEFAULT_STACKS)
    }

    /// What a hit costs here. Also the first to find out that probes cannot be used.
    fn calibrate(&self, progress: &mut Progress) -> anyhow::Result<Calibration> {
        let start = Instant::now();
        let calibration = calibrate(self.link, self.stacks())?;
        progress.detail(&format!(
            "a hit costs {:.0} ns emulated, {:.0} ns single-stepped (measured in {:.1?})",
            calibration.emulated_ns,
            calibration.single_stepped_ns,
            start.elapsed()
        ));
        Ok(calibration)
    }

    fn arm(
        &self,
        executable: &Executable,
        pid: Pid,
        progress: &mut Progress,
    ) -> anyhow::Result<Armed> {
        let start = Instant::now();
        let request = Request {
            executable: executable.as_fd(),
            pid,
            probes: &self.probes,
            sites: u32::try_from(self.sites.len()).unwrap_or(u32::MAX),
            stacks: self.stacks(),
            link: self.link,
        };
        let (session, probes) = self.attach(&request, progress)?;
        progress.detail(&format!(
            "attached {probes} probes in {:.1} ms ({})",
            start.elapsed().as_secs_f64() * 1e3,
            session.link().as_str()
        ));
        Ok(Armed { session, probes })
    }

    /// Attaches, also to the runtime's rare paths if that works here; says so if not.
    fn attach(
        &self,
        request: &Request<'_>,
        progress: &mut Progress,
    ) -> anyhow::Result<(Session, usize)> {
        let own = self.probes.len();
        match Session::attach_with_pool(request, self.pool.request().as_ref()) {
            Ok(session) => Ok((session, own + self.pool.probes())),
            Err(EngineError::Rejected { .. } | EngineError::InvalidProbe { .. })
                if self.pool.probes() > 0 =>
            {
                let session = Session::attach(request)?;
                progress.say("warning: this kernel does not take the probes of the deferpool");
                Ok((session, own))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn profile(
        &self,
        measured: Measured,
        calibration: Calibration,
        window: Window,
        target: impl FnOnce(&Binary<'_>) -> Target,
    ) -> Profile {
        let Measured {
            counts,
            link,
            probes,
        } = measured;
        let mut warnings = self.warnings.clone();
        warnings.extend(losses(&counts));
        warnings.extend(pool::doubts(&counts, &self.pool));
        let stacks = self.stacks.then(|| self.stacks_of(&counts));
        // Hits of other processes are paid for by them.
        let cost: f64 = self
            .sites
            .iter()
            .zip(&counts.registered)
            .map(|(site, registered)| {
                let each = match site.registration.kind.is_emulated() {
                    true => calibration.emulated_ns,
                    false => calibration.single_stepped_ns,
                };
                each * *registered as f64
            })
            .sum();
        let registered: u64 = counts.registered.iter().sum();
        // The rest are on the runtime's rare paths, which are emulated as well.
        let rare = counts.hits.saturating_sub(registered);
        let cost = cost + calibration.emulated_ns * rare as f64;
        let recording = Recording {
            target: target(self.binary),
            engine: profile::Engine::Ebpf,
            link: Some(match link {
                LinkKind::PerfEvent => profile::LinkKind::PerfEvent,
                LinkKind::TraceEvent => profile::LinkKind::TraceEvent,
                _ => profile::LinkKind::UprobeMulti,
            }),
            window,
            sites: self
                .sites
                .iter()
                .zip(&counts.registered)
                .enumerate()
                .map(|(index, (site, registered))| SiteCount {
                    pool: pool::of_site(&counts, index, site),
                    ..SiteCount::new(site, Some(*registered))
                })
                .collect(),
            runtime: pool::of_process(&counts),
            stacks,
            overhead: Some(profile::Overhead {
                probes: probes as u64,
                hits: counts.hits,
                ns_per_hit: (counts.hits > 0).then(|| cost / counts.hits as f64),
                target_share: (window.observed_ns > 0).then(|| cost / window.observed_ns as f64),
            }),
            loss: Some(profile::Loss {
                dropped: Some(counts.loss.hits()),
                evicted: Some(0),
            }),
            warnings,
        };
        Profile::new(recording, |address| match address {
            // The byte before, as for every return address.
            VirtualAddress(a) if a == TRUNCATED.0 - 1 => vec![truncated_frame()],
            _ => self.binary.frames(address),
        })
    }

    /// The stacks, as addresses as linked. The leaf of each is the probed instruction, whose linked
    /// address is known: the difference is the load bias. Shown is the statement instead, since the
    /// probed instruction may belong to a call that was inlined behind it.
    fn stacks_of(&self, counts: &Counts) -> Vec<RawStack> {
        counts
            .stacks
            .iter()
            .filter_map(|stack| {
                let site = self.sites.get(stack.site as usize)?;
                let (leaf, callers) = stack.frames.split_first()?;
                let bias = leaf.wrapping_sub(site.registration.address.0);
                let linked = |address: &u64| VirtualAddress(address.wrapping_sub(bias));
                Some(RawStack {
                    site: stack.site as usize,
                    addresses: [site.pc]
                        .into_iter()
                        .chain(callers.iter().map(linked))
                        .chain(stack.truncated.then_some(TRUNCATED))
                        .collect(),
                    registered: stack.registered,
                })
            })
            .collect()
    }
}

/// Stands for the callers of a stack that was deeper than the kernel side walks.
const TRUNCATED: VirtualAddress = VirtualAddress(u64::MAX);

fn truncated_frame() -> Frame {
    Frame {
        function: "[truncated]".to_owned(),
        file: String::new(),
        line: 0,
        start_line: 0,
    }
}

/// What was lost, a sentence each.
fn losses(counts: &Counts) -> Vec<String> {
    let mut sentences = Vec::new();
    let mut lost = |count: u64, what: &str| {
        if count > 0 {
            sentences.push(format!("{count} {what}"));
        }
    };
    let loss = &counts.loss;
    lost(
        loss.missed,
        "hits were not reported by the kernel: counts are too low by that",
    );
    lost(
        loss.unknown_site,
        "hits named no site: counts are too low by that",
    );
    lost(
        loss.stacks_full,
        "call stacks had no room: they are in the counts only",
    );
    lost(
        loss.stack_busy,
        "call stacks were given up: they are in the counts only",
    );
    let truncated: u64 = counts
        .stacks
        .iter()
        .filter(|s| s.truncated)
        .map(|s| s.registered)
        .sum();
    lost(
        truncated,
        "call stacks were deeper than the kernel walks: their outermost callers miss",
    );
    sentences
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
                    let registered = self.session.read()?.registered.iter().sum();
                    progress.update(started.elapsed(), limit, registered);
                }
                _ => {}
            }
        }
    }

    /// Takes the probes away, then reads what they counted.
    fn disarm(self, progress: &mut Progress) -> anyhow::Result<Measured> {
        progress.clear();
        let link = self.session.link();
        let start = Instant::now();
        let counts = self.session.detach()?;
        progress.detail(&format!(
            "detached in {:.1} ms",
            start.elapsed().as_secs_f64() * 1e3
        ));
        Ok(Measured {
            counts,
            link,
            probes: self.probes,
        })
    }
}
