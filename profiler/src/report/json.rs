//! JSON: all of a profile or a scan, for programs and for `deferprof report`.

use std::io::{self, Write};

use serde::Serialize;

use super::text::is_harmless;
use super::{Note, Report, ScanReport};
use crate::profile::{Profile, Scan};

/// Schema `deferprof.profile/1` or `deferprof.scan/1`, indented, one line feed at the end.
#[derive(Clone, Copy, Debug)]
pub struct Json;

impl Report for Json {
    fn write(&self, profile: &Profile, out: &mut dyn Write) -> io::Result<Vec<Note>> {
        document(profile, out)?;
        Ok(Vec::new())
    }
}

impl ScanReport for Json {
    fn write(&self, scan: &Scan, out: &mut dyn Write) -> io::Result<()> {
        document(scan, out)
    }
}

fn document(value: &impl Serialize, out: &mut dyn Write) -> io::Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    // serde_json escapes what JSON demands. The rest of what a terminal acts upon can only stand
    // in strings, where an escape means the same.
    let mut rest = text.as_str();
    while let Some(at) = rest.find(|c: char| c != '\n' && !is_harmless(c)) {
        let (before, from) = rest.split_at(at);
        out.write_all(before.as_bytes())?;
        let Some(c) = from.chars().next() else { break };
        for unit in c.encode_utf16(&mut [0; 2]) {
            write!(out, "\\u{unit:04x}")?;
        }
        rest = from.get(c.len_utf8()..).unwrap_or_default();
    }
    out.write_all(rest.as_bytes())?;
    out.write_all(b"\n")
}
