//! Where to count one site's registrations: the cheapest instruction that executes exactly as often
//! as the statement.
//!
//! Inside a basic block every instruction executes as often as its neighbour, unless a panic starts
//! between them. So the search goes from the slot store forwards to the end of its block and of
//! those that it alone leads to, then backwards to its start and past detours, and stops at whatever
//! may panic: a call that is not known to return, or an access through a pointer that may be nil. A
//! CALL itself may be probed when it comes after the store (the trap is taken before the callee
//! starts), and before it only if it always returns. Passed over is what has no frame pointer of the
//! function's own, without which the stack cannot be walked.

use crate::blocks::Block;
use crate::bytes::Bytes;
use crate::code::Code;
use crate::decode::{self, Faults, Flow, Instruction};
use crate::elf::Image;
use crate::flow::Findings;
use crate::module::Module;
use crate::plan::{Basis, InstructionKind, ProbePoint};
use crate::{Architecture, Entered, VirtualAddress};

/// The probe point at instruction `index`, if the kernel can put one there.
pub(crate) fn at(image: &Image<'_>, code: &Code, index: usize, basis: Basis) -> Option<ProbePoint> {
    let instruction = code.instructions.get(index).filter(|i| i.probeable)?;
    let offset = image.offset_of(instruction.address)?;
    Some(ProbePoint {
        address: instruction.address,
        offset,
        kind: instruction.kind,
        basis,
    })
}

/// The probe point for an open-coded site whose slot store is at `store`.
pub(crate) fn open_coded(
    image: &Image<'_>,
    code: &Code,
    findings: &Findings,
    store: usize,
) -> Option<ProbePoint> {
    let emulated = |index: usize| {
        code.instructions
            .get(index)
            .is_some_and(Instruction::takes_cheap_probe)
            && code.has_frame_pointer(index)
    };
    let diverts = |index: usize| findings.diverts.get(index).copied().unwrap_or(true);
    let block = code.block_of(store)?;
    // Forwards, also into a block that only follows this one and that only this one leads to.
    let mut from = store + 1;
    let mut current = Some(block);
    for _ in 0..FARTHEST {
        let Some(block) = current else { break };
        for index in from..block.end {
            if emulated(index) {
                return at(image, code, index, Basis::AfterSlotStore);
            }
            if diverts(index) {
                current = None;
                break;
            }
        }
        current = current
            .and_then(|block| only(block.next))
            .and_then(|next| code.blocks.get(next))
            .filter(|next| next.previous.len() == 1);
        from = current.map_or(0, |block| block.start);
    }
    // Backwards likewise, and across a detour that always comes back, such as a write barrier's.
    let mut before = store;
    let mut current = Some(block);
    for _ in 0..FARTHEST {
        let Some(block) = current else { break };
        for index in (block.start..before).rev() {
            if diverts(index) {
                current = None;
                break;
            }
            if emulated(index) {
                return at(image, code, index, Basis::BeforeSlotStore);
            }
        }
        current = current.and_then(|block| dominator(code, block, diverts));
        before = current.map_or(0, |block| block.end);
    }
    at(image, code, store, Basis::SlotStore)
}

/// The probe point for a CALL: it, or an emulated instruction that only leads to it.
pub(crate) fn call(
    image: &Image<'_>,
    code: &Code,
    findings: &Findings,
    call: usize,
) -> Option<ProbePoint> {
    let emulated = |index: &usize| {
        let instruction = code.instructions.get(*index);
        instruction.is_some_and(Instruction::takes_cheap_probe)
    };
    let diverts = |index: &usize| findings.diverts.get(*index).copied().unwrap_or(true);
    let start = code.block_of(call)?.start;
    let before = (start..call).rev().take_while(|index| !diverts(index));
    let index = std::iter::once(call).chain(before).find(emulated);
    at(image, code, index.unwrap_or(call), Basis::ExitCall)
}

