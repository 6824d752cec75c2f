//! The table: what is hot, why it is not open-coded, and where it is.

use std::io::{self, Write};

use super::grid::Grid;
use super::paint::Paint;
use super::{Note, Options, Report};
use crate::profile::Profile;
use crate::rank::{SortKey, rank};

mod columns;
mod facts;

/// The narrowest terminal that lines are made for.
pub(super) const LEAST_WIDTH: usize = 60;

/// A ranked table for a terminal.
#[derive(Clone, Debug)]
pub struct Table {
    width: usize,
    paint: Paint,
    sort: SortKey,
    limit: Option<usize>,
    advice: bool,
}

impl Table {
    /// A table of a width, an order and a number of rows.
    pub fn new(options: &Options) -> Self {
        Self {
            width: options.width.max(LEAST_WIDTH),
            paint: Paint(options.color),
            sort: options.sort,
            limit: options.limit,
            advice: options.advice,
        }
    }
}

impl Report for Table {
    fn write(&self, profile: &Profile, out: &mut dyn Write) -> io::Result<Vec<Note>> {
        let totals = profile.totals();
        facts::header(profile, &totals, self.width, self.paint, out)?;
        let ranked = rank(profile, self.sort);
        let shown = ranked.len().min(self.limit.unwrap_or(usize::MAX));
        let (shown, hidden) = ranked.split_at(shown);
        if !shown.is_empty() {
            writeln!(out)?;
            let grid: Grid = columns::grid(profile, &totals, shown);
            grid.write(out, self.width, self.paint)?;
        }
        let footer = facts::Footer {
            profile,
            totals: &totals,
            sort: self.sort,
            shown,
            hidden,
            advice: self.advice,
        };
        footer.write(self.width, self.paint, out)?;
        Ok(Vec::new())
    }
}
