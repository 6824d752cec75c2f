//! The data model: what is saved, and all that a report knows.
//!
//! A [`Profile`] is made by [`Profile::new`] from what an engine measured, or read again from a
//! file by [`Profile::from_json`]. A [`Scan`] is what a binary says about its defers without
//! running. Both are written as JSON by [`crate::report`]; `docs/profile-format.md` explains the
//! fields. What was not measured is `None` (`null` in the file), never 0.

mod build;
mod load;
mod model;
mod scan;
mod site;
mod words;

pub use build::{RawStack, Recording, SiteCount};
/// A point in time, written as RFC 3339.
pub use jiff::Timestamp;
pub use load::{FILE_LIMIT, LoadError};
pub use model::{
    Engine, Histogram, Latency, LinkKind, Loss, Overhead, Panics, Pool, Profile, ProfileSite, Ran,
    Runtime, Stack, StackFrame, Target, Totals, Window,
};
pub use scan::{Scan, ScanBinary, ScanProbe, ScanSite};
pub use site::SiteInfo;
pub(crate) use words::MECHANISMS;
pub use words::WhyNotOpenCoded;
