//! Any instruction of x86-64, through iced-x86.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction as Iced, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register as IcedRegister,
};

use super::{G, SP, store};
use crate::VirtualAddress;
use crate::decode::{
    Faults, Flow, Instruction, Op, Operand, Place, Register, RegisterSet, ZeroTest,
};
use crate::plan::InstructionKind;

/// Decodes one instruction of `code` after the other, wherever they start.
pub(super) struct Rare<'a> {
    decoder: Decoder<'a>,
    iced: Iced,
    factory: Option<InstructionInfoFactory>,
}

impl<'a> Rare<'a> {
    pub fn new(code: &'a [u8]) -> Self {
        Self {
            decoder: Decoder::new(64, code, DecoderOptions::NONE),
            iced: Iced::default(),
            factory: None,
        }
    }

    /// The instruction at `position`, and how many bytes it has; `None` if its bytes are none.
    pub fn decode(
        &mut self,
        position: usize,
        address: VirtualAddress,
    ) -> (Instruction, Option<usize>) {
        let Self {
            decoder,
            iced,
            factory,
        } = self;
        // Past the end it decodes nothing, which is invalid.
        let is_inside = decoder.set_position(position).is_ok();
        decoder.set_ip(address.0);
        decoder.decode_out(iced);
        let instruction = translate(iced, factory);
        (
            instruction,
            (is_inside && !iced.is_invalid()).then(|| iced.len()),
        )
    }
}

/// What the model knows of an instruction, by its mnemonic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// It changes neither general registers, but for SP, nor cells, but for what it pushes.
    Reads,
    /// `mov` and `movzx`. From here to [`Class::Changes`]: it changes only its first operand.
    Moves,
    /// `lea`.
    Address,
    /// `cmov`.
    Selects,
    /// `set`.
    Decides,
    /// To or from a vector register.
    Vector,
    /// Anything else.
    Changes,
    /// To ask iced, which is the slower half of decoding.
    Unknown,
}

impl Class {
    fn of(mnemonic: Mnemonic) -> Self {
        static CLASSES: [Class; 2048] = classes();
        let known = CLASSES.get(mnemonic as usize);
        known.copied().unwrap_or(Self::Unknown)
    }
}

const fn classes() -> [Class; 2048] {
    use Mnemonic::*;
    const KNOWN: &[(Class, &[Mnemonic])] = &[
        (
            Class::Reads,
            &[
                Cmp, Test, Jmp, Call, Push, Ret, Nop, Ja, Jae, Jb, Jbe, Je, Jg, Jge, Jl, Jle, Jne,
                Jno, Jnp, Jns, Jo, Jp, Js,
            ],
        ),
        (Class::Moves, &[Mov, Movzx]),
        (Class::Address, &[Lea]),
        (
            Class::Selects,
            &[
                Cmova, Cmovae, Cmovb, Cmovbe, Cmove, Cmovg, Cmovge, Cmovl, Cmovle, Cmovne, Cmovno,
                Cmovnp, Cmovns, Cmovo, Cmovp, Cmovs,
            ],
        ),
        (
            Class::Decides,
            &[
                Seta, Setae, Setb, Setbe, Sete, Setg, Setge, Setl, Setle, Setne, Setno, Setnp,
                Setns, Seto, Setp, Sets,
            ],
        ),
        (
            Class::Vector,
            &[Movups, Movaps, Movdqu, Movdqa, Movd, Movq, Movss, Movsd],
        ),
        (
            Class::Changes,
            &[Movsx, Movsxd, Add, Sub, And, Or, Xor, Shl, Shr, Sar],
        ),
    ];
    let mut classes = [Class::Unknown; 2048];
    let mut at = 0;
    while at < KNOWN.len() {
        let (class, mnemonics) = KNOWN[at];
        let mut i = 0;
        while i < mnemonics.len() {
            classes[mnemonics[i] as usize] = class;
            i += 1;
        }
        at += 1;
    }
    classes
}

