//! The order of sites.

use deferprof::profile::Profile;
use deferprof::rank::{SortKey, rank};

use crate::common::api;

fn order(profile: &Profile, key: SortKey) -> Vec<u64> {
    rank(profile, key).iter().map(|site| site.count()).collect()
}

#[test]
fn by_cost_and_by_count() {
    let profile = api();
    assert_eq!(
        order(&profile, SortKey::Cost),
        [1_000_000, 500_000, 2_000_000, 10_000]
    );
    assert_eq!(
        order(&profile, SortKey::Registered),
        [2_000_000, 1_000_000, 500_000, 10_000]
    );
}

#[test]
fn what_was_not_measured_comes_last() {
    let mut profile = api();
    profile.sites[2].pool = serde_json::from_str(r#"{"hit":1,"refill":0,"miss":0}"#).ok();
    assert_eq!(
        order(&profile, SortKey::Miss),
        [10_000, 2_000_000, 1_000_000, 500_000]
    );
    profile.sites[5].cost_ns = None;
    assert_eq!(
        order(&profile, SortKey::Cost),
        [1_000_000, 500_000, 10_000, 2_000_000]
    );
}

#[test]
fn ties_are_broken_by_count_then_by_id() {
    let mut profile = api();
    for site in &mut profile.sites {
        site.registered = Some(7);
        site.cost_ns = Some(1.0);
    }
    profile.sites.reverse();
    let ids: Vec<_> = rank(&profile, SortKey::Cost)
        .iter()
        .map(|site| site.info.id.as_str())
        .collect();
    assert!(ids.is_sorted(), "{ids:?}");
    profile.sites[0].registered = Some(8);
    let first = rank(&profile, SortKey::Cost)[0].info.id.clone();
    assert_eq!(first, "net/http.(*conn).serve#1");
}
