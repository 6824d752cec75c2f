//! Times. A start is kept under a key that survives the goroutine's changes of thread and its stack's
//! moves; its end makes a difference of two clocks, less what the hits between them cost the
//! goroutine, and that goes into a bucket.

use aya_ebpf::{
    Global,
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{HashMap, LruHashMap, PerCpuArray},
};
use deferprof_ebpf_common::{
    latency::{self, CALL, Goroutine, InFlight, InFlightKey, RECORD, Time, UNWOUND},
    run::RunTotal,
};

use crate::{add, add_one, hit::Hit, run::total, word};

// The sizes of these maps are set when they are loaded.
#[map]
static GOROUTINES: LruHashMap<u64, Goroutine> = LruHashMap::with_max_entries(1, 0);
#[map]
static IN_FLIGHT: HashMap<InFlightKey, InFlight> = HashMap::with_max_entries(1, 0);
#[map]
static BUCKETS: HashMap<u64, u64> = HashMap::with_max_entries(1, 0);
#[map]
static SUMS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

#[unsafe(no_mangle)]
static TAX_EMULATED: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static TAX_STEPPED: Global<u64> = Global::new(0);

/// `g.stack.hi`
const STACK_HIGH: u64 = 8;

/// Looks up what hits have cost the goroutine so far.
#[inline(always)]
pub fn start_hit(hit: &mut Hit) {
    let g = hit.g();
    let Ok(high) = word(g.wrapping_add(STACK_HIGH)) else {
        return;
    };
    hit.depth = high.wrapping_sub(hit.sp());
    if let Some(goroutine) = goroutine(g, hit.time) {
        hit.epoch = goroutine.epoch;
        hit.tax = goroutine.tax;
    }
}

