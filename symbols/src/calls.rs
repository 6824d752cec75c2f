//! What is known of a function that gets called, by its name: the runtime functions that register
//! defers, those that never come back, and those that always do.

use crate::pclntab::Func;
use crate::{Mechanism, VirtualAddress};

/// What a call of a function means for the analysis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Callee {
    /// Registers a defer of this mechanism.
    Registers(Mechanism),
    /// `runtime.deferrangefunc`: a range-over-func loop with a defer in its body starts.
    StartsRangeFunc,
    /// `runtime.deferreturn`.
    DeferReturn,
    /// Never returns to its caller: the compiler ends the block behind the call.
    NeverReturns,
    /// Returns, or the process dies: no Go panic can start in it, nor can Goexit.
    AlwaysReturns,
    /// Like it, and keeps all registers but its result.
    WriteBarrier,
    /// Like it; the assembly clears or copies memory and changes few registers.
    Duff,
    /// `runtime.newobject`: always returns, with a new object.
    NewObject,
    /// `runtime.racefuncenter`: the caller was compiled with `-race`.
    Race,
    Other,
}

/// The functions that mean something, in order of entry.
#[derive(Debug, Default)]
pub(crate) struct Callees {
    known: Vec<(u64, Callee)>,
    /// Duff's devices, which are entered in the middle.
    devices: Vec<(u64, u64)>,
}

impl Callees {
    /// Notes `func` if calls of it mean something.
    pub fn note(&mut self, func: Func, name: &[u8]) {
        match classify(name) {
            Callee::Other => {}
            Callee::Duff => self.devices.push((func.entry.0, func.end.0)),
            callee => match self.place(func.entry.0) {
                Ok(at) => {
                    if let Some(place) = self.known.get_mut(at) {
                        place.1 = callee;
                    }
                }
                Err(at) => self.known.insert(at, (func.entry.0, callee)),
            },
        }
    }

    /// The entry of the function with this meaning, if there is one.
    pub fn entry_of(&self, callee: Callee) -> Option<u64> {
        let mut known = self.known.iter();
        known.find_map(|(entry, known)| (*known == callee).then_some(*entry))
    }

    /// Where a function is or would be.
    fn place(&self, entry: u64) -> Result<usize, usize> {
        // Most calls lead out of the runtime, the functions of which lie together.
        match self.known.last() {
            Some((last, _)) if *last < entry => Err(self.known.len()),
            _ => self.known.binary_search_by_key(&entry, |known| known.0),
        }
    }

    /// Adds what `others`, which lie behind these, mean.
    pub fn extend(&mut self, others: Self) {
        self.known.extend(others.known);
        self.devices.extend(others.devices);
    }

    pub fn resolve(&self, target: VirtualAddress) -> Callee {
        if let Some((_, callee)) = self.place(target.0).ok().and_then(|at| self.known.get(at)) {
            return *callee;
        }
        let inside = |(start, end): &(u64, u64)| (*start..*end).contains(&target.0);
        if self.devices.iter().any(inside) {
            Callee::Duff
        } else {
            Callee::Other
        }
    }
}

/// By a function's name in package runtime.
fn classify(name: &[u8]) -> Callee {
    let starts = |prefixes: &[&[u8]]| prefixes.iter().any(|p| name.starts_with(p));
    match name {
        b"deferproc" => Callee::Registers(Mechanism::Heap),
        b"deferprocStack" => Callee::Registers(Mechanism::Stack),
        b"deferprocat" => Callee::Registers(Mechanism::RangeFunc),
        b"deferrangefunc" => Callee::StartsRangeFunc,
        b"deferreturn" => Callee::DeferReturn,
        b"newobject" => Callee::NewObject,
        b"racefuncenter" => Callee::Race,
        b"duffzero" | b"duffcopy" => Callee::Duff,
        b"throw" | b"fatal" | b"block" | b"goexit0" | b"Goexit" | b"fatalthrow"
        | b"unreachableMethod" | b"panicCheckFail" => Callee::NeverReturns,
        // These two return when all is well; they are called by the runtime's own panics.
        b"panicCheck1" | b"panicCheck2" => Callee::Other,
        _ if starts(&[b"gcWriteBarrier"]) => Callee::WriteBarrier,
        _ if starts(&[b"panic", b"goPanic", b"gopanic"]) => Callee::NeverReturns,
        // Memory and type plumbing: out of memory kills the process, nothing panics. (Not among
        // them: growslice, makeslice, mapassign, which can.)
        b"memmove"
        | b"memclrNoHeapPointers"
        | b"memclrHasPointers"
        | b"typedmemmove"
        | b"typedmemclr"
        | b"wbZero"
        | b"wbMove"
        | b"convT"
        | b"convTnoptr"
        | b"convT16"
        | b"convT32"
        | b"convT64"
        | b"convTstring"
        | b"convTslice" => Callee::AlwaysReturns,
        _ if starts(&[b"mallocgc"]) => Callee::AlwaysReturns,
        _ => Callee::Other,
    }
}
