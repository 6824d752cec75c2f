//! The deferpool in a recording: what to ask the engine, and how its answer enters the profile.

use deferprof_symbols::Site;

use crate::engine::{Counts, PoolCounts, takes_record};
use crate::profile::{Pool, Runtime};

/// The outcomes of one site.
pub(super) fn of_site(counts: &Counts, index: usize, site: &Site) -> Option<Pool> {
    let registered = counts.registered.get(index)?;
    let outcomes = counts.pool.as_ref()?.outcomes(index, *registered)?;
    takes_record(site).then_some(Pool {
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
pub(super) fn doubts(counts: &Counts) -> Vec<String> {
    let Some(pool) = &counts.pool else {
        return Vec::new();
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
