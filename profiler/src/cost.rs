//! What a defer costs: `cost_ns` and `saving_ns`, and what they are based on.
//!
//! The best evidence that a recording has is taken: the time that registering took, else where the
//! records came from, else the count alone. What is not measured comes from a table:
//! `scripts/cost-table/regenerate` times every mechanism in every Go release at hand, without any
//! probe, and writes `cost_table.json`, which is compiled in. `docs/cost.md` states the limits.

use std::sync::LazyLock;

use deferprof_symbols::Mechanism;
use serde::{Deserialize, Serialize};

use crate::profile::{Histogram, Pool};

/// The measured costs of all releases.
#[derive(Clone, Debug, Deserialize)]
pub struct CostTable {
    /// The machine that it was measured on.
    pub machine: String,
    /// The day, such as `2026-11-22`.
    pub measured: String,
    /// One row a Go release, oldest first.
    pub rows: Vec<Costs>,
}

/// What one defer costs in one Go release, in ns of CPU time: registering and running an empty
/// deferred function, minus calling that function directly.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Costs {
    /// The release that was measured, such as `go1.27.3`.
    pub toolchain: String,
    /// A record from the P-local pool.
    pub heap: f64,
    /// The part of `heap` that comes after registering: giving the record back, the call.
    #[serde(rename = "heap return")]
    pub heap_return: f64,
    /// A record for which the local pool was filled from the central one, and the spill that filled
    /// that one.
    pub refill: f64,
    /// A newly allocated record, without its collection.
    pub miss: f64,
    /// A record in the frame.
    pub stack: f64,
    /// A bit in the frame.
    #[serde(rename = "open-coded")]
    pub open_coded: f64,
    /// The only defer of a range-over-func loop; Go 1.23 and newer.
    #[serde(rename = "range-func")]
    pub range_func: Option<f64>,
}

/// What is known of a site.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// How the statement is compiled.
    pub mechanism: Mechanism,
    /// How often it executed.
    pub registered: u64,
    /// Where its records came from, if measured.
    pub pool: Option<Pool>,
    /// How long registering took, if measured.
    pub register: Option<Histogram>,
}

/// What a cost was worked out from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CostBasis {
    /// The time that registering took, and the table for the return.
    Measured,
    /// Where the records came from, and the table for what each of those costs.
    Pool,
    /// The count, and the table.
    Table,
}

/// What a site's defers cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// All of them together, in ns.
    pub cost_ns: f64,
    /// How much less they would if the site were open-coded, in ns; `None` if it is.
    pub saving_ns: Option<f64>,
    /// What both rest on.
    pub basis: CostBasis,
}

impl CostTable {
    /// The table compiled in.
    pub fn builtin() -> &'static Self {
        static TABLE: LazyLock<CostTable> = LazyLock::new(|| {
            let text = include_str!("cost_table.json");
            serde_json::from_str(text).expect("the table is part of the crate, and a test reads it")
        });
        &TABLE
    }

    /// The row for a release such as `go1.25.5`, `go1.26rc1` or `devel go1.28-…`: the newest one
    /// measured that is not newer than it, otherwise the oldest; for a version that does not read
    /// as one, the newest.
    pub fn for_release(&self, go_version: &str) -> &Costs {
        let wanted = minor(go_version).unwrap_or(u32::MAX);
        let fitting = |row: &&Costs| minor(&row.toolchain).is_some_and(|row| row <= wanted);
        self.rows
            .iter()
            .rev()
            .find(fitting)
            .or(self.rows.first())
            .unwrap_or(&NOTHING)
    }
}

/// For an empty table, which a test excludes.
static NOTHING: Costs = Costs {
    toolchain: String::new(),
    heap: 0.0,
    heap_return: 0.0,
    refill: 0.0,
    miss: 0.0,
    stack: 0.0,
    open_coded: 0.0,
    range_func: None,
};

impl Costs {
    /// What a site's defers cost by the best evidence there is; `None` if the release has no such
    /// mechanism.
    pub fn estimate(&self, evidence: &Evidence) -> Option<Estimate> {
        let count = evidence.registered as f64;
        let each = self.each(evidence.mechanism)?;
        let (cost, basis) = if let Some(mean) = evidence.register.and_then(told_apart) {
            // In place of what registering a heap record takes by the table.
            let rest = each - (self.heap - self.heap_return);
            ((mean + rest) * count, CostBasis::Measured)
        } else if let Some(pool) = evidence.pool {
            let rare = |records: u64, each: f64| records as f64 * (each - self.heap);
            let rare = rare(pool.refill, self.refill) + rare(pool.miss, self.miss);
            (each * count + rare, CostBasis::Pool)
        } else {
            (each * count, CostBasis::Table)
        };
        let open_coded = self.open_coded * count;
        let saving = (evidence.mechanism != Mechanism::OpenCoded).then_some(cost - open_coded);
        Some(Estimate {
            cost_ns: rounded(cost.max(0.0)),
            saving_ns: saving.map(|ns| rounded(ns.max(0.0))),
            basis,
        })
    }

    /// What one defer of a mechanism costs, in ns.
    pub fn each(&self, mechanism: Mechanism) -> Option<f64> {
        match mechanism {
            Mechanism::Heap => Some(self.heap),
            Mechanism::Stack => Some(self.stack),
            Mechanism::OpenCoded => Some(self.open_coded),
            Mechanism::RangeFunc => self.range_func,
        }
    }
}

