//! One Go executable, opened for questions.

use std::sync::OnceLock;

use crate::buildinfo::BuildInfo;
use crate::callee::text;
use crate::dwarf::Members;
use crate::elf::Image;
use crate::error::damaged;
use crate::module::Module;
use crate::pclntab::Pclntab;
use crate::release::{KNOWN, Layout, Release};
use crate::sites::Search;
use crate::{
    Architecture, BinaryInfo, Error, FileOffset, Inventory, Mechanism, PoolProbes, PoolUnavailable,
    Result, RunProbes, RunsUnavailable, Site, VirtualAddress, pclntab, reason, runtime,
};

/// A Go executable whose headers, release and function table have been found.
/// It borrows the file's bytes and copies nothing large.
#[derive(Debug)]
pub struct Binary<'data> {
    bytes: &'data [u8],
    image: Image<'data>,
    build: BuildInfo,
    release: Release,
    /// Whether the release is not named, but what the runtime's functions tell.
    is_guessed: bool,
    /// Whether the function table has a magic number of Go's.
    is_marked: bool,
    module: Module<'data>,
    /// Read when first needed.
    members: OnceLock<Members>,
}

/// One frame of source code at an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Function name as pclntab has it.
    pub function: String,
    /// Source file.
    pub file: String,
    /// Line; 0 if pclntab has none.
    pub line: u32,
    /// The line on which the function starts (since 1.20), otherwise 0, also for inlined frames.
    pub start_line: u32,
}

/// The release by the names of the runtime's functions, which garble leaves as they are.
fn runtime_release<'data>(
    image: &Image<'data>,
    location: pclntab::Location<'data>,
) -> Option<Release> {
    // Names and functions stand at the same places in all tables that garble knows.
    let layout = Layout::all().iter().rfind(|layout| {
        let is_of_table = |magic| layout.magic == magic;
        location.magic.is_none_or(is_of_table)
    });
    let table = Pclntab::new(location, layout?).ok()?;
    let functions = (0..table.count).filter_map(|index| table.func(image, index));
    Release::of_runtime(functions.filter_map(|func| table.runtime_name(func)))
}

impl<'data> Binary<'data> {
    /// Reads headers, build info and tables.
    ///
    /// # Errors
    /// [`Error`] says what is wrong with the file: not ELF, not Go, damaged, of an
    /// unknown release or architecture.
    pub fn parse(bytes: &'data [u8]) -> Result<Self> {
        let image = Image::parse(bytes)?;
        let build = BuildInfo::find(&image);
        let location = pclntab::locate(&image)
            // What only looks like a table is none without build info.
            .filter(|location| location.magic.is_some() || build.is_some())
            .ok_or_else(|| pclntab::missing(&image, bytes, build.is_some()))?;
        let build = build.or_else(|| {
            /// The last that leaves build info out of anything.
            const LAST_WITHOUT: u16 = 19;
            let is_of_table = |layout: &Layout| Some(layout.magic) == location.magic;
            let fits = |version: &str| {
                let release = Release::parse(version).filter(|r| r.minor <= LAST_WITHOUT);
                // One older than the table is refused as such.
                let layout = release.map(|release| Layout::of(release, version));
                layout.is_some_and(|layout| layout.map_or(true, is_of_table))
            };
            BuildInfo::of_variable(&image, bytes, fits)
        });
        let mut build = build.ok_or_else(|| {
            let problem = "it is missing, and nothing else names one Go release for certain: Go 1.12 and older \
                           wrote none";
            damaged("build info", problem)
        })?;
        let named = Release::parse(&build.version);
        // What garble writes there.
        if named.is_none() && build.version.trim_end() != "unknown" {
            let problem = format!("it names no Go release: {:?}", build.version);
            return Err(damaged("build info", problem));
        }
        let release = named
            .or_else(|| runtime_release(&image, location))
            .ok_or_else(|| {
                let problem =
                    "its build info names no Go release, nor do the runtime's functions tell one";
                Error::Obfuscated(problem.into())
            })?;
        if named.is_none() {
            build.version = release.to_string();
        }
        // garble names no release where it changes the magic number.
        if named.is_some() && location.magic.is_none() {
            let problem = "its magic number is not one of Go's";
            return Err(if release.is_newer_than_known() {
                Error::NewRelease {
                    version: build.version,
                    known: KNOWN,
                    problem: format!("of its function table {problem}"),
                }
            } else {
                damaged("pclntab", problem)
            });
        }
        let layout = Layout::of(release, &build.version)?;
        let module = Module::find(&image, location, layout)?;
        Ok(Self {
            bytes,
            image,
            build,
            release,
            is_guessed: named.is_none(),
            is_marked: location.magic.is_some(),
            module,
            members: OnceLock::new(),
        })
    }

