//! The program that runs in the kernel at each hit of a probe.
//!
//! It must load on every kernel from 5.8 on, x86-64 and arm64, without BTF, so it is plain: no
//! kfuncs, no ring buffer, no event a hit. Everything goes into maps that user space
//! polls. What a kernel lacks is behind a constant: the verifier skips a branch that cannot be
//! taken, unknown helpers in it and all.
//!
//! Per-CPU counters are added to atomically: from Linux 6.0 on, uprobe programs run preemptible
//! (bpf_prog_run_array_uprobe only disables migration), so another thread of the target may
//! run the same program on the same CPU between a load and a store.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod hit;
mod latency;
mod pool;
mod run;
mod stacks;

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::bpf_pidns_info,
    helpers::{
        bpf_get_attach_cookie, bpf_get_current_pid_tgid, bpf_get_ns_current_pid_tgid,
        bpf_probe_read_user,
    },
    macros::{map, uprobe},
    maps::{Array, HashMap, PerCpuArray},
    programs::ProbeContext,
};
use deferprof_ebpf_common::{Cookie, Event, MAX_SEVERAL, Role, Several};

use crate::hit::Hit;

#[map]
static COUNTING: Array<u64> = Array::with_max_entries(1, 0);
// The sizes of these maps are set when they are loaded.
#[map]
static REGISTERED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static EVENTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Event::COUNT, 0);
#[map]
static COOKIES: HashMap<u64, u64> = HashMap::with_max_entries(1, 0);
#[map]
static LISTS: Array<Several> = Array::with_max_entries(1, 0);

// Read-only to the verifier, which prunes the branches they rule out.
#[unsafe(no_mangle)]
static TGID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static PIDNS_INODE: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static PIDNS_DEVICE: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static BY_ADDRESS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static TAKE_STACKS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static LATENCY: Global<u32> = Global::new(0);
// Never anything else.
#[unsafe(no_mangle)]
static NEVER: Global<u32> = Global::new(0);

/// Runs at every hit of every probe. What an instruction stands for is in its cookie.
#[uprobe]
fn watch(ctx: ProbeContext) -> u32 {
    keep_own_stack();
    if !is_counting() {
        return 0;
    }
    let Some(cookie) = cookie(&ctx) else {
        happened(Event::BadCookie);
        return 0;
    };
    happened(match cookie.is_single_stepped() {
        true => Event::SingleStepped,
        false => Event::Emulated,
    });
    let mut hit = Hit::new(&ctx);
    if LATENCY.load() != 0 {
        hit.time = latency::now();
    }
    // Here, where the verifier knows of few ways, since the walk is long.
    let stack = if TAKE_STACKS.load() != 0 && registers(cookie) {
        stacks::take(&hit)
    } else {
        stacks::Taken::NONE
    };
    if LATENCY.load() != 0 {
        latency::start_hit(&mut hit);
    }
    let known = if cookie.role() == Role::Run as u32 {
        run::seen(&hit, cookie.number())
    } else if cookie.role() == Role::Pool as u32 {
        pool::seen(&hit, cookie.number())
    } else {
        answers(&hit, cookie, &stack)
    };
    if TAKE_STACKS.load() != 0 {
        stacks::release(&stack);
    }
    if !known {
        happened(Event::BadCookie);
    }
    if LATENCY.load() != 0 {
        latency::end_hit(&hit, cookie.is_single_stepped());
    }
    0
}

/// Has the program run on the kernel stack of the thread that hits the probe.
///
/// Since Linux 6.13 a program of this type gets a private stack, one per CPU, as soon as its frame has
/// 64 bytes (`bpf_enable_priv_stack` in kernel/bpf/verifier.c), on the ground that no other run of it
/// starts on that CPU before it ends. The kernel sees to that for kprobes, but not for uprobes: one
/// thread of the target preempts another in the midst of the program, and both write to one stack,
/// pointers included. Seen on 7.3 with lazy preemption: an oops within minutes. A program with a
/// tail call has no private stack, even where the verifier finds that the call is never made (and
/// removes it without a look at its arguments).
#[inline(always)]
fn keep_own_stack() {
    if NEVER.load() != 0 {
        // SAFETY: never executed.
        unsafe {
            core::arch::asm!(
                "call 12", // bpf_tail_call
                out("r0") _, out("r1") _, out("r2") _, out("r3") _, out("r4") _, out("r5") _,
            );
        }
    }
}

