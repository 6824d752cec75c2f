//! x86-64, through iced-x86.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction as Iced, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register as IcedRegister,
};

use super::{Faults, Flow, Instruction, Op, Operand, Place, Register, RegisterSet, ZeroTest};
use crate::VirtualAddress;
use crate::plan::InstructionKind;

const SP: Register = 4;
/// R14 holds g in Go's internal ABI since 1.17.
const G: Register = 14;

pub(super) fn decode(entry: VirtualAddress, code: &[u8]) -> Vec<Instruction> {
    let mut decoder = Decoder::with_ip(64, code, entry.0, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    let mut instructions = Vec::with_capacity(code.len() / 4);
    let mut iced = Iced::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut iced);
        instructions.push(translate(&iced, &mut factory));
        if iced.is_invalid() {
            // Boundaries behind it are not proven.
            break;
        }
    }
    instructions
}

fn translate(iced: &Iced, factory: &mut InstructionInfoFactory) -> Instruction {
    let mut instruction = Instruction::new(VirtualAddress(iced.ip()));
    instruction.flow = flow(iced);
    instruction.kind = kind(iced);
    // The kernel refuses lock prefixes; armed before exec, such a probe is silently lost.
    instruction.probeable = !iced.has_lock_prefix() && !iced.is_invalid();
    instruction.op = operation(iced);
    instruction.faults = faults(iced);
    match iced.mnemonic() {
        Mnemonic::Test
            if iced.op0_register() == iced.op1_register() && iced.op0_register().is_gpr64() =>
        {
            instruction.tests = general(iced.op0_register());
        }
        Mnemonic::Je | Mnemonic::Jne => {
            instruction.zero_test = Some(ZeroTest {
                register: None,
                taken_if_zero: iced.mnemonic() == Mnemonic::Je,
            });
        }
        _ => {}
    }
    if !is_fully_modelled(iced) {
        side_effects(iced, factory, &mut instruction);
    }
    instruction
}

/// Whether `operation` and `flow` say all that the instruction does to registers and cells: true
/// of most instructions, and asking iced for the rest is the slower half of decoding.
fn is_fully_modelled(iced: &Iced) -> bool {
    match iced.mnemonic() {
        Mnemonic::Mov => iced.op0_kind() == OpKind::Memory || low(iced.op0_register()).is_some(),
        Mnemonic::Lea => !matches!(place(iced), Place::Unknown),
        Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Nop => true,
        _ => iced.is_jcc_short_or_near(),
    }
}

fn faults(iced: &Iced) -> Faults {
    let has_memory = (0..iced.op_count()).any(|i| iced.op_kind(i) == OpKind::Memory);
    let accesses = has_memory
        && !matches!(iced.mnemonic(), Mnemonic::Lea | Mnemonic::Nop)
        && !iced.is_ip_rel_memory_operand();
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
    if !register.is_gpr() {
        return None;
    }
    Register::try_from(register.full_register().number()).ok()
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

fn operation(iced: &Iced) -> Op {
    let to_memory = iced.op0_kind() == OpKind::Memory;
    let size = u8::try_from(iced.memory_size().size()).unwrap_or(u8::MAX);
    let to = if iced.op0_kind() == OpKind::Register {
        low(iced.op0_register())
    } else {
        None
    };
    match iced.mnemonic() {
        Mnemonic::Mov if to_memory => store(place(iced), source(iced), size),
        Mnemonic::Movups
        | Mnemonic::Movaps
        | Mnemonic::Movdqu
        | Mnemonic::Movdqa
        | Mnemonic::Movq
        | Mnemonic::Movsd
            if to_memory =>
        {
            // X15 is zero in Go's internal ABI.
            let zero = iced.op1_register() == IcedRegister::XMM15;
            store(
                place(iced),
                if zero {
                    Operand::Immediate(0)
                } else {
                    Operand::Unknown
                },
                size,
            )
        }
        _ => to.map_or(Op::Other, |to| to_register(iced, to, size)),
    }
}

fn to_register(iced: &Iced, to: Register, size: u8) -> Op {
    let from_memory = iced.op_count() > 1 && iced.op1_kind() == OpKind::Memory;
    match (
        iced.mnemonic(),
        if iced.op_count() > 1 {
            source(iced)
        } else {
            Operand::Unknown
        },
    ) {
        (Mnemonic::Mov | Mnemonic::Movzx, _) if from_memory => Op::Load {
            to,
            from: place(iced),
            size,
        },
        (Mnemonic::Mov, Operand::Immediate(value)) => Op::Set(to, value),
        (Mnemonic::Mov, Operand::Register(from)) => Op::Copy(to, from),
        (Mnemonic::Movzx, Operand::Register(from)) => Op::And(
            to,
            from,
            Operand::Immediate(if iced.op1_register().is_gpr8() {
                0xff
            } else {
                0xffff
            }),
        ),
        (Mnemonic::Lea, _) => match place(iced) {
            Place::Absolute(address) => Op::Set(to, address.0),
            Place::Stack(displacement) => Op::StackAddress(to, displacement),
            Place::Based(base, displacement) => Op::Add(to, base, displacement),
            Place::Unknown => Op::Other,
        },
        (Mnemonic::Xor | Mnemonic::Sub, Operand::Register(from)) if from == to => Op::Set(to, 0),
        (Mnemonic::And, operand) if !from_memory => Op::And(to, to, operand),
        (Mnemonic::Or, operand) if !from_memory => Op::Or(to, to, operand),
        (Mnemonic::Add, Operand::Immediate(value)) => Op::Add(to, to, value as i64),
        (_, Operand::Register(from)) if is_cmov(iced) => Op::Select(to, to, from),
        _ if is_setcc(iced) => Op::Boolean(to),
        _ => Op::Other,
    }
}

fn is_cmov(iced: &Iced) -> bool {
    use Mnemonic::*;
    matches!(
        iced.mnemonic(),
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    )
}

fn is_setcc(iced: &Iced) -> bool {
    use Mnemonic::*;
    matches!(
        iced.mnemonic(),
        Seta | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(code: &[u8]) -> Instruction {
        decode(VirtualAddress(0x1000), code)[0]
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
