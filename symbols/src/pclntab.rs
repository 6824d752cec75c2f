//! pclntab: the table that maps program counters to functions, lines and stack depths. Go's own
//! traceback needs it, so every Go binary has it, stripped or not.

use crate::bytes::Bytes;
use crate::elf::Image;
use crate::error::damaged;
use crate::release::{FuncLayout, InlineEntry, Layout};
use crate::{Architecture, Error, Result, VirtualAddress};

const STRUCTURE: &str = "pclntab";
/// `PCDATA_InlTreeIndex`, in all releases.
const INLINE_INDEX: u32 = 2;

/// Where a pclntab was found: its address and the bytes from there to the end of its segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Location<'data> {
    pub address: VirtualAddress,
    pub data: Bytes<'data>,
    pub magic: u32,
}

/// The function table of one Go module.
#[derive(Debug)]
pub(crate) struct Pclntab<'data> {
    pub address: VirtualAddress,
    data: Bytes<'data>,
    layout: &'static Layout,
    quantum: u64,
    /// Number of functions.
    pub count: u64,
    /// Offsets from the header.
    names: u64,
    cutab: u64,
    filetab: u64,
    pctab: u64,
    pub functab: u64,
    /// What function entries count from (since 1.18), from moduledata.
    text: u64,
}

/// One function of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Func {
    pub index: u64,
    pub entry: VirtualAddress,
    /// The first address behind it (padding included).
    pub end: VirtualAddress,
    /// Offset of its `_func` from the header.
    offset: u64,
}

#[cfg(any(test, feature = "fuzzing"))]
impl Func {
    /// Offset of its `_func` from the header.
    pub fn offset(&self) -> u64 {
        self.offset
    }
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

fn search<'data>(
    image: &Image<'data>,
    segment: &crate::elf::Segment<'data>,
) -> Option<Location<'data>> {
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

impl<'data> Pclntab<'data> {
    /// Reads the header for `layout`. `text` is filled in by [`Self::set_text`].
    pub fn new(location: Location<'data>, layout: &'static Layout) -> Result<Self> {
        let Location {
            address,
            data,
            magic,
        } = location;
        if magic != layout.magic {
            return Err(damaged(
                STRUCTURE,
                format!(
                    "its magic number {magic:#x} does not belong to {}",
                    layout.first
                ),
            ));
        }
        let word = |at| {
            data.u64(at)
                .ok_or_else(|| damaged(STRUCTURE, "its header is cut off"))
        };
        let quantum = u64::from(data.u8(6).unwrap_or(1));
        let count = word(8)?;
        let mut table = Self {
            address,
            data,
            layout,
            quantum,
            count,
            names: 0,
            cutab: 0,
            filetab: 0,
            pctab: 0,
            functab: 16,
            text: 0,
        };
        let offsets = match layout.magic {
            0xffff_fffb => None,
            0xffff_fffa => Some(24),
            _ => Some(32),
        };
        if let Some(first) = offsets {
            table.names = word(first)?;
            table.cutab = word(first + 8)?;
            table.filetab = word(first + 16)?;
            table.pctab = word(first + 24)?;
            table.functab = word(first + 32)?;
        } else {
            // Up to 1.15 all offsets count from the header; the file table's stands behind functab.
            let after = count
                .checked_mul(16)
                .and_then(|size| size.checked_add(16 + 8));
            let at = after.ok_or_else(|| damaged(STRUCTURE, "too many functions"))?;
            let offset = data
                .u32(at)
                .ok_or_else(|| damaged(STRUCTURE, "it is cut off"))?;
            table.filetab = u64::from(offset);
        }
        let size = count
            .checked_mul(2 * table.pair())
            .and_then(|s| s.checked_add(table.functab));
        if size.is_none_or(|end| end > data.len() as u64) {
            return Err(damaged(
                STRUCTURE,
                format!("it counts {count} functions, more than fit into the file"),
            ));
        }
        Ok(table)
    }

    /// Sets the address that function offsets count from (`moduledata.text`).
    pub fn set_text(&mut self, text: VirtualAddress) {
        self.text = text.0;
    }

    /// Size of one half of a functab entry.
    fn pair(&self) -> u64 {
        self.layout.func.entry_size
    }

    fn functab_word(&self, image: &Image<'data>, half: u64) -> Option<u64> {
        let at = self.functab.checked_add(half.checked_mul(self.pair())?)?;
        match self.pair() {
            4 => self.data.u32(at).map(u64::from),
            _ if half.is_multiple_of(2) && image.pie => image.word(self.address.checked_add(at)?),
            _ => self.data.u64(at),
        }
    }

    fn entry(&self, image: &Image<'data>, index: u64) -> Option<VirtualAddress> {
        let word = self.functab_word(image, index.checked_mul(2)?)?;
        self.text.checked_add(word).map(VirtualAddress)
    }

