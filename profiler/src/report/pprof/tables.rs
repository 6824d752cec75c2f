//! The tables of a profile.proto: strings, functions and locations, each entry once.

use std::collections::HashMap;

use super::proto;
use crate::profile::StackFrame;
use crate::report::text::clean;

/// The id of the only mapping: the executable.
pub(super) const MAPPING: u64 = 1;

/// A line of a location before its strings have indices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    pub function: &'a str,
    pub file: &'a str,
    /// 0 if unknown.
    pub line: u32,
    /// 0 if unknown.
    pub start_line: u32,
}

/// The three tables. Ids are from 1.
#[derive(Debug)]
pub(super) struct Tables {
    pub strings: Vec<String>,
    pub functions: Vec<proto::Function>,
    pub locations: Vec<proto::Location>,
    string_index: HashMap<String, i64>,
    /// By name and file.
    function_id: HashMap<(i64, i64), u64>,
    location_id: HashMap<(u64, Vec<proto::Line>), u64>,
}

impl<'a> Frame<'a> {
    /// A frame of which only the name is known.
    pub fn named(function: &'a str) -> Self {
        Self {
            function,
            file: "",
            line: 0,
            start_line: 0,
        }
    }
}

impl<'a> From<&'a StackFrame> for Frame<'a> {
    fn from(frame: &'a StackFrame) -> Self {
        Self {
            function: &frame.function,
            file: frame.file.as_deref().unwrap_or_default(),
            line: frame.line.unwrap_or(0),
            start_line: frame.start_line.unwrap_or(0),
        }
    }
}

impl Tables {
    pub fn new() -> Self {
        Self {
            strings: vec![String::new()],
            functions: Vec::new(),
            locations: Vec::new(),
            string_index: HashMap::from([(String::new(), 0)]),
            function_id: HashMap::new(),
            location_id: HashMap::new(),
        }
    }

    /// The index of a string, cleaned of control characters.
    pub fn string(&mut self, text: &str) -> i64 {
        let text = clean(text);
        if let Some(&index) = self.string_index.get(text.as_ref()) {
            return index;
        }
        let text = text.into_owned();
        let index = self.strings.len() as i64;
        self.strings.push(text.clone());
        self.string_index.insert(text, index);
        index
    }

    /// The id of the location at an address (0 if unknown) with its lines, innermost first.
    pub fn location(&mut self, address: u64, frames: &[Frame<'_>]) -> u64 {
        let lines: Vec<_> = frames.iter().map(|frame| self.line(frame)).collect();
        let next = self.locations.len() as u64 + 1;
        *self
            .location_id
            .entry((address, lines))
            .or_insert_with_key(|(address, lines)| {
                self.locations.push(proto::Location {
                    id: next,
                    mapping_id: MAPPING,
                    address: *address,
                    line: lines.clone(),
                });
                next
            })
    }

    fn line(&mut self, frame: &Frame<'_>) -> proto::Line {
        let name = self.string(frame.function);
        let filename = self.string(frame.file);
        let next = self.functions.len() as u64 + 1;
        let function_id = *self.function_id.entry((name, filename)).or_insert(next);
        if function_id == next {
            self.functions.push(proto::Function {
                id: next,
                name,
                system_name: name,
                filename,
                start_line: 0,
            });
        }
        // Known from some frames of a function only (not from a site alone).
        let known = self.functions.get_mut(function_id as usize - 1);
        if let Some(function) = known.filter(|_| frame.start_line != 0) {
            function.start_line = frame.start_line.into();
        }
        proto::Line {
            function_id,
            line: frame.line.into(),
        }
    }
}
