//! Abstract interpretation of one function: which closures go into which slots, which `deferBits`
//! stores set and which clear, and where a block can be left by a panic.
//!
//! The lattice is small (see [`Value`]), so a worklist over basic blocks ends quickly. What happens
//! at each instruction is recorded on the way; a block that is visited again, knowing less, records
//! afresh, so that the last visit is the one that counts.

mod state;
mod step;
mod value;
mod worklist;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::VirtualAddress;
use crate::blocks::Block;
use crate::code::Code;
use crate::decode::{Conventions, Flow, Op, Place};
use crate::elf::Image;
use crate::module::OpenDefers;
use state::State;
use value::{Definition, Value};
pub(crate) use worklist::Memory;
use worklist::Worklist;

/// What was found in one function; indices are into its instructions.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Every store of a closure into a slot, in address order.
    pub slot_stores: BTreeMap<usize, SlotStore>,
    /// Every store that clears a bit at an exit, with the bit, in address order.
    pub exit_stores: BTreeMap<usize, u8>,
    /// The bits that some store may set in `deferBits`. The statement of another one was removed as
    /// unreachable, when the bits had been handed out.
    pub bits_set: u8,
    /// The closure that each registering call is given.
    pub closures: HashMap<usize, Closure>,
    /// The code pointer stored first into each new object, by the address of its `newobject` call.
    pub object_code: HashMap<u64, u64>,
    /// Per instruction: whether a panic may start in it, so that the next is not reached.
    pub diverts: Vec<bool>,
    /// False if the states had not settled within the bound.
    pub settled: bool,
}

/// One store of a closure into a slot: one open-coded defer statement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotStore {
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

/// The analysis of one function.
pub(crate) struct Analysis<'a> {
    code: &'a Code,
    image: &'a Image<'a>,
    open: Option<&'a OpenDefers>,
    conventions: Conventions,
    /// The instruction that initialises `deferBits`: slot stores before it are zeroing.
    first_bits_store: usize,
    /// Keys of the cells that are loaded from, sorted: of the others only constants matter.
    loaded: Vec<i64>,
    /// The parts of the frame that other code may write to, as addresses relative to varp.
    exposed: Vec<Range<i64>>,
    findings: Findings,
}

impl<'a> Analysis<'a> {
    /// `objects` are the variables that are pointed to ([`Module::stack_objects`]).
    ///
    /// [`Module::stack_objects`]: crate::module::Module::stack_objects
    pub fn run(
        code: &'a Code,
        image: &'a Image<'a>,
        open: Option<&'a OpenDefers>,
        objects: Option<Vec<Range<i64>>>,
        memory: &mut Memory,
    ) -> Findings {
        let conventions = image.architecture.conventions();
        let mut analysis = Self {
            code,
            image,
            open,
            conventions,
            first_bits_store: usize::MAX,
            loaded: Vec::new(),
            exposed: Vec::new(),
            findings: Findings::default(),
        };
        analysis.look_at_cells(objects);
        match analysis.find_first_bits_store() {
            Some(index) => analysis.first_bits_store = index,
            // All may be set where their place was not found.
            None => analysis.findings.bits_set = u8::MAX,
        }
        analysis.findings.diverts = vec![true; code.instructions.len()];
        analysis.findings.settled = analysis.settle(memory);
        analysis.findings
    }

    /// Finds which cells are loaded from, and which others may write to.
    fn look_at_cells(&mut self, objects: Option<Vec<Range<i64>>>) {
        // Where the table of stack objects does not tell: everything from the lowest address that
        // was taken, among the locals and among the arguments.
        let (mut local, mut argument) = (0..0, i64::MAX..i64::MAX);
        for (index, instruction) in self.code.instructions.iter().enumerate() {
            match instruction.op {
                Op::Load {
                    from: Place::Stack(displacement),
                    ..
                } => self.loaded.push(self.code.stack_key(index, displacement)),
                Op::StackAddress(_, displacement) => {
                    let address = self.code.stack_key(index, displacement).wrapping_neg();
                    let range = if address < 0 {
                        &mut local
                    } else {
                        &mut argument
                    };
                    range.start = range.start.min(address);
                }
                _ => {}
            }
        }
        self.loaded.sort_unstable();
        self.loaded.dedup();
        self.exposed = objects.unwrap_or_else(|| vec![local, argument]);
    }

