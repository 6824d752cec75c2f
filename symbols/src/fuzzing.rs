//! Doors for fuzzers and the mutation test into what is private. Not part of the crate's interface.

use std::collections::HashMap;

use crate::buildinfo::BuildInfo;
use crate::bytes::Bytes;
use crate::dwarf::Members;
use crate::elf::Image;
use crate::release::Layout;
use crate::{Architecture, Binary, VirtualAddress, decode, module, pclntab};

/// xorshift64*: seeded, so that a failure can be repeated.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn step(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Scans an executable and asks it for frames; an error is a fine answer.
pub fn scan(bytes: &[u8]) {
    let Ok(binary) = Binary::parse(bytes) else {
        return;
    };
    binary.pool_probes().ok();
    binary.run_probes(&[]).ok();
    let Ok(inventory) = binary.inventory() else {
        return;
    };
    for site in inventory.sites.iter().take(16) {
        binary.frames(site.pc);
        for exit in site.exits.iter().take(4) {
            binary.frames(exit.call);
        }
    }
}

/// An executable to be damaged, with the ranges of the file that a scan reads.
#[derive(Debug)]
pub struct Seed {
    bytes: Vec<u8>,
    ranges: Vec<(usize, usize)>,
}

impl Seed {
    /// Looks up the structures once for all edits.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            ranges: structures(&bytes),
            bytes,
        }
    }

    /// The undamaged executable.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Makes `copy` the executable with edits in its structures: each six bytes of `edits` say
    /// where and what.
    pub fn edited(&self, copy: &mut Vec<u8>, edits: &[u8]) {
        copy.clone_from(&self.bytes);
        for edit in edits.chunks_exact(6).take(64) {
            let [which, a, b, c, value, width] = edit else {
                continue;
            };
            let place = usize::from(*which) % self.ranges.len().max(1);
            let Some((start, end)) = self.ranges.get(place) else {
                return;
            };
            let offset = usize::from(*a) | usize::from(*b) << 8 | usize::from(*c) << 16;
            let at = start + offset % (end - start).max(1);
            // One byte, or a word of extreme values.
            let filler: &[u8] = match width % 4 {
                0 => &[*value],
                1 => &[*value, 0, 0, 0],
                2 => &[0xff, 0xff, 0xff, 0x7f],
                _ => &[*value; 8],
            };
            for (place, byte) in copy.iter_mut().skip(at).zip(filler) {
                *place = *byte;
            }
        }
    }
}

/// The executable with a functab of only `most` functions with defers and those of the runtime that
/// a scan looks for, so that a fuzzer gets through more of them. `None` where entries are relocated
/// words (a PIE up to 1.17) or the file is no Go executable.
pub fn cut(bytes: &[u8], most: usize) -> Option<Vec<u8>> {
    let binary = Binary::parse(bytes).ok()?;
    let (image, module) = binary.parts();
    let table = &module.table;
    let layout = table.layout();
    let half = layout.func.entry_size;
    if half == 8 && image.pie {
        return None;
    }
    let funcs: Vec<_> = (0..table.count)
        .map(|index| table.func(image, index))
        .collect::<Option<_>>()?;
    let has_defers = |func| table.deferreturn(func).is_some_and(|o| o != 0);
    let wanted = |name: &[u8]| {
        let parts: [&[u8]; 8] = [
            b"defer",
            b"Defer",
            b"panic",
            b"lock2",
            b"newobject",
            b"mallocgc",
            b"Goexit",
            b"duff",
        ];
        parts
            .iter()
            .any(|part| memchr::memmem::find(name, part).is_some())
    };
    let with_defers: Vec<_> = funcs.iter().filter(|f| has_defers(**f)).collect();
    let every = with_defers.len().div_ceil(most.max(1)).max(1);
    let kept: Vec<u64> = with_defers.iter().step_by(every).map(|f| f.index).collect();
    let keeps = |func: &crate::pclntab::Func| {
        kept.contains(&func.index)
            || !has_defers(*func) && table.runtime_name(*func).is_some_and(wanted)
    };
    let start = usize::try_from(
        image
            .offset_of(table.address.checked_add(table.functab)?)?
            .0,
    )
    .ok()?;
    let half = usize::try_from(half).ok()?;
    let word = |index: usize| bytes.get(start + index * half..start + (index + 1) * half);
    let filler = funcs.iter().position(|f| !has_defers(*f))?;
    let (mut functab, mut count, mut gap) = (Vec::new(), 0u64, false);
    for (index, func) in funcs.iter().enumerate() {
        let kept = keeps(func);
        if !kept && gap {
            continue;
        }
        // What is left out becomes one function without defers.
        gap = !kept;
        functab.extend(word(2 * index)?);
        functab.extend(word(2 * if kept { index } else { filler } + 1)?);
        count += 1;
    }
    functab.extend(word(2 * funcs.len())?);
    if layout.magic == 0xffff_fffb {
        // The file table's offset stands behind functab.
        let at = start + (2 * funcs.len() + 1) * half;
        functab.extend(bytes.get(at..at + 4)?);
    }
    let mut copy = bytes.to_vec();
    let mut put = |at: usize, bytes: &[u8]| {
        copy.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
        Some(())
    };
    let offset = |address| usize::try_from(image.offset_of(address)?.0).ok();
    put(start, &functab)?;
    put(offset(table.address)? + 8, &count.to_le_bytes())?;
    let ftab = module.address.checked_add(layout.module.ftab + 8)?;
    for at in [0, 8] {
        put(offset(ftab)? + at, &(count + 1).to_le_bytes())?;
    }
    Some(copy)
}

