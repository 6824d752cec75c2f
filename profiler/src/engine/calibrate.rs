//! What a hit costs on this machine, and whether hits are counted at all.

use std::{fs::File, num::NonZeroU32, os::fd::AsFd as _, time::Instant};

use deferprof_symbols::Probe;
use nix::unistd::Pid;

use super::{
    Distribution, EngineError, ExitProbe, InstructionCost, LatencyRequest, LinkChoice, LinkKind,
    More, Request, RunRequest, Session, probed_loop::ProbedLoop,
};

/// How often each loop is measured; the median counts, since other threads may interrupt some.
const BATCHES: usize = 15;

/// What one hit of a probe costs the thread that makes it; with stacks, one of 10 frames.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibration {
    /// Nanoseconds for an instruction that the kernel emulates.
    pub emulated_ns: f64,
    /// Nanoseconds for one that it single-steps.
    pub single_stepped_ns: f64,
    /// The kind of link that was measured.
    pub link: LinkKind,
}

/// Measures what a hit costs here, with and without which stacks are taken, on two loops of
/// our own process that are probed for the purpose and run in the calling thread. The loops'
/// own time is measured first, without probes, and subtracted. About 10 ms, and what it takes to
/// attach and detach.
///
/// It is a self-test too: some kernels between 6.6 and 6.9.4 apply the pid filter of uprobe_multi
/// to one thread only.
///
/// # Errors
///
/// As [`Session::attach`], and [`EngineError::SelfTest`] if the hits counted are not those made.
pub fn calibrate(link: LinkChoice, stacks: Option<NonZeroU32>) -> Result<Calibration, EngineError> {
    let own = |error| EngineError::system("find deferprof's own executable", error);
    let executable = File::open("/proc/self/exe").map_err(own)?;
    // As many rounds as take about 100 µs and 500 µs with probes.
    let loops = [(ProbedLoop::Emulated, 100), (ProbedLoop::SingleStepped, 40)];
    let mut probes = Vec::new();
    for (site, (probed, _)) in (0..).zip(loops) {
        probes.push(Probe {
            offset: probed.offset().map_err(own)?,
            site,
        });
    }

    let bare = loops.map(|(probed, _)| bare_ns(probed));
    let session = Session::attach(&Request {
        executable: executable.as_fd(),
        pid: Pid::this(),
        probes: &probes,
        sites: loops.len() as u32,
        sites_cost: &[],
        stacks,
        link,
        more: More::default(),
    })?;
    let hit = loops.map(|(probed, rounds)| median_ns(probed, rounds));
    let link = session.link();
    let counts = session.detach()?;

    for ((_, rounds), counted) in loops.into_iter().zip(counts.registered) {
        let expected = rounds * BATCHES as u64;
        if counted != expected {
            return Err(EngineError::SelfTest { expected, counted });
        }
    }
    let cost = |index: usize| (hit[index] - bare[index]).max(0.0);
    let [emulated_ns, single_stepped_ns] = [0, 1].map(cost);
    Ok(Calibration {
        emulated_ns,
        single_stepped_ns,
        link,
    })
}

/// What hits cost where times are measured, as those times show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taxes {
    /// Nanoseconds from the clock of one hit to that of another right behind it, if the kernel
    /// emulates the first one's instruction.
    pub emulated_ns: u64,
    /// The same if it single-steps it.
    pub single_stepped_ns: u64,
    /// Times that begin at an emulated instruction cannot be told from what hits cost if they are
    /// shorter: 95 of 100 of these differ less from the median.
    pub emulated_floor_ns: u64,
    /// The same for times that begin at a single-stepped one.
    pub single_stepped_floor_ns: u64,
}

