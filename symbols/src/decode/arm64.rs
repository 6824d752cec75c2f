//! AArch64: the instructions that Go's compiler uses around defers, by their encodings in the
//! Arm Architecture Reference Manual (DDI 0487, chapter C4). What is not recognised clobbers every
//! register that its fields could name.

use super::{Faults, Flow, Instruction, Op, Operand, Place, Register, RegisterSet, ZeroTest};
use crate::VirtualAddress;
use crate::plan::InstructionKind;

/// SP or the zero register, depending on the instruction.
const R31: Register = 31;
/// Go's g.
const G: Register = 28;
/// Go's assembler temporary: sequences that use it may be restarted by asynchronous preemption.
const REGTMP: Register = 27;

/// The instructions of `code`, one after the other.
pub(super) fn instructions(
    entry: VirtualAddress,
    code: &[u8],
) -> impl Iterator<Item = Instruction> + '_ {
    let (words, _) = code.as_chunks::<4>();
    let addresses = std::iter::successors(Some(entry.0), |a| Some(a.wrapping_add(4)));
    addresses
        .zip(words)
        .map(|(address, word)| translate(VirtualAddress(address), u32::from_le_bytes(*word)))
}

/// See [`super::calls_of`].
pub(super) fn calls_of(
    start: VirtualAddress,
    code: &[u8],
    target: VirtualAddress,
) -> Vec<VirtualAddress> {
    let calls = instructions(start, code).filter(|i| i.flow == Flow::Call(target));
    calls.map(|call| call.address).collect()
}

fn register(word: u32, at: u32) -> Register {
    (word >> at & 31) as Register
}

fn bit(register: Register) -> RegisterSet {
    if register == R31 { 0 } else { 1 << register }
}

/// The field of `bits` bits at `at`, sign-extended.
fn signed(word: u32, at: u32, bits: u32) -> i64 {
    let field = i64::from(word >> at) & ((1 << bits) - 1);
    (field << (64 - bits)) >> (64 - bits)
}

fn relative(address: VirtualAddress, words: i64) -> VirtualAddress {
    VirtualAddress(address.0.wrapping_add_signed(words * 4))
}

fn translate(address: VirtualAddress, word: u32) -> Instruction {
    let mut i = Instruction::new(address);
    if !branch(&mut i, word) && !memory(&mut i, word) {
        compute(&mut i, word);
    }
    // All but the last instruction of a restartable sequence write the temporary register.
    if i.op.written() == Some(REGTMP) || i.clobbers & bit(REGTMP) != 0 {
        i.probeable = false;
    }
    i
}

/// Everything that neither branches nor accesses memory.
fn compute(i: &mut Instruction, word: u32) {
    let address = i.address;
    let (rd, rn, rm) = (register(word, 0), register(word, 5), register(word, 16));
    let wide = word >> 31 == 1;
    if word & 0x1f00_0000 == 0x1000_0000 {
        i.kind = InstructionKind::Address;
        let pages = signed(word, 5, 19) << 2 | i64::from(word >> 29 & 3);
        let value = match wide {
            true => (address.0 & !0xfff).wrapping_add_signed(pages << 12),
            false => address.0.wrapping_add_signed(pages),
        };
        i.op = Op::Set(rd, value);
    } else if word & 0x1f80_0000 == 0x1100_0000 {
        add_immediate(i, word);
    } else if word & 0x1f80_0000 == 0x1200_0000 {
        let opcode = word >> 29 & 3;
        let mask = logical_immediate(word, wide).map_or(Operand::Unknown, Operand::Immediate);
        i.op = match opcode {
            0 => Op::And(rd, rn, mask),
            1 if rn == R31 => match mask {
                Operand::Immediate(value) => Op::Set(rd, value),
                _ => Op::Other,
            },
            1 => Op::Or(rd, rn, mask),
            _ => Op::Other,
        };
        if i.op == Op::Other || rd == R31 {
            i.op = Op::Other;
            i.clobbers = bit(rd);
        }
    } else if word & 0x1f80_0000 == 0x1280_0000 {
        let shifted = u64::from(word >> 5 & 0xffff) << (16 * (word >> 21 & 3));
        i.op = match word >> 29 & 3 {
            0 if wide => Op::Set(rd, !shifted),
            0 => Op::Set(rd, u64::from(!(shifted as u32))),
            2 => Op::Set(rd, shifted),
            _ => Op::Other,
        };
        i.clobbers = if i.op == Op::Other { bit(rd) } else { 0 };
    } else if word & 0x1f00_0000 == 0x0a00_0000 {
        // Logical, shifted register; only without shift or inversion.
        let plain = word & 0x00e0_fc00 == 0;
        i.op = match word >> 29 & 3 {
            1 if plain && rn == R31 && rm == R31 => Op::Set(rd, 0),
            1 if plain && rn == R31 => Op::Copy(rd, rm),
            1 if plain && rd != R31 => Op::Or(rd, rn, Operand::Register(rm)),
            0 if plain && rd != R31 => Op::And(rd, rn, Operand::Register(rm)),
            _ => Op::Other,
        };
        i.clobbers = if i.op == Op::Other { bit(rd) } else { 0 };
    } else if word & 0x7f80_0000 == 0x5300_0000 && word >> 16 & 0x3f == 0 {
        // UBFM from bit 0: uxtb, uxth, ubfx.
        let top = word >> 10 & 0x3f;
        i.op = Op::And(rd, rn, Operand::Immediate(u64::MAX >> (63 - top)));
    } else if word & 0x1fe0_0000 == 0x1a80_0000 {
        i.op = match (word >> 30 & 1, word >> 10 & 3) {
            (0, 0) if rn != R31 && rm != R31 => Op::Select(rd, rn, rm),
            (0, 1) if rn == R31 && rm == R31 => Op::Boolean(rd),
            _ => Op::Other,
        };
        i.clobbers = if i.op == Op::Other { bit(rd) } else { 0 };
    } else if word & 0xffc0_0000 == 0xd500_0000 {
        // System: hints are harmless; the rest the kernel may refuse to single-step.
        i.probeable = word == 0xd503_201f;
        i.clobbers = bit(rd);
    } else {
        i.clobbers = bit(rd) | bit(rn) | bit(register(word, 10));
    }
}

