//! The ELF container: which bytes are mapped where, and what the loader would relocate.

use std::sync::OnceLock;

use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _};

use crate::bytes::Bytes;
use crate::{Architecture, Error, FileOffset, Result, VirtualAddress};

type Header = elf::FileHeader64<LE>;

/// A `PT_LOAD` segment, cut to what the file really holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'data> {
    pub address: VirtualAddress,
    pub offset: FileOffset,
    pub data: &'data [u8],
    pub executable: bool,
    pub writable: bool,
}

/// A section with contents in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section<'data> {
    pub name: &'data [u8],
    pub address: VirtualAddress,
    pub data: &'data [u8],
}

/// An ELF file as the loader sees it, with section names where there are any.
#[derive(Debug)]
pub(crate) struct Image<'data> {
    pub architecture: Architecture,
    pub pie: bool,
    pub stripped: bool,
    pub build_id: Option<&'data [u8]>,
    pub segments: Vec<Segment<'data>>,
    pub sections: Vec<Section<'data>>,
    dynamic: Option<VirtualAddress>,
    /// `(address, addend)` of every relative relocation, by address; read when first needed.
    relative: OnceLock<Vec<(u64, u64)>>,
}

impl<'data> Image<'data> {
    pub fn parse(bytes: &'data [u8]) -> Result<Self> {
        let architecture = check_identity(bytes)?;
        let header = Header::parse(bytes).map_err(|e| Error::DamagedElf(e.to_string()))?;
        let pie = match header.e_type(LE) {
            elf::ET_EXEC => false,
            elf::ET_DYN => true,
            elf::ET_REL => return Err(Error::NotExecutable("an unlinked object file")),
            elf::ET_CORE => return Err(Error::NotExecutable("a core dump")),
            _ => return Err(Error::NotExecutable("an ELF file of unknown type")),
        };
        let programs = header
            .program_headers(LE, bytes)
            .map_err(|e| Error::DamagedElf(format!("{e} (program headers)")))?;
        let mut segments = Vec::new();
        let mut dynamic = None;
        for program in programs {
            match program.p_type(LE) {
                elf::PT_LOAD => {
                    /// Linkers make up to a dozen.
                    const MOST_SEGMENTS: usize = 64;
                    if segments.len() == MOST_SEGMENTS {
                        let problem = format!("it has more than {MOST_SEGMENTS} segments");
                        return Err(Error::DamagedElf(problem));
                    }
                    let (offset, size) = program.file_range(LE);
                    if size == 0 {
                        continue;
                    }
                    let data = Bytes(bytes).slice(offset, size).ok_or_else(|| {
                        Error::DamagedElf(format!(
                            "a segment ends at byte {} of a file of {} bytes: it is cut off",
                            offset.saturating_add(size),
                            bytes.len()
                        ))
                    })?;
                    segments.push(Segment {
                        address: VirtualAddress(program.p_vaddr(LE)),
                        offset: FileOffset(offset),
                        data,
                        executable: program.p_flags(LE) & elf::PF_X != 0,
                        writable: program.p_flags(LE) & elf::PF_W != 0,
                    });
                }
                elf::PT_DYNAMIC => dynamic = Some(VirtualAddress(program.p_vaddr(LE))),
                _ => {}
            }
        }
        if segments.is_empty() {
            return Err(Error::DamagedElf("it has no loadable segment".into()));
        }
        segments.sort_by_key(|s| s.address);
        let mut image = Self {
            architecture,
            pie,
            stripped: true,
            build_id: None,
            segments,
            sections: Vec::new(),
            dynamic,
            relative: OnceLock::new(),
        };
        image.read_sections(header, bytes);
        Ok(image)
    }

