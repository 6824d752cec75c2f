//! Reading a saved profile back. The file is untrusted: every fault is a sentence, never a panic.

use std::io::{self, Read};
use std::marker::PhantomData;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

use super::{Profile, Scan};

/// The largest saved profile that is read, in bytes. A profile of 11,000 sites and 50,000 stacks
/// is about 30 MB.
pub const FILE_LIMIT: u64 = 512 << 20;

/// Why a file is not a profile that can be shown. Each message completes "FILE: …".
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file could not be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Nothing but white space.
    #[error("it is empty; a profile is made with `deferprof attach -o FILE.json PID`")]
    Empty,
    /// Larger than [`FILE_LIMIT`].
    #[error("it is larger than {} MiB, the most that is read", FILE_LIMIT >> 20)]
    TooLarge,
    /// No JSON, or cut off.
    #[error("it is not valid JSON: {0}")]
    NotJson(#[source] serde_json::Error),
    /// JSON of something else.
    #[error(
        "it is JSON but not a deferprof profile: it has no \"schema\" such as \"{}\"",
        Profile::SCHEMA
    )]
    NoSchema,
    /// A scan, which has nothing to report on.
    #[error(
        "it is the result of a scan, not a profile: nothing was counted in it; \
         make a profile with `deferprof attach` or `deferprof run`"
    )]
    IsScan,
    /// Written by another version.
    #[error(
        "its schema is {0:?}, and this deferprof reads only {known:?}: use the version that wrote it, or a newer one",
        known = Profile::SCHEMA
    )]
    UnknownSchema(String),
    /// A field is missing or has another type.
    #[error("it does not follow the schema {known:?}: {0}", known = Profile::SCHEMA)]
    Malformed(#[source] serde_json::Error),
    /// The parts contradict each other.
    #[error("it contradicts itself: {0}")]
    Inconsistent(String),
}

impl Profile {
    /// The name and version of this JSON format.
    pub const SCHEMA: &str = "deferprof.profile/1";

    /// Reads a profile that [`crate::report`] wrote as JSON. Fields of later versions are ignored.
    ///
    /// # Errors
    /// [`LoadError`]: empty, not JSON, another schema, or parts that contradict each other.
    pub fn from_json(bytes: &[u8]) -> Result<Self, LoadError> {
        #[derive(Deserialize)]
        struct Head {
            schema: Option<String>,
        }

        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Err(LoadError::Empty);
        }
        if bytes.len() as u64 > FILE_LIMIT {
            return Err(LoadError::TooLarge);
        }
        let head: Head = serde_json::from_slice(bytes).map_err(|error| {
            if error.is_data() {
                LoadError::NoSchema
            } else {
                LoadError::NotJson(error)
            }
        })?;
        match head.schema {
            None => return Err(LoadError::NoSchema),
            Some(schema) if schema == Self::SCHEMA => {}
            Some(schema) if schema == Scan::SCHEMA => return Err(LoadError::IsScan),
            Some(schema) => return Err(LoadError::UnknownSchema(schema)),
        }
        let profile: Self = serde_json::from_slice(bytes).map_err(LoadError::Malformed)?;
        profile.check().map_err(LoadError::Inconsistent)?;
        Ok(profile)
    }

    /// Reads a profile from a file or a pipe, at most [`FILE_LIMIT`] bytes.
    ///
    /// # Errors
    /// As [`Profile::from_json`], and [`LoadError::Io`].
    pub fn from_reader(reader: impl Read) -> Result<Self, LoadError> {
        let mut bytes = Vec::new();
        reader.take(FILE_LIMIT + 1).read_to_end(&mut bytes)?;
        Self::from_json(&bytes)
    }

    /// Whether the parts agree: unique sites, stacks that name sites and frames that exist, no
    /// negative times.
    fn check(&self) -> Result<(), String> {
        let mut ids = std::collections::HashSet::new();
        for site in &self.sites {
            if !ids.insert(site.info.id.as_str()) {
                return Err(format!("the site {:?} is listed twice", site.info.id));
            }
            if let Some(ns) = negative([site.cost_ns, site.saving_ns]) {
                return Err(format!(
                    "the site {:?} costs or saves {ns} ns",
                    site.info.id
                ));
            }
        }
        for site in &self.sites {
            let means = site
                .latency_ns
                .map(|l| [l.register, l.call, l.held].map(|h| h.map(|h| h.mean)));
            if let Some(ns) = means.and_then(negative) {
                return Err(format!("the site {:?} took {ns} ns", site.info.id));
            }
        }
        let overhead = self.overhead.map(|o| [o.ns_per_hit, o.target_share]);
        if let Some(value) = overhead.and_then(negative) {
            return Err(format!("the overhead is {value}"));
        }
        for (number, stack) in self.stacks.iter().flatten().enumerate() {
            if !ids.contains(stack.site.as_str()) {
                return Err(format!(
                    "stack {number} belongs to {:?}, which is not among the sites",
                    stack.site
                ));
            }
            if let Some(ns) = negative([stack.cost_ns]) {
                return Err(format!("stack {number} costs {ns} ns"));
            }
            let Some(locations) = &stack.locations else {
                continue;
            };
            if locations.len() != stack.frames.len() {
                return Err(format!(
                    "stack {number} has {} frames but {} locations",
                    stack.frames.len(),
                    locations.len()
                ));
            }
            let table = self.frames.as_deref().unwrap_or_default();
            if let Some(index) = locations.iter().find(|&&i| i as usize >= table.len()) {
                return Err(format!(
                    "stack {number} names frame {index} of a table of {}",
                    table.len()
                ));
            }
        }
        Ok(())
    }
}

/// The first value that is less than nothing.
fn negative<const N: usize>(values: [Option<f64>; N]) -> Option<f64> {
    values.into_iter().flatten().find(|&value| value < 0.0)
}

impl Scan {
    /// The name and version of this JSON format.
    pub const SCHEMA: &str = "deferprof.scan/1";
}

/// The `schema` field of a `T`: always the one constant, checked when read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Schema<T>(PhantomData<fn() -> T>);

/// A type that is a JSON document of its own.
pub(crate) trait Document {
    const NAME: &'static str;
}

impl Document for Profile {
    const NAME: &'static str = Self::SCHEMA;
}

impl Document for Scan {
    const NAME: &'static str = Self::SCHEMA;
}

impl<T> Default for Schema<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Document> Serialize for Schema<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(T::NAME)
    }
}

impl<'de, T: Document> Deserialize<'de> for Schema<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        if name == T::NAME {
            Ok(Self::default())
        } else {
            Err(de::Error::custom(format_args!(
                "the schema is {name:?}, not {:?}",
                T::NAME
            )))
        }
    }
}
