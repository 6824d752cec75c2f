//! Output formats, one file each, behind one trait.
//!
//! A report knows only a [`Profile`] (or, for `scan`, a [`Scan`]) and how it is to be shown.
//! Names and paths come out of an untrusted binary: no format lets a control character through.
//!
//! ```no_run
//! # use deferprof::{profile::Profile, report::{Format, Options}};
//! # fn f(profile: &Profile) -> std::io::Result<()> {
//! let mut out = std::io::stdout().lock();
//! for note in Format::Table.report(&Options::default()).write(profile, &mut out)? {
//!     eprintln!("{note}");
//! }
//! # Ok(()) }
//! ```

use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use clap::ValueEnum;

use crate::profile::{Profile, Scan};
use crate::rank::SortKey;

mod advice;
mod folded;
mod grid;
mod json;
mod paint;
mod pprof;
mod scan;
mod svg;
mod table;
mod text;
mod weighted;

pub use folded::Folded;
pub use json::Json;
pub use pprof::Pprof;
pub use scan::{ScanExplained, ScanTable};
pub use svg::Svg;
pub use table::Table;

/// One way of showing a profile.
pub trait Report {
    /// Writes all of `profile` to `out` and says what the reader should be told about it.
    ///
    /// # Errors
    /// Only those of `out`. A broken pipe is the caller's to forgive.
    fn write(&self, profile: &Profile, out: &mut dyn Write) -> io::Result<Vec<Note>>;
}

/// One way of showing a scan.
pub trait ScanReport {
    /// Writes all of `scan` to `out`.
    ///
    /// # Errors
    /// Only those of `out`. A broken pipe is the caller's to forgive.
    fn write(&self, scan: &Scan, out: &mut dyn Write) -> io::Result<()>;
}

/// What a report could not show in full. Displays as a sentence for standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The profile has no call stacks, and the format is about them.
    NoStacks,
    /// Nothing was registered, so there is nothing to draw.
    Empty,
}

/// How a profile can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Format {
    /// A ranked table for a terminal.
    Table,
    /// All of it, schema deferprof.profile/1.
    Json,
    /// One line a call stack, for flame graph tools.
    Folded,
    /// A flame graph.
    Svg,
    /// A gzipped profile.proto for `go tool pprof`.
    Pprof,
}

/// How a profile should be shown. Each format takes what concerns it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Columns of the terminal; lines of a table are never wider. At least 60.
    pub width: usize,
    /// Whether the table may use ANSI colors.
    pub color: bool,
    /// What ranks the table.
    pub sort: SortKey,
    /// The most sites that the table shows; `None` for all.
    pub limit: Option<usize>,
    /// What the widths of a flame graph mean.
    pub weight: Weight,
    /// Whether the table tells each row's story, and what to do about it.
    pub advice: bool,
}

/// What a stack weighs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub enum Weight {
    /// How often it registered.
    #[default]
    Registered,
    /// What that cost, in ns by the cost table.
    Cost,
}

impl Default for Options {
    /// For a pipe: 120 columns, no colors, everything.
    fn default() -> Self {
        Self {
            width: 120,
            color: false,
            sort: SortKey::default(),
            limit: None,
            weight: Weight::default(),
            advice: false,
        }
    }
}

impl Format {
    /// The format that a file's name asks for: `.json`, `.folded`, `.svg`, `.pb.gz`, or `.txt` for
    /// the table.
    pub fn from_path(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let by_extension = [
            (".json", Self::Json),
            (".folded", Self::Folded),
            (".svg", Self::Svg),
            (".pb.gz", Self::Pprof),
            (".txt", Self::Table),
        ];
        by_extension
            .into_iter()
            .find(|(extension, _)| name.ends_with(extension))
            .map(|(_, format)| format)
    }

    /// The report that writes this format.
    pub fn report(self, options: &Options) -> Box<dyn Report> {
        match self {
            Self::Table => Box::new(Table::new(options)),
            Self::Json => Box::new(Json),
            Self::Folded => Box::new(Folded::new(options.weight)),
            Self::Svg => Box::new(Svg::new(options.weight)),
            Self::Pprof => Box::new(Pprof),
        }
    }

    /// Whether the output is for machines alone and would garble a terminal.
    pub fn is_binary(self) -> bool {
        self == Self::Pprof
    }
}

impl Weight {
    /// What one unit is called under a flame graph.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Registered => "defers",
            Self::Cost => "ns",
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoStacks => {
                "The profile has no call stacks (they need --stacks), so each site stands alone."
            }
            Self::Empty => "No defer statement ran, so there is nothing to draw.",
        })
    }
}
