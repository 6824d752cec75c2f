//! Where to count one site's registrations: the cheapest instruction that executes exactly as often
//! as the statement.
//!
//! Inside a basic block every instruction executes as often as its neighbour, unless a panic starts
//! between them. So the search goes from the slot store forwards to the end of its block, then
//! backwards to its start, and stops at whatever may panic: a call that is not known to return, or
//! an access through a pointer that may be nil. A CALL itself may be probed when it comes after the
//! store (the trap is taken before the callee starts), and before it only if it always returns.

use crate::code::Code;
use crate::elf::Image;
use crate::flow::Findings;
use crate::plan::{Basis, ProbePoint};

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
    let block = code.block_of(store)?.range.clone();
    let emulated = |index: usize| {
        code.instructions
            .get(index)
            .is_some_and(|i| i.probeable && i.kind.is_emulated())
    };
    let diverts = |index: usize| findings.diverts.get(index).copied().unwrap_or(true);
    let mut after = None;
    for index in store + 1..block.end {
        if emulated(index) {
            after = Some(index);
            break;
        }
        if diverts(index) {
            break;
        }
    }
    if let Some(index) = after {
        return at(image, code, index, Basis::AfterSlotStore);
    }
    for index in (block.start..store).rev() {
        if diverts(index) {
            break;
        }
        if emulated(index) {
            return at(image, code, index, Basis::BeforeSlotStore);
        }
    }
    at(image, code, store, Basis::SlotStore)
}
