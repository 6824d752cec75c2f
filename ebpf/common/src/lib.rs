//! The types that deferprof and its eBPF programs share. Plain data, no dependencies: it compiles
//! for `bpfel-unknown-none` and for the host.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod latency;
pub mod pool;
pub mod run;

/// How many frames of a user stack are kept: as many as the kernel's own walk keeps unless told
/// otherwise (PERF_MAX_STACK_DEPTH, include/uapi/linux/perf_event.h).
pub const MAX_FRAMES: usize = 127;

/// How many threads on one CPU can be in the middle of taking a stack at the same time. Kernels
/// from 6.0 on let a program be preempted by another thread, so one buffer a CPU is not enough.
pub const SCRATCH_SLOTS: u32 = 4;

/// The names of the programs, the maps and the variables in the object: both sides must agree.
pub mod name {
    /// The program on every probe.
    pub const WATCH: &str = "watch";
    /// By number in the cookie: what one instruction stands for ([`Several`](crate::Several)).
    pub const LISTS: &str = "LISTS";
    /// Per CPU, by site: how often its statement executed (`u64`).
    pub const REGISTERED: &str = "REGISTERED";
    /// Per CPU, by [`Event`](crate::Event): how often it happened (`u64`).
    pub const EVENTS: &str = "EVENTS";
    /// By hash: the frames ([`Stack`](crate::Stack)).
    pub const STACKS: &str = "STACKS";
    /// Per CPU, by site and stack ([`StackKey`](crate::StackKey)): hits (`u64`).
    pub const STACK_COUNTS: &str = "STACK_COUNTS";
    /// Per CPU, by site: hits whose stack was lost (`u64`).
    pub const STACKS_LOST: &str = "STACKS_LOST";
    /// Per CPU: where a stack is put together ([`Scratch`](crate::Scratch)).
    pub const SCRATCH: &str = "SCRATCH";
    /// By runtime address of the probed instruction: the probe's cookie (`u64` both). Read only if
    /// [`BY_ADDRESS`] is set.
    pub const COOKIES: &str = "COOKIES";
    /// 1 if the kernel hands out no cookies, or one for many probes (`u32`).
    pub const BY_ADDRESS: &str = "BY_ADDRESS";
    /// Not 0 while hits count (`u64`): probes are put in place and taken away one after another,
    /// but all of them start and stop counting at the same instant.
    pub const COUNTING: &str = "COUNTING";
    /// By number in the cookie: the probe ([`PoolPoint`](crate::pool::PoolPoint)).
    pub const POOL_POINTS: &str = "POOL_POINTS";
    /// By return address of a registering call, as linked (`u64`): the site (`u32`).
    pub const SITES: &str = "SITES";
    /// Per CPU, by site and [`PoolOutcome`](crate::pool::PoolOutcome): how often (`u64`).
    pub const POOL: &str = "POOL";
    /// Per CPU, by [`PoolTotal`](crate::pool::PoolTotal): how often (`u64`).
    pub const POOL_TOTALS: &str = "POOL_TOTALS";
    /// By number in the cookie: the probe ([`RunPoint`](crate::run::RunPoint)).
    pub const RUN_POINTS: &str = "RUN_POINTS";
    /// One [`RunLayout`](crate::run::RunLayout).
    pub const RUN_LAYOUT: &str = "RUN_LAYOUT";
    /// By the function's deferreturn call as linked (`u64`): the frame
    /// ([`OpenFrame`](crate::run::OpenFrame)).
    pub const OPEN_FRAMES: &str = "OPEN_FRAMES";
    /// By address of a record that was made in a range-over-func body (`u64`): the site (`u32`).
    pub const RECORDS: &str = "RECORDS";
    /// Per CPU, by site and [`RunPath`](crate::run::RunPath): deferred calls (`u64`).
    pub const RAN: &str = "RAN";
    /// Per CPU, by [`RunTotal`](crate::run::RunTotal): how often (`u64`).
    pub const RUN_TOTALS: &str = "RUN_TOTALS";
    /// By address of the goroutine (`u64`): [`Goroutine`](crate::latency::Goroutine).
    pub const GOROUTINES: &str = "GOROUTINES";
    /// By [`InFlightKey`](crate::latency::InFlightKey): [`InFlight`](crate::latency::InFlight).
    pub const IN_FLIGHT: &str = "IN_FLIGHT";
    /// By [`key`](crate::latency::key): how many times are in the bucket (`u64`).
    pub const BUCKETS: &str = "BUCKETS";
    /// Per CPU, by site and [`Time`](crate::latency::Time): the sum of the times in ns (`u64`).
    pub const SUMS: &str = "SUMS";
    /// 1 if stacks are taken (`u32`).
    pub const TAKE_STACKS: &str = "TAKE_STACKS";
    /// 1 if times are measured (`u32`).
    pub const LATENCY: &str = "LATENCY";
    /// What a hit costs in ns beside the program, of an emulated instruction (`u64`).
    pub const TAX_EMULATED: &str = "TAX_EMULATED";
    /// The same of a single-stepped one (`u64`).
    pub const TAX_STEPPED: &str = "TAX_STEPPED";
    /// The thread group that is counted, as the namespace that was chosen numbers it (`u32`).
    pub const TGID: &str = "TGID";
    /// Inode of the pid namespace in which `TGID` counts, 0 for the initial one (`u64`).
    pub const PIDNS_INODE: &str = "PIDNS_INODE";
    /// Device of the pid namespace's file (`u64`).
    pub const PIDNS_DEVICE: &str = "PIDNS_DEVICE";
    /// 1 if the program can be preempted by another thread of the target (`u32`).
    pub const PREEMPTIBLE: &str = "PREEMPTIBLE";
}

