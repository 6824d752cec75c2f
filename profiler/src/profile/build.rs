//! From what an engine measured to a profile.

use std::collections::{BTreeMap, HashMap};

use deferprof_symbols::{Frame, Site, VirtualAddress};

use super::load::Schema;
use super::{
    Engine, Latency, LinkKind, Loss, Overhead, Panics, Pool, Profile, ProfileSite, Ran, Runtime,
    SiteInfo, Stack, StackFrame, Target, Window,
};
use crate::cost::{CostTable, Evidence};

/// What is known after the probes were disarmed: the material of a [`Profile`].
#[derive(Clone, Debug)]
pub struct Recording {
    /// The process.
    pub target: Target,
    /// What made it report hits.
    pub engine: Engine,
    /// How the probes were attached; `None` for an engine without kernel links.
    pub link: Option<LinkKind>,
    /// When.
    pub window: Window,
    /// Every site that was asked for (after `--include` and `--exclude`), in the inventory's
    /// order, with its count: also those that never ran.
    pub sites: Vec<SiteCount>,
    /// The deferpool of the whole process, if it was measured.
    pub runtime: Option<Runtime>,
    /// The panics of the whole process, if they were counted.
    pub panics: Option<Panics>,
    /// Call stacks, or `None` if they were not asked for.
    pub stacks: Option<Vec<RawStack>>,
    /// What the profiler cost the target.
    pub overhead: Option<Overhead>,
    /// What the profiler missed.
    pub loss: Option<Loss>,
    /// What the reader should know, a full sentence each: the inventory's and the engine's.
    pub warnings: Vec<String>,
}

/// A site and how often it registered.
#[derive(Clone, Debug)]
pub struct SiteCount {
    /// The site.
    pub info: SiteInfo,
    /// How often it registered; `None` if it could not be watched.
    pub registered: Option<u64>,
    /// Where its records came from, if that was measured.
    pub pool: Option<Pool>,
    /// How often its deferred call was made, if that was measured.
    pub ran: Option<Ran>,
    /// How many were registered and had not run at the process's end, if that is known.
    pub pending: Option<u64>,
    /// Its times, if they were measured.
    pub latency: Option<Latency>,
}

/// One call stack as an engine saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawStack {
    /// The index of the site in [`Recording::sites`].
    pub site: usize,
    /// Addresses as linked (the load bias taken off): first an instruction in the function with the
    /// defer (the probe's), then return addresses outwards.
    pub addresses: Vec<VirtualAddress>,
    /// How often the site registered on it.
    pub registered: u64,
}

impl SiteCount {
    /// A site of the inventory and how often it registered; `None` if it could not be watched.
    pub fn new(site: &Site, registered: Option<u64>) -> Self {
        Self {
            info: SiteInfo::from(site.clone()),
            registered,
            pool: None,
            ran: None,
            pending: None,
            latency: None,
        }
    }
}

impl Profile {
    /// Makes the profile of a recording: estimates costs and resolves stacks.
    ///
    /// `frames` gives the source frames at an address as linked, innermost first, inlined calls
    /// expanded, as [`deferprof_symbols::Binary::frames`] does; it is asked once for each address,
    /// and with the byte before a return address. Where it knows nothing, the address itself
    /// becomes the function's name. Stacks that become equal are merged; those of a site that
    /// does not exist are left out.
    ///
    /// ```no_run
    /// # use deferprof::profile::{Profile, Recording};
    /// # fn f(recording: Recording, binary: &deferprof_symbols::Binary<'_>) {
    /// let profile = Profile::new(recording, |address| binary.frames(address));
    /// # }
    /// ```
    pub fn new(recording: Recording, frames: impl FnMut(VirtualAddress) -> Vec<Frame>) -> Self {
        let costs = CostTable::builtin().for_release(&recording.target.go_version);
        let sites: Vec<ProfileSite> = recording
            .sites
            .into_iter()
            .map(
                |SiteCount {
                     info,
                     registered,
                     pool,
                     ran,
                     pending,
                     latency,
                 }| {
                    let estimate = registered.and_then(|registered| {
                        costs.estimate(&Evidence {
                            mechanism: info.mechanism,
                            registered,
                            pool,
                            register: latency.and_then(|latency| latency.register),
                        })
                    });
                    ProfileSite {
                        info,
                        registered,
                        ran,
                        pending,
                        pool,
                        latency_ns: latency,
                        estimated: None,
                        cost_ns: estimate.map(|estimate| estimate.cost_ns),
                        saving_ns: estimate.and_then(|estimate| estimate.saving_ns),
                        cost_basis: estimate.map(|estimate| estimate.basis),
                    }
                },
            )
            .collect();

        let mut resolver = Resolver::new(frames);
        let stacks = recording.stacks.map(|raw| {
            resolver
                .resolve(raw)
                .into_iter()
                .filter_map(|((site, locations), registered)| {
                    let site = sites.get(site)?;
                    Some(Stack {
                        site: site.info.id.clone(),
                        frames: resolver.names(&locations),
                        locations: Some(locations),
                        registered,
                        cost_ns: site.share_of_cost(registered),
                    })
                })
                .collect::<Vec<_>>()
        });

        Self {
            schema: Schema::default(),
            target: recording.target,
            engine: recording.engine,
            link: recording.link,
            window: recording.window,
            sites,
            runtime: recording.runtime,
            panics: recording.panics,
            frames: stacks.is_some().then_some(resolver.table),
            stacks,
            overhead: recording.overhead,
            loss: recording.loss,
            warnings: recording.warnings,
        }
    }
}

