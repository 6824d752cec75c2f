//! The control-flow graph of one function: its basic blocks and the edges between them, in a few flat
//! lists, since a large program has a hundred thousand of them.

use std::ops::Range;

use crate::VirtualAddress;
use crate::calls::Callee;
use crate::decode::{Flow, Instruction};

/// The basic blocks of a function, in order of address.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    ranges: Vec<Range<usize>>,
    next: Edges,
    previous: Edges,
    /// The block of each instruction.
    of: Vec<u32>,
    /// The jumps within the function: which instruction leads to which, in order of address.
    jumps: Vec<(usize, usize)>,
    /// One more than the index of the instruction at each offset from the entry; 0 if there is none.
    places: Vec<u32>,
}

/// A basic block: entered only at its first instruction, left only at its last (or by a panic).
/// An empty one stands for what a jump table may lead to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<'a> {
    /// Its first instruction.
    pub start: usize,
    /// The instruction behind its last.
    pub end: usize,
    /// Blocks that control may go to next: where a branch leads, then what follows it.
    pub next: &'a [usize],
    /// Blocks that control may come from, in order of address.
    pub previous: &'a [usize],
}

/// A list of blocks for each block.
#[derive(Debug, Default)]
struct Edges {
    /// Where the list of each ends in `to`; it starts where that of the one before ends.
    ends: Vec<usize>,
    to: Vec<usize>,
}

impl Block<'_> {
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }
}

impl Blocks {
    /// Takes another function's in place of what it holds. `callees` says what each CALL calls.
    pub fn read(&mut self, instructions: &[Instruction], callees: &[Callee]) {
        self.find_leaders(instructions, callees);
        let Self {
            ranges,
            next,
            previous,
            of,
            jumps,
            ..
        } = self;
        ranges.clear();
        let mut start = 0;
        let mut count = 0;
        for (index, block) in of.iter_mut().enumerate() {
            if *block == 1 && index > 0 {
                ranges.push(start..index);
                start = index;
                count += 1;
            }
            *block = count;
        }
        if !of.is_empty() {
            ranges.push(start..of.len());
        }
        let blocks = ranges.len();
        next.clear();
        let mut jumps = jumps.iter().peekable();
        let mut crosses = false;
        for (at, range) in ranges.iter().enumerate() {
            let last = range.end.saturating_sub(1);
            // A jump to the entry comes from behind morestack: the function starts afresh, with
            // nothing that was known before.
            if let Some((_, target)) = jumps.next_if(|jump| jump.0 == last) {
                let block = of.get(*target).map(|block| *block as usize);
                next.to.extend(block.filter(|block| *block != 0));
            }
            if let Some(instruction) = instructions.get(last) {
                let callee = callees.get(last).copied().unwrap_or(Callee::Other);
                if falls_through(instruction, callee) && at + 1 < blocks {
                    next.to.push(at + 1);
                }
                // A jump table may lead to every block that nothing else leads to: by way of an empty
                // block, lest the edges be as many as tables times targets.
                if instruction.flow == Flow::IndirectJump {
                    crosses = true;
                    next.to.push(blocks);
                }
            }
            next.ends.push(next.to.len());
        }
        if crosses {
            ranges.push(instructions.len()..instructions.len());
            let mut reached = vec![false; ranges.len()];
            for to in [0, blocks].iter().chain(&next.to) {
                if let Some(reached) = reached.get_mut(*to) {
                    *reached = true;
                }
            }
            let others = reached.iter().enumerate().filter(|(_, reached)| !**reached);
            next.to.extend(others.map(|(block, _)| block));
            next.ends.push(next.to.len());
        }
        previous.reverse(next);
    }

