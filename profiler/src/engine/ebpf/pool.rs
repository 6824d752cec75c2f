//! Where heap records came from: what the program on the runtime's rare paths is told, and what it
//! has counted. Kernel side: ebpf/src/pool.rs.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use deferprof_ebpf_common::{
    name,
    pool::{
        MAX_CALLERS, PoolCaller, PoolEvent as Seen, PoolOffsets, PoolOutcome, PoolPoint, PoolTotal,
    },
};
use deferprof_symbols::{Caller, LocalPool, PoolEvent, PoolProbe, Probe};

use super::{
    counters::per_cpu_array,
    sys::{self, Map},
};
use crate::engine::{EngineError, PoolCounts, PoolRequest};

/// How large the maps must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) points: u32,
    pub(super) returns: u32,
}

impl Sizes {
    pub(super) fn of(request: &PoolRequest<'_>) -> Self {
        let size = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).max(1);
        Self {
            points: size(request.probes.probes.len()),
            returns: size(request.returns.len()),
        }
    }
}

/// The probes as the links take them: numbered.
pub(super) fn probes(request: &PoolRequest<'_>) -> Vec<Probe> {
    let numbered = (0u32..).zip(&request.probes.probes);
    numbered
        .map(|(number, probe)| Probe {
            offset: probe.point.offset,
            site: number,
        })
        .collect()
}

/// Tells the program what its probes stand on, and which site calls the runtime where.
pub(super) fn fill(
    maps: &HashMap<&'static str, Map>,
    request: &PoolRequest<'_>,
) -> Result<(), EngineError> {
    let (points, sites) = (map(maps, name::POOL_POINTS)?, map(maps, name::POOL_SITES)?);
    let fill = || -> io::Result<()> {
        for (number, probe) in (0u32..).zip(&request.probes.probes) {
            let point = bytes(&point(probe, &request.probes.local));
            points.update(&number.to_ne_bytes(), point)?;
        }
        for (address, site) in request.returns {
            sites.update(&address.0.to_ne_bytes(), site.to_ne_bytes().to_vec())?;
        }
        Ok(())
    };
    fill().map_err(|error| EngineError::system("tell the eBPF programs about the deferpool", error))
}

fn map<'a>(
    maps: &'a HashMap<&'static str, Map>,
    name: &'static str,
) -> Result<&'a Map, EngineError> {
    maps.get(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> EngineError {
    EngineError::Object {
        origin: "of this session".into(),
        reason: format!("it has no map `{name}`"),
    }
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
    program: OwnedFd,
    count: u32,
}

impl PoolCounters {
    /// Takes over the maps that were made for `program`.
    pub(super) fn new(
        maps: &mut HashMap<&'static str, Map>,
        program: OwnedFd,
        sites: u32,
    ) -> Result<Self, EngineError> {
        let mut take = |name| maps.remove(name).ok_or_else(|| missing(name));
        Ok(Self {
            sites: take(name::POOL)?,
            totals: take(name::POOL_TOTALS)?,
            program,
            count: sites,
        })
    }

    /// Reads all of them, and how often the kernel left out the program.
    pub(super) fn read(&self) -> io::Result<PoolCounts> {
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
            missed: sys::recursion_misses(self.program.as_fd())?,
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
