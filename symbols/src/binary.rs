//! One Go executable, opened for questions.

use crate::{Inventory, Result, VirtualAddress};

/// A Go executable whose headers, release and function table have been found.
/// It borrows the file's bytes and copies nothing large.
#[derive(Debug)]
pub struct Binary<'data> {
    bytes: &'data [u8],
}

/// One frame of source code at an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Function name as pclntab has it.
    pub function: String,
    /// Source file.
    pub file: String,
    /// Line; 0 if pclntab has none.
    pub line: u32,
    /// The line on which the function starts (since 1.20), otherwise 0.
    pub start_line: u32,
}

impl<'data> Binary<'data> {
    /// Reads headers, build info and tables.
    pub fn parse(bytes: &'data [u8]) -> Result<Self> {
        Ok(Self { bytes })
    }

    /// Lists every defer site. Decodes only functions that contain defers.
    pub fn inventory(&self) -> Result<Inventory> {
        Err(crate::Error::NotGo)
    }

    /// The source frames at `address`, innermost first, inlined calls expanded; empty if it is not
    /// Go code of this binary. For a return address ask for the byte before it.
    pub fn frames(&self, _address: VirtualAddress) -> Vec<Frame> {
        let _ = self.bytes;
        Vec::new()
    }

    /// The address at which the byte at a file offset is linked, if a segment maps it.
    pub fn address_of(&self, _offset: crate::FileOffset) -> Option<VirtualAddress> {
        None
    }
}
