//! Rows of sites in columns, for any width of terminal.
//!
//! Data columns are never cut. What gives way is, in this order: optional columns, the function's
//! package path and the file's directories, and at last the single line: then a site takes a line
//! of numbers and one below it that says where it is.

use std::io::{self, Write};

use super::paint::{Paint, Tint};
use super::text::{file_name, join, short_function, short_path, width};

/// Between two columns.
const GAP: usize = 2;
/// A site on one line with its numbers gets at least this many columns.
const LEAST_PLACE: usize = 26;
/// An optional column is shown only if the place still gets this many.
const EASY_PLACE: usize = 64;
/// A callee is shown only if it gets this many.
const LEAST_CALLEE: usize = 16;

/// A data column.
#[derive(Debug)]
pub(super) struct Column {
    pub title: &'static str,
    pub align: Align,
    pub need: Need,
    /// One a row.
    pub cells: Vec<Cell>,
    /// Under the last row.
    pub total: String,
}

/// Text of a data column.
#[derive(Clone, Debug, Default)]
pub(super) struct Cell {
    pub text: String,
    pub tint: Tint,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// When a column is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Always,
    /// Always, but it is the first to leave a line of numbers that gets too long.
    Detail,
    /// In a wide terminal; lower ones first.
    IfRoom(u8),
}

/// Where a row's site is. Already cleaned.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub function: String,
    /// With the line, `/src/main.go:12`.
    pub path: String,
    pub callee: String,
}

/// Rows of sites. Every column has as many cells as there are places.
#[derive(Debug)]
pub(super) struct Grid {
    pub columns: Vec<Column>,
    pub places: Vec<Place>,
    /// What stands in the place of the total row; empty for no total row.
    pub total: String,
}

/// A column that is shown, with its width, which is costly to ask for.
#[derive(Clone, Copy, Debug)]
struct Shown<'a> {
    index: usize,
    column: &'a Column,
    width: usize,
}

/// Widths of the three parts of a place.
#[derive(Clone, Copy, Debug, Default)]
struct Widths {
    function: usize,
    path: usize,
    callee: usize,
}

impl Column {
    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| width(&cell.text));
        let frame = width(self.title).max(width(&self.total));
        cells.max().unwrap_or(0).max(frame)
    }
}

impl Grid {
    /// Writes the rows in lines of at most `columns` columns.
    pub fn write(&self, out: &mut dyn Write, columns: usize, paint: Paint) -> io::Result<()> {
        let need = self.needed();
        let whole = need.function + GAP + need.path;
        let always: Vec<_> = self
            .columns()
            .filter(|shown| matches!(shown.column.need, Need::Always | Need::Detail))
            .collect();
        let fixed = total_width(&always);
        if columns < fixed + whole.min(LEAST_PLACE) {
            return self.write_cards(out, columns, paint, &always);
        }
        let mut shown = always;
        let mut optional: Vec<_> = self
            .columns()
            .filter_map(|candidate| match candidate.column.need {
                Need::IfRoom(priority) => Some((priority, candidate)),
                Need::Always | Need::Detail => None,
            })
            .collect();
        optional.sort_by_key(|&(priority, _)| priority);
        for (_, candidate) in optional {
            let place = columns.checked_sub(total_width(&shown) + candidate.width + GAP);
            if place.is_some_and(|place| place >= whole.min(EASY_PLACE)) {
                shown.push(candidate);
            }
        }
        shown.sort_by_key(|column| column.index);
        let widths = self.divide(columns - total_width(&shown), need);
        self.write_lines(out, paint, &shown, widths)
    }

