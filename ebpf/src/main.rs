//! The programs that run in the kernel at each hit of a probe.
//!
//! They must load on every kernel from 5.8 on, x86-64 and arm64, without BTF, so they are plain: no
//! subprograms, no kfuncs, no ring buffer, no event a hit. Everything goes into maps that user space
//! polls. What a kernel lacks is behind a constant: the verifier skips a branch that cannot be
//! taken, unknown helpers in it and all.
//!
//! Per-CPU counters are added to atomically: from Linux 6.0 on, uprobe programs run preemptible
//! (bpf_prog_run_array_uprobe only disables migration), so another thread of the target may
//! run the same program on the same CPU between a load and a store.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod pool;

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{BPF_NOEXIST, bpf_pidns_info},
    helpers::{
        bpf_get_attach_cookie, bpf_get_current_pid_tgid, bpf_get_ns_current_pid_tgid,
        bpf_probe_read_user,
    },
    macros::{map, uprobe},
    maps::{Array, HashMap, PerCpuArray, PerCpuHashMap},
    programs::ProbeContext,
};
use deferprof_ebpf_common::{
    Event, MAX_FRAMES, SCRATCH_SLOTS, Scratch, Stack, StackHash, StackKey,
};

#[map]
static COUNTING: Array<u64> = Array::with_max_entries(1, 0);
// The sizes of these maps are set when they are loaded.
#[map]
static REGISTERED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static EVENTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Event::COUNT, 0);
#[map]
static STACKS: HashMap<[u64; 2], Stack> = HashMap::with_max_entries(1, 0);
#[map]
static STACK_COUNTS: PerCpuHashMap<StackKey, u64> = PerCpuHashMap::with_max_entries(1, 0);
#[map]
static STACKS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCH_SLOTS, 0);
#[map]
static COOKIES: HashMap<u64, u64> = HashMap::with_max_entries(1, 0);

// Read-only to the verifier, which prunes the branches they rule out.
#[unsafe(no_mangle)]
static TGID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static PIDNS_INODE: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static PIDNS_DEVICE: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static PREEMPTIBLE: Global<u32> = Global::new(1);
#[unsafe(no_mangle)]
static BY_ADDRESS: Global<u32> = Global::new(0);

/// Counts the hit.
#[uprobe]
fn count(ctx: ProbeContext) -> u32 {
    registered(&ctx);
    0
}

/// Counts the hit, and once more by site and user stack.
#[uprobe]
fn count_stacks(ctx: ProbeContext) -> u32 {
    if let Some(site) = registered(&ctx)
        && let Err(event) = stack(&ctx, site)
    {
        happened(event);
        if let Some(lost) = STACKS_LOST.get_ptr_mut(site) {
            add_one(lost);
        }
    }
    0
}

/// Counts the hit for its site and returns that, if it is the target's and the site exists.
#[inline(always)]
fn registered(ctx: &ProbeContext) -> Option<u32> {
    if !is_counting() {
        return None;
    }
    // The high half is the role of the probe: none but `Role::Registered`, 0, runs this program.
    if let Some(cookie) = cookie(ctx)
        && cookie >> 32 == 0
        && let Some(counter) = REGISTERED.get_ptr_mut(cookie as u32)
    {
        add_one(counter);
        return Some(cookie as u32);
    }
    happened(Event::BadCookie);
    None
}

/// The cookie of the probe that was hit: the kernel's, or by the instruction's runtime address.
#[inline(always)]
fn cookie(ctx: &ProbeContext) -> Option<u64> {
    if BY_ADDRESS.load() == 0 {
        // SAFETY: the context is the one this program was called with.
        return Some(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) });
    }
    let registers = ctx.as_ptr().cast::<u64>();
    // SAFETY: the context is a `struct pt_regs`, which has the word.
    let address = unsafe { *registers.add(REGISTERS.0) };
    // SAFETY: nothing writes to the map while programs run.
    unsafe { COOKIES.get(&address) }.copied()
}