/// Branches, exceptions; true if it was one.
fn branch(i: &mut Instruction, word: u32) -> bool {
    let at = i.address;
    let (kind, flow) = if word & 0xfc00_0000 == 0x1400_0000 {
        (
            InstructionKind::Jump,
            Flow::Jump(relative(at, signed(word, 0, 26))),
        )
    } else if word & 0xfc00_0000 == 0x9400_0000 {
        (
            InstructionKind::Call,
            Flow::Call(relative(at, signed(word, 0, 26))),
        )
    } else if word & 0xff00_0010 == 0x5400_0000 || word & 0x7e00_0000 == 0x3400_0000 {
        (
            InstructionKind::Branch,
            Flow::Branch(relative(at, signed(word, 5, 19))),
        )
    } else if word & 0x7e00_0000 == 0x3600_0000 {
        (
            InstructionKind::Branch,
            Flow::Branch(relative(at, signed(word, 5, 14))),
        )
    } else {
        match word & 0xffff_fc1f {
            0xd61f_0000 => (InstructionKind::IndirectBranch, Flow::IndirectJump),
            0xd63f_0000 => (InstructionKind::IndirectBranch, Flow::IndirectCall),
            0xd65f_0000 => (InstructionKind::IndirectBranch, Flow::Return),
            _ if word >> 24 == 0xd4 && word & 0x1f == 1 => {
                (InstructionKind::SingleStepped, Flow::Next)
            }
            _ if word >> 24 == 0xd4 || word >> 16 == 0 => {
                i.probeable = false;
                (InstructionKind::SingleStepped, Flow::Stop)
            }
            _ => return false,
        }
    };
    i.kind = kind;
    i.flow = flow;
    // CBZ and CBNZ of a 64-bit register.
    if word & 0xfe00_0000 == 0xb400_0000 {
        i.zero_test = Some(ZeroTest {
            register: Some(register(word, 0)),
            taken_if_zero: word >> 24 & 1 == 0,
        });
    }
    true
}

fn add_immediate(i: &mut Instruction, word: u32) {
    let (rd, rn) = (register(word, 0), register(word, 5));
    let magnitude = i64::from(word >> 10 & 0xfff) << (12 * (word >> 22 & 1));
    let value = if word >> 30 & 1 == 1 {
        -magnitude
    } else {
        magnitude
    };
    let sets_flags = word >> 29 & 1 == 1;
    i.op = match (rd, rn) {
        (R31, _) => Op::Other,
        _ if sets_flags => Op::Other,
        (_, R31) => Op::StackAddress(rd, value),
        _ => Op::Add(rd, rn, value),
    };
    i.clobbers = if i.op == Op::Other { bit(rd) } else { 0 };
}

