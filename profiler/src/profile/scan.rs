//! What `deferprof scan` reports: a binary's sites, without running it.

use deferprof_symbols::{BinaryInfo, Inventory, ProbePoint, Site};
use serde::{Deserialize, Serialize};

use super::SiteInfo;
use super::load::Schema;

/// The result of a scan, schema `deferprof.scan/1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scan {
    pub(crate) schema: Schema<Self>,
    /// Facts of the executable as a whole.
    pub binary: ScanBinary,
    /// Every site, in the inventory's order: by function name, then by ordinal.
    pub sites: Vec<ScanSite>,
    /// What the reader should know, a full sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Facts of one Go executable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanBinary {
    /// The path as the user gave it.
    pub path: String,
    /// The release as the binary names it, such as `go1.27.3`; without the patch release where only its
    /// functions tell it (garble).
    pub go_version: String,
    /// `amd64` or `arm64`.
    pub arch: String,
    /// The Go build id, where the linker left one.
    #[serde(default)]
    pub build_id: Option<String>,
    /// Whether it is position-independent.
    pub pie: bool,
    /// Whether it has no symbol table.
    pub stripped: bool,
    /// False if the main module was compiled with `-N`.
    pub optimized: bool,
}

/// One site of a scan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScanSite {
    /// The facts that a profile repeats.
    #[serde(flatten)]
    pub info: SiteInfo,
    /// Where it would be counted; for `--explain` only, not part of the JSON.
    #[serde(skip)]
    pub probe: Option<ScanProbe>,
}

/// Where a site is counted and why exactly there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanProbe {
    /// The instruction, its kind and the proof.
    pub point: ProbePoint,
    /// For open-coded sites: in how many places exit code makes the deferred call.
    pub exits: usize,
}

impl Scan {
    /// What `inventory` says about the executable at `path`.
    pub fn new(path: &str, inventory: Inventory) -> Self {
        Self {
            schema: Schema::default(),
            binary: ScanBinary::new(path, &inventory.binary),
            sites: inventory.sites.into_iter().map(ScanSite::from).collect(),
            warnings: inventory.warnings,
        }
    }
}

impl ScanBinary {
    /// The facts `info` of the executable at `path`.
    pub fn new(path: &str, info: &BinaryInfo) -> Self {
        Self {
            path: path.to_owned(),
            go_version: info.go_version.clone(),
            arch: info.architecture.as_str().to_owned(),
            build_id: info.build_id.clone(),
            pie: info.pie,
            stripped: info.stripped,
            optimized: info.optimized,
        }
    }
}

impl From<Site> for ScanSite {
    fn from(site: Site) -> Self {
        Self {
            probe: Some(ScanProbe {
                point: site.registration,
                exits: site.exits.len(),
            }),
            info: SiteInfo::from(site),
        }
    }
}
