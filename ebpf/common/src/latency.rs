//! How times are kept: log-linear buckets.

/// How many buckets an octave has, from 128 ns on; below, each nanosecond has its own. The middle
/// of a bucket is at most 1/128 from any time in it.
const BUCKETS: u64 = 64;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Time {
    /// From the registering call to the record being there.
    Register = 0,
    /// From the deferred call to its return.
    Call = 1,
    /// From registered to the deferred call.
    Held = 2,
}

impl Time {
    /// How many there are.
    pub const COUNT: u32 = 3;
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Register, Self::Call, Self::Held];
}

/// The bucket of a time in nanoseconds.
#[inline(always)]
pub const fn bucket(ns: u64) -> u32 {
    if ns < 2 * BUCKETS {
        return ns as u32;
    }
    let octave = 63 - ns.leading_zeros() as u64; // at least 7
    let place = ns >> (octave - 6); // 64 to 127
    ((octave - 6) * BUCKETS + place) as u32
}

/// The first time of a bucket and how many nanoseconds it is wide.
pub const fn bounds(bucket: u32) -> (u64, u64) {
    let bucket = bucket as u64;
    if bucket < 2 * BUCKETS {
        return (bucket, 1);
    }
    let octave = bucket / BUCKETS - 1; // over 64 ns
    let place = bucket % BUCKETS + BUCKETS;
    (place << octave, 1 << octave)
}

/// The key of a bucket's count in the map `BUCKETS`.
#[inline(always)]
pub const fn key(site: u32, time: Time, bucket: u32) -> u64 {
    (site as u64) << 32 | (time as u64) << 24 | bucket as u64
}

/// What a key of the map `BUCKETS` counts: the site, the number of the [`Time`], the bucket.
pub const fn parts(key: u64) -> (u32, u32, u32) {
    (
        (key >> 32) as u32,
        (key >> 24) as u32 & 0xff,
        key as u32 & 0xff_ffff,
    )
}

/// What something in flight is called: the key of the map `IN_FLIGHT`. Everything in it survives
/// that a goroutine changes threads and that its stack moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct InFlightKey {
    /// The goroutine, or the record if that is on the heap.
    pub owner: u64,
    /// From SP in the frame up to the stack's high end; 0 for a heap record.
    pub depth: u64,
    /// The site of what is held, [`CALL`] for a deferred call, [`RECORD`] for a heap record.
    pub what: u64,
}

/// In [`InFlightKey::what`]: a deferred call that a frame has made.
pub const CALL: u64 = u64::MAX;
/// In [`InFlightKey::what`]: a record on the heap.
pub const RECORD: u64 = u64::MAX - 1;

/// When something started: a value of the map `IN_FLIGHT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct InFlight {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// What hits had cost the goroutine until then, in nanoseconds.
    pub tax: u64,
    /// [`Goroutine::epoch`] then.
    pub epoch: u64,
    /// The site.
    pub site: u64,
}

/// What is known of a goroutine: a value of the map `GOROUTINES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Goroutine {
    /// When it was first seen. Another value: the entry had made room and was made again.
    pub epoch: u64,
    /// What hits have cost it, in nanoseconds.
    pub tax: u64,
    /// When a call that registers a record began, and the tax then.
    pub registering: [u64; 2],
    /// The site of that call and 1; 0 if there is none.
    pub registering_site: u64,
    /// When panics or Goexit ran deferred calls, and the depth of the frames whose they were, by
    /// depth. What is deeper than a later one is of no interest any more; time 0 is an empty place.
    pub unwound: [[u64; 2]; UNWOUND],
}

/// How many places there are in [`Goroutine::unwound`].
pub const UNWOUND: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_lies_in_its_bucket_and_near_its_middle() {
        let mut times: std::vec::Vec<u64> = (0..5000).collect();
        times.extend((7..63).flat_map(|bit| {
            let power = 1u64 << bit;
            [power - 1, power, power + 1, power + power / 3]
        }));
        for ns in times {
            let (first, width) = bounds(bucket(ns));
            assert!(first <= ns && ns < first + width, "{ns}: {first} + {width}");
            let middle = first + width / 2;
            assert!(middle.abs_diff(ns) <= ns / 64, "{ns}: {middle}");
        }
        assert!(bucket(u64::MAX) < 1 << 24);
    }

    #[test]
    fn buckets_follow_one_another() {
        for at in 0..3000 {
            let (first, width) = bounds(at);
            assert_eq!(bounds(at + 1).0, first + width);
        }
    }

    #[test]
    fn a_key_has_its_parts() {
        assert_eq!(parts(key(7, Time::Held, 3000)), (7, 2, 3000));
    }
}