/// Turns addresses into indices of a table of frames, each address once.
struct Resolver<F> {
    frames: F,
    table: Vec<StackFrame>,
    indices: HashMap<StackFrame, u32>,
    known: HashMap<VirtualAddress, Vec<u32>>,
}

impl<F: FnMut(VirtualAddress) -> Vec<Frame>> Resolver<F> {
    fn new(frames: F) -> Self {
        Self {
            frames,
            table: Vec::new(),
            indices: HashMap::new(),
            known: HashMap::new(),
        }
    }

    /// Counts by site and frames, leaf first; the same for any order of `raw`.
    fn resolve(&mut self, mut raw: Vec<RawStack>) -> BTreeMap<(usize, Vec<u32>), u64> {
        raw.sort_by(|a, b| (a.site, &a.addresses).cmp(&(b.site, &b.addresses)));
        let mut counts = BTreeMap::new();
        for stack in raw {
            let mut locations = Vec::with_capacity(stack.addresses.len());
            for (depth, &address) in stack.addresses.iter().enumerate() {
                let address = match depth {
                    0 => address,
                    _ => VirtualAddress(address.0.saturating_sub(1)),
                };
                locations.extend_from_slice(self.at(address));
            }
            let count: &mut u64 = counts.entry((stack.site, locations)).or_default();
            *count = count.saturating_add(stack.registered);
        }
        counts
    }

    fn names(&self, locations: &[u32]) -> Vec<String> {
        locations
            .iter()
            .filter_map(|&index| self.table.get(index as usize))
            .map(|frame| frame.function.clone())
            .collect()
    }

