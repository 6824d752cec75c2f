//! Times, as a question to an engine and its answer.

use deferprof_ebpf_common::latency::bounds;

use super::Taxes;

/// What an engine needs to measure times.
#[derive(Clone, Copy, Debug)]
pub struct LatencyRequest<'a> {
    /// By site: whether its call of the runtime may get a record from the heap. Only then there is
    /// a time to register.
    pub takes_record: &'a [bool],
    /// What hits cost: is subtracted.
    pub taxes: Taxes,
}

/// The times of all sites.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatencyCounts {
    /// By site.
    pub sites: Vec<Times>,
    /// Starts that had no room: so many times are missing.
    pub in_flight_full: u64,
    /// Ends without a start: of what began before the counting, or was lost.
    pub unmatched: u64,
    /// Times given up because what is known of a goroutine had to make room for others.
    pub evicted: u64,
    /// Times that had no room in a bucket.
    pub buckets_full: u64,
    /// Calls that may have been ended by a panic, so that they have no time.
    pub unwound: u64,
    /// What was held, or being called, when the counting ended.
    pub in_flight: u64,
}

/// The times of one site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// To register.
    pub register: Distribution,
    /// In the deferred call.
    pub call: Distribution,
    /// From registered to the deferred call.
    pub held: Distribution,
}

/// A distribution of times in ns, in buckets: each time is known to 1/128 of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// Number of the bucket and how many times are in it, in order.
    buckets: Vec<(u32, u64)>,
    /// The sum of all times.
    pub sum: u64,
}

impl Distribution {
    /// Puts buckets of any order together.
    pub fn new(mut buckets: Vec<(u32, u64)>, sum: u64) -> Self {
        buckets.retain(|(_, count)| *count > 0);
        buckets.sort_unstable();
        Self { buckets, sum }
    }

    /// How many times.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// How many of them are shorter than `ns`, by the middles of their buckets.
    pub fn below(&self, ns: u64) -> u64 {
        let shorter = self.buckets.iter().filter(|(at, _)| middle(*at) < ns);
        shorter.map(|(_, count)| count).sum()
    }

    /// The time that a share of all times do not exceed; `None` if there are no times.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let count = self.count();
        let rank = ((share * count as f64).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        for (at, count) in &self.buckets {
            seen += count;
            if seen >= rank {
                return Some(middle(*at));
            }
        }
        None
    }

    /// The arithmetic mean; `None` if there are no times.
    pub fn mean(&self) -> Option<f64> {
        let count = self.count();
        (count > 0).then(|| self.sum as f64 / count as f64)
    }

    /// The shortest and the longest.
    pub fn range(&self) -> Option<(u64, u64)> {
        let (first, last) = (self.buckets.first()?, self.buckets.last()?);
        Some((middle(first.0), middle(last.0)))
    }

    /// Of given times.
    #[cfg(test)]
    pub(crate) fn of(times: impl IntoIterator<Item = u64>) -> Self {
        let mut buckets = std::collections::BTreeMap::new();
        let mut sum = 0;
        for ns in times {
            *buckets
                .entry(deferprof_ebpf_common::latency::bucket(ns))
                .or_insert(0) += 1;
            sum += ns;
        }
        Self::new(buckets.into_iter().collect(), sum)
    }
}

/// The middle of a bucket.
fn middle(at: u32) -> u64 {
    let (first, width) = bounds(at);
    first + width / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near_the_true_ones() {
        let times: Vec<u64> = (1..=100_000).map(|i| i * 37).collect();
        let distribution = Distribution::of(times.iter().copied());
        assert_eq!(distribution.count(), 100_000);
        for share in [0.0, 0.5, 0.9, 0.99, 0.999, 1.0] {
            let rank = ((share * 1e5) as usize).clamp(1, 100_000) - 1;
            let (true_one, found) = (times[rank], distribution.quantile(share).unwrap());
            assert!(
                found.abs_diff(true_one) <= true_one / 100,
                "{share}: {found}, {true_one}"
            );
        }
        assert_eq!(distribution.mean(), Some(37.0 * 50_000.5));
        assert_eq!(distribution.below(37 * 50_000).abs_diff(50_000) / 500, 0);
    }

    #[test]
    fn no_times_have_no_quantile() {
        let none = Distribution::default();
        assert_eq!(
            (none.quantile(0.5), none.mean(), none.range()),
            (None, None, None)
        );
    }
}