    /// Lists every defer site. Decodes only functions that contain defers.
    ///
    /// # Errors
    /// [`Error::NewRelease`] if the binary is of a release that is newer than the tables and not as
    /// they say, [`Error::Obfuscated`] if it names none and is not as the one that it seems to be of.
    /// What could not be followed is in [`Inventory::warnings`].
    pub fn inventory(&self) -> Result<Inventory> {
        let optimizations_off = reason::optimizations_off(&self.build);
        let search = Search {
            image: &self.image,
            module: &self.module,
            release: self.release,
            optimizations_off,
        };
        let (sites, mut warnings) = search.run();
        if self.release.is_newer_than_known() {
            let version = self.build.version.clone();
            // Of a release that is known a warning is about one function; here it may be the layout.
            if let Some(problem) = search
                .difference(&sites)
                .or_else(|| warnings.first().cloned())
            {
                return Err(Error::NewRelease {
                    version,
                    known: KNOWN,
                    problem,
                });
            }
            warnings.push(format!(
                "{version} is newer than this deferprof knows ({KNOWN}), but looks the same"
            ));
        }
        if self.is_guessed {
            if let Some(problem) = search.difference(&sites) {
                return Err(Error::Obfuscated(problem));
            }
            let or_newer = if self.may_be_newer() { " or newer" } else { "" };
            let release = self.release;
            warnings.push(if self.is_marked {
                format!("it names no Go release: by its functions it is of {release}{or_newer}")
            } else {
                format!(
                    "it is obfuscated: names and lines are not those of its source, and by its functions it is of \
                     {release}{or_newer}"
                )
            });
        }
        if self.release.knows_only_the_heap() {
            warnings.push(format!(
                "{} is older than 1.13: what is said of it is best effort, and checked with few programs",
                self.build.version
            ));
        }
        let unoptimized = optimizations_off
            && !sites
                .iter()
                .any(|s| s.mechanism == Mechanism::OpenCoded && s.function.starts_with("main."));
        let binary = BinaryInfo {
            go_version: self.build.version.clone(),
            architecture: self.image.architecture,
            build_id: self.image.build_id.map(text),
            pie: self.image.pie,
            stripped: self.image.stripped,
            optimized: !unoptimized,
        };
        Ok(Inventory {
            binary,
            sites,
            warnings,
        })
    }

    /// The probes that tell where heap records came from.
    ///
    /// # Errors
    /// Why this binary's runtime does not tell.
    pub fn pool_probes(&self) -> std::result::Result<PoolProbes, PoolUnavailable> {
        if self.may_be_newer() {
            return Err(PoolUnavailable::Release(self.perhaps_newer()));
        }
        runtime::pool(&self.image, &self.module, self.release, self.members())
    }

    /// The probes that tell when and by whom the deferred calls of `sites` are made; sites are
    /// numbered by their place in that slice.
    ///
    /// # Errors
    /// Why this binary's runtime does not tell.
    pub fn run_probes(&self, sites: &[Site]) -> std::result::Result<RunProbes, RunsUnavailable> {
        if self.may_be_newer() {
            return Err(RunsUnavailable::Release(self.perhaps_newer()));
        }
        let members = self.members();
        runtime::runs(&self.image, &self.module, self.release, members, sites)
    }

    /// Whether it may be of a release newer than the table without saying so: then offsets in the
    /// runtime's structures are not to be relied on.
    fn may_be_newer(&self) -> bool {
        self.is_guessed && self.release.is_newest_or_newer()
    }

    fn perhaps_newer(&self) -> String {
        format!("what may be newer than {}", self.release)
    }

    fn members(&self) -> &Members {
        self.members.get_or_init(|| Members::read(self.bytes))
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn parts(&self) -> (&Image<'data>, &Module<'data>) {
        (&self.image, &self.module)
    }

    /// The Go release as the binary names it; without the patch release where only its functions tell it.
    pub fn go_version(&self) -> &str {
        &self.build.version
    }

    /// The instruction set.
    pub fn architecture(&self) -> Architecture {
        self.image.architecture
    }

    /// The Go build id.
    pub fn build_id(&self) -> Option<String> {
        self.image.build_id.map(text)
    }

    /// The source frames at `address`, innermost first, inlined calls expanded; empty if it is not
    /// Go code of this binary. For a return address ask for the byte before it.
    pub fn frames(&self, address: VirtualAddress) -> Vec<Frame> {
        let table = &self.module.table;
        if address < self.module.text || address >= self.module.etext {
            return Vec::new();
        }
        let Some(func) = table.find(&self.image, address) else {
            return Vec::new();
        };
        let tree = self.module.inline_tree(&self.image, func);
        let mut frames = Vec::new();
        let mut at = address;
        let mut frame = |name: &[u8], at, start_line| {
            frames.push(Frame {
                function: text(name),
                file: table.file(func, at).map(text).unwrap_or_default(),
                line: table.line(func, at),
                start_line,
            });
        };
        for (name, parent) in table.inlined(func, address, tree) {
            frame(name, at, 0);
            at = parent;
        }
        let start_line = table.start_line(func).unwrap_or(0);
        frame(table.name(func).unwrap_or_default(), at, start_line);
        frames
    }

    /// The address at which the byte at a file offset is mapped executable.
    pub fn address_of(&self, offset: FileOffset) -> Option<VirtualAddress> {
        self.image.address_of(offset)
    }
}
