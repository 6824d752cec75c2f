//! What `attach` and `run` do to one binary: choose the probes, arm and disarm them, and make a profile
//! of what they counted.

use std::os::fd::AsFd as _;
use std::time::Instant;

use deferprof_symbols::{Binary, Frame, Inventory, Site, VirtualAddress};
use nix::unistd::Pid;

use super::args::RecordArgs;
use super::error::UsageError;
use super::pool;
use super::progress::Progress;
use super::runs;
use crate::engine::{
    Counts, DEFAULT_STACKS, EngineError, LinkChoice, LinkKind, More, Questions, Request, Session,
    Taxes, calibrate, calibrate_latency,
};
use crate::profile::{self, Profile, RawStack, Recording, SiteCount, Target, Window};
use crate::target::Executable;

/// What to probe in one binary.
pub(super) struct Plan<'a> {
    binary: &'a Binary<'a>,
    sites: Vec<Site>,
    questions: Questions,
    warnings: Vec<String>,
    /// Whether all of the binary's sites are watched.
    whole: bool,
    stacks: bool,
    latency: bool,
    link: LinkChoice,
}

/// What a hit costs here.
#[derive(Clone, Copy)]
pub(super) struct Costs {
    emulated_ns: f64,
    single_stepped_ns: f64,
    /// If times are measured.
    taxes: Option<Taxes>,
}

/// Probes in place.
pub(super) struct Armed {
    pub(super) session: Session,
    refused: Option<String>,
}

/// What came of a recording.
pub(super) struct Measured {
    counts: Counts,
    link: LinkKind,
    probes: usize,
    refused: Option<String>,
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
        let mut questions = Questions::new(binary, &sites);
        if !args.no_pool {
            warnings.extend(questions.ask_pool(binary).err());
        }
        if !args.no_ran {
            warnings.extend(questions.ask_runs(binary, &sites).err());
        }
        let latency = args.latency && questions.asks_runs();
        if args.latency && !latency {
            warnings.push("times are not measured, since deferred calls cannot be followed".into());
        }
        for warning in &warnings {
            progress.say(&format!("warning: {warning}"));
        }
        let (stacks, link) = (args.stacks, args.link.into());
        Ok(Self {
            binary,
            whole: sites.len() == all,
            sites,
            questions,
            warnings,
            stacks,
            latency,
            link,
        })
    }

    fn stacks(&self) -> Option<std::num::NonZeroU32> {
        self.stacks.then_some(DEFAULT_STACKS)
    }

    /// What a hit costs here. Also the first to find out that probes cannot be used.
    pub(super) fn calibrate(&self, progress: &mut Progress) -> anyhow::Result<Costs> {
        let start = Instant::now();
        let costs = if self.latency {
            let taxes = calibrate_latency(self.link, self.stacks())?;
            Costs {
                emulated_ns: taxes.emulated_ns as f64,
                single_stepped_ns: taxes.single_stepped_ns as f64,
                taxes: Some(taxes),
            }
        } else {
            let hit = calibrate(self.link, self.stacks())?;
            Costs {
                emulated_ns: hit.emulated_ns,
                single_stepped_ns: hit.single_stepped_ns,
                taxes: None,
            }
        };
        progress.detail(&format!(
            "a hit costs {:.0} ns emulated, {:.0} ns single-stepped (measured in {:.1?})",
            costs.emulated_ns,
            costs.single_stepped_ns,
            start.elapsed()
        ));
        if let Some(taxes) = costs.taxes {
            progress.detail(&format!(
                "times below {} ns ({} ns after a single-stepped hit) cannot be told from that",
                taxes.emulated_floor_ns, taxes.single_stepped_floor_ns
            ));
        }
        Ok(costs)
    }

    pub(super) fn arm(
        &self,
        executable: &Executable,
        pid: Pid,
        costs: &Costs,
        progress: &mut Progress,
    ) -> anyhow::Result<Armed> {
        let start = Instant::now();
        let request = self.questions.request(
            executable.as_fd(),
            pid,
            self.stacks(),
            self.link,
            costs.taxes,
        );
        let armed = self.attach(&request, progress)?;
        progress.detail(&format!(
            "attached {} probes in {:.1} ms ({})",
            armed.session.probes(),
            start.elapsed().as_secs_f64() * 1e3,
            armed.session.link().as_str()
        ));
        Ok(armed)
    }

    /// Attaches all probes, or if that does not work here those of the sites alone; says so.
    fn attach(&self, request: &Request<'_>, progress: &mut Progress) -> anyhow::Result<Armed> {
        match Session::attach(request) {
            Ok(session) => Ok(Armed {
                session,
                refused: None,
            }),
            Err(
                why @ (EngineError::Rejected { .. }
                | EngineError::InvalidProbe { .. }
                | EngineError::NotSupported { .. }),
            ) if self.questions.asks_more() => {
                let session = Session::attach(&Request {
                    more: More::default(),
                    ..*request
                })?;
                let refused = format!("only registrations are counted here: {why}");
                progress.say(&format!("warning: {refused}"));
                Ok(Armed {
                    session,
                    refused: Some(refused),
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn profile(
        &self,
        measured: Measured,
        costs: Costs,
        window: Window,
        from_start: bool,
        target: impl FnOnce(&Binary<'_>) -> Target,
    ) -> Profile {
        let Measured {
            counts,
            link,
            probes,
            refused,
        } = measured;
        let mut warnings = self.warnings.clone();
        warnings.extend(refused);
        warnings.extend(losses(&counts));
        warnings.extend(pool::doubts(&counts));
        warnings.extend(runs::doubts(&counts, &self.questions, self.sites.len()));
        // Otherwise they are those of the sites that were left out.
        warnings.extend(runs::unknown(&counts).filter(|_| self.whole));
        let stacks = self.stacks.then(|| self.stacks_of(&counts));
        // Hits of other processes are paid for by them.
        let cost = costs.single_stepped_ns * counts.single_stepped as f64
            + costs.emulated_ns * (counts.hits - counts.single_stepped) as f64;
        let taxes = costs.taxes.unwrap_or(Taxes::NONE);
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
                .map(|(index, (site, registered))| {
                    let ran = runs::of_site(&counts, &self.questions, index);
                    let left =
                        ran.and_then(|r| registered.checked_sub(r.r#return + r.panic + r.goexit));
                    SiteCount {
                        pool: pool::of_site(&counts, index, site),
                        ran,
                        pending: left.filter(|_| from_start),
                        latency: runs::latency(&counts, index, site, taxes),
                        ..SiteCount::new(site, Some(*registered))
                    }
                })
                .collect(),
            runtime: pool::of_process(&counts),
            panics: runs::panics(&counts),
            stacks,
            overhead: Some(profile::Overhead {
                probes: probes as u64,
                hits: counts.hits,
                ns_per_hit: (counts.hits > 0).then(|| cost / counts.hits as f64),
                target_share: (window.observed_ns > 0).then(|| cost / window.observed_ns as f64),
            }),
            loss: Some(profile::Loss {
                dropped: Some(counts.loss.hits()),
                evicted: Some(
                    counts
                        .latency
                        .as_ref()
                        .map_or(0, |l| l.evicted + l.in_flight_full + l.buckets_full),
                ),
                unmatched: runs::unmatched(&counts),
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
        let (link, probes) = (self.session.link(), self.session.probes());
        let start = Instant::now();
        let counts = self.session.detach()?;
        progress.detail(&format!(
            "detached in {:.1} ms",
            start.elapsed().as_secs_f64() * 1e3
        ));
        Ok(Measured {
            counts,
            link,
            probes,
            refused: self.refused,
        })
    }
}