/// Answers the questions about sites that an instruction stands for, in the order in which it
/// happens; false if there are none.
#[inline(always)]
fn answers(hit: &Hit, cookie: Cookie, stack: &stacks::Taken) -> bool {
    let (role, number) = (cookie.role(), cookie.number());
    if role == Role::Exit as u32 {
        run::exit(hit, number);
        return true;
    }
    if role == Role::ExitReturned as u32 {
        latency::returned(hit);
        return true;
    }
    let mut several = core::ptr::null::<Several>();
    if role == Role::Several as u32 {
        let Some(list) = LISTS.get(number) else {
            return false;
        };
        if list.returned != 0 {
            latency::returned(hit);
        }
        several = list;
    } else if role != Role::Registered as u32 && role != Role::RegisteredRecord as u32 {
        return false;
    }
    let mut known = true;
    let mut index = 0;
    while index < MAX_SEVERAL {
        let (site, takes_record);
        if several.is_null() {
            if index > 0 {
                break;
            }
            (site, takes_record) = (number, role == Role::RegisteredRecord as u32);
        } else {
            // SAFETY: it is an entry of the map.
            let several = unsafe { &*several };
            if index as u32 >= several.length {
                break;
            }
            let value = several.sites[index];
            site = value & !Several::TAKES_RECORD;
            takes_record = value & Several::TAKES_RECORD != 0;
        }
        known &= registered(hit, site, takes_record, stack);
        index += 1;
    }
    if !several.is_null() {
        // SAFETY: it is an entry of the map.
        let exit = unsafe { (*several).exit };
        if exit != Several::NO_EXIT {
            run::exit(hit, exit);
        }
    }
    known
}

/// Whether a statement executes where the probe is.
#[inline(always)]
fn registers(cookie: Cookie) -> bool {
    if cookie.role() == Role::Several as u32 {
        return LISTS
            .get(cookie.number())
            .is_some_and(|list| list.length != 0);
    }
    cookie.role() == Role::Registered as u32 || cookie.role() == Role::RegisteredRecord as u32
}

/// A defer statement executed; false if there is no such site.
#[inline(always)]
fn registered(hit: &Hit, site: u32, takes_record: bool, stack: &stacks::Taken) -> bool {
    let Some(counter) = REGISTERED.get_ptr_mut(site) else {
        return false;
    };
    add_one(counter);
    if TAKE_STACKS.load() != 0 {
        stacks::count(stack, site);
    }
    if LATENCY.load() != 0 {
        if takes_record {
            latency::registering(hit, site);
        } else {
            latency::hold(hit, site);
        }
    }
    true
}

/// The cookie of the probe that was hit: the kernel's, or by the instruction's runtime address.
#[inline(always)]
fn cookie(ctx: &ProbeContext) -> Option<Cookie> {
    if BY_ADDRESS.load() == 0 {
        // SAFETY: the context is the one this program was called with.
        return Some(Cookie(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) }));
    }
    let address = Hit::new(ctx).instruction();
    // SAFETY: nothing writes to the map while programs run.
    unsafe { COOKIES.get(&address) }.copied().map(Cookie)
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

/// Counts what happened, on this CPU.
#[inline(always)]
fn happened(event: Event) {
    if let Some(counter) = EVENTS.get_ptr_mut(event as u32) {
        add_one(counter);
    }
}

#[inline(always)]
fn add_one(counter: *mut u64) {
    add(counter, 1);
}

/// Adds in one instruction (BPF_ATOMIC | BPF_ADD, which was BPF_XADD: every kernel and both
/// architectures have it).
#[inline(always)]
fn add(counter: *mut u64, amount: u64) {
    // SAFETY: callers pass pointers to 8 aligned bytes of a map's value.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {amount}",
            counter = in(reg) counter,
            amount = in(reg) amount,
        );
    }
}

/// A word of the target's memory.
#[inline(always)]
fn word(address: u64) -> Result<u64, i32> {
    // SAFETY: the helper checks the user's address.
    unsafe { bpf_probe_read_user(address as *const u64) }
}

/// A byte of the target's memory.
#[inline(always)]
fn byte(address: u64) -> Result<u8, i32> {
    // SAFETY: the helper checks the user's address.
    unsafe { bpf_probe_read_user(address as *const u8) }
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
