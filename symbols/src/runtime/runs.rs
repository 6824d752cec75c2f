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

use super::{Decoded, Search};
use crate::VirtualAddress;
use crate::decode::{Flow, Op, Place};
use crate::elf::Image;
use crate::inventory::{Mechanism, Site};
use crate::module::Module;
use crate::plan::ProbePoint;
use crate::release::Release;
use crate::runtime::Caller;

/// The loops that make deferred calls, and how control came there.
const RUNNERS: [(&str, Path); 3] = [
    ("deferreturn", Path::Return),
    ("gopanic", Path::Panic),
    ("Goexit", Path::Goexit),
];

/// What the loops are made of.
const PARTS: [&str; 4] = [
    "(*_panic).nextDefer",
    "runOpenDeferFrame",
    "deferproc",
    "deferprocat",
];

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

/// Offsets in the runtime's structures, in bytes. (DWARF of every release from 1.18 on; equal on
/// both architectures.)
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
}

type Result<T> = std::result::Result<T, RunsUnavailable>;

fn layout(release: Release) -> Option<RunLayout> {
    match release.minor {
        18..=21 => Some(RunLayout::Records {
            open: 2,
            panic: 32,
            varp: 56,
            goexit: 50,
        }),
        22..=25 => Some(RunLayout::Panics {
            retpc: 72,
            bits: 80,
        }),
        26..=27 => Some(RunLayout::Panics {
            retpc: 64,
            bits: 72,
        }),
        _ => None,
    }
}

/// Finds the probes.
pub(crate) fn runs(
    image: &Image<'_>,
    module: &Module<'_>,
    release: Release,
    sites: &[Site],
) -> Result<RunProbes> {
    let layout = layout(release).ok_or_else(|| RunsUnavailable::Release(release.to_string()))?;
    let search = Search { image, module };
    let names = RUNNERS.map(|(name, _)| name);
    let runtime = Runtime {
        search: &search,
        decoded: search.functions(&[&names, &PARTS]),
    };
    let mut probes = match layout {
        RunLayout::Records { .. } => runtime.by_records()?,
        RunLayout::Panics { .. } => runtime.by_panics()?,
    };
    probes.extend(runtime.panicked()?);
    probes.extend(runtime.taken());
    Ok(RunProbes {
        probes,
        layout,
        frames: frames(image, module, sites),
    })
}

/// The search in one binary's runtime.
struct Runtime<'a, 'data> {
    search: &'a Search<'a, 'data>,
    decoded: Vec<Decoded>,
}

impl Runtime<'_, '_> {
    /// Since 1.22: in nextDefer, told apart by who called it.
    fn by_panics(&self) -> Result<Vec<RunProbe>> {
        let next = self.function("(*_panic).nextDefer")?;
        let calls = self.search.calls(next, &["freedefer", "popDefer"]);
        let at = match self.search.calls(next, &["popDefer"]).is_empty() {
            true => RecordAt::Argument,
            false => RecordAt::Head,
        };
        // The loop's own record of a range-over-func is given back behind its conversion.
        let converts = self.search.calls(next, &["deferconvert"]);
        let of_loop = |call: &usize| {
            let block = next.code.block_of(*call).map(|b| b.range.start..*call);
            block.is_some_and(|before| converts.iter().any(|c| before.contains(c)))
        };
        let calls: Vec<_> = calls.into_iter().filter(|call| !of_loop(call)).collect();
        let [record] = calls[..] else {
            return Err(shape(&next.name, "one call that gives records back"));
        };
        let frame = before_clearing(next).ok_or_else(|| shape(&next.name, "store of the bits"))?;
        let [recovered] = self.search.calls(next, &["mcall"])[..] else {
            return Err(shape(&next.name, "one call of recovery"));
        };
        let mut probes = vec![self.probe(next, recovered, RunEvent::Recovered, Vec::new())?];
        for (index, event) in [(record, RunEvent::Record(at)), (frame, RunEvent::Frame)] {
            let own = self
                .search
                .frame(next, index)
                .ok_or_else(|| shape(&next.name, "frame"))?;
            let mut runners = Vec::new();
            for (runner, path) in self.runners()? {
                for call in self.search.calls(runner, &["(*_panic).nextDefer"]) {
                    let after = runner.code.instructions.get(call + 1);
                    let panic = self.stack_argument(runner, call);
                    let (Some(after), Some(panic)) = (after, panic) else {
                        return Err(shape(&runner.name, "_panic on its stack"));
                    };
                    runners.push(Runner {
                        path: Some(path),
                        returns_to: Some((own.return_address, after.address)),
                        frame: own.caller_sp,
                        panic: Some(own.caller_sp.wrapping_add(panic)),
                    });
                }
            }
            if runners.len() > Runner::MOST {
                return Err(shape(&next.name, "so few callers"));
            }
            probes.push(self.probe(next, index, event, runners)?);
        }
        for (runner, path) in self.runners()? {
            let calls = self.search.calls(runner, &["(*_panic).nextDefer"]);
            if calls.is_empty() {
                return Err(shape(&runner.name, "call of nextDefer"));
            }
            for call in calls {
                probes.push(self.own(runner, call, RunEvent::Returned, Some(path))?);
            }
        }
        Ok(probes)
    }

