//! What the target's registers were at a hit, and what the goroutine's clock says.

use aya_ebpf::{EbpfContext as _, programs::ProbeContext};

/// Where `struct pt_regs` (`user_pt_regs` on arm64) has a register, in words. Both layouts are part of
/// the kernel's interface (ptrace).
#[cfg(bpf_target_arch = "x86_64")]
mod register {
    pub const G: usize = 1; // R14
    pub const FRAME_POINTER: usize = 4;
    pub const SECOND_ARGUMENT: usize = 5; // RBX
    pub const FIRST_ARGUMENT: usize = 10; // RAX
    pub const INSTRUCTION: usize = 16;
    pub const SP: usize = 19;
}
#[cfg(bpf_target_arch = "aarch64")]
mod register {
    pub const FIRST_ARGUMENT: usize = 0;
    pub const SECOND_ARGUMENT: usize = 1;
    pub const G: usize = 28;
    pub const FRAME_POINTER: usize = 29;
    pub const SP: usize = 31;
    pub const INSTRUCTION: usize = 32;
}

/// A hit of a probe.
pub struct Hit {
    registers: [u64; 6],
    /// When, in nanoseconds; only if times are measured.
    pub time: u64,
    /// What hits had cost the goroutine before this one.
    pub tax: u64,
    /// Which entry of the goroutine says so; 0 if there is none.
    pub epoch: u64,
    /// From SP up to the stack's high end.
    pub depth: u64,
}

impl Hit {
    #[inline(always)]
    pub fn new(ctx: &ProbeContext) -> Self {
        let registers = ctx.as_ptr().cast::<u64>();
        // SAFETY: the context is a `struct pt_regs`, which has these words.
        let get = |at: usize| unsafe { *registers.add(at) };
        Self {
            registers: [
                get(register::G),
                get(register::FRAME_POINTER),
                get(register::FIRST_ARGUMENT),
                get(register::SECOND_ARGUMENT),
                get(register::INSTRUCTION),
                get(register::SP),
            ],
            time: 0,
            tax: 0,
            epoch: 0,
            depth: 0,
        }
    }

    /// The goroutine.
    #[inline(always)]
    pub fn g(&self) -> u64 {
        self.registers[0]
    }

    #[inline(always)]
    pub fn frame_pointer(&self) -> u64 {
        self.registers[1]
    }

    #[inline(always)]
    pub fn first_argument(&self) -> u64 {
        self.registers[2]
    }

    #[inline(always)]
    pub fn second_argument(&self) -> u64 {
        self.registers[3]
    }

    #[inline(always)]
    pub fn instruction(&self) -> u64 {
        self.registers[4]
    }

    #[inline(always)]
    pub fn sp(&self) -> u64 {
        self.registers[5]
    }
}
