//! One trace event for all probes (Linux 5.4), for kernels without uprobe_multi.
//!
//! Detaching a perf event waits for every program in flight on the machine, some 100 ms, under a lock
//! that all tracing takes: with an event a probe that makes minutes. Several uprobes may be one trace
//! event, though: it is opened once and closed once. All of them report to one program without a
//! cookie, so the program knows a probe by its address ([`place`](super::place)).
//!
//! The definition stays in tracefs when deferprof is killed; no breakpoint does. Its name carries our
//! process id and start time, and the next deferprof removes those of processes that are gone.

use std::{
    ffi::CStr,
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{libc, unistd::Pid};

use super::{links, object, points::Placed, sys};
use crate::engine::{
    EngineError,
    error::Capability::{self, Bpf, Perfmon, SysAdmin},
    setting,
};

/// Where tracefs is mounted: by itself, or in debugfs.
const MOUNTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The group of our events.
const GROUP: &str = "deferprof";

/// How much is written at once: the kernel takes whole lines out of it.
const CHUNK: usize = 64 * 1024;

/// A trace event that reports all probes. Dropping it detaches and removes the definition.
#[derive(Debug)]
pub(super) struct TraceEvent {
    event: Option<OwnedFd>,
    #[expect(dead_code, reason = "held for what dropping it does")]
    definition: Definition,
}

/// A definition in `uprobe_events`.
#[derive(Debug)]
struct Definition {
    mount: PathBuf,
    name: String,
}

/// Attaches `program` at all `probes`.
pub(super) fn attach(
    program: &OwnedFd,
    path: &CStr,
    probes: &[Placed],
    pid: Pid,
) -> Result<TraceEvent, EngineError> {
    let explain = |error: io::Error| {
        let action = format!("attach {} probes with a trace event", probes.len());
        match error.raw_os_error() {
            Some(libc::ESRCH) => EngineError::NoTarget { pid },
            _ if sys::is_permission(&error) => EngineError::not_permitted(action, needed(), error),
            _ => EngineError::system(action, error),
        }
    };
    let mount = mount().map_err(explain)?;
    remove_stale(mount);
    let attach = |probes: &[Placed]| {
        let definition = Definition::new(mount);
        definition.define(&path.to_string_lossy(), probes)?;
        let event = sys::open_tracepoint(definition.number()?, pid)?;
        sys::set_program(event.as_fd(), program.as_fd())?;
        Ok(TraceEvent {
            event: Some(event),
            definition,
        })
    };
    attach(probes).map_err(|error| match links::is_refusal(&error) {
        // Which one it is the kernel does not say.
        true => match links::refused(probes, &attach) {
            Some((probe, source)) => EngineError::InvalidProbe {
                offset: probe.offset,
                source,
            },
            None => explain(error),
        },
        false => explain(error),
    })
}

/// What it takes to open one: where kernel.perf_event_paranoid is 3 or more, the kernels of Debian and
/// Ubuntu, which alone have such values, ask for CAP_SYS_ADMIN.
fn needed() -> &'static [Capability] {
    let paranoid = setting("/proc/sys/kernel/perf_event_paranoid");
    match paranoid.and_then(|it| it.parse::<i32>().ok()) {
        Some(3..) => &[Bpf, Perfmon, SysAdmin],
        _ => object::NEEDED,
    }
}

/// Whether trace events of uprobes can be made here.
pub(super) fn is_supported() -> io::Result<()> {
    let events = mount()?.join("uprobe_events");
    OpenOptions::new().append(true).open(events).map(drop)
}

fn mount() -> io::Result<&'static Path> {
    let mut mounts = MOUNTS.iter().map(Path::new);
    // A folder that may not be looked into is not a missing one.
    let here = |mount: &&Path| match fs::metadata(mount.join("uprobe_events")) {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    };
    mounts.find(here).ok_or_else(|| {
        let problem =
            "tracefs is not mounted; `mount -t tracefs nodev /sys/kernel/tracing` does it";
        io::Error::new(io::ErrorKind::NotFound, problem)
    })
}

impl Definition {
    fn new(mount: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (pid, number) = (Pid::this(), NEXT.fetch_add(1, Ordering::Relaxed));
        let start = start_time(pid.as_raw()).unwrap_or_default();
        Self {
            mount: mount.to_owned(),
            name: format!("p{pid}_{start}_{number}"),
        }
    }

    /// Writes it.
    fn define(&self, path: &str, probes: &[Placed]) -> io::Result<()> {
        let events = self.mount.join("uprobe_events");
        let mut file = OpenOptions::new().append(true).open(events)?;
        let mut text = String::new();
        for probe in probes {
            // Writing to a string does not fail.
            let _ = writeln!(text, "p:{GROUP}/{} {path}:{:#x}", self.name, probe.offset.0);
            if text.len() > CHUNK {
                file.write_all(text.as_bytes())?;
                text.clear();
            }
        }
        file.write_all(text.as_bytes())
    }

    /// The number by which the event is opened.
    fn number(&self) -> io::Result<u64> {
        let id = self
            .mount
            .join("events")
            .join(GROUP)
            .join(&self.name)
            .join("id");
        fs::read_to_string(id)?
            .trim()
            .parse()
            .map_err(io::Error::other)
    }
}

impl Drop for Definition {
    fn drop(&mut self) {
        remove(&self.mount, &self.name);
    }
}

impl Drop for TraceEvent {
    fn drop(&mut self) {
        // Detached before the definition is removed: a definition in use stays.
        drop(self.event.take());
    }
}

/// Removes an event of our group. One in use stays (EBUSY).
fn remove(mount: &Path, name: &str) {
    let events = OpenOptions::new()
        .append(true)
        .open(mount.join("uprobe_events"));
    let line = format!("-:{GROUP}/{name}\n");
    // There is nobody to tell: the definition alone does no harm.
    let _ = events.and_then(|mut events| events.write_all(line.as_bytes()));
}

/// Removes what killed processes have left.
fn remove_stale(mount: &Path) {
    let entries = fs::read_dir(mount.join("events").join(GROUP));
    for entry in entries.into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if owner(&name).is_some_and(|(pid, start)| start_time(pid) != Some(start)) {
            remove(mount, &name);
        }
    }
}

/// Process id and start time out of a name of ours.
fn owner(name: &str) -> Option<(i32, u64)> {
    let mut parts = name.strip_prefix('p')?.split('_');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// When a process started, in ticks since the machine did: field 22 of /proc/<pid>/stat.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is in brackets and may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_events_name_says_whose_it_is() {
        let start = start_time(Pid::this().as_raw()).unwrap();
        let definition = Definition {
            mount: PathBuf::from("/nowhere"),
            name: format!("p{}_{start}_0", Pid::this()),
        };
        assert_eq!(owner(&definition.name), Some((Pid::this().as_raw(), start)));
        assert_eq!(owner("enable"), None);
        assert_eq!(owner("p12_x_1"), None);
    }
}