    /// An image of one readable segment.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn of_bytes(
        architecture: Architecture,
        address: VirtualAddress,
        data: &'data [u8],
    ) -> Self {
        Self {
            architecture,
            pie: false,
            stripped: true,
            build_id: None,
            segments: vec![Segment {
                address,
                offset: FileOffset(0),
                data,
                executable: false,
                writable: false,
            }],
            sections: Vec::new(),
            dynamic: None,
            relative: OnceLock::new(),
        }
    }

    /// Section headers are a convenience: damaged or missing ones leave the list short.
    fn read_sections(&mut self, header: &Header, bytes: &'data [u8]) {
        let Ok(table) = header.sections(LE, bytes) else {
            return;
        };
        for section in table.iter() {
            if section.sh_type(LE) == elf::SHT_SYMTAB && section.sh_size(LE) > 0 {
                self.stripped = false;
            }
            let (Ok(name), Ok(data)) = (table.section_name(LE, section), section.data(LE, bytes))
            else {
                continue;
            };
            if name == b".note.go.buildid" {
                self.build_id = note_description(data);
            }
            /// The wanted ones are fewer.
            const MOST_SECTIONS: usize = 32;
            if section.sh_flags(LE) & u64::from(elf::SHF_ALLOC) != 0
                && !data.is_empty()
                && is_wanted(name)
                && self.sections.len() < MOST_SECTIONS
            {
                let address = VirtualAddress(section.sh_addr(LE));
                self.sections.push(Section {
                    name,
                    address,
                    data,
                });
            }
        }
    }

    pub fn section(&self, name: &[u8]) -> Option<Section<'data>> {
        self.sections.iter().find(|s| s.name == name).copied()
    }

    fn segment(&self, address: VirtualAddress) -> Option<(&Segment<'data>, u64)> {
        let after = self.segments.partition_point(|s| s.address <= address);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        let inside = address.offset_from(segment.address)?;
        (inside < segment.data.len() as u64).then_some((segment, inside))
    }

    /// The file's bytes from `address` to the end of its segment.
    pub fn bytes_from(&self, address: VirtualAddress) -> Option<Bytes<'data>> {
        let (segment, inside) = self.segment(address)?;
        Bytes(segment.data).from(inside)
    }

    /// `len` bytes of the file at `address`.
    pub fn read(&self, address: VirtualAddress, len: u64) -> Option<&'data [u8]> {
        self.bytes_from(address)?.slice(0, len)
    }

    /// The 64-bit word at `address` as it is after relocation at load bias 0.
    pub fn word(&self, address: VirtualAddress) -> Option<u64> {
        if self.pie {
            let relative = self.relative_relocations();
            if let Ok(i) = relative.binary_search_by_key(&address.0, |r| r.0) {
                return relative.get(i).map(|r| r.1);
            }
        }
        self.bytes_from(address)?.u64(0)
    }

    /// The word at `address` if the program cannot change it: read-only data, or what the loader
    /// makes read-only once it is relocated.
    pub fn constant_word(&self, address: VirtualAddress) -> Option<u64> {
        let (segment, _) = self.segment(address)?;
        let protected = || {
            self.sections.iter().any(|s| {
                let inside = address.offset_from(s.address);
                (s.name.starts_with(b".data.rel.ro") || s.name.starts_with(b".got"))
                    && inside.is_some_and(|i| i < s.data.len() as u64)
            })
        };
        if segment.writable && !protected() {
            None
        } else {
            self.word(address)
        }
    }

    /// The place in the file of `address`, if a segment maps it from there.
    pub fn offset_of(&self, address: VirtualAddress) -> Option<FileOffset> {
        let (segment, inside) = self.segment(address)?;
        segment.offset.0.checked_add(inside).map(FileOffset)
    }

    /// The address at which the byte at `offset` is mapped executable.
    pub fn address_of(&self, offset: FileOffset) -> Option<VirtualAddress> {
        self.segments.iter().filter(|s| s.executable).find_map(|s| {
            let inside = offset.0.checked_sub(s.offset.0)?;
            (inside < s.data.len() as u64).then(|| s.address.checked_add(inside))?
        })
    }

    pub fn is_executable(&self, address: VirtualAddress) -> bool {
        self.segment(address).is_some_and(|(s, _)| s.executable)
    }

    /// `(address, addend)` of every relative relocation (RELA and RELR), by address.
    pub fn relative_relocations(&self) -> &[(u64, u64)] {
        self.relative
            .get_or_init(|| self.read_relative().unwrap_or_default())
    }

    fn read_relative(&self) -> Option<Vec<(u64, u64)>> {
        const RELR: (u64, u64) = (36, 35);
        let kind = match self.architecture {
            Architecture::Amd64 => u64::from(elf::R_X86_64_RELATIVE),
            Architecture::Arm64 => u64::from(elf::R_AARCH64_RELATIVE),
        };
        let entries = self.bytes_from(self.dynamic?)?;
        let mut tags = std::collections::HashMap::new();
        // There are about thirty kinds of entry.
        for at in (0..entries.len() as u64).step_by(16).take(512) {
            let (tag, value) = (entries.u64(at)?, entries.u64(at + 8)?);
            if tag == 0 {
                break;
            }
            tags.insert(tag, value);
        }
        let mut relative = Vec::new();
        let rela = (u64::from(elf::DT_RELA), u64::from(elf::DT_RELASZ));
        if let (Some(&address), Some(&size)) = (tags.get(&rela.0), tags.get(&rela.1))
            && let Some(data) = self.read(VirtualAddress(address), size)
        {
            let table = Bytes(data);
            for at in (0..table.len() as u64).step_by(24) {
                let (Some(place), Some(info), Some(addend)) =
                    (table.u64(at), table.u64(at + 8), table.u64(at + 16))
                else {
                    break;
                };
                if info & 0xffff_ffff == kind {
                    relative.push((place, addend));
                }
            }
        }
        if let (Some(&address), Some(&size)) = (tags.get(&RELR.0), tags.get(&RELR.1))
            && let Some(data) = self.read(VirtualAddress(address), size)
        {
            self.read_relr(Bytes(data), &mut relative);
        }
        relative.sort_unstable();
        Some(relative)
    }

    /// RELR: an even word is an address, an odd one a bitmap of the 63 words behind it; the addend
    /// is in place. (Generic ABI, `SHT_RELR`.)
    fn read_relr(&self, table: Bytes<'data>, relative: &mut Vec<(u64, u64)>) {
        let mut next = 0u64;
        // More places than words to relocate are damage.
        let words: usize = self.segments.iter().map(|s| s.data.len() / 8).sum();
        let mut push = |place: u64| {
            if relative.len() < words
                && let Some(addend) = self
                    .bytes_from(VirtualAddress(place))
                    .and_then(|b| b.u64(0))
            {
                relative.push((place, addend));
            }
        };
        for at in (0..table.len() as u64).step_by(8) {
            let Some(word) = table.u64(at) else { break };
            if word & 1 == 0 {
                push(word);
                next = word.wrapping_add(8);
            } else {
                for bit in 0..63u64 {
                    if word >> (bit + 1) & 1 == 1 {
                        push(next.wrapping_add(8 * bit));
                    }
                }
                next = next.wrapping_add(63 * 8);
            }
        }
    }
}