/// The mean of what was measured, unless most of it was too short to tell from the probes' own cost:
/// then the table knows better. A mean above the 90th percentile is made by few times in which the
/// thread had lost its processor: waiting, not cost. Then the median stands for all.
fn told_apart(histogram: Histogram) -> Option<f64> {
    let above = histogram.count.checked_sub(histogram.below_floor)?;
    let typical = match histogram.mean > histogram.p90 as f64 {
        true => histogram.p50 as f64,
        false => histogram.mean,
    };
    (above > histogram.below_floor).then_some(typical)
}

/// To tenths of a ns: more digits would be noise in a saved file.
fn rounded(ns: f64) -> f64 {
    (ns * 10.0).round() / 10.0
}

/// The 27 of `go1.27.3`.
fn minor(version: &str) -> Option<u32> {
    let (_, rest) = version.split_once("go1.")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_table_is_complete_and_in_order() {
        let table = CostTable::builtin();
        let minors: Vec<_> = table.rows.iter().map(|row| minor(&row.toolchain)).collect();
        assert!(!minors.is_empty() && minors.iter().all(Option::is_some));
        assert!(minors.is_sorted());
        for row in &table.rows {
            assert!(
                0.0 < row.open_coded && row.open_coded < row.stack && row.stack < row.heap,
                "{row:?}"
            );
            assert!(
                0.0 < row.heap_return && row.heap_return < row.heap && row.heap < row.miss,
                "{row:?}"
            );
            // It moves 16 records twice.
            assert!(row.miss < row.refill, "{row:?}");
            let has_range_func = minor(&row.toolchain) >= Some(23);
            assert_eq!(row.range_func.is_some(), has_range_func, "{row:?}");
        }
    }

    #[test]
    fn a_release_takes_the_newest_row_that_is_not_newer() {
        let table = CostTable::builtin();
        let row = |version| table.for_release(version).toolchain.as_str();
        assert_eq!(row("go1.25.5"), "go1.25.5");
        assert_eq!(row("go1.25rc1"), "go1.25.5");
        assert_eq!(row("devel go1.99-0123abc"), "go1.27.3");
        assert_eq!(row("go1.13.4"), "go1.15.15");
        assert_eq!(row("what is this"), "go1.27.3");
    }

    const COSTS: Costs = Costs {
        toolchain: String::new(),
        heap: 20.0,
        heap_return: 8.0,
        refill: 100.0,
        miss: 50.0,
        stack: 15.5,
        open_coded: 0.5,
        range_func: None,
    };

    fn estimate(
        mechanism: Mechanism,
        pool: Option<Pool>,
        register: Option<Histogram>,
    ) -> Option<(f64, Option<f64>, CostBasis)> {
        let evidence = Evidence {
            mechanism,
            registered: 1000,
            pool,
            register,
        };
        let estimate = COSTS.estimate(&evidence)?;
        Some((estimate.cost_ns, estimate.saving_ns, estimate.basis))
    }

    fn histogram(below_floor: u64) -> Histogram {
        Histogram {
            count: 900,
            below_floor,
            min: 10,
            p50: 30,
            p90: 50,
            p99: 60,
            p999: 70,
            max: 80,
            mean: 32.0,
        }
    }

    const POOL: Pool = Pool {
        hit: 890,
        refill: 10,
        miss: 100,
    };

    #[test]
    fn saving_is_cost_less_open_coding() {
        let table = CostBasis::Table;
        for (mechanism, expected) in [
            (Mechanism::Heap, Some((20_000.0, Some(19_500.0), table))),
            (Mechanism::Stack, Some((15_500.0, Some(15_000.0), table))),
            (Mechanism::OpenCoded, Some((500.0, None, table))),
            (Mechanism::RangeFunc, None),
        ] {
            assert_eq!(estimate(mechanism, None, None), expected, "{mechanism}");
        }
    }

    #[test]
    fn the_best_evidence_is_taken() {
        let heap = |pool, register| estimate(Mechanism::Heap, pool, register).unwrap();
        // 890 × 20 + 10 × 100 + 100 × 50.
        let by_pool = (23_800.0, Some(23_300.0), CostBasis::Pool);
        assert_eq!(heap(Some(POOL), None), by_pool);
        // 1000 × (32 + 8), also for those whose time was not taken.
        let measured = (40_000.0, Some(39_500.0), CostBasis::Measured);
        assert_eq!(heap(Some(POOL), Some(histogram(0))), measured);
        assert_eq!(heap(None, Some(histogram(449))), measured);
    }

    #[test]
    fn a_mean_that_waiting_made_is_no_evidence() {
        let waited = Histogram {
            max: 4_000_000,
            mean: 5_000.0,
            ..histogram(0)
        };
        let estimate = estimate(Mechanism::Heap, None, Some(waited)).unwrap();
        // 1000 × (30 + 8), by the median.
        assert_eq!((estimate.0, estimate.2), (38_000.0, CostBasis::Measured));
    }

    #[test]
    fn times_below_the_floor_are_no_evidence() {
        let heap = |register| estimate(Mechanism::Heap, Some(POOL), Some(register)).unwrap();
        assert_eq!(heap(histogram(450)).2, CostBasis::Pool);
        assert_eq!(heap(histogram(u64::MAX)).2, CostBasis::Pool);
        let empty = Histogram {
            count: 0,
            ..histogram(0)
        };
        assert_eq!(heap(empty).2, CostBasis::Pool);
    }
}
