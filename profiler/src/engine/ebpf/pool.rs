//! Where heap records came from: what the program on the runtime's rare paths is told, and what it
//! has counted. Kernel side: ebpf/src/pool.rs.

use std::{collections::HashMap, io};

use deferprof_ebpf_common::{
    name,
    pool::{
        MAX_CALLERS, PoolCaller, PoolEvent as Seen, PoolOffsets, PoolOutcome, PoolPoint, PoolTotal,
    },
};
use deferprof_symbols::{Caller, LocalPool, PoolEvent, PoolProbe, PoolProbes};

use super::{
    counters::per_cpu_array,
    object::{map, take},
    sys::Map,
};
use crate::engine::{EngineError, PoolCounts};

/// Tells the program what its probes stand on.
pub(super) fn fill(
    maps: &HashMap<&'static str, Map>,
    pool: &PoolProbes,
) -> Result<(), EngineError> {
    let points = map(maps, name::POOL_POINTS)?;
    for (number, probe) in (0u32..).zip(&pool.probes) {
        let point = bytes(&point(probe, &pool.local));
        points
            .update(&number.to_ne_bytes(), point)
            .map_err(|error| {
                EngineError::system("tell the eBPF program about the deferpool", error)
            })?;
    }
    Ok(())
}

fn point(probe: &PoolProbe, local: &LocalPool) -> PoolPoint {
    let mut callers = [PoolCaller::default(); MAX_CALLERS];
    for (to, from) in callers.iter_mut().zip(&probe.callers) {
        *to = match *from {
            Caller::Site(site) => PoolCaller {
                used: 1,
                returns_to: 0,
                via: 0,
                site,
            },
            Caller::Through {
                via,
                returns_to,
                site,
            } => PoolCaller {
                used: 1,
                returns_to: returns_to.0,
                via,
                site,
            },
        };
    }
    PoolPoint {
        address: probe.point.address.0,
        event: match probe.event {
            PoolEvent::Asked => Seen::Asked,
            PoolEvent::Miss => Seen::Miss,
            PoolEvent::Spill => Seen::Spill,
        } as u64,
        callers,
        local: PoolOffsets {
            m: local.m,
            p: local.p,
            pool: local.pool,
            capacity: local.capacity,
        },
    }
}

/// A [`PoolPoint`] as the map holds it: words in order of its fields.
fn bytes(point: &PoolPoint) -> Vec<u8> {
    let callers = point
        .callers
        .iter()
        .flat_map(|c| [c.used, c.returns_to, c.via, c.site]);
    let local = &point.local;
    [point.address, point.event]
        .into_iter()
        .chain(callers)
        .chain([local.m, local.p, local.pool, local.capacity])
        .flat_map(u64::to_ne_bytes)
        .collect()
}

/// The maps that the program counts in.
#[derive(Debug)]
pub(super) struct PoolCounters {
    sites: Map,
    totals: Map,
    count: u32,
}

impl PoolCounters {
    /// Takes over the maps.
    pub(super) fn new(
        maps: &mut HashMap<&'static str, Map>,
        sites: u32,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            sites: take(maps, name::POOL)?,
            totals: take(maps, name::POOL_TOTALS)?,
            count: sites,
        })
    }

    /// Reads all of them. `missed` is how often the kernel left out the program.
    pub(super) fn read(&self, missed: u64) -> io::Result<PoolCounts> {
        let outcomes = self.count.saturating_mul(PoolOutcome::COUNT);
        let outcomes = per_cpu_array(&self.sites, outcomes)?;
        let of = |outcome: PoolOutcome| {
            let (per_site, _) = outcomes.as_chunks::<{ PoolOutcome::COUNT as usize }>();
            per_site.iter().map(|site| site[outcome as usize]).collect()
        };
        let totals = per_cpu_array(&self.totals, PoolTotal::COUNT)?;
        let total = |which: PoolTotal| totals.get(which as usize).copied().unwrap_or(0);
        Ok(PoolCounts {
            refill: of(PoolOutcome::Refill),
            miss: of(PoolOutcome::Miss),
            all_refills: total(PoolTotal::Refill),
            all_misses: total(PoolTotal::Miss),
            all_spills: total(PoolTotal::Spill),
            empty: total(PoolTotal::Empty),
            bad_pool: total(PoolTotal::BadPool),
            bad_stack: total(PoolTotal::BadStack),
            missed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_laid_out_as_the_program_reads_it() {
        let mut point = PoolPoint {
            address: 1,
            event: 2,
            ..PoolPoint::default()
        };
        point.callers[1].site = 3;
        point.local.capacity = 32;
        let bytes = bytes(&point);
        assert_eq!(bytes.len(), size_of::<PoolPoint>());
        let word =
            |offset: usize| u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap());
        use std::mem::offset_of;
        assert_eq!(word(offset_of!(PoolPoint, address)), 1);
        assert_eq!(word(offset_of!(PoolPoint, event)), 2);
        let second = offset_of!(PoolPoint, callers) + size_of::<PoolCaller>();
        assert_eq!(word(second + offset_of!(PoolCaller, site)), 3);
        let local = offset_of!(PoolPoint, local);
        assert_eq!(word(local + offset_of!(PoolOffsets, capacity)), 32);
    }
}