    /// Notes for each instruction 1 if a block starts there, otherwise 0; and the jumps.
    fn find_leaders(&mut self, instructions: &[Instruction], callees: &[Callee]) {
        let Self {
            of, jumps, places, ..
        } = self;
        jumps.clear();
        of.clear();
        of.resize(instructions.len(), 0);
        places.clear();
        let (Some(first), Some(last)) = (instructions.first(), instructions.last()) else {
            return;
        };
        let offset = |address: VirtualAddress| {
            let offset = address.offset_from(first.address)?;
            usize::try_from(offset).ok()
        };
        places.resize(offset(last.address).map_or(0, |offset| offset + 1), 0);
        for (instruction, number) in instructions.iter().zip(1..) {
            if let Some(place) = offset(instruction.address).and_then(|at| places.get_mut(at)) {
                *place = number;
            }
        }
        let mut mark = |index: usize| {
            if let Some(flag) = of.get_mut(index) {
                *flag = 1;
            }
        };
        mark(0);
        let mut was_trap = false;
        for (index, (instruction, callee)) in instructions.iter().zip(callees).enumerate() {
            // Many a trap fills the space up to the next function: one block has them all.
            let is_trap = instruction.flow == Flow::Stop;
            if was_trap && !is_trap {
                mark(index);
            }
            was_trap = is_trap;
            if let Flow::Jump(target) | Flow::Branch(target) = instruction.flow
                && let Some(number) = offset(target).and_then(|at| places.get(at))
                && let Some(target) = number.checked_sub(1)
            {
                mark(target as usize);
                jumps.push((index, target as usize));
            }
            if !is_trap && ends_block(instruction, *callee) {
                mark(index + 1);
            }
        }
    }

    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    pub fn get(&self, at: usize) -> Option<Block<'_>> {
        let range = self.ranges.get(at)?;
        Some(Block {
            start: range.start,
            end: range.end,
            next: self.next.of(at),
            previous: self.previous.of(at),
        })
    }

    /// Whether control may come to a block from more than one other.
    pub fn is_joined(&self, at: usize) -> bool {
        self.previous.of(at).len() > 1
    }

    /// The block that contains an instruction.
    pub fn containing(&self, index: usize) -> Option<Block<'_>> {
        self.get(*self.of.get(index)? as usize)
    }
}

impl Edges {
    fn of(&self, block: usize) -> &[usize] {
        let before = block.checked_sub(1);
        let start = before.map_or(0, |b| self.ends.get(b).copied().unwrap_or(0));
        let end = self.ends.get(block).copied().unwrap_or(0);
        self.to.get(start..end).unwrap_or_default()
    }

    fn clear(&mut self) {
        self.ends.clear();
        self.to.clear();
    }

    /// Takes the same edges as `other`, from their other ends.
    fn reverse(&mut self, other: &Self) {
        self.clear();
        let Self { ends, to: from } = self;
        // First how many edges each has, then where its list starts, and in the end where it ends.
        ends.resize(other.ends.len(), 0);
        for to in &other.to {
            if let Some(count) = ends.get_mut(*to) {
                *count += 1;
            }
        }
        let mut start = 0;
        for place in ends.iter_mut() {
            start += std::mem::replace(place, start);
        }
        from.resize(other.to.len(), 0);
        for block in 0..other.ends.len() {
            for to in other.of(block) {
                if let Some(place) = ends.get_mut(*to)
                    && let Some(slot) = from.get_mut(*place)
                {
                    *slot = block;
                    *place += 1;
                }
            }
        }
    }
}

/// Whether control can go on to the instruction behind it.
fn falls_through(instruction: &Instruction, callee: Callee) -> bool {
    match instruction.flow {
        Flow::Next | Flow::Branch(_) | Flow::IndirectCall => true,
        Flow::Call(_) => callee != Callee::NeverReturns,
        Flow::Jump(_) | Flow::IndirectJump | Flow::Return | Flow::Stop => false,
    }
}

fn ends_block(instruction: &Instruction, callee: Callee) -> bool {
    !falls_through(instruction, callee) || matches!(instruction.flow, Flow::Branch(_))
}
