//! Abstract interpretation of one function: which closures go into which slots, which `deferBits`
//! stores set and which clear, and where a block can be left by a panic.
//!
//! The lattice is small (see [`Value`]), so a worklist over basic blocks ends quickly; a second
//! pass over the settled states records what happens at each instruction.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::calls::Callee;
use crate::code::Code;
use crate::decode::{
    Conventions, Faults, Flow, Instruction, Op, Operand, Place, Register, RegisterSet,
};
use crate::elf::Image;
use crate::module::OpenDefers;
use crate::value::{Bits, Value};
use crate::{Mechanism, VirtualAddress};

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
    registers: [Value; REGISTERS],
    /// What stack cells hold, by key; absent is unknown.
    cells: Vec<Cell>,
    /// The definitions ([`Value::Defined`]) through which memory was accessed: not nil. Sorted.
    dereferenced: Vec<u32>,
    /// The bits of the defers that are registered and have not run.
    active: Bits,
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct Cell {
    /// Bytes below varp; the cell covers keys `key − size + 1 ..= key`.
    key: i64,
    size: u8,
    value: Value,
}

/// General registers of the larger architecture, and one for SP or zero.
const REGISTERS: usize = 32;

impl State {
    /// At a function's entry each register holds something of its own.
    fn at_entry(instructions: usize) -> Self {
        let first = u32::try_from(instructions).unwrap_or(u32::MAX - REGISTERS as u32);
        let mut registers = [Value::Unknown; REGISTERS];
        for (register, definition) in registers.iter_mut().zip(first..) {
            *register = Value::Defined(definition);
        }
        Self {
            registers,
            cells: Vec::new(),
            dereferenced: Vec::new(),
            active: Bits::NONE,
        }
    }

    fn get(&self, register: Register) -> Value {
        self.registers
            .get(usize::from(register))
            .copied()
            .unwrap_or(Value::Unknown)
    }

    fn set(&mut self, register: Register, value: Value) {
        if let Some(place) = self.registers.get_mut(usize::from(register)) {
            *place = value;
        }
    }

    fn clobber(&mut self, mut registers: RegisterSet) {
        while registers != 0 {
            self.set(registers.trailing_zeros() as u8, Value::Unknown);
            registers &= registers - 1;
        }
    }

    fn operand(&self, operand: Operand) -> Value {
        match operand {
            Operand::Register(register) => self.get(register),
            Operand::Immediate(value) => Value::Constant(value),
            Operand::Unknown => Value::Unknown,
        }
    }

    /// Sets a cell, forgetting every other that overlaps it.
    fn put(&mut self, key: i64, size: u8, value: Value) {
        /// No cell is larger.
        const LARGEST: i64 = 8;
        let overlaps = |c: &Cell| c.key.saturating_sub(i64::from(c.size)) < key;
        let known = value != Value::Unknown;
        // Addresses run against keys: the store covers keys key − size + 1 ..= key.
        let low = key.saturating_sub(i64::from(size));
        let mut at = self.cells.partition_point(|c| c.key <= low);
        while let Some(cell) = self.cells.get_mut(at)
            && cell.key < key.saturating_add(LARGEST)
        {
            if known && (cell.key, cell.size) == (key, size) {
                // Nothing else can overlap it.
                cell.value = value;
                return;
            }
            if overlaps(cell) {
                self.cells.remove(at);
            } else {
                at += 1;
            }
        }
        if known {
            let at = self.cells.partition_point(|c| c.key < key);
            self.cells.insert(at, Cell { key, size, value });
        }
    }

    fn cell(&self, key: i64) -> Value {
        match self.cells.binary_search_by_key(&key, |c| c.key) {
            Ok(at) => self.cells.get(at).map_or(Value::Unknown, |c| c.value),
            Err(_) => Value::Unknown,
        }
    }

    /// Memory was accessed through `base`.
    fn dereference(&mut self, base: Register) {
        if let Value::Defined(definition) = self.get(base)
            && let Err(at) = self.dereferenced.binary_search(&definition)
        {
            self.dereferenced.insert(at, definition);
        }
    }

    /// Whether a memory access through `base` surely does not fault.
    fn is_mapped(&self, base: Register, g: Register) -> bool {
        let value = self.get(base);
        base == g
            || value.is_mapped()
            || matches!(value, Value::Defined(d) if self.dereferenced.binary_search(&d).is_ok())
    }

    /// Forgets what was defined in `block`, which is about to define it anew.
    fn enter(&mut self, block: &Range<usize>) {
        let stale =
            |value: &Value| matches!(value, Value::Defined(d) if block.contains(&(*d as usize)));
        for register in &mut self.registers {
            if stale(register) {
                *register = Value::Unknown;
            }
        }
        self.cells.retain(|c| !stale(&c.value));
        self.dereferenced
            .retain(|d| !block.contains(&(*d as usize)));
    }

