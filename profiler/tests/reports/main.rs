//! Tests of the saved profile and of every report.

mod common;
mod golden;
mod load;
mod pprof;
mod properties;
mod rank;
