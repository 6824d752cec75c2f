//! Deferred calls: counted when they are about to be made, by site and by how control came there.

use aya_ebpf::{
    helpers::bpf_probe_read_user,
    macros::map,
    maps::{Array, HashMap, PerCpuArray},
};
use deferprof_ebpf_common::{
    latency::{InFlightKey, RECORD},
    run::{
        MAX_BITS, MAX_RUNNERS, NO_SITE, OpenFrame, RunEvent, RunLayout, RunPath, RunPoint, RunTotal,
        Runner,
    },
};

use crate::{LATENCY, add_one, byte, hit::Hit, latency, word};

/// By number in the cookie: what the probe stands on.
#[map]
static RUN_POINTS: Array<RunPoint> = Array::with_max_entries(1, 0);
#[map]
static RUN_LAYOUT: Array<RunLayout> = Array::with_max_entries(1, 0);
#[map]
static OPEN_FRAMES: HashMap<u64, OpenFrame> = HashMap::with_max_entries(1, 0);
/// By return address as linked: the site that calls the runtime there.
#[map]
static SITES: HashMap<u64, u32> = HashMap::with_max_entries(1, 0);
#[map]
static RECORDS: HashMap<u64, u32> = HashMap::with_max_entries(1, 0);
#[map]
static RAN: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static RUN_TOTALS: PerCpuArray<u64> = PerCpuArray::with_max_entries(RunTotal::COUNT, 0);

/// Offsets that no release has changed: `g._defer`, and `pc`, `sp` and `fn` in `_defer`.
const HEAD: u64 = 40;
const SP_AND_PC: u64 = 8;

/// The site whose call of the runtime returns there.
#[inline(always)]
pub fn site_of(returns_to: u64) -> Option<u32> {
    // SAFETY: no entry is ever removed or changed while programs run.
    unsafe { SITES.get(&returns_to) }.copied()
}

#[inline(always)]
pub fn total(which: RunTotal) {
    if let Some(counter) = RUN_TOTALS.get_ptr_mut(which as u32) {
        add_one(counter);
    }
}

/// Exit code is about to make the deferred call of `site`.
#[inline(always)]
pub fn exit(hit: &Hit, site: u32) {
    exit_at(hit, site, hit.depth);
}

/// The same where the function that makes it has its SP at `depth`.
#[inline(always)]
fn exit_at(hit: &Hit, site: u32, depth: u64) {
    ran(site, RunPath::Return as u64);
    if LATENCY.load() != 0 {
        let held = InFlightKey {
            owner: hit.g(),
            depth,
            what: site.into(),
        };
        latency::call(hit, site, &held, depth);
    }
}

/// The runtime makes a deferred call, or is about to; false if there is no such probe.
#[inline(always)]
pub fn seen(hit: &Hit, number: u32) -> bool {
    let Some(point) = RUN_POINTS.get(number) else {
        return false;
    };
    let event = point.event;
    if event == RunEvent::Panicked as u64 {
        total(RunTotal::Panicked);
    } else if event == RunEvent::Recovered as u64 {
        total(RunTotal::Recovered);
    } else if event == RunEvent::Returned as u64 {
        latency::returned(hit);
    } else {
        let result = if event == RunEvent::Record as u64 {
            record(hit, point)
        } else if event == RunEvent::Frame as u64 {
            frame(hit, point)
        } else if event == RunEvent::Entered as u64 {
            entered(hit, point)
        } else {
            taken(hit, point)
        };
        if result.is_err() {
            total(RunTotal::Unreadable);
        }
    }
    true
}

#[inline(always)]
fn ran(site: u32, path: u64) {
    if path < RunPath::COUNT.into()
        && let Some(counter) = RAN.get_ptr_mut(site * RunPath::COUNT + path as u32)
    {
        add_one(counter);
    }
}

