//! What user space tells the program on the runtime's rare paths, and what that counts.

/// How many ways to a site one probe knows at most.
pub const MAX_CALLERS: usize = 4;

/// A probe on a rare path: an entry of the map `POOL_POINTS`, chosen by the cookie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PoolPoint {
    /// The instruction's address as linked.
    pub address: u64,
    /// A [`PoolEvent`] as a number.
    pub event: u64,
    /// Ways to the site's return address.
    pub callers: [PoolCaller; MAX_CALLERS],
    /// From the goroutine to its P's pool, for [`PoolEvent::Asked`].
    pub local: PoolOffsets,
}

/// A way to the site's return address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PoolCaller {
    /// 1 if this entry is used.
    pub used: u64,
    /// The return address, as linked, that is at `via` if this way was gone; 0 if there is none
    /// between.
    pub returns_to: u64,
    /// Offset from SP of that return address.
    pub via: u64,
    /// Offset from SP of the site's return address.
    pub site: u64,
}

/// Offsets on the way from the goroutine to the local pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PoolOffsets {
    /// `g.m`
    pub m: u64,
    /// `m.p`
    pub p: u64,
    /// `p.deferpool`: a slice, right before the array that it points to.
    pub pool: u64,
    /// What the slice's capacity must be.
    pub capacity: u64,
}

/// What a probe saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum PoolEvent {
    /// The central pool was asked.
    Asked = 0,
    /// A record is about to be allocated.
    Miss = 1,
    /// Records are about to go to the central pool.
    Spill = 2,
}

/// An index into `POOL_TOTALS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PoolTotal {
    /// A local pool was filled from the central pool.
    Refill = 0,
    /// A record was allocated.
    Miss = 1,
    /// Half of a local pool went to the central pool.
    Spill = 2,
    /// The central pool was asked and had nothing left; a miss follows.
    Empty = 3,
    /// The local pool was not what it must be: refills cannot be told.
    BadPool = 4,
    /// A stack could not be read: a site's outcome may be missing.
    BadStack = 5,
}

impl PoolTotal {
    /// How many there are.
    pub const COUNT: u32 = 6;
}

/// The outcomes counted by site: an index into `POOL` is `site * 2 + outcome`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PoolOutcome {
    /// Served after the local pool was filled.
    Refill = 0,
    /// Allocated.
    Miss = 1,
}

impl PoolOutcome {
    /// How many are counted for a site.
    pub const COUNT: u32 = 2;
}
