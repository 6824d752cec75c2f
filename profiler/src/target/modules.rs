//! Which Go code a process runs: its executable's, or that of a library it has loaded
//! (`-buildmode=c-shared` in a program that is not Go, `-buildmode=plugin` in one that is).

use std::fs;
use std::path::{Path, PathBuf};

use deferprof_symbols::{Binary, Error};

use super::{Executable, Process, TargetError};

/// The Go module of a process that is to be profiled.
#[derive(Debug)]
pub struct GoModule {
    /// Its file.
    pub file: Executable,
    /// The process's other Go modules, which are not profiled.
    pub others: Vec<PathBuf>,
}

/// A file that a process has mapped for execution: a line of `/proc/PID/maps`.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    /// As the name in `/proc/PID/map_files`.
    range: String,
    inode: u64,
    path: PathBuf,
}

impl GoModule {
    /// The executable if it is Go, otherwise the first Go library; with `wanted` the module of that
    /// path, or of that file name. An executable that is not Go in a process without Go libraries is
    /// returned as well: what is wrong with it shows when it is parsed.
    ///
    /// # Errors
    /// [`TargetError`]: like [`Process::executable`], or no module is called `wanted`.
    pub fn of(process: &Process, wanted: Option<&Path>) -> Result<Self, TargetError> {
        let executable = process.executable()?;
        let is_go = !matches!(Binary::parse(executable.bytes()), Err(Error::NotGo));
        let mut libraries = libraries(process, &executable);
        if let Some(wanted) = wanted {
            let path = fs::canonicalize(wanted).unwrap_or_else(|_| wanted.to_owned());
            let is_wanted =
                |file: &Executable| file.path() == path || file.path().ends_with(wanted);
            if !is_wanted(&executable) {
                let at = libraries.iter().position(is_wanted);
                let at = at.ok_or_else(|| TargetError::NoModule {
                    pid: process.pid().as_raw(),
                    module: wanted.to_owned(),
                })?;
                let file = libraries.remove(at);
                libraries.extend(is_go.then_some(executable));
                return Ok(Self::new(file, &libraries));
            }
        } else if !is_go && !libraries.is_empty() {
            let file = libraries.remove(0);
            return Ok(Self::new(file, &libraries));
        }
        Ok(Self::new(executable, &libraries))
    }

    fn new(file: Executable, others: &[Executable]) -> Self {
        let others = others.iter().map(|other| other.path().to_owned());
        Self {
            file,
            others: others.collect(),
        }
    }

    /// What to say of the modules that are not profiled.
    pub fn warning(&self) -> Option<String> {
        let names: Vec<_> = self
            .others
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        (!names.is_empty()).then(|| {
            format!(
                "the process has more Go code, whose defers are not counted: {}; --module chooses",
                names.join(", ")
            )
        })
    }
}

/// The Go libraries of a process, in order of address.
fn libraries(process: &Process, executable: &Executable) -> Vec<Executable> {
    let maps = format!("/proc/{}/maps", process.pid());
    let maps = fs::read_to_string(maps).unwrap_or_default();
    let mut inodes: Vec<u64> = Vec::from_iter(executable.inode());
    let mut libraries = Vec::new();
    for mapping in maps.lines().filter_map(mapping) {
        if inodes.contains(&mapping.inode) {
            continue;
        }
        inodes.push(mapping.inode);
        if let Some(file) = open(process, &mapping)
            && Binary::parse(file.bytes()).is_ok()
        {
            libraries.push(file);
        }
    }
    libraries
}

/// Opens the mapped inode itself where that is permitted, otherwise its path if that is still the
/// same inode.
fn open(process: &Process, mapping: &Mapping) -> Option<Executable> {
    let pid = process.pid();
    // Its name is the process's; root's may be another's.
    let places = [
        format!("/proc/{pid}/map_files/{}", mapping.range),
        format!("/proc/{pid}/root{}", mapping.path.display()),
    ];
    places.iter().find_map(|place| {
        Executable::open_as(Path::new(place), mapping.path.clone())
            .ok()
            .filter(|file| file.inode() == Some(mapping.inode))
    })
}

/// Reads a line of maps: `7f…-7f… r-xp 00001000 08:01 1234   /lib/libx.so`. `None` for what is not
/// executable or no file.
fn mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (range, permissions) = (fields.next()?, fields.next()?);
    let inode = fields.nth(2)?.parse().ok().filter(|inode| *inode != 0)?;
    let path = fields.next()?.trim_start();
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    (permissions.contains('x') && path.starts_with('/')).then(|| Mapping {
        range: range.to_owned(),
        inode,
        path: path.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_read() {
        let line =
            "7f10-7f20 r-xp 00001000 08:01 1234                       /a b/libx.so (deleted)";
        assert_eq!(
            mapping(line),
            Some(Mapping {
                range: "7f10-7f20".into(),
                inode: 1234,
                path: "/a b/libx.so".into()
            })
        );
        for line in [
            "7f10-7f20 rw-p 00001000 08:01 1234      /libx.so",
            "7f10-7f20 r-xp 00000000 00:00 0         [vdso]",
            "7f10-7f20 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(mapping(line), None, "{line}");
        }
    }
}
