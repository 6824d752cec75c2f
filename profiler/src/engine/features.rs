//! What of the engine works on this machine, as data: `doctor` prints it.

use super::{EngineError, LinkKind, ebpf};

/// Whether this kernel hands each probe's cookie to the program (Linux 5.15).
pub fn cookies() -> bool {
    ebpf::has_cookies()
}

/// Whether a kernel, by its release, applies the pid filter of uprobe_multi links to one thread
/// instead of the whole process: 6.6.0–6.6.34, 6.7, 6.8, 6.9.0–6.9.4.
pub fn pid_filter_bug(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    let mut next = || numbers.next().unwrap_or(0);
    match (next(), next(), next()) {
        (6, 6, patch) => patch <= 34,
        (6, 7 | 8, _) => true,
        (6, 9, patch) => patch <= 4,
        _ => false,
    }
}

/// What one way to attach probes needs, tried on this kernel.
#[derive(Debug)]
pub struct LinkSupport {
    /// Which way.
    pub kind: LinkKind,
    /// Whether it works, or why not and what to do about it.
    pub result: Result<(), EngineError>,
}

/// Tries every kind of link, the best first. It takes about a millisecond and attaches nothing.
pub fn links() -> Vec<LinkSupport> {
    LinkKind::ALL
        .map(|kind| LinkSupport {
            kind,
            result: ebpf::supports(kind),
        })
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_with_the_bug_of_the_pid_filter() {
        for release in [
            "6.6.0",
            "6.6.34-rt",
            "6.7.12",
            "6.8.0-31-generic",
            "6.9.4",
            "6.6",
        ] {
            assert!(pid_filter_bug(release), "{release}");
        }
        for release in [
            "6.1.0-56-cloud-amd64",
            "6.6.35",
            "6.9.5",
            "6.10.0",
            "5.10.0",
            "7.3.4",
            "",
        ] {
            assert!(!pid_filter_bug(release), "{release}");
        }
    }
}
