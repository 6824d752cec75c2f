//! Abstract interpretation of one function: which closures go into which slots, which `deferBits`
//! stores set and which clear, and where a block can be left by a panic.
//!
//! The lattice is small (see [`Value`]), so a worklist over basic blocks ends quickly; a second
//! pass over the settled states records what happens at each instruction.

use std::collections::{BTreeMap, HashMap};

use crate::calls::Callee;
use crate::code::Code;
use crate::decode::{Conventions, Faults, Flow, Instruction, Op, Operand, Place, Register};
use crate::elf::Image;
use crate::module::OpenDefers;
use crate::value::{Bits, Value};
use crate::{Architecture, Mechanism, VirtualAddress};

/// What was found in one function; indices are into its instructions.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Every store of a closure into a slot, in address order.
    pub slot_stores: Vec<SlotStore>,
    /// Every store that clears a bit at an exit: `(index, bit)`, in address order.
    pub exit_stores: Vec<(usize, u8)>,
    /// The closure that each registering call is given.
    pub closures: HashMap<usize, Closure>,
    /// The code pointer stored first into each new object, by the address of its `newobject` call.
    pub object_code: HashMap<u64, u64>,
    /// The bit whose slot an indirect call calls through.
    pub indirect_calls: HashMap<usize, u8>,
    /// Per instruction: whether a panic may start in it, so that the next is not reached.
    pub diverts: Vec<bool>,
    /// Instructions that no path reached.
    pub reached: Vec<bool>,
    /// False if the states had not settled within the bound.
    pub settled: bool,
}

/// One store of a closure into a slot: one open-coded defer statement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotStore {
    pub index: usize,
    pub bit: u8,
    pub closure: Closure,
}

/// What is known of a deferred closure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closure {
    /// A static one at this address: its first word points to the code.
    Static(VirtualAddress),
    /// One on the stack, with this code.
    Code(VirtualAddress),
    /// The object from the `newobject` call at this address; see [`Findings::object_code`].
    Object(u64),
    Unknown,
}

/// What is known before an instruction.
#[derive(Clone, PartialEq, Debug)]
struct State {
    registers: [Value; 32],
    /// Registers through which memory was accessed since they were set: not nil.
    dereferenced: u32,
    /// Stack cells by key, with their size; absent is unknown.
    cells: BTreeMap<i64, (u8, Value)>,
    /// The bits of the defers that are registered and have not run.
    active: Bits,
    /// For each register the slot bit that it was loaded from, or `NO_SLOT`.
    slots: [u8; 32],
}

const NO_SLOT: u8 = u8::MAX;

impl State {
    fn new() -> Self {
        Self {
            registers: [Value::Unknown; 32],
            dereferenced: 0,
            cells: BTreeMap::new(),
            active: Bits::NONE,
            slots: [NO_SLOT; 32],
        }
    }

    fn get(&self, register: Register) -> Value {
        self.registers
            .get(usize::from(register))
            .copied()
            .unwrap_or(Value::Unknown)
    }

    fn slot_of(&self, register: Register) -> u8 {
        self.slots
            .get(usize::from(register))
            .copied()
            .unwrap_or(NO_SLOT)
    }

    fn set(&mut self, register: Register, value: Value) {
        if let Some(place) = self.registers.get_mut(usize::from(register)) {
            *place = value;
        }
        if let Some(slot) = self.slots.get_mut(usize::from(register)) {
            *slot = NO_SLOT;
        }
        self.dereferenced &= !1u32.checked_shl(u32::from(register)).unwrap_or(0);
    }

    fn operand(&self, operand: Operand) -> Value {
        match operand {
            Operand::Register(register) => self.get(register),
            Operand::Immediate(value) => Value::Constant(value),
            Operand::Unknown => Value::Unknown,
        }
    }

