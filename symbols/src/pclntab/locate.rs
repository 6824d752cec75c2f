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
    pub magic: u32,
}

/// Finds the header: by section, else by a search that validates each candidate.
pub(crate) fn locate<'data>(image: &Image<'data>) -> Option<Location<'data>> {
    let by_section = [&b".gopclntab"[..], b".data.rel.ro.gopclntab"]
        .into_iter()
        .find_map(|name| {
            let address = image.section(name)?.address;
            check_header(image, address, image.bytes_from(address)?)
        });
    by_section.or_else(|| {
        image
            .segments
            .iter()
            .find_map(|segment| search(image, segment))
    })
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

fn check_header<'data>(
    image: &Image<'data>,
    address: VirtualAddress,
    data: Bytes<'data>,
) -> Option<Location<'data>> {
    let quantum = match image.architecture {
        Architecture::Amd64 => 1,
        Architecture::Arm64 => 4,
    };
    let magic = data.u32(0)?;
    let known = Layout::magics().any(|m| m == magic);
    let shape = data.slice(4, 4)? == [0, 0, quantum, 8];
    let count = data.u64(8)?;
    let plausible = count > 0 && count < data.len() as u64 / 8;
    (known && shape && plausible).then_some(Location {
        address,
        data,
        magic,
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
    // garble gives the table a magic number of its own and encrypts what it holds.
    if has_build_info || image.section(b".gopclntab").is_some() {
        return Error::Obfuscated("its function table (pclntab) is not in Go's format");
    }
    Error::NotGo
}
