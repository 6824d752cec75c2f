//! What the programs have counted, read out of their maps.

use std::{collections::HashMap, io, os::fd::BorrowedFd};

use deferprof_ebpf_common::{Event, MAX_FRAMES, name};

use super::{
    latency::LatencyCounters,
    object::take,
    pool::PoolCounters,
    run::RunCounters,
    sys::{self, Map},
};
use crate::engine::{Counts, EngineError, Loss, StackCount};

/// The maps of one session.
#[derive(Debug)]
pub(super) struct Counters {
    registered: Map,
    events: Map,
    stacks: Option<Stacks>,
    pool: Option<PoolCounters>,
    runs: RunCounters,
    wants_runs: bool,
    latency: Option<LatencyCounters>,
    sites: u32,
}

/// What is to be read beside the registrations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) stacks: bool,
    pub(super) pool: bool,
    pub(super) runs: bool,
    pub(super) latency: bool,
}

#[derive(Debug)]
struct Stacks {
    frames: Map,
    counts: Map,
    lost: Map,
    // The rest of the maps live as long as the program that uses them.
}

impl Counters {
    /// Takes over the maps that were made for the program.
    pub(super) fn new(
        mut maps: HashMap<&'static str, Map>,
        sites: u32,
        wanted: Wanted,
    ) -> Result<Self, EngineError> {
        let maps = &mut maps;
        Ok(Self {
            registered: take(maps, name::REGISTERED)?,
            events: take(maps, name::EVENTS)?,
            stacks: match wanted.stacks {
                true => Some(Stacks {
                    frames: take(maps, name::STACKS)?,
                    counts: take(maps, name::STACK_COUNTS)?,
                    lost: take(maps, name::STACKS_LOST)?,
                }),
                false => None,
            },
            pool: match wanted.pool {
                true => Some(PoolCounters::new(maps, sites)?),
                false => None,
            },
            runs: RunCounters::new(maps, sites)?,
            wants_runs: wanted.runs,
            latency: match wanted.latency {
                true => Some(LatencyCounters::new(maps, sites)?),
                false => None,
            },
            sites,
        })
    }

    /// How often all sites registered.
    pub(super) fn registered(&self) -> Result<u64, EngineError> {
        per_cpu_array(&self.registered, self.sites)
            .map(|registered| registered.iter().sum())
            .map_err(|error| EngineError::system("read the eBPF counters", error))
    }

    /// Reads all of them, the stacks first, and how often the kernel left out `program`.
    pub(super) fn read(&self, program: BorrowedFd<'_>) -> Result<Counts, EngineError> {
        let read = || -> io::Result<Counts> {
            let mut counts = Counts::default();
            if let Some(stacks) = &self.stacks {
                counts.stacks = stacks.read()?;
                counts.stacks_lost = per_cpu_array(&stacks.lost, self.sites)?;
            }
            counts.registered = per_cpu_array(&self.registered, self.sites)?;
            let events = per_cpu_array(&self.events, Event::COUNT)?;
            let event = |event: Event| events.get(event as usize).copied().unwrap_or(0);
            counts.loss = Loss {
                foreign: event(Event::Foreign),
                unknown_site: event(Event::BadCookie),
                missed: sys::recursion_misses(program)?,
                stacks_full: event(Event::StacksFull) + event(Event::StackCountsFull),
                stack_busy: event(Event::ScratchBusy),
            };
            counts.single_stepped = event(Event::SingleStepped);
            counts.hits = event(Event::Emulated) + counts.single_stepped;
            if let Some(pool) = &self.pool {
                counts.pool = Some(pool.read(counts.loss.missed)?);
            }
            if self.wants_runs {
                counts.runs = Some(self.runs.read()?);
            }
            if let Some(latency) = &self.latency {
                counts.latency = Some(latency.read(&self.runs.totals()?)?);
            }
            Ok(counts)
        };
        read().map_err(|error| EngineError::system("read the eBPF counters", error))
    }
}

impl Stacks {
    fn read(&self) -> io::Result<Vec<StackCount>> {
        let mut stacks = Vec::new();
        let mut key = [0; size_of::<deferprof_ebpf_common::StackKey>()];
        let mut next = key;
        let mut first = true;
        let mut per_cpu = vec![0; self.counts.value_size()];
        // No entry is ever removed, so the walk neither starts over nor skips one that was there.
        while self.counts.next_key((!first).then_some(&key), &mut next)? {
            key = next;
            first = false;
            if !self.counts.lookup_into(&key, &mut per_cpu)? {
                continue;
            }
            let registered = words(&per_cpu).sum();
            let (hash, site) = key.split_at(16);
            // Between the entry's making and the first hit's count there is a moment.
            if registered == 0 {
                continue;
            }
            // A stack is stored before it is counted.
            let Some(stack) = self.frames.lookup(hash)? else {
                continue;
            };
            let mut words_of_stack = words(&stack);
            // Two u32: the kernel side is little-endian, as are the hosts that it is built for.
            let head = words_of_stack.next().unwrap_or(0);
            let length = (head as u32 as usize).min(MAX_FRAMES);
            let frames: Vec<_> = words_of_stack.take(length).collect();
            stacks.push(StackCount {
                site: words(site).next().unwrap_or(0) as u32,
                truncated: head >> 32 != 0,
                frames,
                registered,
            });
        }
        Ok(stacks)
    }
}

/// The first `length` sums of a per-CPU array of `u64`.
pub(super) fn per_cpu_array(map: &Map, length: u32) -> io::Result<Vec<u64>> {
    let mut per_cpu = vec![0; map.value_size()];
    (0..length)
        .map(|index| {
            map.lookup_into(&index.to_ne_bytes(), &mut per_cpu)?;
            Ok(words(&per_cpu).sum())
        })
        .collect()
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_in_the_machines_order() {
        let bytes: Vec<u8> = [1_u64, u64::MAX]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert_eq!(words(&bytes).collect::<Vec<_>>(), [1, u64::MAX]);
        assert_eq!(words(&bytes[..15]).count(), 1);
    }
}