    /// Forgets every cell that overlaps `size` bytes from the address with this key.
    fn forget(&mut self, key: i64, size: u8) {
        /// No cell is larger.
        const LARGEST: i64 = 8;
        // Addresses run against keys: the store covers keys (key − size, key].
        let low = key.saturating_sub(i64::from(size));
        let range = low.saturating_add(1)..=key.saturating_add(LARGEST - 1);
        let overlapping: Vec<i64> = self
            .cells
            .range(range)
            .filter(|(cell, (cell_size, _))| **cell - i64::from(*cell_size) < key)
            .map(|(cell, _)| *cell)
            .collect();
        for cell in overlapping {
            self.cells.remove(&cell);
        }
    }

    fn put(&mut self, key: i64, size: u8, value: Value) {
        self.forget(key, size);
        if value != Value::Unknown {
            self.cells.insert(key, (size, value));
        }
    }

    fn cell(&self, key: i64) -> Value {
        self.cells
            .get(&key)
            .map_or(Value::Unknown, |(_, value)| *value)
    }

    /// Whether a memory access through `base` surely does not fault.
    fn is_mapped(&self, base: Register, g: Register) -> bool {
        base == g || self.dereferenced >> base & 1 == 1 || self.get(base).is_mapped()
    }

    /// Joins `other` in; true if that changed anything.
    fn join(&mut self, other: &Self) -> bool {
        let before = self.clone();
        for (mine, theirs) in self.registers.iter_mut().zip(&other.registers) {
            *mine = mine.join(*theirs);
        }
        for (mine, theirs) in self.slots.iter_mut().zip(&other.slots) {
            if mine != theirs {
                *mine = NO_SLOT;
            }
        }
        self.dereferenced &= other.dereferenced;
        self.cells
            .retain(|key, (size, value)| match other.cells.get(key) {
                Some((other_size, theirs)) if other_size == size => {
                    *value = value.join(*theirs);
                    *value != Value::Unknown
                }
                _ => false,
            });
        self.active = self.active.join(other.active);
        *self != before
    }
}

/// The analysis of one function.
pub(crate) struct Analysis<'a> {
    code: &'a Code,
    image: &'a Image<'a>,
    open: Option<&'a OpenDefers>,
    conventions: Conventions,
    /// The instruction that initialises `deferBits`: slot stores before it are zeroing.
    first_bits_store: usize,
    findings: Findings,
}

impl<'a> Analysis<'a> {
    pub fn run(code: &'a Code, image: &'a Image<'a>, open: Option<&'a OpenDefers>) -> Findings {
        let conventions = image.architecture.conventions();
        let mut analysis = Self {
            code,
            image,
            open,
            conventions,
            first_bits_store: usize::MAX,
            findings: Findings::default(),
        };
        analysis.first_bits_store = (0..code.instructions.len())
            .find(|index| {
                analysis
                    .stores(*index)
                    .any(|(key, size, _)| analysis.is_bits(key, size))
            })
            .unwrap_or(usize::MAX);
        analysis.findings.diverts = vec![true; code.instructions.len()];
        analysis.findings.reached = vec![false; code.instructions.len()];
        let (states, settled) = analysis.settle();
        analysis.findings.settled = settled;
        for (block, state) in code.blocks.iter().zip(states) {
            let Some(mut state) = state else { continue };
            for index in block.range.clone() {
                analysis.step(&mut state, index, true);
            }
        }
        analysis.findings
    }

    /// The state at the start of each block that is reached.
    fn settle(&mut self) -> (Vec<Option<State>>, bool) {
        /// Blocks are visited again only while they learn something; the lattice allows a few
        /// dozen steps a register. Code that does not settle is not the compiler's.
        const VISITS_PER_BLOCK: usize = 64;
        let code = self.code;
        let mut states: Vec<Option<State>> = vec![None; code.blocks.len()];
        if let Some(first) = states.first_mut() {
            *first = Some(State::new());
        }
        let mut work = vec![0usize];
        let mut budget = code.blocks.len().saturating_mul(VISITS_PER_BLOCK);
        while let Some(at) = work.pop() {
            if budget == 0 {
                return (states, false);
            }
            budget -= 1;
            let (Some(block), Some(Some(state))) = (code.blocks.get(at), states.get(at)) else {
                continue;
            };
            let mut state = state.clone();
            for index in block.range.clone() {
                self.step(&mut state, index, false);
            }
            for next in &block.next {
                let Some(slot) = states.get_mut(*next) else {
                    continue;
                };
                let changed = match slot {
                    Some(known) => known.join(&state),
                    None => {
                        *slot = Some(state.clone());
                        true
                    }
                };
                if changed && !work.contains(next) {
                    work.push(*next);
                }
            }
        }
        (states, true)
    }

