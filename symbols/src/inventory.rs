//! What a binary says about its defers: the result of a scan.

use std::fmt;

use crate::VirtualAddress;
use crate::plan::ProbePoint;

/// Everything a scan found in one Go executable.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inventory {
    /// Facts of the executable as a whole.
    pub binary: BinaryInfo,
    /// Every site, ordered by function name, then by [`Site::id`]'s ordinal.
    pub sites: Vec<Site>,
    /// What the reader should know: a full sentence each (a newer release than was tested, a
    /// function whose code could not be followed). Never empty where a site may be missing.
    pub warnings: Vec<String>,
}

/// Facts of one Go executable.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BinaryInfo {
    /// The release as the binary names it, such as `go1.27.3`; without the patch release where only its
    /// functions tell it (garble).
    pub go_version: String,
    /// The instruction set.
    pub architecture: Architecture,
    /// The Go build id (`.note.go.buildid`), where the linker left one.
    pub build_id: Option<String>,
    /// Whether it is position-independent.
    pub pie: bool,
    /// Whether it has no symbol table.
    pub stripped: bool,
    /// False if the main module was compiled with `-N` (as far as build info and code show it).
    pub optimized: bool,
}

/// An instruction set that deferprof knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// x86-64, `GOARCH=amd64`.
    Amd64,
    /// AArch64, `GOARCH=arm64`.
    Arm64,
}

/// How the compiler implemented one defer statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mechanism {
    /// `runtime.deferproc`: a record from the deferpool or the heap.
    Heap,
    /// `runtime.deferprocStack` (since 1.13): the record lies in the frame.
    Stack,
    /// A bit in the frame's `deferBits` (since 1.14): no call at the statement.
    OpenCoded,
    /// `runtime.deferprocat` (since 1.23): a defer in a range-over-func body.
    RangeFunc,
}

/// Why a site is not open-coded: the compiler's rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The statement is in a loop, or behind a label that a `goto` jumps back to.
    Loop,
    /// Another defer of the function is in a loop, which bars open coding for all of them.
    LoopInFunction,
    /// The function has more than eight defers.
    Over8Defers,
    /// Return statements times defers exceed fifteen.
    ReturnsTimesDefers,
    /// Compiled with `-N` or `-d=noopendefer`.
    OptimizationsOff,
    /// Compiled with `-race`.
    Race,
    /// A result parameter escapes to the heap.
    ResultsEscape,
    /// The statement is in the body of a range-over-func loop.
    RangeFunc,
    /// Another defer of the function is in a range-over-func body.
    RangeFuncInFunction,
    /// The release had no open coding yet (1.13 and older).
    OldRelease,
}

/// The stable name of a site: `function#ordinal`, the ordinal from 1 in order of source line
/// (then of address) among the sites of all functions of that name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId(pub String);

/// One defer statement as compiled into one function body.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Site {
    /// Its stable name.
    pub id: SiteId,
    /// The function's name as pclntab has it, such as `net/http.(*conn).serve`.
    pub function: String,
    /// The function's first instruction.
    pub function_entry: VirtualAddress,
    /// Source file as the compiler recorded it (absolute, or shortened by `-trimpath`).
    pub file: String,
    /// Line of the `defer` keyword; 0 if pclntab has none.
    pub line: u32,
    /// The instruction that registers: the CALL for heap, stack and range-func, the store of the
    /// closure into its slot for open-coded.
    pub pc: VirtualAddress,
    /// How the statement was compiled.
    pub mechanism: Mechanism,
    /// Why it is not open-coded; `None` for open-coded sites and where the code does not tell.
    pub reason: Option<Reason>,
    /// The deferred function, where the code shows it.
    pub callee: Option<String>,
    /// The bit in `deferBits`, for open-coded sites.
    pub bit: Option<u8>,
    /// For open-coded sites: where the function's own exit code makes the deferred call.
    pub exits: Vec<Exit>,
    /// Where to count registrations.
    pub registration: ProbePoint,
    /// How far SP is below its value at the function's entry where the statement executes, and
    /// throughout the function's body, in bytes.
    pub depth: u64,
}

/// One place where open-coded exit code calls the deferred function of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The CALL instruction.
    pub call: VirtualAddress,
    /// Whether it calls through the slot (`call *reg`) rather than directly.
    pub indirect: bool,
    /// Executes whenever the call is about to be made, and only then; `None` if nothing there can
    /// be probed.
    pub start: Option<ProbePoint>,
    /// Executes whenever the function that is called here is entered, by whomever: with the return
    /// address it tells this call from others, and costs less than `start` where that is
    /// single-stepped. `None` if the code does not show which function it is, or it has no such
    /// instruction.
    pub entered: Option<Entered>,
    /// Where the call returns to.
    pub returns_to: VirtualAddress,
    /// Executes whenever the call has returned, perhaps also where it was not made, with SP as it
    /// was at the call.
    pub end: Option<ProbePoint>,
}

/// An instruction right behind a function's stack check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entered {
    /// The instruction; the kernel emulates it.
    pub point: ProbePoint,
    /// From SP up to the return address, in bytes.
    pub return_address: u64,
    /// From SP up to the caller's SP at the call, in bytes.
    pub caller_sp: u64,
}

impl Mechanism {
    /// The name used in reports and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Heap => "heap",
            Self::Stack => "stack",
            Self::OpenCoded => "open-coded",
            Self::RangeFunc => "range-func",
        }
    }
}

impl Reason {
    /// The name used in reports and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loop => "loop",
            Self::LoopInFunction => "loop-in-function",
            Self::Over8Defers => "over-8-defers",
            Self::ReturnsTimesDefers => "returns-times-defers",
            Self::OptimizationsOff => "optimizations-off",
            Self::Race => "race",
            Self::ResultsEscape => "results-escape",
            Self::RangeFunc => "range-func",
            Self::RangeFuncInFunction => "range-func-in-function",
            Self::OldRelease => "old-release",
        }
    }
}

impl Architecture {
    /// Go's name for it (`GOARCH`).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
