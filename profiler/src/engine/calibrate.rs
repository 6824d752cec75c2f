//! What a hit costs on this machine, and whether hits are counted at all.

use std::{fs::File, num::NonZeroU32, os::fd::AsFd as _, time::Instant};

use deferprof_symbols::Probe;
use nix::unistd::Pid;

use super::{
    EngineError, LinkChoice, LinkKind, More, Request, Session, probed_loop::ProbedLoop,
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

    let bare = loops.map(|(probed, _)| median_ns(probed, 10_000));
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
    let [emulated_ns, single_stepped_ns] = [0, 1].map(|index: usize| hit[index] - bare[index]);
    Ok(Calibration {
        emulated_ns,
        single_stepped_ns,
        link,
    })
}

/// Nanoseconds a round, the median of some batches of `rounds`.
fn median_ns(probed: ProbedLoop, rounds: u64) -> f64 {
    let mut batches = [0.0; BATCHES];
    for batch in &mut batches {
        let start = Instant::now();
        probed.run(rounds);
        *batch = start.elapsed().as_nanos() as f64 / rounds as f64;
    }
    batches.sort_by(f64::total_cmp);
    batches[BATCHES / 2]
}
