//! What user space tells the program about deferred calls, and what that counts.

/// How many loops of the runtime one probe can be in.
pub const MAX_RUNNERS: usize = 4;

/// How many open-coded defers a function can have.
pub const MAX_BITS: usize = 8;

/// In [`OpenFrame::sites`]: the site is not watched.
pub const NO_SITE: u32 = u32::MAX;

/// A probe in the runtime: an entry of the map `RUN_POINTS`, chosen by the cookie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RunPoint {
    /// The instruction's address as linked.
    pub address: u64,
    /// A [`RunEvent`] as a number.
    pub event: u64,
    /// For [`RunEvent::Record`]: 1 if the record is in the first argument register, 0 if at the head
    /// of the goroutine's list.
    pub in_argument: u64,
    /// For [`RunEvent::Taken`] and [`RunEvent::Entered`]: offset from SP of the return address that
    /// names the site.
    pub site: u64,
    /// For [`RunEvent::Taken`]: 1 if the record will not name its site when it is run.
    pub keeps: u64,
    /// For [`RunEvent::Record`]: offset from SP of the closure, which is not called if it is nil, or
    /// [`RunPoint::NO_CLOSURE`].
    pub closure: u64,
    /// The loops that it can be in; the unused ones have a `path` of [`RunPath::NONE`].
    pub runners: [Runner; MAX_RUNNERS],
}

impl RunPoint {
    /// In [`closure`](Self::closure): it is not nil.
    pub const NO_CLOSURE: u64 = u64::MAX;
}

/// A loop that makes deferred calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Runner {
    /// A [`RunPath`] as a number, or [`RunPath::NONE`] or [`RunPath::ASK`].
    pub path: u64,
    /// The return address, as linked, at `via` if it is this loop; 0 if the probe is in the loop.
    pub returns_to: u64,
    /// Offset from SP of that return address.
    pub via: u64,
    /// From SP at the probe to SP in the loop.
    pub frame: u64,
    /// From SP at the probe to the loop's `_panic`.
    pub panic: u64,
}

impl Default for Runner {
    fn default() -> Self {
        Self {
            path: RunPath::NONE,
            returns_to: 0,
            via: 0,
            frame: 0,
            panic: 0,
        }
    }
}

/// What a probe saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum RunEvent {
    /// A record's call is about to be made.
    Record = 0,
    /// The call of an open-coded frame's highest bit is about to be made.
    Frame = 1,
    /// A call that a loop made has returned.
    Returned = 2,
    /// A registering function has got its record.
    Taken = 3,
    /// A panic starts.
    Panicked = 4,
    /// A panic was recovered.
    Recovered = 5,
    /// A function was entered that exit code calls.
    Entered = 6,
}

/// How control came to a deferred call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum RunPath {
    /// The function returns.
    Return = 0,
    /// The goroutine panics.
    Panic = 1,
    /// The goroutine ends by `runtime.Goexit`.
    Goexit = 2,
}

impl RunPath {
    /// How many there are.
    pub const COUNT: u32 = 3;
    /// No loop.
    pub const NONE: u64 = 3;
    /// The record's `_panic` says it.
    pub const ASK: u64 = 4;
}

/// Where the runtime keeps what the programs look at: the entry of the map `RUN_LAYOUT`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RunLayout {
    /// 1 if frames are run through artificial records (up to 1.21).
    pub by_records: u64,
    /// `_defer.openDefer`
    pub open: u64,
    /// `_defer._panic`
    pub record_panic: u64,
    /// `_defer.varp`
    pub varp: u64,
    /// `_panic.goexit`
    pub goexit: u64,
    /// `_panic.retpc`
    pub retpc: u64,
    /// `_panic.deferBitsPtr`
    pub bits: u64,
}

/// A function with open-coded defers: an entry of the map `OPEN_FRAMES`, by the address of its call
/// of deferreturn as linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct OpenFrame {
    /// From the `deferBits` byte up to varp.
    pub bits: u64,
    /// From SP in the function's body up to varp.
    pub depth: u64,
    /// From each bit's slot up to varp.
    pub slots: [u64; MAX_BITS],
    /// Each bit's site, or [`NO_SITE`].
    pub sites: [u32; MAX_BITS],
}

/// An index into `RUN_TOTALS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RunTotal {
    /// Panics that started.
    Panicked = 0,
    /// Panics that were recovered.
    Recovered = 1,
    /// Deferred calls of no site that is watched.
    Unknown = 2,
    /// Deferred calls of which memory could not be read.
    Unreadable = 3,
    /// Records of range-over-func bodies that had no room in `RECORDS`.
    RecordsFull = 4,
    /// Latency: no room for something in flight.
    InFlightFull = 5,
    /// Latency: an end without its start.
    Unmatched = 6,
    /// Latency: what was known of the goroutine made room for others meanwhile.
    Evicted = 7,
    /// Latency: no room for another bucket.
    BucketsFull = 8,
    /// Latency: a call that may have been unwound by a panic, so its end is not certain.
    Unwound = 9,
}

impl RunTotal {
    /// How many there are.
    pub const COUNT: u32 = 10;
}
