//! The instructions that Go's compiler emits most, decoded straight into the model. What is not
//! here, or comes in an unusual form, is left to iced; what is here must be what it is by way of
//! iced (`usual_agrees_with_rare`, and the fuzz target `decode_amd64`).

use super::encoding::{Encoded, Prefix, SECOND, WINDOW};
use super::{SP, ZERO, store};
use crate::decode::{Flow, Instruction, Op, Operand, Place, Register, ZeroTest};
use crate::plan::InstructionKind;

/// Decodes the instruction at the start of `window` into `instruction`, which is a new one, and says
/// how many bytes it has. `None`, with the instruction in pieces, if it is to be left to iced.
#[inline]
pub(super) fn decode(window: &[u8; WINDOW], instruction: &mut Instruction) -> Option<usize> {
    let encoded = Encoded::read(window, instruction.address)?;
    if encoded.accesses {
        instruction.faults = encoded.faults();
    }
    encoded.translate(instruction)?;
    Some(encoded.length)
}

/// What arithmetic does to its first operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arithmetic {
    Add,
    Or,
    And,
    /// `sub` and `xor`: zero if both operands are the same.
    Cancels,
    Compare,
    Other,
}

/// By number: add, or, adc, sbb, and, sub, xor, cmp.
const ARITHMETIC: [Arithmetic; 8] = [
    Arithmetic::Add,
    Arithmetic::Or,
    Arithmetic::Other,
    Arithmetic::Other,
    Arithmetic::And,
    Arithmetic::Cancels,
    Arithmetic::Cancels,
    Arithmetic::Compare,
];

