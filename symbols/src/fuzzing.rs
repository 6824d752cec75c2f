//! Doors for fuzzers and the mutation test into what is private. Not part of the crate's interface.

use crate::buildinfo::BuildInfo;
use crate::bytes::Bytes;
use crate::elf::Image;
use crate::release::Layout;
use crate::{Architecture, Binary, VirtualAddress, decode, module, pclntab};

/// Scans an executable and asks it for frames; an error is a fine answer.
pub fn scan(bytes: &[u8]) {
    let Ok(binary) = Binary::parse(bytes) else {
        return;
    };
    binary.pool_probes().ok();
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

/// Edits an executable in its structures: each six bytes of `edits` say where and what.
pub fn edit(bytes: &mut [u8], edits: &[u8]) {
    let ranges = structures(bytes);
    for edit in edits.chunks_exact(6).take(64) {
        let [which, a, b, c, value, width] = edit else {
            continue;
        };
        let Some((start, end)) = ranges.get(usize::from(*which) % ranges.len().max(1)) else {
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
        for (place, byte) in bytes.iter_mut().skip(at).zip(filler) {
            *place = *byte;
        }
    }
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

/// Any bytes as amd64 code.
pub fn decode_amd64(data: &[u8]) {
    decoded(Architecture::Amd64, data);
}

/// Any bytes as arm64 code.
pub fn decode_arm64(data: &[u8]) {
    decoded(Architecture::Arm64, data);
}

fn decoded(architecture: Architecture, data: &[u8]) {
    let code = decode::function(architecture, VirtualAddress(0x40_0000), data);
    assert!(code.is_sorted_by_key(|i| i.address));
    assert!(code.len() <= data.len());
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
