//! The eBPF engine on real processes: exact counts, and nothing left behind.
//!
//! It needs root (or the capabilities that the engine's own errors name). Where the kernel does not
//! let it, each test says so and passes.

mod target;

use std::sync::{Mutex, MutexGuard, PoisonError};

use deferprof::engine::{Counts, DEFAULT_STACKS, LinkChoice, LinkKind, Request, Session, features};
use deferprof_symbols::Probe;

use target::{MODE, Place, Target};

/// Not a test: what this executable does when a test has started it again.
#[test]
fn second_process() {
    match std::env::var(MODE).as_deref() {
        Ok("target") => {
            target::say("ready");
            target::obey();
        }
        _ => {}
    }
}

/// The links that work here; the reasons for the others go to stderr. One test at a time attaches.
fn links() -> (MutexGuard<'static, ()>, Vec<LinkKind>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut kinds = Vec::new();
    for support in features::links() {
        match support.result {
            Ok(()) => kinds.push(support.kind),
            Err(error) => eprintln!("skipped for {}: {error}", support.kind.as_str()),
        }
    }
    (turn, kinds)
}

fn probe(place: Place, site: u32) -> Probe {
    Probe {
        offset: place.offset(),
        site,
    }
}

fn request<'a>(target: &'a Target, probes: &'a [Probe], sites: u32, kind: LinkKind) -> Request<'a> {
    Request {
        executable: target.executable(),
        pid: target.pid(),
        probes,
        sites,
        stacks: None,
        link: LinkChoice::Only(kind),
    }
}

#[test]
fn every_hit_of_every_thread_is_counted_for_its_site() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let probes = [
            probe(Place::LeafStep, 2),
            probe(Place::CallA, 1),
            probe(Place::Leaf, 0),
        ];
        let session = Session::attach(&request(&target, &probes, 4, kind)).unwrap();
        assert_eq!(session.link(), kind);
        target.run("threads 1 10 0");
        assert_eq!(session.read().unwrap().registered, [10, 10, 10, 0]);
        target.run("threads 4 1000 500");
        let counts = session.detach().unwrap();
        assert_eq!(counts.registered, [6010, 4010, 6010, 0], "{kind:?}");
        assert_eq!(counts.hits, 16030);
        assert_eq!(counts.stacks, []);
        assert_eq!(counts.loss, Counts::default().loss);
        // Detached: this is not counted, and does the target no harm.
        target.run("threads 1 10 10");
    }
}

#[test]
fn stacks_are_told_apart_and_add_up() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let probes = [probe(Place::Leaf, 0), probe(Place::CallA, 1)];
        let session = Session::attach(&Request {
            stacks: Some(DEFAULT_STACKS),
            ..request(&target, &probes, 2, kind)
        })
        .unwrap();
        target.run("threads 2 1000 500");
        let counts = session.detach().unwrap();
        assert_eq!(counts.registered, [3000, 2000], "{kind:?}");
        assert_sums(&counts);
        assert_eq!(counts.stacks_lost, [0, 0]);
        // The same in every process, wherever it is loaded.
        let distance = |frames: &[u64]| frames[1].wrapping_sub(frames[0]);
        let by_a = Place::AfterA.address() - Place::Leaf.address();
        let leaf = counts.stacks.iter().filter(|stack| stack.site == 0);
        for stack in leaf {
            assert_eq!(
                stack.frames.len(),
                3,
                "the leaf, who called it, and who called that"
            );
            assert!(!stack.truncated);
            let expected = if distance(&stack.frames) == by_a {
                2000
            } else {
                1000
            };
            assert_eq!(stack.registered, expected);
        }
        let mut all: Vec<_> = counts.stacks.iter().map(|stack| stack.registered).collect();
        all.sort_unstable();
        assert_eq!(all, [1000, 2000, 2000]);
    }
}

/// For every site the stacks and the lost stacks are the hits.
fn assert_sums(counts: &Counts) {
    let mut sums = counts.stacks_lost.clone();
    for stack in &counts.stacks {
        sums[stack.site as usize] += stack.registered;
    }
    assert_eq!(sums, counts.registered);
}
