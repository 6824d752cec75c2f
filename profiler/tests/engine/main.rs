//! The eBPF engine on real processes: exact counts, and nothing left behind.
//!
//! It needs root (or the capabilities that the engine's own errors name). Where the kernel does not
//! let it, each test says so and passes.

mod leftovers;
mod target;

use std::{
    num::NonZeroU32,
    os::fd::AsFd as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use deferprof::engine::{
    Counts, DEFAULT_STACKS, EngineError, LinkChoice, LinkKind, Loss, More, Request, Session,
    calibrate, features,
};
use deferprof_symbols::{FileOffset, Probe};
use nix::unistd::Pid;

use target::{MODE, Place, SLED, Target};

/// Not a test: what this executable does when a test has started it again.
#[test]
fn second_process() {
    match std::env::var(MODE).as_deref() {
        Ok("target") => {
            target::say("ready");
            target::obey();
        }
        Ok(mode) => leftovers::attach_until_killed(mode),
        Err(_) => {}
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
        sites_cost: &[],
        more: More::default(),
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
        assert_eq!(counts.loss, Loss::default());
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

#[test]
fn stacks_beyond_the_room_for_them_are_counted_as_lost() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let probes = [probe(Place::Leaf, 0)];
        let session = Session::attach(&Request {
            stacks: NonZeroU32::new(4),
            ..request(&target, &probes, 1, kind)
        })
        .unwrap();
        for frames in 1..=20 {
            target.run(&format!("deep {frames}"));
        }
        let counts = session.detach().unwrap();
        assert_eq!(counts.registered, [20]);
        assert_sums(&counts);
        assert_eq!(counts.stacks.len(), 4);
        assert_eq!(counts.stacks_lost, [16]);
        assert_eq!(counts.loss.stacks_full, 16);
        assert_eq!(counts.loss.stacks(), 16);
        assert_eq!(counts.loss.hits(), 0);
    }
}

#[test]
fn a_stack_deeper_than_the_limit_is_marked() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let probes = [probe(Place::Leaf, 0)];
        let session = Session::attach(&Request {
            stacks: Some(DEFAULT_STACKS),
            ..request(&target, &probes, 1, kind)
        })
        .unwrap();
        target.run("deep 50");
        target.run("deep 500");
        let counts = session.detach().unwrap();
        assert_sums(&counts);
        let truncated: Vec<_> = counts
            .stacks
            .iter()
            .filter(|stack| stack.truncated)
            .collect();
        assert_eq!(counts.stacks.len(), 2);
        assert_eq!(truncated.len(), 1);
        assert_eq!(truncated[0].frames.len(), 127);
    }
}

#[test]
fn ten_thousand_probes_are_attached_and_exact() {
    let (_turn, kinds) = links();
    // Perf events are detached one after the other, 100 ms each on Linux 6.18.
    let number = |kind| {
        if kind == LinkKind::UprobeMulti {
            SLED
        } else {
            10
        }
    };
    for kind in kinds {
        let mut target = Target::start("target");
        let start = Place::Sled(0).offset().0;
        let probes: Vec<_> = (0..number(kind) as u32)
            .map(|site| Probe {
                offset: FileOffset(start + u64::from(site) * Place::INSTRUCTION),
                site,
            })
            .collect();
        let sites = probes.len() as u32;
        let session = Session::attach(&request(&target, &probes, sites, kind)).unwrap();
        target.run("sled 3");
        let counts = session.detach().unwrap();
        assert!(counts.registered.iter().all(|&registered| registered == 3));
        assert_eq!(counts.hits, 3 * probes.len() as u64);
    }
}

#[test]
fn several_probes_can_count_for_one_site_and_one_instruction_for_several() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let probes = [
            probe(Place::Leaf, 0),
            probe(Place::CallA, 0),
            probe(Place::Leaf, 1),
        ];
        let session = Session::attach(&request(&target, &probes, 2, kind)).unwrap();
        target.run("threads 1 100 10");
        assert_eq!(session.detach().unwrap().registered, [210, 110]);
    }
}

#[test]
fn another_process_of_the_same_executable_is_not_counted() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let mut other = Target::start("target");
        let probes = [probe(Place::Leaf, 0)];
        let session = Session::attach(&request(&target, &probes, 1, kind)).unwrap();
        other.send("threads 2 3000 0");
        target.run("threads 2 1000 0");
        other.expect("done");
        let counts = session.detach().unwrap();
        assert_eq!(counts.registered, [2000], "{kind:?}");
    }
}

