//! A program that `run` starts: forked, then held until the probes are in place.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, execve, fork, pipe2};

use super::TargetError;

/// A child that will execute a program when it is told to, and not before. Dropped untold, it
/// ends without having executed anything.
#[derive(Debug)]
pub struct PausedChild {
    pid: Pid,
    path: PathBuf,
    /// A byte written here lets it go; closed without one, the child ends.
    go: File,
    /// The child writes `errno` here if it could not execute; closed by the execution.
    failure: File,
}

impl PausedChild {
    /// Forks a child that will execute the program at `path` with `arguments` (the program's name
    /// first) and our environment. Its signal mask will be `mask`.
    ///
    /// Call it while the process has one thread.
    ///
    /// # Errors
    /// [`TargetError::System`] if the kernel will not fork.
    pub fn spawn(path: &Path, arguments: &[OsString], mask: &SigSet) -> Result<Self, TargetError> {
        let text = |bytes: &[u8]| {
            CString::new(bytes).map_err(|e| TargetError::system("pass on an argument", e))
        };
        let program = text(path.as_os_str().as_bytes())?;
        let arguments = arguments
            .iter()
            .map(|a| text(a.as_bytes()))
            .collect::<Result<Vec<_>, _>>()?;
        let environment = std::env::vars_os()
            .map(|(key, value)| text(&[key.as_bytes(), b"=", value.as_bytes()].concat()))
            .collect::<Result<Vec<_>, _>>()?;
        let failed = |error: Errno| TargetError::system("start a process", error);
        let (go_read, go_write) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let (failure_read, failure_write) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        // SAFETY: between fork and exec the child makes only system calls (async-signal-safe) on
        // what was allocated before, so locks that another thread may hold do not matter.
        match unsafe { fork() }.map_err(failed)? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                path: path.to_owned(),
                go: File::from(go_write),
                failure: File::from(failure_read),
            }),
            ForkResult::Child => {
                // Or the end of the parent would not be seen as the end of the pipe.
                drop(go_write);
                let error = execute(&go_read, &program, &arguments, &environment, mask);
                let number = (error as i32).to_ne_bytes();
                nix::unistd::write(&failure_write, &number).ok();
                // SAFETY: ends the child at once, without running the parent's destructors.
                unsafe { nix::libc::_exit(127) }
            }
        }
    }

    /// The child's process id: the same before and after it executes.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Lets it execute the program.
    ///
    /// # Errors
    /// [`TargetError::Execute`] if the kernel refuses.
    pub fn release(mut self) -> Result<Pid, TargetError> {
        self.go
            .write_all(b"g")
            .map_err(|e| TargetError::system("start the program", e))?;
        let mut number = [0u8; 4];
        match self.failure.read_exact(&mut number) {
            // Closed by the execution.
            Err(_) => Ok(self.pid),
            Ok(()) => {
                waitpid(self.pid, None).ok();
                let source = io::Error::from_raw_os_error(i32::from_ne_bytes(number));
                Err(TargetError::Execute {
                    path: self.path,
                    source,
                })
            }
        }
    }

    /// Waits for a released child and gives the exit status to pass on: its own, or 128 and the
    /// number of the signal that ended it, as shells do.
    pub fn exit_status(pid: Pid) -> u8 {
        loop {
            match waitpid(pid, None) {
                Ok(WaitStatus::Exited(_, status)) => return u8::try_from(status).unwrap_or(1),
                Ok(WaitStatus::Signaled(_, signal, _)) => {
                    return u8::try_from(128 + signal as i32).unwrap_or(1);
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return 1,
            }
        }
    }

    /// Finds a program as a shell does: by path if the name has a slash, else in `PATH`.
    ///
    /// # Errors
    /// [`TargetError::NotFound`].
    pub fn find(name: &std::ffi::OsStr) -> Result<PathBuf, TargetError> {
        if name.as_bytes().contains(&b'/') {
            return Ok(PathBuf::from(name));
        }
        let folders = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&folders)
            .map(|folder| folder.join(name))
            .find(|path| {
                path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
            })
            .ok_or_else(|| TargetError::NotFound(name.to_string_lossy().into_owned()))
    }
}

/// The child's side: waits for the word, puts signals as a shell would, and executes.
fn execute(
    go: &OwnedFd,
    program: &CString,
    arguments: &[CString],
    environment: &[CString],
    mask: &SigSet,
) -> Errno {
    let mut byte = [0u8; 1];
    loop {
        match nix::unistd::read(go, &mut byte) {
            Ok(1) => break,
            Err(Errno::EINTR) => {}
            // The parent is gone, or has given up.
            _ => return Errno::ECANCELED,
        }
    }
    // Rust ignores SIGPIPE, and exec would hand that on.
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action is no handler that could be unsafe.
    if let Err(error) = unsafe { sigaction(Signal::SIGPIPE, &default) } {
        return error;
    }
    if let Err(error) = mask.thread_set_mask() {
        return error;
    }
    match execve(program, arguments, environment) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}
