//! Where heap records came from: probes on the runtime's rare paths.
//!
//! What is not seen here was served by the local pool, so nothing is added to a registration's cost.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_attach_cookie, bpf_probe_read_user},
    macros::{map, uprobe},
    maps::{Array, HashMap, PerCpuArray},
    programs::ProbeContext,
};
use deferprof_ebpf_common::{
    Event, Role,
    pool::{MAX_CALLERS, PoolEvent, PoolOffsets, PoolOutcome, PoolPoint, PoolTotal},
};

use crate::{add_one, happened, is_counting};

/// By number in the cookie: what the probe stands on.
#[map]
static POOL_POINTS: Array<PoolPoint> = Array::with_max_entries(1, 0);
/// By return address as linked: the site that calls the runtime there.
#[map]
static POOL_SITES: HashMap<u64, u32> = HashMap::with_max_entries(1, 0);
/// By site and outcome.
#[map]
static POOL: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static POOL_TOTALS: PerCpuArray<u64> = PerCpuArray::with_max_entries(PoolTotal::COUNT, 0);

/// Where `struct pt_regs` (`user_pt_regs` on arm64) has the goroutine (R14, X28), the instruction
/// and the stack pointer, in words.
#[cfg(bpf_target_arch = "x86_64")]
const REGISTERS: (usize, usize, usize) = (1, 16, 19);
#[cfg(bpf_target_arch = "aarch64")]
const REGISTERS: (usize, usize, usize) = (28, 32, 31);

/// Counts a refill, a miss or a spill, and the first two for the site that is registering.
#[uprobe]
fn pool(ctx: ProbeContext) -> u32 {
    if !is_counting() {
        return 0;
    }
    // SAFETY: the context is the one this program was called with.
    let cookie = unsafe { bpf_get_attach_cookie(ctx.as_ptr()) };
    let point = POOL_POINTS.get(cookie as u32);
    let Some(point) = point.filter(|_| cookie >> 32 == Role::Pool as u64) else {
        happened(Event::BadCookie);
        return 0;
    };
    let registers = ctx.as_ptr().cast::<u64>();
    // SAFETY: the context is a `struct pt_regs`, which has these words.
    let (g, instruction, sp) = unsafe {
        (
            *registers.add(REGISTERS.0),
            *registers.add(REGISTERS.1),
            *registers.add(REGISTERS.2),
        )
    };
    let outcome = if point.event == PoolEvent::Spill as u64 {
        total(PoolTotal::Spill);
        return 0;
    } else if point.event == PoolEvent::Miss as u64 {
        total(PoolTotal::Miss);
        PoolOutcome::Miss
    } else {
        match has_records(g, &point.local) {
            Some(true) => total(PoolTotal::Refill),
            Some(false) => {
                total(PoolTotal::Empty);
                return 0;
            }
            None => {
                total(PoolTotal::BadPool);
                return 0;
            }
        }
        PoolOutcome::Refill
    };
    let bias = instruction.wrapping_sub(point.address);
    match site(point, sp, bias) {
        Ok(Some(site)) => {
            if let Some(counter) = POOL.get_ptr_mut(site * PoolOutcome::COUNT + outcome as u32) {
                add_one(counter);
            }
        }
        Ok(None) => {} // A record of the runtime's own, or of a site that is not watched.
        Err(_) => total(PoolTotal::BadStack),
    }
    0
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
        // SAFETY: no entry is ever removed or changed while programs run.
        return Ok(unsafe { POOL_SITES.get(&returns_to) }.copied());
    }
    Ok(None)
}

#[inline(always)]
fn word(address: u64) -> Result<u64, i32> {
    // SAFETY: the helper checks the user's address.
    unsafe { bpf_probe_read_user(address as *const u64) }
}