/// What a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Role {
    /// A defer statement executed, and what is held belongs to the frame. The low half of the cookie
    /// is the site.
    Registered = 0,
    /// A defer statement is about to get a record from the runtime. The low half is the site.
    RegisteredRecord = 1,
    /// The runtime goes a rare path with a record. The low half is the index of
    /// a [`PoolPoint`](pool::PoolPoint).
    Pool = 2,
    /// Exit code is about to make a deferred call. The low half is the site.
    Exit = 3,
    /// The deferred call of exit code has returned.
    ExitReturned = 4,
    /// The runtime makes deferred calls. The low half is the index of a
    /// [`RunPoint`](run::RunPoint).
    Run = 5,
    /// All of this at one instruction: registrations, exits and their ends. The low half is the
    /// index of a [`Several`].
    Several = 6,
}

/// The 64 bits that say which probe was hit: the kernel hands them to the program (Linux 5.15), or
/// the program finds them by address. The low half is a number, above it is the [`Role`], and one
/// bit says whether the instruction is single-stepped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(pub u64);

impl Cookie {
    const STEPPED: u64 = 1 << 40;

    /// The cookie of a probe.
    pub const fn new(role: Role, number: u32) -> Self {
        Self(((role as u64) << 32) | number as u64)
    }

    /// The same for an instruction that is single-stepped.
    pub const fn single_stepped(self) -> Self {
        Self(self.0 | Self::STEPPED)
    }

    /// Whether the instruction is single-stepped.
    #[inline(always)]
    pub const fn is_single_stepped(self) -> bool {
        self.0 & Self::STEPPED != 0
    }

    /// The number of the [`Role`].
    #[inline(always)]
    pub const fn role(self) -> u32 {
        (self.0 >> 32) as u32 & 0xff
    }

    /// The site, or another index.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self.0 as u32
    }
}

/// How many defers one instruction can register: a function has at most 8 that share a block's end.
pub const MAX_SEVERAL: usize = 12;

/// What one instruction stands for, in the order in which it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Several {
    /// 1 if it follows a deferred call of exit code.
    pub returned: u32,
    /// How many sites register.
    pub length: u32,
    /// These sites; [`Several::TAKES_RECORD`] is set in those that are [`Role::RegisteredRecord`].
    pub sites: [u32; MAX_SEVERAL],
    /// The site whose deferred call exit code is about to make, or [`Several::NO_EXIT`].
    pub exit: u32,
}

impl Several {
    /// In [`sites`](Self::sites): the site is about to get a record from the runtime.
    pub const TAKES_RECORD: u32 = 1 << 31;
    /// In [`exit`](Self::exit).
    pub const NO_EXIT: u32 = u32::MAX;
}

