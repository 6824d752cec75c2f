//! One uprobe_multi link for all probes (Linux 6.6).

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::LazyLock,
};

use nix::{libc, unistd::Pid};

use super::{links, object, points::Placed, sys};
use crate::engine::{EngineError, features, setting};

/// Attaches `program` at all `probes`.
pub(super) fn attach(
    program: &OwnedFd,
    path: &CStr,
    probes: &[Placed],
    pid: Pid,
) -> Result<OwnedFd, EngineError> {
    let link = |probes: &[Placed]| link(program.as_fd(), path, probes, pid);
    link(probes).map_err(|error| {
        let action = || format!("attach {} probes with a uprobe_multi link", probes.len());
        match error.raw_os_error() {
            Some(libc::ESRCH) => EngineError::NoTarget { pid },
            _ if sys::is_permission(&error) => {
                EngineError::not_permitted(action(), object::NEEDED, error)
            }
            _ if links::is_refusal(&error) => match links::refused(probes, &link) {
                Some((probe, source)) => EngineError::InvalidProbe {
                    offset: probe.offset,
                    source,
                },
                None => EngineError::system(action(), error),
            },
            _ => EngineError::system(action(), error),
        }
    })
}

/// Whether this kernel has such links: a program and a path that is no regular file give EBADF if
/// so, EINVAL if not (kernel/trace/bpf_trace.c; libbpf asks the same way).
pub(super) fn is_supported(program: BorrowedFd<'_>) -> Result<(), io::Error> {
    match sys::link_uprobe_multi(program, c"/", &[0], &[0], Pid::this()) {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Ok(()),
    }
}

fn link(program: BorrowedFd<'_>, path: &CStr, probes: &[Placed], pid: Pid) -> io::Result<OwnedFd> {
    let (offsets, cookies): (Vec<_>, Vec<_>) = probes
        .iter()
        .map(|probe| (probe.offset.0, probe.cookie.0))
        .unzip();
    // The program filters as well, so that on a kernel that leaves out other threads than the first
    // all processes may report.
    static BUG: LazyLock<bool> = LazyLock::new(|| {
        setting("/proc/sys/kernel/osrelease").is_some_and(|it| features::pid_filter_bug(&it))
    });
    let filter = if *BUG { Pid::from_raw(0) } else { pid };
    sys::link_uprobe_multi(program, path, &offsets, &cookies, filter)
}
