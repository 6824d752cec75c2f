//! What the tests probe: code in this very executable, with counts that are known to the hit.
//!
//! The executable starts itself again; the second process obeys lines on its standard input.

use std::{
    arch::global_asm,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
};

use deferprof_symbols::FileOffset;
use nix::{
    fcntl::OFlag,
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, execve, fork, pipe2},
};

/// Says to the executable that it is the target, or the attacher, and not the tests.
pub const MODE: &str = "DEFERPROF_TEST_MODE";

/// How many probes the sled has room for.
pub const SLED: usize = 10_000;

// Two ways to one leaf, each frame with a frame pointer; the outermost frame is the last one, so
// that the walk ends with a return address into the code that called it. The leaf's `nop` is emulated (x86-64), the instruction after it single-stepped.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".text",
    ".globl t_leaf_nop, t_leaf_step, t_by_a, t_by_b, t_call_a, t_after_a, t_deep, t_sled, t_refused",
    "t_leaf:",
    "push rbp",
    "mov rbp, rsp",
    "t_leaf_nop: nop",
    "t_leaf_step: lea rax, [rax + 1]",
    "pop rbp",
    "ret",
    "t_by_a:",
    "push rbp",
    "push [rsp + 8]",
    "push 0",
    "mov rbp, rsp",
    "t_call_a: call t_leaf",
    "t_after_a: add rsp, 16",
    "pop rbp",
    "ret",
    "t_by_b:",
    "push rbp",
    "push [rsp + 8]",
    "push 0",
    "mov rbp, rsp",
    "call t_leaf",
    "add rsp, 16",
    "pop rbp",
    "ret",
    // Calls the leaf under as many frames as its argument says.
    "t_deep:",
    "push rbp",
    "mov rbp, rsp",
    "dec rdi",
    "jz 2f",
    "call t_deep",
    "jmp 3f",
    "2: call t_leaf",
    "3: pop rbp",
    "ret",
    "t_refused: lock inc dword ptr [rip + t_word]",
    "ret",
    "t_sled:",
    ".rept 10000",
    "nop",
    ".endr",
    "ret",
    ".data",
    "t_word: .long 0",
    ".text",
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".text",
    ".globl t_leaf_nop, t_leaf_step, t_by_a, t_by_b, t_call_a, t_after_a, t_deep, t_sled, t_refused",
    "t_leaf:",
    "stp x29, x30, [sp, #-16]!",
    "mov x29, sp",
    "t_leaf_nop: adr x9, t_leaf",
    "t_leaf_step: add x9, x9, #1",
    "ldp x29, x30, [sp], #16",
    "ret",
    "t_by_a:",
    "stp x29, x30, [sp, #-16]!",
    "mov x29, xzr",
    "stp x29, x30, [sp, #-16]!",
    "mov x29, sp",
    "t_call_a: bl t_leaf",
    "t_after_a: add sp, sp, #16",
    "ldp x29, x30, [sp], #16",
    "ret",
    "t_by_b:",
    "stp x29, x30, [sp, #-16]!",
    "mov x29, xzr",
    "stp x29, x30, [sp, #-16]!",
    "mov x29, sp",
    "bl t_leaf",
    "add sp, sp, #16",
    "ldp x29, x30, [sp], #16",
    "ret",
    "t_deep:",
    "stp x29, x30, [sp, #-16]!",
    "mov x29, sp",
    "subs x0, x0, #1",
    "b.eq 2f",
    "bl t_deep",
    "b 3f",
    "2: bl t_leaf",
    "3: ldp x29, x30, [sp], #16",
    "ret",
    "t_refused: ldxr w0, [sp]",
    "ret",
    "t_sled:",
    ".rept 10000",
    "nop",
    ".endr",
    "ret",
);

unsafe extern "C" {
    fn t_leaf_nop();
    fn t_leaf_step();
    fn t_by_a();
    fn t_by_b();
    fn t_call_a();
    fn t_after_a();
    fn t_deep(frames: u64);
    fn t_sled();
    fn t_refused();
}

/// A place in this executable's code.
#[derive(Clone, Copy)]
pub enum Place {
    /// Emulated, in the leaf.
    Leaf,
    /// Single-stepped, in the leaf.
    LeafStep,
    /// The call of the leaf in `by_a`.
    CallA,
    /// Where that call returns to.
    AfterA,
    /// The sled's instruction of that number.
    Sled(usize),
    /// An instruction that the kernel refuses to probe.
    Refused,
}

impl Place {
    /// Bytes from one instruction of the sled to the next.
    pub const INSTRUCTION: u64 = if cfg!(target_arch = "x86_64") { 1 } else { 4 };