/// A bitmask immediate (DDI 0487, `DecodeBitMasks`).
fn logical_immediate(word: u32, wide: bool) -> Option<u64> {
    let (n, immr, imms) = (word >> 22 & 1, word >> 16 & 0x3f, word >> 10 & 0x3f);
    let combined = n << 6 | (!imms & 0x3f);
    let len = 31u32.checked_sub(combined.leading_zeros())?;
    if len == 0 || (!wide && n == 1) {
        return None;
    }
    let size = 1u32 << len;
    let (ones, rotation) = ((imms & (size - 1)) + 1, immr & (size - 1));
    if ones == size {
        return None;
    }
    let element = (1u64 << ones) - 1;
    let limit = u64::MAX >> (64 - size);
    let turned = if rotation == 0 {
        element
    } else {
        (element >> rotation | element << (size - rotation)) & limit
    };
    let mut value = 0;
    for at in (0..if wide { 64 } else { 32 }).step_by(size as usize) {
        value |= turned << at;
    }
    Some(value)
}

fn place(base: Register, displacement: i64) -> Place {
    if base == R31 {
        Place::Stack(displacement)
    } else {
        Place::Based(base, displacement)
    }
}

fn operand(value: Register) -> Operand {
    if value == R31 {
        Operand::Immediate(0)
    } else {
        Operand::Register(value)
    }
}

/// Loads and stores; true if it was one.
fn memory(i: &mut Instruction, word: u32) -> bool {
    let (rt, rn, rt2) = (register(word, 0), register(word, 5), register(word, 10));
    let vector = word >> 26 & 1 == 1;
    let through = if rn == R31 || rn == G {
        Faults::Never
    } else {
        Faults::ThroughBase(rn)
    };
    let size = 1u8 << (word >> 30);
    if word & 0x3b00_0000 == 0x3900_0000 {
        // Unsigned scaled offset.
        // A 16-byte vector register has size 0 and the upper bit of the opcode set.
        let scale = if vector && word >> 23 & 1 == 1 {
            16
        } else {
            size
        };
        let displacement = i64::from(word >> 10 & 0xfff) * i64::from(scale);
        i.faults = through;
        single(i, word, vector, place(rn, displacement), size, rt);
    } else if word & 0x3b20_0000 == 0x3800_0000 {
        // Unscaled, or with write-back.
        let writes_back = word >> 10 & 1 == 1;
        let post = word >> 10 & 3 == 1;
        let displacement = if post { 0 } else { signed(word, 12, 9) };
        // With pre-index SP moves first: the cell is at the new SP, so its key is not known here.
        let to = if writes_back {
            Place::Unknown
        } else {
            place(rn, displacement)
        };
        i.faults = through;
        single(i, word, vector, to, size, rt);
        i.clobbers |= if writes_back { bit(rn) } else { 0 };
    } else if word & 0x3b20_0c00 == 0x3820_0800 {
        i.faults = if rn == R31 {
            Faults::Never
        } else {
            Faults::Maybe
        };
        single(i, word, vector, Place::Unknown, size, rt);
    } else if word & 0x3b20_0c00 == 0x3820_0000 {
        i.faults = through;
        i.clobbers = bit(rt) | bit(register(word, 16));
        i.op = Op::Store {
            to: Place::Unknown,
            values: [Operand::Unknown; 2],
            count: 1,
            size,
        };
    } else if word & 0x3a00_0000 == 0x2800_0000 {
        pair(i, word, vector, through, [rt, rt2]);
    } else if word & 0x3b00_0000 == 0x1800_0000 {
        // Literal loads are refused since 6.12 and were simulated wrongly before.
        i.probeable = false;
        i.clobbers = if vector { 0 } else { bit(rt) };
    } else if word & 0x3f00_0000 == 0x0800_0000 {
        // Exclusives, acquire-release, compare-and-swap: a single step breaks the monitor.
        i.probeable = false;
        i.faults = through;
        i.clobbers = bit(rt) | bit(rt2) | bit(register(word, 16));
    } else {
        return false;
    }
    true
}

fn single(i: &mut Instruction, word: u32, vector: bool, at: Place, size: u8, rt: Register) {
    let opcode = word >> 22 & 3;
    if vector {
        let size = if opcode & 2 == 2 { 16 } else { size };
        if opcode & 1 == 0 {
            let count = if size == 16 { 2 } else { 1 };
            i.op = Op::Store {
                to: at,
                values: [Operand::Unknown; 2],
                count,
                size: size.min(8),
            };
        }
        return;
    }
    i.op = match opcode {
        0 => Op::Store {
            to: at,
            values: [operand(rt), Operand::Unknown],
            count: 1,
            size,
        },
        1 if rt != R31 => Op::Load {
            to: rt,
            from: at,
            size,
        },
        _ => Op::Other,
    };
    i.clobbers = if opcode > 1 { bit(rt) } else { 0 };
}

