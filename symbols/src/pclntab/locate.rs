//! Where the function table is, or why there is none.

use crate::bytes::Bytes;
use crate::elf::{Image, Segment};
use crate::release::Layout;
use crate::{Architecture, Error, VirtualAddress};

/// Where a pclntab was found: its address and the bytes from there to the end of its segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Location<'data> {
    pub address: VirtualAddress,
    pub data: Bytes<'data>,
    /// `None` if it is not of Go's: garble chooses one at random for each build.
    pub magic: Option<u32>,
}

/// Finds the header: by section, else by a search that validates each candidate.
pub(crate) fn locate<'data>(image: &Image<'data>) -> Option<Location<'data>> {
    let by_section = [&b".gopclntab"[..], b".data.rel.ro.gopclntab"]
        .into_iter()
        .find_map(|name| {
            let address = image.section(name)?.address;
            let data = image.bytes_from(address)?;
            check_header(image, address, data)
                .or_else(|| check_foreign_header(image, address, data))
        });
    let segments = || image.segments.iter();
    by_section
        .or_else(|| segments().find_map(|segment| search(image, segment)))
        .or_else(|| segments().find_map(|segment| search_foreign(image, segment)))
}

fn search<'data>(image: &Image<'data>, segment: &Segment<'data>) -> Option<Location<'data>> {
    let mut best: Option<(u64, Location<'data>)> = None;
    for magic in Layout::magics() {
        let mut needle = [0u8; 6];
        needle[..4].copy_from_slice(&magic.to_le_bytes());
        for at in memchr::memmem::find_iter(segment.data, &needle) {
            let Some(address) = segment.address.checked_add(at as u64) else {
                continue;
            };
            let Some(data) = Bytes(segment.data).from(at as u64) else {
                continue;
            };
            if let Some(location) = check_header(image, address, data) {
                let count = data.u64(8).unwrap_or(0);
                if best.as_ref().is_none_or(|b| b.0 < count) {
                    best = Some((count, location));
                }
            }
        }
    }
    best.map(|(_, location)| location)
}

/// The place in a header of what follows the magic number.
const SHAPE: u64 = 4;

fn search_foreign<'data>(
    image: &Image<'data>,
    segment: &Segment<'data>,
) -> Option<Location<'data>> {
    /// The linker's: 32 up to 1.25, then that of a word.
    const ALIGNMENT: u64 = 8;
    memchr::memmem::find_iter(segment.data, &shape(image)).find_map(|at| {
        let start = (at as u64).checked_sub(SHAPE)?;
        let address = segment.address.checked_add(start)?;
        let data = Bytes(segment.data).from(start)?;
        let is_aligned = address.0.is_multiple_of(ALIGNMENT);
        is_aligned.then(|| check_foreign_header(image, address, data))?
    })
}

/// A header as Go 1.18 and newer write it, but for the magic number: its parts follow one another, and
/// the functions are in order.
fn check_foreign_header<'data>(
    image: &Image<'data>,
    address: VirtualAddress,
    data: Bytes<'data>,
) -> Option<Location<'data>> {
    const PARTS: u64 = 32;
    const HEADER: u64 = 72;
    let count = data.u64(8)?;
    let is_shaped = data.slice(SHAPE, 4)? == shape(image) && count > 0;
    let part = |index: u64| data.u64(PARTS + 8 * index);
    let parts: Option<Vec<u64>> = (0..5).map(part).collect();
    let parts = parts.filter(|parts| is_shaped && parts.first() >= Some(&HEADER))?;
    let functab = *parts.last()?;
    let end = functab.checked_add(count.checked_mul(8)?)?;
    let entry = |index: u64| data.u32(functab.checked_add(index.checked_mul(8)?)?);
    let entries: Option<Vec<u32>> = (0..count.min(16)).map(entry).collect();
    let follow = parts.is_sorted_by(|a, b| a < b);
    let in_order = follow && entries?.is_sorted() && end < data.len() as u64;
    in_order.then_some(Location {
        address,
        data,
        magic: None,
    })
}

/// What follows the magic number: two zeros, the size of an instruction's unit and of a pointer.
fn shape(image: &Image<'_>) -> [u8; 4] {
    let quantum = match image.architecture {
        Architecture::Amd64 => 1,
        Architecture::Arm64 => 4,
    };
    [0, 0, quantum, 8]
}

fn check_header<'data>(
    image: &Image<'data>,
    address: VirtualAddress,
    data: Bytes<'data>,
) -> Option<Location<'data>> {
    let magic = data.u32(0)?;
    let known = Layout::magics().any(|m| m == magic);
    let is_shaped = data.slice(SHAPE, 4)? == shape(image);
    let count = data.u64(8)?;
    let plausible = count > 0 && count < data.len() as u64 / 8;
    (known && is_shaped && plausible).then_some(Location {
        address,
        data,
        magic: Some(magic),
    })
}

/// The error for a file without a pclntab, naming a packer or obfuscation where it is recognised.
pub(crate) fn missing(image: &Image<'_>, bytes: &[u8], has_build_info: bool) -> Error {
    let head = bytes.get(..bytes.len().min(4096)).unwrap_or_default();
    let tail = bytes
        .get(bytes.len().saturating_sub(4096)..)
        .unwrap_or_default();
    let packed = |part| memchr::memmem::find(part, b"UPX!").is_some();
    if packed(head) || packed(tail) {
        return Error::Packed("UPX", "upx -d BINARY");
    }
    // Of the function table garble leaves more than its magic number; another tool may not.
    if has_build_info || image.section(b".gopclntab").is_some() {
        return Error::Obfuscated("its function table (pclntab) is not in Go's format".into());
    }
    Error::NotGo
}
