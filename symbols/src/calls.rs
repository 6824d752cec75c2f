//! What is known of a function that gets called, by its name: the runtime functions that register
//! defers, those that never come back, and those that always do.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::elf::Image;
use crate::module::Module;
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

/// Resolves call targets, remembering what it found.
pub(crate) struct Callees<'a, 'data> {
    image: &'a Image<'data>,
    module: &'a Module<'data>,
    known: RefCell<HashMap<u64, Callee>>,
}

impl<'a, 'data> Callees<'a, 'data> {
    pub fn new(image: &'a Image<'data>, module: &'a Module<'data>) -> Self {
        Self {
            image,
            module,
            known: RefCell::default(),
        }
    }

    pub fn resolve(&self, target: VirtualAddress) -> Callee {
        if let Some(callee) = self.known.borrow().get(&target.0) {
            return *callee;
        }
        let table = &self.module.table;
        let callee = table
            .find(self.image, target)
            .and_then(|func| {
                let callee = classify(table.name(func)?);
                // Only Duff's devices are entered in the middle.
                (func.entry == target || callee == Callee::Duff).then_some(callee)
            })
            .unwrap_or(Callee::Other);
        self.known.borrow_mut().insert(target.0, callee);
        callee
    }
}

fn classify(name: &[u8]) -> Callee {
    let Some(name) = name.strip_prefix(b"runtime.") else {
        return Callee::Other;
    };
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