    fn is_bits(&self, key: i64, size: u8) -> bool {
        size == 1 && self.open.is_some_and(|open| open.bits == key)
    }

    fn slot_at(&self, key: i64) -> Option<u8> {
        let at = self.open?.slots.iter().position(|slot| *slot == key)?;
        u8::try_from(at).ok()
    }

    /// The stack cells that an instruction stores to: key, size and operand.
    fn stores(&self, index: usize) -> impl Iterator<Item = (i64, u8, Operand)> + use<> {
        let (mut first, mut second) = (None, None);
        if let Some(Instruction {
            op:
                Op::Store {
                    to: Place::Stack(displacement),
                    values,
                    count,
                    size,
                },
            ..
        }) = self.code.instructions.get(index)
        {
            let key = self.code.stack_key(index, *displacement);
            first = Some((key, *size, values[0]));
            if *count > 1 {
                second = Some((key.wrapping_sub(i64::from(*size)), *size, values[1]));
            }
        }
        first.into_iter().chain(second)
    }

    fn step(&mut self, state: &mut State, index: usize, record: bool) {
        let Some(instruction) = self.code.instructions.get(index).copied() else {
            return;
        };
        let callee = self
            .code
            .callees
            .get(index)
            .copied()
            .unwrap_or(Callee::Other);
        if record {
            self.record(state, index, &instruction, callee);
        }
        if let Faults::ThroughBase(base) = instruction.faults {
            state.dereferenced |= 1u32.checked_shl(u32::from(base)).unwrap_or(0);
        }
        let stored = self.store(state, index, &instruction, record);
        if !stored {
            self.compute(state, index, instruction.op);
        }
        for register in 0..32u8 {
            if instruction.clobbers >> register & 1 == 1 {
                state.set(register, Value::Unknown);
            }
        }
        if matches!(instruction.flow, Flow::Call(_) | Flow::IndirectCall) {
            self.call(state, &instruction, callee);
        }
    }

    /// The effect of a store on cells, bits and slots; false if it is no store.
    fn store(
        &mut self,
        state: &mut State,
        index: usize,
        instruction: &Instruction,
        record: bool,
    ) -> bool {
        let Op::Store { to, values, .. } = instruction.op else {
            return false;
        };
        match to {
            Place::Stack(_) => {}
            Place::Based(base, 0) => {
                if let (Value::Object(object), Value::Constant(code)) =
                    (state.get(base), state.operand(values[0]))
                {
                    self.findings.object_code.entry(object).or_insert(code);
                }
            }
            Place::Based(..) | Place::Absolute(_) | Place::Unknown => {}
        }
        if let Place::Based(base, displacement) = to
            && let Value::Stack(key) = state.get(base)
        {
            let key = key.wrapping_sub(displacement);
            state.put(key, 8, state.operand(values[0]));
        }
        for (key, size, operand) in self.stores(index) {
            let value = state.operand(operand);
            if self.is_bits(key, size) {
                self.store_bits(state, index, value.bits(), record);
            } else if size == 8
                && index > self.first_bits_store
                && let Some(bit) = self.slot_at(key)
            {
                let mask = 1u8.checked_shl(u32::from(bit)).unwrap_or(0);
                state.active.must |= mask;
                state.active.may |= mask;
                if record {
                    let closure = closure(state, value);
                    self.findings.slot_stores.push(SlotStore {
                        index,
                        bit,
                        closure,
                    });
                }
            }
            state.put(key, size, value);
        }
        true
    }

