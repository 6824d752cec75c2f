//! Why a target could not be watched.

use std::io;
use std::path::PathBuf;

/// Why a target could not be found, opened or started. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// No such process.
    #[error("there is no process {0}: it has ended, or it runs in another pid namespace")]
    NoProcess(i32),
    /// A thread id was given.
    #[error("{thread} is a thread of process {process}: attach to {process}")]
    IsThread {
        /// What was given.
        thread: i32,
        /// The thread group it belongs to.
        process: i32,
    },
    /// It has no executable.
    #[error("process {0} is a kernel thread: it runs no program")]
    KernelThread(i32),
    /// It has exited and waits for its parent.
    #[error("process {0} has exited already: only its entry in the process table is left (zombie)")]
    Zombie(i32),
    /// `/proc/<pid>/exe` may not be opened.
    #[error(
        "deferprof is not permitted to open the executable of process {pid}, which belongs to user \
         {owner}. Run it as root, or as that user with CAP_SYS_PTRACE: `sudo deferprof attach {pid}`"
    )]
    NotPermitted {
        /// The process.
        pid: i32,
        /// Its effective user id.
        owner: u32,
    },
    /// `--module` names none of the process's Go modules.
    #[error("process {pid} has loaded no Go code from {module}")]
    NoModule {
        /// The process.
        pid: i32,
        /// What was asked for.
        module: PathBuf,
    },
    /// A program to run was not found.
    #[error("there is no program {0:?} in the folders of PATH; give its path, such as ./{0}")]
    NotFound(String),
    /// A script has no defers.
    #[error("{0} is a script, not a Go binary: give the Go binary that it starts")]
    Script(PathBuf),
    /// An executable could not be opened.
    #[error("{path} cannot be opened: {source}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel would not execute the program.
    #[error("{path} cannot be executed: {source}")]
    Execute {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A system call failed for another reason.
    #[error("deferprof could not {action}: {source}")]
    System {
        /// What it tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl TargetError {
    pub(super) fn system(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System {
            action: action.into(),
            source: source.into(),
        }
    }
}