#[inline]
fn translate(iced: &Iced, factory: &mut Option<InstructionInfoFactory>) -> Instruction {
    let mnemonic = iced.mnemonic();
    let mut class = Class::of(mnemonic);
    if iced.op_count() > 2 || is_of_strings(iced) {
        class = Class::Unknown;
    }
    let mut instruction = Instruction::new(VirtualAddress(iced.ip()));
    // The kernel refuses lock prefixes; armed before exec, such a probe is silently lost.
    instruction.probeable = !iced.has_lock_prefix() && !iced.is_invalid();
    instruction.faults = faults(iced, mnemonic);
    match class {
        Class::Reads => {
            instruction.flow = flow(iced);
            instruction.kind = kind(iced);
            decisions(iced, mnemonic, &mut instruction);
        }
        Class::Unknown => {
            instruction.flow = flow(iced);
            instruction.op = operation(iced, class, mnemonic);
            let factory = factory.get_or_insert_with(InstructionInfoFactory::new);
            side_effects(iced, factory, &mut instruction);
        }
        _ => {
            instruction.op = operation(iced, class, mnemonic);
            first_operand(iced, &mut instruction);
        }
    }
    instruction
}

/// Whether it is a string instruction, some of which have the name of another.
fn is_of_strings(iced: &Iced) -> bool {
    let by_string = |kind| {
        matches!(
            kind,
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI
        )
    };
    by_string(iced.op0_kind()) || by_string(iced.op1_kind())
}

/// What a comparison with zero tests, and what a branch on it asks.
fn decisions(iced: &Iced, mnemonic: Mnemonic, instruction: &mut Instruction) {
    match mnemonic {
        Mnemonic::Test
            if iced.op0_register() == iced.op1_register() && iced.op0_register().is_gpr64() =>
        {
            instruction.tests = general(iced.op0_register());
        }
        Mnemonic::Je | Mnemonic::Jne => {
            instruction.zero_test = Some(ZeroTest {
                register: None,
                taken_if_zero: mnemonic == Mnemonic::Je,
            });
        }
        _ => {}
    }
}

/// The first operand changes, if the model does not already say to what.
fn first_operand(iced: &Iced, instruction: &mut Instruction) {
    if iced.op0_kind() == OpKind::Memory {
        if instruction.op == Op::Other {
            let size = u8::try_from(iced.memory_size().size()).unwrap_or(u8::MAX);
            instruction.op = store(place(iced), Operand::Unknown, size.max(1));
        }
    } else if let Some(register) = general(iced.op0_register())
        && register != SP
        && Some(register) != instruction.op.written()
    {
        instruction.clobbers |= (1 as RegisterSet) << register;
    }
}

fn faults(iced: &Iced, mnemonic: Mnemonic) -> Faults {
    let count = iced.op_count();
    let has_memory = (count > 0 && iced.op0_kind() == OpKind::Memory)
        || (count > 1 && iced.op1_kind() == OpKind::Memory)
        || (2..count).any(|i| iced.op_kind(i) == OpKind::Memory);
    if !has_memory {
        return Faults::Never;
    }
    let accesses =
        !matches!(mnemonic, Mnemonic::Lea | Mnemonic::Nop) && !iced.is_ip_rel_memory_operand();
    // An index was checked against a length before, and a nil slice has none; for pointers to
    // arrays the compiler checks for nil explicitly, since it removes such checks only in favour
    // of accesses without an index (`nilcheck.go`).
    let indexed = iced.memory_index() != IcedRegister::None;
    let thread_local = matches!(iced.segment_prefix(), IcedRegister::FS | IcedRegister::GS);
    if !accesses || indexed || thread_local {
        return Faults::Never;
    }
    match general(iced.memory_base()) {
        Some(SP | G) => Faults::Never,
        Some(base) => Faults::ThroughBase(base),
        None => Faults::Maybe,
    }
}

/// What iced knows of an instruction that the model does not cover.
fn side_effects(iced: &Iced, factory: &mut InstructionInfoFactory, instruction: &mut Instruction) {
    let writes = |access| {
        matches!(
            access,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        )
    };
    let info = factory.info(iced);
    let implicit = matches!(iced.mnemonic(), Mnemonic::Push | Mnemonic::Call);
    for memory in info.used_memory() {
        if writes(memory.access()) && !implicit && instruction.op == Op::Other {
            let size = u8::try_from(memory.memory_size().size()).unwrap_or(u8::MAX);
            instruction.op = store(place(iced), Operand::Unknown, size.max(1));
        }
    }
    let known = instruction.op.written();
    for used in info.used_registers() {
        if let Some(register) = general(used.register())
            && writes(used.access())
            && register != SP
            && Some(register) != known
        {
            instruction.clobbers |= (1 as RegisterSet) << register;
        }
    }
}