    fn at(&mut self, address: VirtualAddress) -> &[u32] {
        self.known.entry(address).or_insert_with(|| {
            let frames = (self.frames)(address);
            let last = frames.len().saturating_sub(1);
            let mut chain: Vec<StackFrame> = frames
                .into_iter()
                .enumerate()
                .map(|(i, frame)| StackFrame {
                    function: frame.function,
                    file: (!frame.file.is_empty()).then_some(frame.file),
                    line: (frame.line != 0).then_some(frame.line),
                    start_line: (frame.start_line != 0).then_some(frame.start_line),
                    address: Some(address),
                    inlined: i < last,
                })
                .collect();
            if chain.is_empty() {
                chain.push(StackFrame {
                    function: address.to_string(),
                    file: None,
                    line: None,
                    start_line: None,
                    address: Some(address),
                    inlined: false,
                });
            }
            chain
                .into_iter()
                .map(|frame| {
                    *self.indices.entry(frame).or_insert_with_key(|frame| {
                        self.table.push(frame.clone());
                        u32::try_from(self.table.len() - 1).unwrap_or(u32::MAX)
                    })
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use deferprof_symbols::Mechanism;

    use super::*;

    fn site(id: &str, mechanism: Mechanism, registered: Option<u64>) -> SiteCount {
        SiteCount {
            info: SiteInfo {
                id: id.to_owned(),
                function: "main.f".to_owned(),
                file: "/src/main.go".to_owned(),
                line: Some(3),
                pc: VirtualAddress(0x1000),
                mechanism,
                reason: None,
                callee: None,
                bit: None,
            },
            registered,
            pool: None,
            ran: None,
            pending: None,
            latency: None,
        }
    }

    fn recording(sites: Vec<SiteCount>, stacks: Option<Vec<RawStack>>) -> Recording {
        Recording {
            target: Target {
                pid: 1,
                exe: "/bin/x".to_owned(),
                args: Vec::new(),
                go_version: "go1.27.3".to_owned(),
                arch: "amd64".to_owned(),
                build_id: None,
            },
            engine: Engine::Ebpf,
            runtime: None,
            panics: None,
            link: None,
            window: Window {
                start: jiff::Timestamp::UNIX_EPOCH,
                duration_ns: 1,
                observed_ns: 1,
            },
            sites,
            stacks,
            overhead: None,
            loss: None,
            warnings: Vec::new(),
        }
    }

    /// 0x1000 is in f; 0x1fff is the last byte of a call of g, which is inlined into main.
    fn frames(address: VirtualAddress) -> Vec<Frame> {
        let frame = |function: &str, line| Frame {
            function: function.to_owned(),
            file: "/src/main.go".to_owned(),
            line,
            start_line: 1,
        };
        match address.0 {
            0x1000 | 0x1010 => vec![frame("main.f", 3)],
            0x1fff => vec![frame("main.g", 7), frame("main.main", 20)],
            _ => Vec::new(),
        }
    }

    fn raw(site: usize, addresses: &[u64], registered: u64) -> RawStack {
        RawStack {
            site,
            addresses: addresses.iter().copied().map(VirtualAddress).collect(),
            registered,
        }
    }

    #[test]
    fn callers_are_looked_up_before_the_return_address_and_inlined_calls_expanded() {
        let sites = vec![site("main.f#1", Mechanism::Heap, Some(10))];
        let stacks = vec![raw(0, &[0x1000, 0x2000, 0x9000], 10)];
        let profile = Profile::new(recording(sites, Some(stacks)), frames);
        let stack = &profile.stacks.unwrap()[0];
        assert_eq!(stack.frames, ["main.f", "main.g", "main.main", "0x8fff"]);
        assert_eq!(stack.locations.as_deref(), Some(&[0, 1, 2, 3][..]));
        let table = profile.frames.unwrap();
        let inlined: Vec<_> = table.iter().map(|frame| frame.inlined).collect();
        assert_eq!(inlined, [false, true, false, false]);
        assert_eq!(table[1].address, Some(VirtualAddress(0x1fff)));
        assert_eq!(table[3].file, None);
    }

    #[test]
    fn equal_stacks_are_merged_in_any_order_and_costs_estimated() {
        let sites = || {
            vec![
                site("main.f#1", Mechanism::Heap, Some(30)),
                site("main.f#2", Mechanism::OpenCoded, Some(5)),
                site("main.f#3", Mechanism::Stack, None),
            ]
        };
        let stacks = vec![
            raw(1, &[0x1000], 5),
            raw(0, &[0x1000, 0x2000], 10),
            raw(0, &[0x1000, 0x2000], 20),
            raw(7, &[0x1000], 1),
        ];
        let reversed = stacks.iter().rev().cloned().collect();
        let profile = Profile::new(recording(sites(), Some(stacks)), frames);
        assert_eq!(
            profile,
            Profile::new(recording(sites(), Some(reversed)), frames)
        );
        let costs = CostTable::builtin().for_release("go1.27.3");
        let stacks = profile.stacks.as_deref().unwrap();
        let counts: Vec<_> = stacks
            .iter()
            .map(|s| (s.site.as_str(), s.registered))
            .collect();
        assert_eq!(counts, [("main.f#1", 30), ("main.f#2", 5)]);
        let each = costs.each(Mechanism::Heap).unwrap();
        assert!((stacks[0].cost_ns.unwrap() - each * 30.0).abs() < 0.1);
        assert_eq!(profile.sites[0].cost_ns, stacks[0].cost_ns);
        assert!(profile.sites[0].saving_ns < profile.sites[0].cost_ns);
        assert_eq!(profile.sites[1].saving_ns, None);
        assert_eq!(profile.sites[2].cost_ns, None);
    }

    #[test]
    fn without_stacks_there_is_no_table_of_frames() {
        let profile = Profile::new(recording(Vec::new(), None), frames);
        assert_eq!((profile.stacks, profile.frames), (None, None));
    }
}
