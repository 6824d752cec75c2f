//! What can go wrong with an engine, and what to do about it.

use std::{fmt, io};

use deferprof_symbols::FileOffset;
use nix::unistd::{Pid, Uid};

/// Why an engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The kernel forbids it to this process.
    #[error("deferprof is not permitted to {action} ({source}). {explanation}")]
    NotPermitted {
        /// What it tried.
        action: String,
        /// What is missing, the present setting, and the fix: whole sentences.
        explanation: Box<Permission>,
        /// What the kernel said.
        source: io::Error,
    },
    /// This kernel cannot do it.
    #[error("this system cannot {action}: {reason}")]
    NotSupported {
        /// What was asked of it.
        action: String,
        /// What it lacks, and since when it could have it.
        reason: String,
    },
    /// The kernel refuses to put a probe on an instruction.
    #[error("the kernel refuses a probe on the instruction at file offset {offset}: {source}")]
    InvalidProbe {
        /// Which one.
        offset: FileOffset,
        /// What the kernel said.
        source: io::Error,
    },
    /// A probe that names a site the request has no room for.
    #[error("the probe at file offset {offset} is for site {site}, but there are {sites} sites")]
    UnknownSite {
        /// The probe.
        offset: FileOffset,
        /// Its site.
        site: u32,
        /// How many the request says there are.
        sites: u32,
    },
    /// There is no such process, or no longer.
    #[error("there is no process {pid}: it has ended, or deferprof runs in another pid namespace")]
    NoTarget {
        /// The target.
        pid: Pid,
    },
    /// The verifier refuses the program: a bug of deferprof, or a kernel that it was not tried on.
    #[error(
        "the kernel refuses the eBPF program `{program}` ({source}). The end of its reasons: {log}"
    )]
    Rejected {
        /// Which one.
        program: String,
        /// The last lines of the verifier's log.
        log: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The object with the eBPF programs is damaged.
    #[error("the eBPF object {origin} cannot be used: {reason}")]
    Object {
        /// Where it comes from.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The probes did not count what they must: this kernel's uprobes cannot be trusted.
    #[error(
        "the self-test failed: a loop of deferprof's own executed {expected} times, and its probe counted {counted}"
    )]
    SelfTest {
        /// How often the loop ran.
        expected: u64,
        /// How often the probe said it did.
        counted: u64,
    },
    /// A system call failed for another reason.
    #[error("deferprof could not {action}: {source}")]
    System {
        /// What it tried.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl EngineError {
    /// The error of a system call that failed for no reason of its own.
    pub(crate) fn system(action: impl Into<String>, source: io::Error) -> Self {
        Self::System {
            action: action.into(),
            source,
        }
    }

    /// The error of a system call that the kernel forbade.
    pub(crate) fn not_permitted(
        action: impl Into<String>,
        needed: &'static [Capability],
        source: io::Error,
    ) -> Self {
        Self::NotPermitted {
            action: action.into(),
            explanation: Box::new(Permission::now(needed)),
            source,
        }
    }
}

/// A capability that deferprof may need (include/uapi/linux/capability.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Capability {
    /// `CAP_BPF`, Linux 5.8: before, `CAP_SYS_ADMIN`.
    Bpf = 39,
    /// `CAP_PERFMON`, Linux 5.8: before, `CAP_SYS_ADMIN`.
    Perfmon = 38,
    /// `CAP_SYS_ADMIN`, which stands for both as well.
    SysAdmin = 21,
    /// `CAP_SYS_PTRACE`: looks into processes of other users.
    SysPtrace = 19,
    /// `CAP_SYS_RESOURCE`: raises limits.
    SysResource = 24,
}

impl Capability {
    /// All that can matter.
    pub const ALL: [Self; 5] = [
        Self::Bpf,
        Self::Perfmon,
        Self::SysAdmin,
        Self::SysPtrace,
        Self::SysResource,
    ];

    /// The effective set of this process, a mask.
    pub fn effective() -> Option<u64> {
        effective_capabilities(&std::fs::read_to_string("/proc/self/status").ok()?)
    }

    /// Its name as setcap(8) takes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bpf => "cap_bpf",
            Self::Perfmon => "cap_perfmon",
            Self::SysAdmin => "cap_sys_admin",
            Self::SysPtrace => "cap_sys_ptrace",
            Self::SysResource => "cap_sys_resource",
        }
    }

    /// Whether the set, a mask as in /proc/self/status, grants it.
    pub fn is_in(self, set: u64) -> bool {
        let has = |capability: Self| set >> (capability as u32) & 1 == 1;
        has(self) || (matches!(self, Self::Bpf | Self::Perfmon) && has(Self::SysAdmin))
    }
}