impl Encoded {
    #[inline]
    fn translate(self, instruction: &mut Instruction) -> Option<()> {
        let opcode = self.opcode;
        match opcode {
            // add, or, adc, sbb, and, sub, xor, cmp
            0x00..=0x3f if self.is_known => {
                let size = self.size(opcode)?;
                let arithmetic = *ARITHMETIC.get(opcode >> 3)?;
                match opcode & 7 {
                    0 | 1 => {
                        let from = Operand::Register(self.whole(self.register, size)?);
                        self.to_other(arithmetic, from, size, instruction)?;
                    }
                    2 | 3 if self.is_memory => {
                        if arithmetic != Arithmetic::Compare {
                            clobber(self.whole(self.register, size)?, instruction);
                        }
                    }
                    2 | 3 => {
                        let from = Operand::Register(self.whole(self.other, size)?);
                        let to = self.whole(self.register, size)?;
                        to_register(arithmetic, to, from, instruction);
                    }
                    _ => {
                        let from = Operand::Immediate(self.value(size));
                        to_register(arithmetic, 0, from, instruction);
                    }
                }
            }
            // push
            0x50..=0x57 => {
                self.unprefixed()?;
                instruction.kind = InstructionKind::Push;
            }
            // pop
            0x58..=0x5f => {
                self.unprefixed()?;
                clobber(self.named(opcode), instruction);
            }
            // movsxd
            0x63 => {
                self.unprefixed()?;
                if !self.is_wide() {
                    return None;
                }
                clobber(self.register, instruction);
            }
            // imul
            0x69 | 0x6b => {
                self.size(1)?;
                clobber(self.register, instruction);
            }
            // jcc
            0x70..=0x7f | 0x180..=0x18f => {
                self.bare()?;
                self.branch(opcode & 0xf, instruction);
            }
            0x80 | 0x81 | 0x83 => {
                let size = self.size(opcode)?;
                let value = match opcode {
                    0x83 => self.immediate as u64,
                    _ => self.value(size),
                };
                let arithmetic = *ARITHMETIC.get(usize::from(self.register & 7))?;
                self.to_other(arithmetic, Operand::Immediate(value), size, instruction)?;
            }
            // test
            0x84 | 0x85 => {
                let size = self.size(opcode)?;
                if !self.is_memory && size == 8 && self.register == self.other {
                    instruction.tests = Some(self.register);
                }
            }
            // mov
            0x88..=0x8b => {
                let size = self.size(opcode)?;
                let register = self.whole(self.register, size)?;
                let is_load = opcode & 2 != 0;
                instruction.op = if !self.is_memory {
                    let other = self.whole(self.other, size)?;
                    if is_load {
                        Op::Copy(register, other)
                    } else {
                        Op::Copy(other, register)
                    }
                } else if is_load {
                    Op::Load {
                        to: register,
                        from: self.place(),
                        size,
                    }
                } else {
                    store(self.place(), Operand::Register(register), size)
                };
            }
            // lea
            0x8d => {
                self.unprefixed()?;
                if !self.is_memory {
                    return None;
                }
                let to = self.register;
                instruction.op = match self.place() {
                    Place::Absolute(address) => Op::Set(to, address.0),
                    Place::Stack(displacement) => Op::StackAddress(to, displacement),
                    Place::Based(base, displacement) => Op::Add(to, base, displacement),
                    Place::Unknown => {
                        clobber(to, instruction);
                        Op::Other
                    }
                };
            }
            // nop
            0x90 => {
                self.bare()?;
                instruction.kind = InstructionKind::Nop;
            }
            // test
            0xa8 | 0xa9 => {
                self.size(opcode)?;
            }
            // mov
            0xb0..=0xb7 => {
                self.unprefixed()?;
                let to = self.whole(self.named(opcode), 1)?;
                instruction.op = Op::Set(to, self.value(1));
            }
            0xb8..=0xbf => {
                self.unprefixed()?;
                let size = if self.is_wide() { 8 } else { 4 };
                instruction.op = Op::Set(self.named(opcode), self.value(size));
            }
            // shl, shr, sar
            0xc0 | 0xc1 | 0xd0..=0xd3 => {
                let size = self.size(opcode)?;
                if !matches!(self.register & 7, 4 | 5 | 7) {
                    return None;
                }
                self.change(size, instruction)?;
            }
            // ret
            0xc3 => {
                self.bare()?;
                instruction.flow = Flow::Return;
            }
            // mov
            0xc6 | 0xc7 => {
                let size = self.size(opcode)?;
                if self.register & 7 != 0 {
                    return None;
                }
                let value = self.value(size);
                instruction.op = if self.is_memory {
                    store(self.place(), Operand::Immediate(value), size)
                } else {
                    Op::Set(self.whole(self.other, size)?, value)
                };
            }
            // int3, ud2
            0xcc | 0x10b => {
                self.bare()?;
                instruction.flow = Flow::Stop;
            }
            // call
            0xe8 => {
                self.bare()?;
                instruction.flow = Flow::Call(self.destination());
                instruction.kind = InstructionKind::Call;
            }
            // jmp
            0xe9 | 0xeb => {
                self.bare()?;
                instruction.flow = Flow::Jump(self.destination());
                instruction.kind = InstructionKind::Jump;
            }
            // test, not, neg, mul, imul, div, idiv
            0xf6 | 0xf7 => {
                const DX: Register = 2;
                let size = self.size(opcode)?;
                match self.register & 7 {
                    0 => {}
                    2 | 3 => self.change(size, instruction)?,
                    4..=7 if size >= 4 => {
                        clobber(0, instruction);
                        clobber(DX, instruction);
                    }
                    _ => return None,
                }
            }
            // inc, dec, call, jmp
            0xfe | 0xff => {
                let size = self.size(opcode)?;
                match (opcode, self.register & 7) {
                    (_, 0 | 1) => self.change(size, instruction)?,
                    (0xff, 2) => {
                        self.unprefixed()?;
                        instruction.flow = Flow::IndirectCall;
                    }
                    (0xff, 4) => {
                        self.unprefixed()?;
                        instruction.flow = Flow::IndirectJump;
                    }
                    _ => return None,
                }
            }
            // nop
            0x11f => {
                if self.register != 0 || matches!(self.prefix, Prefix::Rep | Prefix::Repne) {
                    return None;
                }
            }
            // cmov
            0x140..=0x14f => {
                self.unprefixed()?;
                let to = self.register;
                if self.is_memory {
                    clobber(to, instruction);
                } else {
                    instruction.op = Op::Select(to, to, self.other);
                }
            }
            // set
            0x190..=0x19f => {
                self.unprefixed()?;
                instruction.op = if self.is_memory {
                    store(self.place(), Operand::Unknown, 1)
                } else {
                    Op::Boolean(self.whole(self.other, 1)?)
                };
            }
            // movzx
            0x1b6 | 0x1b7 => {
                self.unprefixed()?;
                let to = self.register;
                let (size, mask) = match opcode {
                    0x1b6 => (1, 0xff),
                    _ => (2, 0xffff),
                };
                instruction.op = if self.is_memory {
                    Op::Load {
                        to,
                        from: self.place(),
                        size,
                    }
                } else {
                    let from = self.whole(self.other, size)?;
                    Op::And(to, from, Operand::Immediate(mask))
                };
            }
            // imul, movsx
            0x1af | 0x1be | 0x1bf => {
                self.unprefixed()?;
                clobber(self.register, instruction);
            }
            SECOND.. if self.is_known => self.vector(opcode, instruction)?,
            _ => return None,
        }
        Some(())
    }

