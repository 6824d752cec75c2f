//! How errors leave the program: one chain of sentences, and an exit status.

use std::io;

use deferprof_symbols::Error as SymbolsError;

use crate::engine::EngineError;
use crate::target::TargetError;

/// Exit statuses, which are an interface.
pub const FAILED: u8 = 1;
/// Bad usage.
pub const USAGE: u8 = 2;
/// Not permitted, or not supported here.
pub const UNAVAILABLE: u8 = 3;

/// Bad usage that clap could not see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The exit status for an error.
pub fn status(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if cause.is::<UsageError>() {
            return USAGE;
        }
        if let Some(error) = cause.downcast_ref::<EngineError>() {
            return match error {
                EngineError::NotPermitted { .. } | EngineError::NotSupported { .. } => UNAVAILABLE,
                _ => FAILED,
            };
        }
        if let Some(error) = cause.downcast_ref::<TargetError>() {
            return match error {
                TargetError::NotPermitted { .. } => UNAVAILABLE,
                TargetError::Open { source, .. } | TargetError::Execute { source, .. }
                    if source.kind() == io::ErrorKind::PermissionDenied =>
                {
                    UNAVAILABLE
                }
                _ => FAILED,
            };
        }
        if let Some(error) = cause.downcast_ref::<SymbolsError>() {
            return match error {
                SymbolsError::WrongClass(_)
                | SymbolsError::WrongMachine(_)
                | SymbolsError::UnknownRelease { .. }
                | SymbolsError::NewRelease { .. }
                | SymbolsError::Obfuscated(_)
                | SymbolsError::Packed(..) => UNAVAILABLE,
                _ => FAILED,
            };
        }
    }
    FAILED
}

/// Whether it is a reader that went away, as `deferprof … | head` does: no error.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}
