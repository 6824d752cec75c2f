//! The commands: arguments in, an exit status out.

mod args;
mod error;
mod output;
mod plan;
mod pool;
mod progress;
mod record;
mod runs;

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal as _, Write};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use deferprof_symbols::Binary;
use nix::unistd::Pid;

use self::args::{Cli, Command, DoctorArgs, ReportArgs, ScanArgs, ScanFormat};
use self::output::Outputs;
use crate::doctor;
use crate::profile::{Profile, Scan};
use crate::report::{Json, Options, ScanExplained, ScanReport, ScanTable};
use crate::target::Executable;

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    // clap ends the process itself for --help (0) and bad usage (2).
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Scan(args) => scan(&args).map(|()| 0),
        Command::Attach(args) => record::attach(&args).map(|()| 0),
        Command::Run(args) => record::run(&args),
        Command::Report(args) => report(&args).map(|()| 0),
        Command::Doctor(args) => doctor(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) if error::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Errors of this program carry their source in their sentence; the chain is for those
            // of libraries.
            writeln!(io::stderr(), "deferprof: {error:#}").ok();
            ExitCode::from(error::status(&error))
        }
    }
}

fn scan(args: &ScanArgs) -> anyhow::Result<()> {
    let executable = Executable::open(&args.binary)?;
    let path = args.binary.display().to_string();
    let inventory = Binary::parse(executable.bytes())
        .and_then(|binary| binary.inventory())
        .with_context(|| format!("{path} cannot be scanned"))?;
    for warning in &inventory.warnings {
        writeln!(io::stderr(), "deferprof: warning: {warning}").ok();
    }
    let scan = Scan::new(&path, inventory);
    let options = Options {
        width: output::terminal_width(),
        color: output::color(),
        ..Options::default()
    };
    let report: Box<dyn ScanReport> = match args.format {
        _ if args.explain => Box::new(ScanExplained::new(&options)),
        ScanFormat::Table => Box::new(ScanTable::new(&options)),
        ScanFormat::Json => Box::new(Json),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    report
        .write(&scan, &mut out)
        .and_then(|()| out.flush())
        .context("standard output cannot be written")
}

fn doctor(args: &DoctorArgs) -> anyhow::Result<u8> {
    let report = doctor::Report::gather(args.pid.map(Pid::from_raw));
    let mut out = BufWriter::new(io::stdout().lock());
    match args.format {
        ScanFormat::Table => report.write_table(&mut out),
        ScanFormat::Json => report.write_json(&mut out),
    }
    .and_then(|()| out.flush())
    .context("standard output cannot be written")?;
    Ok(if report.ready { 0 } else { error::UNAVAILABLE })
}

fn report(args: &ReportArgs) -> anyhow::Result<()> {
    let outputs = Outputs::open(&args.show)?;
    let name = args.file.display();
    let profile = if args.file.as_os_str() == "-" {
        if io::stdin().is_terminal() {
            writeln!(
                io::stderr(),
                "deferprof: reading a profile from the terminal"
            )
            .ok();
        }
        Profile::from_reader(io::stdin().lock())
    } else {
        let file = File::open(&args.file).with_context(|| format!("{name} cannot be opened"))?;
        Profile::from_reader(file)
    };
    let profile = profile.with_context(|| format!("{name} cannot be shown"))?;
    outputs.write(&profile)
}