    /// With vector registers, which the model does not have.
    #[inline]
    fn vector(self, opcode: usize, instruction: &mut Instruction) -> Option<()> {
        use Prefix::{None as Bare, Operand as Packed, Rep, Repne};
        match (opcode, self.prefix) {
            // Moves, conversions and arithmetic into one.
            (0x110 | 0x151 | 0x158..=0x15a | 0x15c..=0x15f, _)
            | (0x114 | 0x128 | 0x12e | 0x12f | 0x154 | 0x157, Bare | Packed)
            | (0x12a, Repne | Rep)
            | (0x16e | 0x1ef, Packed)
            | (0x16f, Packed | Rep)
            | (0x17e, Rep) => {}
            // cvttsd2si and the like
            (0x12c | 0x12d, Repne | Rep) => clobber(self.register, instruction),
            // movups, movss, movsd, movaps, movdqa, movdqu, movd, movq
            (0x111, Bare | Rep | Repne)
            | (0x129, Bare)
            | (0x17f, Packed | Rep)
            | (0x17e | 0x1d6, Packed) => {
                let size = match (opcode, self.prefix) {
                    (0x17e, _) if !self.is_wide() => 4,
                    (0x17e | 0x1d6, _) | (0x111, Repne) => 8,
                    (0x111, Rep) => 4,
                    _ => 16,
                };
                if self.is_memory {
                    let value = match self.register {
                        ZERO => Operand::Immediate(0),
                        _ => Operand::Unknown,
                    };
                    instruction.op = store(self.place(), value, size);
                } else if opcode == 0x17e {
                    clobber(self.other, instruction);
                }
            }
            _ => return None,
        }
        Some(())
    }

    #[inline]
    fn branch(self, condition: usize, instruction: &mut Instruction) {
        const EQUAL: usize = 4;
        const NOT_EQUAL: usize = 5;
        instruction.flow = Flow::Branch(self.destination());
        instruction.kind = InstructionKind::Branch;
        if matches!(condition, EQUAL | NOT_EQUAL) {
            instruction.zero_test = Some(ZeroTest {
                register: None,
                taken_if_zero: condition == EQUAL,
            });
        }
    }

    /// Arithmetic on the other operand, with a register or an immediate.
    #[inline]
    fn to_other(
        self,
        arithmetic: Arithmetic,
        from: Operand,
        size: u8,
        instruction: &mut Instruction,
    ) -> Option<()> {
        if self.is_memory {
            if arithmetic != Arithmetic::Compare {
                instruction.op = store(self.place(), Operand::Unknown, size);
            }
        } else {
            let to = self.whole(self.other, size)?;
            to_register(arithmetic, to, from, instruction);
        }
        Some(())
    }

    /// The other operand becomes something unknown.
    #[inline]
    fn change(self, size: u8, instruction: &mut Instruction) -> Option<()> {
        if self.is_memory {
            instruction.op = store(self.place(), Operand::Unknown, size);
        } else {
            clobber(self.whole(self.other, size)?, instruction);
        }
        Some(())
    }
}

/// Arithmetic on a register, with another or an immediate.
#[inline]
fn to_register(arithmetic: Arithmetic, to: Register, from: Operand, instruction: &mut Instruction) {
    instruction.op = match (arithmetic, from) {
        (Arithmetic::Compare, _) => return,
        (Arithmetic::Add, Operand::Immediate(value)) => Op::Add(to, to, value as i64),
        (Arithmetic::And, from) => Op::And(to, to, from),
        (Arithmetic::Or, from) => Op::Or(to, to, from),
        (Arithmetic::Cancels, Operand::Register(from)) if from == to => Op::Set(to, 0),
        _ => return clobber(to, instruction),
    };
}

#[inline]
fn clobber(register: Register, instruction: &mut Instruction) {
    if register != SP {
        instruction.clobbers |= 1 << register;
    }
}