/// The ranges of the file that a scan reads: headers, tables, and the code of a few functions.
fn structures(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut ranges = vec![(0, bytes.len().min(1024)), (0, bytes.len())];
    let Ok(binary) = Binary::parse(bytes) else {
        return ranges;
    };
    let (image, module) = binary.parts();
    let mut add = |address: VirtualAddress, len: u64| {
        let end = |start: usize| usize::try_from(len).ok()?.checked_add(start);
        let start = image
            .offset_of(address)
            .and_then(|o| usize::try_from(o.0).ok());
        if let Some((start, end)) = start.and_then(|s| Some((s, end(s)?.min(bytes.len())))) {
            ranges.push((start, end));
        }
    };
    let table = &module.table;
    // Small structures stand several times, to be hit as often as all the code.
    for _ in 0..8 {
        add(
            VirtualAddress(image.segments.first().map_or(0, |s| s.address.0)),
            512,
        );
        add(table.address, 128);
        add(table.address, 4096);
        add(module.address, 360);
        if let Some(section) = image.section(b".go.buildinfo") {
            add(section.address, 64);
        }
    }
    let mut found = 0;
    for index in 0..table.count {
        let Some(func) = table.func(image, index) else {
            continue;
        };
        if table.deferreturn(func).is_some_and(|o| o != 0) && found < 32 {
            found += 1;
            add(func.entry, func.end.offset_from(func.entry).unwrap_or(1));
            if let Some(at) = table.address.checked_add(func.offset()) {
                add(at, 96);
            }
        }
    }
    ranges
}

/// Where code to be decoded stands.
const START: VirtualAddress = VirtualAddress(0x40_0000);

/// Any bytes as amd64 code, which must be the same by way of iced.
pub fn decode_amd64(data: &[u8]) {
    let code = decoded(Architecture::Amd64, data);
    assert_eq!(code, decode::by_iced(START, data));
}

/// Any bytes as arm64 code.
pub fn decode_arm64(data: &[u8]) {
    decoded(Architecture::Arm64, data);
}

fn decoded(architecture: Architecture, data: &[u8]) -> Vec<decode::Instruction> {
    let mut code = Vec::new();
    decode::function(architecture, START, data, &mut code);
    assert!(code.is_sorted_by_key(|i| i.address));
    assert!(code.len() <= data.len());
    code
}

/// Any bytes as DWARF: the first two say how many of them are abbreviations.
pub fn dwarf(data: &[u8]) {
    if let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = rest.len().min(u16::from_le_bytes(*length).into());
        let (abbreviations, info) = rest.split_at(length);
        Members::of_sections(info, abbreviations);
    }
}

/// The offsets of the runtime's members that an executable's DWARF has.
pub fn dwarf_members(bytes: &[u8]) -> HashMap<String, u64> {
    Members::read(bytes).all()
}

/// Any bytes as the info of open-coded defers, in each format; and as stack objects.
pub fn open_defers(data: &[u8]) {
    module::read_any(Bytes(data));
}

/// Any bytes as a build info blob and as what lies behind it.
pub fn build_info(data: &[u8]) {
    // One segment that holds the data at the address that pointers in it are likely to name.
    let image = Image::of_bytes(Architecture::Amd64, VirtualAddress(0), data);
    if let Some(info) = BuildInfo::find(&image) {
        assert!(info.version.len() + info.settings.len() <= data.len() * 4);
    }
}

/// Any bytes as a pclntab, read by every release's layout.
pub fn pclntab(data: &[u8]) {
    let (architecture, data) = match data.split_first() {
        Some((first, rest)) if first & 1 == 1 => (Architecture::Arm64, rest),
        _ => (Architecture::Amd64, data),
    };
    let image = Image::of_bytes(architecture, VirtualAddress(0x1000), data);
    let Some(location) = pclntab::locate(&image) else {
        return;
    };
    for layout in Layout::all() {
        let Ok(table) = pclntab::Pclntab::new(location, layout) else {
            continue;
        };
        for index in 0..table.count.min(64) {
            let Some(func) = table.func(&image, index) else {
                continue;
            };
            table.find(&image, func.entry);
            table.name(func);
            table.file(func, func.entry);
            table.line(func, func.entry);
            table.inlined(func, func.entry, Bytes(data));
            table.depth_steps(func).count();
        }
    }
}
