//! One function, decoded: instructions, stack depths and basic blocks.

use crate::blocks::{Block, Blocks};
use crate::calls::{Callee, Callees};
use crate::decode::{self, Flow, Instruction};
use crate::elf::Image;
use crate::module::Module;
use crate::pclntab::Func;

/// A decoded function.
#[derive(Debug, Default)]
pub(crate) struct Code {
    pub instructions: Vec<Instruction>,
    /// What each CALL calls; `Other` for everything else.
    pub callees: Vec<Callee>,
    /// SP below its value at entry, per instruction.
    depths: Vec<i64>,
    pub blocks: Blocks,
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
        let mut code = Self::default();
        code.read(image, module, callees, func).then_some(code)
    }

    /// Decodes `func` in place of what it holds; false if its bytes are not in the file.
    pub fn read(
        &mut self,
        image: &Image<'_>,
        module: &Module<'_>,
        callees: &Callees,
        func: Func,
    ) -> bool {
        let length = func.end.offset_from(func.entry).filter(|l| *l <= LONGEST);
        let Some(bytes) = length.and_then(|length| image.read(func.entry, length)) else {
            return false;
        };
        self.instructions.clear();
        decode::function(
            image.architecture,
            func.entry,
            bytes,
            &mut self.instructions,
        );
        self.callees.clear();
        let callees = self.instructions.iter().map(|i| match i.flow {
            Flow::Call(target) => callees.resolve(target),
            _ => Callee::Other,
        });
        self.callees.extend(callees);
        self.depths.clear();
        self.depths.reserve(self.instructions.len());
        let mut steps = module.table.depth_steps(func);
        let mut step = steps.next();
        for instruction in &self.instructions {
            while step.is_some_and(|s| instruction.address >= s.end) {
                step = steps.next();
            }
            self.depths.push(step.map_or(0, |s| i64::from(s.value)));
        }
        self.blocks.read(&self.instructions, &self.callees);
        true
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
    pub fn block_of(&self, index: usize) -> Option<Block<'_>> {
        self.blocks.containing(index)
    }
}
