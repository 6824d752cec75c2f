//! A whole executable, mutated where it matters: the input is a list of edits of a small real Go
//! binary, each a place in one of its structures and the bytes to put there.
#![no_main]
use std::cell::RefCell;
use std::sync::OnceLock;

use deferprof_symbols::fuzzing::{Seed, cut, scan};
use libfuzzer_sys::fuzz_target;

/// The binaries in `$DEFERPROF_FUZZ_BINARIES` (paths with colons between them), each cut down to a
/// few functions where it can be; see docs/fuzzing.md.
fn seeds() -> &'static [Seed] {
    /// Of this many functions with defers a scan takes a millisecond or two, instrumented.
    const FUNCTIONS: usize = 6;
    static SEEDS: OnceLock<Vec<Seed>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let paths = std::env::var("DEFERPROF_FUZZ_BINARIES").unwrap_or_default();
        let read = |path| {
            let bytes = std::fs::read(path).expect("a binary to be mutated");
            Seed::new(cut(&bytes, FUNCTIONS).unwrap_or(bytes))
        };
        paths.split(':').filter(|p| !p.is_empty()).map(read).collect()
    })
}

thread_local! {
    static COPY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fuzz_target!(|data: &[u8]| {
    let Some((pick, edits)) = data.split_first() else { return };
    let seeds = seeds();
    let Some(seed) = seeds.get(usize::from(*pick) % seeds.len().max(1)) else {
        return scan(data);
    };
    COPY.with_borrow_mut(|copy| {
        seed.edited(copy, edits);
        scan(copy);
    });
});
