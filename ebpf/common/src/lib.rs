//! The types that deferprof and its eBPF programs share. Plain data, no dependencies: it compiles
//! for `bpfel-unknown-none` and for the host.
#![no_std]
#![forbid(unsafe_code)]

pub mod pool;

/// How many frames of a user stack are kept: as many as the kernel's own walk keeps unless told
/// otherwise (PERF_MAX_STACK_DEPTH, include/uapi/linux/perf_event.h).
pub const MAX_FRAMES: usize = 127;

/// How many threads on one CPU can be in the middle of taking a stack at the same time. Kernels
/// from 6.0 on let a program be preempted by another thread, so one buffer a CPU is not enough.
pub const SCRATCH_SLOTS: u32 = 4;

/// The names of the programs, the maps and the variables in the object: both sides must agree.
pub mod name {
    /// The program that counts.
    pub const COUNT: &str = "count";
    /// The program that counts and takes stacks.
    pub const COUNT_STACKS: &str = "count_stacks";
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
    /// The program on the runtime's rare paths.
    pub const POOL_PROGRAM: &str = "pool";
    /// By number in the cookie: the probe ([`PoolPoint`](crate::pool::PoolPoint)).
    pub const POOL_POINTS: &str = "POOL_POINTS";
    /// By return address as linked (`u64`): the site (`u32`).
    pub const POOL_SITES: &str = "POOL_SITES";
    /// Per CPU, by site and [`PoolOutcome`](crate::pool::PoolOutcome): how often (`u64`).
    pub const POOL: &str = "POOL";
    /// Per CPU, by [`PoolTotal`](crate::pool::PoolTotal): how often (`u64`).
    pub const POOL_TOTALS: &str = "POOL_TOTALS";
    /// The thread group that is counted, as the namespace that was chosen numbers it (`u32`).
    pub const TGID: &str = "TGID";
    /// Inode of the pid namespace in which `TGID` counts, 0 for the initial one (`u64`).
    pub const PIDNS_INODE: &str = "PIDNS_INODE";
    /// Device of the pid namespace's file (`u64`).
    pub const PIDNS_DEVICE: &str = "PIDNS_DEVICE";
    /// 1 if the program can be preempted by another thread of the target (`u32`).
    pub const PREEMPTIBLE: &str = "PREEMPTIBLE";
}

/// What a probe asks: the high half of its cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Role {
    /// A defer statement executed.
    Registered = 0,
    /// The runtime goes a rare path with a record. The low half is not a site but the index of
    /// a [`PoolPoint`](pool::PoolPoint).
    Pool = 1,
}

/// The 64 bits that say which probe was hit: the kernel hands them to the program (Linux 5.15), or
/// the program finds them by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(pub u64);

impl Cookie {
    /// The cookie of a probe.
    pub const fn new(role: Role, site: u32) -> Self {
        Self(((role as u64) << 32) | site as u64)
    }
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
}

impl Event {
    /// How many kinds there are.
    pub const COUNT: u32 = 5;
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
        assert_eq!(size_of::<Stack>(), 8 + 8 * MAX_FRAMES);
        assert_eq!(size_of::<Scratch>(), 16 + 8 * MAX_FRAMES);
    }

    #[test]
    fn a_cookie_keeps_the_site_in_its_low_half() {
        assert_eq!(Cookie::new(Role::Registered, 7).0, 7);
        assert_eq!(Cookie::new(Role::Registered, u32::MAX).0, u32::MAX.into());
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
