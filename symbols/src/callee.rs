//! The name of a deferred function, as far as the code shows it.

use crate::VirtualAddress;
use crate::decode::{self, Flow};
use crate::elf::Image;
use crate::flow::{Closure, Findings};
use crate::module::Module;
use crate::pclntab::Func;

/// Names deferred functions of one binary.
pub(crate) struct Namer<'a, 'data> {
    pub image: &'a Image<'data>,
    pub module: &'a Module<'data>,
}

impl Namer<'_, '_> {
    /// The function that a closure calls in the end: its own literal, or what the compiler's
    /// wrapper around a call with arguments calls.
    pub fn name(&self, closure: Closure, findings: &Findings) -> Option<String> {
        self.function_at(self.code(closure, findings)?)
    }

    /// The code of a closure.
    pub fn code(&self, closure: Closure, findings: &Findings) -> Option<VirtualAddress> {
        let code = match closure {
            Closure::Static(address) => self.image.word(address)?,
            Closure::Code(code) => code.0,
            Closure::Object(allocation) => *findings.object_code.get(&allocation)?,
            Closure::Unknown => return None,
        };
        Some(VirtualAddress(code))
    }

    /// The name of the function that starts at `code`, seen through a compiler-made wrapper.
    pub fn function_at(&self, code: VirtualAddress) -> Option<String> {
        let func = self
            .module
            .table
            .find(self.image, code)
            .filter(|f| f.entry == code)?;
        let name = text(self.module.table.name(func)?);
        if self.module.table.is_wrapper(func) && is_defer_wrapper(&name) {
            return self.wrapped(func).or(Some(name));
        }
        Some(name)
    }

    /// What a wrapper calls: the first call that the compiler inlined into it, or the first CALL.
    fn wrapped(&self, func: Func) -> Option<String> {
        /// A wrapper loads what it captured and calls.
        const LONGEST: u64 = 4096;
        let table = &self.module.table;
        let len = func.end.offset_from(func.entry)?.min(LONGEST);
        let bytes = self.image.read(func.entry, len)?;
        let inlined = table.first_inlined(func);
        for instruction in decode::from_entry(self.image.architecture, func.entry, bytes) {
            if inlined.is_some_and(|start| start <= instruction.address) {
                break;
            }
            match instruction.flow {
                Flow::Call(target) => {
                    let callee = table
                        .find(self.image, target)
                        .filter(|f| f.entry == target)?;
                    let name = text(table.name(callee)?);
                    if !name.starts_with("runtime.morestack") {
                        return Some(name);
                    }
                }
                // Through an interface or a function value: only the running program knows.
                Flow::IndirectCall => return Some("dynamic".to_owned()),
                _ => {}
            }
        }
        let tree = self.module.inline_tree(self.image, func);
        let (name, _) = table.inlined(func, inlined?, tree).pop()?;
        Some(text(name))
    }
}

/// 1.17 `f·dwrap·1`, 1.18–1.21 `f.func1` with the wrapper's func id, since 1.22 `f.deferwrap1`.
fn is_defer_wrapper(name: &str) -> bool {
    name.contains("dwrap")
        || name.contains(".deferwrap")
        || name
            .rsplit('.')
            .next()
            .is_some_and(|last| last.starts_with("func"))
}

/// A name from the file as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
