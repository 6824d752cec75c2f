//! The file that a target runs, opened once: what is parsed is what is probed.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::TargetError;

/// An executable file: its descriptor, its bytes, and the path to show for it.
#[derive(Debug)]
pub struct Executable {
    path: PathBuf,
    file: File,
    map: Option<Mmap>,
}

impl Executable {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// [`TargetError::Open`] if it cannot be read, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self, TargetError> {
        Self::open_as(path, path.to_owned())
    }

    /// Opens the file at `path`, which is to be shown as `shown`.
    pub(super) fn open_as(path: &Path, shown: PathBuf) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Open {
            path: shown.clone(),
            source,
        };
        // Without blocking: a FIFO would wait for a writer.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() {
            let what = if kind.is_dir() {
                "it is a folder, not a file"
            } else if kind.is_fifo() {
                "it is a pipe, not a file"
            } else {
                "it is not a regular file"
            };
            return Err(failed(std::io::Error::other(what)));
        }
        let file = File::open(path).map_err(failed)?;
        let empty = file.metadata().map_err(failed)?.len() == 0;
        let map = if empty {
            None
        } else {
            // SAFETY: the map is read-only and private. The one danger is that somebody truncates
            // the file meanwhile, which ends deferprof, not the target, with SIGBUS; the kernel
            // does not let a file that is being executed be written.
            Some(unsafe { Mmap::map(&file) }.map_err(failed)?)
        };
        Ok(Self {
            path: shown,
            file,
            map,
        })
    }

    /// The file's inode number.
    pub(super) fn inode(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt as _;
        self.file.metadata().ok().map(|metadata| metadata.ino())
    }

    /// The path to show; not to open again.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl AsFd for Executable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
