//! Which instructions an engine should report, and why just those.

use crate::{FileOffset, VirtualAddress};

/// An instruction to probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProbePoint {
    /// The instruction.
    pub address: VirtualAddress,
    /// Its place in the file.
    pub offset: FileOffset,
    /// What kind of instruction it is: decides what a hit costs.
    pub kind: InstructionKind,
    /// Why it executes exactly as often as the statement.
    pub basis: Basis,
}

/// What the kernel does with a uprobe on an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InstructionKind {
    /// A direct call; emulated in the trap handler.
    Call,
    /// An unconditional direct jump; emulated.
    Jump,
    /// A conditional jump; emulated.
    Branch,
    /// `push` of a register; emulated (x86-64).
    Push,
    /// A one-byte `nop` (x86-64); emulated.
    Nop,
    /// arm64 `adr` or `adrp`; emulated.
    Address,
    /// arm64 `br`, `blr`, `ret`; emulated.
    IndirectBranch,
    /// Anything else: single-stepped out of line, two traps.
    SingleStepped,
}

/// Why a probe point executes exactly as often as its defer statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Basis {
    /// It is the call of the runtime's registering function itself.
    RegisteringCall,
    /// It is the store of the closure into its slot.
    SlotStore,
    /// It follows the slot store in the same basic block; nothing between them can leave the block.
    AfterSlotStore,
    /// It precedes the slot store in the same basic block; nothing between them can leave the block.
    BeforeSlotStore,
    /// It is the exit code's call of the deferred function, or precedes it in its block.
    ExitCall,
    /// It follows the stack check of the deferred function itself.
    Entered,
    /// It follows the exit code's call of the deferred function.
    AfterExitCall,
    /// It is on a path of the runtime's own (see [`crate::PoolProbes`], [`crate::RunProbes`]).
    RuntimePath,
}

/// One probe of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Where the kernel puts it.
    pub offset: FileOffset,
    /// The index of its site in the inventory.
    pub site: u32,
}

impl InstructionKind {
    /// Whether the kernel emulates it in the trap handler (one trap) or single-steps it (two).
    pub fn is_emulated(self) -> bool {
        self != Self::SingleStepped
    }

    /// The name used by `scan --explain`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Jump => "jump",
            Self::Branch => "branch",
            Self::Push => "push",
            Self::Nop => "nop",
            Self::Address => "address",
            Self::IndirectBranch => "indirect-branch",
            Self::SingleStepped => "single-stepped",
        }
    }
}

impl Basis {
    /// The sentence `scan --explain` prints.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RegisteringCall => "the registering call itself",
            Self::SlotStore => "the slot store itself; its block has no exact emulated instruction",
            Self::AfterSlotStore => "after the slot store in its block",
            Self::BeforeSlotStore => "before the slot store in its block",
            Self::ExitCall => "the exit's call of the deferred function",
            Self::Entered => "at the entry of the deferred function",
            Self::AfterExitCall => "after the exit's call of the deferred function",
            Self::RuntimePath => "on a path of the runtime's own",
        }
    }
}
