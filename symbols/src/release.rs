//! What differs from one Go release to the next, as one table. A new release is a new row.
//!
//! Offsets are bytes on 64-bit targets. Sources: Go's `runtime/symtab.go`, `runtime/runtime2.go`,
//! `cmd/link/internal/ld/{pcln,symtab}.go` and `cmd/compile/internal/ssagen` at each release;
//! `shared/go-defer-internals.md` sections 4 and 6 has the evidence.

use std::fmt;

use crate::{Error, Result};

/// A Go release, `1.minor`; patch releases do not change layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Release {
    pub minor: u16,
}

/// The encoding of `FUNCDATA_OpenCodedDeferInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenDeferFormat {
    /// 1.14–1.17: maxargsize, bitsOff, n, then per defer its arguments too.
    WithArguments,
    /// 1.18–1.21: bitsOff, n, then a closure offset per defer.
    Slots,
    /// 1.22 on: bitsOff and the offset of slot 0; the slots follow one another.
    SlotArray,
}

/// Offsets in the fixed part of `runtime._func`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FuncLayout {
    /// Size of the fixed part: the pcdata offsets follow.
    pub size: u64,
    /// Bytes that the entry (absolute address or offset) takes: 8 or 4.
    pub entry_size: u64,
    pub name: u64,
    /// `None` before 1.12, where the tables do not tell which functions have defers.
    pub deferreturn: Option<u64>,
    pub pcsp: u64,
    pub pcfile: u64,
    pub pcln: u64,
    pub npcdata: u64,
    /// Where the index into cutab stands; `None` before compilation units had file tables.
    pub cu_offset: Option<u64>,
    pub start_line: Option<u64>,
    pub func_id: u64,
    pub nfuncdata: u64,
}

/// Offsets in `runtime.moduledata`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModuleLayout {
    /// `ftab` slice.
    pub ftab: u64,
    pub minpc: u64,
    pub text: u64,
    pub etext: u64,
    /// `gofunc`: what funcdata offsets count from (since 1.18).
    pub gofunc: Option<u64>,
}

/// Everything layout that a release fixes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// The first release of the row; it holds until the next row's.
    pub first: Release,
    /// The magic number of pclntab.
    pub magic: u32,
    pub func: FuncLayout,
    pub module: ModuleLayout,
    /// Index of `FUNCDATA_InlTree` and of `PCDATA_InlTreeIndex`; `None` up to 1.11, where the tree does
    /// not say where the calls stand.
    pub inline_tree: Option<InlineTree>,
    /// Size of one inline tree entry and where its name offset and parent pc stand.
    pub inline_entry: InlineEntry,
    /// Index and format of `FUNCDATA_OpenCodedDeferInfo`; `None` before open coding.
    pub open_defers: Option<(u32, OpenDeferFormat)>,
    /// `funcID` of compiler-made wrappers.
    pub wrapper_func_id: Option<u8>,
    /// Index of `FUNCDATA_StackObjects`; `None` where its records hold no sizes (up to 1.17).
    pub stack_objects: Option<u32>,
}

/// Where a function's inline tree is, and which part of it an address is in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InlineTree {
    pub funcdata: u32,
    pub pcdata: u32,
}

/// An entry of the inline tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InlineEntry {
    pub size: u64,
    pub name: u64,
    pub parent_pc: u64,
}

/// Until 1.11, where `nfuncdata` still was an `int32`.
const FUNC_FB_1_7: FuncLayout = FuncLayout {
    deferreturn: None,
    nfuncdata: 36,
    ..FUNC_FB
};
const FUNC_FB: FuncLayout = FuncLayout {
    size: 40,
    entry_size: 8,
    name: 8,
    deferreturn: Some(16),
    pcsp: 20,
    pcfile: 24,
    pcln: 28,
    npcdata: 32,
    cu_offset: None,
    start_line: None,
    func_id: 36,
    nfuncdata: 39,
};
const FUNC_FA: FuncLayout = FuncLayout {
    size: 44,
    cu_offset: Some(36),
    func_id: 40,
    nfuncdata: 43,
    ..FUNC_FB
};
const FUNC_F0: FuncLayout = FuncLayout {
    size: 40,
    entry_size: 4,
    name: 4,
    deferreturn: Some(12),
    pcsp: 16,
    pcfile: 20,
    pcln: 24,
    npcdata: 28,
    cu_offset: Some(32),
    start_line: None,
    func_id: 36,
    nfuncdata: 39,
};
const FUNC_F1: FuncLayout = FuncLayout {
    size: 44,
    start_line: Some(36),
    func_id: 40,
    nfuncdata: 43,
    ..FUNC_F0
};

