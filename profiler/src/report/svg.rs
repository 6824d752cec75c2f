//! A flame graph for a browser, drawn by inferno.

use std::io::{self, Write};

use inferno::flamegraph;

use super::text::{clean, count, plural, time};
use super::{Folded, Note, Report, Weight};
use crate::profile::Profile;

/// An interactive flame graph; the uppermost frames are the sites. Equal profiles give equal bytes.
#[derive(Clone, Copy, Debug)]
pub struct Svg {
    weight: Weight,
}

impl Svg {
    /// A flame graph whose widths are counts or cost.
    pub fn new(weight: Weight) -> Self {
        Self { weight }
    }
}

impl Report for Svg {
    fn write(&self, profile: &Profile, out: &mut dyn Write) -> io::Result<Vec<Note>> {
        let (stacks, notes) = Folded::new(self.weight).lines(profile);
        if stacks.is_empty() {
            out.write_all(NOTHING.as_bytes())?;
            return Ok(vec![Note::Empty]);
        }
        // inferno adds in 64 bits; what is larger is drawn to scale.
        let total: u128 = stacks.values().map(|&weight| u128::from(weight)).sum();
        let surplus = (128 - total.leading_zeros()).saturating_sub(63);
        let lines: Vec<String> = stacks
            .into_iter()
            .map(|(stack, weight)| format!("{stack} {}", weight >> surplus))
            .collect();

        let mut options = flamegraph::Options::default();
        options.title = match self.weight {
            Weight::Registered => "Defers by call stack".to_owned(),
            Weight::Cost => "Estimated cost of defers by call stack".to_owned(),
        };
        options.subtitle = Some(subtitle(profile));
        options.count_name = self.weight.unit().to_owned();
        options.name_type = "Frame:".to_owned();
        options.deterministic = true;
        options.hash = true;
        let lines = lines.iter().map(String::as_str);
        // Through memory, so that an error of `out` keeps its kind.
        let mut svg = Vec::new();
        flamegraph::from_lines(&mut options, lines, &mut svg)?;
        out.write_all(&svg)?;
        Ok(notes)
    }
}

fn subtitle(profile: &Profile) -> String {
    let target = &profile.target;
    let totals = profile.totals();
    format!(
        "{} · pid {} · {} · {} from {} · {} at {}",
        clean(&target.exe),
        target.pid,
        clean(&target.go_version),
        time(profile.window.duration_ns as f64),
        profile.window.start.strftime("%Y-%m-%d %H:%M:%S UTC"),
        match totals.registered {
            1 => "1 defer".to_owned(),
            n => format!("{} defers", count(n)),
        },
        plural(totals.ran as u64, "site", "sites"),
    )
}

const NOTHING: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" width="640" height="60" font-family="sans-serif">
<text x="20" y="36">No defer statement ran, so there is nothing to draw.</text>
</svg>
"#;
