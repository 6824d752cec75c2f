//! The tables of pclntab that give each program counter a value: stack depth, line, file, inlined calls.

use super::{Func, Pclntab};
use crate::VirtualAddress;
use crate::bytes::Bytes;
use crate::release::InlineEntry;

impl<'data> Pclntab<'data> {
    /// `(address, value)` steps of a pc-value table: each value holds from its address to the
    /// next step's; the last step's value is only a terminator.
    pub fn steps(&self, func: Func, table: u32) -> Steps<'data> {
        let start = if table == 0 {
            None
        } else {
            self.pctab.checked_add(u64::from(table))
        };
        Steps {
            data: self.data,
            at: start.unwrap_or(u64::MAX),
            address: func.entry,
            value: -1,
            quantum: self.quantum,
            first: true,
            limit: func.end,
        }
    }

    /// The stack depth table: bytes by which SP has been lowered since entry.
    pub fn depth_steps(&self, func: Func) -> Steps<'data> {
        self.steps(func, self.field(func, self.fields().pcsp).unwrap_or(0))
    }

    fn value_at(&self, func: Func, table: u32, address: VirtualAddress) -> Option<i32> {
        self.steps(func, table)
            .find(|s| address < s.end)
            .map(|s| s.value)
    }

    /// Source line at `address`; 0 if there is none.
    pub fn line(&self, func: Func, address: VirtualAddress) -> u32 {
        let table = self.field(func, self.fields().pcln).unwrap_or(0);
        let line = self.value_at(func, table, address).unwrap_or(0);
        u32::try_from(line).unwrap_or(0)
    }

    /// Source file at `address`.
    pub fn file(&self, func: Func, address: VirtualAddress) -> Option<&'data [u8]> {
        let table = self.field(func, self.fields().pcfile)?;
        let index = u64::try_from(self.value_at(func, table, address)?).ok()?;
        let name = match self.fields().cu_offset {
            None => {
                let at = self.filetab.checked_add(index.checked_mul(4)?)?;
                u64::from(self.data.u32(at)?)
            }
            Some(field) => {
                let unit = u64::from(self.field(func, field)?);
                let at = self
                    .cutab
                    .checked_add(unit.checked_add(index)?.checked_mul(4)?)?;
                self.filetab.checked_add(u64::from(self.data.u32(at)?))?
            }
        };
        self.string(name)
    }

    /// The value of a pcdata table (such as the inline tree index) at `address`.
    pub fn pcdata(&self, func: Func, table: u32, address: VirtualAddress) -> Option<i32> {
        self.value_at(func, self.pcdata_table(func, table)?, address)
    }

    /// The first address at which an inlined call begins.
    pub fn first_inlined(&self, func: Func) -> Option<VirtualAddress> {
        let table = self.pcdata_table(func, self.layout.inline_tree?.pcdata)?;
        let mut start = func.entry;
        for step in self.steps(func, table) {
            if step.value >= 0 {
                return Some(start);
            }
            start = step.end;
        }
        None
    }

    fn pcdata_table(&self, func: Func, table: u32) -> Option<u32> {
        if table >= self.field(func, self.fields().npcdata)? {
            return None;
        }
        let at = self
            .fields()
            .size
            .checked_add(u64::from(table).checked_mul(4)?)?;
        self.field(func, at)
    }

    /// The inlined calls at `address`, innermost first: the name of each and the address whose
    /// line is its call's position in the caller.
    pub fn inlined(
        &self,
        func: Func,
        address: VirtualAddress,
        tree: Bytes<'data>,
    ) -> Vec<(&'data [u8], VirtualAddress)> {
        /// Deeper than the inliner goes; a damaged table may form a ring.
        const DEEPEST: usize = 256;
        let InlineEntry {
            size,
            name,
            parent_pc,
        } = self.layout.inline_entry;
        let mut calls = Vec::new();
        let mut at = address;
        while calls.len() < DEEPEST {
            let table = self.layout.inline_tree;
            let index = table
                .and_then(|table| self.pcdata(func, table.pcdata, at))
                .and_then(|i| u64::try_from(i).ok());
            let Some(entry) = index.and_then(|i| i.checked_mul(size)) else {
                break;
            };
            let field = |offset: u64| tree.u32(entry.checked_add(offset)?);
            let (Some(name), Some(parent)) = (field(name), field(parent_pc)) else {
                break;
            };
            let (Some(name), Some(parent)) = (
                self.name_at(name),
                func.entry.checked_add(u64::from(parent)),
            ) else {
                break;
            };
            calls.push((name, parent));
            at = parent;
        }
        calls
    }
}

/// One run of a pc-value table: `value` holds up to, not including, `end`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub end: VirtualAddress,
    pub value: i32,
}

/// Iterates over the runs of a pc-value table: pairs of (zigzag Δvalue, Δpc / quantum) from
/// value −1, ended by a Δvalue of 0 that is not the first.
#[derive(Debug)]
pub(crate) struct Steps<'data> {
    data: Bytes<'data>,
    at: u64,
    address: VirtualAddress,
    value: i32,
    quantum: u64,
    first: bool,
    /// The function's end.
    limit: VirtualAddress,
}

impl Iterator for Steps<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let zigzag = self.data.uvarint(&mut self.at)? as u32;
        if zigzag == 0 && !self.first {
            self.at = u64::MAX;
            return None;
        }
        self.first = false;
        let delta = (zigzag >> 1) as i32 ^ -((zigzag & 1) as i32);
        self.value = self.value.wrapping_add(delta);
        let advance = self.data.uvarint(&mut self.at)?.checked_mul(self.quantum)?;
        if advance == 0 || self.address >= self.limit {
            // The compiler writes no empty runs. Without them there are no more runs than code.
            self.at = u64::MAX;
            return None;
        }
        self.address = self.address.checked_add(advance)?;
        Some(Step {
            end: self.address,
            value: self.value,
        })
    }
}