    /// Where it is in memory, in this process.
    pub fn address(self) -> u64 {
        match self {
            Self::Leaf => t_leaf_nop as *const () as u64,
            Self::LeafStep => t_leaf_step as *const () as u64,
            Self::CallA => t_call_a as *const () as u64,
            Self::AfterA => t_after_a as *const () as u64,
            Self::Sled(index) => t_sled as *const () as u64 + index as u64 * Self::INSTRUCTION,
            Self::Refused => t_refused as *const () as u64,
        }
    }

    /// Where it is in the executable file, by this process' own mapping of it.
    pub fn offset(self) -> FileOffset {
        let address = self.address();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let offset = maps.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let (start, end) = fields.next()?.split_once('-')?;
            let hex = |text| u64::from_str_radix(text, 16).ok();
            let (start, end, offset) = (hex(start)?, hex(end)?, hex(fields.nth(1)?)?);
            (start..end)
                .contains(&address)
                .then(|| address - start + offset)
        });
        FileOffset(offset.expect("the code is mapped"))
    }
}

/// Runs `by_a` and `by_b` that often.
fn call(a: u64, b: u64) {
    for _ in 0..a {
        // SAFETY: it keeps to the C calling convention and touches nothing but its frame.
        unsafe { t_by_a() };
    }
    for _ in 0..b {
        // SAFETY: as above.
        unsafe { t_by_b() };
    }
}

/// Obeys its standard input. Called in the second process only.
pub fn obey() {
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        match words[0] {
            // threads N A B: that many threads call `by_a` and `by_b` that often
            "threads" => {
                let (a, b) = (number(2), number(3));
                let threads: Vec<_> = (0..number(1))
                    .map(|_| thread::spawn(move || call(a, b)))
                    .collect();
                threads
                    .into_iter()
                    .for_each(|thread| thread.join().unwrap());
            }
            "deep" => {
                // SAFETY: as in `call`; the tests ask for some hundred frames.
                unsafe { t_deep(number(1)) }
            }
            "sled" => (0..number(1)).for_each(|_| {
                // SAFETY: as in `call`.
                unsafe { t_sled() }
            }),
            _ => panic!("no such command: {line}"),
        }
        say("done");
    }
}

/// Writes a line that the tests look for.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n@{line}").unwrap();
    out.flush().unwrap();
}

/// The second process.
pub struct Target {
    pub child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    executable: std::fs::File,
}

impl Target {
    /// Starts this executable again, in a mode.
    pub fn start(mode: &str) -> Self {
        let executable = std::fs::File::open("/proc/self/exe").unwrap();
        let mut child = Command::new(format!("/proc/self/fd/{}", executable.as_raw_fd()))
            .args(["--exact", "second_process", "--nocapture"])
            .env(MODE, mode)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut target = Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
            executable,
        };
        target.expect("ready");
        target
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn executable(&self) -> BorrowedFd<'_> {
        self.executable.as_fd()
    }

    /// Sends a command.
    pub fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    /// Sends a command and waits until it is done.
    pub fn run(&mut self, command: &str) {
        self.send(command);
        self.expect("done");
    }

    /// Reads lines up to one that starts so, and returns the rest of it.
    pub fn expect(&mut self, start: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(
                self.output.read_line(&mut line).unwrap(),
                0,
                "it ended before it said {start}"
            );
            if let Some(rest) = line
                .trim_end()
                .strip_prefix('@')
                .and_then(|line| line.strip_prefix(start))
            {
                return rest.trim().to_owned();
            }
        }
    }
}

/// A child that has not executed the file yet.
pub struct Waiting {
    child: Pid,
    go: OwnedFd,
    input: std::fs::File,
    output: BufReader<std::fs::File>,
}

impl Waiting {
    pub fn fork() -> Self {
        let (go_read, go_write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (input_read, input_write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (output_read, output_write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let arguments = [c"self", c"--exact", c"second_process", c"--nocapture"];
        let mode = std::ffi::CString::new(format!("{MODE}=target")).unwrap();
        // SAFETY: the child makes only system calls, on what was made ready before.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let _ = nix::unistd::read(&go_read, &mut [0]);
                let _ = nix::unistd::dup2_stdin(input_read);
                let _ = nix::unistd::dup2_stdout(output_write);
                let _ = execve(c"/proc/self/exe", &arguments, &[&mode]);
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { nix::libc::_exit(127) }
            }
            ForkResult::Parent { child } => Self {
                child,
                go: go_write,
                input: input_write.into(),
                output: BufReader::new(output_read.into()),
            },
        }
    }

    pub fn pid(&self) -> Pid {
        self.child
    }

    /// Lets it execute the file.
    pub fn release(&mut self) {
        nix::unistd::write(&self.go, b"g").unwrap();
    }

    /// Has it obey one command and end.
    pub fn finish(mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
        drop(self.input);
        let mut said = String::new();
        self.output.read_to_string(&mut said).unwrap();
        assert!(said.contains("@done"), "{said}");
        waitpid(self.child, None).unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
