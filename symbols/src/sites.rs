//! From functions that contain defers to the list of their sites.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::{Builder, ScopedJoinHandle};

use crate::callee::{Namer, text};
use crate::calls::{Callee, Callees};
use crate::code::Code;
use crate::decode::{self, Flow};
use crate::elf::Image;
use crate::flow::{Analysis, Findings, Memory};
use crate::module::Module;
use crate::pclntab::Func;
use crate::plan::Basis;
use crate::reason::{self, Facts};
use crate::release::Release;
use crate::{Exit, Mechanism, Site, SiteId, VirtualAddress, placement, selfcheck};

/// What the search for sites works on.
pub(crate) struct Search<'a, 'data> {
    pub image: &'a Image<'data>,
    pub module: &'a Module<'data>,
    pub release: Release,
    /// What [`reason::optimizations_off`] says of the build.
    pub optimizations_off: bool,
}

/// What one thread found.
#[derive(Default)]
struct Found {
    sites: Vec<Site>,
    /// By number of the function and of the warning, since threads take turns as they can.
    warnings: BTreeMap<(u64, usize), String>,
    /// Warnings past the most that are kept.
    omitted: usize,
    /// Bytes that more sites may take.
    room: usize,
    /// Whether there was no more room.
    is_cut: bool,
}

/// What a part of pclntab has.
#[derive(Default)]
struct Functions {
    with_defers: Vec<Func>,
    callees: Callees,
    /// The entry of its first function.
    first: Option<VirtualAddress>,
    /// The end of its last.
    reached: VirtualAddress,
    /// How many are damaged.
    outside: u64,
    /// Whether it is of two parts, of which the second does not start behind the first.
    overlap: bool,
}

/// What one thread uses again for each function.
#[derive(Default)]
struct Scratch {
    code: Code,
    memory: Memory,
}

/// A site before it has its ordinal.
struct Draft {
    index: usize,
    mechanism: Mechanism,
    bit: Option<u8>,
    callee: Option<String>,
    exits: Vec<Exit>,
}

impl Found {
    /// More warnings say nothing new.
    const MOST_WARNINGS: usize = 100;

    fn warn(&mut self, func: Func, warning: String) {
        let number = self.warnings.len() + self.omitted;
        self.warnings.insert((func.index, number), warning);
        self.forget_most();
    }

    fn add(&mut self, other: Self) {
        self.sites.extend(other.sites);
        self.warnings.extend(other.warnings);
        self.omitted += other.omitted;
        self.is_cut |= other.is_cut;
        self.forget_most();
    }

    fn forget_most(&mut self) {
        while self.warnings.len() > Self::MOST_WARNINGS {
            self.warnings.pop_last();
            self.omitted += 1;
        }
    }
}

impl Functions {
    fn of(search: &Search<'_, '_>, share: Range<u64>) -> Self {
        let table = &search.module.table;
        let mut found = Self::default();
        for index in share {
            // In order, and so not more code altogether than there is.
            let in_order = |f: &Func| found.reached <= f.entry && f.entry <= f.end;
            let Some(func) = table.func(search.image, index).filter(in_order) else {
                found.outside += 1;
                continue;
            };
            found.first.get_or_insert(func.entry);
            found.reached = func.end;
            if table.deferreturn(func).is_some_and(|o| o != 0) {
                found.with_defers.push(func);
            }
            if let Some(name) = table.runtime_name(func) {
                found.callees.note(func, name);
            }
        }
        found
    }

    /// These, and those of the next part.
    fn with(mut self, next: Self) -> Self {
        let Some(first) = next.first else {
            self.outside += next.outside;
            return self;
        };
        self.overlap |= next.overlap || first < self.reached;
        self.with_defers.extend(next.with_defers);
        self.callees.extend(next.callees);
        self.first = self.first.or(Some(first));
        self.reached = next.reached;
        self.outside += next.outside;
        self
    }
}

