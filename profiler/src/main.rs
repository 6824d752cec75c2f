//! The `deferprof` command.

fn main() -> std::process::ExitCode {
    deferprof::cli::main()
}
