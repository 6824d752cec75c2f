//! Why a file could not be scanned.

use thiserror::Error;

/// Why an executable's defers could not be listed. Each message is a sentence for the user.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file does not start with an ELF header.
    #[error("it is not an ELF file")]
    NotElf,
    /// The ELF structures contradict each other or the file's size.
    #[error("its ELF structure is damaged: {0}")]
    DamagedElf(String),
    /// A 32-bit or big-endian ELF file.
    #[error("it is a {0} ELF file, and deferprof knows only 64-bit little-endian ones")]
    WrongClass(&'static str),
    /// A machine that is neither x86-64 nor arm64.
    #[error("it is built for {0}, and deferprof knows only amd64 and arm64")]
    WrongMachine(String),
    /// Neither an executable nor a shared object.
    #[error("it is {0}, not an executable")]
    NotExecutable(&'static str),
    /// No pclntab: not built by the Go toolchain (gc).
    #[error("it is not a Go binary: it has no Go function table (pclntab)")]
    NotGo,
    /// UPX or the like.
    #[error("it is packed with {0}: unpack it first (`{1}`)")]
    Packed(&'static str, &'static str),
    /// garble or the like.
    #[error("it is an obfuscated Go binary: {0}, so its defers cannot be found")]
    Obfuscated(String),
    /// A structure of the Go runtime is damaged or cut off.
    #[error("its {structure} is damaged: {problem}")]
    Damaged {
        /// The structure: `pclntab`, `moduledata`, …
        structure: &'static str,
        /// What contradicts what.
        problem: String,
    },
    /// A release that the tables do not cover.
    #[error("it was built by {version}, and this deferprof knows {known}")]
    UnknownRelease {
        /// The release as the binary names it.
        version: String,
        /// The range that is known.
        known: &'static str,
    },
    /// A release newer than the tables, which is not as they say.
    #[error(
        "it was built by {version}, which is newer than this deferprof knows ({known}), and \
         differs: {problem}"
    )]
    NewRelease {
        /// The release as the binary names it.
        version: String,
        /// The range that is known.
        known: &'static str,
        /// What differs.
        problem: String,
    },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Shorthand for [`Error::Damaged`].
pub(crate) fn damaged(structure: &'static str, problem: impl Into<String>) -> Error {
    Error::Damaged {
        structure,
        problem: problem.into(),
    }
}