    fn columns(&self) -> impl Iterator<Item = Shown<'_>> {
        self.columns
            .iter()
            .enumerate()
            .map(|(index, column)| Shown {
                index,
                column,
                width: column.width(),
            })
    }

    fn needed(&self) -> Widths {
        let longest = |text: fn(&Place) -> &str, title| {
            let texts = self.places.iter().map(|place| width(text(place)));
            texts.max().unwrap_or(0).max(width(title))
        };
        Widths {
            function: longest(|place| &place.function, FUNCTION).max(width(&self.total)),
            path: longest(|place| &place.path, WHERE),
            callee: longest(|place| &place.callee, ""),
        }
    }

    /// Shares `room` columns among function, path and callee.
    fn divide(&self, room: usize, need: Widths) -> Widths {
        let spare = room.saturating_sub(need.function + GAP + need.path + GAP);
        if need.callee > 0 && spare >= need.callee.min(LEAST_CALLEE).max(width(CALLEE)) {
            return Widths {
                callee: need.callee.max(width(CALLEE)).min(spare),
                ..need
            };
        }
        let names = self
            .places
            .iter()
            .map(|place| width(file_name(&place.path)));
        let name = names.max().unwrap_or(0).max(width(WHERE));
        let at_least = name.min(room * 2 / 5);
        let function = need.function.min(room.saturating_sub(GAP + at_least));
        Widths {
            function,
            path: need.path.min(room.saturating_sub(GAP + function)),
            callee: 0,
        }
    }

    fn write_lines(
        &self,
        out: &mut dyn Write,
        paint: Paint,
        shown: &[Shown<'_>],
        widths: Widths,
    ) -> io::Result<()> {
        let mut line = Line::default();
        for shown in shown {
            line.cell(shown.column.title, Tint::Dim, shown, paint);
        }
        line.text(FUNCTION, Tint::Dim, widths.function, paint);
        line.text(WHERE, Tint::Dim, widths.path, paint);
        if widths.callee > 0 {
            line.text(CALLEE, Tint::Dim, widths.callee, paint);
        }
        line.end(out)?;
        for (row, place) in self.places.iter().enumerate() {
            for shown in shown {
                line.cell_of(row, shown, paint);
            }
            let function = short_function(&place.function, widths.function);
            line.text(&function, Tint::Bold, widths.function, paint);
            let path = short_path(&place.path, widths.path);
            line.text(&path, Tint::Plain, widths.path, paint);
            if widths.callee > 0 {
                let callee = short_function(&place.callee, widths.callee);
                line.text(&callee, Tint::Dim, widths.callee, paint);
            }
            line.end(out)?;
        }
        if !self.total.is_empty() {
            for shown in shown {
                line.cell(&shown.column.total, Tint::Bold, shown, paint);
            }
            line.text(&self.total, Tint::Bold, widths.function, paint);
            line.end(out)?;
        }
        Ok(())
    }

    /// Two or more lines a site: numbers as far as they fit, the rest of them with their titles,
    /// then the place.
    fn write_cards(
        &self,
        out: &mut dyn Write,
        columns: usize,
        paint: Paint,
        always: &[Shown<'_>],
    ) -> io::Result<()> {
        let mut first = always.to_vec();
        let mut rest = Vec::new();
        while first.len() > 1 && total_width(&first) > columns + GAP {
            let detail = first
                .iter()
                .rposition(|shown| shown.column.need == Need::Detail);
            rest.insert(0, first.remove(detail.unwrap_or(first.len() - 1)));
        }
        let indent = first.first().map_or(0, |shown| shown.width + GAP);
        let room = columns.saturating_sub(indent);

        let mut line = Line::default();
        for shown in &first {
            line.cell(shown.column.title, Tint::Dim, shown, paint);
        }
        line.end(out)?;
        for (row, place) in self.places.iter().enumerate() {
            for shown in &first {
                line.cell_of(row, shown, paint);
            }
            line.end(out)?;
            let details = rest.iter().filter_map(|Shown { column, .. }| {
                let cell = column.cells.get(row)?;
                // What was not measured, or never happened, is not worth its title.
                let telling = !["", "-", "0"].contains(&cell.text.as_str());
                telling.then_some(())?;
                Some(format!("{} {}", column.title.to_lowercase(), cell.text))
            });
            for detail in join(details, " · ", room) {
                writeln!(out, "{:indent$}{detail}", "")?;
            }
            let file = width(file_name(&place.path)).min(room * 2 / 5);
            let function = room.saturating_sub(GAP + file);
            let function = short_function(&place.function, function);
            let path = room.saturating_sub(GAP + width(&function));
            line.text("", Tint::Plain, indent.saturating_sub(GAP), paint);
            line.text(&function, Tint::Bold, width(&function), paint);
            line.text(&short_path(&place.path, path), Tint::Plain, 0, paint);
            line.end(out)?;
        }
        if !self.total.is_empty() {
            for shown in &first {
                line.cell(&shown.column.total, Tint::Bold, shown, paint);
            }
            line.end(out)?;
        }
        Ok(())
    }
}

const FUNCTION: &str = "FUNCTION";
const WHERE: &str = "WHERE";
const CALLEE: &str = "DEFERRED";

/// Columns and a gap after each.
fn total_width(columns: &[Shown<'_>]) -> usize {
    columns.iter().map(|shown| shown.width + GAP).sum()
}

/// A line under construction; blanks at its end are never written.
#[derive(Debug, Default)]
struct Line {
    text: String,
    /// Blanks due before the next text.
    blanks: usize,
}

impl Line {
    fn cell_of(&mut self, row: usize, shown: &Shown<'_>, paint: Paint) {
        let cell = shown.column.cells.get(row);
        let (text, tint) = cell.map_or(("", Tint::Plain), |cell| (&cell.text, cell.tint));
        self.cell(text, tint, shown, paint);
    }

    fn cell(&mut self, text: &str, tint: Tint, shown: &Shown<'_>, paint: Paint) {
        let blanks = shown.width.saturating_sub(width(text));
        match shown.column.align {
            Align::Left => self.push(text, tint, blanks, paint),
            Align::Right => {
                self.blanks += blanks;
                self.push(text, tint, 0, paint);
            }
        }
    }

    fn text(&mut self, text: &str, tint: Tint, columns: usize, paint: Paint) {
        let blanks = columns.saturating_sub(width(text));
        self.push(text, tint, blanks, paint);
    }

    fn push(&mut self, text: &str, tint: Tint, blanks: usize, paint: Paint) {
        if !text.is_empty() {
            self.text.extend(std::iter::repeat_n(' ', self.blanks));
            self.blanks = 0;
            paint.paint(tint, text).push_to(&mut self.text);
        }
        self.blanks += blanks + GAP;
    }

    fn end(&mut self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.text)?;
        self.text.clear();
        self.blanks = 0;
        Ok(())
    }
}
