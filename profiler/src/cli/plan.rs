//! What `attach` and `run` do to one binary: choose the probes, arm and disarm them, and make a profile
//! of what they counted.

use std::os::fd::AsFd as _;
use std::time::Instant;

use deferprof_symbols::{Binary, Frame, Inventory, Probe, Site, VirtualAddress};
use nix::unistd::Pid;

use super::args::RecordArgs;
use super::error::UsageError;
use super::pool::{self, PoolPlan};
use super::progress::Progress;
use crate::engine::{
    Calibration, Counts, DEFAULT_STACKS, EngineError, LinkChoice, LinkKind, Request, Session,
    calibrate,
};
use crate::profile::{self, Profile, RawStack, Recording, SiteCount, Target, Window};
use crate::target::Executable;

/// What to probe in one binary.
pub(super) struct Plan<'a> {
    binary: &'a Binary<'a>,
    sites: Vec<Site>,
    probes: Vec<Probe>,
    pool: PoolPlan,
    warnings: Vec<String>,
    stacks: bool,
    link: LinkChoice,
}

/// Probes in place.
pub(super) struct Armed {
    pub(super) session: Session,
    probes: usize,
}

/// What came of a recording.
pub(super) struct Measured {
    counts: Counts,
    link: LinkKind,
    probes: usize,
}

impl<'a> Plan<'a> {
    pub(super) fn new(
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
    pub(super) fn calibrate(&self, progress: &mut Progress) -> anyhow::Result<Calibration> {
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

    pub(super) fn arm(
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

    pub(super) fn profile(
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
            panics: None,
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
                unmatched: None,
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
    /// Takes the probes away, then reads what they counted.
    pub(super) fn disarm(self, progress: &mut Progress) -> anyhow::Result<Measured> {
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
