//! When deferred calls are made: what the program is told of the runtime, and what it has counted.
//! Kernel side: ebpf/src/run.rs.

use std::{collections::HashMap, io};

use deferprof_ebpf_common::{
    name,
    run::{
        self, MAX_BITS, MAX_RUNNERS, NO_SITE, RunEvent as Seen, RunPath, RunPoint, RunTotal,
        Runner as Loop,
    },
};
use deferprof_symbols::{Caller, Entered, Path, RecordAt, RunEvent, RunLayout, RunProbe};

use super::{
    counters::per_cpu_array,
    object::{map, take},
    sys::Map,
};
use crate::engine::{EngineError, Ran, RunCounts, RunRequest};

/// How many records of range-over-func bodies may be pending at once: 5 MB in the kernel.
pub(super) const RECORDS: u32 = 64 * 1024;

/// Tells the program what its probes stand on.
pub(super) fn fill(
    maps: &HashMap<&'static str, Map>,
    request: &RunRequest<'_>,
) -> Result<(), EngineError> {
    let points = map(maps, name::RUN_POINTS)?;
    let layouts = map(maps, name::RUN_LAYOUT)?;
    let frames = map(maps, name::OPEN_FRAMES)?;
    let fill = || -> io::Result<()> {
        let of_runtime = request.probes.map_or(&[][..], |runs| &runs.probes);
        let entries = request.entries.iter().map(entry);
        for (number, point) in (0u32..).zip(of_runtime.iter().map(point).chain(entries)) {
            points.update(&number.to_ne_bytes(), point_bytes(&point))?;
        }
        let Some(runs) = request.probes else {
            return Ok(());
        };
        layouts.update(&0u32.to_ne_bytes(), layout_bytes(&layout(runs.layout)))?;
        for frame in &runs.frames {
            let value = frame_bytes(frame.bits, frame.depth, frame.slots, frame.sites);
            frames.update(&frame.deferreturn.0.to_ne_bytes(), value)?;
        }
        Ok(())
    };
    fill().map_err(|error| EngineError::system("tell the eBPF program about the runtime", error))
}

fn entry(entered: &Entered) -> RunPoint {
    let mut runners = [Loop::default(); MAX_RUNNERS];
    runners[0].frame = entered.caller_sp;
    RunPoint {
        address: entered.point.address.0,
        event: Seen::Entered as u64,
        site: entered.return_address,
        closure: RunPoint::NO_CLOSURE,
        runners,
        ..RunPoint::default()
    }
}

fn point(probe: &RunProbe) -> RunPoint {
    let mut runners = [Loop::default(); MAX_RUNNERS];
    for (to, from) in runners.iter_mut().zip(&probe.runners) {
        let (via, returns_to) = from.returns_to.map_or((0, 0), |(via, a)| (via, a.0));
        *to = Loop {
            path: match from.path {
                Some(Path::Return) => RunPath::Return as u64,
                Some(Path::Panic) => RunPath::Panic as u64,
                Some(Path::Goexit) => RunPath::Goexit as u64,
                None => RunPath::ASK,
            },
            returns_to,
            via,
            frame: from.frame,
            panic: from.panic.unwrap_or(0),
        };
    }
    RunPoint {
        address: probe.point.address.0,
        event: match probe.event {
            RunEvent::Record(_) => Seen::Record,
            RunEvent::Frame => Seen::Frame,
            RunEvent::Returned => Seen::Returned,
            RunEvent::Taken => Seen::Taken,
            RunEvent::Panicked => Seen::Panicked,
            RunEvent::Recovered => Seen::Recovered,
        } as u64,
        in_argument: (probe.event == RunEvent::Record(RecordAt::Argument)).into(),
        site: match probe.site {
            Some(Caller::Site(offset)) => offset,
            _ => 0,
        },
        keeps: probe.keeps.into(),
        closure: probe.closure.unwrap_or(RunPoint::NO_CLOSURE),
        runners,
    }
}

/// A [`RunPoint`] as the map holds it: words in order of its fields.
fn point_bytes(point: &RunPoint) -> Vec<u8> {
    let runners = point.runners.iter();
    let runners = runners.flat_map(|r| [r.path, r.returns_to, r.via, r.frame, r.panic]);
    [
        point.address,
        point.event,
        point.in_argument,
        point.site,
        point.keeps,
        point.closure,
    ]
    .into_iter()
    .chain(runners)
    .flat_map(u64::to_ne_bytes)
    .collect()
}

fn layout(layout: RunLayout) -> run::RunLayout {
    match layout {
        RunLayout::Records {
            open,
            panic,
            varp,
            goexit,
        } => run::RunLayout {
            by_records: 1,
            open,
            record_panic: panic,
            varp,
            goexit,
            ..run::RunLayout::default()
        },
        RunLayout::Panics { retpc, bits } => run::RunLayout {
            retpc,
            bits,
            ..run::RunLayout::default()
        },
    }
}

/// A [`run::RunLayout`] as the map holds it.
fn layout_bytes(layout: &run::RunLayout) -> Vec<u8> {
    [
        layout.by_records,
        layout.open,
        layout.record_panic,
        layout.varp,
        layout.goexit,
        layout.retpc,
        layout.bits,
    ]
    .into_iter()
    .flat_map(u64::to_ne_bytes)
    .collect()
}

