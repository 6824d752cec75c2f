//! Whether a binary is as the row of its release says, where that is not certain (it is newer than the
//! table, or names no release): asked of its own code, before anything found by that row is believed.

use std::collections::BTreeSet;

use crate::calls::{Callee, Callees};
use crate::code::Code;
use crate::decode::{Flow, Op, Place};
use crate::elf::Image;
use crate::module::Module;
use crate::pclntab::Func;
use crate::release::Release;
use crate::{Mechanism, VirtualAddress};

/// Where `deferprocStack` stores into the record since 1.22: sp, pc, link, head. (`fn` is the
/// caller's store.)
const RECORD_STORES: [i64; 4] = [8, 16, 32, 40];

const FIRST_WITH_STORES: Release = Release { minor: 22 };

/// The first thing that is not as expected, as the end of a sentence.
pub(crate) fn difference(
    image: &Image<'_>,
    module: &Module<'_>,
    callees: &Callees,
    with_defers: &[Func],
    release: Release,
) -> Option<String> {
    let decode = |func| Code::decode(image, module, callees, func);
    // `_func.deferreturn` leads to a CALL of deferreturn.
    for func in with_defers.iter().take(16) {
        let place = module
            .table
            .deferreturn(*func)
            .and_then(|offset| func.entry.checked_add(offset.into()));
        let calls = |code: Code| {
            let instructions = code.instructions.iter().zip(&code.callees);
            instructions.into_iter().any(|(instruction, callee)| {
                Some(instruction.address) == place && *callee == Callee::DeferReturn
            })
        };
        if !decode(*func).is_some_and(calls) {
            return Some(format!(
                "the function at {} does not call deferreturn where its table says",
                func.entry
            ));
        }
    }
    if release < FIRST_WITH_STORES {
        return None;
    }
    // A program without such defers is linked without it.
    let entry = callees.entry_of(Callee::Registers(Mechanism::Stack))?;
    let func = module.table.find(image, VirtualAddress(entry))?;
    let found = record_stores(image, &decode(func)?);
    let expected = BTreeSet::from(RECORD_STORES);
    (found != expected)
        .then(|| format!("deferprocStack stores at {found:?} of its record, not at {expected:?}"))
}

/// The offsets at which `deferprocStack` stores words through a register other than g's.
fn record_stores(image: &Image<'_>, code: &Code) -> BTreeSet<i64> {
    let g = image.architecture.conventions().g;
    let mut offsets = BTreeSet::new();
    for instruction in &code.instructions {
        if let Op::Store {
            to: Place::Based(base, offset),
            count,
            size: 8,
            ..
        } = instruction.op
            && base != g
        {
            offsets.extend((0..i64::from(count)).map(|i| offset.wrapping_add(8 * i)));
        }
        // Behind the first call stands what prepares a throw.
        if matches!(instruction.flow, Flow::Call(_)) {
            break;
        }
    }
    offsets
}
