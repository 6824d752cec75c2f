//! Machine code as the analysis wants to see it: one small instruction model for both
//! architectures. It keeps what the search for defers needs (control flow, constants, stack
//! cells, and what the kernel would do with a uprobe) and forgets the rest, conservatively: what
//! it does not know clobbers.

mod amd64;
mod arm64;
#[cfg(test)]
mod objdump;

use crate::plan::InstructionKind;
use crate::{Architecture, VirtualAddress};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use amd64::by_iced;

/// A general register by its hardware number; amd64: 0 RAX … 15 R15, arm64: 0 X0 … 30 X30.
pub(crate) type Register = u8;

/// Registers as bits.
pub(crate) type RegisterSet = u32;

/// One decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub address: VirtualAddress,
    /// What the kernel does with a uprobe here.
    pub kind: InstructionKind,
    /// False where a probe would be refused, lost or unsafe.
    pub probeable: bool,
    pub flow: Flow,
    pub op: Op,
    /// Registers that it overwrites with something unknown, besides what `op` says.
    pub clobbers: RegisterSet,
    pub faults: Faults,
    /// The register whose being zero sets the zero flag, where it tests just that.
    pub tests: Option<Register>,
    /// For a conditional branch that asks whether something is zero.
    pub zero_test: Option<ZeroTest>,
}

/// What a conditional branch on zero asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZeroTest {
    /// The register; `None` if it asks the flags.
    pub register: Option<Register>,
    /// Whether it branches if it is zero, or if it is not.
    pub taken_if_zero: bool,
}

/// Where control goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Next,
    Jump(VirtualAddress),
    Branch(VirtualAddress),
    IndirectJump,
    Call(VirtualAddress),
    IndirectCall,
    Return,
    /// A trap, or bytes that are no instruction.
    Stop,
}

/// Whether the instruction can raise a fault that becomes a Go panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    Never,
    /// Unless this register is known to point to mapped memory.
    ThroughBase(Register),
    Maybe,
}

/// A value that goes into a register or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Register(Register),
    Immediate(u64),
    Unknown,
}

/// A place in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this displacement from SP.
    Stack(i64),
    Absolute(VirtualAddress),
    Based(Register, i64),
    Unknown,
}

/// What it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Other,
    Set(Register, u64),
    Copy(Register, Register),
    /// `SP + displacement`.
    StackAddress(Register, i64),
    Add(Register, Register, i64),
    And(Register, Register, Operand),
    Or(Register, Register, Operand),
    /// One of two registers.
    Select(Register, Register, Register),
    /// 0 or 1.
    Boolean(Register),
    Load {
        to: Register,
        from: Place,
        size: u8,
    },
    /// `count` values of `size` bytes each, one behind the other.
    Store {
        to: Place,
        values: [Operand; 2],
        count: u8,
        size: u8,
    },
}

/// The roles of registers in Go's calling conventions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conventions {
    /// First argument and first result register.
    pub first_argument: Register,
    /// The goroutine (since 1.17 on amd64): always points to mapped memory.
    pub g: Register,
    /// Displacement from SP, at a CALL instruction, of the first stack argument.
    pub stack_arguments: i64,
    /// How many general registers there are, with SP or zero.
    pub registers: usize,
}

impl Architecture {
    pub(crate) fn conventions(self) -> Conventions {
        match self {
            Self::Amd64 => Conventions {
                first_argument: 0,
                g: 14,
                stack_arguments: 0,
                registers: 16,
            },
            Self::Arm64 => Conventions {
                first_argument: 0,
                g: 28,
                stack_arguments: 8,
                registers: 32,
            },
        }
    }
}

impl Op {
    /// The general register that it writes by its own account.
    pub fn written(self) -> Option<Register> {
        match self {
            Self::Set(to, _)
            | Self::Copy(to, _)
            | Self::StackAddress(to, _)
            | Self::Add(to, ..)
            | Self::And(to, ..)
            | Self::Or(to, ..)
            | Self::Select(to, ..)
            | Self::Boolean(to)
            | Self::Load { to, .. } => Some(to),
            Self::Other | Self::Store { .. } => None,
        }
    }
}

impl Instruction {
    /// Whether a probe here costs one trap.
    pub fn takes_cheap_probe(&self) -> bool {
        self.probeable && self.kind.is_emulated()
    }

    #[inline]
    fn new(address: VirtualAddress) -> Self {
        Self {
            address,
            kind: InstructionKind::SingleStepped,
            probeable: true,
            flow: Flow::Next,
            op: Op::Other,
            clobbers: 0,
            faults: Faults::Never,
            tests: None,
            zero_test: None,
        }
    }
}

/// Decodes a function from its entry to its end. Instruction boundaries are those that
/// execution from the entry would find: Go puts no data between instructions.
pub(crate) fn function(
    architecture: Architecture,
    entry: VirtualAddress,
    code: &[u8],
    instructions: &mut Vec<Instruction>,
) {
    /// Bytes, as a rule; most are longer.
    const SHORT: usize = 4;
    instructions.reserve(code.len() / SHORT);
    match architecture {
        Architecture::Amd64 => {
            amd64::Instructions::new(entry, code).read_all(instructions);
        }
        Architecture::Arm64 => instructions.extend(arm64::instructions(entry, code)),
    }
}

/// The same, one instruction after the other.
pub(crate) fn from_entry(
    architecture: Architecture,
    entry: VirtualAddress,
    code: &[u8],
) -> impl Iterator<Item = Instruction> + '_ {
    let (amd64, arm64) = match architecture {
        Architecture::Amd64 => (Some(amd64::Instructions::new(entry, code)), None),
        Architecture::Arm64 => (None, Some(arm64::instructions(entry, code))),
    };
    let amd64 = amd64.into_iter().flatten();
    amd64.chain(arm64.into_iter().flatten())
}

/// The addresses in `code`, which starts at `start`, at which the bytes are those of a direct call of
/// `target`, in order. Whether an instruction starts there is not asked.
pub(crate) fn calls_of(
    architecture: Architecture,
    start: VirtualAddress,
    code: &[u8],
    target: VirtualAddress,
) -> Vec<VirtualAddress> {
    match architecture {
        Architecture::Amd64 => amd64::calls_of(start, code, target),
        Architecture::Arm64 => arm64::calls_of(start, code, target),
    }
}
