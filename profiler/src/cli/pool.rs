//! The deferpool in a recording: what to ask the engine, and how its answer enters the profile.

use deferprof_symbols::{Architecture, Binary, Mechanism, PoolProbes, Site, VirtualAddress};

use crate::engine::{Counts, PoolCounts, PoolRequest};
use crate::profile::{Pool, Runtime};

/// What a recording asks about the deferpool; nothing where the binary does not tell.
pub(super) struct PoolPlan {
    probes: Option<PoolProbes>,
    returns: Vec<(VirtualAddress, u32)>,
}

impl PoolPlan {
    /// The plan for the sites of a recording, and why there is none if so.
    pub(super) fn new(binary: &Binary<'_>, sites: &[Site]) -> (Self, Option<String>) {
        let call = match binary.architecture() {
            Architecture::Amd64 => 5,
            Architecture::Arm64 => 4,
        };
        let returns = (0u32..)
            .zip(sites)
            .filter(|(_, site)| takes_records(site))
            .filter_map(|(index, site)| Some((VirtualAddress(site.pc.0.checked_add(call)?), index)))
            .collect();
        let (probes, warning) = match binary.pool_probes() {
            Ok(probes) => (Some(probes), None),
            Err(why) => (None, Some(format!("pool outcomes are not measured: {why}"))),
        };
        (Self { probes, returns }, warning)
    }

    /// The question to the engine.
    pub(super) fn request(&self) -> Option<PoolRequest<'_>> {
        Some(PoolRequest {
            probes: self.probes.as_ref()?,
            returns: &self.returns,
        })
    }

    /// How many probes it takes.
    pub(super) fn probes(&self) -> usize {
        self.probes.as_ref().map_or(0, |pool| pool.probes.len())
    }
}

/// Whether the site's records come from the deferpool.
fn takes_records(site: &Site) -> bool {
    matches!(site.mechanism, Mechanism::Heap | Mechanism::RangeFunc)
}

/// The outcomes of one site.
pub(super) fn of_site(counts: &Counts, index: usize, site: &Site) -> Option<Pool> {
    let registered = counts.registered.get(index)?;
    let outcomes = counts.pool.as_ref()?.outcomes(index, *registered)?;
    takes_records(site).then_some(Pool {
        hit: outcomes.hit,
        refill: outcomes.refill,
        miss: outcomes.miss,
    })
}

/// The deferpool of the whole process.
pub(super) fn of_process(counts: &Counts) -> Option<Runtime> {
    let pool = counts.pool.as_ref()?;
    pool.totals_are_certain().then_some(Runtime {
        spill: pool.all_spills,
        refill: pool.all_refills,
        miss: pool.all_misses,
    })
}

/// What is not certain, a sentence each.
pub(super) fn doubts(counts: &Counts, plan: &PoolPlan) -> Vec<String> {
    let Some(pool) = &counts.pool else {
        let refused =
            "pool outcomes are not measured: the kernel does not take the probes for them";
        return Vec::from_iter(plan.probes.as_ref().map(|_| refused.to_owned()));
    };
    let PoolCounts {
        bad_pool,
        bad_stack,
        missed,
        ..
    } = pool;
    let mut sentences = Vec::new();
    if !pool.totals_are_certain() {
        sentences.push(format!(
            "pool outcomes are left out: {bad_pool} refills could not be read, {missed} were not \
             reported by the kernel"
        ));
    } else if *bad_stack > 0 {
        sentences.push(format!(
            "the sites' pool outcomes are left out: {bad_stack} stacks could not be read"
        ));
    }
    sentences
}