/// The probe point at a function's entry: its first instruction behind the stack check, which a
/// grown stack executes again, if the kernel emulates that.
pub(crate) fn entered(
    image: &Image<'_>,
    module: &Module<'_>,
    entry: VirtualAddress,
) -> Option<Entered> {
    /// Enough for a stack check and what may stand before the first emulated instruction.
    const BYTES: u64 = 64;
    let table = &module.table;
    let func = table.find(image, entry).filter(|f| f.entry == entry)?;
    let length = func.end.offset_from(entry)?.min(BYTES);
    let bytes = Bytes(image.read(entry, length)?).0;
    let mut instructions = decode::from_entry(image.architecture, entry, bytes).peekable();
    // A function without a stack check starts with its frame.
    if instructions.peek()?.kind != InstructionKind::Push {
        let mut check = instructions.by_ref().take(STACK_CHECK);
        check.find(|i| matches!(i.flow, Flow::Branch(_)))?;
    }
    let straight = |i: &Instruction| i.flow == Flow::Next && i.faults == Faults::Never;
    let found = loop {
        let instruction = instructions.next()?;
        if instruction.takes_cheap_probe() {
            break instruction;
        }
        Some(instruction).filter(straight)?;
    };
    let mut depths = table.depth_steps(func);
    let depth = depths.find(|step| found.address < step.end)?.value;
    let depth = u64::try_from(depth).ok()?;
    match image.architecture {
        Architecture::Amd64 => Some(Entered {
            point: ProbePoint {
                address: found.address,
                offset: image.offset_of(found.address)?,
                kind: found.kind,
                basis: Basis::Entered,
            },
            return_address: depth,
            caller_sp: depth.checked_add(8)?,
        }),
        // The kernel emulates the call itself.
        Architecture::Arm64 => None,
    }
}

/// In how many instructions a stack check is done.
const STACK_CHECK: usize = 4;

/// The probe point behind a CALL: the first emulated instruction, if the way there is short and
/// straight and SP does not move, otherwise the very next instruction.
pub(crate) fn after_call(
    image: &Image<'_>,
    code: &Code,
    findings: &Findings,
    call: usize,
) -> Option<ProbePoint> {
    /// How many instructions to look at.
    const NEAR: usize = 12;
    let sp = code.stack_key(call, 0);
    let mut found = None;
    for index in (call + 1..code.instructions.len()).take(NEAR) {
        let instruction = code.instructions.get(index)?;
        if code.stack_key(index, 0) != sp {
            break;
        }
        if instruction.takes_cheap_probe() {
            found = Some(index);
            break;
        }
        if findings.diverts.get(index).copied().unwrap_or(true) || instruction.flow != Flow::Next {
            break;
        }
    }
    at(image, code, found.unwrap_or(call + 1), Basis::AfterExitCall)
}

/// How many blocks to look at in each direction.
const FARTHEST: usize = 8;

fn only(blocks: &[usize]) -> Option<usize> {
    match blocks {
        [block] => Some(*block),
        _ => None,
    }
}

/// The block that is executed before `block` exactly as often: its only predecessor, if it leads
/// nowhere else, or the head of an `if` without `else` whose body always comes to its end.
fn dominator<'a>(
    code: &'a Code,
    block: Block<'_>,
    diverts: impl Fn(usize) -> bool,
) -> Option<Block<'a>> {
    let get = |at: usize| code.blocks.get(at);
    if let Some(previous) = only(block.previous) {
        return get(previous).filter(|p| p.next.len() == 1 && !p.range().is_empty());
    }
    let [a, b] = block.previous else {
        return None;
    };
    [(*a, *b), (*b, *a)].into_iter().find_map(|(head, body)| {
        let inside = get(body)?;
        let returns = only(inside.previous) == Some(head)
            && only(inside.next).is_some()
            && !inside.range().is_empty()
            && !inside.range().any(&diverts);
        get(head).filter(|h| returns && h.next.len() == 2 && !h.range().is_empty())
    })
}