fn flow(iced: &Iced) -> Flow {
    let target = VirtualAddress(iced.near_branch_target());
    match iced.flow_control() {
        FlowControl::Next => Flow::Next,
        FlowControl::UnconditionalBranch => Flow::Jump(target),
        FlowControl::ConditionalBranch => Flow::Branch(target),
        FlowControl::IndirectBranch => Flow::IndirectJump,
        FlowControl::Call if iced.is_call_near() => Flow::Call(target),
        FlowControl::IndirectCall => Flow::IndirectCall,
        FlowControl::Return => Flow::Return,
        // `syscall` and the like go on behind themselves; int3, ud2 and bad bytes do not.
        FlowControl::Call => Flow::Next,
        FlowControl::Interrupt | FlowControl::Exception | FlowControl::XbeginXabortXend => {
            Flow::Stop
        }
    }
}

/// What the kernel emulates (`arch/x86/kernel/uprobes.c`, `branch_setup_xol_ops` and
/// `push_setup_xol_ops`), without prefixes. Multi-byte NOPs, which newer kernels emulate as well,
/// are left out: since 6.18 a five-byte one may be rewritten to a call into a trampoline, which
/// would put foreign frames on a goroutine's stack.
fn kind(iced: &Iced) -> InstructionKind {
    match iced.code() {
        Code::Call_rel32_64 if iced.len() == 5 => InstructionKind::Call,
        Code::Jmp_rel8_64 if iced.len() == 2 => InstructionKind::Jump,
        Code::Jmp_rel32_64 if iced.len() == 5 => InstructionKind::Jump,
        _ if iced.is_jcc_short() && iced.len() == 2 => InstructionKind::Branch,
        _ if iced.is_jcc_near() && iced.len() == 6 => InstructionKind::Branch,
        Code::Push_r64 if iced.len() <= 2 => InstructionKind::Push,
        Code::Nopd if iced.len() == 1 => InstructionKind::Nop,
        _ => InstructionKind::SingleStepped,
    }
}

fn general(register: IcedRegister) -> Option<Register> {
    let from = |first: IcedRegister| (register as usize).wrapping_sub(first as usize);
    // Most are of 64 or 32 bits.
    let number = match (from(IcedRegister::RAX), from(IcedRegister::EAX)) {
        (number @ 0..16, _) | (_, number @ 0..16) => number,
        _ if register.is_gpr() => register.full_register().number(),
        _ => return None,
    };
    Register::try_from(number).ok()
}

/// The register if it is a whole or low part of a general one (AH and the like are not).
fn low(register: IcedRegister) -> Option<Register> {
    let high = matches!(
        register,
        IcedRegister::AH | IcedRegister::BH | IcedRegister::CH | IcedRegister::DH
    );
    if high { None } else { general(register) }
}

fn place(iced: &Iced) -> Place {
    if iced.is_ip_rel_memory_operand() {
        return Place::Absolute(VirtualAddress(iced.ip_rel_memory_address()));
    }
    if iced.memory_index() != IcedRegister::None || iced.segment_prefix() != IcedRegister::None {
        return Place::Unknown;
    }
    let displacement = iced.memory_displacement64() as i64;
    match iced.memory_base() {
        IcedRegister::RSP => Place::Stack(displacement),
        IcedRegister::None => Place::Absolute(VirtualAddress(iced.memory_displacement64())),
        base => general(base).map_or(Place::Unknown, |base| Place::Based(base, displacement)),
    }
}

fn immediate(iced: &Iced, operand: u32) -> Option<u64> {
    match iced.op_kind(operand) {
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Some(iced.immediate(operand)),
        _ => None,
    }
}

fn source(iced: &Iced) -> Operand {
    if let Some(value) = immediate(iced, 1) {
        return Operand::Immediate(value);
    }
    match iced.op_kind(1) {
        OpKind::Register => low(iced.op_register(1)).map_or(Operand::Unknown, Operand::Register),
        _ => Operand::Unknown,
    }
}

