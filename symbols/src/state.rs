//! What the analysis of a function knows before an instruction: values of registers and stack cells,
//! which pointers are not nil, and which defers are active.

use std::ops::Range;

use crate::decode::{Operand, Register, RegisterSet};
use crate::value::{Bits, Value};

/// What is known before an instruction.
#[derive(Clone, PartialEq, Debug)]
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

    /// Memory was accessed through `base`.
    pub fn dereference(&mut self, base: Register) {
        if let Value::Defined(definition) = self.get(base)
            && self.dereferenced.len() < MOST_KNOWN
            && let Err(at) = self.dereferenced.binary_search(&definition)
        {
            self.dereferenced.insert(at, definition);
        }
    }

    /// Whether a memory access through `base` surely does not fault.
    pub fn is_mapped(&self, base: Register, g: Register) -> bool {
        let value = self.get(base);
        base == g
            || value.is_mapped()
            || matches!(value, Value::Defined(d) if self.dereferenced.binary_search(&d).is_ok())
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
        // Variables do not overlap, so the last one that starts before the cell's end decides.
        let reaches = |start: i64, end: i64| {
            let after = exposed.partition_point(|e| e.start < end);
            exposed
                .get(..after)
                .is_some_and(|before| before.last().is_some_and(|e| start < e.end))
        };
        self.cells.retain(|c| {
            let start = c.key.wrapping_neg();
            !matches!(c.value, Value::Defined(_))
                || !reaches(start, start.saturating_add(i64::from(c.size)))
        });
    }

    /// Joins `other` in; true if that changed anything.
    pub fn join(&mut self, other: &Self) -> bool {
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
