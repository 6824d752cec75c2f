//! What of the engine works on this machine, as data: `doctor` prints it.

use super::{EngineError, LinkKind, ebpf};

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