    /// The function at `index`.
    pub fn func(&self, image: &Image<'data>, index: u64) -> Option<Func> {
        if index >= self.count {
            return None;
        }
        let entry = self.entry(image, index)?;
        let end = self.entry(image, index.checked_add(1)?)?;
        let offset = self.functab_word(image, index.checked_mul(2)?.checked_add(1)?)?;
        // Since 1.16 `_func`s are addressed from functab on, before from the header.
        let base = if self.layout.magic == 0xffff_fffb {
            0
        } else {
            self.functab
        };
        Some(Func {
            index,
            entry,
            end,
            offset: base.checked_add(offset)?,
        })
    }

    /// The function that contains `address`.
    pub fn find(&self, image: &Image<'data>, address: VirtualAddress) -> Option<Func> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(image, middle)? <= address {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let func = self.func(image, low.checked_sub(1)?)?;
        (address < func.end).then_some(func)
    }

    fn fields(&self) -> &'static FuncLayout {
        &self.layout.func
    }

    fn field(&self, func: Func, offset: u64) -> Option<u32> {
        self.data.u32(func.offset.checked_add(offset)?)
    }

    fn field_u8(&self, func: Func, offset: u64) -> Option<u8> {
        self.data.u8(func.offset.checked_add(offset)?)
    }

    /// Offset from the entry of the first CALL of deferreturn; 0 if the function has no defer.
    /// (amd64 1.13 stores the CALL's address + 1.)
    pub fn deferreturn(&self, func: Func) -> Option<u32> {
        self.field(func, self.fields().deferreturn)
    }

    /// The offset of the function's name in the name table: equal for equal names.
    pub fn name_offset(&self, func: Func) -> Option<u32> {
        self.field(func, self.fields().name)
    }

    pub fn func_id(&self, func: Func) -> Option<u8> {
        self.field_u8(func, self.fields().func_id)
    }

    /// Whether the compiler made the function as a wrapper of another.
    pub fn is_wrapper(&self, func: Func) -> bool {
        self.func_id(func) == Some(self.layout.wrapper_func_id)
    }

    pub fn name(&self, func: Func) -> Option<&'data [u8]> {
        self.name_at(self.name_offset(func)?)
    }

    pub fn name_at(&self, offset: u32) -> Option<&'data [u8]> {
        self.string(self.names.checked_add(u64::from(offset))?)
    }

    /// A string of the table, if it is not unreasonably long.
    fn string(&self, at: u64) -> Option<&'data [u8]> {
        /// Names of instantiated generics and paths reach a few thousand bytes.
        const LONGEST: u64 = 1 << 16;
        let rest = self.data.from(at)?;
        let len = LONGEST.min(rest.len() as u64);
        Bytes(rest.slice(0, len)?).c_string(0)
    }

    /// Its name without `runtime.`, if it is of that package.
    pub fn runtime_name(&self, func: Func) -> Option<&'data [u8]> {
        const PACKAGE: &[u8] = b"runtime.";
        /// None of those looked for is longer.
        const LONGEST: u64 = 64;
        let at = self
            .names
            .checked_add(u64::from(self.name_offset(func)?))?
            .checked_add(PACKAGE.len() as u64)?;
        let package = at.checked_sub(PACKAGE.len() as u64)?;
        if self.data.slice(package, PACKAGE.len() as u64)? != PACKAGE {
            return None;
        }
        let rest = self.data.from(at)?.0;
        let rest = rest.get(..rest.len().min(LONGEST as usize))?;
        rest.get(..memchr::memchr(0, rest)?)
    }

    pub fn start_line(&self, func: Func) -> Option<u32> {
        self.field(func, self.fields().start_line?)
    }

    /// `(address, value)` steps of a pc-value table: each value holds from its address to the
    /// next step's; the last step's value is only a terminator.
    pub fn steps(&self, func: Func, table: u32) -> Steps<'data> {
        let start = if table == 0 {
            None
        } else {
            self.pctab.checked_add(u64::from(table))
        };
        Steps {
            data: self.data,
            at: start.unwrap_or(u64::MAX),
            address: func.entry,
            value: -1,
            quantum: self.quantum,
            first: true,
            limit: func.end,
        }
    }

    /// The stack depth table: bytes by which SP has been lowered since entry.
    pub fn depth_steps(&self, func: Func) -> Steps<'data> {
        self.steps(func, self.field(func, self.fields().pcsp).unwrap_or(0))
    }

    fn value_at(&self, func: Func, table: u32, address: VirtualAddress) -> Option<i32> {
        self.steps(func, table)
            .find(|s| address < s.end)
            .map(|s| s.value)
    }

    /// Source line at `address`; 0 if there is none.
    pub fn line(&self, func: Func, address: VirtualAddress) -> u32 {
        let table = self.field(func, self.fields().pcln).unwrap_or(0);
        let line = self.value_at(func, table, address).unwrap_or(0);
        u32::try_from(line).unwrap_or(0)
    }

    /// Source file at `address`.
    pub fn file(&self, func: Func, address: VirtualAddress) -> Option<&'data [u8]> {
        let table = self.field(func, self.fields().pcfile)?;
        let index = u64::try_from(self.value_at(func, table, address)?).ok()?;
        let name = match self.fields().cu_offset {
            None => {
                let at = self.filetab.checked_add(index.checked_mul(4)?)?;
                u64::from(self.data.u32(at)?)
            }
            Some(field) => {
                let unit = u64::from(self.field(func, field)?);
                let at = self
                    .cutab
                    .checked_add(unit.checked_add(index)?.checked_mul(4)?)?;
                self.filetab.checked_add(u64::from(self.data.u32(at)?))?
            }
        };
        self.string(name)
    }

    /// The value of a pcdata table (such as the inline tree index) at `address`.
    pub fn pcdata(&self, func: Func, table: u32, address: VirtualAddress) -> Option<i32> {
        self.value_at(func, self.pcdata_table(func, table)?, address)
    }

    /// The first address at which an inlined call begins.
    pub fn first_inlined(&self, func: Func) -> Option<VirtualAddress> {
        let table = self.pcdata_table(func, INLINE_INDEX)?;
        let mut start = func.entry;
        for step in self.steps(func, table) {
            if step.value >= 0 {
                return Some(start);
            }
            start = step.end;
        }
        None
    }

    fn pcdata_table(&self, func: Func, table: u32) -> Option<u32> {
        if table >= self.field(func, self.fields().npcdata)? {
            return None;
        }
        let at = self
            .fields()
            .size
            .checked_add(u64::from(table).checked_mul(4)?)?;
        self.field(func, at)
    }

    /// Address of a funcdata; `gofunc` is what offsets count from since 1.18.
    pub fn funcdata(
        &self,
        image: &Image<'data>,
        func: Func,
        index: u32,
        gofunc: VirtualAddress,
    ) -> Option<VirtualAddress> {
        let count = self.field_u8(func, self.fields().nfuncdata)?;
        if index >= u32::from(count) {
            return None;
        }
        let pcdata = u64::from(self.field(func, self.fields().npcdata)?).checked_mul(4)?;
        let start = func
            .offset
            .checked_add(self.fields().size)?
            .checked_add(pcdata)?;
        if self.fields().entry_size == 4 {
            let offset = self.data.u32(start.checked_add(u64::from(index) * 4)?)?;
            return if offset == u32::MAX {
                None
            } else {
                gofunc.checked_add(u64::from(offset))
            };
        }
        // Up to 1.17: absolute pointers, aligned to 8 in memory.
        let address = self.address.checked_add(start)?;
        let aligned = VirtualAddress(address.0.checked_next_multiple_of(8)?);
        let pointer = image.word(aligned.checked_add(u64::from(index) * 8)?)?;
        (pointer != 0).then_some(VirtualAddress(pointer))
    }

    /// The inlined calls at `address`, innermost first: the name of each and the address whose
    /// line is its call's position in the caller.
    pub fn inlined(
        &self,
        func: Func,
        address: VirtualAddress,
        tree: Bytes<'data>,
    ) -> Vec<(&'data [u8], VirtualAddress)> {
        /// Deeper than the inliner goes; a damaged table may form a ring.
        const DEEPEST: usize = 256;
        let InlineEntry {
            size,
            name,
            parent_pc,
        } = self.layout.inline_entry;
        let mut calls = Vec::new();
        let mut at = address;
        while calls.len() < DEEPEST {
            let index = self
                .pcdata(func, INLINE_INDEX, at)
                .and_then(|i| u64::try_from(i).ok());
            let Some(entry) = index.and_then(|i| i.checked_mul(size)) else {
                break;
            };
            let field = |offset: u64| tree.u32(entry.checked_add(offset)?);
            let (Some(name), Some(parent)) = (field(name), field(parent_pc)) else {
                break;
            };
            let (Some(name), Some(parent)) = (
                self.name_at(name),
                func.entry.checked_add(u64::from(parent)),
            ) else {
                break;
            };
            calls.push((name, parent));
            at = parent;
        }
        calls
    }

    pub fn layout(&self) -> &'static Layout {
        self.layout
    }
}

