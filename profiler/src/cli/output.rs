//! Where results go: standard output and files, each file whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal as _, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::args::ShowArgs;
use super::error::UsageError;
use crate::profile::Profile;
use crate::report::{Format, Options};

/// How to show a profile and where: nothing in it can be invalid any more.
#[derive(Debug)]
pub struct Outputs {
    format: Format,
    options: Options,
    files: Vec<Destination>,
}

/// A file to come.
#[derive(Debug)]
struct Destination {
    path: PathBuf,
    format: Format,
    /// Written first and then moved to `path`; `None` for pipes and devices.
    temporary: Option<PathBuf>,
    file: Option<File>,
}

impl Outputs {
    /// Settles the arguments, and opens the files, so that a bad path is told before the
    /// recording and not behind it.
    ///
    /// # Errors
    /// A file whose name says no format, that is named twice, or that cannot be written.
    pub fn open(arguments: &ShowArgs) -> anyhow::Result<Self> {
        if arguments.format.is_binary() && io::stdout().is_terminal() {
            let message = "pprof output is binary and would garble the terminal: write it to a \
                           file with -o NAME.pb.gz, or redirect standard output";
            return Err(UsageError(message.to_owned()).into());
        }
        let mut files: Vec<Destination> = Vec::new();
        for path in &arguments.output {
            let format = Format::from_path(path).ok_or_else(|| {
                UsageError(format!(
                    "the name of {} says no format: let it end in .json, .folded, .svg, .pb.gz or \
                     .txt",
                    path.display()
                ))
            })?;
            if files.iter().any(|f| f.path == *path) {
                return Err(UsageError(format!("-o {} is given twice", path.display())).into());
            }
            files.push(Destination::open(path, format)?);
        }
        let options = Options {
            width: terminal_width(),
            color: color(),
            sort: arguments.sort,
            limit: (arguments.limit > 0).then_some(arguments.limit),
            weight: arguments.weight,
            advice: arguments.advice,
        };
        Ok(Self {
            format: arguments.format,
            options,
            files,
        })
    }

    /// Writes the profile everywhere. A file that fails does not keep the others from being
    /// written; the first error is returned.
    ///
    /// # Errors
    /// Of the file system, or of standard output.
    pub fn write(mut self, profile: &Profile) -> anyhow::Result<()> {
        let mut result = Ok(());
        for destination in std::mem::take(&mut self.files) {
            let path = destination.path.clone();
            match destination.write(profile, &self.options) {
                Ok(()) => eprintln!("deferprof: wrote {}", path.display()),
                Err(error) if result.is_ok() => result = Err(error),
                Err(error) => eprintln!("deferprof: {error:#}"),
            }
        }
        let mut out = BufWriter::new(io::stdout().lock());
        let shown = self
            .format
            .report(&self.options)
            .write(profile, &mut out)
            .and_then(|notes| {
                out.flush()?;
                Ok(notes)
            });
        let notes = shown.context("standard output cannot be written")?;
        for note in notes {
            eprintln!("deferprof: {note}");
        }
        result
    }
}

impl Destination {
    fn open(path: &Path, format: Format) -> anyhow::Result<Self> {
        let context = || format!("{} cannot be written", path.display());
        let special = std::fs::metadata(path).is_ok_and(|m| !m.is_file());
        if special {
            let file = File::options()
                .write(true)
                .open(path)
                .with_context(context)?;
            return Ok(Self {
                path: path.to_owned(),
                format,
                temporary: None,
                file: Some(file),
            });
        }
        // An existing file that may not be written is not replaced behind its owner's back.
        if path.exists() {
            File::options()
                .append(true)
                .open(path)
                .with_context(context)?;
        }
        let name = path
            .file_name()
            .context("it names no file")
            .with_context(context)?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let file = File::create_new(&temporary).with_context(context)?;
        Ok(Self {
            path: path.to_owned(),
            format,
            temporary: Some(temporary),
            file: Some(file),
        })
    }

    fn write(mut self, profile: &Profile, options: &Options) -> anyhow::Result<()> {
        let context = || format!("{} cannot be written", self.path.display());
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let mut out = BufWriter::new(file);
        // A file is no terminal: no color, and a width of its own.
        let options = Options {
            color: false,
            width: Options::default().width,
            ..options.clone()
        };
        let notes = self
            .format
            .report(&options)
            .write(profile, &mut out)
            .with_context(context)?;
        out.flush().with_context(context)?;
        if let Some(temporary) = &self.temporary {
            std::fs::rename(temporary, &self.path).with_context(context)?;
        }
        for note in notes {
            eprintln!("deferprof: {}: {note}", self.path.display());
        }
        self.temporary = None;
        Ok(())
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            std::fs::remove_file(temporary).ok();
        }
    }
}

/// Whether standard output may be colored (<https://no-color.org>).
pub fn color() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Columns of the terminal that standard output is, or the default of a report.
pub fn terminal_width() -> usize {
    /// Narrower, a table is not readable.
    const NARROWEST: usize = 60;
    let asked = std::env::var("COLUMNS")
        .ok()
        .and_then(|c| c.parse::<usize>().ok());
    let width = if io::stdout().is_terminal() {
        rustix::termios::tcgetwinsize(io::stdout())
            .ok()
            .map(|size| usize::from(size.ws_col))
            .filter(|columns| *columns > 0)
            .or(asked)
    } else {
        asked
    };
    width.unwrap_or(Options::default().width).max(NARROWEST)
}