/// A [`run::OpenFrame`] as the map holds it.
fn frame_bytes(
    bits: u64,
    depth: u64,
    slots: [u64; MAX_BITS],
    sites: [Option<u32>; MAX_BITS],
) -> Vec<u8> {
    let words = [bits, depth].into_iter().chain(slots);
    let sites = sites.into_iter().map(|site| site.unwrap_or(NO_SITE));
    words
        .flat_map(u64::to_ne_bytes)
        .chain(sites.flat_map(u32::to_ne_bytes))
        .collect()
}

/// The maps that the program counts in.
#[derive(Debug)]
pub(super) struct RunCounters {
    ran: Map,
    totals: Map,
    sites: u32,
}

/// All [`RunTotal`]s.
pub(super) struct Totals(Vec<u64>);

impl Totals {
    pub(super) fn get(&self, which: RunTotal) -> u64 {
        self.0.get(which as usize).copied().unwrap_or(0)
    }
}

impl RunCounters {
    /// Takes over the maps.
    pub(super) fn new(
        maps: &mut HashMap<&'static str, Map>,
        sites: u32,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            ran: take(maps, name::RAN)?,
            totals: take(maps, name::RUN_TOTALS)?,
            sites,
        })
    }

    pub(super) fn totals(&self) -> io::Result<Totals> {
        per_cpu_array(&self.totals, RunTotal::COUNT).map(Totals)
    }

    /// Reads all of them.
    pub(super) fn read(&self) -> io::Result<RunCounts> {
        let ran = per_cpu_array(&self.ran, self.sites.saturating_mul(RunPath::COUNT))?;
        let (ran, _) = ran.as_chunks::<{ RunPath::COUNT as usize }>();
        let totals = self.totals()?;
        Ok(RunCounts {
            ran: ran
                .iter()
                .map(|site| Ran {
                    on_return: site[RunPath::Return as usize],
                    on_panic: site[RunPath::Panic as usize],
                    on_goexit: site[RunPath::Goexit as usize],
                })
                .collect(),
            panicked: totals.get(RunTotal::Panicked),
            recovered: totals.get(RunTotal::Recovered),
            unknown: totals.get(RunTotal::Unknown),
            unreadable: totals.get(RunTotal::Unreadable),
            records_full: totals.get(RunTotal::RecordsFull),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    fn word(bytes: &[u8], offset: usize) -> u64 {
        u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn a_point_is_laid_out_as_the_program_reads_it() {
        let mut point = RunPoint {
            address: 1,
            event: 2,
            in_argument: 3,
            site: 4,
            keeps: 5,
            closure: 8,
            ..RunPoint::default()
        };
        point.runners[1].panic = 6;
        point.runners[1].returns_to = 7;
        let bytes = point_bytes(&point);
        assert_eq!(bytes.len(), size_of::<RunPoint>());
        assert_eq!(word(&bytes, offset_of!(RunPoint, address)), 1);
        assert_eq!(word(&bytes, offset_of!(RunPoint, event)), 2);
        assert_eq!(word(&bytes, offset_of!(RunPoint, in_argument)), 3);
        assert_eq!(word(&bytes, offset_of!(RunPoint, site)), 4);
        assert_eq!(word(&bytes, offset_of!(RunPoint, keeps)), 5);
        assert_eq!(word(&bytes, offset_of!(RunPoint, closure)), 8);
        let second = offset_of!(RunPoint, runners) + size_of::<Loop>();
        assert_eq!(word(&bytes, second + offset_of!(Loop, panic)), 6);
        assert_eq!(word(&bytes, second + offset_of!(Loop, returns_to)), 7);
        assert_eq!(word(&bytes, second + offset_of!(Loop, path)), RunPath::NONE);
    }

    #[test]
    fn a_layout_is_laid_out_as_the_program_reads_it() {
        let bytes = layout_bytes(&run::RunLayout {
            by_records: 1,
            open: 2,
            record_panic: 3,
            varp: 4,
            goexit: 5,
            retpc: 6,
            bits: 7,
        });
        assert_eq!(bytes.len(), size_of::<run::RunLayout>());
        assert_eq!(word(&bytes, offset_of!(run::RunLayout, record_panic)), 3);
        assert_eq!(word(&bytes, offset_of!(run::RunLayout, goexit)), 5);
        assert_eq!(word(&bytes, offset_of!(run::RunLayout, bits)), 7);
    }

    #[test]
    fn a_frame_is_laid_out_as_the_program_reads_it() {
        let sites = [Some(4), None, None, None, None, None, None, None];
        let bytes = frame_bytes(1, 5, [2, 3, 0, 0, 0, 0, 0, 0], sites);
        assert_eq!(bytes.len(), size_of::<run::OpenFrame>());
        assert_eq!(word(&bytes, offset_of!(run::OpenFrame, bits)), 1);
        assert_eq!(word(&bytes, offset_of!(run::OpenFrame, depth)), 5);
        assert_eq!(word(&bytes, offset_of!(run::OpenFrame, slots) + 8), 3);
        let sites = word(&bytes, offset_of!(run::OpenFrame, sites));
        assert_eq!(sites, 4 | u64::from(NO_SITE) << 32);
    }
}