/// The checks that need no more than the first 20 bytes, in the order a user would ask.
fn check_identity(bytes: &[u8]) -> Result<Architecture> {
    let head = Bytes(bytes);
    if head.slice(0, 4) != Some(&elf::ELFMAG) {
        return Err(Error::NotElf);
    }
    let cut_off =
        || Error::DamagedElf(format!("its header is cut off after {} bytes", bytes.len()));
    if head.u8(4).ok_or_else(cut_off)? != elf::ELFCLASS64 {
        return Err(Error::WrongClass("32-bit"));
    }
    if head.u8(5).ok_or_else(cut_off)? != elf::ELFDATA2LSB {
        return Err(Error::WrongClass("big-endian"));
    }
    let machine = head.u32(16).ok_or_else(cut_off)? >> 16;
    match u16::try_from(machine).unwrap_or(0) {
        elf::EM_X86_64 => Ok(Architecture::Amd64),
        elf::EM_AARCH64 => Ok(Architecture::Arm64),
        elf::EM_RISCV => Err(Error::WrongMachine("RISC-V".into())),
        elf::EM_PPC64 => Err(Error::WrongMachine("64-bit PowerPC".into())),
        elf::EM_S390 => Err(Error::WrongMachine("S/390".into())),
        elf::EM_MIPS => Err(Error::WrongMachine("MIPS".into())),
        elf::EM_LOONGARCH => Err(Error::WrongMachine("LoongArch".into())),
        other => Err(Error::WrongMachine(format!("ELF machine {other}"))),
    }
}

/// Whether the analysis asks for sections of this name.
fn is_wanted(name: &[u8]) -> bool {
    let prefixes: [&[u8]; 5] = [
        b".gopclntab",
        b".data.rel.ro",
        b".got",
        b".go.",
        b".noptrdata",
    ];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// The description of the first note in a note section.
fn note_description(data: &[u8]) -> Option<&[u8]> {
    let note = Bytes(data);
    let (name, description) = (note.u32(0)?, note.u32(4)?);
    let start = 12u64.checked_add(u64::from(name).checked_next_multiple_of(4)?)?;
    note.slice(start, u64::from(description))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_a_64_bit_little_endian_elf_executable() {
        assert_eq!(Image::parse(b"").unwrap_err(), Error::NotElf);
        assert_eq!(Image::parse(b"#!/bin/sh\n").unwrap_err(), Error::NotElf);
        assert!(matches!(
            Image::parse(b"\x7fELF"),
            Err(Error::DamagedElf(_))
        ));
        assert_eq!(
            Image::parse(b"\x7fELF\x01\x01\x01").unwrap_err(),
            Error::WrongClass("32-bit")
        );
        let mut header = [0u8; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[18] = 243;
        assert_eq!(
            Image::parse(&header).unwrap_err(),
            Error::WrongMachine("RISC-V".into())
        );
        header[18] = 62;
        assert!(Image::parse(&header).is_err());
    }
}
