//! What the analysis knows of a value: enough to follow `deferBits` and closures through registers
//! and stack cells.

/// A value, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Unknown,
    Constant(u64),
    /// Of its low byte, the bits that are surely set and those that may be.
    Bits(Bits),
    /// The address of a stack cell, as a key (bytes below varp).
    Stack(i64),
    /// The result of the `newobject` call at this address.
    Object(u64),
    /// Something that was defined by the instruction with this index (or, past the last one, was
    /// in a register at entry), or an address close to it. Its only use is to know that two
    /// places hold the same pointer.
    Defined(Definition),
}

/// The index of an instruction, or past the last one; as wide as the other payloads, so that values
/// are quick to compare.
pub(crate) type Definition = u64;

/// Smaller constants are no addresses: the first page is never mapped.
pub(crate) const SMALLEST_ADDRESS: u64 = 0x1000;

/// Which bits of a byte are surely and which are possibly set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(8))]
pub(crate) struct Bits {
    pub must: u8,
    pub may: u8,
}

impl Bits {
    pub const NONE: Self = Self { must: 0, may: 0 };
    pub const ANY: Self = Self { must: 0, may: 0xff };

    pub fn join(self, other: Self) -> Self {
        Self {
            must: self.must & other.must,
            may: self.may | other.may,
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            must: self.must & other.must,
            may: self.may & other.may,
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            must: self.must | other.must,
            may: self.may | other.may,
        }
    }

    fn value(self) -> Value {
        if self == Self::ANY {
            Value::Unknown
        } else {
            Value::Bits(self)
        }
    }
}

impl Value {
    /// What is known of its low byte.
    pub fn bits(self) -> Bits {
        match self {
            Self::Constant(value) => Bits {
                must: value as u8,
                may: value as u8,
            },
            Self::Bits(bits) => bits,
            Self::Unknown | Self::Stack(_) | Self::Object(_) | Self::Defined(_) => Bits::ANY,
        }
    }

    /// What is known if it is one or the other.
    pub fn join(self, other: Self) -> Self {
        if self == other {
            self
        } else {
            self.bits().join(other.bits()).value()
        }
    }

    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Constant(a), Self::Constant(b)) => Self::Constant(a & b),
            _ => self.bits().and(other.bits()).value(),
        }
    }

    pub fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Constant(a), Self::Constant(b)) => Self::Constant(a | b),
            _ => self.bits().or(other.bits()).value(),
        }
    }

    /// The address `offset` bytes further on. Stack keys count downwards.
    pub fn plus(self, offset: i64) -> Self {
        match self {
            Self::Constant(value) => Self::Constant(value.wrapping_add_signed(offset)),
            Self::Stack(key) => Self::Stack(key.wrapping_sub(offset)),
            // If a pointer is nil, Go has checked it before it computes an address near it.
            Self::Defined(_) => self,
            // An inner pointer of an object is no longer its closure.
            Self::Object(_) | Self::Bits(_) | Self::Unknown => Self::Unknown,
        }
    }

    /// Whether it surely points to mapped memory.
    pub fn is_mapped(self) -> bool {
        matches!(self, Self::Stack(_) | Self::Object(_))
            || matches!(self, Self::Constant(SMALLEST_ADDRESS..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_follow_the_operations_of_exit_code() {
        let unknown = Value::Unknown;
        let set = unknown.or(Value::Constant(2));
        assert_eq!(set, Value::Bits(Bits { must: 2, may: 0xff }));
        let cleared = set.and(Value::Constant(!2));
        assert_eq!(cleared, Value::Bits(Bits { must: 0, may: 0xfd }));
        assert_eq!(
            Value::Constant(1).join(Value::Constant(3)).bits(),
            Bits { must: 1, may: 3 }
        );
        assert_eq!(
            Value::Constant(3).and(Value::Constant(!1)),
            Value::Constant(2)
        );
    }
}