/// The loop that the probe is in.
#[inline(always)]
fn runner<'a>(hit: &Hit, point: &'a RunPoint) -> Result<Option<&'a Runner>, i32> {
    let bias = hit.instruction().wrapping_sub(point.address);
    let mut index = 0;
    while index < MAX_RUNNERS {
        let runner = &point.runners[index];
        index += 1;
        if runner.path == RunPath::NONE {
            break;
        }
        if runner.returns_to == 0
            || word(hit.sp().wrapping_add(runner.via))?.wrapping_sub(bias) == runner.returns_to
        {
            return Ok(Some(runner));
        }
    }
    Ok(None)
}

/// A record's call is about to be made.
#[inline(always)]
fn record(hit: &Hit, point: &RunPoint) -> Result<(), i32> {
    let layout = RUN_LAYOUT.get(0).ok_or(0)?;
    let Some(runner) = runner(hit, point)? else {
        total(RunTotal::Unknown);
        return Ok(());
    };
    let record = if point.in_argument != 0 {
        hit.first_argument()
    } else {
        word(hit.g().wrapping_add(HEAD))?
    };
    // Up to 1.21 a frame's own record is given back like any other.
    if layout.by_records != 0 && byte(record.wrapping_add(layout.open))? != 0 {
        return Ok(());
    }
    if point.closure != RunPoint::NO_CLOSURE
        && word(hit.sp().wrapping_add(point.closure))? == 0
    {
        return Ok(()); // A nil function: it panics instead.
    }
    // SAFETY: the helper checks the user's address.
    let [sp, pc] = unsafe { bpf_probe_read_user(record.wrapping_add(SP_AND_PC) as *const [u64; 2]) }?;
    let bias = hit.instruction().wrapping_sub(point.address);
    let site = match site_of(pc.wrapping_sub(bias)) {
        Some(site) => site,
        None => {
            // SAFETY: the value is copied at once.
            let Some(site) = unsafe { RECORDS.get(&record) }.copied() else {
                total(RunTotal::Unknown);
                return Ok(());
            };
            let _ = RECORDS.remove(&record);
            site
        }
    };
    let called = Called {
        site,
        path: runner.path,
        sp,
        record,
    };
    called.count(hit, runner)
}

/// A deferred call that a loop of the runtime is about to make.
struct Called {
    site: u32,
    path: u64,
    /// SP in the body of the function that deferred it.
    sp: u64,
    /// The record; 0 if it is open-coded.
    record: u64,
}

impl Called {
    #[inline(always)]
    fn count(&self, hit: &Hit, runner: &Runner) -> Result<(), i32> {
        ran(self.site, self.path);
        if LATENCY.load() == 0 {
            return Ok(());
        }
        let high = hit.sp().wrapping_add(hit.depth);
        let depth = high.wrapping_sub(self.sp);
        let on_stack = self.record == 0 || (word(hit.g())?..high).contains(&self.record);
        let held = if on_stack {
            InFlightKey {
                owner: hit.g(),
                depth,
                what: self.site.into(),
            }
        } else {
            InFlightKey {
                owner: self.record,
                depth: 0,
                what: RECORD,
            }
        };
        if self.path != RunPath::Return as u64 {
            latency::unwind(hit, depth);
        }
        latency::call(hit, self.site, &held, hit.depth.wrapping_sub(runner.frame));
        Ok(())
    }
}

/// The frame that the runtime names by an address of its function, as linked.
#[inline(always)]
fn open_frame<'a>(deferreturn: u64) -> Option<&'a OpenFrame> {
    // SAFETY: no entry is ever removed or changed while programs run.
    let frame = unsafe { OPEN_FRAMES.get(&deferreturn) };
    if frame.is_none() {
        total(RunTotal::Unknown);
    }
    frame
}

