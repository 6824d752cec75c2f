//! What a defer costs: the table behind `cost_ns` and `saving_ns`.
//!
//! The figures are measured, not derived: `scripts/cost-table/regenerate` times every mechanism in
//! every Go release at hand and writes `cost_table.json`, which is compiled in. `docs/cost.md`
//! states the basis and its limits.

use std::sync::LazyLock;

use deferprof_symbols::Mechanism;
use serde::Deserialize;

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
    /// A record in the frame.
    pub stack: f64,
    /// A bit in the frame.
    #[serde(rename = "open-coded")]
    pub open_coded: f64,
    /// The only defer of a range-over-func loop; Go 1.23 and newer.
    #[serde(rename = "range-func")]
    pub range_func: Option<f64>,
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
    stack: 0.0,
    open_coded: 0.0,
    range_func: None,
};

impl Costs {
    /// What `registered` defers of a mechanism cost, in ns; `None` if the release has no such
    /// mechanism.
    pub fn cost_ns(&self, mechanism: Mechanism, registered: u64) -> Option<f64> {
        Some(rounded(self.each(mechanism)? * registered as f64))
    }

    /// What of it would be saved if the site were open-coded, in ns; `None` for a site that is.
    pub fn saving_ns(&self, mechanism: Mechanism, registered: u64) -> Option<f64> {
        if mechanism == Mechanism::OpenCoded {
            return None;
        }
        let each = (self.each(mechanism)? - self.open_coded).max(0.0);
        Some(rounded(each * registered as f64))
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
        assert_eq!(row("go1.13.4"), "go1.21.13");
        assert_eq!(row("what is this"), "go1.27.3");
    }

    #[test]
    fn saving_is_cost_less_open_coding() {
        let costs = Costs {
            toolchain: "go1.27.3".into(),
            heap: 20.0,
            stack: 15.5,
            open_coded: 0.5,
            range_func: None,
        };
        assert_eq!(costs.cost_ns(Mechanism::Heap, 1000), Some(20_000.0));
        assert_eq!(costs.saving_ns(Mechanism::Stack, 1000), Some(15_000.0));
        assert_eq!(costs.saving_ns(Mechanism::OpenCoded, 1000), None);
        assert_eq!(costs.cost_ns(Mechanism::RangeFunc, 1000), None);
    }
}
