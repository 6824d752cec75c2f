//! The command line as it is written: what clap reads, completes and prints as help.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use regex::Regex;

use crate::engine::{LinkChoice, LinkKind};
use crate::rank::SortKey;
use crate::report::{Format, Weight};

/// A profiler for Go's defer in running programs.
#[derive(Debug, Parser)]
#[command(name = "deferprof", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
EXAMPLES:
    Rank the defers of a running program until Ctrl-C:
        deferprof attach 1234
    For ten seconds, with call stacks, and a flame graph and a pprof file besides the table:
        deferprof attach --duration 10s --stacks -o defers.svg -o defers.pb.gz 1234
    A program from its first instruction to its end:
        deferprof run -- ./server --port 8080
    List the defers of a binary, without running it:
        deferprof scan ./server

EXIT STATUS:
    0 done   1 it failed   2 bad usage   3 not permitted or not supported here
    `run` passes the program's own status on.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List every defer of a Go binary: where it is, how it was compiled, and why so.
    ///
    /// Needs no privileges and runs nothing.
    Scan(ScanArgs),
    /// Count the defers of a running process until Ctrl-C, --duration, or its end.
    Attach(AttachArgs),
    /// Start a program, count its defers from its first instruction to its end.
    Run(RunArgs),
    /// Show a saved profile (JSON) again, in any format.
    Report(ReportArgs),
    /// Say what works here, what is missing, and how to get it; exit status 3 if nothing can be
    /// profiled.
    Doctor(DoctorArgs),
}

/// `scan`.
#[derive(Debug, Args)]
pub struct ScanArgs {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    pub format: ScanFormat,
    /// Show for each site which instruction would be probed, why, and whether the kernel emulates it.
    #[arg(long, conflicts_with = "format")]
    pub explain: bool,
    /// The Go executable.
    pub binary: PathBuf,
}

/// The formats of `scan`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ScanFormat {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// `attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// How to record and show.
    #[command(flatten)]
    pub record: RecordArgs,
    /// The Go code to count in, where the process has several: its executable or a library it has
    /// loaded (built as c-shared or plugin), by path or file name.
    #[arg(long, value_name = "FILE")]
    pub module: Option<PathBuf>,
    /// The process.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// How to record and show.
    #[command(flatten)]
    pub record: RecordArgs,
    /// The Go executable and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "BINARY [ARGS]")]
    pub program: Vec<OsString>,
}

/// What `attach` and `run` share.
#[derive(Debug, Args)]
pub struct RecordArgs {
    /// Stop after this time, such as 10s, 500ms or 2m30s.
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub duration: Option<Duration>,
    /// Record who calls each defer. A hit costs more then.
    #[arg(long)]
    pub stacks: bool,
    /// Measure how long registering, the deferred call and the hold take. A hit costs more then, and
    /// there are more of them.
    #[arg(long, conflicts_with = "no_ran")]
    pub latency: bool,
    /// Do not count how often deferred calls were made, and by which path. Saves a probe hit a defer.
    #[arg(long)]
    pub no_ran: bool,
    /// Do not tell where heap records came from.
    #[arg(long)]
    pub no_pool: bool,
    /// Only defers in functions whose name (with package) matches.
    #[arg(long, value_name = "REGEX")]
    pub include: Option<Regex>,
    /// No defers in functions whose name (with package) matches.
    #[arg(long, value_name = "REGEX")]
    pub exclude: Option<Regex>,
    /// Say on standard error what is being done, and how long it took.
    #[arg(long, short)]
    pub verbose: bool,
    /// How to attach; for tests.
    #[arg(long, value_enum, default_value_t, hide = true)]
    pub link: LinkArg,
    /// How to show it.
    #[command(flatten)]
    pub show: ShowArgs,
}

/// How a profile is shown.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// What ranks the sites.
    #[arg(long, value_enum, default_value_t)]
    pub sort: SortKey,
    /// Output format on standard output.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Also write this file; its name's end says the format: .json, .folded, .svg, .pb.gz, .txt.
    /// May be repeated.
    #[arg(short, long, value_name = "FILE")]
    pub output: Vec<PathBuf>,
    /// Show at most this many sites in the table; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub limit: usize,
    /// Tell below the table, for each of its rows, what its figures say and what to do about it.
    #[arg(long)]
    pub advice: bool,
    /// What the widths of flame graphs and the numbers of folded stacks mean.
    #[arg(long, value_enum, default_value_t)]
    pub weight: Weight,
}

/// `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// How to show it.
    #[command(flatten)]
    pub show: ShowArgs,
    /// A profile that `attach` or `run` wrote as JSON; - for standard input.
    pub file: PathBuf,
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    pub format: ScanFormat,
    /// Also look at this process.
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
}

/// A [`LinkChoice`] by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LinkArg {
    /// The best that works here.
    #[default]
    Auto,
    /// One uprobe_multi link.
    #[value(alias = "uprobe_multi")]
    Multi,
    /// One trace event.
    #[value(alias = "trace_event")]
    Trace,
    /// A perf event a probe.
    #[value(alias = "perf_event")]
    Perf,
}

impl From<LinkArg> for LinkChoice {
    fn from(argument: LinkArg) -> Self {
        match argument {
            LinkArg::Auto => Self::Auto,
            LinkArg::Multi => Self::Only(LinkKind::UprobeMulti),
            LinkArg::Trace => Self::Only(LinkKind::TraceEvent),
            LinkArg::Perf => Self::Only(LinkKind::PerfEvent),
        }
    }
}

/// Reads `10s`, `500ms`, `2m30s`, `1h`, or a bare number of seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let problem = || format!("{text:?} is not a time such as 10s, 500ms or 2m30s");
    let mut total = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return Err(problem());
    }
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, after) = rest.split_at(end);
        let number: f64 = number.parse().map_err(|_| problem())?;
        let end = after
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let seconds = match unit {
            "ms" => number / 1e3,
            "s" => number,
            "" if after.is_empty() && total.is_zero() => number,
            "m" | "min" => number * 60.0,
            "h" => number * 3600.0,
            _ => return Err(problem()),
        };
        total = Duration::try_from_secs_f64(seconds)
            .ok()
            .and_then(|part| total.checked_add(part))
            .ok_or_else(problem)?;
        rest = after;
    }
    if total.is_zero() {
        return Err("a recording of no time records nothing".to_owned());
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, milliseconds) in [
            ("10s", 10_000),
            ("500ms", 500),
            ("2m30s", 150_000),
            ("1h", 3_600_000),
            ("1.5", 1500),
        ] {
            assert_eq!(
                duration(text),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        for text in ["", "s", "10x", "-1s", "1s2", "0", "1e400s", "10 s", "..s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
