//! How x86-64 instructions are encoded (Intel SDM, volume 2, chapter 2 and appendix A), for the opcodes
//! that [`super::usual`] knows.

use super::{G, SP};
use crate::VirtualAddress;
use crate::decode::{Faults, Place, Register};

/// As many bytes as are looked at: no instruction is longer.
pub(super) const WINDOW: usize = 16;

/// In an opcode: behind 0F.
pub(super) const SECOND: usize = 0x100;

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
pub(super) enum Prefix {
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
pub(super) struct Encoded {
    pub prefix: Prefix,
    /// 0 if there is none.
    rex: u8,
    /// What the register field of ModRM says, extended by REX.
    pub register: Register,
    /// Whether the other operand of ModRM is in memory.
    pub is_memory: bool,
    /// The other operand: a register, or what its address is based on, one of the names below.
    pub other: Register,
    displacement: i64,
    /// Its sign extended.
    pub immediate: i64,
    /// The address behind it.
    end: VirtualAddress,
    /// In bytes.
    pub length: usize,
    /// Its one byte, or the one behind 0F, and then [`SECOND`] with it.
    pub opcode: usize,
    /// False if the opcode is left to iced.
    pub is_known: bool,
    /// Whether it accesses the operand in memory.
    pub accesses: bool,
}

/// What an address is based on, other than a register: nothing.
const NOTHING: Register = 16;
/// The address of the next instruction.
const NEXT: Register = 17;
/// More than one register.
const INDEXED: Register = 18;

impl Encoded {
    /// Takes the instruction at the start of `window` apart, which stands at `address`.
    #[inline]
    pub fn read(window: &[u8; WINDOW], address: VirtualAddress) -> Option<Self> {
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
            end: address,
            length: 0,
            opcode: 0,
            is_known: false,
            accesses: false,
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
            encoded.accesses = encoded.is_memory && shape & NAMES == 0;
        }
        if shape & IMMEDIATE != 0 {
            encoded.immediate = encoded.read_immediate(opcode, shape, &mut bytes);
        }
        encoded.length = bytes.read;
        encoded.end = VirtualAddress(address.0.wrapping_add(bytes.read as u64));
        encoded.opcode = opcode;
        encoded.is_known = shape != 0;
        Some(encoded)
    }

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
    fn read_immediate(self, opcode: usize, shape: u8, bytes: &mut Bytes<'_>) -> i64 {
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
    pub fn is_wide(self) -> bool {
        self.rex & 8 != 0
    }

    /// The size in bytes of the operands, which are bytes if the opcode is even; `None` for what is
    /// left to iced.
    #[inline]
    pub fn size(self, opcode: usize) -> Option<u8> {
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
    pub fn unprefixed(self) -> Option<()> {
        (self.prefix == Prefix::None).then_some(())
    }

    /// Nothing if there are prefixes.
    #[inline]
    pub fn bare(self) -> Option<()> {
        (self.prefix == Prefix::None && self.rex == 0).then_some(())
    }

    /// A register of `size` bytes; `None` for AH and the like.
    #[inline]
    pub fn whole(self, register: Register, size: u8) -> Option<Register> {
        let is_high = size == 1 && self.rex == 0 && register >= SP;
        (!is_high).then_some(register)
    }

    /// The immediate, as large as the operands.
    #[inline]
    pub fn value(self, size: u8) -> u64 {
        match size {
            1 => u64::from(self.immediate as u8),
            2 => u64::from(self.immediate as u16),
            4 => u64::from(self.immediate as u32),
            _ => self.immediate as u64,
        }
    }

    /// The register that an opcode names in its last bits.
    #[inline]
    pub fn named(self, opcode: usize) -> Register {
        opcode as u8 & 7 | (self.rex & 1) << 3
    }

    /// Where the operand in memory is.
    #[inline]
    pub fn place(self) -> Place {
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
    pub fn faults(self) -> Faults {
        match self.other {
            SP | G | NEXT | INDEXED => Faults::Never,
            NOTHING => Faults::Maybe,
            base => Faults::ThroughBase(base),
        }
    }

    /// Where a direct jump or call leads.
    #[inline]
    pub fn destination(self) -> VirtualAddress {
        VirtualAddress(self.end.0.wrapping_add_signed(self.immediate))
    }
}
