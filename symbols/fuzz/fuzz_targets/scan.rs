//! A whole executable, mutated where it matters: the input is a list of edits of a small real Go
//! binary, each a place in one of its structures and the bytes to put there.
#![no_main]
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

/// The binaries in `$DEFERPROF_FUZZ_BINARIES` (paths with colons between them); see docs/fuzzing.md.
fn seeds() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let paths = std::env::var("DEFERPROF_FUZZ_BINARIES").unwrap_or_default();
        let read = |path| std::fs::read(path).unwrap_or_default();
        paths.split(':').filter(|p| !p.is_empty()).map(read).collect()
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((pick, edits)) = data.split_first() else { return };
    let seeds = seeds();
    if seeds.is_empty() {
        return deferprof_symbols::fuzzing::scan(data);
    }
    let mut bytes = seeds[usize::from(*pick) % seeds.len()].clone();
    deferprof_symbols::fuzzing::edit(&mut bytes, edits);
    deferprof_symbols::fuzzing::scan(&bytes);
});
