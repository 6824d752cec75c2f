//! The instructions that Go's compiler emits most, decoded straight into the model. What is not
//! here, or comes in an unusual form, is left to iced; what is here must be what it is by way of
//! iced (`usual_agrees_with_rare`, and the fuzz target `decode_amd64`).
//!
//! Encodings: Intel SDM, volume 2, appendix A.

use super::{G, SP, ZERO, store};
use crate::VirtualAddress;
use crate::decode::{Faults, Flow, Instruction, Op, Operand, Place, Register, ZeroTest};
use crate::plan::InstructionKind;

/// As many bytes as [`decode`] looks at: no instruction is longer.
pub(super) const WINDOW: usize = 16;

/// Decodes the instruction at the start of `window` into `instruction`, which is a new one, and says
/// how many bytes it has. `None`, with the instruction in pieces, if it is to be left to iced.
#[inline]
pub(super) fn decode(window: &[u8; WINDOW], instruction: &mut Instruction) -> Option<usize> {
    let mut bytes = Bytes::new(window);
    let mut opcode = bytes.next();
    let mut encoded = Encoded {
        prefix: Prefix::None,
        rex: 0,
        register: 0,
        is_memory: false,
        other: 0,
        displacement: 0,
        immediate: 0,
        end: instruction.address,
    };
    if matches!(opcode, 0x66 | 0xf2 | 0xf3) {
        encoded.prefix = match opcode {
            0x66 => Prefix::Operand,
            0xf2 => Prefix::Repne,
            _ => Prefix::Rep,
        };
        opcode = bytes.next();
    }
    if opcode & 0xf0 == 0x40 {
        encoded.rex = opcode;
        opcode = bytes.next();
    }
    let mut opcode = usize::from(opcode);
    if opcode == 0x0f {
        opcode = SECOND | usize::from(bytes.next());
    }
    let shape = *SHAPES.get(opcode)?;
    if shape & OPERANDS != 0 {
        encoded.operands(&mut bytes);
        if encoded.is_memory && shape & NAMES == 0 {
            instruction.faults = encoded.faults();
        }
    }
    if shape & IMMEDIATE != 0 {
        encoded.immediate = encoded.immediate(opcode, shape, &mut bytes);
    }
    let length = bytes.read;
    encoded.end = VirtualAddress(instruction.address.0.wrapping_add(length as u64));
    encoded.translate(opcode, shape, instruction)?;
    Some(length)
}

/// In an opcode: behind 0F.
const SECOND: usize = 0x100;

/// What an opcode is followed by: ModRM.
const OPERANDS: u8 = 1;
/// Memory is named there, but not accessed.
const NAMES: u8 = 2;
/// An immediate of a byte.
const BYTE: u8 = 4;
/// One as large as the operands, but at most four bytes.
const WORD: u8 = 8;
/// One as large as the operands.
const WIDE: u8 = 16;
/// That of `test`, which shares its opcode with others that have none.
const TEST: u8 = 32;
const IMMEDIATE: u8 = BYTE | WORD | WIDE | TEST;
/// Nothing, and it is not left to iced.
const BARE: u8 = 64;

const SHAPES: [u8; 2 * SECOND] = {
    let mut shapes = [0; 2 * SECOND];
    let mut opcode = 0;
    while opcode < shapes.len() {
        shapes[opcode] = shape(opcode);
        opcode += 1;
    }
    shapes
};

