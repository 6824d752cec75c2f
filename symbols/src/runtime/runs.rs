//! Who makes deferred calls, and where that can be seen.
//!
//! Exit code calls open-coded defers itself ([`crate::Exit`]). All else is run by the runtime: records
//! by `deferreturn` on a normal return, and everything that is pending by `gopanic` and `Goexit`, the
//! bits of open-coded frames included. Since 1.22 these three share `(*_panic).nextDefer`, which picks
//! the next call: it gives a record back with `freedefer` (since 1.23 `popDefer`), or clears the highest
//! bit of a frame. Up to 1.21 each has a loop of its own, and `runOpenDeferFrame` runs a frame's bits.
//! (Go `runtime/panic.go`, 1.18 to 1.27.)
//!
//! A record names its statement by `pc`, the return address of the registering call. For a frame the
//! runtime has the address of the function's deferreturn call, which no other function shares.
//! Records made in a range-over-func body get the `pc` of the loop when they are run, so they are
//! told by the record's own address, seen when it was taken from the pool.

use std::collections::BTreeMap;

use super::{Search, loops};
use crate::VirtualAddress;
use crate::dwarf::{Contradiction, Members};
use crate::elf::Image;
use crate::inventory::{Mechanism, Site};
use crate::module::Module;
use crate::plan::ProbePoint;
use crate::release::Release;
use crate::runtime::Caller;

/// How control came to a deferred call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// The function returns.
    Return,
    /// The goroutine panics.
    Panic,
    /// The goroutine ends by `runtime.Goexit`.
    Goexit,
}

/// The probes that tell when the runtime makes deferred calls.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunProbes {
    /// The probes.
    pub probes: Vec<RunProbe>,
    /// Where the runtime keeps what the probes look at.
    pub layout: RunLayout,
    /// The functions with open-coded defers.
    pub frames: Vec<OpenFrame>,
}

/// One probe in the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunProbe {
    /// The instruction.
    pub point: ProbePoint,
    /// What its execution says.
    pub event: RunEvent,
    /// Which loop it belongs to: the first whose return address fits. Empty where that is of no
    /// interest.
    pub runners: Vec<Runner>,
    /// For [`RunEvent::Taken`]: where the site's return address is.
    pub site: Option<Caller>,
    /// For [`RunEvent::Record`]: where the closure is that the record's call is of, as an offset
    /// from SP; `None` if that was looked at before. A nil one is not called.
    pub closure: Option<u64>,
    /// For [`RunEvent::Taken`]: whether the record will not name its site when it is run, because
    /// it was made in a range-over-func body.
    pub keeps: bool,
}

/// What a probe saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunEvent {
    /// A record's call is about to be made.
    Record(RecordAt),
    /// The call of an open-coded frame's highest bit is about to be made.
    Frame,
    /// A deferred call that a loop made has returned; also executed once before the first.
    Returned,
    /// The registering function has got a record, which is in the first result register.
    Taken,
    /// A panic starts.
    Panicked,
    /// A panic was recovered.
    Recovered,
}

/// Where the record is whose call is about to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordAt {
    /// At the head of the goroutine's list.
    Head,
    /// In the first argument register.
    Argument,
}

/// A loop that makes deferred calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runner {
    /// How control came there; `None` if the record's `_panic` says so.
    pub path: Option<Path>,
    /// It is this loop if the return address at this offset from SP is this, as linked; `None` if
    /// the probe is in the loop itself.
    pub returns_to: Option<(u64, VirtualAddress)>,
    /// From SP at the probe to SP in the loop, in bytes.
    pub frame: u64,
    /// From SP at the probe to the loop's `_panic`, in bytes (since 1.22).
    pub panic: Option<u64>,
}

/// Offsets in the runtime's structures, in bytes: by the binary's DWARF, or else by its release (from the
/// DWARF of every release from 1.18 on; equal on both architectures).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunLayout {
    /// 1.18 to 1.21: a frame is run through an artificial record.
    Records {
        /// `_defer.openDefer`
        open: u64,
        /// `_defer._panic`
        panic: u64,
        /// `_defer.varp`
        varp: u64,
        /// `_panic.goexit`
        goexit: u64,
    },
    /// Since 1.22: the state is in the loop's `_panic`.
    Panics {
        /// `_panic.retpc`
        retpc: u64,
        /// `_panic.deferBitsPtr`
        bits: u64,
    },
}

