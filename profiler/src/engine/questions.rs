//! From the facts of a binary to what an engine is asked about it.

use std::{num::NonZeroU32, os::fd::BorrowedFd};

use deferprof_symbols::{
    Architecture, Binary, Entered, Mechanism, PoolProbes, Probe, ProbePoint, RunProbes, Site,
    VirtualAddress,
};
use nix::unistd::Pid;

use super::{
    ExitProbe, InstructionCost, LatencyRequest, LinkChoice, More, Request, RunRequest, Taxes,
};

/// Everything that can be asked about the sites of one binary: owned, for requests to borrow from.
#[derive(Debug)]
pub struct Questions {
    probes: Vec<Probe>,
    costs: Vec<InstructionCost>,
    takes_record: Vec<bool>,
    returns: Vec<(VirtualAddress, u32)>,
    pool: Option<PoolProbes>,
    runs: Option<Runs>,
}

#[derive(Debug)]
struct Runs {
    probes: RunProbes,
    exits: Vec<ExitProbe>,
    entries: Vec<Entered>,
    /// By site: whether there is an exit that cannot be probed.
    blind: Vec<bool>,
}

impl Questions {
    /// About how often `sites` register; they are numbered by their place in that slice.
    pub fn new(binary: &Binary<'_>, sites: &[Site]) -> Self {
        let numbered = || (0u32..).zip(sites);
        Self {
            probes: numbered()
                .map(|(number, site)| Probe {
                    offset: site.registration.offset,
                    site: number,
                })
                .collect(),
            costs: sites
                .iter()
                .map(|site| InstructionCost::of(&site.registration))
                .collect(),
            takes_record: sites.iter().map(takes_record).collect(),
            returns: returns(binary.architecture(), sites),
            pool: None,
            runs: None,
        }
    }

    /// Also where records came from.
    ///
    /// # Errors
    ///
    /// Why this binary does not tell: a sentence.
    pub fn ask_pool(&mut self, binary: &Binary<'_>) -> Result<(), String> {
        let why = |why| format!("pool outcomes are not measured: {why}");
        self.pool = Some(binary.pool_probes().map_err(why)?);
        Ok(())
    }

    /// Also when deferred calls are made.
    ///
    /// # Errors
    ///
    /// Why this binary does not tell: a sentence.
    pub fn ask_runs(&mut self, binary: &Binary<'_>, sites: &[Site]) -> Result<(), String> {
        let why = |why| format!("deferred calls are not counted: {why}");
        let probes = binary.run_probes(sites).map_err(why)?;
        let probe = |point: ProbePoint| (point.offset, InstructionCost::of(&point));
        let exits = (0u32..).zip(sites).flat_map(|(number, site)| {
            site.exits.iter().map(move |exit| ExitProbe {
                start: exit.start.filter(|_| exit.entered.is_none()).map(probe),
                end: exit.end.map(probe),
                site: number,
            })
        });
        let mut entries: Vec<Entered> = sites
            .iter()
            .flat_map(|site| site.exits.iter().filter_map(|exit| exit.entered))
            .collect();
        entries.sort_by_key(|entered| entered.point.address);
        entries.dedup();
        let blind = |site: &Site| {
            let mut exits = site.exits.iter();
            exits.any(|exit| exit.start.is_none() && exit.entered.is_none())
        };
        self.runs = Some(Runs {
            probes,
            exits: exits.collect(),
            entries,
            blind: sites.iter().map(blind).collect(),
        });
        Ok(())
    }

    /// Whether more is asked than how often sites register.
    pub fn asks_more(&self) -> bool {
        self.pool.is_some() || self.runs.is_some()
    }

    /// Whether it is asked when deferred calls are made.
    pub fn asks_runs(&self) -> bool {
        self.runs.is_some()
    }

    /// Whether all deferred calls of a site can be seen.
    pub fn sees_runs(&self, site: usize) -> bool {
        let runs = self.runs.as_ref();
        runs.is_some_and(|runs| runs.blind.get(site) == Some(&false))
    }

    /// The request to an engine. `taxes` are what hits cost if times are to be measured.
    pub fn request<'a>(
        &'a self,
        executable: BorrowedFd<'a>,
        pid: Pid,
        stacks: Option<NonZeroU32>,
        link: LinkChoice,
        taxes: Option<Taxes>,
    ) -> Request<'a> {
        Request {
            executable,
            pid,
            probes: &self.probes,
            sites: u32::try_from(self.probes.len()).unwrap_or(u32::MAX),
            sites_cost: &self.costs,
            stacks,
            link,
            more: More {
                returns: &self.returns,
                pool: self.pool.as_ref(),
                runs: self.runs.as_ref().map(|runs| RunRequest {
                    probes: Some(&runs.probes),
                    exits: &runs.exits,
                    entries: &runs.entries,
                }),
                latency: taxes.map(|taxes| LatencyRequest {
                    takes_record: &self.takes_record,
                    taxes,
                }),
            },
        }
    }
}

/// Whether a site's records come from the deferpool.
pub(crate) fn takes_record(site: &Site) -> bool {
    matches!(site.mechanism, Mechanism::Heap | Mechanism::RangeFunc)
}

/// Where each site's calls return to, as linked, and the site: those of the runtime that register,
/// and exit code's calls of functions whose entry is probed.
fn returns(architecture: Architecture, sites: &[Site]) -> Vec<(VirtualAddress, u32)> {
    let call = match architecture {
        Architecture::Amd64 => 5,
        Architecture::Arm64 => 4,
    };
    let mut returns = Vec::new();
    for (number, site) in (0u32..).zip(sites) {
        if site.mechanism != Mechanism::OpenCoded {
            let behind = site.pc.0.checked_add(call);
            returns.extend(behind.map(|behind| (VirtualAddress(behind), number)));
        }
        let entered = site.exits.iter().filter(|exit| exit.entered.is_some());
        returns.extend(entered.map(|exit| (exit.returns_to, number)));
    }
    returns
}
