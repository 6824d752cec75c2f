//! The build info blob: which Go release built the binary, and with which settings.
//!
//! Layout (Go `debug/buildinfo`, `cmd/link` `buildinfo`): 14 bytes of magic, pointer size, flags.
//! With flag 2 (since 1.18) the strings follow inline at byte 32; before, two pointers to Go string
//! headers stand at bytes 16 and 24.

use std::collections::{BTreeSet, HashMap};

use object::read::elf::ElfFile64;
use object::{LittleEndian, Object as _, ObjectSymbol as _};

use crate::VirtualAddress;
use crate::bytes::Bytes;
use crate::elf::Image;

const MAGIC: &[u8] = b"\xff Go buildinf:";
const INLINE_STRINGS: u8 = 2;
/// How a release's name starts.
const START: &[u8] = b"go1.";

/// Release and build settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BuildInfo {
    /// Such as `go1.27.3`.
    pub version: String,
    /// The module info: lines such as `build\t-gcflags=all=-N -l`.
    pub settings: String,
}

impl BuildInfo {
    /// Finds it by section, else by searching the segments; `None` if there is none.
    pub fn find(image: &Image<'_>) -> Option<Self> {
        if let Some(section) = image.section(b".go.buildinfo")
            && let Some(info) = Self::read(image, Bytes(section.data))
        {
            return Some(info);
        }
        image
            .segments
            .iter()
            .filter(|s| !s.executable)
            .find_map(|segment| {
                memchr::memmem::find_iter(segment.data, MAGIC)
                    .filter(|at| at % 16 == 0)
                    .find_map(|at| Self::read(image, Bytes(segment.data).from(at as u64)?))
            })
    }

    /// The release alone, from the runtime's own variable `buildVersion`: up to 1.12 `cmd/link` puts no
    /// build info into anything, and up to 1.19 none into plugins and what is linked to shared
    /// libraries. `fits` says whether a version fits what else is known.
    pub fn of_variable(
        image: &Image<'_>,
        file: &[u8],
        fits: impl Fn(&str) -> bool,
    ) -> Option<Self> {
        let fits = |build: &Self| fits(&build.version);
        let of_symbol = Self::of_symbol(image, file).filter(&fits);
        of_symbol
            .or_else(|| Self::of_header(image).filter(&fits))
            .or_else(|| Self::of_text(image).filter(&fits))
    }

    /// Its value, if among the variables there is only one string that is just a release.
    fn of_header(image: &Image<'_>) -> Option<Self> {
        /// `go1.22rc1` has nine bytes.
        const LONGEST: usize = 16;
        /// Programs have some dozens; past it they are made up.
        const MOST: usize = 1 << 16;
        let constants = image.segments.iter().filter(|s| !s.writable);
        let texts = constants.flat_map(|segment| {
            memchr::memmem::find_iter(segment.data, START).filter_map(|at| {
                let text = segment.data.get(at..)?;
                let is_of_version = |byte: &&u8| matches!(byte, b'0'..=b'9' | b'a'..=b'z' | b'.');
                let longest = text.iter().take(LONGEST).take_while(is_of_version).count();
                let address = segment.address.checked_add(at as u64)?;
                Some((address.0, text.get(..longest)?))
            })
        });
        let texts: HashMap<u64, &[u8]> = texts.take(MOST).collect();
        let variables = image.segments.iter().filter(|s| s.writable);
        let versions = variables.flat_map(|segment| {
            let (words, _) = segment.data.as_chunks::<8>();
            words.windows(2).filter_map(|header| {
                let [pointer, length] = header else {
                    return None;
                };
                let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
                let text = texts.get(&u64::from_le_bytes(*pointer))?.get(..length)?;
                text.get(START.len())?.is_ascii_digit().then_some(text)
            })
        });
        Self::only(versions.collect())
    }

    fn only(versions: BTreeSet<&[u8]>) -> Option<Self> {
        match versions.len() {
            1 => Self::new(versions.first()?, &[]),
            _ => None,
        }
    }

    /// Its value, if the constants name no other release. Where the linker has dropped the symbol, the
    /// text stands among others, nothing between them.
    fn of_text(image: &Image<'_>) -> Option<Self> {
        let constants = image.segments.iter().filter(|s| !s.writable);
        let versions = constants.flat_map(|segment| {
            memchr::memmem::find_iter(segment.data, START).filter_map(|at| {
                let text = segment.data.get(at..)?;
                let digits = text.get(START.len()..)?.iter();
                // No release has three; a third is of the next text.
                let digits = digits.take(2).take_while(|byte| byte.is_ascii_digit());
                let length = START.len() + digits.count();
                text.get(..length).filter(|_| length > START.len())
            })
        });
        Self::only(versions.collect())
    }

    /// Its value, where its symbol is in `.dynsym`.
    fn of_symbol(image: &Image<'_>, file: &[u8]) -> Option<Self> {
        let elf = ElfFile64::<LittleEndian>::parse(file).ok()?;
        // What the variable points to: the pointer itself is set by a relocation.
        let symbol = elf
            .dynamic_symbols()
            .chain(elf.symbols())
            .find(|symbol| symbol.name_bytes() == Ok(b"runtime.buildVersion.str"))?;
        let version = image.read(VirtualAddress(symbol.address()), symbol.size())?;
        // The size includes the zero behind it.
        let version = version.strip_suffix(b"\0").unwrap_or(version);
        Self::new(version, &[])
    }

    fn read(image: &Image<'_>, blob: Bytes<'_>) -> Option<Self> {
        if blob.slice(0, MAGIC.len() as u64)? != MAGIC || blob.u8(14)? != 8 {
            return None;
        }
        let (version, settings) = if blob.u8(15)? & INLINE_STRINGS != 0 {
            let mut at = 32;
            let mut string = || {
                let len = blob.uvarint(&mut at)?;
                let bytes = blob.slice(at, len)?;
                at = at.checked_add(len)?;
                Some(bytes)
            };
            (string()?, string().unwrap_or_default())
        } else {
            let string = |at| {
                let header = VirtualAddress(blob.u64(at)?);
                let data = VirtualAddress(image.word(header)?);
                image.read(data, image.word(header.checked_add(8)?)?)
            };
            // In a PIE the blob's own pointers are relocated too, and Go's linker writes the
            // addend in place.
            (string(16)?, string(24).unwrap_or_default())
        };
        Self::new(version, settings)
    }

    fn new(version: &[u8], settings: &[u8]) -> Option<Self> {
        let version = String::from_utf8(version.to_vec()).ok()?;
        // The settings stand between two 16-byte markers.
        let inner = settings
            .get(16..settings.len().saturating_sub(16))
            .unwrap_or_default();
        let plausible = ["go", "devel", "unknown"]
            .iter()
            .any(|start| version.starts_with(start));
        plausible.then(|| Self {
            version,
            settings: String::from_utf8_lossy(inner).into_owned(),
        })
    }

    /// The value of a build setting such as `-race` or `-gcflags`.
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.settings.lines().find_map(|line| {
            let (key, value) = line.strip_prefix("build\t")?.split_once('=')?;
            // Values with spaces are quoted.
            (key.trim_matches('"') == name).then(|| value.trim_matches('"'))
        })
    }
}