const fn shape(opcode: usize) -> u8 {
    match opcode {
        0x00..=0x3f => match opcode & 7 {
            0..=3 => OPERANDS,
            4 => BYTE,
            5 => WORD,
            _ => 0,
        },
        0x50..=0x5f | 0x90 | 0xc3 | 0xcc | 0x10b => BARE,
        0x63 | 0x84 | 0x85 | 0x88..=0x8b | 0xd0..=0xd3 | 0xfe | 0xff => OPERANDS,
        0x6b | 0x80 | 0x83 | 0xc0 | 0xc1 | 0xc6 => OPERANDS | BYTE,
        0x69 | 0x81 | 0xc7 => OPERANDS | WORD,
        0x70..=0x7f | 0xa8 | 0xb0..=0xb7 | 0xeb => BYTE,
        0x8d | 0x11f => OPERANDS | NAMES,
        0xa9 | 0xe8 | 0xe9 | 0x180..=0x18f => WORD,
        0xb8..=0xbf => WIDE,
        0xf6 | 0xf7 => OPERANDS | TEST,
        // Vector registers.
        0x110 | 0x111 | 0x114 | 0x128..=0x12a | 0x12c..=0x12f => OPERANDS,
        0x151 | 0x154 | 0x157..=0x15a | 0x15c..=0x15f => OPERANDS,
        0x16e | 0x16f | 0x17e | 0x17f | 0x1d6 | 0x1ef => OPERANDS,
        0x140..=0x14f | 0x190..=0x19f | 0x1af | 0x1b6 | 0x1b7 | 0x1be | 0x1bf => OPERANDS,
        _ => 0,
    }
}

/// The bytes that are still to be read: prefixes, opcode, ModRM and SIB are within the first eight,
/// displacement and immediate behind them.
struct Bytes<'a> {
    window: &'a [u8; WINDOW],
    /// What is left of the first eight.
    head: u64,
    /// How many have been read.
    read: usize,
}

impl<'a> Bytes<'a> {
    #[inline]
    fn new(window: &'a [u8; WINDOW]) -> Self {
        let head = window.first_chunk().copied();
        Self {
            window,
            head: u64::from_le_bytes(head.unwrap_or_default()),
            read: 0,
        }
    }

    /// One of the first eight.
    #[inline]
    fn next(&mut self) -> u8 {
        let byte = self.head as u8;
        self.head >>= 8;
        self.read += 1;
        byte
    }

    /// The next few, behind which there are none of the first kind.
    #[inline]
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let rest = self.window.get(self.read..);
        self.read += N;
        rest.and_then(<[u8]>::first_chunk)
            .copied()
            .unwrap_or([0; N])
    }
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

/// The parts of an instruction.
#[derive(Clone, Copy)]
struct Encoded {
    prefix: Prefix,
    /// 0 if there is none.
    rex: u8,
    /// What the register field of ModRM says, extended by REX.
    register: Register,
    /// Whether the other operand of ModRM is in memory.
    is_memory: bool,
    /// The other operand: a register, or what its address is based on, one of the names below.
    other: Register,
    displacement: i64,
    /// Its sign extended.
    immediate: i64,
    /// The address behind it.
    end: VirtualAddress,
}