#[test]
fn a_child_that_has_not_executed_the_file_yet_is_counted_once_it_does() {
    let (_turn, kinds) = links();
    for kind in kinds {
        if kind == LinkKind::TraceEvent {
            // It knows a probe by its address, and this executable gets another when it is executed;
            // `ran::run_trace_1_27` runs one that does not.
            println!("skipped for {}: position-independent", kind.as_str());
            continue;
        }
        let mut target = target::Waiting::fork();
        let executable = std::fs::File::open("/proc/self/exe").unwrap();
        let probes = [probe(Place::Leaf, 0), probe(Place::LeafStep, 1)];
        let session = Session::attach(&Request {
            executable: executable.as_fd(),
            pid: target.pid(),
            probes: &probes,
            sites: 2,
            stacks: None,
            link: LinkChoice::Only(kind),
            sites_cost: &[],
            more: More::default(),
        })
        .unwrap();
        target.release();
        target.finish("threads 3 100 0");
        assert_eq!(session.detach().unwrap().registered, [300, 300], "{kind:?}");
    }
}

#[test]
fn the_best_link_is_chosen() {
    let (_turn, kinds) = links();
    let Some(best) = kinds.first() else { return };
    let target = Target::start("target");
    let probes = [probe(Place::Leaf, 0)];
    let session = Session::attach(&Request {
        link: LinkChoice::Auto,
        ..request(&target, &probes, 1, *best)
    })
    .unwrap();
    assert_eq!(session.link(), *best);
}

#[test]
fn a_refused_instruction_is_named() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let target = Target::start("target");
        let start = Place::Sled(0).offset().0;
        let mut probes: Vec<_> = (0..7)
            .map(|index| Probe {
                offset: FileOffset(start + index * Place::INSTRUCTION),
                site: 0,
            })
            .collect();
        probes.insert(5, probe(Place::Refused, 0));
        let error = Session::attach(&request(&target, &probes, 1, kind)).unwrap_err();
        let refused = Place::Refused.offset();
        assert!(
            matches!(&error, EngineError::InvalidProbe { offset, .. } if *offset == refused),
            "{kind:?}: {error}"
        );
    }
}

#[test]
fn a_process_that_is_not_there_is_named() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        target.child.kill().unwrap();
        target.child.wait().unwrap();
        let probes = [probe(Place::Leaf, 0)];
        let error = Session::attach(&request(&target, &probes, 1, kind)).unwrap_err();
        assert!(
            matches!(error, EngineError::NoTarget { .. }),
            "{kind:?}: {error}"
        );
    }
}

#[test]
fn a_probe_for_no_site_is_refused() {
    let target = Target::start("target");
    let probes = [probe(Place::Leaf, 3)];
    let error = Session::attach(&request(&target, &probes, 3, LinkKind::UprobeMulti)).unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::UnknownSite {
                site: 3,
                sites: 3,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn the_target_may_end_before_we_detach() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let probes = [probe(Place::Leaf, 0)];
        let session = Session::attach(&request(&target, &probes, 1, kind)).unwrap();
        target.run("threads 1 77 0");
        target.child.kill().unwrap();
        target.child.wait().unwrap();
        assert_eq!(session.detach().unwrap().registered, [77]);
    }
}

#[test]
fn calibration_counts_and_measures() {
    let (_turn, kinds) = links();
    for kind in kinds {
        for stacks in [None, Some(DEFAULT_STACKS)] {
            let calibration = calibrate(LinkChoice::Only(kind), stacks).unwrap();
            assert_eq!(calibration.link, kind);
            assert!(calibration.emulated_ns > 0.0 && calibration.single_stepped_ns > 0.0);
        }
    }
}

#[test]
fn detaching_leaves_no_link() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let target = Target::start("target");
        let probes = [probe(Place::Leaf, 0), probe(Place::CallA, 0)];
        let session = Session::attach(&request(&target, &probes, 1, kind)).unwrap();
        let ids = leftovers::links_of(Pid::this());
        let (links, events) = match kind {
            LinkKind::UprobeMulti => (1, 0),
            LinkKind::TraceEvent => (0, 1),
            _ => (2, 0),
        };
        assert_eq!(ids.len(), links, "{kind:?}");
        assert_eq!(leftovers::events_of(Pid::this()), events, "{kind:?}");
        assert!(ids.iter().all(|id| leftovers::link_exists(*id)));
        session.detach().unwrap();
        assert_eq!(leftovers::events_of(Pid::this()), 0, "{kind:?}");
        assert!(
            !ids.iter().any(|id| leftovers::link_exists(*id)),
            "{kind:?}"
        );
    }
}

#[test]
fn a_killed_deferprof_leaves_no_link() {
    let (_turn, kinds) = links();
    for kind in kinds {
        let mut target = Target::start("target");
        let mut attacher = Target::start(&format!("{} {}", kind.as_str(), target.pid()));
        let ids = leftovers::links_of(attacher.pid());
        // The definition of a trace event stays, without its breakpoints: tests/leftovers.rs.
        assert_eq!(ids.is_empty(), kind == LinkKind::TraceEvent, "{kind:?}");
        assert!(ids.iter().all(|id| leftovers::link_exists(*id)));
        attacher.child.kill().unwrap();
        attacher.child.wait().unwrap();
        assert!(
            !ids.iter().any(|id| leftovers::link_exists(*id)),
            "{kind:?}"
        );
        target.run("threads 2 100 100");
    }
}
