//! The instructions that Go's compiler emits most, decoded straight into the model. What is not
//! here, or comes in an unusual form, is left to iced; what is here must be what it is by way of
//! iced (`usual_agrees_with_rare`, and the fuzz target `decode_amd64`).
//!
//! Encodings: Intel SDM, volume 2, appendix A.

use super::{G, SP, store};
use crate::VirtualAddress;
use crate::decode::{Faults, Flow, Instruction, Op, Operand, Place, Register, ZeroTest};
use crate::plan::InstructionKind;

/// Decodes the first instruction of `code` into `instruction`, which is a new one, and says how many
/// bytes it has. `None`, with the instruction in pieces, if it is to be left to iced.
#[inline]
pub(super) fn decode(code: &[u8], instruction: &mut Instruction) -> Option<usize> {
    let mut reader = Reader {
        address: instruction.address,
        length: code.len(),
        rest: code,
        prefix: Prefix::None,
        rex: 0,
    };
    let mut opcode = reader.byte()?;
    if matches!(opcode, 0x66 | 0xf2 | 0xf3) {
        reader.prefix = match opcode {
            0x66 => Prefix::Operand,
            0xf2 => Prefix::Repne,
            _ => Prefix::Rep,
        };
        opcode = reader.byte()?;
    }
    if opcode & 0xf0 == 0x40 {
        reader.rex = opcode;
        opcode = reader.byte()?;
    }
    if opcode == 0x0f {
        let opcode = reader.byte()?;
        reader.two_bytes(opcode, instruction)?;
    } else {
        reader.one_byte(opcode, instruction)?;
    }
    Some(reader.length - reader.rest.len())
}

/// The bytes of one instruction that are still to be read, and the prefixes before them.
struct Reader<'a> {
    address: VirtualAddress,
    /// Of the code, with the instruction.
    length: usize,
    rest: &'a [u8],
    prefix: Prefix,
    /// 0 if there is none.
    rex: u8,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Prefix {
    None,
    /// 66
    Operand,
    /// F2
    Repne,
    /// F3
    Rep,
}

/// The operand that ModRM and its followers name.
#[derive(Clone, Copy)]
enum Target {
    Register(Register),
    Memory { place: Place, faults: Faults },
}

/// What an arithmetic instruction does to its first operand, as far as the model has it.
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

