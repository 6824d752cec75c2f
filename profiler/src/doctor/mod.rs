//! What works on this machine, what does not, and how to get it: the facts that `attach` and `run`
//! decide by, gathered beforehand and shown as a table or as JSON.

mod kernel;
mod process;
mod table;
mod target;

use std::io::{self, Write};

use nix::unistd::Pid;
use serde::Serialize;

pub use self::{
    kernel::Kernel,
    process::Permissions,
    target::{Mechanisms, Target},
};
use crate::engine::{self, EngineError, LinkChoice, calibrate, features};

/// The name and version of the JSON form.
pub const SCHEMA: &str = "deferprof.doctor/1";

/// Everything that `deferprof doctor` says.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// deferprof's own version.
    pub deferprof: &'static str,
    /// Whether defers can be counted: of the target, if there is one.
    pub ready: bool,
    /// The kernel.
    pub kernel: Kernel,
    /// What this process may do.
    pub process: Permissions,
    /// The ways to attach probes, the best first.
    pub links: Vec<Link>,
    /// What a hit costs here; `None` if none can be made.
    pub cost: Option<Cost>,
    /// The process that was asked about.
    pub target: Option<Target>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// One way to attach probes.
#[derive(Clone, Debug, Serialize)]
pub struct Link {
    /// Its name.
    pub kind: &'static str,
    /// Whether it works.
    pub works: bool,
    /// Why not, and what to do about it.
    pub reason: Option<String>,
}

/// What one hit of a probe costs the target, in nanoseconds, by the best link.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// The link.
    pub link: &'static str,
    /// On an instruction that the kernel emulates.
    pub emulated_ns: f64,
    /// On one that it single-steps.
    pub single_stepped_ns: f64,
}

/// Something that is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// Whether nothing can be profiled because of it.
    pub blocks: bool,
    /// What it is, a sentence or some: those that `attach` and `run` say.
    pub what: String,
    /// A command that helps.
    pub fix: Option<String>,
}

impl Report {
    /// Looks at this machine, and at a process if one is given. It takes some milliseconds, and
    /// attaches probes to nothing but deferprof itself.
    pub fn gather(pid: Option<Pid>) -> Self {
        let mut problems = Vec::new();
        let links: Vec<_> = features::links()
            .into_iter()
            .map(|support| Link {
                kind: support.kind.as_str(),
                works: support.result.is_ok(),
                reason: support.result.err().map(|error| error.to_string()),
            })
            .collect();
        let cost = match calibrate(LinkChoice::Auto, None) {
            Ok(cost) => Some(Cost {
                link: cost.link.as_str(),
                emulated_ns: cost.emulated_ns,
                single_stepped_ns: cost.single_stepped_ns,
            }),
            Err(error) => {
                problems.push(Problem::engine(&error));
                None
            }
        };
        let kernel = Kernel::gather(&links);
        problems.extend(kernel.problems());
        let target = pid.and_then(|pid| {
            let target = Target::gather(pid, &links);
            match target {
                Ok((target, found)) => {
                    problems.extend(found);
                    Some(target)
                }
                Err(problem) => {
                    problems.push(problem);
                    None
                }
            }
        });
        // What keeps everything from working comes first.
        problems.sort_by_key(|problem| !problem.blocks);
        Self {
            schema: SCHEMA,
            deferprof: env!("CARGO_PKG_VERSION"),
            ready: !problems.iter().any(|problem| problem.blocks),
            kernel,
            process: Permissions::gather(),
            links,
            cost,
            target,
            problems,
        }
    }

    /// Writes it for people.
    ///
    /// # Errors
    ///
    /// Those of the writer.
    pub fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        table::write(self, out)
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    ///
    /// Those of the writer.
    pub fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        writeln!(out)
    }
}

impl Problem {
    fn engine(error: &EngineError) -> Self {
        Self {
            blocks: true,
            what: error.to_string(),
            fix: match error {
                EngineError::NotPermitted { explanation, .. } => explanation.fix(),
                _ => None,
            },
        }
    }

    fn warning(what: impl Into<String>, fix: Option<String>) -> Self {
        Self {
            blocks: false,
            what: what.into(),
            fix,
        }
    }
}

/// A file of /proc or /sys with one value.
fn setting(path: &str) -> Option<String> {
    engine::setting(path)
}
