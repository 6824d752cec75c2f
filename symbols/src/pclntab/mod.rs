//! pclntab: the table that maps program counters to functions, lines and stack depths. Go's own
//! traceback needs it, so every Go binary has it, stripped or not.

mod locate;
mod values;

use crate::bytes::Bytes;
use crate::elf::Image;
use crate::error::damaged;
use crate::release::{FuncLayout, Layout};
use crate::{Result, VirtualAddress};

pub(crate) use locate::{Location, locate, missing};

const STRUCTURE: &str = "pclntab";

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

impl<'data> Pclntab<'data> {
    /// Reads the header for `layout`. `text` is filled in by [`Self::set_text`].
    pub fn new(location: Location<'data>, layout: &'static Layout) -> Result<Self> {
        let Location {
            address,
            data,
            magic,
        } = location;
        if let Some(magic) = magic.filter(|magic| *magic != layout.magic) {
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

    /// Whether the table tells which functions have defers.
    pub fn tells_defers(&self) -> bool {
        self.fields().deferreturn.is_some()
    }

    /// Offset from the entry of the first CALL of deferreturn; 0 if the function has no defer.
    /// (amd64 1.12 and 1.13 store the CALL's address + 1.)
    pub fn deferreturn(&self, func: Func) -> Option<u32> {
        self.field(func, self.fields().deferreturn?)
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
        let id = self.layout.wrapper_func_id;
        id.is_some() && self.func_id(func) == id
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

    pub fn layout(&self) -> &'static Layout {
        self.layout
    }
}
