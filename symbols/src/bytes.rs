//! Bounded little-endian reads from untrusted bytes. Nothing here can panic or read past the end.

/// A view of bytes that answers `None` instead of reaching outside.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bytes<'data>(pub &'data [u8]);

impl<'data> Bytes<'data> {
    pub fn len(self) -> usize {
        self.0.len()
    }

    /// `len` bytes at `offset`.
    pub fn slice(self, offset: u64, len: u64) -> Option<&'data [u8]> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        self.0.get(start..end)
    }

    /// Everything from `offset` on.
    pub fn from(self, offset: u64) -> Option<Bytes<'data>> {
        self.0.get(usize::try_from(offset).ok()?..).map(Bytes)
    }

    fn array<const N: usize>(self, offset: u64) -> Option<[u8; N]> {
        self.slice(offset, N as u64)?.try_into().ok()
    }

    pub fn u8(self, offset: u64) -> Option<u8> {
        self.array::<1>(offset).map(|[byte]| byte)
    }

    pub fn u32(self, offset: u64) -> Option<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    pub fn u64(self, offset: u64) -> Option<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }

    /// The NUL-terminated bytes at `offset`, without the NUL.
    pub fn c_string(self, offset: u64) -> Option<&'data [u8]> {
        let rest = self.from(offset)?.0;
        let end = memchr::memchr(0, rest)?;
        rest.get(..end)
    }

    /// An unsigned LEB128 number of at most 64 bits at `*offset`, which moves behind it.
    pub fn uvarint(self, offset: &mut u64) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(*offset)?;
            *offset = offset.checked_add(1)?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::Bytes;

    #[test]
    fn reads_end_where_the_bytes_end() {
        let bytes = Bytes(&[1, 2, 3, 4, 5]);
        assert_eq!(bytes.u32(1), Some(0x0504_0302));
        assert_eq!(bytes.u32(2), None);
        assert_eq!(bytes.u64(u64::MAX), None);
        assert_eq!(bytes.slice(3, u64::MAX), None);
        assert_eq!(bytes.c_string(0), None);
    }

    #[test]
    fn varints_follow_leb128_and_stop_at_ten_bytes() {
        let mut at = 0;
        // 624485 is the worked example of the DWARF standard, section 7.6.
        assert_eq!(Bytes(&[0xe5, 0x8e, 0x26]).uvarint(&mut at), Some(624_485));
        assert_eq!(at, 3);
        let mut at = 0;
        assert_eq!(Bytes(&[0xff; 32]).uvarint(&mut at), None);
    }
}
