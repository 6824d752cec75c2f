//! Where heap records came from: probes on the runtime's rare paths.
//!
//! What is not seen here was served by the local pool, so nothing is added to a registration's cost.

use aya_ebpf::{
    helpers::bpf_probe_read_user,
    macros::map,
    maps::{Array, PerCpuArray},
};
use deferprof_ebpf_common::pool::{
    MAX_CALLERS, PoolEvent, PoolOffsets, PoolOutcome, PoolPoint, PoolTotal,
};

use crate::{add_one, hit::Hit, run::site_of, word};

/// By number in the cookie: what the probe stands on.
#[map]
static POOL_POINTS: Array<PoolPoint> = Array::with_max_entries(1, 0);
/// By site and outcome.
#[map]
static POOL: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static POOL_TOTALS: PerCpuArray<u64> = PerCpuArray::with_max_entries(PoolTotal::COUNT, 0);

/// Counts a refill, a miss or a spill, and the first two for the site that is registering; false
/// if there is no such probe.
#[inline(always)]
pub fn seen(hit: &Hit, number: u32) -> bool {
    let Some(point) = POOL_POINTS.get(number) else {
        return false;
    };
    count(hit, point);
    true
}

#[inline(always)]
fn count(hit: &Hit, point: &PoolPoint) {
    let outcome = if point.event == PoolEvent::Spill as u64 {
        total(PoolTotal::Spill);
        return;
    } else if point.event == PoolEvent::Miss as u64 {
        total(PoolTotal::Miss);
        PoolOutcome::Miss
    } else {
        match has_records(hit.g(), &point.local) {
            Some(true) => total(PoolTotal::Refill),
            Some(false) => {
                total(PoolTotal::Empty);
                return;
            }
            None => {
                total(PoolTotal::BadPool);
                return;
            }
        }
        PoolOutcome::Refill
    };
    let bias = hit.instruction().wrapping_sub(point.address);
    match site(point, hit.sp(), bias) {
        Ok(Some(site)) => {
            if let Some(counter) = POOL.get_ptr_mut(site * PoolOutcome::COUNT + outcome as u32) {
                add_one(counter);
            }
        }
        Ok(None) => {} // A record of the runtime's own, or of a site that is not watched.
        Err(_) => total(PoolTotal::BadStack),
    }
}

#[inline(always)]
fn total(which: PoolTotal) {
    if let Some(counter) = POOL_TOTALS.get_ptr_mut(which as u32) {
        add_one(counter);
    }
}

/// Whether the local pool of the goroutine's P is not empty; `None` if that is no pool.
#[inline(always)]
fn has_records(g: u64, offsets: &PoolOffsets) -> Option<bool> {
    let m = word(g.wrapping_add(offsets.m)).ok()?;
    let p = word(m.wrapping_add(offsets.p)).ok()?;
    let slice = p.wrapping_add(offsets.pool);
    // SAFETY: the helper checks the user's address.
    let [pointer, length, capacity] =
        unsafe { bpf_probe_read_user(slice as *const [u64; 3]) }.ok()?;
    // The array stands right behind the slice that starts there.
    let right = pointer == slice.wrapping_add(24) && capacity == offsets.capacity;
    (right && length <= capacity).then_some(length != 0)
}

/// The site whose call of the runtime led here.
#[inline(always)]
fn site(point: &PoolPoint, sp: u64, bias: u64) -> Result<Option<u32>, i32> {
    let mut index = 0;
    while index < MAX_CALLERS {
        let caller = &point.callers[index];
        index += 1;
        if caller.used == 0 {
            break;
        }
        if caller.returns_to != 0
            && word(sp.wrapping_add(caller.via))?.wrapping_sub(bias) != caller.returns_to
        {
            continue;
        }
        let returns_to = word(sp.wrapping_add(caller.site))?.wrapping_sub(bias);
        return Ok(site_of(returns_to));
    }
    Ok(None)
}
