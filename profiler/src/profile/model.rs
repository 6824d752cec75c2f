//! The types of a profile, field for field as in the file.

use deferprof_symbols::VirtualAddress;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::SiteInfo;
use super::load::Schema;
use super::words;
use crate::cost::CostBasis;

/// What one observation of a process found, schema `deferprof.profile/1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    pub(crate) schema: Schema<Self>,
    /// The process.
    pub target: Target,
    /// What made it report hits.
    pub engine: Engine,
    /// How the kernel was asked, for the `ebpf` engine.
    #[serde(default)]
    pub link: Option<LinkKind>,
    /// When.
    pub window: Window,
    /// Every site that was asked for, in the inventory's order; reports rank them.
    pub sites: Vec<ProfileSite>,
    /// The process-wide deferpool; `None` if not measured.
    #[serde(default)]
    pub runtime: Option<Runtime>,
    /// The panics of the whole process; `None` if not measured.
    #[serde(default)]
    pub panics: Option<Panics>,
    /// Who called the sites; `None` if stacks were not asked for.
    #[serde(default)]
    pub stacks: Option<Vec<Stack>>,
    /// The table that [`Stack::locations`] index; `None` without stacks.
    #[serde(default)]
    pub frames: Option<Vec<StackFrame>>,
    /// What the profiler cost the target.
    #[serde(default)]
    pub overhead: Option<Overhead>,
    /// What the profiler missed.
    #[serde(default)]
    pub loss: Option<Loss>,
    /// What the reader should know, a full sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// The process that was watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Process id, in the profiler's pid namespace.
    pub pid: u32,
    /// The executable's path.
    pub exe: String,
    /// Its arguments, the program's name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// The release as the binary names it, such as `go1.27.3`; without the patch release where only its
    /// functions tell it (garble).
    pub go_version: String,
    /// `amd64` or `arm64`.
    pub arch: String,
    /// The Go build id, where the linker left one.
    #[serde(default)]
    pub build_id: Option<String>,
}

/// What makes a target report hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Engine {
    /// Uprobes in the kernel.
    Ebpf,
    /// A patched call in the target.
    Inline,
}

/// How the kernel attached the probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LinkKind {
    /// One `uprobe_multi` link (Linux 6.6 and newer).
    UprobeMulti,
    /// One trace event for all probes.
    TraceEvent,
    /// One perf event a probe.
    PerfEvent,
}

/// When a target was watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// When the probes were armed.
    pub start: Timestamp,
    /// From arming to disarming, in ns.
    pub duration_ns: u64,
    /// How much of it the probes were armed, in ns. Rates divide by this.
    pub observed_ns: u64,
}

/// What was measured at one site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileSite {
    /// Which statement it is.
    #[serde(flatten)]
    pub info: SiteInfo,
    /// How often the statement executed; `None` if it could not be watched.
    #[serde(default)]
    pub registered: Option<u64>,
    /// How often the deferred call was made, by path.
    #[serde(default)]
    pub ran: Option<Ran>,
    /// How many were registered and had not run when the process ended; `None` unless it was
    /// watched from its first instruction to its last.
    #[serde(default)]
    pub pending: Option<u64>,
    /// Where the records of a heap site came from.
    #[serde(default)]
    pub pool: Option<Pool>,
    /// Times, each as a histogram.
    #[serde(default)]
    pub latency_ns: Option<Latency>,
    /// Reserved for the overhead budget; kept as it is.
    #[serde(default)]
    pub estimated: Option<serde_json::Value>,
    /// What its defers cost in the window, in ns of CPU time: an estimate.
    #[serde(default)]
    pub cost_ns: Option<f64>,
    /// How much of it open coding would save, in ns; `None` where nothing can be saved or said.
    #[serde(default)]
    pub saving_ns: Option<f64>,
    /// What both rest on; `None` without a cost, and in files of older versions, which had only the
    /// table.
    #[serde(default)]
    pub cost_basis: Option<CostBasis>,
}

/// How often a deferred call was made, by path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ran {
    /// On a return: by the function's own exit code or by `runtime.deferreturn`, which also runs
    /// what is left of a frame in which a panic was recovered.
    pub r#return: u64,
    /// By the loop of a panic.
    pub panic: u64,
    /// By the loop of `runtime.Goexit`.
    pub goexit: u64,
}

/// The panics of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Panics {
    /// How many started: calls of `panic`, also by the runtime and while another one unwinds.
    pub started: u64,
    /// How many of them ended in a recovery: a deferred call recovered, and did not panic again.
    pub recovered: u64,
}

/// Where heap records came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// From the P-local pool.
    pub hit: u64,
    /// From the central pool.
    pub refill: u64,
    /// Newly allocated.
    pub miss: u64,
}

/// The three times of a site.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Time in deferproc.
    #[serde(default)]
    pub register: Option<Histogram>,
    /// Time in the deferred function.
    #[serde(default)]
    pub call: Option<Histogram>,
    /// From registered to ran.
    #[serde(default)]
    pub held: Option<Histogram>,
}