/// The call of an open-coded frame's highest bit is about to be made.
#[inline(always)]
fn frame(hit: &Hit, point: &RunPoint) -> Result<(), i32> {
    let layout = RUN_LAYOUT.get(0).ok_or(0)?;
    let Some(runner) = runner(hit, point)? else {
        total(RunTotal::Unknown);
        return Ok(());
    };
    let bias = hit.instruction().wrapping_sub(point.address);
    let mut path = runner.path;
    let (varp, bit, frame);
    if layout.by_records != 0 {
        let record = word(hit.g().wrapping_add(HEAD))?;
        let pc = word(record.wrapping_add(SP_AND_PC + 8))?.wrapping_sub(bias);
        frame = match open_frame(pc) {
            Some(frame) => frame,
            None => return Ok(()),
        };
        varp = word(record.wrapping_add(layout.varp))?;
        if path == RunPath::ASK {
            let panic = word(record.wrapping_add(layout.record_panic))?;
            path = if panic == 0 {
                RunPath::Return as u64
            } else if byte(panic.wrapping_add(layout.goexit))? != 0 {
                RunPath::Goexit as u64
            } else {
                RunPath::Panic as u64
            };
        }
        bit = cleared_bit(hit, frame, varp)?;
        if hit.second_argument() == 0 {
            return Ok(()); // A nil function: it panics instead.
        }
    } else {
        let panic = hit.sp().wrapping_add(runner.panic);
        let bits = word(panic.wrapping_add(layout.bits))?;
        let set = byte(bits)?;
        if set == 0 {
            return Ok(()); // The frame is done.
        }
        let pc = word(panic.wrapping_add(layout.retpc))?.wrapping_sub(bias);
        frame = match open_frame(pc) {
            Some(frame) => frame,
            None => return Ok(()),
        };
        varp = bits.wrapping_add(frame.bits);
        bit = highest(set);
        if bit < MAX_BITS && word(varp.wrapping_sub(frame.slots[bit]))? == 0 {
            return Ok(());
        }
    }
    if bit >= MAX_BITS {
        total(RunTotal::Unknown);
        return Ok(());
    }
    let site = frame.sites[bit];
    if site == NO_SITE {
        return Ok(());
    }
    let called = Called {
        site,
        path,
        sp: varp.wrapping_sub(frame.depth),
        record: 0,
    };
    called.count(hit, runner)
}

/// The number of the highest bit that is set, at least one of 8.
#[inline(always)]
fn highest(bits: u8) -> usize {
    let mut bit = 0;
    let mut index = 1;
    while index < MAX_BITS {
        if bits >> index & 1 != 0 {
            bit = index;
        }
        index += 1;
    }
    bit
}

/// The bit of the closure in the second argument register, which was cleared before: calls are made
/// from the highest bit down, so it is the first above those still set whose slot has the closure.
#[inline(always)]
fn cleared_bit(hit: &Hit, frame: &OpenFrame, varp: u64) -> Result<usize, i32> {
    let left = byte(varp.wrapping_sub(frame.bits))?;
    let mut index = 0;
    while index < MAX_BITS {
        if left >> index == 0
            && frame.slots[index] != 0
            && word(varp.wrapping_sub(frame.slots[index]))? == hit.second_argument()
        {
            return Ok(index);
        }
        index += 1;
    }
    Ok(MAX_BITS)
}

/// A function was entered that exit code calls, perhaps from there: the return address says it.
#[inline(always)]
fn entered(hit: &Hit, point: &RunPoint) -> Result<(), i32> {
    let bias = hit.instruction().wrapping_sub(point.address);
    let returns_to = word(hit.sp().wrapping_add(point.site))?.wrapping_sub(bias);
    if let Some(site) = site_of(returns_to) {
        exit_at(hit, site, hit.depth.wrapping_sub(point.runners[0].frame));
    }
    Ok(())
}

/// A registering function has got its record: from now on the defer is held.
#[inline(always)]
fn taken(hit: &Hit, point: &RunPoint) -> Result<(), i32> {
    if point.keeps == 0 && LATENCY.load() == 0 {
        return Ok(());
    }
    let record = hit.first_argument();
    let bias = hit.instruction().wrapping_sub(point.address);
    let returns_to = word(hit.sp().wrapping_add(point.site))?.wrapping_sub(bias);
    let Some(site) = site_of(returns_to) else {
        return Ok(());
    };
    if point.keeps != 0 && RECORDS.insert(&record, &site, 0).is_err() {
        total(RunTotal::RecordsFull);
    }
    if LATENCY.load() != 0 {
        latency::registered(hit, site, record);
    }
    Ok(())
}
