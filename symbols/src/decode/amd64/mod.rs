//! x86-64: what Go emits most is decoded here, the rest by iced-x86.

mod encoding;
mod rare;
mod usual;

use super::{Instruction, Op, Operand, Place, Register};
use crate::VirtualAddress;
use rare::Rare;

const SP: Register = 4;
/// R14 holds g in Go's internal ABI since 1.17.
const G: Register = 14;
/// X15 is zero in Go's internal ABI.
const ZERO: Register = 15;

/// The instructions of `code`, one after the other.
pub(super) struct Instructions<'a> {
    entry: VirtualAddress,
    code: &'a [u8],
    position: usize,
    rare: Option<Box<Rare<'a>>>,
    done: bool,
}

impl<'a> Instructions<'a> {
    pub(super) fn new(entry: VirtualAddress, code: &'a [u8]) -> Self {
        Self {
            entry,
            code,
            position: 0,
            rare: None,
            done: false,
        }
    }

    /// The address of the next instruction, if there is one.
    #[inline]
    fn address(&self) -> Option<VirtualAddress> {
        let is_left = self.position < self.code.len() && !self.done;
        is_left.then(|| VirtualAddress(self.entry.0.wrapping_add(self.position as u64)))
    }

    /// Decodes the next instruction into `instruction`, which is new at its address.
    #[inline]
    fn read(&mut self, instruction: &mut Instruction) {
        let rest = self.code.get(self.position..).unwrap_or_default();
        let mut end = [0; encoding::WINDOW];
        let window = rest.first_chunk().unwrap_or_else(|| {
            for (byte, of_code) in end.iter_mut().zip(rest) {
                *byte = *of_code;
            }
            &end
        });
        match usual::decode(window, instruction).filter(|length| *length <= rest.len()) {
            Some(length) => self.position += length,
            None => *instruction = self.rare(instruction.address),
        }
    }

    #[cold]
    fn rare(&mut self, address: VirtualAddress) -> Instruction {
        let rare = self
            .rare
            .get_or_insert_with(|| Box::new(Rare::new(self.code)));
        let (instruction, length) = rare.decode(self.position, address);
        // Boundaries behind an invalid one are not proven.
        self.done = length.is_none();
        self.position += length.unwrap_or(0);
        instruction
    }

    /// Puts them all behind those in `instructions`.
    pub(super) fn read_all(mut self, instructions: &mut Vec<Instruction>) {
        while let Some(address) = self.address() {
            instructions.push(Instruction::new(address));
            // Decoded where it stays: a copy of each would take as long.
            if let Some(last) = instructions.last_mut() {
                self.read(last);
            }
        }
    }
}

/// The instructions of `code`, all of them by way of iced.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn by_iced(entry: VirtualAddress, code: &[u8]) -> Vec<Instruction> {
    let mut all = Instructions::new(entry, code);
    std::iter::from_fn(|| Some(all.rare(all.address()?))).collect()
}

impl Iterator for Instructions<'_> {
    type Item = Instruction;

    fn next(&mut self) -> Option<Instruction> {
        let mut instruction = Instruction::new(self.address()?);
        self.read(&mut instruction);
        Some(instruction)
    }
}

/// See [`super::calls_of`].
pub(super) fn calls_of(
    start: VirtualAddress,
    code: &[u8],
    target: VirtualAddress,
) -> Vec<VirtualAddress> {
    const CALL: u8 = 0xe8;
    const LENGTH: u64 = 5;
    let calls = memchr::memchr_iter(CALL, code).filter_map(|at| {
        let distance = code.get(at + 1..)?.first_chunk()?;
        let address = start.checked_add(at as u64)?;
        let distance = i64::from(i32::from_le_bytes(*distance));
        let to = address.checked_add(LENGTH)?.0.wrapping_add_signed(distance);
        (to == target.0).then_some(address)
    });
    calls.collect()
}

