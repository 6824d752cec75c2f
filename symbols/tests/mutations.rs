//! Damaged executables: an error or a sane answer, within bounds of memory and of work.
//!
//! Every case is a real small binary with seeded damage, in the structures that a scan reads
//! (`fuzzing::edit`) or cut off at a page. Memory is what the allocator counts, and the number of
//! allocations stands for work: neither depends on how busy the machine is.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use deferprof_fixtures::{Arch, Build, Fixture, Toolchain};
use deferprof_symbols::Binary;
use deferprof_symbols::fuzzing::{self, Random};

/// Counts what the scans of this process allocate.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn grow(size: usize) {
    COUNT.fetch_add(1, Relaxed);
    PEAK.fetch_max(NOW.fetch_add(size, Relaxed) + size, Relaxed);
}

// SAFETY: every method hands its arguments on to `System` unchanged and returns what it returns.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promises are `System`'s conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: they share the counters.
static TURN: Mutex<()> = Mutex::new(());

/// Runs `work`, and returns its peak of memory and its number of allocations.
fn measured(work: impl FnOnce()) -> (usize, usize) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    COUNT.store(0, Relaxed);
    work();
    (
        PEAK.load(Relaxed).saturating_sub(before),
        COUNT.load(Relaxed),
    )
}

fn binary(release: &str, build: &Build) -> Option<Vec<u8>> {
    let toolchain = match Toolchain::find(release) {
        Ok(toolchain) => toolchain,
        Err(reason) => {
            println!("go{release}: skipped: {reason}");
            return None;
        }
    };
    let path = Fixture::find("conditionals")
        .unwrap()
        .build(&toolchain, build)
        .unwrap();
    Some(std::fs::read(path).unwrap())
}

/// `cases` seeded corruptions of one binary; `DEFERPROF_MUTATIONS` multiplies them.
fn corrupted(release: &str, build: &Build, cases: u64) {
    let Some(original) = binary(release, build) else {
        return;
    };
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let sites = Binary::parse(&original)
        .unwrap()
        .inventory()
        .unwrap()
        .sites
        .len();
    assert!(sites > 5, "the undamaged binary has {sites} sites");
    let usual = measured(|| fuzzing::scan(&original));
    let factor = std::env::var("DEFERPROF_MUTATIONS")
        .ok()
        .and_then(|f| f.parse().ok());
    let (mut refused, mut worst) = (0, (0, 0));
    let seed = fuzzing::Seed::new(original);
    let original = seed.bytes();
    let mut bytes = Vec::new();
    for case in 0..cases * factor.unwrap_or(1) {
        let mut random = Random(case.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let edits: Vec<u8> = (0..6 * (1 + random.step() % 4))
            .map(|_| (random.step() >> 56) as u8)
            .collect();
        seed.edited(&mut bytes, &edits);
        let used = measured(|| fuzzing::scan(&bytes));
        assert!(
            used.0 <= 8 * original.len() + (64 << 20) && used.1 <= 20 * usual.1 + 100_000,
            "go{release} {build:?} case {case}: {used:?} bytes and allocations; usual {usual:?}"
        );
        refused += usize::from(Binary::parse(&bytes).is_err());
        worst = (worst.0.max(used.0), worst.1.max(used.1));
    }
    println!(
        "go{release} {}: {refused} refused; usual {usual:?}, worst {worst:?}",
        build.arch
    );
}

fn stripped(arch: Arch) -> Build {
    Build::arch(arch).ldflags("-s -w")
}

#[test]
fn corrupted_1_27_amd64() {
    corrupted("1.27", &stripped(Arch::Amd64), 1000);
}

#[test]
fn corrupted_1_21_amd64_pie() {
    corrupted("1.21", &stripped(Arch::Amd64).buildmode("pie"), 700);
}

#[test]
fn corrupted_1_15_amd64() {
    corrupted("1.15", &stripped(Arch::Amd64), 500);
}

#[test]
fn corrupted_1_25_arm64() {
    corrupted("1.25", &stripped(Arch::Arm64), 700);
}

#[test]
fn cut_off_at_every_page() {
    let Some(original) = binary("1.27", &stripped(Arch::Amd64)) else {
        return;
    };
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for end in (0..original.len()).step_by(4096) {
        let bytes = &original[..end];
        // What lies behind the last segment (section headers) may be missing: then it is read.
        if let Ok(binary) = Binary::parse(bytes) {
            let sites = binary.inventory().unwrap().sites.len();
            assert!(sites > 5, "cut off at {end}: {sites} sites and no error");
        }
    }
}

/// What the fuzzer's seeds are: they must still have sites to find, and nothing else be wrong.
#[test]
fn cut_down_binaries_keep_some_sites() {
    for (release, build) in [
        ("1.27", stripped(Arch::Amd64)),
        ("1.25", stripped(Arch::Arm64)),
        ("1.21", stripped(Arch::Amd64).buildmode("pie")),
        ("1.15", stripped(Arch::Amd64)),
    ] {
        let Some(original) = binary(release, &build) else {
            continue;
        };
        let pcs = |bytes: &[u8]| {
            let inventory = Binary::parse(bytes).unwrap().inventory().unwrap();
            assert_eq!(inventory.warnings, Vec::<String>::new(), "go{release}");
            let sites = inventory.sites.iter();
            sites
                .map(|s| (s.pc, s.function.clone(), s.mechanism))
                .collect::<Vec<_>>()
        };
        let (all, some) = (pcs(&original), pcs(&fuzzing::cut(&original, 6).unwrap()));
        assert!(some.len() >= 6 && some.len() < all.len(), "go{release}");
        for site in &some {
            assert!(all.contains(site), "go{release}: {site:?}");
        }
        println!("go{release}: {} of {} sites", some.len(), all.len());
    }
}