const MODULE_FB: ModuleLayout = ModuleLayout {
    ftab: 24,
    minpc: 80,
    text: 96,
    etext: 104,
    gofunc: None,
};
const MODULE_FA: ModuleLayout = ModuleLayout {
    ftab: 128,
    minpc: 160,
    text: 176,
    etext: 184,
    gofunc: None,
};
const MODULE_F0: ModuleLayout = ModuleLayout {
    gofunc: Some(304),
    ..MODULE_FA
};
const MODULE_F1: ModuleLayout = ModuleLayout {
    gofunc: Some(320),
    ..MODULE_FA
};

const INLINE_20: InlineEntry = InlineEntry {
    size: 20,
    name: 12,
    parent_pc: 16,
};
const INLINE_16: InlineEntry = InlineEntry {
    size: 16,
    name: 4,
    parent_pc: 8,
};

const fn release(minor: u16) -> Release {
    Release { minor }
}

const fn inline_tree(funcdata: u32, pcdata: u32) -> InlineTree {
    InlineTree { funcdata, pcdata }
}

/// The table, oldest first.
const LAYOUTS: &[Layout] = &[
    Layout {
        first: release(7),
        magic: 0xffff_fffb,
        func: FUNC_FB_1_7,
        module: MODULE_FB,
        inline_tree: None,
        inline_entry: INLINE_20,
        open_defers: None,
        wrapper_func_id: None,
        stack_objects: None,
    },
    Layout {
        first: release(12),
        magic: 0xffff_fffb,
        func: FUNC_FB,
        module: MODULE_FB,
        inline_tree: Some(inline_tree(2, 1)),
        inline_entry: INLINE_20,
        open_defers: None,
        wrapper_func_id: Some(20),
        stack_objects: None,
    },
    Layout {
        first: release(13),
        magic: 0xffff_fffb,
        func: FUNC_FB,
        module: MODULE_FB,
        inline_tree: Some(inline_tree(4, 2)),
        inline_entry: INLINE_20,
        open_defers: None,
        wrapper_func_id: Some(20),
        stack_objects: None,
    },
    Layout {
        first: release(14),
        magic: 0xffff_fffb,
        func: FUNC_FB,
        module: MODULE_FB,
        inline_tree: Some(inline_tree(4, 2)),
        inline_entry: INLINE_20,
        open_defers: Some((5, OpenDeferFormat::WithArguments)),
        wrapper_func_id: Some(22),
        stack_objects: None,
    },
    Layout {
        first: release(16),
        magic: 0xffff_fffa,
        func: FUNC_FA,
        module: MODULE_FA,
        inline_tree: Some(inline_tree(3, 2)),
        inline_entry: INLINE_20,
        open_defers: Some((4, OpenDeferFormat::WithArguments)),
        wrapper_func_id: Some(22),
        stack_objects: None,
    },
    Layout {
        first: release(18),
        magic: 0xffff_fff0,
        func: FUNC_F0,
        module: MODULE_F0,
        inline_tree: Some(inline_tree(3, 2)),
        inline_entry: INLINE_20,
        open_defers: Some((4, OpenDeferFormat::Slots)),
        wrapper_func_id: Some(21),
        stack_objects: Some(2),
    },
    Layout {
        first: release(20),
        magic: 0xffff_fff1,
        func: FUNC_F1,
        module: MODULE_F1,
        inline_tree: Some(inline_tree(3, 2)),
        inline_entry: INLINE_16,
        open_defers: Some((4, OpenDeferFormat::Slots)),
        wrapper_func_id: Some(21),
        stack_objects: Some(2),
    },
    Layout {
        first: release(22),
        magic: 0xffff_fff1,
        func: FUNC_F1,
        module: MODULE_F1,
        inline_tree: Some(inline_tree(3, 2)),
        inline_entry: INLINE_16,
        open_defers: Some((4, OpenDeferFormat::SlotArray)),
        wrapper_func_id: Some(22),
        stack_objects: Some(2),
    },
    Layout {
        first: release(25),
        magic: 0xffff_fff1,
        func: FUNC_F1,
        module: MODULE_F1,
        inline_tree: Some(inline_tree(3, 2)),
        inline_entry: INLINE_16,
        open_defers: Some((4, OpenDeferFormat::SlotArray)),
        wrapper_func_id: Some(23),
        stack_objects: Some(2),
    },
    Layout {
        first: release(27),
        magic: 0xffff_fff1,
        func: FUNC_F1,
        module: ModuleLayout {
            gofunc: Some(344),
            ..MODULE_FA
        },
        inline_tree: Some(inline_tree(3, 2)),
        inline_entry: INLINE_16,
        open_defers: Some((4, OpenDeferFormat::SlotArray)),
        wrapper_func_id: Some(23),
        stack_objects: Some(2),
    },
];

/// What [`Error::UnknownRelease`] names.
pub(crate) const KNOWN: &str = "go1.7 to go1.27";
const NEWEST: Release = release(27);