/// A distribution of times in ns.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many were measured.
    pub count: u64,
    /// How many of them were too short to tell from the probe's own cost.
    pub below_floor: u64,
    /// The shortest.
    pub min: u64,
    /// Half were at most this.
    pub p50: u64,
    /// 90 % were at most this.
    pub p90: u64,
    /// 99 % were at most this.
    pub p99: u64,
    /// 99.9 % were at most this.
    pub p999: u64,
    /// The longest.
    pub max: u64,
    /// The arithmetic mean.
    pub mean: f64,
}

/// The deferpool of the whole process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// How often half of a full local pool went to the central pool.
    pub spill: u64,
    /// How often a local pool was filled from the central pool.
    pub refill: u64,
    /// How often a record was allocated.
    pub miss: u64,
}

/// One call stack on which a site registered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stack {
    /// The site's id.
    pub site: String,
    /// Function names, leaf (the function with the defer) first, inlined calls included.
    pub frames: Vec<String>,
    /// The same frames as indices into [`Profile::frames`].
    #[serde(default)]
    pub locations: Option<Vec<u32>>,
    /// How often the site registered on this stack.
    pub registered: u64,
    /// The estimated cost of those, in ns.
    #[serde(default)]
    pub cost_ns: Option<f64>,
}

/// One source frame of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StackFrame {
    /// Function name as pclntab has it.
    pub function: String,
    /// Source file; `None` if unknown.
    #[serde(default)]
    pub file: Option<String>,
    /// Line of the call (of the defer, in the leaf); `None` if unknown.
    #[serde(default)]
    pub line: Option<u32>,
    /// The line on which the function starts (Go 1.20 and newer).
    #[serde(default)]
    pub start_line: Option<u32>,
    /// The instruction, as linked: the call, not the return address.
    #[serde(default, with = "words::optional_address")]
    pub address: Option<VirtualAddress>,
    /// Whether the call was inlined into the next frame of the stack, which then has the same
    /// address.
    #[serde(default)]
    pub inlined: bool,
}

/// What the profiler cost the target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overhead {
    /// How many probes were armed.
    pub probes: u64,
    /// How often they were hit.
    pub hits: u64,
    /// What one hit costs the target, in ns, calibrated on this machine.
    #[serde(default)]
    pub ns_per_hit: Option<f64>,
    /// The share of the observed time that hits took: CPU time of hits by wall-clock time, so it
    /// may exceed 1 on several CPUs.
    #[serde(default)]
    pub target_share: Option<f64>,
}

/// What the profiler missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// Hits that were not counted.
    #[serde(default)]
    pub dropped: Option<u64>,
    /// Entries that made room for others before their end was seen.
    #[serde(default)]
    pub evicted: Option<u64>,
    /// Starts of which no end was seen, and ends of which no start was.
    #[serde(default)]
    pub unmatched: Option<u64>,
}

/// Sums over all sites.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Totals {
    /// Statements executed.
    pub registered: u64,
    /// Estimated cost in ns.
    pub cost_ns: f64,
    /// What open coding would save, in ns.
    pub saving_ns: f64,
    /// Sites that registered at least once.
    pub ran: usize,
    /// Sites that were watched and never registered.
    pub never_ran: usize,
    /// Sites that could not be watched.
    pub unwatched: usize,
}

impl Profile {
    /// Sums over all sites. Counts saturate.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for site in &self.sites {
            match site.registered {
                None => totals.unwatched += 1,
                Some(0) => totals.never_ran += 1,
                Some(count) => {
                    totals.ran += 1;
                    totals.registered = totals.registered.saturating_add(count);
                    totals.cost_ns += site.cost_ns.unwrap_or(0.0);
                    totals.saving_ns += site.saving_ns.unwrap_or(0.0);
                }
            }
        }
        totals
    }
}

impl ProfileSite {
    /// How often the statement executed, unmeasured counting as never.
    pub fn count(&self) -> u64 {
        self.registered.unwrap_or(0)
    }

    /// What so many of its defers cost, in ns.
    pub(crate) fn share_of_cost(&self, registered: u64) -> Option<f64> {
        let cost = self.cost_ns?;
        let all = self.count();
        let share = match registered {
            _ if registered == all => cost,
            0 => 0.0,
            _ => cost * (registered as f64 / all.max(1) as f64),
        };
        Some((share * 10.0).round() / 10.0)
    }
}

impl Ran {
    /// On all paths together. Saturates.
    pub fn total(self) -> u64 {
        self.r#return
            .saturating_add(self.panic)
            .saturating_add(self.goexit)
    }
}

impl Window {
    /// The seconds that rates divide by, or `None` if nothing was observed.
    pub fn seconds(&self) -> Option<f64> {
        (self.observed_ns > 0).then_some(self.observed_ns as f64 / 1e9)
    }
}

impl Engine {
    /// The name in JSON and in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Inline => "inline",
        }
    }
}

impl LinkKind {
    /// The name in JSON and in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UprobeMulti => "uprobe-multi",
            Self::TraceEvent => "trace-event",
            Self::PerfEvent => "perf-event",
        }
    }
}
