//! A process that runs already, or a child that was started.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

use super::{Executable, TargetError};

/// A process, held by a descriptor, so that its id cannot come to mean another.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    descriptor: OwnedFd,
}

impl Process {
    /// Takes hold of a process.
    ///
    /// # Errors
    /// [`TargetError`]: there is none, it is a thread of another, a zombie, or a kernel thread.
    pub fn open(pid: Pid) -> Result<Self, TargetError> {
        let number = pid.as_raw();
        let status = fs::read_to_string(format!("/proc/{number}/status"))
            .map_err(|_| TargetError::NoProcess(number))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_ascii_whitespace().next())
        };
        let group = field("Tgid:")
            .and_then(|id| id.parse().ok())
            .unwrap_or(number);
        if group != number {
            return Err(TargetError::IsThread {
                thread: number,
                process: group,
            });
        }
        if field("State:") == Some("Z") {
            return Err(TargetError::Zombie(number));
        }
        let descriptor = rustix::process::Pid::from_raw(number)
            .ok_or(TargetError::NoProcess(number))
            .and_then(|id| {
                pidfd_open(id, PidfdFlags::empty()).map_err(|error| match error {
                    rustix::io::Errno::SRCH | rustix::io::Errno::INVAL => {
                        TargetError::NoProcess(number)
                    }
                    other => TargetError::system(format!("watch process {number}"), other),
                })
            })?;
        Ok(Self { pid, descriptor })
    }

    /// Its id, in our pid namespace.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Opens what it executes: the very inode, also when the file was deleted or replaced.
    ///
    /// # Errors
    /// [`TargetError`]: not permitted, a kernel thread, or it has ended.
    pub fn executable(&self) -> Result<Executable, TargetError> {
        let pid = self.pid.as_raw();
        let link = PathBuf::from(format!("/proc/{pid}/exe"));
        let path = fs::read_link(&link).map_err(|error| self.no_executable(&error))?;
        Executable::open_as(&link, path).map_err(|error| match error {
            TargetError::Open { source, .. } => self.no_executable(&source),
            other => other,
        })
    }

    fn no_executable(&self, error: &io::Error) -> TargetError {
        let pid = self.pid.as_raw();
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let Ok(owner) = fs::metadata(&folder) else {
            return TargetError::NoProcess(pid);
        };
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                use std::os::unix::fs::MetadataExt as _;
                TargetError::NotPermitted {
                    pid,
                    owner: owner.uid(),
                }
            }
            io::ErrorKind::NotFound if is_kernel_thread(&folder) => TargetError::KernelThread(pid),
            io::ErrorKind::NotFound => TargetError::NoProcess(pid),
            _ => TargetError::system(
                format!("open the executable of process {pid}"),
                io::Error::new(error.kind(), error.to_string()),
            ),
        }
    }

    /// Its command line; empty if it cannot be read.
    pub fn arguments(&self) -> Vec<String> {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        if bytes.is_empty() {
            return Vec::new();
        }
        bytes
            .split(|b| *b == 0)
            .map(|a| String::from_utf8_lossy(a).into_owned())
            .collect()
    }

    /// Whether it is stopped by a signal or a debugger, so that nothing of it runs.
    pub fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // The state follows the name, which is in brackets and may hold anything.
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        matches!(state, Some('T' | 't'))
    }
}

/// What to say of a process that is stopped.
pub fn stopped(pid: i32) -> String {
    format!("process {pid} is stopped: nothing is counted until it goes on (kill -CONT {pid})")
}

/// Kernel threads have no memory map of their own: their command line and status say so.
fn is_kernel_thread(folder: &Path) -> bool {
    let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
    let flagged = status
        .lines()
        .any(|l| l.starts_with("Kthread:") && l.ends_with('1'));
    flagged || !status.lines().any(|line| line.starts_with("VmSize:"))
}

impl AsFd for Process {
    /// A pidfd: readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