/// What this process would need, what it has, and how to give it the rest.
#[derive(Clone, Debug)]
pub struct Permission {
    needed: &'static [Capability],
    effective: Option<u64>,
    user: Uid,
    unprivileged_bpf: Option<String>,
    perf_paranoid: Option<String>,
    lockdown: Option<String>,
    executable: String,
}

impl Permission {
    /// What holds for this process now.
    pub(crate) fn now(needed: &'static [Capability]) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            needed,
            effective: effective_capabilities(&status),
            user: Uid::effective(),
            unprivileged_bpf: setting("/proc/sys/kernel/unprivileged_bpf_disabled"),
            perf_paranoid: setting("/proc/sys/kernel/perf_event_paranoid"),
            lockdown: setting("/sys/kernel/security/lockdown"),
            executable: std::env::current_exe()
                .map_or_else(|_| "deferprof".into(), |path| path.display().to_string()),
        }
    }

    /// The needed capabilities that this process has not.
    pub fn missing(&self) -> Vec<Capability> {
        let effective = self.effective.unwrap_or(0);
        let needed = self.needed.iter().copied();
        needed.filter(|needed| !needed.is_in(effective)).collect()
    }

    /// The command that gives this executable what it lacks.
    pub fn fix(&self) -> Option<String> {
        let (needed, executable) = (list(self.needed), &self.executable);
        (!self.missing().is_empty()).then(|| format!("sudo setcap {needed}+ep {executable}"))
    }
}

/// A file of /proc or /sys that holds one value.
pub(crate) fn setting(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn list(capabilities: &[Capability]) -> String {
    let names: Vec<_> = capabilities.iter().map(|one| one.as_str()).collect();
    names.join(",")
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missing = self.missing();
        let unknown = || "unknown".to_owned();
        write!(
            f,
            "It runs as user {} with the capabilities {}; kernel.unprivileged_bpf_disabled is {}, kernel.perf_event_paranoid is {}. ",
            self.user,
            self.effective
                .map_or_else(unknown, |set| format!("{set:#x}")),
            self.unprivileged_bpf.clone().unwrap_or_else(unknown),
            self.perf_paranoid.clone().unwrap_or_else(unknown),
        )?;
        if let Some(fix) = self.fix() {
            return write!(
                f,
                "It lacks {}. Run it as root (`sudo`), or allow it once and for all: `{fix}`.",
                list(&missing),
            );
        }
        write!(f, "It has the capabilities it needs, so ")?;
        match &self.lockdown {
            Some(lockdown) if lockdown.contains("[confidentiality]") => write!(
                f,
                "the kernel's lockdown forbids it (/sys/kernel/security/lockdown: {lockdown}); boot without lockdown=confidentiality."
            ),
            _ => write!(
                f,
                "a seccomp filter or a security module forbids it; in a container, run it with --privileged, or with --security-opt seccomp=unconfined and --cap-add for {}.",
                list(self.needed),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permission(effective: u64, lockdown: &str) -> Permission {
        Permission {
            needed: &[Capability::Bpf, Capability::Perfmon],
            effective: Some(effective),
            user: Uid::from_raw(1000),
            unprivileged_bpf: Some("2".into()),
            perf_paranoid: Some("3".into()),
            lockdown: Some(lockdown.into()),
            executable: "/usr/bin/deferprof".into(),
        }
    }

    #[test]
    fn a_missing_capability_is_named_with_the_setting_and_the_fix() {
        let text = permission(1 << 39, "[none]").to_string();
        assert_eq!(
            text,
            "It runs as user 1000 with the capabilities 0x8000000000; \
             kernel.unprivileged_bpf_disabled is 2, kernel.perf_event_paranoid is 3. \
             It lacks cap_perfmon. Run it as root (`sudo`), or allow it once and for all: \
             `sudo setcap cap_bpf,cap_perfmon+ep /usr/bin/deferprof`."
        );
    }

    #[test]
    fn the_old_capability_stands_for_the_new_ones() {
        assert!(permission(1 << 21, "").missing().is_empty());
    }

    #[test]
    fn with_all_capabilities_it_is_lockdown_or_seccomp() {
        let all = u64::MAX;
        assert!(
            permission(all, "none [confidentiality]")
                .to_string()
                .contains("lockdown")
        );
        assert!(permission(all, "[none]").to_string().contains("seccomp"));
    }

    #[test]
    fn capabilities_are_read_from_the_status_file() {
        assert_eq!(
            effective_capabilities("Name:\tx\nCapEff:\t00000000000000ff\n"),
            Some(255)
        );
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }
}
