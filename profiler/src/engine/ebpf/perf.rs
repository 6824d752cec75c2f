//! A perf event for each probe, for kernels without uprobe_multi. Since Linux 5.15 a link to it carries
//! the probe's cookie; before, the program is set by ioctl and knows the probe by its address.
//!
//! Detaching one waits for all the uprobes in flight on the machine to end, up to 100 ms on
//! Linux 6.18. Waiting for many at once takes no longer than for one, so many threads close.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Mutex,
    thread,
};

use nix::{
    libc,
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

use super::{links, points::Placed, sys};
use crate::engine::{
    EngineError,
    error::Capability::{self, Bpf, SysAdmin, SysResource},
};

/// Uprobes through perf need the second since the fix of CVE-2025-38466 (Linux 6.16 and stable
/// releases of 2025; before, CAP_PERFMON did).
const NEEDED: &[Capability] = &[Bpf, SysAdmin];

/// Where the kernel says which number the type of uprobe events has (Linux 4.17).
const TYPE_FILE: &str = "/sys/bus/event_source/devices/uprobe/type";

/// Descriptors that the rest of the process may need beside one a probe.
const SPARE_DESCRIPTORS: u64 = 256;

/// How many threads close links. They only wait; more than some do so for a mutex of the kernel.
const CLOSING_THREADS: usize = 64;

/// The stack of a thread that only closes descriptors, in bytes.
const CLOSING_STACK: usize = 64 * 1024;

/// The links. Dropping them detaches.
#[derive(Debug)]
pub(super) struct PerfLinks(Vec<OwnedFd>);

/// Attaches `program` at all `probes`.
pub(super) fn attach(
    program: &OwnedFd,
    path: &CStr,
    probes: &[Placed],
    pid: Pid,
) -> Result<PerfLinks, EngineError> {
    let kind = event_type().map_err(|error| EngineError::NotSupported {
        action: "attach probes with perf events".into(),
        reason: format!("{TYPE_FILE} says no type of uprobe events ({error}); the kernel needs CONFIG_UPROBE_EVENTS and must be 4.17 or later"),
    })?;
    raise_descriptor_limit(probes.len())?;
    // Dropped on an error, and then the ones attached so far are closed together.
    let mut attached = PerfLinks(Vec::with_capacity(probes.len()));
    for probe in probes {
        let link = link(program.as_fd(), path, kind, probe, pid);
        attached
            .0
            .push(link.map_err(|error| explain(error, probe, probes.len(), pid))?);
    }
    Ok(attached)
}

fn link(
    program: BorrowedFd<'_>,
    path: &CStr,
    kind: u32,
    probe: &Placed,
    pid: Pid,
) -> io::Result<OwnedFd> {
    let event = sys::open_uprobe(kind, path, probe.offset.0, pid)?;
    if !links::has_cookies() {
        sys::set_program(event.as_fd(), program)?;
        return Ok(event);
    }
    sys::link_perf_event(program, event.as_fd(), probe.cookie.0)
}

fn explain(error: io::Error, probe: &Placed, probes: usize, pid: Pid) -> EngineError {
    let action = format!("attach {probes} probes with perf events");
    match error.raw_os_error() {
        Some(libc::ESRCH) => EngineError::NoTarget { pid },
        _ if sys::is_permission(&error) => EngineError::not_permitted(action, NEEDED, error),
        _ if links::is_refusal(&error) => EngineError::InvalidProbe {
            offset: probe.offset,
            source: error,
        },
        _ => EngineError::system(action, error),
    }
}

/// Whether this kernel has uprobes as perf events.
pub(super) fn is_supported() -> io::Result<()> {
    event_type().map(drop)
}

fn event_type() -> io::Result<u32> {
    let text = std::fs::read_to_string(TYPE_FILE)?;
    text.trim().parse().map_err(io::Error::other)
}

/// Makes room for a descriptor a probe.
fn raise_descriptor_limit(probes: usize) -> Result<(), EngineError> {
    let needed = probes as u64 + SPARE_DESCRIPTORS;
    let read = getrlimit(Resource::RLIMIT_NOFILE);
    let (soft, hard) =
        read.map_err(|error| EngineError::system("read RLIMIT_NOFILE", error.into()))?;
    if soft >= needed {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, needed, hard.max(needed)).map_err(|error| {
        let action = format!("have {needed} files open, one a probe (the hard limit is {hard})");
        EngineError::not_permitted(action, &[SysResource], error.into())
    })
}

impl Drop for PerfLinks {
    fn drop(&mut self) {
        let threads = self.0.len().min(CLOSING_THREADS);
        let links = Mutex::new(std::mem::take(&mut self.0));
        let close = || {
            // The guard goes before the link does: closing is what must happen at once.
            while let Some(link) = links.lock().ok().and_then(|mut links| links.pop()) {
                drop(link);
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                let builder = thread::Builder::new().stack_size(CLOSING_STACK);
                if builder.spawn_scoped(scope, close).is_err() {
                    break; // Fewer threads take longer.
                }
            }
            close();
        });
    }
}
