//! What holds the programs to the target's instructions, whichever kind it is.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::OnceLock,
};

use aya_obj::generated::bpf_insn;
use nix::{libc, unistd::Pid};

use super::{multi, perf, points::Placed, sys, tracefs};
use crate::engine::{EngineError, LinkKind};

/// What is attached. Dropping it detaches, and returns when no program runs any more. All of it is
/// descriptors and nothing is pinned, so that the kernel detaches when this process dies.
#[derive(Debug)]
#[expect(dead_code, reason = "held for what dropping them does")]
pub(super) enum Links {
    /// One link.
    Multi(OwnedFd),
    /// One event for all.
    Trace(tracefs::TraceEvent),
    /// One a probe.
    Perf(perf::PerfLinks),
}

impl Links {
    /// Attaches `program` at all `probes` of the file at `path`, for the thread group `pid`.
    pub(super) fn attach(
        kind: LinkKind,
        program: &OwnedFd,
        path: &CStr,
        probes: &[Placed],
        pid: Pid,
    ) -> Result<Self, EngineError> {
        match kind {
            LinkKind::UprobeMulti => multi::attach(program, path, probes, pid).map(Self::Multi),
            LinkKind::TraceEvent => tracefs::attach(program, path, probes, pid).map(Self::Trace),
            LinkKind::PerfEvent => perf::attach(program, path, probes, pid).map(Self::Perf),
        }
    }
}

/// Whether this kernel hands cookies to programs (Linux 5.15, as do links to perf events): it takes a
/// program that asks for one.
pub(crate) fn has_cookies() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        /// BPF_JMP | BPF_CALL of bpf_get_attach_cookie, and BPF_JMP | BPF_EXIT.
        const PROGRAM: [(u8, i32); 2] = [(0x85, 174), (0x95, 0)];
        let instructions = PROGRAM.map(|(code, imm)| bpf_insn {
            code,
            _bitfield_align_1: [],
            _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
            off: 0,
            imm,
        });
        sys::load_program("defer_cookie", &instructions, c"GPL", false).is_ok()
    })
}

/// How many entries a map of addresses needs for links of this kind; 0 if cookies do.
pub(super) fn addresses(kind: LinkKind, probes: usize) -> u32 {
    let by_address = match kind {
        LinkKind::UprobeMulti => false,
        LinkKind::TraceEvent => true,
        LinkKind::PerfEvent => !has_cookies(),
    };
    match by_address {
        true => u32::try_from(probes).unwrap_or(u32::MAX).max(1),
        false => 0,
    }
}

/// Tells whether links of this kind work here, by asking for one that must fail in a certain way.
/// `program` must have been loaded for this kind.
pub(super) fn is_supported(kind: LinkKind, program: &OwnedFd) -> Result<(), EngineError> {
    let (result, since) = match kind {
        LinkKind::UprobeMulti => (multi::is_supported(program.as_fd()), "6.6"),
        LinkKind::TraceEvent => (tracefs::is_supported(), "5.8"),
        LinkKind::PerfEvent => (perf::is_supported(), "5.8"),
    };
    let action = format!("attach probes with {} links", kind.as_str());
    result.map_err(|error| {
        if sys::is_permission(&error) && kind == LinkKind::TraceEvent {
            // A matter of the file's owner, not of capabilities; perf events may still work.
            EngineError::NotSupported {
                action,
                reason: format!("tracefs is another user's ({error}); run it as root (`sudo`)"),
            }
        } else if sys::is_permission(&error) {
            EngineError::not_permitted(action, super::object::NEEDED, error)
        } else {
            not_supported(action, since, &error)
        }
    })
}

/// That this kernel has none of the best links.
pub(super) fn no_uprobe_multi(error: &io::Error) -> EngineError {
    let kind = LinkKind::UprobeMulti.as_str();
    not_supported(format!("attach probes with {kind} links"), "6.6", error)
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

/// The first probe that the kernel refuses. The error of the whole does not name it, so it is
/// looked for by halves: about 14 attempts for 10,000 probes.
pub(super) fn refused<T>(
    mut probes: &[Placed],
    link: &dyn Fn(&[Placed]) -> io::Result<T>,
) -> Option<(Placed, io::Error)> {
    loop {
        if let [probe] = probes {
            return Some((*probe, link(probes).err()?));
        }
        let (first, second) = probes.split_at_checked(probes.len() / 2)?;
        if first.is_empty() {
            return None;
        }
        probes = match link(first) {
            Ok(_) => second,
            Err(error) if is_refusal(&error) => first,
            Err(_) => return None,
        };
    }
}