/// What an address is based on, other than a register: nothing.
const NOTHING: Register = 16;
/// The address of the next instruction.
const NEXT: Register = 17;
/// More than one register.
const INDEXED: Register = 18;

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
    /// Reads ModRM, SIB and displacement.
    #[inline]
    fn operands(&mut self, bytes: &mut Bytes<'_>) {
        let byte = bytes.next();
        let (mode, low, high) = (byte >> 6, byte & 7, (self.rex & 1) << 3);
        self.register = (byte >> 3 & 7) | (self.rex & 4) << 1;
        self.other = low | high;
        self.is_memory = mode != 3;
        if !self.is_memory {
            return;
        }
        let mut is_long = mode == 2;
        if low == 4 {
            let sib = bytes.next();
            let has_base = mode != 0 || sib & 7 != 5;
            let has_index = (sib >> 3 & 7) | (self.rex & 2) << 2 != 4;
            self.other = match (has_index, has_base) {
                (true, _) => INDEXED,
                (false, true) => sib & 7 | high,
                (false, false) => NOTHING,
            };
            is_long |= !has_base;
        } else if byte & 0xc7 == 5 {
            self.other = NEXT;
            is_long = true;
        }
        if mode == 1 {
            self.displacement = i64::from(i8::from_le_bytes(bytes.take()));
        } else if is_long {
            self.displacement = i64::from(i32::from_le_bytes(bytes.take()));
        }
    }

    /// Reads the immediate.
    #[inline]
    fn immediate(self, opcode: usize, shape: u8, bytes: &mut Bytes<'_>) -> i64 {
        let is_byte = shape & BYTE != 0 || shape & TEST != 0 && opcode & 1 == 0;
        if shape & TEST != 0 && self.register & 6 != 0 {
            0
        } else if is_byte {
            i64::from(i8::from_le_bytes(bytes.take()))
        } else if self.prefix == Prefix::Operand {
            i64::from(i16::from_le_bytes(bytes.take()))
        } else if shape & WIDE != 0 && self.is_wide() {
            i64::from_le_bytes(bytes.take())
        } else {
            i64::from(i32::from_le_bytes(bytes.take()))
        }
    }

    #[inline]
    fn is_wide(self) -> bool {
        self.rex & 8 != 0
    }

    /// The size in bytes of the operands, which are bytes if the opcode is even; `None` for what is
    /// left to iced.
    #[inline]
    fn size(self, opcode: usize) -> Option<u8> {
        match (self.prefix, self.is_wide()) {
            (Prefix::None, _) if opcode & 1 == 0 => Some(1),
            (Prefix::None, true) => Some(8),
            (Prefix::None, false) => Some(4),
            (Prefix::Operand, false) if opcode & 1 != 0 => Some(2),
            _ => None,
        }
    }

    /// Nothing if there is a prefix other than REX.
    #[inline]
    fn unprefixed(self) -> Option<()> {
        (self.prefix == Prefix::None).then_some(())
    }

    /// Nothing if there are prefixes.
    #[inline]
    fn bare(self) -> Option<()> {
        (self.prefix == Prefix::None && self.rex == 0).then_some(())
    }

    /// A register of `size` bytes; `None` for AH and the like.
    #[inline]
    fn whole(self, register: Register, size: u8) -> Option<Register> {
        let is_high = size == 1 && self.rex == 0 && register >= SP;
        (!is_high).then_some(register)
    }

    /// The immediate, as large as the operands.
    #[inline]
    fn value(self, size: u8) -> u64 {
        match size {
            1 => u64::from(self.immediate as u8),
            2 => u64::from(self.immediate as u16),
            4 => u64::from(self.immediate as u32),
            _ => self.immediate as u64,
        }
    }

    /// The register that an opcode names in its last bits.
    #[inline]
    fn named(self, opcode: usize) -> Register {
        opcode as u8 & 7 | (self.rex & 1) << 3
    }

    /// Where the operand in memory is.
    #[inline]
    fn place(self) -> Place {
        match self.other {
            SP => Place::Stack(self.displacement),
            NOTHING => Place::Absolute(VirtualAddress(self.displacement as u64)),
            NEXT => {
                let address = self.end.0.wrapping_add_signed(self.displacement);
                Place::Absolute(VirtualAddress(address))
            }
            INDEXED => Place::Unknown,
            base => Place::Based(base, self.displacement),
        }
    }

    /// Whether an access of the operand in memory faults.
    #[inline]
    fn faults(self) -> Faults {
        match self.other {
            SP | G | NEXT | INDEXED => Faults::Never,
            NOTHING => Faults::Maybe,
            base => Faults::ThroughBase(base),
        }
    }

    #[inline]
    fn translate(self, opcode: usize, shape: u8, instruction: &mut Instruction) -> Option<()> {
        match opcode {
            // add, or, adc, sbb, and, sub, xor, cmp
            0x00..=0x3f if shape != 0 => {
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
            SECOND.. if shape != 0 => self.vector(opcode, instruction)?,
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

    /// Where a direct jump or call leads.
    #[inline]
    fn destination(self) -> VirtualAddress {
        VirtualAddress(self.end.0.wrapping_add_signed(self.immediate))
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
