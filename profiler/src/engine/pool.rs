//! Where heap records came from, as an engine's answer.

/// How often the runtime went its rare paths. What is not here was served by the local pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolCounts {
    /// By site: registrations for which the local pool had to be filled from the central one.
    pub refill: Vec<u64>,
    /// By site: registrations whose record was allocated.
    pub miss: Vec<u64>,
    /// Refills of the whole process: of sites that were not asked for and of the runtime's own
    /// records, too.
    pub all_refills: u64,
    /// Allocated records of the whole process.
    pub all_misses: u64,
    /// How often half of a full local pool went to the central one.
    pub all_spills: u64,
    /// How often the central pool was asked and had been emptied by another P meanwhile.
    pub empty: u64,
    /// Refills that could not be told from misses. Not 0: no outcome is certain.
    pub bad_pool: u64,
    /// Refills and misses whose stack could not be read. Not 0: no site's outcomes are certain.
    pub bad_stack: u64,
    /// Hits that the kernel did not report. Not 0: no outcome is certain.
    pub missed: u64,
}

/// The outcomes of one site's registrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOutcomes {
    /// The local pool had a record.
    pub hit: u64,
    /// It had none, and was filled from the central pool.
    pub refill: u64,
    /// Both were empty, and a record was allocated.
    pub miss: u64,
}

impl PoolCounts {
    /// Whether the totals of the process are certain. An empty central pool is always followed by
    /// a miss, so more of these than misses would show that refills are told wrongly.
    pub fn totals_are_certain(&self) -> bool {
        self.bad_pool == 0 && self.missed == 0 && self.empty <= self.all_misses
    }

    /// The outcomes of a site that `registered` times took a record; `None` if they are not certain.
    pub fn outcomes(&self, site: usize, registered: u64) -> Option<PoolOutcomes> {
        if !self.totals_are_certain() || self.bad_stack != 0 {
            return None;
        }
        let (refill, miss) = (*self.refill.get(site)?, *self.miss.get(site)?);
        // More than registered: a registration was under way when counting began.
        let hit = registered.checked_sub(refill)?.checked_sub(miss)?;
        Some(PoolOutcomes { hit, refill, miss })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts() -> PoolCounts {
        PoolCounts {
            refill: vec![2, 0],
            miss: vec![3, 1],
            all_misses: 4,
            ..PoolCounts::default()
        }
    }

    #[test]
    fn what_is_neither_refill_nor_miss_is_a_hit() {
        let outcomes = PoolOutcomes {
            hit: 5,
            refill: 2,
            miss: 3,
        };
        assert_eq!(counts().outcomes(0, 10), Some(outcomes));
        assert_eq!(counts().outcomes(1, 0), None);
        assert_eq!(counts().outcomes(2, 10), None);
    }

    #[test]
    fn an_uncertain_outcome_is_none() {
        for spoil in [
            |c: &mut PoolCounts| c.bad_pool = 1,
            |c: &mut PoolCounts| c.bad_stack = 1,
            |c: &mut PoolCounts| c.missed = 1,
            |c: &mut PoolCounts| c.empty = 5,
        ] {
            let mut counts = counts();
            spoil(&mut counts);
            assert_eq!(counts.outcomes(0, 10), None, "{counts:?}");
        }
    }
}
