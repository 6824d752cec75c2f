//! What the engine costs: `cargo bench -p deferprof --bench engine` (as root). Prints a table for
//! each kind of link: attaching and detaching by number of probes, and nanoseconds a hit.

#[path = "../tests/engine/target.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod target;

use std::time::Instant;

use deferprof::engine::{
    DEFAULT_STACKS, LinkChoice, LinkKind, More, Request, Session, calibrate, features,
};
use deferprof_symbols::{FileOffset, Probe};

use target::{MODE, Place, SLED, Target};

fn main() {
    if std::env::var_os(MODE).is_some() {
        target::say("ready");
        target::obey();
        return;
    }
    for support in features::links() {
        match support.result {
            Ok(()) => measure(support.kind),
            Err(error) => println!("{}: {error}", support.kind.as_str()),
        }
    }
}

fn measure(kind: LinkKind) {
    println!("{}:", kind.as_str());
    let link = LinkChoice::Only(kind);
    for (what, stacks) in [("counted", None), ("with its stack", Some(DEFAULT_STACKS))] {
        let start = Instant::now();
        match calibrate(link, stacks) {
            Ok(ns) => println!(
                "  a hit {what}: {:.0} ns emulated, {:.0} ns single-stepped (measured in {:.1?})",
                ns.emulated_ns,
                ns.single_stepped_ns,
                start.elapsed()
            ),
            Err(error) => println!("  a hit {what}: {error}"),
        }
    }
    let target = Target::start("target");
    let sled = Place::Sled(0).offset().0;
    // Perf events are detached one after the other, at 100 ms each on Linux 6.18.
    let numbers: &[usize] = match kind {
        LinkKind::UprobeMulti => &[100, 1_000, SLED],
        _ => &[10, 40],
    };
    for &number in numbers {
        let probes: Vec<_> = (0..number)
            .map(|index| Probe {
                offset: FileOffset(sled + index as u64 * Place::INSTRUCTION),
                site: index as u32,
            })
            .collect();
        let start = Instant::now();
        let session = Session::attach(&Request {
            executable: target.executable(),
            pid: target.pid(),
            probes: &probes,
            sites: number as u32,
            stacks: None,
            link,
            sites_cost: &[],
            more: More::default(),
        });
        let session = match session {
            Ok(session) => session,
            Err(error) => {
                println!("  {number} probes: {error}");
                continue;
            }
        };
        let attached = start.elapsed();
        let start = Instant::now();
        let read = session.read().map(|_| start.elapsed());
        let start = Instant::now();
        let detached = session.detach().map(|_| start.elapsed());
        println!(
            "  {number} probes: attached in {attached:.1?}, read in {read:.1?}, detached and read in {detached:.1?}"
        );
    }
}
