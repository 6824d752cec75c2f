//! What holds the programs to the target's instructions, whichever kind it is.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use deferprof_ebpf_common::Role;
use deferprof_symbols::Probe;
use nix::{libc, unistd::Pid};

use super::{multi, perf, sys};
use crate::engine::{EngineError, LinkKind};

/// What is attached. Dropping it detaches, and returns when no program runs any more. All of it is
/// descriptors and nothing is pinned, so that the kernel detaches when this process dies.
#[derive(Debug)]
#[expect(dead_code, reason = "held for what dropping them does")]
pub(super) enum Links {
    /// One link.
    Multi(OwnedFd),
    /// One a probe.
    Perf(perf::PerfLinks),
}

impl Links {
    /// Attaches `program` at all `probes` of the file at `path`, for the thread group `pid`.
    pub(super) fn attach(
        kind: LinkKind,
        program: &OwnedFd,
        path: &CStr,
        probes: &[Probe],
        pid: Pid,
        role: Role,
    ) -> Result<Self, EngineError> {
        match kind {
            LinkKind::UprobeMulti => {
                multi::attach(program, path, probes, pid, role).map(Self::Multi)
            }
            LinkKind::PerfEvent => perf::attach(program, path, probes, pid, role).map(Self::Perf),
        }
    }
}

/// Tells whether links of this kind work here, by asking for one that must fail in a certain way.
/// `program` must have been loaded for this kind.
pub(super) fn is_supported(kind: LinkKind, program: &OwnedFd) -> Result<(), EngineError> {
    let (result, since) = match kind {
        LinkKind::UprobeMulti => (multi::is_supported(program.as_fd()), "6.6"),
        LinkKind::PerfEvent => (perf::is_supported(program.as_fd()), "5.15"),
    };
    let action = format!("attach probes with {} links", kind.as_str());
    result.map_err(|error| {
        if sys::is_permission(&error) {
            EngineError::not_permitted(action, super::object::NEEDED, error)
        } else {
            not_supported(action, since, &error)
        }
    })
}

/// The error of a kernel that is too old, or built without.
pub(super) fn not_supported(action: String, since: &str, error: &io::Error) -> EngineError {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    EngineError::NotSupported {
        action,
        reason: format!(
            "it needs Linux {since} with CONFIG_UPROBES and CONFIG_BPF_EVENTS, this is {release} ({error})"
        ),
    }
}

/// Whether an error of attaching says that an instruction cannot be probed, not that the call
/// itself is wrong: EINVAL and ENOTSUPP (prefixes, exclusive loads), ENOEXEC (undecodable), EIO and
/// ENXIO (no such place in the file), all from prepare_uprobe (kernel/events/uprobes.c).
pub(super) fn is_refusal(error: &io::Error) -> bool {
    const REFUSALS: [i32; 6] = [
        libc::EINVAL,
        libc::EOPNOTSUPP,
        libc::ENOEXEC,
        libc::EIO,
        libc::ENXIO,
        sys::ENOTSUPP,
    ];
    error
        .raw_os_error()
        .is_some_and(|errno| REFUSALS.contains(&errno))
}