    /// Up to 1.21: in each loop.
    fn by_records(&self) -> Result<Vec<RunProbe>> {
        let mut probes = Vec::new();
        let mut made = |function: &Decoded, call: usize, path| -> Result<()> {
            probes.push(self.own(
                function,
                self.behind(function, call),
                RunEvent::Returned,
                path,
            )?);
            Ok(())
        };
        let returning = self.function("deferreturn")?;
        let frees = self.search.calls(returning, &["freedefer"]);
        made(returning, self.closure_call(returning)?, Some(Path::Return))?;
        let panicking = self.function("gopanic")?;
        let panic_call = self.closure_call(panicking)?;
        made(panicking, panic_call, Some(Path::Panic))?;
        let exiting = self
            .runners()?
            .into_iter()
            .find(|(_, p)| *p == Path::Goexit);
        let exiting = match exiting {
            Some((exiting, _)) => Some((exiting, self.saving_call(exiting)?)),
            None => None,
        };
        if let Some((exiting, call)) = exiting {
            made(exiting, call, Some(Path::Goexit))?;
        }
        let frame = self.function("runOpenDeferFrame")?;
        let frame_call = self.saving_call(frame)?;
        made(frame, frame_call, None)?;
        for call in frees {
            let event = RunEvent::Record(RecordAt::Argument);
            probes.push(self.own(returning, call, event, Some(Path::Return))?);
        }
        let head = RunEvent::Record(RecordAt::Head);
        probes.push(self.own(panicking, panic_call, head, Some(Path::Panic))?);
        if let Some((exiting, call)) = exiting {
            probes.push(self.own(exiting, call, head, Some(Path::Goexit))?);
        }
        probes.push(self.own(frame, frame_call, RunEvent::Frame, None)?);
        for call in self.search.calls(panicking, &["mcall"]) {
            probes.push(self.probe(panicking, call, RunEvent::Recovered, Vec::new())?);
        }
        Ok(probes)
    }

    /// Where a panic starts: right behind the stack check, which a grown stack executes again.
    fn panicked(&self) -> Result<Option<RunProbe>> {
        let function = self.function("gopanic")?;
        let instructions = function.code.instructions.iter();
        let check = instructions
            .take(8)
            .position(|i| matches!(i.flow, Flow::Branch(_)))
            .ok_or_else(|| shape(&function.name, "stack check"))?;
        let point = self.probe(function, check + 1, RunEvent::Panicked, Vec::new());
        point.map(Some)
    }

    /// Where a registering function has got its record. Not there if newdefer was inlined.
    fn taken(&self) -> Vec<RunProbe> {
        let found = ["deferproc", "deferprocat"].into_iter().filter_map(|name| {
            let function = self.function(name).ok()?;
            let [call] = self.search.calls(function, &["newdefer"])[..] else {
                return None;
            };
            let index = self.with_result(function, call)?;
            let own = self.search.frame(function, index)?;
            Some(RunProbe {
                point: self.search.point(function, index)?,
                event: RunEvent::Taken,
                runners: Vec::new(),
                site: Some(Caller::Site(own.return_address)),
                closure: None,
                keeps: name == "deferprocat",
            })
        });
        found.collect()
    }

    /// The loops that this binary has: what no code calls (mostly Goexit) is not linked.
    fn runners(&self) -> Result<Vec<(&Decoded, Path)>> {
        let linked = |(name, _): &(&str, Path)| self.decoded.iter().any(|d| d.name == *name);
        let runners = RUNNERS.into_iter().filter(linked);
        runners
            .map(|(name, path)| Ok((self.function(name)?, path)))
            .collect()
    }

    fn function(&self, name: &str) -> Result<&Decoded> {
        let mut named = self.decoded.iter().filter(|d| d.name == name);
        match (named.next(), named.next()) {
            (Some(function), None) => Ok(function),
            _ => Err(shape(name, "code of its own")),
        }
    }

    fn probe(
        &self,
        function: &Decoded,
        index: usize,
        event: RunEvent,
        runners: Vec<Runner>,
    ) -> Result<RunProbe> {
        let point = self.search.point(function, index);
        Ok(RunProbe {
            point: point.ok_or_else(|| shape(&function.name, "instruction to probe"))?,
            event,
            runners,
            site: None,
            closure: match event {
                RunEvent::Record(_) => closure(function, index),
                _ => None,
            },
            keeps: false,
        })
    }

