//! What stays in the kernel, seen from outside the engine.

use std::{fs, os::fd::FromRawFd as _, os::fd::OwnedFd, thread, time::Duration};

use deferprof::engine::{LinkChoice, LinkKind, More, Request, Session};
use nix::{libc, unistd::Pid};

use crate::target::{self, Place};

/// The ids of the BPF links that a process holds, from its descriptors (Linux 5.8).
pub fn links_of(pid: Pid) -> Vec<u32> {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let mut ids: Vec<_> = infos
        .filter_map(|info| {
            let text = fs::read_to_string(info.ok()?.path()).ok()?;
            let id = text
                .lines()
                .find_map(|line| line.strip_prefix("link_id:"))?;
            id.trim().parse().ok()
        })
        .collect();
    ids.sort_unstable();
    ids
}

/// How many trace events the kernel has that a process has defined.
pub fn events_of(pid: Pid) -> usize {
    let mounts = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    let mount = mounts
        .into_iter()
        .find(|mount| fs::exists(format!("{mount}/events")).unwrap_or(false));
    let events = mount.map(|mount| fs::read_dir(format!("{mount}/events/deferprof")));
    let own = format!("p{pid}_");
    let names = events.into_iter().flatten().flatten().flatten();
    names
        .filter(|event| event.file_name().to_string_lossy().starts_with(&own))
        .count()
}

/// Whether the kernel has a BPF link of that id: BPF_LINK_GET_FD_BY_ID (Linux 5.8).
pub fn link_exists(id: u32) -> bool {
    const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
    let mut attribute = [id, 0, 0];
    // SAFETY: the command reads the id and two zeros.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_GET_FD_BY_ID,
            attribute.as_mut_ptr(),
            size_of_val(&attribute),
        )
    };
    if fd >= 0 {
        // SAFETY: the kernel has just returned it, and nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    fd >= 0
}

/// The second process as another deferprof. The mode is a kind of link and a process.
pub fn attach_until_killed(mode: &str) {
    let (kind, pid) = mode.split_once(' ').unwrap();
    let kind = LinkKind::ALL
        .into_iter()
        .find(|one| one.as_str() == kind)
        .unwrap();
    let executable = fs::File::open("/proc/self/exe").unwrap();
    let probes = [super::probe(Place::Leaf, 0), super::probe(Place::CallA, 0)];
    let session = Session::attach(&Request {
        executable: std::os::fd::AsFd::as_fd(&executable),
        pid: Pid::from_raw(pid.parse().unwrap()),
        probes: &probes,
        sites: 1,
        stacks: None,
        link: LinkChoice::Only(kind),
        sites_cost: &[],
        more: More::default(),
    });
    let _session = session.unwrap();
    target::say("ready");
    loop {
        thread::sleep(Duration::from_secs(60));
    }
}