    /// Visits blocks until their states at entry no longer change; false if they would not settle.
    fn settle(&mut self, memory: &mut Memory) -> bool {
        /// Blocks are visited again only while they learn something: fewer visits than blocks, on the
        /// whole, and a state holds some dozens of facts. Code that takes far more work is not the compiler's.
        const WORK_PER_INSTRUCTION: usize = 512;
        let code = self.code;
        let instructions = code.instructions.len();
        let mut budget = instructions
            .saturating_mul(WORK_PER_INSTRUCTION)
            .saturating_add(1 << 20);
        let mut visited = vec![false; code.blocks.len()];
        let entry = State::at_entry(instructions, self.conventions.registers);
        let mut worklist = Worklist::new(&code.blocks, &entry, memory);
        while let Some((at, block, mut state)) = worklist.next() {
            let work = (state.facts()).saturating_mul(1 + block.next.len()) + block.range().len();
            let Some(left) = budget.checked_sub(work) else {
                return false;
            };
            budget = left;
            if let Some(again) = visited.get_mut(at)
                && std::mem::replace(again, true)
            {
                state.enter(&block.range());
                self.forget(&block.range());
            }
            let instructions = code.instructions.get(block.range()).unwrap_or_default();
            let callees = code.callees.get(block.range()).unwrap_or_default();
            for ((index, instruction), callee) in block.range().zip(instructions).zip(callees) {
                self.step(&mut state, index, instruction, *callee);
            }
            let not_nil = self.not_nil_behind(&state, block);
            let learned = |at| not_nil.filter(|known| known.0 == at).map(|known| known.1);
            let Some((last, others)) = block.next.split_last() else {
                worklist.give_back(state);
                continue;
            };
            for next in others {
                worklist.reach(*next, &state, learned(*next));
            }
            worklist.reach_last(*last, state, learned(*last));
            if worklist.overflows() {
                return false;
            }
        }
        true
    }

    /// Forgets what an earlier visit of a block recorded.
    fn forget(&mut self, block: &Range<usize>) {
        let findings = &mut self.findings;
        while let Some((&index, _)) = findings.slot_stores.range(block.clone()).next() {
            findings.slot_stores.remove(&index);
        }
        while let Some((&index, _)) = findings.exit_stores.range(block.clone()).next() {
            findings.exit_stores.remove(&index);
        }
    }

    /// The block behind a branch in which a pointer is known not to be nil, and that pointer.
    fn not_nil_behind(&self, state: &State, block: Block<'_>) -> Option<(usize, Definition)> {
        let last = block.range().next_back()?;
        let branch = self.code.instructions.get(last)?;
        let (Flow::Branch(_), Some(test)) = (branch.flow, branch.zero_test) else {
            return None;
        };
        let register = match test.register {
            Some(register) => register,
            // The flags are those of the instruction before.
            None => {
                let before = last
                    .checked_sub(1)
                    .filter(|before| *before >= block.start)?;
                self.code.instructions.get(before)?.tests?
            }
        };
        let Value::Defined(definition) = state.get(register) else {
            return None;
        };
        // Successors are: where the branch leads, then what follows it.
        let [target, following] = block.next else {
            return None;
        };
        let at = if test.taken_if_zero {
            following
        } else {
            target
        };
        (target != following).then_some((*at, definition))
    }

    /// The first store to `deferBits`: nothing precedes it but straight code of the entry.
    fn find_first_bits_store(&self) -> Option<usize> {
        self.open?;
        // Addresses of stack cells that registers hold: arm64 forms those that no store can name
        // in a register first.
        let registers = self.conventions.registers;
        let mut state = State::at_entry(self.code.instructions.len(), registers);
        for (index, instruction) in self.code.instructions.iter().enumerate() {
            match instruction.op {
                Op::Store {
                    to, count, size, ..
                } => {
                    if let Some(key) = self.stack_cell(&state, index, to) {
                        let second = key.wrapping_sub(size.into());
                        if self.is_bits(key, size) || count > 1 && self.is_bits(second, size) {
                            return Some(index);
                        }
                    }
                }
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

    /// Whether other code may write to a cell.
    fn is_exposed(&self, key: i64, size: u8) -> bool {
        let start = key.wrapping_neg();
        let end = start.saturating_add(size.into());
        // Variables do not overlap, so the last one that starts before the cell's end decides.
        let after = self.exposed.partition_point(|e| e.start < end);
        let before = self.exposed.get(..after).and_then(<[_]>::last);
        before.is_some_and(|e| start < e.end)
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
}
