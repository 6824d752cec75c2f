//! What deferprof may do here.

use std::{fs, path::Path};

use nix::unistd::Uid;
use serde::Serialize;

use crate::engine::Capability;

/// Who deferprof runs as, and where.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Permissions {
    /// The effective user id.
    pub user: u32,
    /// The effective capabilities of those that can matter.
    pub capabilities: Vec<&'static str>,
    /// Those that can matter and are missing.
    pub missing_capabilities: Vec<&'static str>,
    /// The container it runs in, if that shows.
    pub container: Option<String>,
    /// Whether it is in the first pid namespace, so that it sees all processes.
    pub initial_pid_namespace: bool,
}

impl Permissions {
    pub(super) fn gather() -> Self {
        let effective = Capability::effective().unwrap_or(0);
        let (has, has_not): (Vec<_>, Vec<_>) = Capability::ALL
            .into_iter()
            .partition(|capability| capability.is_in(effective));
        let names = |list: Vec<Capability>| list.iter().map(|one| one.as_str()).collect();
        Self {
            user: Uid::effective().as_raw(),
            capabilities: names(has),
            missing_capabilities: names(has_not),
            container: container(),
            initial_pid_namespace: crate::engine::in_initial_pid_namespace(),
        }
    }
}

/// The name of the container runtime, from the marks that they leave.
fn container() -> Option<String> {
    let environment = fs::read("/proc/1/environ").unwrap_or_default();
    let named = environment
        .split(|byte| *byte == 0)
        .find_map(|variable| variable.strip_prefix(b"container="));
    if let Some(name) = named.filter(|name| !name.is_empty()) {
        return Some(String::from_utf8_lossy(name).into_owned());
    }
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let marks = [
        ("docker", Path::new("/.dockerenv").exists()),
        ("podman", Path::new("/run/.containerenv").exists()),
        ("kubernetes", groups.contains("kubepods")),
        ("docker", groups.contains("/docker")),
        ("lxc", groups.contains("/lxc")),
    ];
    let (name, _) = marks.into_iter().find(|(_, there)| *there)?;
    Some(name.to_owned())
}
