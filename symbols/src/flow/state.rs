//! What the analysis of a function knows before an instruction: values of registers and stack cells,
//! which pointers are not nil, and which defers are active.

use std::ops::Range;

use super::value::{Bits, Definition, Value};
use crate::decode::{Operand, Register, RegisterSet};

/// What is known before an instruction.
#[derive(PartialEq, Debug)]
pub(crate) struct State {
    pub registers: [Value; REGISTERS],
    /// What stack cells hold, by key; absent is unknown.
    pub cells: Vec<Cell>,
    /// The definitions ([`Value::Defined`]) through which memory was accessed, or that were compared
    /// with nil: they are not nil. Sorted.
    pub dereferenced: Vec<Definition>,
    /// The bits of the defers that are registered and have not run.
    pub active: Bits,
    /// Whether a pointer may be in a cell that other code may write to.
    has_exposed: bool,
}

/// A stack cell and what it holds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Cell {
    /// Bytes below varp; the cell covers keys `key − size + 1 ..= key`.
    pub key: i64,
    pub size: u8,
    /// Whether it holds a pointer that other code may overwrite.
    pub is_exposed: bool,
    pub value: Value,
}

/// General registers of the larger architecture, and one for SP or zero.
pub(crate) const REGISTERS: usize = 32;

/// Cells and pointers that a state remembers: frames of the compiler's have some dozens in use.
const MOST_KNOWN: usize = 4096;

impl State {
    /// At a function's entry each of so many registers holds something of its own.
    pub fn at_entry(instructions: usize, count: usize) -> Self {
        let mut registers = [Value::Unknown; REGISTERS];
        for (register, definition) in registers.iter_mut().take(count).zip(instructions as u64..) {
            *register = Value::Defined(definition);
        }
        Self {
            registers,
            cells: Vec::new(),
            dereferenced: Vec::new(),
            active: Bits::NONE,
            has_exposed: false,
        }
    }

    #[inline]
    pub fn get(&self, register: Register) -> Value {
        self.registers
            .get(usize::from(register))
            .copied()
            .unwrap_or(Value::Unknown)
    }

    #[inline]
    pub fn set(&mut self, register: Register, value: Value) {
        if let Some(place) = self.registers.get_mut(usize::from(register)) {
            *place = value;
        }
    }

    /// How much it holds.
    pub fn facts(&self) -> usize {
        REGISTERS + self.cells.len() + self.dereferenced.len()
    }

    #[inline]
    pub fn clobber(&mut self, mut registers: RegisterSet) {
        while registers != 0 {
            self.set(registers.trailing_zeros() as u8, Value::Unknown);
            registers &= registers - 1;
        }
    }

    #[inline]
    pub fn operand(&self, operand: Operand) -> Value {
        match operand {
            Operand::Register(register) => self.get(register),
            Operand::Immediate(value) => Value::Constant(value),
            Operand::Unknown => Value::Unknown,
        }
    }

    /// Sets a cell, forgetting every other that overlaps it.
    pub fn put(&mut self, cell: Cell) {
        /// No cell is larger.
        const LARGEST: i64 = 8;
        let Cell { key, size, .. } = cell;
        let known = cell.value != Value::Unknown;
        if !known && self.cells.is_empty() {
            return;
        }
        // Addresses run against keys: the store covers keys key − size + 1 ..= key.
        let low = key.saturating_sub(i64::from(size));
        let first = self.cells.partition_point(|c| c.key <= low);
        let mut at = first;
        while let Some(other) = self.cells.get_mut(at)
            && other.key < key.saturating_add(LARGEST)
        {
            if known && (other.key, other.size) == (key, size) {
                // Nothing else can overlap it.
                *other = cell;
                self.has_exposed |= cell.is_exposed;
                return;
            }
            if other.key.saturating_sub(i64::from(other.size)) < key {
                self.cells.remove(at);
            } else {
                at += 1;
            }
        }
        if known && self.cells.len() < MOST_KNOWN {
            // Those from `first` on that are left lie behind it.
            self.cells.insert(first, cell);
            self.has_exposed |= cell.is_exposed;
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
    pub fn is_not_nil(&mut self, definition: Definition) {
        if let Err(at) = self.dereferenced.binary_search(&definition) {
            self.dereferenced.insert(at, definition);
        }
    }

    /// Forgets what was defined in `block`, which is about to define it anew. (Before its first
    /// visit there is nothing of that.)
    pub fn enter(&mut self, block: &Range<usize>) {
        let block = block.start as u64..block.end as u64;
        let defined_in = |d: Definition| block.contains(&d);
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
    #[inline]
    pub fn forget_pointers(&mut self) {
        if std::mem::replace(&mut self.has_exposed, false) {
            self.cells.retain(|c| !c.is_exposed);
        }
    }

    /// Joins `other` in, in which `not_nil` is not nil, too; true if that changed anything.
    pub fn join(&mut self, other: &Self, not_nil: Option<Definition>) -> bool {
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
        let both = self.cells.iter().zip(&other.cells);
        let same = both.take_while(|(mine, theirs)| mine == theirs).count();
        if same < self.cells.len() {
            changed |= self.join_cells(other, same);
        }
        let active = self.active.join(other.active);
        changed |= active != self.active;
        self.active = active;
        changed
    }

    /// Joins the cells from `first` on, of both; true if that changed anything.
    fn join_cells(&mut self, other: &Self, first: usize) -> bool {
        let mut changed = false;
        let mut kept = first;
        let mut theirs = other.cells.iter().skip(first).peekable();
        for at in first..self.cells.len() {
            let Some(mine) = self.cells.get(at).copied() else {
                break;
            };
            while theirs.next_if(|t| t.key < mine.key).is_some() {}
            let value = match theirs.peek() {
                Some(theirs) if (theirs.key, theirs.size) == (mine.key, mine.size) => {
                    mine.value.join(theirs.value)
                }
                _ => Value::Unknown,
            };
            changed |= value != mine.value;
            if value != Value::Unknown
                && let Some(place) = self.cells.get_mut(kept)
            {
                *place = Cell { value, ..mine };
                kept += 1;
            }
        }
        self.cells.truncate(kept);
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
            has_exposed: self.has_exposed,
        }
    }

    /// Without new memory, where what this state has suffices.
    fn clone_from(&mut self, other: &Self) {
        self.registers = other.registers;
        self.cells.clone_from(&other.cells);
        self.dereferenced.clone_from(&other.dereferenced);
        self.active = other.active;
        self.has_exposed = other.has_exposed;
    }
}
