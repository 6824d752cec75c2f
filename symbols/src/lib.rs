//! Bytes of a Go executable in, facts about its defers out.
//!
//! This crate answers where every `defer` statement of a compiled Go program is, how the compiler
//! implemented it, and which instruction a uprobe must sit on to count it exactly. It reads
//! pclntab, moduledata, funcdata and the machine code of just those functions that contain
//! defers. It makes no system calls, knows nothing of processes, and treats every byte as
//! untrusted: it returns errors, it does not panic.
//!
//! ```no_run
//! let bytes = std::fs::read("./bin").unwrap();
//! let binary = deferprof_symbols::Binary::parse(&bytes)?;
//! for site in binary.inventory()?.sites {
//!     println!("{} {} {}", site.id, site.mechanism, site.registration.offset);
//! }
//! # Ok::<(), deferprof_symbols::Error>(())
//! ```
#![forbid(unsafe_code)]

mod address;
mod binary;
mod blocks;
mod buildinfo;
mod bytes;
mod callee;
mod calls;
mod code;
mod decode;
mod dwarf;
mod elf;
mod error;
mod flow;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod inventory;
mod module;
mod pclntab;
mod placement;
mod plan;
mod reason;
mod release;
mod runtime;
mod selfcheck;
mod sites;

pub use address::{FileOffset, VirtualAddress};
pub use binary::{Binary, Frame};
pub use error::{Error, Result};
pub use inventory::{
    Architecture, BinaryInfo, Entered, Exit, Inventory, Mechanism, Reason, Site, SiteId,
};
pub use plan::{Basis, InstructionKind, Probe, ProbePoint};
pub use runtime::{
    Caller, LocalPool, OpenFrame, Path, PoolEvent, PoolProbe, PoolProbes, PoolUnavailable,
    RecordAt, RunEvent, RunLayout, RunProbe, RunProbes, Runner, RunsUnavailable,
};