/// A store of `size` bytes.
fn store(to: Place, value: Operand, size: u8) -> Op {
    // Larger than a word: a run of unknown words, of which two are enough for a closure slot.
    match size {
        16 => Op::Store {
            to,
            values: [value; 2],
            count: 2,
            size: 8,
        },
        _ => Op::Store {
            to,
            values: [value, Operand::Unknown],
            count: 1,
            size,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Faults, InstructionKind};
    use crate::fuzzing::Random;

    fn one(code: &[u8]) -> Instruction {
        let first = Instructions::new(VirtualAddress(0x1000), code).next();
        first.unwrap()
    }

    #[test]
    fn knows_what_the_kernel_emulates() {
        use InstructionKind::*;
        for (code, kind) in [
            (&[0xe8, 0, 0, 0, 0][..], Call),
            (&[0xeb, 0xfe], Jump),
            (&[0xe9, 0, 0, 0, 0], Jump),
            (&[0x74, 0x02], Branch),
            (&[0x0f, 0x84, 0, 0, 0, 0], Branch),
            (&[0x55], Push),
            (&[0x41, 0x57], Push),
            (&[0x90], Nop),
            (&[0x66, 0x90], SingleStepped),
            (&[0x0f, 0x1f, 0x44, 0, 0], SingleStepped),
            (&[0x49, 0x3b, 0x66, 0x10], SingleStepped),
            (&[0xc3], SingleStepped),
            (&[0xff, 0xd1], SingleStepped),
        ] {
            assert_eq!(one(code).kind, kind, "{code:x?}");
        }
        // lock cmpxchg %ecx,(%rdx)
        assert!(!one(&[0xf0, 0x0f, 0xb1, 0x0a]).probeable);
    }

    /// What is decoded here must be what it is by way of iced.
    #[test]
    fn usual_agrees_with_rare() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut by_opcode = [0u32; 512];
        for _ in 0..4_000_000 {
            let (head, tail) = (random.step(), random.step());
            let mut code = [0; 16];
            code[8..].copy_from_slice(&tail.to_le_bytes());
            code[..8].copy_from_slice(&head.to_le_bytes());
            // Half of them with a prefix, REX, both; and a quarter of those from the second table.
            let start = match random.step() % 8 {
                0 => &[0x48][..],
                1 => &[0x66],
                2 => &[0xf2, 0x0f],
                3 => &[0xf3, 0x4c, 0x0f],
                4 => &[0x66, 0x0f],
                5 => &[0x0f],
                _ => &[],
            };
            code[..start.len()].copy_from_slice(start);
            let address = VirtualAddress(0x1000);
            let mut usual = Instruction::new(address);
            let Some(length) = usual::decode(&code, &mut usual) else {
                continue;
            };
            let (rare, of_rare) = Rare::new(&code).decode(0, address);
            assert_eq!(of_rare, Some(length), "{code:x?}");
            assert_eq!(usual, rare, "{code:x?}");
            for end in 0..length {
                let cut = Instructions::new(address, &code[..end]).next();
                assert_ne!(cut, Some(usual), "{code:x?}");
            }
            let opcodes = code
                .iter()
                .skip_while(|b| matches!(b, 0x40..=0x4f | 0x66 | 0xf2 | 0xf3));
            let place = match opcodes.copied().take(2).collect::<Vec<_>>()[..] {
                [0x0f, second] => 256 + usize::from(second),
                [first, ..] => usize::from(first),
                [] => continue,
            };
            by_opcode[place] += 1;
        }
        let known = by_opcode.iter().filter(|count| **count > 0).count();
        let least = by_opcode.iter().filter(|count| **count > 0).min();
        assert!(known > 200 && *least.unwrap() > 100, "{known} {least:?}");
    }

    #[test]
    fn models_the_instructions_of_open_coded_defers() {
        // mov %rdx,0x58(%rsp)
        let slot = one(&[0x48, 0x89, 0x54, 0x24, 0x58]);
        assert_eq!(slot.op, store(Place::Stack(0x58), Operand::Register(2), 8));
        assert_eq!(slot.faults, Faults::Never);
        // movb $0x1,0xf(%rsp)
        let bits = one(&[0xc6, 0x44, 0x24, 0x0f, 0x01]);
        assert_eq!(bits.op, store(Place::Stack(0xf), Operand::Immediate(1), 1));
        // movups %xmm15,0x10(%rsp)
        let zero = one(&[0x44, 0x0f, 0x11, 0x7c, 0x24, 0x10]);
        assert_eq!(
            zero.op,
            store(Place::Stack(0x10), Operand::Immediate(0), 16)
        );
        // or $0x2,%ecx
        assert_eq!(
            one(&[0x83, 0xc9, 0x02]).op,
            Op::Or(1, 1, Operand::Immediate(2))
        );
        // mov (%rax),%rcx: through a pointer that may be nil
        assert_eq!(one(&[0x48, 0x8b, 0x08]).faults, Faults::ThroughBase(0));
        // lea 0x10(%rip),%rax
        assert_eq!(
            one(&[0x48, 0x8d, 0x05, 0x10, 0, 0, 0]).op,
            Op::Set(0, 0x1017)
        );
        // xadd %rax,0x8(%rsp): both the cell and the register change
        let both = one(&[0x48, 0x0f, 0xc1, 0x44, 0x24, 0x08]);
        assert_eq!(both.op, store(Place::Stack(8), Operand::Unknown, 8));
        assert_eq!(both.clobbers, 1);
    }
}
