//! Folded stacks: `root;…;leaf;defer main.handle#1 [heap] 1234`, one line a stack, sorted.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::text::clean;
use super::weighted::Weighted;
use super::{Note, Report, Weight};
use crate::profile::Profile;

/// One line a stack, in the form that flamegraph.pl, inferno and speedscope read. The last frame
/// names the site and its mechanism; the number is a count or whole ns.
#[derive(Clone, Copy, Debug)]
pub struct Folded {
    weight: Weight,
}

impl Folded {
    /// Folded stacks weighted by counts or by cost.
    pub fn new(weight: Weight) -> Self {
        Self { weight }
    }

    /// The lines without their weights, sorted, and the weights.
    pub(super) fn lines(self, profile: &Profile) -> (BTreeMap<String, u64>, Vec<Note>) {
        let (stacks, notes) = Weighted::all(profile);
        let mut lines = BTreeMap::new();
        for stack in stacks {
            let weight = match self.weight {
                Weight::Registered => stack.registered,
                Weight::Cost => stack.cost_ns.unwrap_or(0.0).round() as u64,
            };
            let mut line = String::new();
            for function in stack.functions() {
                line.push_str(&frame(function));
                line.push(';');
            }
            line.push_str(&frame(&stack.site_frame()));
            let sum: &mut u64 = lines.entry(line).or_default();
            *sum = sum.saturating_add(weight);
        }
        lines.retain(|_, weight| *weight > 0);
        (lines, notes)
    }
}

impl Report for Folded {
    fn write(&self, profile: &Profile, out: &mut dyn Write) -> io::Result<Vec<Note>> {
        let (lines, notes) = self.lines(profile);
        for (line, weight) in lines {
            writeln!(out, "{line} {weight}")?;
        }
        Ok(notes)
    }
}

/// A name that cannot be taken for two: `;` separates frames, and shapes of generic functions
/// contain it (`go.shape.struct { A int; B int }`).
fn frame(name: &str) -> String {
    clean(name).replace(';', ":")
}
