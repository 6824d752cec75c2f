//! The types that deferprof and its eBPF programs share. Plain data, no dependencies: it compiles
//! for `bpfel-unknown-none` and for the host.
#![no_std]
#![forbid(unsafe_code)]