    /// A store to `deferBits`: it activates, initialises, or clears a bit at an exit.
    fn store_bits(&mut self, state: &mut State, index: usize, new: Bits, record: bool) {
        if index == self.first_bits_store {
            state.active = Bits::NONE;
            return;
        }
        let cleared = state.active.may & !new.may;
        if cleared == 0 {
            return;
        }
        if record && cleared.count_ones() == 1 {
            let bit = cleared.trailing_zeros() as u8;
            self.findings.exit_stores.push((index, bit));
        }
        state.active = Bits {
            must: state.active.must & !cleared,
            may: state.active.may & new.may,
        };
    }

    fn compute(&mut self, state: &mut State, index: usize, op: Op) {
        match op {
            Op::Other | Op::Store { .. } => {}
            Op::Set(to, value) => state.set(to, Value::Constant(value)),
            Op::Copy(to, from) => {
                let known = state.dereferenced >> from & 1;
                let slot = state.slot_of(from);
                state.set(to, state.get(from));
                state.dereferenced |= known << to;
                if let Some(place) = state.slots.get_mut(usize::from(to)) {
                    *place = slot;
                }
            }
            Op::StackAddress(to, displacement) => {
                state.set(to, Value::Stack(self.code.stack_key(index, displacement)));
            }
            Op::Add(to, from, offset) => state.set(to, state.get(from).plus(offset)),
            Op::And(to, a, b) => state.set(to, state.get(a).and(state.operand(b))),
            Op::Or(to, a, b) => state.set(to, state.get(a).or(state.operand(b))),
            Op::Select(to, a, b) => state.set(to, state.get(a).join(state.get(b))),
            Op::Boolean(to) => state.set(to, Value::Bits(Bits { must: 0, may: 1 })),
            Op::Load { to, from, size } => self.load(state, index, to, from, size),
        }
    }

    fn load(&mut self, state: &mut State, index: usize, to: Register, from: Place, size: u8) {
        let mut slot = NO_SLOT;
        let value = match from {
            Place::Stack(displacement) => {
                let key = self.code.stack_key(index, displacement);
                slot = self.slot_at(key).unwrap_or(NO_SLOT);
                state.cell(key)
            }
            // A word of read-only data: a GOT entry, or the code pointer of a static closure.
            Place::Absolute(address) if size == 8 => self.word(address),
            Place::Based(base, displacement) => match state.get(base).plus(displacement) {
                Value::Stack(key) => state.cell(key),
                Value::Constant(address) if size == 8 => self.word(VirtualAddress(address)),
                _ => {
                    // The code pointer out of a closure that came from a slot.
                    slot = if displacement == 0 {
                        state.slot_of(base)
                    } else {
                        NO_SLOT
                    };
                    Value::Unknown
                }
            },
            Place::Absolute(_) | Place::Unknown => Value::Unknown,
        };
        // A base that was accessed is not nil any more, unless the load overwrote it.
        let value = if size == 1 {
            value.and(Value::Constant(0xff))
        } else {
            value
        };
        state.set(to, value);
        if let Some(place) = state.slots.get_mut(usize::from(to)) {
            *place = slot;
        }
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
        for register in 0..32u8 {
            state.set(register, Value::Unknown);
        }
        if callee == Callee::NewObject {
            state.set(
                self.conventions.first_argument,
                Value::Object(instruction.address.0),
            );
        }
    }

    fn record(&mut self, state: &State, index: usize, instruction: &Instruction, callee: Callee) {
        if let Some(reached) = self.findings.reached.get_mut(index) {
            *reached = true;
        }
        let may_fault = match instruction.faults {
            Faults::Never => false,
            Faults::ThroughBase(base) => !state.is_mapped(base, self.conventions.g),
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
        if instruction.flow == Flow::IndirectCall {
            // The closure register holds what came out of the slot (RDX, X26).
            let context = match self.image.architecture {
                Architecture::Amd64 => 2,
                Architecture::Arm64 => 26,
            };
            let bit = state.slot_of(context);
            if bit != NO_SLOT {
                self.findings.indirect_calls.insert(index, bit);
            }
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
        Value::Bits(_) | Value::Unknown => Closure::Unknown,
    }
}