impl Search<'_, '_> {
    /// Every site of the module, and a sentence for each function that could not be followed.
    /// Functions do not depend on one another, so the processors share them.
    pub fn run(&self) -> (Vec<Site>, Vec<String>) {
        /// Fewer are not worth a thread.
        const LEAST_A_THREAD: usize = 64;
        /// A hundred times what the largest programs need.
        const MOST_MEMORY: usize = 256 << 20;
        let (funcs, callees, mut warnings) = self.functions();
        if !funcs.is_empty() && callees.entry_of(Callee::DeferReturn).is_none() {
            warnings.push(
                "its function names are obfuscated, also those of the runtime: of its defers only \
                 the open-coded ones are found"
                    .into(),
            );
        }
        let most = usize::try_from(processors()).unwrap_or(1);
        let threads = most.min(funcs.len() / LEAST_A_THREAD).max(1);
        let taken = AtomicUsize::new(0);
        let share = || self.share(&funcs, &callees, &taken, MOST_MEMORY / threads);
        let mut found = Found::default();
        std::thread::scope(|scope| {
            // Where there is no thread to be had, fewer do it.
            let others = (1..threads).map_while(|_| Builder::new().spawn_scoped(scope, share).ok());
            let others: Vec<_> = others.collect();
            found = share();
            for other in others {
                match other.join() {
                    Ok(more) => found.add(more),
                    // A thread that panicked is a bug here; it must not become a short list.
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
        warnings.extend(found.warnings.into_values());
        if found.omitted > 0 {
            warnings.push(format!("{} more warnings like these", found.omitted));
        }
        if found.is_cut {
            let cut = "it claims to have more defers than fit into memory: the rest is missing";
            warnings.push(cut.into());
        }
        number(&mut found.sites);
        (found.sites, warnings)
    }

    /// One thread's part: it takes functions as long as there are some.
    fn share(&self, funcs: &[Func], callees: &Callees, taken: &AtomicUsize, room: usize) -> Found {
        /// Functions at a time.
        const BATCH: usize = 16;
        let mut found = Found {
            room,
            ..Found::default()
        };
        let mut scratch = Scratch::default();
        loop {
            let first = taken.fetch_add(BATCH, Relaxed);
            let Some(rest) = funcs.get(first..).filter(|rest| !rest.is_empty()) else {
                return found;
            };
            for func in rest.iter().take(BATCH) {
                self.function(*func, callees, &mut scratch, &mut found);
                if found.is_cut {
                    return found;
                }
            }
        }
    }

    /// What tells the binary from one of its release, or from the last that the table knows.
    pub fn difference(&self, sites: &[Site]) -> Option<String> {
        let (funcs, callees, _) = self.functions();
        // Not all: the compiler may have removed every defer of a function as unreachable.
        let with_sites: HashSet<_> = sites.iter().map(|s| s.function_entry).collect();
        if with_sites.len() * 10 < funcs.len() * 9 {
            return Some(format!(
                "{} functions have defers by their tables, and in only {} some were found",
                funcs.len(),
                with_sites.len()
            ));
        }
        selfcheck::difference(self.image, self.module, &callees, &funcs, self.release)
    }

    /// One pass over pclntab: the functions with defers, and those whose calls mean something.
    fn functions(&self) -> (Vec<Func>, Callees, Vec<String>) {
        /// Functions that are worth a thread.
        const LEAST_A_THREAD: u64 = 8192;
        let count = self.module.table.count;
        let threads = processors().min((count / LEAST_A_THREAD).max(1));
        let shares = (0..threads).map(|at| {
            let border = |at| u64::try_from(u128::from(count) * at / u128::from(threads));
            let (start, end) = (u128::from(at), u128::from(at) + 1);
            border(start).unwrap_or(count)..border(end).unwrap_or(count)
        });
        let look = |share: Range<u64>| Functions::of(self, share);
        let mut found = std::thread::scope(|scope| {
            let mut shares = shares.into_iter();
            let first = shares.next();
            let others: Vec<_> = shares
                .map(|share| {
                    let thread = Builder::new();
                    let theirs = share.clone();
                    // Where there is no thread to be had, this one does it.
                    let thread = thread.spawn_scoped(scope, move || look(theirs));
                    (thread, share)
                })
                .collect();
            let first = first.map(look).unwrap_or_default();
            others.into_iter().fold(first, |found, (thread, share)| {
                let other = thread.map_or_else(|_| Ok(look(share)), ScopedJoinHandle::join);
                found.with(other.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        });
        if found.overlap {
            found = Functions::of(self, 0..count);
        }
        let outside = found.outside;
        let warning = (outside > 0).then(|| {
            format!("{outside} functions of pclntab lie outside the file or overlap: it is damaged")
        });
        let mut warnings = Vec::from_iter(warning);
        if !self.module.table.tells_defers() {
            match self.callers_of_deferproc(&found.callees) {
                Some(callers) => found.with_defers = callers,
                None => {
                    let problem =
                        "its functions with defers are not known: it has no runtime.deferproc";
                    warnings.push(problem.into());
                }
            }
        }
        (found.with_defers, found.callees, warnings)
    }

    /// The functions that may call `deferproc`, where their table does not tell which do: bytes of a
    /// CALL may be those of something else. `None` without the code or `deferproc`.
    fn callers_of_deferproc(&self, callees: &Callees) -> Option<Vec<Func>> {
        let Module {
            table, text, etext, ..
        } = self.module;
        let code = etext.offset_from(*text);
        let code = code.and_then(|length| self.image.read(*text, length))?;
        let deferproc = callees.entry_of(Callee::Registers(Mechanism::Heap))?;
        let mut callers: Vec<Func> = Vec::new();
        let mut reached = *text;
        let target = VirtualAddress(deferproc);
        for call in decode::calls_of(self.image.architecture, *text, code, target) {
            // In order, and so not more code altogether than there is.
            let in_order = |f: &Func| reached <= f.entry;
            let func = Some(call).filter(|call| reached <= *call);
            let func = func.and_then(|call| table.find(self.image, call));
            if let Some(func) = func.filter(in_order) {
                reached = func.end;
                callers.push(func);
            }
        }
        Some(callers)
    }

    fn function(&self, func: Func, callees: &Callees, scratch: &mut Scratch, found: &mut Found) {
        let table = &self.module.table;
        let name = table.name(func).map(text).unwrap_or_default();
        let Scratch { code, memory } = scratch;
        if !code.read(self.image, self.module, callees, func) {
            found.warn(
                func,
                format!("the code of {name} is not in the file: its defers are missing"),
            );
            return;
        }
        let open = self.module.open_defers(self.image, func);
        let objects = self.module.stack_objects(self.image, func);
        let findings = Analysis::run(code, self.image, open.as_ref(), objects, memory);
        if !findings.settled {
            found.warn(
                func,
                format!("the code of {name} could not be followed to its end"),
            );
        }
        let namer = Namer {
            image: self.image,
            module: self.module,
        };
        let mut drafts = registering_calls(code, &findings, &namer);
        if let Some(open) = &open {
            let stored = self.open_coded(code, &findings, &namer);
            // A statement that the compiler removed as unreachable has its slot declared still; but
            // nothing sets its bit.
            let set =
                |bit: &u8| 1u8.checked_shl((*bit).into()).unwrap_or(0) & findings.bits_set != 0;
            let has_store = |bit: &u8| stored.iter().any(|site| site.bit == Some(*bit));
            let live = (0..u8::try_from(open.slots.len()).unwrap_or(u8::MAX))
                .filter(|bit| set(bit) || has_store(bit))
                .count();
            if stored.len() != live {
                found.warn(func, format!(
                    "{name} declares {} open-coded defers, of which {live} can execute, and {} were found",
                    open.slots.len(),
                    stored.len()
                ));
            }
            drafts.extend(stored);
        }
        let mechanisms: Vec<Mechanism> = drafts.iter().map(|d| d.mechanism).collect();
        let facts = Facts {
            release: self.release,
            optimizations_off: self.optimizations_off,
            calls: &code.callees,
            mechanisms: &mechanisms,
        };
        let of_stack = reason::of_stack(&facts);
        for draft in drafts {
            let placed = match draft.mechanism {
                Mechanism::OpenCoded => {
                    placement::open_coded(self.image, code, &findings, draft.index)
                }
                _ => placement::at(self.image, code, draft.index, Basis::RegisteringCall),
            };
            let (Some(instruction), Some(registration)) =
                (code.instructions.get(draft.index), placed)
            else {
                found.warn(
                    func,
                    format!("a defer of {name} has no instruction that can be probed"),
                );
                continue;
            };
            let pc = instruction.address;
            let file = table.file(func, pc).map(text).unwrap_or_default();
            let size = name.len() * 2 + file.len() + draft.callee.as_ref().map_or(0, String::len);
            found.room = found.room.saturating_sub(size + size_of::<Site>());
            if found.room == 0 {
                found.is_cut = true;
                return;
            }
            found.sites.push(Site {
                id: SiteId(String::new()),
                function: name.clone(),
                function_entry: func.entry,
                file,
                line: table.line(func, pc),
                pc,
                mechanism: draft.mechanism,
                reason: reason::of(self.release, draft.mechanism, of_stack),
                callee: draft.callee,
                bit: draft.bit,
                exits: draft.exits,
                registration,
                depth: u64::try_from(code.stack_key(draft.index, 0).saturating_add(8)).unwrap_or(0),
            });
        }
    }

    /// The open-coded sites: one a slot store.
    fn open_coded(&self, code: &Code, findings: &Findings, namer: &Namer<'_, '_>) -> Vec<Draft> {
        let mut exits: HashMap<u8, Vec<(Exit, Option<VirtualAddress>)>> = HashMap::new();
        for (store, bit) in &findings.exit_stores {
            if let Some((call, address, target)) = exit_call(code, *store)
                && let Some(behind) = code.instructions.get(call + 1)
            {
                let exit = Exit {
                    call: address,
                    indirect: target.is_none(),
                    returns_to: behind.address,
                    entered: None,
                    start: placement::call(self.image, code, findings, call),
                    end: placement::after_call(self.image, code, findings, call),
                };
                exits.entry(*bit).or_default().push((exit, target));
            }
        }
        findings
            .slot_stores
            .iter()
            .map(|(index, store)| {
                let exits = exits.get(&store.bit).map(Vec::as_slice).unwrap_or_default();
                // All exits call the same function: ask for its entry once, where it is of use.
                let stepped = |exit: &Exit| exit.start.is_none_or(|p| !p.kind.is_emulated());
                let entered = exits
                    .iter()
                    .any(|(exit, _)| stepped(exit))
                    .then(|| namer.code(store.closure, findings))
                    .flatten()
                    .and_then(|entry| placement::entered(self.image, self.module, entry));
                let direct = || exits.iter().find_map(|(_, target)| *target);
                let callee = namer
                    .name(store.closure, findings)
                    .or_else(|| direct().and_then(|target| namer.function_at(target)));
                Draft {
                    index: *index,
                    mechanism: Mechanism::OpenCoded,
                    bit: Some(store.bit),
                    callee,
                    exits: exits
                        .iter()
                        .map(|(exit, _)| Exit {
                            entered: entered.filter(|_| stepped(exit)),
                            ..*exit
                        })
                        .collect(),
                }
            })
            .collect()
    }
}

fn processors() -> u64 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u64)
}

/// The sites that call the runtime.
fn registering_calls(code: &Code, findings: &Findings, namer: &Namer<'_, '_>) -> Vec<Draft> {
    let registers = |(index, callee): (usize, &Callee)| match callee {
        Callee::Registers(mechanism) => Some((index, *mechanism)),
        _ => None,
    };
    let calls = code.callees.iter().enumerate().filter_map(registers);
    calls
        .map(|(index, mechanism)| Draft {
            index,
            mechanism,
            bit: None,
            callee: findings
                .closures
                .get(&index)
                .and_then(|c| namer.name(*c, findings)),
            exits: Vec::new(),
        })
        .collect()
}

/// The deferred call behind an exit's store of the cleared bits, the next CALL on the way: its
/// index, address and, if it is direct, what it calls.
fn exit_call(code: &Code, store: usize) -> Option<(usize, VirtualAddress, Option<VirtualAddress>)> {
    /// Between the store and the call stand the loads of the closure and of older arguments.
    const FARTHEST: usize = 256;
    let mut index = store + 1;
    for _ in 0..FARTHEST {
        let instruction = code.instructions.get(index)?;
        match instruction.flow {
            Flow::Call(target) => return Some((index, instruction.address, Some(target))),
            Flow::IndirectCall => return Some((index, instruction.address, None)),
            Flow::Jump(target) => {
                index = code
                    .instructions
                    .binary_search_by_key(&target, |i| i.address)
                    .ok()?;
            }
            Flow::Next | Flow::Branch(_) => index += 1,
            Flow::IndirectJump | Flow::Return | Flow::Stop => return None,
        }
    }
    None
}

/// Orders the sites and gives each its id.
fn number(sites: &mut [Site]) {
    // Functions of one name (instantiations of a generic) share a count, in order of line first.
    sites.sort_by(|a, b| {
        let key = |s: &Site| (s.line, s.function_entry, s.bit, s.pc);
        a.function
            .cmp(&b.function)
            .then_with(|| key(a).cmp(&key(b)))
    });
    for of_name in sites.chunk_by_mut(|a, b| a.function == b.function) {
        for (ordinal, site) in (1..).zip(of_name) {
            site.id = SiteId(numbered(&site.function, ordinal));
        }
    }
}

fn numbered(function: &str, ordinal: u32) -> String {
    let ordinal = ordinal.to_string();
    let mut id = String::with_capacity(function.len() + 1 + ordinal.len());
    id.push_str(function);
    id.push('#');
    id.push_str(&ordinal);
    id
}