/// Functions of package runtime that programs of a release and of every newer one have, but none of an
/// older one (on amd64 and arm64): seen in the toolchains' own programs and the fixtures of 1.19 and 1.21
/// to 1.27, and in esbuild's executables of 1.13 to 1.20.
const MARKS: &[(u16, [&str; 2])] = &[
    (19, ["fatal", "sysAllocOS"]),
    (20, ["panicunsafestringlen", "retryOnEAGAIN"]),
    (21, ["gcWriteBarrier1", "addExtraM"]),
    (22, ["deferconvert", "interfaceSwitch"]),
    (23, ["popDefer", "getcallerfp"]),
    (24, ["buildGCMask", "unlock2Wake"]),
    (25, ["runFinalizers", "globrunqgetbatch"]),
    (26, ["findGoroutineLeaks", "gcBeginWork"]),
    (27, ["xRegScan", "mutexevent"]),
];

impl Release {
    /// The release whose runtime has these functions (their names without `runtime.`); `None` unless
    /// they tell just one of 1.19 to the newest known. One that is newer still is taken for that.
    pub fn of_runtime<'a>(functions: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let mut seen = [[false; 2]; MARKS.len()];
        for function in functions {
            for ((_, names), seen) in MARKS.iter().zip(&mut seen) {
                for (name, seen) in names.iter().zip(seen) {
                    *seen |= name.as_bytes() == function;
                }
            }
        }
        // All up to some release, and nothing of those behind it.
        let known = seen.iter().take_while(|seen| **seen == [true; 2]).count();
        let others = seen.iter().skip(known).flatten();
        let (minor, _) = MARKS.get(known.checked_sub(1)?)?;
        let is_clear = !others.copied().any(|seen| seen);
        is_clear.then_some(Self { minor: *minor })
    }

    /// Reads `go1.27.3`, `go1.21rc2`, `go1.22.1 X:rangefunc`, `go1.21.3-fips`,
    /// `devel go1.22-abcdef …`.
    pub fn parse(version: &str) -> Option<Self> {
        let (_, after) = version.split_once("go1.")?;
        let digits = after
            .find(|c: char| !c.is_ascii_digit())
            .map_or(after, |end| &after[..end]);
        digits.parse().ok().map(|minor| Self { minor })
    }

    /// Newer than the table's last row was tested with.
    pub fn is_newer_than_known(self) -> bool {
        self > NEWEST
    }

    /// Not older than the table's last row.
    pub fn is_newest_or_newer(self) -> bool {
        self >= NEWEST
    }

    /// Every defer takes a record from the heap.
    pub fn knows_only_the_heap(self) -> bool {
        self.minor <= 12
    }

    /// Up to 1.24 each deferproc site has its own recovery epilogue, a CALL of deferreturn.
    pub fn recovery_epilogue_per_site(self) -> bool {
        self.minor <= 24
    }
}

impl Layout {
    /// The row for a release; one newer than the table gets the newest row, to be checked.
    pub fn of(release: Release, version: &str) -> Result<&'static Self> {
        LAYOUTS
            .iter()
            .rfind(|row| row.first <= release)
            .ok_or_else(|| Error::UnknownRelease {
                version: version.to_owned(),
                known: KNOWN,
            })
    }

    /// The whole table, oldest first.
    pub fn all() -> &'static [Self] {
        LAYOUTS
    }

    /// Every magic number a pclntab may start with.
    pub fn magics() -> impl Iterator<Item = u32> {
        let mut magics: Vec<u32> = LAYOUTS.iter().map(|row| row.magic).collect();
        magics.dedup();
        magics.into_iter()
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "go1.{}", self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_all_their_forms() {
        for (version, minor) in [
            ("go1.27.3", 27),
            ("go1.21", 21),
            ("go1.21rc2", 21),
            ("go1.22.1 X:rangefunc", 22),
            ("go1.21.3-fips", 21),
            ("devel go1.22-abcdef Tue Jan 1", 22),
        ] {
            assert_eq!(
                Release::parse(version),
                Some(Release { minor }),
                "{version}"
            );
        }
        assert_eq!(Release::parse("devel +abcdef"), None);
        assert_eq!(Release::parse("go2.0"), None);
    }

    #[test]
    fn rows_are_in_order_and_older_releases_are_refused() {
        assert!(LAYOUTS.is_sorted_by_key(|row| row.first));
        assert!(Layout::of(Release { minor: 6 }, "go1.6").is_err());
        let row = Layout::of(Release { minor: 24 }, "go1.24").unwrap();
        assert_eq!(row.first, Release { minor: 22 });
        assert_eq!(
            Layout::of(Release { minor: 99 }, "go1.99").unwrap().first,
            NEWEST
        );
    }
}