/// What else is counted beside the sites: an index into the map `EVENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// A hit by another process than the target. Not a loss.
    Foreign = 0,
    /// A hit whose cookie names no site of this session: counted nowhere.
    BadCookie = 1,
    /// Stack lost: the map of stacks is full.
    StacksFull = 2,
    /// Stack lost: the map of counts by site and stack is full.
    StackCountsFull = 3,
    /// Stack lost: more threads than [`SCRATCH_SLOTS`] were preempted amid a hit on one CPU.
    ScratchBusy = 4,
    /// A hit of an instruction that the kernel emulates. Not a loss.
    Emulated = 5,
    /// A hit of one that it single-steps. Not a loss.
    SingleStepped = 6,
}

impl Event {
    /// How many kinds there are.
    pub const COUNT: u32 = 7;
}

/// The key of `STACK_COUNTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct StackKey {
    /// What [`StackHash`] says of the frames: the key of `STACKS`.
    pub hash: [u64; 2],
    /// The site.
    pub site: u64,
}

/// A user stack.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Stack {
    /// How many of the frames are valid.
    pub length: u32,
    /// 1 if callers may be missing: there are more frames, or one could not be read.
    pub truncated: u32,
    /// Runtime addresses, leaf first: the probed instruction, then return addresses.
    pub frames: [u64; MAX_FRAMES],
}

/// Room to put one stack together.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Scratch {
    /// 1 while a thread uses it.
    pub claimed: u64,
    /// The stack.
    pub stack: Stack,
}

/// 128 bits that tell stacks apart: two independent multiply-and-shift lanes, each of which is a
/// bijection of its state for a given frame, so that two stacks of one length that differ in one
/// frame never collide, and others do with a chance of about 2⁻¹²⁸.
#[derive(Clone, Copy, Debug)]
pub struct StackHash(u64, u64);

impl StackHash {
    const A: u64 = 0x9e37_79b9_7f4a_7c15; // 2⁶⁴/φ, odd
    const B: u64 = 0xc2b2_ae3d_27d4_eb4f; // a prime, as in xxHash

    /// Of no frames.
    #[inline(always)]
    pub const fn new() -> Self {
        Self(Self::B, Self::A)
    }

    /// With one more frame.
    #[inline(always)]
    pub const fn add(self, frame: u64) -> Self {
        let a = (self.0 ^ frame).wrapping_mul(Self::A);
        let b = (self.1 ^ frame).wrapping_mul(Self::B);
        Self(a ^ (a >> 32), b ^ (b >> 29))
    }

    /// Of the frames added and whether they were truncated.
    #[inline(always)]
    pub const fn finish(self, length: u32, truncated: u32) -> [u64; 2] {
        let Self(a, b) = self.add(((truncated as u64) << 32) | length as u64);
        [a, b]
    }
}

impl Default for StackHash {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(frames: &[u64], truncated: u32) -> [u64; 2] {
        let hash = frames
            .iter()
            .fold(StackHash::new(), |hash, frame| hash.add(*frame));
        hash.finish(frames.len() as u32, truncated)
    }

    #[test]
    fn layouts_are_the_same_on_both_sides() {
        assert_eq!(size_of::<StackKey>(), 24);
        assert_eq!(size_of::<Several>(), 4 * (MAX_SEVERAL + 3));
        assert_eq!(size_of::<Stack>(), 8 + 8 * MAX_FRAMES);
        assert_eq!(size_of::<Scratch>(), 16 + 8 * MAX_FRAMES);
    }

    #[test]
    fn a_cookie_keeps_the_site_in_its_low_half() {
        assert_eq!(Cookie::new(Role::Registered, 7).0, 7);
        assert_eq!(Cookie::new(Role::Registered, u32::MAX).0, u32::MAX.into());
        let cookie = Cookie::new(Role::Run, 9).single_stepped();
        assert_eq!((cookie.role(), cookie.number()), (5, 9));
        assert!(cookie.is_single_stepped());
    }

    #[test]
    fn stacks_that_differ_hash_differently() {
        let mut full = [0x40_1000; MAX_FRAMES];
        let mut stacks = [
            hash(&[], 0),
            hash(&[0], 0),
            hash(&[0, 0], 0),
            hash(&[0, 0], 1),
            hash(&[1, 2], 0),
            hash(&[2, 1], 0),
            hash(&full, 0),
            [0; 2],
        ];
        full[MAX_FRAMES - 1] += 1;
        stacks[7] = hash(&full, 0);
        for (index, one) in stacks.iter().enumerate() {
            for other in &stacks[index + 1..] {
                assert!(one[0] != other[0] && one[1] != other[1]);
            }
        }
    }
}