/// Adds what this hit costs to the goroutine's account: the program's own time and the trap's.
#[inline(always)]
pub fn end_hit(hit: &Hit, single_stepped: bool) {
    if let Some(goroutine) = GOROUTINES.get_ptr_mut(&hit.g()) {
        let trap = if single_stepped {
            TAX_STEPPED.load()
        } else {
            TAX_EMULATED.load()
        };
        // SAFETY: the pointer is into the map; only the thread that runs the goroutine uses it.
        unsafe { (*goroutine).tax = hit.tax + trap + (now() - hit.time) };
    }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// The entry of a goroutine, which is made if there is none. Only the thread that runs the
/// goroutine touches it.
#[inline(always)]
fn goroutine<'a>(g: u64, now: u64) -> Option<&'a mut Goroutine> {
    let mut entry = GOROUTINES.get_ptr_mut(&g);
    if entry.is_none() {
        let new = Goroutine {
            epoch: now,
            tax: 0,
            registering: [0; 2],
            registering_site: 0,
            unwound: [[0; 2]; UNWOUND],
        };
        let _ = GOROUTINES.insert(&g, &new, 0);
        entry = GOROUTINES.get_ptr_mut(&g);
    }
    // SAFETY: the pointer is into the map, and of the current goroutine's entry.
    entry.map(|entry| unsafe { &mut *entry })
}

/// A defer statement executed; what it holds belongs to the frame.
#[inline(always)]
pub fn hold(hit: &Hit, site: u32) {
    let key = InFlightKey {
        owner: hit.g(),
        depth: hit.depth,
        what: site.into(),
    };
    start(hit, site, &key);
}

/// A defer statement is about to ask for a record.
#[inline(always)]
pub fn registering(hit: &Hit, site: u32) {
    if let Some(goroutine) = goroutine(hit.g(), hit.time) {
        let now = now();
        goroutine.registering = [now, hit.tax + (now - hit.time)];
        goroutine.registering_site = u64::from(site) + 1;
    }
}

/// It has got one: that is held from now on.
#[inline(always)]
pub fn registered(hit: &Hit, site: u32, record: u64) {
    let key = InFlightKey {
        owner: record,
        depth: 0,
        what: RECORD,
    };
    start(hit, site, &key);
    let Some(goroutine) = goroutine(hit.g(), hit.time) else {
        return;
    };
    if goroutine.registering_site != u64::from(site) + 1 {
        total(RunTotal::Unmatched);
        return;
    }
    goroutine.registering_site = 0;
    let [time, tax] = goroutine.registering;
    measured(hit, Time::Register, site, time, tax);
}

/// A deferred call is about to be made by the frame at `depth`: `held` ends, and the call starts.
#[inline(always)]
pub fn call(hit: &Hit, site: u32, held: &InFlightKey, depth: u64) {
    // SAFETY: the value is copied at once.
    match unsafe { IN_FLIGHT.get(held) }.copied() {
        Some(start) => {
            let _ = IN_FLIGHT.remove(held);
            if start.epoch == hit.epoch {
                measured(hit, Time::Held, site, start.time, start.tax);
            } else {
                total(RunTotal::Evicted);
            }
        }
        None => total(RunTotal::Unmatched),
    }
    let key = InFlightKey {
        owner: hit.g(),
        depth,
        what: CALL,
    };
    start(hit, site, &key);
}

/// A call that this frame made may have returned.
#[inline(always)]
pub fn returned(hit: &Hit) {
    let key = InFlightKey {
        owner: hit.g(),
        depth: hit.depth,
        what: CALL,
    };
    // SAFETY: the value is copied at once.
    let Some(start) = unsafe { IN_FLIGHT.get(&key) }.copied() else {
        return;
    };
    let _ = IN_FLIGHT.remove(&key);
    if start.epoch != hit.epoch {
        total(RunTotal::Evicted);
        return;
    }
    let Some(goroutine) = goroutine(hit.g(), hit.time) else {
        return;
    };
    // A panic since then may have ended the call that this is the start of.
    let mut index = 0;
    while index < UNWOUND {
        let [time, depth] = goroutine.unwound[index];
        if time >= start.time && hit.depth >= depth {
            total(RunTotal::Unwound);
            return;
        }
        index += 1;
    }
    measured(hit, Time::Call, start.site as u32, start.time, start.tax);
}

/// A panic or Goexit runs a deferred call of the frame at `depth`: what deeper frames were calling
/// will not return.
#[inline(always)]
pub fn unwind(hit: &Hit, depth: u64) {
    let Some(goroutine) = goroutine(hit.g(), hit.time) else {
        return;
    };
    let places = &mut goroutine.unwound;
    let mut index = 0;
    let mut found = false;
    while index < UNWOUND {
        if found {
            places[index][0] = 0;
        } else if places[index][0] == 0 || depth <= places[index][1] {
            places[index] = [hit.time, depth];
            found = true;
        }
        index += 1;
    }
    if !found {
        // No room: rather too shallow than forgotten.
        places[UNWOUND - 1][0] = hit.time;
    }
}

/// Something starts: now, and not when the program did, so that the time does not depend on what else
/// the hit had to do.
#[inline(always)]
fn start(hit: &Hit, site: u32, key: &InFlightKey) {
    let now = now();
    let start = InFlight {
        time: now,
        tax: hit.tax + (now - hit.time),
        epoch: hit.epoch,
        site: site.into(),
    };
    if IN_FLIGHT.insert(key, &start, 0).is_err() {
        total(RunTotal::InFlightFull);
    }
}

#[inline(always)]
fn measured(hit: &Hit, time: Time, site: u32, start: u64, tax: u64) {
    let between = hit.time.saturating_sub(start);
    let ns = between.saturating_sub(hit.tax.saturating_sub(tax));
    if let Some(sum) = SUMS.get_ptr_mut(site * Time::COUNT + time as u32) {
        add(sum, ns);
    }
    let key = latency::key(site, time, latency::bucket(ns));
    let mut counter = BUCKETS.get_ptr_mut(&key);
    if counter.is_none() {
        // Another CPU may be doing the same: that an entry is there already is no failure.
        let _ = BUCKETS.insert(&key, &0, aya_ebpf::bindings::BPF_NOEXIST.into());
        counter = BUCKETS.get_ptr_mut(&key);
    }
    match counter {
        Some(counter) => add_one(counter),
        None => total(RunTotal::BucketsFull),
    }
}
