//! Where probed instructions are in the target's memory: for kernels that hand out no cookie, or one
//! for many probes, so that the program has to know a probe by its address.

use std::{
    fs::{self, File},
    io,
    os::{fd::BorrowedFd, linux::fs::MetadataExt as _, unix::fs::FileExt as _},
};

use deferprof_symbols::FileOffset;
use nix::unistd::Pid;

use super::points::Placed;
use crate::engine::EngineError;

/// A part of the executable in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    length: u64,
    address: u64,
}

/// The runtime address of each probe.
pub(super) fn addresses(
    executable: BorrowedFd<'_>,
    probes: &[Placed],
    pid: Pid,
) -> Result<Vec<u64>, EngineError> {
    let failed = |error| EngineError::system("find where the target's code is in memory", error);
    let file = File::from(executable.try_clone_to_owned().map_err(failed)?);
    let mut segments = mapped(&file, pid).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => EngineError::NoTarget { pid },
        _ if error.raw_os_error() == Some(nix::libc::ESRCH) => EngineError::NoTarget { pid },
        _ => failed(error),
    })?;
    if segments.is_empty() {
        // It has not executed the file yet.
        segments = linked(&file).map_err(failed)?.ok_or_else(unknown)?;
    }
    let translate = |FileOffset(offset): FileOffset| {
        segments.iter().find_map(|segment| {
            let within = offset.checked_sub(segment.offset)?;
            (within < segment.length).then(|| segment.address.wrapping_add(within))
        })
    };
    probes
        .iter()
        .map(|probe| {
            translate(probe.offset).ok_or_else(|| EngineError::InvalidProbe {
                offset: probe.offset,
                source: io::Error::other("no code of the target is there"),
            })
        })
        .collect()
}

fn unknown() -> EngineError {
    EngineError::NotSupported {
        action: "run a position-independent executable under deferprof".into(),
        reason:
            "without uprobe_multi (Linux 6.6) and with this many probes, or before Linux 5.15, \
                 its address must be known beforehand; start it, then use `deferprof attach`"
                .into(),
    }
}

/// Where the process has the file's code mapped; nowhere if it executes another file.
fn mapped(file: &File, pid: Pid) -> io::Result<Vec<Segment>> {
    let metadata = file.metadata()?;
    let (major, minor) = (
        nix::sys::stat::major(metadata.st_dev()),
        nix::sys::stat::minor(metadata.st_dev()),
    );
    // Of an overlay the maps may show another device than stat does; the inode still is the file's.
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let exact = in_maps(&maps, Some((major, minor)), metadata.st_ino());
    if exact.is_empty() {
        return Ok(in_maps(&maps, None, metadata.st_ino()));
    }
    Ok(exact)
}

/// The executable mappings of an inode, by the text of /proc/<pid>/maps.
fn in_maps(maps: &str, device: Option<(u64, u64)>, inode: u64) -> Vec<Segment> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let segment = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let executable = fields.next()?.as_bytes().get(2) == Some(&b'x');
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let place = (hex(major)?, hex(minor)?);
        let same = fields.next()?.parse() == Ok(inode) && device.is_none_or(|it| it == place);
        let (start, end) = (hex(start)?, hex(end)?);
        (executable && same).then_some(Segment {
            offset,
            length: end.checked_sub(start)?,
            address: start,
        })
    };
    maps.lines().filter_map(segment).collect()
}

/// Where an executable will be that is not position-independent; `None` of one that is.
fn linked(file: &File) -> io::Result<Option<Vec<Segment>>> {
    /// `struct elf64_hdr` and `struct elf64_phdr` (include/uapi/linux/elf.h), little-endian.
    const HEADER: usize = 64;
    const ENTRY: usize = 56;
    const ET_EXEC: u16 = 2;
    const PT_LOAD: u32 = 1;
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    if half(&header, 16) != ET_EXEC || half(&header, 54) as usize != ENTRY {
        return Ok(None);
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(half(&header, 56)) {
        let mut entry = [0; ENTRY];
        let place = long(&header, 32).wrapping_add(index * ENTRY as u64);
        file.read_exact_at(&mut entry, place)?;
        if long(&entry, 0) as u32 == PT_LOAD {
            segments.push(Segment {
                offset: long(&entry, 8),
                length: long(&entry, 32),
                address: long(&entry, 16),
            });
        }
    }
    Ok(Some(segments))
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_files_own_code_is_found_in_maps() {
        let maps = "\
00400000-00480000 r-xp 00001000 fe:01 42    /bin/x
00480000-00490000 r--p 00081000 fe:01 42    /bin/x
00500000-00510000 r-xp 00000000 fe:02 42    /bin/y
";
        let segment = Segment {
            offset: 0x1000,
            length: 0x8_0000,
            address: 0x40_0000,
        };
        assert_eq!(in_maps(maps, Some((0xfe, 1)), 42), [segment]);
        assert_eq!(in_maps(maps, None, 42).len(), 2);
        assert_eq!(in_maps(maps, None, 43), []);
    }

    #[test]
    fn our_own_code_is_where_a_function_of_ours_is() {
        let file = File::open("/proc/self/exe").unwrap();
        let here = our_own_code_is_where_a_function_of_ours_is as *const () as u64;
        let segments = mapped(&file, Pid::this()).unwrap();
        assert!(
            segments
                .iter()
                .any(|s| (s.address..s.address + s.length).contains(&here))
        );
    }
}