fn operation(iced: &Iced, class: Class, mnemonic: Mnemonic) -> Op {
    let size = || u8::try_from(iced.memory_size().size()).unwrap_or(u8::MAX);
    match iced.op0_kind() {
        OpKind::Memory => match class {
            Class::Moves => store(place(iced), source(iced), size()),
            Class::Vector => {
                // X15 is zero in Go's internal ABI.
                let zero = iced.op1_register() == IcedRegister::XMM15;
                let value = if zero {
                    Operand::Immediate(0)
                } else {
                    Operand::Unknown
                };
                store(place(iced), value, size())
            }
            _ => Op::Other,
        },
        OpKind::Register => match low(iced.op0_register()) {
            Some(to) => to_register(iced, class, mnemonic, to, size),
            None => Op::Other,
        },
        _ => Op::Other,
    }
}

fn to_register(
    iced: &Iced,
    class: Class,
    mnemonic: Mnemonic,
    to: Register,
    size: impl Fn() -> u8,
) -> Op {
    if class == Class::Address {
        return match place(iced) {
            Place::Absolute(address) => Op::Set(to, address.0),
            Place::Stack(displacement) => Op::StackAddress(to, displacement),
            Place::Based(base, displacement) => Op::Add(to, base, displacement),
            Place::Unknown => Op::Other,
        };
    }
    if iced.op_count() > 1 && iced.op1_kind() == OpKind::Memory {
        return match class {
            Class::Moves => Op::Load {
                to,
                from: place(iced),
                size: size(),
            },
            _ => Op::Other,
        };
    }
    let source = match iced.op_count() {
        2.. => source(iced),
        _ => Operand::Unknown,
    };
    match (class, mnemonic, source) {
        (Class::Moves, Mnemonic::Mov, Operand::Immediate(value)) => Op::Set(to, value),
        (Class::Moves, Mnemonic::Mov, Operand::Register(from)) => Op::Copy(to, from),
        (Class::Moves, Mnemonic::Movzx, Operand::Register(from)) => {
            let mask = match iced.op1_register().is_gpr8() {
                true => 0xff,
                false => 0xffff,
            };
            Op::And(to, from, Operand::Immediate(mask))
        }
        (Class::Selects, _, Operand::Register(from)) => Op::Select(to, to, from),
        (Class::Decides, ..) => Op::Boolean(to),
        (_, Mnemonic::Xor | Mnemonic::Sub, Operand::Register(from)) if from == to => Op::Set(to, 0),
        (_, Mnemonic::And, operand) => Op::And(to, to, operand),
        (_, Mnemonic::Or, operand) => Op::Or(to, to, operand),
        (_, Mnemonic::Add, Operand::Immediate(value)) => Op::Add(to, to, value as i64),
        _ => Op::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::Random;

    /// What the classes leave out must be what iced says is not there.
    #[test]
    fn classes_agree_with_iced() {
        let mut factory = InstructionInfoFactory::new();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut compared = [0; Class::Unknown as usize];
        for _ in 0..2_000_000 {
            let random = random.step().to_le_bytes();
            let mut code = [0; 16];
            code[..8].copy_from_slice(&random);
            let mut decoder = Decoder::with_ip(64, &code, 0x1000, DecoderOptions::NONE);
            let iced = decoder.decode();
            let class = Class::of(iced.mnemonic());
            if iced.is_invalid() || class == Class::Unknown || iced.op_count() > 2 {
                continue;
            }
            let (mut writes, mut stores) = (0 as RegisterSet, false);
            let info = factory.info(&iced);
            let is_write = |access| {
                !matches!(
                    access,
                    OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
                )
            };
            for used in info
                .used_registers()
                .iter()
                .filter(|r| is_write(r.access()))
            {
                if let Some(register) = general(used.register()).filter(|r| *r != SP) {
                    writes |= 1 << register;
                }
            }
            if !matches!(iced.mnemonic(), Mnemonic::Push | Mnemonic::Call) {
                stores = info.used_memory().iter().any(|m| is_write(m.access()));
            }
            let ours = translate(&iced, &mut None);
            let written = ours.op.written().filter(|r| *r != SP);
            let ours_written = ours.clobbers | written.map_or(0, |r| 1 << r);
            assert_eq!(ours_written, writes, "{iced:?} {random:x?}");
            assert_eq!(
                matches!(ours.op, Op::Store { .. }),
                stores,
                "{iced:?} {random:x?}"
            );
            compared[class as usize] += 1;
        }
        assert!(compared.iter().all(|n| *n > 100), "{compared:?}");
    }
}