    /// Joins `other` in; true if that changed anything.
    fn join(&mut self, other: &Self) -> bool {
        let mut changed = false;
        for (mine, theirs) in self.registers.iter_mut().zip(&other.registers) {
            let joined = mine.join(*theirs);
            changed |= joined != *mine;
            *mine = joined;
        }
        let known = self.dereferenced.len();
        self.dereferenced
            .retain(|d| other.dereferenced.binary_search(d).is_ok());
        changed |= self.dereferenced.len() != known;
        let mut theirs = other.cells.iter().peekable();
        self.cells.retain_mut(|mine| {
            while theirs.next_if(|t| t.key < mine.key).is_some() {}
            let joined = match theirs.peek() {
                Some(t) if t.key == mine.key && t.size == mine.size => mine.value.join(t.value),
                _ => Value::Unknown,
            };
            changed |= joined != mine.value;
            mine.value = joined;
            joined != Value::Unknown
        });
        let active = self.active.join(other.active);
        changed |= active != self.active;
        self.active = active;
        changed
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
        analysis.first_bits_store = analysis.find_first_bits_store().unwrap_or(usize::MAX);
        analysis.findings.diverts = vec![true; code.instructions.len()];
        analysis.findings.reached = vec![false; code.instructions.len()];
        let (states, settled) = analysis.settle();
        analysis.findings.settled = settled;
        for (block, state) in code.blocks.iter().zip(states) {
            let Some(mut state) = state else { continue };
            state.enter(&block.range);
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
            *first = Some(State::at_entry(code.instructions.len()));
        }
        // In order of address, which is close to the order of execution.
        let mut work = BTreeSet::from([0usize]);
        let mut budget = code.blocks.len().saturating_mul(VISITS_PER_BLOCK);
        while let Some(at) = work.pop_first() {
            if budget == 0 {
                return (states, false);
            }
            budget -= 1;
            let (Some(block), Some(Some(state))) = (code.blocks.get(at), states.get(at)) else {
                continue;
            };
            let mut state = state.clone();
            state.enter(&block.range);
            for index in block.range.clone() {
                self.step(&mut state, index, false);
            }
            let (last, others) = match block.next.split_last() {
                Some((last, others)) => (*last, others),
                None => continue,
            };
            for next in others {
                if merge(&mut states, *next, Cow::Borrowed(&state)) {
                    work.insert(*next);
                }
            }
            if merge(&mut states, last, Cow::Owned(state)) {
                work.insert(last);
            }
        }
        (states, true)
    }

    /// The first store to `deferBits`: nothing precedes it but straight code of the entry.
    fn find_first_bits_store(&self) -> Option<usize> {
        self.open?;
        // Addresses of stack cells that registers hold: arm64 forms those that no store can name
        // in a register first.
        let mut state = State::at_entry(self.code.instructions.len());
        for (index, instruction) in self.code.instructions.iter().enumerate() {
            if self
                .stores(&state, index)
                .any(|(key, size, _)| self.is_bits(key, size))
            {
                return Some(index);
            }
            match instruction.op {
                Op::StackAddress(to, displacement) => {
                    state.set(to, Value::Stack(self.code.stack_key(index, displacement)));
                }
                Op::Add(to, from, offset) => state.set(to, state.get(from).plus(offset)),
                other => {
                    if let Some(to) = other.written() {
                        state.set(to, Value::Unknown);
                    }
                }
            }
            state.clobber(instruction.clobbers);
        }
        None
    }

    fn is_bits(&self, key: i64, size: u8) -> bool {
        size == 1 && self.open.is_some_and(|open| open.bits == key)
    }

    fn slot_at(&self, key: i64) -> Option<u8> {
        let at = self.open?.slots.iter().position(|slot| *slot == key)?;
        u8::try_from(at).ok()
    }

    /// The stack cells that an instruction stores to: key, size and operand.
    fn stores(
        &self,
        state: &State,
        index: usize,
    ) -> impl Iterator<Item = (i64, u8, Operand)> + use<> {
        let (mut first, mut second) = (None, None);
        if let Some(Instruction {
            op:
                Op::Store {
                    to,
                    values,
                    count,
                    size,
                },
            ..
        }) = self.code.instructions.get(index)
            && let Some(key) = self.stack_cell(state, index, *to)
        {
            first = Some((key, *size, values[0]));
            if *count > 1 {
                second = Some((key.wrapping_sub(i64::from(*size)), *size, values[1]));
            }
        }
        first.into_iter().chain(second)
    }

    /// The key of the stack cell at a place, if it is one.
    fn stack_cell(&self, state: &State, index: usize, place: Place) -> Option<i64> {
        match place {
            Place::Stack(displacement) => Some(self.code.stack_key(index, displacement)),
            Place::Based(base, displacement) => match state.get(base) {
                Value::Stack(key) => Some(key.wrapping_sub(displacement)),
                _ => None,
            },
            Place::Absolute(_) | Place::Unknown => None,
        }
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
            state.dereference(base);
        }
        if !self.store(state, index, &instruction, record) {
            self.compute(state, index, instruction.op);
        }
        state.clobber(instruction.clobbers);
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
        if let Place::Based(base, 0) = to
            && let (Value::Object(object), Value::Constant(code)) =
                (state.get(base), state.operand(values[0]))
        {
            self.findings.object_code.entry(object).or_insert(code);
        }
        for (key, size, operand) in self.stores(state, index) {
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
        }
    }

    fn load(&mut self, state: &mut State, index: usize, to: Register, from: Place, size: u8) {
        let fresh = Value::Defined(u32::try_from(index).unwrap_or(u32::MAX));
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
                    state.put(key, size, fresh);
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

/// Joins a state into the start of block `at`; true if the block has something to learn.
fn merge(states: &mut [Option<State>], at: usize, state: Cow<'_, State>) -> bool {
    match states.get_mut(at) {
        Some(Some(known)) => known.join(&state),
        Some(unknown) => {
            *unknown = Some(state.into_owned());
            true
        }
        None => false,
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
