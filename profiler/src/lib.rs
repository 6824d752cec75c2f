//! deferprof: a profiler for Go's `defer` in running programs.
//!
//! The data flows one way: file bytes → inventory of sites (`deferprof-symbols`) → plan →
//! [`engine`] → counters → [`profile`] → [`report`].

pub mod cli;
pub mod cost;
pub mod doctor;
pub mod engine;
pub mod profile;
pub mod rank;
pub mod report;
pub mod target;