fn pair(i: &mut Instruction, word: u32, vector: bool, through: Faults, rt: [Register; 2]) {
    let rn = register(word, 5);
    let (mode, load) = (word >> 23 & 3, word >> 22 & 1 == 1);
    let size: u8 = match (word >> 30, vector) {
        (0, false) | (1, _) => {
            if vector {
                8
            } else {
                4
            }
        }
        (0, true) => 4,
        (_, true) => 16,
        _ => 8,
    };
    let writes_back = mode == 1 || mode == 3;
    let displacement = signed(word, 15, 7) * i64::from(size);
    let at = if writes_back {
        Place::Unknown
    } else {
        place(rn, displacement)
    };
    i.faults = through;
    i.clobbers = if writes_back { bit(rn) } else { 0 };
    if load {
        i.clobbers |= if vector { 0 } else { bit(rt[0]) | bit(rt[1]) };
        return;
    }
    let values = if vector {
        [Operand::Unknown; 2]
    } else {
        rt.map(operand)
    };
    // A pair of 16-byte registers covers four words; two of them suffice to lose nothing known,
    // since Go's compiler spills no defer slots that way.
    i.op = Op::Store {
        to: at,
        values,
        count: 2,
        size: size.min(8),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(word: u32) -> Instruction {
        translate(VirtualAddress(0x10000), word)
    }

    #[test]
    fn models_the_instructions_of_open_coded_defers() {
        // Encodings from `aarch64-linux-gnu-as`.
        let stack = |displacement| Place::Stack(displacement);
        // str x0, [sp, #88]
        let store = |to, value, size| Op::Store {
            to,
            values: [value, Operand::Unknown],
            count: 1,
            size,
        };
        assert_eq!(
            one(0xf900_2fe0).op,
            store(stack(88), Operand::Register(0), 8)
        );
        // strb wzr, [sp, #15]
        assert_eq!(
            one(0x3900_3fff).op,
            store(stack(15), Operand::Immediate(0), 1)
        );
        // stp xzr, x1, [sp, #16]
        assert_eq!(
            one(0xa901_07ff).op,
            Op::Store {
                to: stack(16),
                values: [Operand::Immediate(0), Operand::Register(1)],
                count: 2,
                size: 8
            }
        );
        // orr w1, w1, #2
        assert_eq!(one(0x321f_0021).op, Op::Or(1, 1, Operand::Immediate(2)));
        // and w1, w1, #0xfffffffd
        assert_eq!(
            one(0x121e_7821).op,
            Op::And(1, 1, Operand::Immediate(0xffff_fffd))
        );
        // mov x1, #7; mov w1, w2; add x0, sp, #32
        assert_eq!(one(0xd280_00e1).op, Op::Set(1, 7));
        assert_eq!(one(0x2a02_03e1).op, Op::Copy(1, 2));
        assert_eq!(one(0x9100_83e0).op, Op::StackAddress(0, 32));
        // ldr x3, [x4]: through a pointer that may be nil
        assert_eq!(one(0xf940_0083).faults, Faults::ThroughBase(4));
        // cset w1, eq; uxtb w1, w1
        assert_eq!(one(0x1a9f_17e1).op, Op::Boolean(1));
        assert_eq!(one(0x5300_1c21).op, Op::And(1, 1, Operand::Immediate(0xff)));
    }

    #[test]
    fn branches_have_their_targets() {
        assert_eq!(one(0x9400_0002).flow, Flow::Call(VirtualAddress(0x10008)));
        assert_eq!(one(0x17ff_ffff).flow, Flow::Jump(VirtualAddress(0xfffc)));
        assert_eq!(one(0x5400_0041).flow, Flow::Branch(VirtualAddress(0x10008)));
        assert_eq!(one(0xb400_0040).flow, Flow::Branch(VirtualAddress(0x10008)));
        // tbnz w1, #3, +8
        assert_eq!(one(0x3718_0041).flow, Flow::Branch(VirtualAddress(0x10008)));
        assert_eq!(one(0xd65f_03c0).flow, Flow::Return);
        assert_eq!(one(0xd420_0000).flow, Flow::Stop);
        assert_eq!(one(0x0000_0000).flow, Flow::Stop);
    }

    #[test]
    fn restartable_and_exclusive_instructions_are_no_probe_points() {
        // adrp x27, …; ldaxr x0, [x1]
        assert!(!one(0x9000_001b).probeable);
        assert!(one(0x9000_0001).probeable);
        assert!(!one(0xc85f_fc20).probeable);
    }
}