impl Reader<'_> {
    #[inline]
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*byte)
    }

    /// A byte, its sign extended.
    #[inline]
    fn short(&mut self) -> Option<i64> {
        Some(i64::from(self.byte()? as i8))
    }

    /// Four bytes, their sign extended.
    #[inline]
    fn long(&mut self) -> Option<i64> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(i64::from(i32::from_le_bytes(*bytes)))
    }

    /// The immediate of an operand of `size` bytes.
    #[inline]
    fn immediate(&mut self, size: u8) -> Option<u64> {
        match size {
            1 => Some(u64::from(self.byte()?)),
            2 => {
                let (bytes, rest) = self.rest.split_first_chunk()?;
                self.rest = rest;
                Some(u64::from(u16::from_le_bytes(*bytes)))
            }
            4 => Some(u64::from(self.long()? as u32)),
            _ => Some(self.long()? as u64),
        }
    }

    /// The address behind the instruction, once `more` bytes of it have been read.
    #[inline]
    fn end(&self, more: usize) -> VirtualAddress {
        let read = self.length - self.rest.len() + more;
        VirtualAddress(self.address.0.wrapping_add(read as u64))
    }

    fn is_wide(&self) -> bool {
        self.rex & 8 != 0
    }

    /// The size in bytes of operands that are not bytes; `None` for what is left to iced.
    #[inline]
    fn size(&self) -> Option<u8> {
        match (self.prefix, self.is_wide()) {
            (Prefix::None, true) => Some(8),
            (Prefix::None, false) => Some(4),
            (Prefix::Operand, false) => Some(2),
            _ => None,
        }
    }

    /// Nothing if there are prefixes.
    #[inline]
    fn bare(&self) -> Option<()> {
        (self.prefix == Prefix::None && self.rex == 0).then_some(())
    }

    /// Nothing if there is a prefix other than REX.
    #[inline]
    fn unprefixed(&self) -> Option<()> {
        (self.prefix == Prefix::None).then_some(())
    }

    /// A register of `size` bytes; `None` for AH and the like.
    #[inline]
    fn register(&self, number: Register, size: u8) -> Option<Register> {
        let is_high = size == 1 && self.rex == 0 && number >= SP;
        (!is_high).then_some(number)
    }

    /// Reads ModRM, SIB and displacement: the register (or what else its field says, extended by
    /// REX) and the operand. An immediate of `immediate` bytes follows.
    #[inline]
    fn operands(&mut self, immediate: usize) -> Option<(Register, Target)> {
        let byte = self.byte()?;
        let register = (byte >> 3 & 7) | (self.rex & 4) << 1;
        let (mode, low) = (byte >> 6, byte & 7);
        let high = (self.rex & 1) << 3;
        if mode == 3 {
            return Some((register, Target::Register(low | high)));
        }
        let mut base = Some(low | high);
        let mut is_indexed = false;
        if low == 4 {
            let sib = self.byte()?;
            is_indexed = (sib >> 3 & 7) | (self.rex & 2) << 2 != 4;
            base = Some(sib & 7 | high).filter(|_| mode != 0 || sib & 7 != 5);
        } else if mode == 0 && low == 5 {
            let displacement = self.long()?;
            let address = self.end(immediate).0.wrapping_add_signed(displacement);
            let target = Target::Memory {
                place: Place::Absolute(VirtualAddress(address)),
                faults: Faults::Never,
            };
            return Some((register, target));
        }
        let displacement = match (mode, base) {
            (1, _) => self.short()?,
            (2, _) | (_, None) => self.long()?,
            _ => 0,
        };
        let (place, faults) = match base {
            _ if is_indexed => (Place::Unknown, Faults::Never),
            Some(SP) => (Place::Stack(displacement), Faults::Never),
            Some(G) => (Place::Based(G, displacement), Faults::Never),
            Some(base) => (Place::Based(base, displacement), Faults::ThroughBase(base)),
            None => (
                Place::Absolute(VirtualAddress(displacement as u64)),
                Faults::Maybe,
            ),
        };
        Some((register, Target::Memory { place, faults }))
    }

    #[inline]
    fn one_byte(&mut self, opcode: u8, instruction: &mut Instruction) -> Option<()> {
        match opcode {
            // add, or, adc, sbb, and, sub, xor, cmp
            0x00..=0x3f => {
                let size = if opcode & 1 == 0 { 1 } else { self.size()? };
                let arithmetic = *ARITHMETIC.get(usize::from(opcode >> 3))?;
                let is_byte_with_prefix = size == 1 && self.prefix != Prefix::None;
                if is_byte_with_prefix {
                    return None;
                }
                match opcode & 7 {
                    0 | 1 => {
                        let (from, to) = self.operands(0)?;
                        let from = Operand::Register(self.register(from, size)?);
                        self.arithmetic(arithmetic, to, from, size, instruction)
                    }
                    2 | 3 => {
                        let (to, from) = self.operands(0)?;
                        let to = Target::Register(to);
                        let from = match from {
                            Target::Register(from) => Operand::Register(self.register(from, size)?),
                            Target::Memory { faults, .. } => {
                                instruction.faults = faults;
                                if arithmetic == Arithmetic::Compare {
                                    return Some(());
                                }
                                return self.change(to, size, instruction);
                            }
                        };
                        self.arithmetic(arithmetic, to, from, size, instruction)
                    }
                    4 | 5 => {
                        let value = Operand::Immediate(self.immediate(size)?);
                        self.arithmetic(arithmetic, Target::Register(0), value, size, instruction)
                    }
                    _ => None,
                }
            }
            // push
            0x50..=0x57 => {
                self.unprefixed()?;
                instruction.kind = InstructionKind::Push;
                Some(())
            }
            // pop
            0x58..=0x5f => {
                self.unprefixed()?;
                let to = opcode & 7 | (self.rex & 1) << 3;
                clobber(to, instruction);
                Some(())
            }
            // movsxd
            0x63 if self.is_wide() => {
                self.unprefixed()?;
                let (to, from) = self.operands(0)?;
                read(from, instruction);
                clobber(to, instruction);
                Some(())
            }
            // imul with an immediate
            0x69 | 0x6b => {
                let size = self.size()?;
                let immediate = match (opcode, size) {
                    (0x6b, _) => 1,
                    (_, 2) => 2,
                    _ => 4,
                };
                let (to, from) = self.operands(immediate)?;
                self.rest = self.rest.get(immediate..)?;
                read(from, instruction);
                clobber(to, instruction);
                Some(())
            }
            // jcc
            0x70..=0x7f => {
                self.bare()?;
                let distance = self.short()?;
                self.branch(opcode, distance, instruction);
                Some(())
            }
            0x80 | 0x81 | 0x83 => {
                let size = match opcode {
                    0x80 => self.bytes()?,
                    _ => self.size()?,
                };
                let immediate = match (opcode, size) {
                    (0x81, 2) => 2,
                    (0x81, _) => 4,
                    _ => 1,
                };
                let (which, to) = self.operands(immediate)?;
                let value = match opcode {
                    0x83 => self.short()? as u64,
                    _ => self.immediate(size)?,
                };
                let arithmetic = *ARITHMETIC.get(usize::from(which & 7))?;
                let value = Operand::Immediate(value);
                self.arithmetic(arithmetic, to, value, size, instruction)
            }
            // test
            0x84 | 0x85 => {
                let size = match opcode {
                    0x84 => self.bytes()?,
                    _ => self.size()?,
                };
                let (a, b) = self.operands(0)?;
                read(b, instruction);
                if let Target::Register(b) = b
                    && (a, size) == (b, 8)
                {
                    instruction.tests = Some(a);
                }
                Some(())
            }
            // mov
            0x88..=0x8b => {
                let size = if opcode & 1 == 0 {
                    self.bytes()?
                } else {
                    self.size()?
                };
                let (register, operand) = self.operands(0)?;
                let register = self.register(register, size)?;
                let is_load = opcode & 2 != 0;
                instruction.op = match operand {
                    Target::Register(other) => {
                        let other = self.register(other, size)?;
                        if is_load {
                            Op::Copy(register, other)
                        } else {
                            Op::Copy(other, register)
                        }
                    }
                    Target::Memory { place, faults } => {
                        instruction.faults = faults;
                        if is_load {
                            Op::Load {
                                to: register,
                                from: place,
                                size,
                            }
                        } else {
                            store(place, Operand::Register(register), size)
                        }
                    }
                };
                Some(())
            }
            // lea
            0x8d => {
                self.unprefixed()?;
                let (to, Target::Memory { place, .. }) = self.operands(0)? else {
                    return None;
                };
                instruction.op = match place {
                    Place::Absolute(address) => Op::Set(to, address.0),
                    Place::Stack(displacement) => Op::StackAddress(to, displacement),
                    Place::Based(base, displacement) => Op::Add(to, base, displacement),
                    Place::Unknown => {
                        clobber(to, instruction);
                        Op::Other
                    }
                };
                Some(())
            }
            // nop
            0x90 => {
                self.bare()?;
                instruction.kind = InstructionKind::Nop;
                Some(())
            }
            // test of the accumulator
            0xa8 | 0xa9 => {
                let size = match opcode {
                    0xa8 => self.bytes()?,
                    _ => self.size()?,
                };
                self.immediate(size).map(|_| ())
            }
            // mov of an immediate
            0xb0..=0xb7 => {
                let size = self.bytes()?;
                let to = self.register(opcode & 7 | (self.rex & 1) << 3, size)?;
                instruction.op = Op::Set(to, self.immediate(size)?);
                Some(())
            }
            0xb8..=0xbf => {
                self.unprefixed()?;
                let to = opcode & 7 | (self.rex & 1) << 3;
                let value = if self.is_wide() {
                    let (bytes, rest) = self.rest.split_first_chunk()?;
                    self.rest = rest;
                    u64::from_le_bytes(*bytes)
                } else {
                    self.immediate(4)?
                };
                instruction.op = Op::Set(to, value);
                Some(())
            }
            // shl, shr, sar
            0xc0 | 0xc1 | 0xd0..=0xd3 => {
                let size = match opcode & 1 {
                    0 => self.bytes()?,
                    _ => self.size()?,
                };
                let immediate = usize::from(opcode < 0xd0);
                let (which, to) = self.operands(immediate)?;
                self.rest = self.rest.get(immediate..)?;
                match which & 7 {
                    4 | 5 | 7 => self.change(to, size, instruction),
                    _ => None,
                }
            }
            // ret
            0xc3 => {
                self.bare()?;
                instruction.flow = Flow::Return;
                Some(())
            }
            // mov of an immediate
            0xc6 | 0xc7 => {
                let size = match opcode {
                    0xc6 => self.bytes()?,
                    _ => self.size()?,
                };
                let (0 | 8, to) = self.operands(usize::from(size.min(4)))? else {
                    return None;
                };
                let value = self.immediate(size)?;
                instruction.op = match to {
                    Target::Register(to) => Op::Set(self.register(to, size)?, value),
                    Target::Memory { place, faults } => {
                        instruction.faults = faults;
                        store(place, Operand::Immediate(value), size)
                    }
                };
                Some(())
            }
            // int3
            0xcc => {
                self.bare()?;
                instruction.flow = Flow::Stop;
                Some(())
            }
            0xe8 | 0xe9 | 0xeb => {
                self.bare()?;
                let distance = match opcode {
                    0xeb => self.short()?,
                    _ => self.long()?,
                };
                let to = VirtualAddress(self.end(0).0.wrapping_add_signed(distance));
                (instruction.flow, instruction.kind) = match opcode {
                    0xe8 => (Flow::Call(to), InstructionKind::Call),
                    _ => (Flow::Jump(to), InstructionKind::Jump),
                };
                Some(())
            }
            // test, not, neg, mul, imul, div, idiv
            0xf6 | 0xf7 => {
                let size = match opcode {
                    0xf6 => self.bytes()?,
                    _ => self.size()?,
                };
                let is_test = self.rest.first()? & 0x30 == 0;
                let immediate = if is_test { size.min(4) } else { 0 };
                let (which, to) = self.operands(immediate.into())?;
                match which & 7 {
                    0 => {
                        self.immediate(size)?;
                        read(to, instruction);
                        Some(())
                    }
                    2 | 3 => self.change(to, size, instruction),
                    4..=7 if size >= 4 => {
                        const DX: Register = 2;
                        read(to, instruction);
                        clobber(0, instruction);
                        clobber(DX, instruction);
                        Some(())
                    }
                    _ => None,
                }
            }
            // inc, dec, call, jmp
            0xfe | 0xff => {
                let size = match opcode {
                    0xfe => self.bytes()?,
                    _ => self.size()?,
                };
                let (which, to) = self.operands(0)?;
                match (opcode, which & 7) {
                    (_, 0 | 1) => return self.change(to, size, instruction),
                    (0xff, 2) => instruction.flow = Flow::IndirectCall,
                    (0xff, 4) => instruction.flow = Flow::IndirectJump,
                    _ => return None,
                }
                self.unprefixed()?;
                read(to, instruction);
                Some(())
            }
            _ => None,
        }
    }

    #[inline]
    fn two_bytes(&mut self, opcode: u8, instruction: &mut Instruction) -> Option<()> {
        use Prefix::{None as Bare, Operand as Packed, Rep, Repne};
        match (opcode, self.prefix) {
            // ud2
            (0x0b, Bare) => {
                self.bare()?;
                instruction.flow = Flow::Stop;
                Some(())
            }
            // nop
            (0x1f, Bare | Packed) => {
                let (0, _) = self.operands(0)? else {
                    return None;
                };
                Some(())
            }
            // Into a vector register: moves, conversions and arithmetic.
            (0x10 | 0x51 | 0x58..=0x5a | 0x5c..=0x5f, _)
            | (0x14 | 0x28 | 0x2e | 0x2f | 0x54 | 0x57, Bare | Packed)
            | (0x2a | 0x6f, Repne | Rep)
            | (0x6e | 0x6f | 0xef, Packed)
            | (0x7e, Rep) => {
                if (opcode, self.prefix) == (0x6f, Repne) {
                    return None;
                }
                let (_, from) = self.operands(0)?;
                read(from, instruction);
                Some(())
            }
            // cvttsd2si and the like
            (0x2c | 0x2d, Repne | Rep) => {
                let (to, from) = self.operands(0)?;
                read(from, instruction);
                clobber(to, instruction);
                Some(())
            }
            // movups, movss, movsd, movaps, movdqa, movdqu, movq
            (0x11, Bare | Rep | Repne)
            | (0x29, Bare)
            | (0x7f, Packed | Rep)
            | (0x7e | 0xd6, Packed) => {
                let (from, to) = self.operands(0)?;
                let size = match (opcode, self.prefix) {
                    (0x7e, _) if !self.is_wide() => 4,
                    (0x7e | 0xd6, _) | (0x11, Repne) => 8,
                    (0x11, Rep) => 4,
                    _ => 16,
                };
                match to {
                    Target::Register(to) if opcode == 0x7e => clobber(to, instruction),
                    Target::Register(_) => {}
                    Target::Memory { place, faults } => {
                        let value = match from {
                            super::ZERO => Operand::Immediate(0),
                            _ => Operand::Unknown,
                        };
                        instruction.faults = faults;
                        instruction.op = store(place, value, size);
                    }
                }
                Some(())
            }
            // cmov
            (0x40..=0x4f, Bare) => {
                let (to, from) = self.operands(0)?;
                match from {
                    Target::Register(from) => instruction.op = Op::Select(to, to, from),
                    Target::Memory { faults, .. } => {
                        instruction.faults = faults;
                        clobber(to, instruction);
                    }
                }
                Some(())
            }
            // jcc
            (0x80..=0x8f, Bare) => {
                self.bare()?;
                let distance = self.long()?;
                self.branch(opcode, distance, instruction);
                Some(())
            }
            // set
            (0x90..=0x9f, Bare) => {
                let (_, to) = self.operands(0)?;
                instruction.op = match to {
                    Target::Register(to) => Op::Boolean(self.register(to, 1)?),
                    Target::Memory { place, faults } => {
                        instruction.faults = faults;
                        store(place, Operand::Unknown, 1)
                    }
                };
                Some(())
            }
            // imul
            (0xaf, Bare) => {
                let (to, from) = self.operands(0)?;
                read(from, instruction);
                clobber(to, instruction);
                Some(())
            }
            // movzx
            (0xb6 | 0xb7, Bare) => {
                let (size, mask) = if opcode == 0xb6 {
                    (1, 0xff)
                } else {
                    (2, 0xffff)
                };
                let (to, from) = self.operands(0)?;
                instruction.op = match from {
                    Target::Register(from) => {
                        Op::And(to, self.register(from, size)?, Operand::Immediate(mask))
                    }
                    Target::Memory { place, faults } => {
                        instruction.faults = faults;
                        Op::Load {
                            to,
                            from: place,
                            size,
                        }
                    }
                };
                Some(())
            }
            // movsx
            (0xbe | 0xbf, Bare) => {
                let (to, from) = self.operands(0)?;
                read(from, instruction);
                clobber(to, instruction);
                Some(())
            }
            _ => None,
        }
    }

    /// The size of byte operands; `None` for what is left to iced.
    #[inline]
    fn bytes(&self) -> Option<u8> {
        (self.prefix == Prefix::None).then_some(1)
    }

    /// A conditional branch, which is still to have its last byte taken off the reader.
    #[inline]
    fn branch(&self, opcode: u8, distance: i64, instruction: &mut Instruction) {
        const EQUAL: u8 = 4;
        const NOT_EQUAL: u8 = 5;
        let to = VirtualAddress(self.end(0).0.wrapping_add_signed(distance));
        instruction.flow = Flow::Branch(to);
        instruction.kind = InstructionKind::Branch;
        let condition = opcode & 0xf;
        if matches!(condition, EQUAL | NOT_EQUAL) {
            instruction.zero_test = Some(ZeroTest {
                register: None,
                taken_if_zero: condition == EQUAL,
            });
        }
    }

    /// Arithmetic with a register or an immediate.
    #[inline]
    fn arithmetic(
        &self,
        arithmetic: Arithmetic,
        to: Target,
        from: Operand,
        size: u8,
        instruction: &mut Instruction,
    ) -> Option<()> {
        if arithmetic == Arithmetic::Compare {
            read(to, instruction);
            return Some(());
        }
        let Target::Register(register) = to else {
            return self.change(to, size, instruction);
        };
        let to = self.register(register, size)?;
        instruction.op = match (arithmetic, from) {
            (Arithmetic::Add, Operand::Immediate(value)) => Op::Add(to, to, value as i64),
            (Arithmetic::And, from) => Op::And(to, to, from),
            (Arithmetic::Or, from) => Op::Or(to, to, from),
            (Arithmetic::Cancels, Operand::Register(from)) if from == to => Op::Set(to, 0),
            _ => {
                clobber(to, instruction);
                Op::Other
            }
        };
        Some(())
    }

    /// The operand becomes something unknown.
    #[inline]
    fn change(&self, to: Target, size: u8, instruction: &mut Instruction) -> Option<()> {
        match to {
            Target::Register(to) => clobber(self.register(to, size)?, instruction),
            Target::Memory { place, faults } => {
                instruction.faults = faults;
                instruction.op = store(place, Operand::Unknown, size);
            }
        }
        Some(())
    }
}

/// The operand is read.
#[inline]
fn read(from: Target, instruction: &mut Instruction) {
    if let Target::Memory { faults, .. } = from {
        instruction.faults = faults;
    }
}

#[inline]
fn clobber(register: Register, instruction: &mut Instruction) {
    if register != SP {
        instruction.clobbers |= 1 << register;
    }
}