/// One run of a pc-value table: `value` holds up to, not including, `end`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub end: VirtualAddress,
    pub value: i32,
}

/// Iterates over the runs of a pc-value table: pairs of (zigzag Δvalue, Δpc / quantum) from
/// value −1, ended by a Δvalue of 0 that is not the first.
#[derive(Debug)]
pub(crate) struct Steps<'data> {
    data: Bytes<'data>,
    at: u64,
    address: VirtualAddress,
    value: i32,
    quantum: u64,
    first: bool,
    /// The function's end.
    limit: VirtualAddress,
}

impl Iterator for Steps<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let zigzag = self.data.uvarint(&mut self.at)? as u32;
        if zigzag == 0 && !self.first {
            self.at = u64::MAX;
            return None;
        }
        self.first = false;
        let delta = (zigzag >> 1) as i32 ^ -((zigzag & 1) as i32);
        self.value = self.value.wrapping_add(delta);
        let advance = self.data.uvarint(&mut self.at)?.checked_mul(self.quantum)?;
        if advance == 0 || self.address >= self.limit {
            // The compiler writes no empty runs. Without them there are no more runs than code.
            self.at = u64::MAX;
            return None;
        }
        self.address = self.address.checked_add(advance)?;
        Some(Step {
            end: self.address,
            value: self.value,
        })
    }
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
