//! One Go module of an executable: its moduledata, and with it pclntab and funcdata.

use std::ops::Range;

use crate::bytes::Bytes;
use crate::elf::Image;
use crate::error::damaged;
use crate::pclntab::{Func, Location, Pclntab};
use crate::release::{Layout, ModuleLayout, OpenDeferFormat};
use crate::{Result, VirtualAddress};

const STRUCTURE: &str = "moduledata";

/// pclntab with what moduledata adds to it.
#[derive(Debug)]
pub(crate) struct Module<'data> {
    /// Where moduledata stands.
    #[cfg(any(test, feature = "fuzzing"))]
    pub address: VirtualAddress,
    pub table: Pclntab<'data>,
    pub text: VirtualAddress,
    pub etext: VirtualAddress,
    gofunc: VirtualAddress,
}

/// Where an open-coded function keeps its bits and closures, as bytes below varp, which is
/// `SP + depth − 8` (Go `runtime/panic.go`, frame pointers enabled).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OpenDefers {
    pub bits: i64,
    /// By bit.
    pub slots: Vec<i64>,
}

impl<'data> Module<'data> {
    pub fn find(
        image: &Image<'data>,
        location: Location<'data>,
        layout: &'static Layout,
    ) -> Result<Self> {
        let mut table = Pclntab::new(location, layout)?;
        let address = find_moduledata(image, &table, &layout.module).ok_or_else(|| {
            damaged(
                STRUCTURE,
                "no structure that points to pclntab and agrees with it was found",
            )
        })?;
        let word = |offset: u64| {
            address
                .checked_add(offset)
                .and_then(|a| image.word(a))
                .map(VirtualAddress)
        };
        let missing = || damaged(STRUCTURE, "it is cut off");
        let text = word(layout.module.text).ok_or_else(missing)?;
        let etext = word(layout.module.etext).ok_or_else(missing)?;
        let gofunc = match layout.module.gofunc {
            Some(offset) => word(offset).ok_or_else(missing)?,
            None => VirtualAddress(0),
        };
        if layout.func.entry_size == 4 {
            table.set_text(text);
        }
        let module = Self {
            #[cfg(any(test, feature = "fuzzing"))]
            address,
            table,
            text,
            etext,
            gofunc,
        };
        module.check(image)?;
        Ok(module)
    }

    /// The first and last function lie in the text, and in order.
    fn check(&self, image: &Image<'data>) -> Result<()> {
        let first = self.table.func(image, 0);
        let last = self.table.func(image, self.table.count.saturating_sub(1));
        let inside = |f: &Func| f.entry >= self.text && f.entry < self.etext;
        match (first, last) {
            (Some(first), Some(last))
                if inside(&first) && inside(&last) && first.entry <= last.entry =>
            {
                Ok(())
            }
            _ => Err(damaged(
                STRUCTURE,
                "its functions do not lie between text and etext",
            )),
        }
    }

    /// The inline tree of a function; empty if it has none.
    pub fn inline_tree(&self, image: &Image<'data>, func: Func) -> Bytes<'data> {
        let index = self.table.layout().inline_tree;
        index
            .and_then(|index| {
                self.table
                    .funcdata(image, func, index.funcdata, self.gofunc)
            })
            .and_then(|address| image.bytes_from(address))
            .unwrap_or_default()
    }

    /// The variables of the frame that are pointed to, as far as they hold pointers themselves:
    /// ranges of addresses relative to varp. `None` if the release or the data does not tell.
    pub fn stack_objects(&self, image: &Image<'data>, func: Func) -> Option<Vec<Range<i64>>> {
        let index = self.table.layout().stack_objects?;
        match self.table.funcdata(image, func, index, self.gofunc) {
            Some(address) => read_stack_objects(image.bytes_from(address)?),
            None => Some(Vec::new()),
        }
    }

    /// The function's open-coded defers; `None` if it has none, or the data is damaged.
    pub fn open_defers(&self, image: &Image<'data>, func: Func) -> Option<OpenDefers> {
        let (index, format) = self.table.layout().open_defers?;
        let address = self.table.funcdata(image, func, index, self.gofunc)?;
        read_open_defers(image.bytes_from(address)?, format)
    }
}

/// A count, then `stackObjectRecord`s (`runtime/stack.go`, since 1.18): offset, size, two words more.
/// Offsets of locals are negative and count from varp, those of arguments from argp.
fn read_stack_objects(data: Bytes<'_>) -> Option<Vec<Range<i64>>> {
    const RECORD: u64 = 16;
    /// More than any frame has; a larger count is damage.
    const MOST: u64 = 256;
    /// The saved frame pointer and the return address lie between varp and argp.
    const ARGUMENTS: i64 = 16;
    let count = data.u64(0).filter(|count| *count <= MOST)?;
    let mut objects = Vec::new();
    for index in 0..count {
        let at = index.checked_mul(RECORD)?.checked_add(8)?;
        let offset = i64::from(data.u32(at)? as i32);
        let size = i64::from(data.u32(at.checked_add(4)?)? as i32);
        let start = if offset < 0 {
            offset
        } else {
            offset + ARGUMENTS
        };
        objects.push(start..start + size);
    }
    objects.sort_by_key(|object| object.start);
    Some(objects)
}

fn read_open_defers(data: Bytes<'_>, format: OpenDeferFormat) -> Option<OpenDefers> {
    /// The compiler's limit, `maxOpenDefers` (`cmd/compile/internal/walk`).
    const MOST: u64 = 8;
    let mut at = 0;
    let mut next = || data.uvarint(&mut at).filter(|v| *v <= u64::from(u32::MAX));
    if format == OpenDeferFormat::WithArguments {
        next()?;
    }
    let bits = next()? as i64;
    let mut slots = Vec::new();
    if format == OpenDeferFormat::SlotArray {
        // Slot 0 lies lowest, and the slots end at varp: the count follows (see the facts, 4.1).
        let first = next()?;
        if first % 8 != 0 || first == 0 || first / 8 > MOST {
            return None;
        }
        slots.extend((0..first / 8).map(|i| (first - 8 * i) as i64));
        return Some(OpenDefers { bits, slots });
    }
    let count = next()?;
    if count > MOST {
        return None;
    }
    for _ in 0..count {
        if format == OpenDeferFormat::WithArguments {
            next()?;
        }
        slots.push(next()? as i64);
        if format == OpenDeferFormat::WithArguments {
            let arguments = next()?;
            for _ in 0..arguments.checked_mul(3)? {
                next()?;
            }
        }
    }
    // The last statement comes first.
    slots.reverse();
    Some(OpenDefers { bits, slots })
}

/// Reads bytes in every format there is.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn read_any(data: Bytes<'_>) {
    use OpenDeferFormat::{SlotArray, Slots, WithArguments};
    for format in [WithArguments, Slots, SlotArray] {
        if let Some(open) = read_open_defers(data, format) {
            assert!(open.slots.len() <= 8);
        }
    }
    if let Some(objects) = read_stack_objects(data) {
        assert!(objects.len() * 16 <= data.len());
    }
}