/// Measures what is to be subtracted from times: how much longer a time comes out than it is, of one that
/// is known, with all that real ones need.
///
/// # Errors
///
/// As [`calibrate`].
pub fn calibrate_latency(
    link: LinkChoice,
    stacks: Option<NonZeroU32>,
) -> Result<Taxes, EngineError> {
    let own = |error| EngineError::system("find deferprof's own executable", error);
    let executable = File::open("/proc/self/exe").map_err(own)?;
    let loops = [
        (ProbedLoop::Emulated, InstructionCost::Emulated, 100),
        (
            ProbedLoop::SingleStepped,
            InstructionCost::SingleStepped,
            40,
        ),
    ];
    let (mut probes, mut exits) = (Vec::new(), Vec::new());
    for (site, (probed, cost, _)) in (0..).zip(loops) {
        let offset = probed.offset().map_err(own)?;
        probes.push(Probe { offset, site });
        exits.push(ExitProbe {
            start: Some((
                probed.offset_behind().map_err(own)?,
                InstructionCost::Emulated,
            )),
            end: Some((offset, cost)),
            site,
        });
    }
    let bare = loops.map(|(probed, ..)| bare_ns(probed) as u64);
    let session = Session::attach(&Request {
        executable: executable.as_fd(),
        pid: Pid::this(),
        probes: &probes,
        sites: loops.len() as u32,
        sites_cost: &loops.map(|(_, cost, _)| cost),
        stacks,
        link,
        more: More {
            runs: Some(RunRequest {
                probes: None,
                exits: &exits,
                entries: &[],
            }),
            latency: Some(LatencyRequest {
                takes_record: &[],
                taxes: Taxes::NONE,
            }),
            ..More::default()
        },
    })?;
    for (probed, _, rounds) in loops {
        for _ in 0..BATCHES {
            probed.run(rounds);
        }
    }
    let counts = session.detach()?;
    let expected: u64 = loops
        .iter()
        .map(|(.., rounds)| rounds * BATCHES as u64)
        .sum();
    let latency = counts.latency.unwrap_or_default();
    let counted: u64 = latency.sites.iter().map(|times| times.held.count()).sum();
    let [emulated, stepped] = &latency.sites[..] else {
        return Err(EngineError::SelfTest { expected, counted });
    };
    if counted != expected {
        return Err(EngineError::SelfTest { expected, counted });
    }
    let quantile = |times: &Distribution, share| times.quantile(share).unwrap_or(0);
    let spread = |times: &Distribution| quantile(times, 0.95) - quantile(times, 0.5);
    Ok(Taxes {
        emulated_ns: quantile(&emulated.held, 0.5).saturating_sub(bare[0]),
        single_stepped_ns: quantile(&stepped.held, 0.5).saturating_sub(bare[1]),
        emulated_floor_ns: spread(&emulated.held),
        single_stepped_floor_ns: spread(&stepped.held),
    })
}

impl Taxes {
    /// Nothing.
    pub const NONE: Self = Self {
        emulated_ns: 0,
        single_stepped_ns: 0,
        emulated_floor_ns: 0,
        single_stepped_floor_ns: 0,
    };

    /// The floor of times that begin at an instruction.
    pub fn floor_ns(&self, cost: InstructionCost) -> u64 {
        match cost {
            InstructionCost::Emulated => self.emulated_floor_ns,
            InstructionCost::SingleStepped => self.single_stepped_floor_ns,
        }
    }
}

/// Nanoseconds a round without probes: of the fastest batch, since whatever interrupts makes it longer.
fn bare_ns(probed: ProbedLoop) -> f64 {
    batches_ns(probed, 100)[0]
}

/// Nanoseconds a round, the median of some batches of `rounds`.
fn median_ns(probed: ProbedLoop, rounds: u64) -> f64 {
    batches_ns(probed, rounds)[BATCHES / 2]
}

/// Nanoseconds a round of some batches, the fastest first.
fn batches_ns(probed: ProbedLoop, rounds: u64) -> [f64; BATCHES] {
    let mut batches = [0.0; BATCHES];
    for batch in &mut batches {
        let start = Instant::now();
        probed.run(rounds);
        *batch = start.elapsed().as_nanos() as f64 / rounds as f64;
    }
    batches.sort_by(f64::total_cmp);
    batches
}
