//! Two loops of our own whose instructions are probed to learn what a hit costs here.
//!
//! Beside the system calls the only unsafe code of the engine: calling assembly.

use std::{arch::global_asm, fs, io};

use deferprof_symbols::FileOffset;

// Both take how often to go round, at least 1, and keep to the C calling convention. The probed
// instructions are of the kinds that a plan most often has: a direct call, and a plain move. They
// run in what looks like a goroutine, on top of a chain of 8 frames, as deep as a handler of a server is, which ends there: Rust
// uses the frame pointer for other things, and a walk that faults costs more than one that ends.
// Between two hits they wait for about a microsecond of the processor's clock, which takes the same
// time however busy the machine is: right behind one another, as no program has them, hits cost a
// third of a microsecond more.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .text.deferprof_probed_loop, \"ax\", @progbits",
    ".globl deferprof_loop_call, deferprof_probed_call, deferprof_loop_move, deferprof_probed_move",
    ".globl deferprof_behind_call, deferprof_behind_move",
    "deferprof_loop_call:",
    "lea rax, [rip + deferprof_probed_call]",
    "jmp 3f",
    "deferprof_loop_move:",
    "lea rax, [rip + deferprof_probed_move]",
    "3: lea rdx, [rip + 4f]", // the return address in all frames
    "push rbp",
    "push r14",
    "lea rbp, [rsp + 64]",
    "push rbp",     // the stack's high end
    "push 0",       // its low end
    "mov r14, rsp", // the goroutine: these two words
    "xor ebp, ebp",
    ".rept 8",
    "push rdx",
    "push rbp",
    "mov rbp, rsp",
    ".endr",
    "jmp rax",
    "deferprof_probed_call: call 2f", // emulated
    "rdtsc",
    "mov esi, eax",
    "5: rdtsc",
    "sub eax, esi",
    "cmp eax, 2000",
    "jb 5b",
    "dec rdi",
    "deferprof_behind_call: jnz deferprof_probed_call", // emulated
    "4: add rsp, 8 * 16 + 16",
    "pop r14",
    "pop rbp",
    "2: ret",
    "deferprof_probed_move: mov rax, rdi", // single-stepped
    "rdtsc",
    "mov esi, eax",
    "5: rdtsc",
    "sub eax, esi",
    "cmp eax, 2000",
    "jb 5b",
    "dec rdi",
    "deferprof_behind_move: jnz deferprof_probed_move", // emulated
    "jmp 4b",
    ".popsection",
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".pushsection .text.deferprof_probed_loop, \"ax\", @progbits",
    ".globl deferprof_loop_call, deferprof_probed_call, deferprof_loop_move, deferprof_probed_move",
    ".globl deferprof_behind_call, deferprof_behind_move",
    ".balign 4",
    "deferprof_loop_call:",
    "adr x10, deferprof_probed_call",
    "b 3f",
    "deferprof_loop_move:",
    "adr x10, deferprof_probed_move",
    "3: adr x11, 4f", // the return address in all frames
    "stp x29, x30, [sp, #-16]!",
    "str x28, [sp, #-16]!",
    "add x12, sp, #64",
    "stp xzr, x12, [sp, #-16]!", // the stack's low and high end
    "mov x28, sp",               // the goroutine: these two words
    "mov x29, xzr",
    ".rept 8",
    "stp x29, x11, [sp, #-16]!",
    "mov x29, sp",
    ".endr",
    "br x10",
    "deferprof_probed_call: bl 2f", // emulated
    "mrs x12, cntfrq_el0",
    "mrs x9, cntvct_el0",
    "5: mrs x10, cntvct_el0",
    "sub x10, x10, x9",
    "cmp x10, x12, lsr #20",
    "b.lo 5b",
    "subs x0, x0, #1",
    "deferprof_behind_call: b.ne deferprof_probed_call", // emulated
    "4: add sp, sp, #8 * 16 + 16",
    "ldr x28, [sp], #16",
    "ldp x29, x30, [sp], #16",
    "2: ret",
    "deferprof_probed_move: mov x9, x0", // single-stepped
    "mrs x12, cntfrq_el0",
    "mrs x9, cntvct_el0",
    "5: mrs x10, cntvct_el0",
    "sub x10, x10, x9",
    "cmp x10, x12, lsr #20",
    "b.lo 5b",
    "subs x0, x0, #1",
    "deferprof_behind_move: b.ne deferprof_probed_move", // emulated
    "b 4b",
    ".popsection",
);

unsafe extern "C" {
    fn deferprof_loop_call(times: u64);
    fn deferprof_probed_call();
    fn deferprof_loop_move(times: u64);
    fn deferprof_probed_move();
    fn deferprof_behind_call();
    fn deferprof_behind_move();
}

/// One of the loops, by what the kernel does with its probed instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbedLoop {
    /// It emulates it in the trap handler.
    Emulated,
    /// It single-steps it out of line: a second trap.
    SingleStepped,
}

impl ProbedLoop {
    /// Executes the probed instruction `times` times.
    pub(super) fn run(self, times: u64) {
        if times == 0 {
            return; // The loops test their condition at the end.
        }
        // SAFETY: both keep to the C calling convention, touch only their own stack and end.
        unsafe {
            match self {
                Self::Emulated => deferprof_loop_call(times),
                Self::SingleStepped => deferprof_loop_move(times),
            }
        }
    }

    /// Where the probed instruction is in our own executable.
    pub(super) fn offset(self) -> io::Result<FileOffset> {
        offset_of(match self {
            Self::Emulated => deferprof_probed_call as *const () as u64,
            Self::SingleStepped => deferprof_probed_move as *const () as u64,
        })
    }

    /// Where the emulated instruction right behind it is.
    pub(super) fn offset_behind(self) -> io::Result<FileOffset> {
        offset_of(match self {
            Self::Emulated => deferprof_behind_call as *const () as u64,
            Self::SingleStepped => deferprof_behind_move as *const () as u64,
        })
    }
}

/// Where our own code is in our executable.
fn offset_of(address: u64) -> io::Result<FileOffset> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    file_offset(&maps, address)
        .map(FileOffset)
        .ok_or_else(|| io::Error::other("/proc/self/maps does not show deferprof's own code"))
}

/// Translates an address by the text of /proc/<pid>/maps.
fn file_offset(maps: &str, address: u64) -> Option<u64> {
    maps.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(fields.nth(1)?)?);
        let within = address.checked_sub(start).filter(|_| address < end)?;
        within.checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_translated_by_their_mapping() {
        let maps = "\
55d0db400000-55d0db4d5000 r--p 00000000 fe:01 42    /bin/x
55d0db4d5000-55d0db4d7000 r-xp 000d4000 fe:01 42    /bin/x
";
        assert_eq!(file_offset(maps, 0x55d0_db4d_5074), Some(0xd4074));
        assert_eq!(file_offset(maps, 0x55d0_db4d_7000), None);
    }

    #[test]
    fn the_loops_end() {
        for one in [ProbedLoop::Emulated, ProbedLoop::SingleStepped] {
            one.run(0);
            one.run(1);
            one.run(1000);
            assert!(one.offset().unwrap().0 < one.offset_behind().unwrap().0);
        }
    }
}