/// Whether hits of the current thread count now.
#[inline(always)]
fn is_counting() -> bool {
    if current_tgid() != TGID.load() {
        happened(Event::Foreign);
        return false;
    }
    COUNTING.get(0).is_some_and(|counting| *counting != 0)
}

/// The thread group of the current thread, in the pid namespace in which `TGID` counts; 0 outside.
#[inline(always)]
fn current_tgid() -> u32 {
    let inode = PIDNS_INODE.load();
    if inode == 0 {
        return (bpf_get_current_pid_tgid() >> 32) as u32;
    }
    let mut ids = bpf_pidns_info { pid: 0, tgid: 0 };
    // SAFETY: the helper writes the 8 bytes that it is given the address and the size of.
    let status = unsafe {
        bpf_get_ns_current_pid_tgid(
            PIDNS_DEVICE.load(),
            inode,
            &mut ids,
            size_of::<bpf_pidns_info>() as u32,
        )
    };
    if status == 0 { ids.tgid } else { 0 }
}

/// Takes the current user stack and counts it for `site`.
#[inline(always)]
fn stack(ctx: &ProbeContext, site: u32) -> Result<(), Event> {
    let scratch = claim().ok_or(Event::ScratchBusy)?;
    // SAFETY: `claim` returns a valid entry of the map, and as long as it is claimed no other
    // thread touches it.
    let stack = unsafe { &mut (*scratch).stack };
    let hash = take(ctx, stack);
    let result = count_stack(stack, hash, site);
    // SAFETY: as above; a plain store releases the claim of this CPU's own entry.
    unsafe { (&raw mut (*scratch).claimed).write_volatile(0) };
    result
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

/// Where `struct pt_regs` (`user_pt_regs` on arm64) has the instruction and the frame pointer, in
/// words. Both layouts are part of the kernel's interface (ptrace).
#[cfg(bpf_target_arch = "x86_64")]
const REGISTERS: (usize, usize) = (16, 4);
#[cfg(bpf_target_arch = "aarch64")]
const REGISTERS: (usize, usize) = (32, 29);

/// Walks the user stack by frame pointers, and returns the frames' hash.
///
/// bpf_get_stack would do it too, but it finds the end of the chain, a frame pointer of 0, by a page
/// fault at address 0, which costs more than this walk of ten frames; and it keeps the frames in
/// a buffer of the CPU's that another thread may overwrite where programs are preemptible.
#[inline(always)]
fn take(ctx: &ProbeContext, stack: &mut Stack) -> [u64; 2] {
    let registers = ctx.as_ptr().cast::<u64>();
    // SAFETY: the context is a `struct pt_regs`, which has both words.
    let (instruction, mut frame) =
        unsafe { (*registers.add(REGISTERS.0), *registers.add(REGISTERS.1)) };
    stack.frames[0] = instruction;
    let mut hash = StackHash::new().add(instruction);
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

/// Counts what happened, on this CPU.
#[inline(always)]
fn happened(event: Event) {
    if let Some(counter) = EVENTS.get_ptr_mut(event as u32) {
        add_one(counter);
    }
}

/// Adds 1 in one instruction (BPF_ATOMIC | BPF_ADD, which was BPF_XADD: every kernel and both
/// architectures have it).
#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: callers pass pointers to 8 aligned bytes of a map's value.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1u64,
        );
    }
}

/// Stores `value` and returns what was there (BPF_XCHG: Linux 5.12, on arm64 5.18).
#[inline(always)]
fn exchange(place: *mut u64, value: u64) -> u64 {
    let mut value = value;
    // SAFETY: callers pass pointers to 8 aligned bytes of a map's value.
    unsafe {
        core::arch::asm!(
            "{value} = xchg_64({place} + 0, {value})",
            place = in(reg) place,
            value = inout(reg) value,
        );
    }
    value
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Without a GPL-compatible licence the kernel refuses bpf_get_stack and the tracing helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