/// A function with open-coded defers, as its frame shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenFrame {
    /// The function's call of deferreturn for frames that recovered, as linked: how the runtime
    /// names the frame.
    pub deferreturn: VirtualAddress,
    /// From the `deferBits` byte up to varp, in bytes.
    pub bits: u64,
    /// From each bit's slot up to varp, in bytes.
    pub slots: [u64; 8],
    /// Each bit's site; `None` if it is not among those asked for.
    pub sites: [Option<u32>; 8],
    /// From SP in the function's body up to varp, in bytes.
    pub depth: u64,
}

/// Why a binary's runtime does not tell when deferred calls are made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RunsUnavailable {
    /// Older runtimes jump to deferred functions from assembly.
    #[error("deferprof does not follow the deferred calls of {0} yet (1.18 to 1.27)")]
    Release(String),
    /// The runtime has another shape than any release seen.
    #[error("the runtime's {function} has no {what} as it is known to")]
    Shape {
        /// The function looked at.
        function: String,
        /// What was looked for.
        what: &'static str,
    },
    /// The runtime's structures are other than in any release seen.
    #[error(
        "its DWARF has {member} at byte {found}, where every release has it at byte {expected}"
    )]
    Dwarf {
        /// The member of a structure.
        member: &'static str,
        /// Its offset by the binary's DWARF.
        found: u64,
        /// Its offset in all releases.
        expected: u64,
    },
}

pub(super) type Result<T> = std::result::Result<T, RunsUnavailable>;

fn layout(release: Release, members: &Members) -> Option<RunLayout> {
    let at = |member, otherwise| members.offset(member).unwrap_or(otherwise);
    let panics = |retpc, bits| RunLayout::Panics {
        retpc: at("runtime._panic.retpc", retpc),
        bits: at("runtime._panic.deferBitsPtr", bits),
    };
    match release.minor {
        18..=21 => Some(RunLayout::Records {
            open: at("runtime._defer.openDefer", 2),
            panic: at("runtime._defer._panic", 32),
            varp: at("runtime._defer.varp", 56),
            goexit: at("runtime._panic.goexit", 50),
        }),
        22..=25 => Some(panics(72, 80)),
        26..=27 => Some(panics(64, 72)),
        _ => None,
    }
}

/// What the eBPF program takes for granted, since no release has changed it.
const UNCHANGED: [(&str, u64); 5] = [
    ("runtime.g.stack", 0),
    ("runtime.g._defer", 40),
    ("runtime._defer.sp", 8),
    ("runtime._defer.pc", 16),
    ("runtime._defer.fn", 24),
];

/// Finds the probes.
pub(crate) fn runs(
    image: &Image<'_>,
    module: &Module<'_>,
    release: Release,
    members: &Members,
    sites: &[Site],
) -> Result<RunProbes> {
    let layout =
        layout(release, members).ok_or_else(|| RunsUnavailable::Release(release.to_string()))?;
    if let Some(Contradiction {
        member,
        found,
        expected,
    }) = members.contradicts(&UNCHANGED)
    {
        return Err(RunsUnavailable::Dwarf {
            member,
            found,
            expected,
        });
    }
    let search = Search { image, module };
    Ok(RunProbes {
        probes: loops::probes(&search, layout)?,
        layout,
        frames: frames(image, module, sites),
    })
}

impl Runner {
    /// How many loops one probe can be in.
    pub const MOST: usize = 4;
}

/// The functions with open-coded defers among `sites`.
fn frames(image: &Image<'_>, module: &Module<'_>, sites: &[Site]) -> Vec<OpenFrame> {
    let mut by_function: BTreeMap<u64, Vec<(u32, &Site)>> = BTreeMap::new();
    for (index, site) in (0u32..).zip(sites) {
        if site.mechanism == Mechanism::OpenCoded {
            by_function
                .entry(site.function_entry.0)
                .or_default()
                .push((index, site));
        }
    }
    let frame = |(entry, of_function): (u64, Vec<(u32, &Site)>)| {
        let entry = VirtualAddress(entry);
        let table = &module.table;
        let func = table.find(image, entry).filter(|f| f.entry == entry)?;
        let open = module.open_defers(image, func)?;
        let mut frame = OpenFrame {
            deferreturn: VirtualAddress(entry.0.checked_add(table.deferreturn(func)?.into())?),
            bits: u64::try_from(open.bits).ok()?,
            slots: [0; 8],
            sites: [None; 8],
            depth: of_function.first()?.1.depth.checked_sub(8)?,
        };
        for (to, from) in frame.slots.iter_mut().zip(&open.slots) {
            *to = u64::try_from(*from).ok()?;
        }
        for (index, site) in of_function {
            if let Some(place) = frame.sites.get_mut(usize::from(site.bit?)) {
                *place = Some(index);
            }
        }
        Some(frame)
    };
    by_function.into_iter().filter_map(frame).collect()
}
