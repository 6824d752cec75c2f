//! Probes that share an instruction, where only the address tells probes apart: each instruction is
//! probed and counted once, and its counts go to all of its sites.

use std::collections::HashMap;

use deferprof_symbols::Probe;

use crate::engine::{Counts, StackCount};

/// The instructions of a request, and the sites that each stands for.
#[derive(Debug)]
pub(super) struct Groups {
    /// A probe for each instruction; its site is its index here.
    pub(super) probes: Vec<Probe>,
    /// By index of `probes`.
    sites_of: Vec<Vec<u32>>,
    sites: usize,
}

impl Groups {
    pub(super) fn new(probes: &[Probe], sites: u32) -> Self {
        let mut groups = Self {
            probes: Vec::new(),
            sites_of: Vec::new(),
            sites: sites as usize,
        };
        let mut by_offset = HashMap::new();
        for probe in probes {
            let index = *by_offset.entry(probe.offset.0).or_insert_with(|| {
                let index = groups.probes.len();
                groups.sites_of.push(Vec::new());
                groups.probes.push(Probe {
                    offset: probe.offset,
                    site: index as u32,
                });
                index
            });
            if let Some(sites) = groups.sites_of.get_mut(index) {
                sites.push(probe.site);
            }
        }
        groups
    }

    /// Counts by site out of counts by instruction.
    pub(super) fn spread(&self, counts: Counts) -> Counts {
        let by_site = |by_group: &[u64]| {
            let mut by_site = vec![0; self.sites];
            for (sites, count) in self.sites_of.iter().zip(by_group) {
                for site in sites {
                    if let Some(total) = by_site.get_mut(*site as usize) {
                        *total += count;
                    }
                }
            }
            by_site
        };
        let stacks = counts.stacks.iter().flat_map(|stack| {
            let sites = self.sites_of.get(stack.site as usize);
            sites.into_iter().flatten().map(|site| StackCount {
                site: *site,
                ..stack.clone()
            })
        });
        Counts {
            registered: by_site(&counts.registered),
            stacks: stacks.collect(),
            stacks_lost: match counts.stacks_lost.as_slice() {
                [] => Vec::new(),
                lost => by_site(lost),
            },
            ..counts
        }
    }
}

#[cfg(test)]
mod tests {
    use deferprof_symbols::FileOffset;

    use super::*;

    #[test]
    fn an_instruction_of_two_sites_counts_for_both() {
        let probe = |offset, site| Probe {
            offset: FileOffset(offset),
            site,
        };
        let groups = Groups::new(&[probe(8, 0), probe(16, 1), probe(8, 2), probe(24, 1)], 4);
        assert_eq!(groups.probes, [probe(8, 0), probe(16, 1), probe(24, 2)]);
        let stack = StackCount {
            site: 0,
            frames: vec![1],
            truncated: false,
            registered: 5,
        };
        let counts = groups.spread(Counts {
            registered: vec![5, 7, 11],
            hits: 23,
            stacks: vec![stack],
            ..Counts::default()
        });
        assert_eq!(counts.registered, [5, 18, 5, 0]);
        assert_eq!(counts.hits, 23);
        let sites: Vec<_> = counts.stacks.iter().map(|stack| stack.site).collect();
        assert_eq!(sites, [0, 2]);
        assert!(counts.stacks_lost.is_empty());
    }
}
