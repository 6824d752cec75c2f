//! User stacks: one count by site and stack.

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    helpers::bpf_probe_read_user,
    macros::map,
    maps::{HashMap, PerCpuArray, PerCpuHashMap},
};
use deferprof_ebpf_common::{
    Event, MAX_FRAMES, SCRATCH_SLOTS, Scratch, Stack, StackHash, StackKey,
};

use crate::{add_one, exchange, happened, hit::Hit};

// The sizes of these maps are set when they are loaded.
#[map]
static STACKS: HashMap<[u64; 2], Stack> = HashMap::with_max_entries(1, 0);
#[map]
static STACK_COUNTS: PerCpuHashMap<StackKey, u64> = PerCpuHashMap::with_max_entries(1, 0);
#[map]
static STACKS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCH_SLOTS, 0);

#[unsafe(no_mangle)]
static PREEMPTIBLE: Global<u32> = Global::new(1);

/// A user stack that was taken, or none. (No `Option`: the verifier refuses copies of what is not
/// set.)
pub struct Taken {
    scratch: *mut Scratch,
    hash: [u64; 2],
}

impl Taken {
    pub const NONE: Self = Self {
        scratch: core::ptr::null_mut(),
        hash: [0; 2],
    };
}

/// Takes the current user stack. To be released.
#[inline(always)]
pub fn take(hit: &Hit) -> Taken {
    let Some(scratch) = claim() else {
        return Taken::NONE;
    };
    // SAFETY: `claim` returns a valid entry of the map, and as long as it is claimed no other
    // thread touches it.
    let hash = walk(hit, unsafe { &mut (*scratch).stack });
    Taken { scratch, hash }
}

/// Gives the buffer back.
#[inline(always)]
pub fn release(taken: &Taken) {
    if !taken.scratch.is_null() {
        // SAFETY: a plain store releases the claim of this CPU's own entry.
        unsafe { (&raw mut (*taken.scratch).claimed).write_volatile(0) };
    }
}

/// Counts the stack for `site`.
#[inline(always)]
pub fn count(taken: &Taken, site: u32) {
    let counted = if taken.scratch.is_null() {
        Err(Event::ScratchBusy)
    } else {
        // SAFETY: the entry is claimed until it is released.
        count_stack(unsafe { &(*taken.scratch).stack }, taken.hash, site)
    };
    if let Err(event) = counted {
        happened(event);
        if let Some(lost) = STACKS_LOST.get_ptr_mut(site) {
            add_one(lost);
        }
    }
}

/// Finds a buffer that no preempted thread is using.
#[inline(always)]
fn claim() -> Option<*mut Scratch> {
    if PREEMPTIBLE.load() == 0 {
        return SCRATCH.get_ptr_mut(0);
    }
    let mut slot = 0;
    while slot < SCRATCH_SLOTS {
        let scratch = SCRATCH.get_ptr_mut(slot)?;
        // SAFETY: the pointer is into the map.
        if exchange(unsafe { &raw mut (*scratch).claimed }, 1) == 0 {
            return Some(scratch);
        }
        slot += 1;
    }
    None
}

/// Walks the user stack by frame pointers, and returns the frames' hash.
///
/// bpf_get_stack would do it too, but it finds the end of the chain, a frame pointer of 0, by a page
/// fault at address 0, which costs more than this walk of ten frames; and it keeps the frames in
/// a buffer of the CPU's that another thread may overwrite where programs are preemptible.
#[inline(always)]
fn walk(hit: &Hit, stack: &mut Stack) -> [u64; 2] {
    let mut frame = hit.frame_pointer();
    stack.frames[0] = hit.instruction();
    let mut hash = StackHash::new().add(hit.instruction());
    let mut length = 1;
    let mut truncated = 0;
    while frame != 0 {
        if length >= MAX_FRAMES {
            truncated = 1;
            break;
        }
        // The caller's frame pointer and the return address, on both architectures.
        // SAFETY: the helper checks the user's address.
        let Ok(saved) = (unsafe { bpf_probe_read_user(frame as *const [u64; 2]) }) else {
            truncated = 1;
            break;
        };
        stack.frames[length] = saved[1];
        hash = hash.add(saved[1]);
        length += 1;
        frame = saved[0];
    }
    stack.length = length as u32;
    stack.truncated = truncated;
    hash.finish(length as u32, truncated)
}

/// Counts the stack for the site; the first time it is seen its frames are stored.
#[inline(always)]
fn count_stack(stack: &Stack, hash: [u64; 2], site: u32) -> Result<(), Event> {
    let key = StackKey {
        hash,
        site: u64::from(site),
    };
    if let Some(counter) = STACK_COUNTS.get_ptr_mut(&key) {
        add_one(counter);
        return Ok(());
    }
    // Another CPU may be doing the same: that an entry is there already is no failure.
    if STACKS.get_ptr(&key.hash).is_none() {
        let _ = STACKS.insert(&key.hash, stack, u64::from(BPF_NOEXIST));
        if STACKS.get_ptr(&key.hash).is_none() {
            return Err(Event::StacksFull);
        }
    }
    let _ = STACK_COUNTS.insert(&key, 0, u64::from(BPF_NOEXIST));
    let counter = STACK_COUNTS
        .get_ptr_mut(&key)
        .ok_or(Event::StackCountsFull)?;
    add_one(counter);
    Ok(())
}

