//! pprof: a gzipped profile.proto for `go tool pprof`, speedscope, Grafana and others.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;

use super::weighted::{LOST, Path, Weighted};
use super::{Note, Report};
use crate::profile::{Profile, Stack, StackFrame};

mod proto;
mod tables;

use tables::{Frame, Tables};

/// A sample a stack, with `registered`/count and `cost`/nanoseconds, and the labels `site`,
/// `mechanism` and `reason` (`go tool pprof -tagfocus mechanism=heap`). Equal profiles give equal
/// bytes.
#[derive(Clone, Copy, Debug)]
pub struct Pprof;

impl Report for Pprof {
    fn write(&self, profile: &Profile, out: &mut dyn Write) -> io::Result<Vec<Note>> {
        let (stacks, mut notes) = Weighted::all(profile);
        // A file without samples is still a valid one.
        notes.retain(|note| *note != Note::Empty);
        let bytes = message(profile, &stacks).encode_to_vec();
        let mut gzip = GzEncoder::new(out, Compression::default());
        gzip.write_all(&bytes)?;
        gzip.finish()?;
        Ok(notes)
    }
}

fn message(profile: &Profile, stacks: &[Weighted<'_>]) -> proto::Profile {
    let mut tables = Tables::new();
    let mut value_type = |name, unit| proto::ValueType {
        r#type: tables.string(name),
        unit: tables.string(unit),
    };
    let registered = value_type("registered", "count");
    let cost = value_type("cost", "nanoseconds");

    let mapping = proto::Mapping {
        id: tables::MAPPING,
        filename: tables.string(&profile.target.exe),
        build_id: tables.string(profile.target.build_id.as_deref().unwrap_or_default()),
        has_functions: true,
        has_filenames: true,
        has_line_numbers: true,
        has_inline_frames: true,
    };
    let comments = [
        format!("deferprof {}", env!("CARGO_PKG_VERSION")),
        format!("go: {}", profile.target.go_version),
        "cost: an estimate, count × the cost of one defer".to_owned(),
    ];
    let warnings = profile.warnings.iter().map(|w| format!("warning: {w}"));
    let comment = comments
        .into_iter()
        .chain(warnings)
        .map(|comment| tables.string(&comment))
        .collect();

    let sample = stacks
        .iter()
        .map(|weighted| sample(profile, weighted, &mut tables))
        .collect();
    proto::Profile {
        sample_type: vec![registered, cost],
        sample,
        mapping: vec![mapping],
        location: tables.locations,
        function: tables.functions,
        string_table: tables.strings,
        time_nanos: i64::try_from(profile.window.start.as_nanosecond()).unwrap_or(0),
        duration_nanos: signed(profile.window.duration_ns),
        period_type: Some(registered),
        period: 1,
        comment,
        default_sample_type: cost.r#type,
    }
}

fn sample(profile: &Profile, weighted: &Weighted<'_>, tables: &mut Tables) -> proto::Sample {
    let info = &weighted.site.info;
    let own = Frame {
        function: &info.function,
        file: &info.file,
        line: info.line.unwrap_or(0),
        start_line: 0,
    };
    let location_id = match weighted.path {
        Path::Stack(stack) if !stack.frames.is_empty() => locations(profile, stack, tables),
        Path::Lost => vec![
            tables.location(info.pc.0, &[own]),
            tables.location(0, &[Frame::named(LOST)]),
        ],
        Path::Stack(_) | Path::Unknown => vec![tables.location(info.pc.0, &[own])],
    };
    let mut labels = vec![
        ("site", info.id.as_str()),
        ("mechanism", info.mechanism.as_str()),
    ];
    labels.extend(info.reason.as_ref().map(|r| ("reason", r.as_str())));
    proto::Sample {
        location_id,
        value: vec![
            signed(weighted.registered),
            weighted.cost_ns.unwrap_or(0.0).round() as i64,
        ],
        label: labels
            .into_iter()
            .map(|(key, text)| proto::Label {
                key: tables.string(key),
                str: tables.string(text),
            })
            .collect(),
    }
}

/// The locations of a stack, leaf first: one an address, inlined calls as lines of it.
fn locations(profile: &Profile, stack: &Stack, tables: &mut Tables) -> Vec<u64> {
    let Some(indices) = &stack.locations else {
        let names = stack.frames.iter();
        return names
            .map(|name| tables.location(0, &[Frame::named(name)]))
            .collect();
    };
    let table = profile.frames.as_deref().unwrap_or_default();
    let frames: Vec<&StackFrame> = indices
        .iter()
        .filter_map(|&index| table.get(index as usize))
        .collect();
    frames
        .chunk_by(|inner, outer| inner.inlined && inner.address == outer.address)
        .map(|group| {
            let address = group.last().and_then(|frame| frame.address);
            let lines: Vec<_> = group.iter().map(|&frame| Frame::from(frame)).collect();
            tables.location(address.unwrap_or_default().0, &lines)
        })
        .collect()
}

/// pprof's numbers are signed; what is larger stays at the end of the scale.
fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
