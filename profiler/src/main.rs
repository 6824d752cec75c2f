//! The `deferprof` command.

fn main() {}