/// The address of moduledata: the aligned word that points to the pclntab header and is followed
/// by fields that agree with it.
fn find_moduledata(
    image: &Image<'_>,
    table: &Pclntab<'_>,
    layout: &ModuleLayout,
) -> Option<VirtualAddress> {
    let agrees = |candidate: VirtualAddress| {
        let word = |offset: u64| image.word(candidate.checked_add(offset)?);
        let functab = table.address.checked_add(table.functab);
        let matches = word(0) == Some(table.address.0)
            && word(layout.ftab).map(VirtualAddress) == functab
            && word(layout.ftab + 8) == table.count.checked_add(1);
        matches && word(layout.minpc).is_some_and(|pc| image.is_executable(VirtualAddress(pc)))
    };
    let search = |data: &[u8], base: VirtualAddress| {
        let needle = table.address.0.to_le_bytes();
        memchr::memmem::find_iter(data, &needle)
            .filter_map(|at| base.checked_add(at as u64))
            .find(|address| address.0 % 8 == 0 && agrees(*address))
    };
    let named = [&b".go.module"[..], b".noptrdata"]
        .into_iter()
        .find_map(|name| image.section(name).and_then(|s| search(s.data, s.address)));
    named
        .or_else(|| {
            image
                .segments
                .iter()
                .find_map(|s| search(s.data, s.address))
        })
        .or_else(|| {
            // An external linker may leave relocated words zero in the file.
            image
                .relative_relocations()
                .iter()
                .filter(|(_, addend)| *addend == table.address.0)
                .map(|(place, _)| VirtualAddress(*place))
                .find(|address| agrees(*address))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_defer_info_is_read_in_its_three_formats() {
        // The worked example of the facts, 4.2: go1.27 F05_eight has bits at 0xf(%rsp) in a frame
        // of 0xb0 and slots 0x68…0xa0: 8 slots that end at varp, 64 bytes below it the first.
        let array = read_open_defers(Bytes(&[0x99, 0x01, 0x40]), OpenDeferFormat::SlotArray);
        let array = array.unwrap();
        assert_eq!(array.bits, 0x99);
        assert_eq!(array.slots, [64, 56, 48, 40, 32, 24, 16, 8]);
        let slots = read_open_defers(Bytes(&[0x11, 2, 0x10, 0x8]), OpenDeferFormat::Slots);
        assert_eq!(slots.unwrap().slots, [8, 16]);
        let arguments = read_open_defers(
            Bytes(&[8, 0x11, 1, 8, 0x10, 1, 1, 2, 3]),
            OpenDeferFormat::WithArguments,
        );
        assert_eq!(
            arguments.unwrap(),
            OpenDefers {
                bits: 0x11,
                slots: vec![16]
            }
        );
        assert_eq!(
            read_open_defers(Bytes(&[1, 200]), OpenDeferFormat::Slots),
            None
        );
        assert_eq!(
            read_open_defers(Bytes(&[1, 12]), OpenDeferFormat::SlotArray),
            None
        );
    }
}
