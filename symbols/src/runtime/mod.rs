//! Probes in the runtime itself, found by decoding its functions.

mod loops;
mod pool;
mod runs;

use crate::callee::text;
use crate::calls::Callees;
use crate::code::Code;
use crate::decode::Flow;
use crate::elf::Image;
use crate::module::Module;
use crate::placement;
use crate::plan::{Basis, ProbePoint};
use crate::{Architecture, VirtualAddress};

pub(crate) use self::{pool::pool, runs::runs};
pub use self::{
    pool::{Caller, LocalPool, PoolEvent, PoolProbe, PoolProbes, PoolUnavailable},
    runs::{
        OpenFrame, Path, RecordAt, RunEvent, RunLayout, RunProbe, RunProbes, Runner,
        RunsUnavailable,
    },
};

/// A function of the runtime, decoded.
struct Decoded {
    name: String,
    code: Code,
}

/// The search in one binary.
struct Search<'a, 'data> {
    image: &'a Image<'data>,
    module: &'a Module<'data>,
}

/// Where a function's frame is at an instruction, in bytes above SP.
struct Frame {
    return_address: u64,
    caller_sp: u64,
}

impl Search<'_, '_> {
    /// The runtime functions of these names, decoded.
    fn functions(&self, names: &[&[&str]]) -> Vec<Decoded> {
        let table = &self.module.table;
        let mut callees = Callees::default();
        let mut wanted = Vec::new();
        let mut reached = VirtualAddress(0);
        for func in (0..table.count).filter_map(|index| table.func(self.image, index)) {
            // In order, and so not more code altogether than there is.
            if func.entry < reached || func.end < func.entry {
                continue;
            }
            reached = func.end;
            let Some(name) = table.runtime_name(func) else {
                continue;
            };
            callees.note(func, name);
            if names
                .iter()
                .copied()
                .flatten()
                .any(|n| n.as_bytes() == name)
            {
                wanted.push((func, text(name)));
            }
        }
        let decode = |(func, name)| {
            let code = Code::decode(self.image, self.module, &callees, func)?;
            Some(Decoded { name, code })
        };
        wanted.into_iter().filter_map(decode).collect()
    }

    /// The direct calls of one of `names` in the runtime.
    fn calls(&self, function: &Decoded, names: &[&str]) -> Vec<usize> {
        let table = &self.module.table;
        let calls = |target: VirtualAddress| {
            let func = table
                .find(self.image, target)
                .filter(|f| f.entry == target)?;
            let name = table.runtime_name(func)?;
            names.iter().any(|n| n.as_bytes() == name).then_some(())
        };
        let instructions = function.code.instructions.iter().enumerate();
        instructions
            .filter(|(_, i)| matches!(i.flow, Flow::Call(target) if calls(target).is_some()))
            .map(|(index, _)| index)
            .collect()
    }

    /// The probe point at an instruction, if the kernel takes one there.
    fn point(&self, function: &Decoded, index: usize) -> Option<ProbePoint> {
        placement::at(self.image, &function.code, index, Basis::RuntimePath)
    }

    /// Where the frame is at an instruction, in bytes above SP.
    fn frame(&self, function: &Decoded, index: usize) -> Option<Frame> {
        // `stack_key` counts from varp, 8 bytes below the caller's frame.
        let depth = u64::try_from(function.code.stack_key(index, 0).checked_add(8)?).ok()?;
        Some(match self.image.architecture {
            // CALL pushed the return address.
            Architecture::Amd64 => Frame {
                return_address: depth,
                caller_sp: depth.checked_add(8)?,
            },
            // The link register was saved at the bottom of the frame.
            Architecture::Arm64 => Frame {
                return_address: 0,
                caller_sp: depth,
            },
        })
    }
}
