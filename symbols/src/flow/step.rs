//! What one instruction does to what is known, and what is to be noted of it.

use super::state::{Cell, REGISTERS, State};
use super::value::{Bits, SMALLEST_ADDRESS, Value};
use super::{Analysis, Closure, SlotStore};
use crate::calls::Callee;
use crate::decode::{Faults, Flow, Instruction, Op, Operand, Place, Register};
use crate::{Mechanism, VirtualAddress};

impl Analysis<'_> {
    #[inline]
    pub(super) fn step(
        &mut self,
        state: &mut State,
        index: usize,
        instruction: &Instruction,
        callee: Callee,
    ) {
        self.record(state, index, instruction, callee);
        match instruction.op {
            Op::Other => {}
            Op::Set(to, value) => state.set(to, Value::Constant(value)),
            Op::Copy(to, from) => state.set(to, state.get(from)),
            Op::StackAddress(to, displacement) => {
                state.set(to, Value::Stack(self.code.stack_key(index, displacement)));
            }
            Op::Add(to, from, offset) => state.set(to, state.get(from).plus(offset)),
            Op::And(to, a, b) => state.set(to, state.get(a).and(state.operand(b))),
            Op::Or(to, a, b) => state.set(to, state.get(a).or(state.operand(b))),
            Op::Select(to, a, b) => state.set(to, state.get(a).join(state.get(b))),
            Op::Boolean(to) => state.set(to, Value::Bits(Bits { must: 0, may: 1 })),
            Op::Load { to, from, size } => self.load(state, index, to, from, size),
            Op::Store {
                to,
                values,
                count,
                size,
            } => {
                let values = values.get(..count.into()).unwrap_or(&values);
                self.store(state, index, to, values, size);
            }
        }
        state.clobber(instruction.clobbers);
        if matches!(instruction.flow, Flow::Call(_) | Flow::IndirectCall) {
            self.call(state, instruction, callee);
        }
    }

    /// The effect of a store on cells, bits and slots.
    fn store(&mut self, state: &mut State, index: usize, to: Place, values: &[Operand], size: u8) {
        if let Place::Based(base, 0) = to
            && let (Value::Object(object), Some(first)) = (state.get(base), values.first())
            && let Value::Constant(code) = state.operand(*first)
        {
            self.findings.object_code.entry(object).or_insert(code);
        }
        let may_alias = match to {
            Place::Stack(_) | Place::Absolute(_) => false,
            Place::Based(base, _) => !matches!(
                state.get(base),
                Value::Stack(_) | Value::Object(_) | Value::Constant(_)
            ),
            Place::Unknown => true,
        };
        if may_alias {
            state.forget_pointers();
        }
        let Some(mut key) = self.stack_cell(state, index, to) else {
            return;
        };
        for operand in values {
            self.store_cell(state, index, key, size, state.operand(*operand));
            key = key.wrapping_sub(size.into());
        }
    }

    /// The effect of a store of one value on the cell, and on bits and slots.
    fn store_cell(&mut self, state: &mut State, index: usize, key: i64, size: u8, value: Value) {
        if self.is_bits(key, size) {
            self.store_bits(state, index, value.bits());
        } else if size == 8
            && index > self.first_bits_store
            && let Some(bit) = self.slot_at(key)
        {
            let mask = 1u8.checked_shl(u32::from(bit)).unwrap_or(0);
            state.active.must |= mask;
            state.active.may |= mask;
            let closure = closure(state, value);
            self.findings
                .slot_stores
                .insert(index, SlotStore { bit, closure });
        }
        // Of a cell that is not loaded from only the address of a closure is of use.
        let is_useless = match value {
            Value::Defined(_) | Value::Bits(_) | Value::Constant(..SMALLEST_ADDRESS) => {
                self.loaded.binary_search(&key).is_err()
            }
            _ => false,
        };
        let value = if is_useless { Value::Unknown } else { value };
        self.put(state, key, size, value);
    }

    fn put(&self, state: &mut State, key: i64, size: u8, value: Value) {
        state.put(Cell {
            key,
            size,
            is_exposed: matches!(value, Value::Defined(_)) && self.is_exposed(key, size),
            value,
        });
    }

    /// A store to `deferBits`: it activates, initialises, or clears a bit at an exit.
    fn store_bits(&mut self, state: &mut State, index: usize, new: Bits) {
        if index == self.first_bits_store {
            state.active = Bits::NONE;
            return;
        }
        self.findings.bits_set |= new.may;
        let cleared = state.active.may & !new.may;
        if cleared == 0 {
            return;
        }
        if cleared.count_ones() == 1 {
            let bit = cleared.trailing_zeros() as u8;
            self.findings.exit_stores.insert(index, bit);
        }
        state.active = Bits {
            must: state.active.must & !cleared,
            may: state.active.may & new.may,
        };
    }

    fn load(&mut self, state: &mut State, index: usize, to: Register, from: Place, size: u8) {
        let fresh = Value::Defined(index as u64);
        let value = match from {
            Place::Based(base, displacement) if !matches!(state.get(base), Value::Stack(_)) => {
                match state.get(base).plus(displacement) {
                    Value::Constant(address) if size == 8 => self.word(VirtualAddress(address)),
                    _ => Value::Unknown,
                }
            }
            Place::Stack(_) | Place::Based(..) => {
                let Some(key) = self.stack_cell(state, index, from) else {
                    return state.set(to, Value::Unknown);
                };
                let value = state.cell(key);
                if value == Value::Unknown && size == 8 {
                    // The next load of this cell yields the same.
                    self.put(state, key, size, fresh);
                }
                value
            }
            // A word of read-only data: a GOT entry, or the code pointer of a static closure.
            Place::Absolute(address) if size == 8 => self.word(address),
            Place::Absolute(_) | Place::Unknown => Value::Unknown,
        };
        let value = match size {
            1 => value.and(Value::Constant(0xff)),
            8 if value == Value::Unknown => fresh,
            _ => value,
        };
        state.set(to, value);
    }

    /// A word of the file as a constant, if it is an address of this binary.
    fn word(&self, address: VirtualAddress) -> Value {
        match self.image.constant_word(address) {
            Some(word) if self.image.bytes_from(VirtualAddress(word)).is_some() => {
                Value::Constant(word)
            }
            _ => Value::Unknown,
        }
    }

    fn call(&self, state: &mut State, instruction: &Instruction, callee: Callee) {
        if callee == Callee::WriteBarrier {
            // It returns a buffer in R11 (amd64) or R25 (arm64) since 1.21.
            state.set(11, Value::Unknown);
            state.set(25, Value::Unknown);
            return;
        }
        state.registers = [Value::Unknown; REGISTERS];
        if callee != Callee::NewObject {
            state.forget_pointers();
        } else {
            state.set(
                self.conventions.first_argument,
                Value::Object(instruction.address.0),
            );
        }
    }

    fn record(
        &mut self,
        state: &mut State,
        index: usize,
        instruction: &Instruction,
        callee: Callee,
    ) {
        let may_fault = match instruction.faults {
            Faults::Never => false,
            Faults::ThroughBase(base) => !state.dereference(base, self.conventions.g),
            Faults::Maybe => true,
        };
        let may_panic = match instruction.flow {
            Flow::IndirectCall => true,
            Flow::Call(_) => !matches!(
                callee,
                Callee::AlwaysReturns | Callee::WriteBarrier | Callee::Duff | Callee::NewObject
            ),
            _ => false,
        };
        if let Some(diverts) = self.findings.diverts.get_mut(index) {
            *diverts = may_fault || may_panic;
        }
        if let Callee::Registers(mechanism) = callee {
            self.findings
                .closures
                .insert(index, self.closure_argument(state, index, mechanism));
        }
    }

    /// The closure that a registering call is given.
    fn closure_argument(&self, state: &State, index: usize, mechanism: Mechanism) -> Closure {
        /// `_defer.fn`, in all releases.
        const RECORD_FN: i64 = 24;
        let argument = self.argument(state, index, mechanism);
        match (mechanism, argument) {
            (Mechanism::Stack, Value::Stack(record)) => {
                closure(state, state.cell(record.wrapping_sub(RECORD_FN)))
            }
            (Mechanism::Stack, _) => Closure::Unknown,
            _ => closure(state, argument),
        }
    }

    fn argument(&self, state: &State, index: usize, mechanism: Mechanism) -> Value {
        let in_register = state.get(self.conventions.first_argument);
        if in_register.is_mapped() {
            return in_register;
        }
        // Up to 1.16 (arm64: 1.17) arguments are on the stack; deferproc has `siz` first.
        let skip = if mechanism == Mechanism::Heap { 8 } else { 0 };
        let key = self
            .code
            .stack_key(index, self.conventions.stack_arguments + skip);
        state.cell(key)
    }
}

fn closure(state: &State, value: Value) -> Closure {
    match value {
        Value::Constant(address) => Closure::Static(VirtualAddress(address)),
        Value::Object(allocation) => Closure::Object(allocation),
        Value::Stack(key) => match state.cell(key) {
            Value::Constant(code) => Closure::Code(VirtualAddress(code)),
            _ => Closure::Unknown,
        },
        Value::Bits(_) | Value::Defined(_) | Value::Unknown => Closure::Unknown,
    }
}
