//! What the analysis of a function knows before an instruction: values of registers and stack cells,
//! which pointers are not nil, and which defers are active.

use std::ops::Range;

use super::value::{Bits, Value};
use crate::decode::{Operand, Register, RegisterSet};

/// What is known before an instruction.
#[derive(PartialEq, Debug)]
pub(crate) struct State {
    pub registers: [Value; REGISTERS],
    /// What stack cells hold, by key; absent is unknown.
    pub cells: Vec<Cell>,
    /// The definitions ([`Value::Defined`]) through which memory was accessed, or that were compared
    /// with nil: they are not nil. Sorted.
    pub dereferenced: Vec<u32>,
    /// The bits of the defers that are registered and have not run.
    pub active: Bits,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Cell {
    /// Bytes below varp; the cell covers keys `key − size + 1 ..= key`.
    key: i64,
    size: u8,
    value: Value,
}

/// General registers of the larger architecture, and one for SP or zero.
pub(crate) const REGISTERS: usize = 32;

/// Cells and pointers that a state remembers: frames of the compiler's have some dozens in use.
const MOST_KNOWN: usize = 4096;

impl State {
    /// At a function's entry each register holds something of its own.
    pub fn at_entry(instructions: usize) -> Self {
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

    pub fn get(&self, register: Register) -> Value {
        self.registers
            .get(usize::from(register))
            .copied()
            .unwrap_or(Value::Unknown)
    }

    pub fn set(&mut self, register: Register, value: Value) {
        if let Some(place) = self.registers.get_mut(usize::from(register)) {
            *place = value;
        }
    }

    /// How much it holds.
    pub fn facts(&self) -> usize {
        REGISTERS + self.cells.len() + self.dereferenced.len()
    }

    pub fn clobber(&mut self, mut registers: RegisterSet) {
        while registers != 0 {
            self.set(registers.trailing_zeros() as u8, Value::Unknown);
            registers &= registers - 1;
        }
    }

    pub fn operand(&self, operand: Operand) -> Value {
        match operand {
            Operand::Register(register) => self.get(register),
            Operand::Immediate(value) => Value::Constant(value),
            Operand::Unknown => Value::Unknown,
        }
    }

    /// Sets a cell, forgetting every other that overlaps it.
    pub fn put(&mut self, key: i64, size: u8, value: Value) {
        /// No cell is larger.
        const LARGEST: i64 = 8;
        if value == Value::Unknown && self.cells.is_empty() {
            return;
        }
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
        if known && self.cells.len() < MOST_KNOWN {
            let at = self.cells.partition_point(|c| c.key < key);
            self.cells.insert(at, Cell { key, size, value });
        }
    }

    pub fn cell(&self, key: i64) -> Value {
        match self.cells.binary_search_by_key(&key, |c| c.key) {
            Ok(at) => self.cells.get(at).map_or(Value::Unknown, |c| c.value),
            Err(_) => Value::Unknown,
        }
    }

    /// Memory is accessed through `base`; whether that surely does not fault.
    pub fn dereference(&mut self, base: Register, g: Register) -> bool {
        match self.get(base) {
            Value::Defined(definition) => match self.dereferenced.binary_search(&definition) {
                Ok(_) => true,
                Err(at) => {
                    if self.dereferenced.len() < MOST_KNOWN {
                        self.dereferenced.insert(at, definition);
                    }
                    base == g
                }
            },
            value => base == g || value.is_mapped(),
        }
    }

    /// The pointer that was defined there is not nil.
    pub fn is_not_nil(&mut self, definition: u32) {
        if let Err(at) = self.dereferenced.binary_search(&definition) {
            self.dereferenced.insert(at, definition);
        }
    }

    /// Forgets what was defined in `block`, which is about to define it anew. (Before its first
    /// visit there is nothing of that.)
    pub fn enter(&mut self, block: &Range<usize>) {
        let defined_in = |d: u32| block.contains(&(d as usize));
        let stale = |value: &Value| matches!(value, Value::Defined(d) if defined_in(*d));
        for register in &mut self.registers {
            if stale(register) {
                *register = Value::Unknown;
            }
        }
        self.cells.retain(|c| !stale(&c.value));
        self.dereferenced.retain(|d| !defined_in(*d));
    }

    /// Forgets the pointers in cells that other code may have changed.
    pub fn forget_pointers(&mut self, exposed: &[Range<i64>]) {
        let is_pointer = |c: &Cell| matches!(c.value, Value::Defined(_));
        if exposed.is_empty() || !self.cells.iter().any(is_pointer) {
            return;
        }
        // Variables do not overlap, so the last one that starts before the cell's end decides.
        let reaches = |start: i64, end: i64| {
            let after = exposed.partition_point(|e| e.start < end);
            exposed
                .get(..after)
                .is_some_and(|before| before.last().is_some_and(|e| start < e.end))
        };
        self.cells.retain(|c| {
            let start = c.key.wrapping_neg();
            !is_pointer(c) || !reaches(start, start.saturating_add(i64::from(c.size)))
        });
    }

    /// Joins `other` in, in which `not_nil` is not nil, too; true if that changed anything.
    pub fn join(&mut self, other: &Self, not_nil: Option<u32>) -> bool {
        let mut changed = false;
        for (mine, theirs) in self.registers.iter_mut().zip(&other.registers) {
            if *mine != Value::Unknown && *mine != *theirs {
                let joined = mine.join(*theirs);
                changed |= joined != *mine;
                *mine = joined;
            }
        }
        if self.dereferenced != other.dereferenced {
            let known = self.dereferenced.len();
            self.dereferenced
                .retain(|d| Some(*d) == not_nil || other.dereferenced.binary_search(d).is_ok());
            changed |= self.dereferenced.len() != known;
        }
        if self.cells != other.cells {
            let mut at = 0;
            self.cells.retain_mut(|mine| {
                while other.cells.get(at).is_some_and(|t| t.key < mine.key) {
                    at += 1;
                }
                let joined = match other.cells.get(at) {
                    Some(theirs) if (theirs.key, theirs.size) == (mine.key, mine.size) => {
                        mine.value.join(theirs.value)
                    }
                    _ => Value::Unknown,
                };
                if joined != mine.value {
                    changed = true;
                    mine.value = joined;
                }
                joined != Value::Unknown
            });
        }
        let active = self.active.join(other.active);
        changed |= active != self.active;
        self.active = active;
        changed
    }
}

impl Clone for State {
    fn clone(&self) -> Self {
        Self {
            registers: self.registers,
            cells: self.cells.clone(),
            dereferenced: self.dereferenced.clone(),
            active: self.active,
        }
    }

    /// Without new memory, where what this state has suffices.
    fn clone_from(&mut self, other: &Self) {
        self.registers = other.registers;
        self.cells.clone_from(&other.cells);
        self.dereferenced.clone_from(&other.dereferenced);
        self.active = other.active;
    }
}
