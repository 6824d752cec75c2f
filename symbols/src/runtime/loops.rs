//! The search for the probes on the runtime's loops that make deferred calls.

use super::runs::{Path, RecordAt, Result, RunEvent, RunLayout, RunProbe, Runner, RunsUnavailable};
use super::{Caller, Decoded, Search};
use crate::decode::{Flow, Instruction, Op, Place};

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

/// All of them.
pub(super) fn probes(search: &Search<'_, '_>, layout: RunLayout) -> Result<Vec<RunProbe>> {
    let names = RUNNERS.map(|(name, _)| name);
    let runtime = Runtime {
        search,
        decoded: search.functions(&[&names, &PARTS]),
    };
    let mut probes = match layout {
        RunLayout::Records { .. } => runtime.by_records()?,
        RunLayout::Panics { .. } => runtime.by_panics()?,
    };
    probes.extend(runtime.panicked()?);
    probes.extend(runtime.taken());
    Ok(probes)
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
            let block = next.code.block_of(*call).map(|b| b.start..*call);
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
        let end = function.code.block_of(call).map_or(0, |b| b.end);
        let sp = function.code.stack_key(call, 0);
        let emulated = |index: &usize| {
            let instruction = function.code.instructions.get(*index);
            instruction.is_some_and(Instruction::takes_cheap_probe)
        };
        let mut there = (call + 1..end).take_while(|i| function.code.stack_key(*i, 0) == sp);
        there.find(emulated).unwrap_or(call + 1)
    }

    /// The first emulated instruction behind a call at which the result is still where the call left
    /// it, or the next.
    fn with_result(&self, function: &Decoded, call: usize) -> Option<usize> {
        let end = function.code.block_of(call)?.end;
        let result = self.search.image.architecture.conventions().first_argument;
        for index in call + 1..end {
            let instruction = function.code.instructions.get(index)?;
            if instruction.takes_cheap_probe() {
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

/// Where the closure is kept while a record is given back: the cell of the first load behind.
fn closure(function: &Decoded, call: usize) -> Option<u64> {
    let block = function.code.block_of(call)?;
    let behind = function.code.instructions.get(call + 1..block.end)?;
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
        instruction.is_some_and(Instruction::takes_cheap_probe)
    };
    let mut block = next.code.block_of(store)?;
    let mut until = store;
    loop {
        if let Some(found) = (block.start..until).rev().find(emulated) {
            return Some(found);
        }
        let [previous] = *block.previous else {
            return None;
        };
        let before = next.code.blocks.get(previous)?;
        // Always upwards, so that it ends.
        if before.start >= block.start {
            return None;
        }
        block = before;
        until = block.end;
    }
}

fn shape(function: &str, what: &'static str) -> RunsUnavailable {
    RunsUnavailable::Shape {
        function: function.to_owned(),
        what,
    }
}
