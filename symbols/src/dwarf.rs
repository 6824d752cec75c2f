//! What DWARF, where a binary has it, says of the runtime's structures: where their members lie. It
//! describes this very runtime, patched or not, so it goes before the tables by release.

use std::borrow::Cow;
use std::collections::HashMap;

use gimli::{AttributeValue, EndianSlice, LittleEndian};
use object::read::elf::ElfFile64;
use object::{Object as _, ObjectSection as _};

/// Offsets in bytes of members of the runtime's structures, by name such as `runtime.g.m`; empty
/// without DWARF that can be read.
#[derive(Debug, Default)]
pub(crate) struct Members(HashMap<String, u64>);

/// DWARF that contradicts what no release has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Contradiction {
    pub member: &'static str,
    pub found: u64,
    pub expected: u64,
}

const STRUCTURES: [&[u8]; 5] = [
    b"runtime.g",
    b"runtime.m",
    b"runtime.p",
    b"runtime._defer",
    b"runtime._panic",
];

type Slice<'a> = EndianSlice<'a, LittleEndian>;

impl Members {
    /// Reads them from an ELF file.
    pub fn read(file: &[u8]) -> Self {
        let Ok(elf) = ElfFile64::<object::LittleEndian>::parse(file) else {
            return Self::default();
        };
        match [".debug_info", ".debug_abbrev"].map(|name| contents(&elf, name)) {
            [Some(info), Some(abbreviations)] => Self::of_sections(&info, &abbreviations),
            _ => Self::default(),
        }
    }

    /// From the contents of `.debug_info` and `.debug_abbrev`.
    pub fn of_sections(info: &[u8], abbreviations: &[u8]) -> Self {
        let mut members = HashMap::new();
        // What was read before damage stays: it was right as far as it goes.
        collect(info, abbreviations, &mut members).ok();
        Self(members)
    }

    #[cfg(feature = "fuzzing")]
    pub fn all(self) -> HashMap<String, u64> {
        self.0
    }

    /// Where a member lies, if DWARF says so.
    pub fn offset(&self, member: &str) -> Option<u64> {
        self.0.get(member).copied()
    }

    /// The first of these members that lies elsewhere than expected.
    pub fn contradicts(&self, expected: &[(&'static str, u64)]) -> Option<Contradiction> {
        expected.iter().find_map(|(member, expected)| {
            let found = self.offset(member).filter(|found| found != expected)?;
            Some(Contradiction {
                member,
                found,
                expected: *expected,
            })
        })
    }
}

/// A section's bytes, decompressed.
fn contents<'data>(
    elf: &ElfFile64<'data, object::LittleEndian>,
    name: &str,
) -> Option<Cow<'data, [u8]>> {
    /// Go's own are compressed to a third or a quarter.
    const MOST_COMPRESSED: u64 = 64;
    let data = elf.section_by_name(name)?.compressed_data().ok()?;
    let most = (data.data.len() as u64).saturating_mul(MOST_COMPRESSED);
    if data.uncompressed_size > most {
        return None;
    }
    data.decompress().ok()
}

/// Go puts the types of all packages into the unit of package runtime.
fn collect(
    info: &[u8],
    abbreviations: &[u8],
    members: &mut HashMap<String, u64>,
) -> gimli::Result<()> {
    let info = gimli::DebugInfo::new(info, LittleEndian);
    let abbreviations = gimli::DebugAbbrev::new(abbreviations, LittleEndian);
    let mut units = info.units();
    // All of Go's units share one table, which is not worth reading a thousand times.
    let mut table = None;
    while let Some(unit) = units.next()? {
        let offset = unit.debug_abbrev_offset();
        let table = match &mut table {
            Some((at, table)) if *at == offset => table,
            other => {
                &mut other
                    .insert((offset, unit.abbreviations(&abbreviations)?))
                    .1
            }
        };
        let mut entries = unit.entries(table);
        let (mut depth, mut structure) = (0, None);
        while let Some((delta, entry)) = entries.next_dfs()? {
            depth += delta;
            match (depth, entry.tag()) {
                (0, _) if name(entry)? != Some(b"runtime") => break,
                (1, gimli::DW_TAG_structure_type) => {
                    let name = name(entry)?;
                    structure = name.filter(|name| STRUCTURES.contains(name));
                }
                (1, _) => structure = None,
                (2, gimli::DW_TAG_member) => {
                    if let Some(structure) = structure
                        && let Some(member) = name(entry)?
                        && let Some(offset) = entry.attr_value(gimli::DW_AT_data_member_location)?
                        && let Some(offset) = offset.udata_value()
                    {
                        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                        members.insert(format!("{}.{}", text(structure), text(member)), offset);
                    }
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// The name of an entry where it stands in the entry itself, as Go's compiler writes it.
fn name<'a>(
    entry: &gimli::DebuggingInformationEntry<'_, '_, Slice<'a>>,
) -> gimli::Result<Option<&'a [u8]>> {
    Ok(match entry.attr_value(gimli::DW_AT_name)? {
        Some(AttributeValue::String(name)) => Some(name.slice()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_member_that_lies_elsewhere_contradicts() {
        let members = Members(HashMap::from([("runtime._defer.pc".to_owned(), 16)]));
        let unchanged = [("runtime._defer.sp", 8), ("runtime._defer.pc", 16)];
        assert_eq!(members.contradicts(&unchanged), None);
        let moved = Contradiction {
            member: "runtime._defer.pc",
            found: 16,
            expected: 24,
        };
        assert_eq!(
            members.contradicts(&[("runtime._defer.pc", 24)]),
            Some(moved)
        );
    }
}