    /// A probe in a loop itself.
    fn own(
        &self,
        function: &Decoded,
        index: usize,
        event: RunEvent,
        path: Option<Path>,
    ) -> Result<RunProbe> {
        let runner = Runner {
            path,
            returns_to: None,
            frame: 0,
            panic: None,
        };
        self.probe(function, index, event, vec![runner])
    }

    /// The one call of a closure.
    fn closure_call(&self, function: &Decoded) -> Result<usize> {
        let instructions = function.code.instructions.iter().enumerate();
        let mut calls = instructions.filter(|(_, i)| i.flow == Flow::IndirectCall);
        match (calls.next(), calls.next()) {
            (Some((index, _)), None) => Ok(index),
            _ => Err(shape(&function.name, "one call of a closure")),
        }
    }

    /// The one call of what calls a closure and notes where.
    fn saving_call(&self, function: &Decoded) -> Result<usize> {
        match self
            .search
            .calls(function, &["deferCallSave", "reflectcallSave"])[..]
        {
            [call] => Ok(call),
            _ => Err(shape(&function.name, "one call of deferCallSave")),
        }
    }

    /// The first emulated instruction behind a call in its block, or the next.
    fn behind(&self, function: &Decoded, call: usize) -> usize {
        let end = function.code.block_of(call).map_or(0, |b| b.range.end);
        let sp = function.code.stack_key(call, 0);
        let emulated = |index: &usize| {
            let instruction = function.code.instructions.get(*index);
            instruction.is_some_and(|i| i.probeable && i.kind.is_emulated())
        };
        let mut there = (call + 1..end).take_while(|i| function.code.stack_key(*i, 0) == sp);
        there.find(emulated).unwrap_or(call + 1)
    }

    /// The first emulated instruction behind a call at which the result is still where the call left
    /// it, or the next.
    fn with_result(&self, function: &Decoded, call: usize) -> Option<usize> {
        let end = function.code.block_of(call)?.range.end;
        let result = self.search.image.architecture.conventions().first_argument;
        for index in call + 1..end {
            let instruction = function.code.instructions.get(index)?;
            if instruction.probeable && instruction.kind.is_emulated() {
                return Some(index);
            }
            let written = instruction.op.written() == Some(result);
            if written || instruction.clobbers & 1 << result != 0 {
                break;
            }
        }
        Some(call + 1)
    }

    /// The displacement from SP that the first argument of a call points to.
    fn stack_argument(&self, function: &Decoded, call: usize) -> Option<u64> {
        let register = self.search.image.architecture.conventions().first_argument;
        for index in (call.saturating_sub(4)..call).rev() {
            let instruction = function.code.instructions.get(index)?;
            if let Op::StackAddress(to, displacement) = instruction.op
                && to == register
            {
                return u64::try_from(displacement).ok();
            }
            if instruction.op.written() == Some(register) {
                return None;
            }
        }
        None
    }
}

impl Runner {
    /// How many loops one probe can be in.
    pub const MOST: usize = 4;
}

/// Where the closure is kept while a record is given back: the cell of the first load behind.
fn closure(function: &Decoded, call: usize) -> Option<u64> {
    let block = function.code.block_of(call)?;
    let behind = function.code.instructions.get(call + 1..block.range.end)?;
    behind.iter().find_map(|instruction| match instruction.op {
        Op::Load {
            from: Place::Stack(displacement),
            size: 8,
            ..
        } => u64::try_from(displacement).ok(),
        _ => None,
    })
}

/// An instruction that is always executed before nextDefer stores the cleared bits: emulated, and
/// executed anyhow where there are none.
fn before_clearing(next: &Decoded) -> Option<usize> {
    let instructions = &next.code.instructions;
    let mut stores = instructions.iter().enumerate().filter(|(_, i)| {
        matches!(
            i.op,
            Op::Store {
                to: Place::Based(..),
                size: 1,
                count: 1,
                ..
            }
        )
    });
    let (Some((store, _)), None) = (stores.next(), stores.next()) else {
        return None;
    };
    let emulated = |index: &usize| {
        let instruction = instructions.get(*index);
        instruction.is_some_and(|i| i.probeable && i.kind.is_emulated())
    };
    let mut block = next.code.block_of(store)?;
    let mut until = store;
    loop {
        if let Some(found) = (block.range.start..until).rev().find(emulated) {
            return Some(found);
        }
        let [previous] = block.previous[..] else {
            return None;
        };
        let before = next.code.blocks.get(previous)?;
        // Always upwards, so that it ends.
        if before.range.start >= block.range.start {
            return None;
        }
        block = before;
        until = block.range.end;
    }
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

fn shape(function: &str, what: &'static str) -> RunsUnavailable {
    RunsUnavailable::Shape {
        function: function.to_owned(),
        what,
    }
}
