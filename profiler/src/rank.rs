//! In which order sites are shown.

use std::cmp::Ordering;

use clap::ValueEnum;

use crate::profile::{Histogram, Profile, ProfileSite};

/// What makes a site important.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub enum SortKey {
    /// Estimated CPU time in the window.
    #[default]
    Cost,
    /// How often the statement executed.
    Registered,
    /// Records that had to be allocated.
    Miss,
    /// Total time in the deferred function.
    Call,
    /// Total time from registered to ran.
    Held,
}

impl SortKey {
    /// The name on the command line and in headings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::Registered => "registered",
            Self::Miss => "miss",
            Self::Call => "call",
            Self::Held => "held",
        }
    }

    /// What the site has of it, or `None` if it was not measured. Comparable among sites only.
    pub fn value(self, site: &ProfileSite) -> Option<f64> {
        let total = |histogram: Option<Histogram>| histogram.map(|h| h.mean * h.count as f64);
        match self {
            Self::Cost => site.cost_ns,
            Self::Registered => site.registered.map(|count| count as f64),
            Self::Miss => site.pool.map(|pool| pool.miss as f64),
            Self::Call => total(site.latency_ns.and_then(|latency| latency.call)),
            Self::Held => total(site.latency_ns.and_then(|latency| latency.held)),
        }
    }
}

/// The sites that registered at least once, most important first. Where the key was not measured
/// a site comes last; equal ones follow by count, then by id.
pub fn rank(profile: &Profile, key: SortKey) -> Vec<&ProfileSite> {
    let mut sites: Vec<_> = profile.sites.iter().filter(|s| s.count() > 0).collect();
    sites.sort_by(|a, b| {
        descending(key.value(a), key.value(b))
            .then_with(|| b.count().cmp(&a.count()))
            .then_with(|| a.info.id.cmp(&b.info.id))
    });
    sites
}

fn descending(a: Option<f64>, b: Option<f64>) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => b.total_cmp(&a),
        (a, b) => b.is_some().cmp(&a.is_some()),
    }
}
