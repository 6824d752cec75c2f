//! What the kernel offers.

use std::{fs, io, path::Path};

use serde::Serialize;

use super::{Link, Problem, setting};
use crate::engine::{LinkKind, features};

/// The kernel, and its settings that matter to uprobes and eBPF. `None` is unknown.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// deferprof's own architecture.
    pub architecture: &'static str,
    /// Whether it has uprobes that programs can be attached to.
    pub uprobes: bool,
    /// Whether it runs eBPF programs.
    pub bpf: bool,
    /// Whether it has type information. Not needed.
    pub btf: bool,
    /// Whether one link can hold all probes (Linux 6.6).
    pub uprobe_multi: Option<bool>,
    /// Whether it applies the pid filter of such links to one thread only (6.6.0–6.6.34, 6.7, 6.8,
    /// 6.9.0–6.9.4). Then the program filters alone.
    pub pid_filter_bug: bool,
    /// Whether it hands each probe's cookie to the program (Linux 5.15).
    pub cookies: Option<bool>,
    /// `kernel.unprivileged_bpf_disabled`
    pub unprivileged_bpf_disabled: Option<String>,
    /// `kernel.perf_event_paranoid`
    pub perf_event_paranoid: Option<String>,
    /// /sys/kernel/security/lockdown
    pub lockdown: Option<String>,
}

impl Kernel {
    pub(super) fn gather(links: &[Link]) -> Self {
        let release = setting("/proc/sys/kernel/osrelease").unwrap_or_default();
        let works = |kind: LinkKind| {
            let mut links = links.iter();
            links.any(|link| link.kind == kind.as_str() && link.works)
        };
        let any = links.iter().any(|link| link.works);
        // A kernel that refuses everything says nothing about what it could.
        let known = |value: bool| (value || any).then_some(value);
        Self {
            architecture: std::env::consts::ARCH,
            uprobes: any || Path::new("/sys/bus/event_source/devices/uprobe/type").exists(),
            bpf: any || Path::new("/proc/sys/kernel/unprivileged_bpf_disabled").exists(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            uprobe_multi: known(works(LinkKind::UprobeMulti)),
            pid_filter_bug: features::pid_filter_bug(&release),
            cookies: known(features::cookies()),
            unprivileged_bpf_disabled: setting("/proc/sys/kernel/unprivileged_bpf_disabled"),
            perf_event_paranoid: setting("/proc/sys/kernel/perf_event_paranoid"),
            lockdown: setting("/sys/kernel/security/lockdown"),
            release,
        }
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.pid_filter_bug {
            problems.push(Problem::warning(
                format!(
                    "Linux {} applies the pid filter of uprobe_multi links to one thread only, so \
                     deferprof does without it: other processes that run the same executable pay \
                     for hits too, uncounted. Linux 6.6.35, 6.9.5 and 6.10 are without this bug.",
                    self.release
                ),
                None,
            ));
        }
        if self.uprobe_multi == Some(false) {
            problems.push(Problem::warning(
                "Without uprobe_multi links (Linux 6.6) a hit costs a little more, and attaching needs \
                 tracefs, or takes time for each probe.",
                tracefs_is_missing().then(|| MOUNT_TRACEFS.to_owned()),
            ));
        }
        problems
    }
}

const MOUNT_TRACEFS: &str = "sudo mount -t tracefs nodev /sys/kernel/tracing";

/// Whether tracefs is nowhere; not, whether it is another user's.
fn tracefs_is_missing() -> bool {
    let missing = |mount: &str| {
        let file = fs::metadata(format!("{mount}/uprobe_events"));
        file.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
        .into_iter()
        .all(missing)
}
