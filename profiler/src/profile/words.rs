//! How the types of the inventory are written in JSON: the words of the design.

use std::fmt;

use deferprof_symbols::{Mechanism, Reason, VirtualAddress};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Every reason this version can name.
const REASONS: [Reason; 10] = [
    Reason::Loop,
    Reason::LoopInFunction,
    Reason::Over8Defers,
    Reason::ReturnsTimesDefers,
    Reason::OptimizationsOff,
    Reason::Race,
    Reason::ResultsEscape,
    Reason::RangeFunc,
    Reason::RangeFuncInFunction,
    Reason::OldRelease,
];

/// Every mechanism, cheapest last.
pub(crate) const MECHANISMS: [Mechanism; 4] = [
    Mechanism::Heap,
    Mechanism::RangeFunc,
    Mechanism::Stack,
    Mechanism::OpenCoded,
];

/// Why a site is not open-coded, as a file may say it: a reason this version knows, or a word of a
/// later one, kept as it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum WhyNotOpenCoded {
    /// One of the compiler's rules.
    Rule(Reason),
    /// A word that this version does not know.
    Other(String),
}

impl WhyNotOpenCoded {
    /// The word in JSON and in the table.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Rule(reason) => reason.as_str(),
            Self::Other(word) => word,
        }
    }
}

impl From<Reason> for WhyNotOpenCoded {
    fn from(reason: Reason) -> Self {
        Self::Rule(reason)
    }
}

impl fmt::Display for WhyNotOpenCoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for WhyNotOpenCoded {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for WhyNotOpenCoded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        let rule = REASONS.into_iter().find(|reason| reason.as_str() == word);
        Ok(rule.map_or(Self::Other(word), Self::Rule))
    }
}

/// For `#[serde(with)]`: a mechanism as its word.
pub(super) mod mechanism {
    use super::*;

    pub fn serialize<S: Serializer>(value: &Mechanism, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(value.as_str())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mechanism, D::Error> {
        let word = String::deserialize(deserializer)?;
        MECHANISMS
            .into_iter()
            .find(|mechanism| mechanism.as_str() == word)
            .ok_or_else(|| {
                de::Error::custom(format_args!(
                    "the mechanism {word:?} is not one of heap, stack, open-coded and range-func"
                ))
            })
    }
}

/// For `#[serde(with)]`: an address as `"0x…"`.
pub(super) mod address {
    use super::*;

    pub fn serialize<S: Serializer>(
        value: &VirtualAddress,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<VirtualAddress, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.strip_prefix("0x")
            .filter(|digits| !digits.starts_with('+'))
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .map(VirtualAddress)
            .ok_or_else(|| {
                de::Error::custom(format_args!(
                    "{text:?} is not an address such as \"0x4a1b2c\""
                ))
            })
    }
}

/// For `#[serde(with)]`: an address as `"0x…"`, or `null`.
pub(super) mod optional_address {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Wrapped(#[serde(with = "super::address")] VirtualAddress);

    #[expect(clippy::ref_option, reason = "the signature serde asks for")]
    pub fn serialize<S: Serializer>(
        value: &Option<VirtualAddress>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(Wrapped).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<VirtualAddress>, D::Error> {
        Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|Wrapped(address)| address))
    }
}
