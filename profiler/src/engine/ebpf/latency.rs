//! Times, read out of the program's buckets. Kernel side: ebpf/src/latency.rs.

use std::{collections::HashMap, io};

use deferprof_ebpf_common::{
    latency::{Time, parts},
    name,
    run::RunTotal,
};

use super::{counters::per_cpu_array, object::take, run::Totals, sys::Map};
use crate::engine::{Distribution, EngineError, LatencyCounts, Times};

/// How many goroutines are known at once: 10 MB in the kernel.
pub(super) const GOROUTINES: u32 = 64 * 1024;
/// How many defers may be held, or called, at once: 16 MB in the kernel.
pub(super) const IN_FLIGHT: u32 = 128 * 1024;
/// How many buckets there may be of all sites together: 8 MB in the kernel. A site with spread out
/// times takes some hundreds.
pub(super) const BUCKETS: u32 = 128 * 1024;

/// The maps that the program counts in.
#[derive(Debug)]
pub(super) struct LatencyCounters {
    buckets: Map,
    sums: Map,
    in_flight: Map,
    sites: u32,
}

impl LatencyCounters {
    /// Takes over the maps.
    pub(super) fn new(
        maps: &mut HashMap<&'static str, Map>,
        sites: u32,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            buckets: take(maps, name::BUCKETS)?,
            sums: take(maps, name::SUMS)?,
            in_flight: take(maps, name::IN_FLIGHT)?,
            sites,
        })
    }

    /// Reads all of them.
    pub(super) fn read(&self, totals: &Totals) -> io::Result<LatencyCounts> {
        let sums = per_cpu_array(&self.sums, self.sites.saturating_mul(Time::COUNT))?;
        let (sums, _) = sums.as_chunks::<{ Time::COUNT as usize }>();
        let mut buckets: HashMap<(u32, u32), Vec<(u32, u64)>> = HashMap::new();
        let (mut key, mut next) = ([0; 8], [0; 8]);
        let mut value = [0; 8];
        let mut first = true;
        // No entry is ever removed, so the walk neither starts over nor skips one that was there.
        while self.buckets.next_key((!first).then_some(&key), &mut next)? {
            key = next;
            first = false;
            if self.buckets.lookup_into(&key, &mut value)? {
                let (site, time, bucket) = parts(u64::from_ne_bytes(key));
                let count = u64::from_ne_bytes(value);
                buckets
                    .entry((site, time))
                    .or_default()
                    .push((bucket, count));
            }
        }
        let mut distribution = |site: u32, time: Time, sum: u64| {
            let buckets = buckets.remove(&(site, time as u32)).unwrap_or_default();
            Distribution::new(buckets, sum)
        };
        let sites = (0u32..).zip(sums).map(|(site, sums)| {
            let mut of = |time: Time| distribution(site, time, sums[time as usize]);
            Times {
                register: of(Time::Register),
                call: of(Time::Call),
                held: of(Time::Held),
            }
        });
        Ok(LatencyCounts {
            sites: sites.collect(),
            in_flight_full: totals.get(RunTotal::InFlightFull),
            unmatched: totals.get(RunTotal::Unmatched),
            evicted: totals.get(RunTotal::Evicted),
            buckets_full: totals.get(RunTotal::BucketsFull),
            unwound: totals.get(RunTotal::Unwound),
            in_flight: self.in_flight()?,
        })
    }

    /// How much is in flight. Entries come and go meanwhile, so while the target runs it is a guess
    /// that is bounded by the map's size.
    fn in_flight(&self) -> io::Result<u64> {
        const KEY: usize = size_of::<deferprof_ebpf_common::latency::InFlightKey>();
        let (mut key, mut next) = ([0; KEY], [0; KEY]);
        let mut count = 0;
        while count < u64::from(IN_FLIGHT)
            && self
                .in_flight
                .next_key((count > 0).then_some(&key), &mut next)?
        {
            key = next;
            count += 1;
        }
        Ok(count)
    }
}
