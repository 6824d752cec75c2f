//! The facts of a site that scans and profiles share.

use deferprof_symbols::{Mechanism, Site, VirtualAddress};
use serde::{Deserialize, Serialize};

use super::WhyNotOpenCoded;
use super::words;

/// One defer statement as compiled into one function body, as a report shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteInfo {
    /// Its stable name, `function#ordinal`.
    pub id: String,
    /// The function's name as pclntab has it.
    pub function: String,
    /// Source file as the compiler recorded it.
    pub file: String,
    /// Line of the statement; `None` if the binary does not say.
    #[serde(default)]
    pub line: Option<u32>,
    /// The instruction that registers, as linked.
    #[serde(with = "words::address")]
    pub pc: VirtualAddress,
    /// How the statement was compiled.
    #[serde(with = "words::mechanism")]
    pub mechanism: Mechanism,
    /// Why it is not open-coded; `None` for open-coded sites and where the code does not tell.
    #[serde(default)]
    pub reason: Option<WhyNotOpenCoded>,
    /// The deferred function, where the code shows it.
    #[serde(default)]
    pub callee: Option<String>,
    /// The bit in `deferBits`, for open-coded sites.
    #[serde(default)]
    pub bit: Option<u8>,
}

impl From<Site> for SiteInfo {
    fn from(site: Site) -> Self {
        Self {
            id: site.id.0,
            function: site.function,
            file: site.file,
            line: (site.line != 0).then_some(site.line),
            pc: site.pc,
            mechanism: site.mechanism,
            reason: site.reason.map(WhyNotOpenCoded::Rule),
            callee: site.callee,
            bit: site.bit,
        }
    }
}
