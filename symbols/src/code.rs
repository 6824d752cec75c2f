//! One function, decoded: instructions, stack depths and basic blocks.

use std::ops::Range;

use crate::bytes::Bytes;
use crate::calls::{Callee, Callees};
use crate::decode::{self, Flow, Instruction};
use crate::elf::Image;
use crate::module::Module;
use crate::pclntab::Func;

/// A decoded function.
pub(crate) struct Code {
    pub instructions: Vec<Instruction>,
    /// What each CALL calls; `Other` for everything else.
    pub callees: Vec<Callee>,
    /// SP below its value at entry, per instruction.
    depths: Vec<i64>,
    pub blocks: Vec<Block>,
}

/// A basic block: entered only at its first instruction, left only at its last (or by a panic).
/// An empty one stands for what a jump table may lead to.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub range: Range<usize>,
    /// Blocks that control may go to next.
    pub next: Vec<usize>,
    /// Blocks that control may come from.
    pub previous: Vec<usize>,
}

/// Functions with defers are far shorter (the longest seen has 60 KB): past it a size is damage.
const LONGEST: u64 = 1 << 20;

impl Code {
    /// Decodes `func`; `None` if its bytes are not in the file.
    pub fn decode(
        image: &Image<'_>,
        module: &Module<'_>,
        callees: &Callees,
        func: Func,
    ) -> Option<Self> {
        let len = func
            .end
            .offset_from(func.entry)
            .filter(|len| *len <= LONGEST)?;
        let bytes = Bytes(image.read(func.entry, len)?).0;
        let instructions = decode::function(image.architecture, func.entry, bytes);
        let callees: Vec<Callee> = instructions
            .iter()
            .map(|i| match i.flow {
                Flow::Call(target) => callees.resolve(target),
                _ => Callee::Other,
            })
            .collect();
        let mut depths = Vec::with_capacity(instructions.len());
        let mut steps = module.table.depth_steps(func);
        let mut step = steps.next();
        for instruction in &instructions {
            while step.is_some_and(|s| instruction.address >= s.end) {
                step = steps.next();
            }
            depths.push(step.map_or(0, |s| i64::from(s.value)));
        }
        let blocks = blocks(&instructions, &callees);
        Some(Self {
            instructions,
            callees,
            depths,
            blocks,
        })
    }

    /// The key of the stack cell at `displacement` from SP at an instruction: bytes below varp,
    /// which is what funcdata counts in. Larger keys are lower addresses.
    pub fn stack_key(&self, index: usize, displacement: i64) -> i64 {
        let depth = self.depths.get(index).copied().unwrap_or(0);
        depth.wrapping_sub(8).wrapping_sub(displacement)
    }

    /// Whether the frame pointer is the function's own at an instruction: not before the prologue
    /// has set it, nor at a call of Duff's device, for which amd64 code borrows RBP
    /// (`cmd/internal/obj/x86/obj6.go`).
    pub fn has_frame_pointer(&self, index: usize) -> bool {
        let set_up = self.depths.get(index).is_some_and(|depth| *depth > 0);
        set_up && self.callees.get(index) != Some(&Callee::Duff)
    }

    /// The block that contains an instruction.
    pub fn block_of(&self, index: usize) -> Option<&Block> {
        let after = self.blocks.partition_point(|b| b.range.start <= index);
        self.blocks.get(after.checked_sub(1)?)
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

fn blocks(instructions: &[Instruction], callees: &[Callee]) -> Vec<Block> {
    let index_of = |target| {
        instructions
            .binary_search_by_key(&target, |i| i.address)
            .ok()
    };
    let callee = |index: usize| callees.get(index).copied().unwrap_or(Callee::Other);
    let mut leader = vec![false; instructions.len() + 1];
    let mut mark = |index: usize| {
        if let Some(flag) = leader.get_mut(index) {
            *flag = true;
        }
    };
    mark(0);
    for (index, instruction) in instructions.iter().enumerate() {
        if let Flow::Jump(target) | Flow::Branch(target) = instruction.flow
            && let Some(target) = index_of(target)
        {
            mark(target);
        }
        if ends_block(instruction, callee(index)) {
            mark(index + 1);
        }
    }
    let starts: Vec<usize> = (0..instructions.len())
        .filter(|i| leader.get(*i).copied().unwrap_or(false))
        .collect();
    let block_at = |index: usize| starts.binary_search(&index).ok();
    let ends = starts.iter().skip(1).copied().chain([instructions.len()]);
    let mut blocks: Vec<Block> = starts
        .iter()
        .zip(ends)
        .map(|(start, end)| Block {
            range: *start..end,
            next: Vec::new(),
            previous: Vec::new(),
        })
        .collect();
    let mut tables = Vec::new();
    for at in 0..blocks.len() {
        let Some(last) = blocks.get(at).and_then(|b| b.range.end.checked_sub(1)) else {
            continue;
        };
        let Some(instruction) = instructions.get(last) else {
            continue;
        };
        let mut next = Vec::new();
        if let Flow::Jump(target) | Flow::Branch(target) = instruction.flow {
            next.extend(index_of(target).and_then(block_at));
        }
        if falls_through(instruction, callee(last)) && at + 1 < blocks.len() {
            next.push(at + 1);
        }
        if instruction.flow == Flow::IndirectJump {
            tables.push(at);
        }
        // A jump to the entry comes from behind morestack: the function starts afresh, with
        // nothing that was known before.
        next.retain(|target| *target != 0);
        for target in &next {
            if let Some(block) = blocks.get_mut(*target) {
                block.previous.push(at);
            }
        }
        if let Some(block) = blocks.get_mut(at) {
            block.next = next;
        }
    }
    // A jump table may lead to every block that nothing else leads to: by way of an empty block, lest
    // the edges be as many as tables times targets.
    if !tables.is_empty() {
        let targets: Vec<usize> = (1..blocks.len())
            .filter(|i| blocks.get(*i).is_some_and(|b| b.previous.is_empty()))
            .collect();
        let crossing = blocks.len();
        for table in &tables {
            if let Some(block) = blocks.get_mut(*table) {
                block.next.push(crossing);
            }
        }
        for target in &targets {
            if let Some(block) = blocks.get_mut(*target) {
                block.previous.push(crossing);
            }
        }
        blocks.push(Block {
            range: instructions.len()..instructions.len(),
            next: targets,
            previous: tables,
        });
    }
    blocks
}
