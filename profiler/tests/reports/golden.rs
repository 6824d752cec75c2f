//! Formats against files. The numbers in them were worked out by hand from `data/api.json`
//! (3,510,000 defers and 29.7 ms of cost in 10 s), the layout was read by eye.

use crate::common::{api, assert_golden, bytes, file, shop, text};
use deferprof::profile::{Profile, Scan};
use deferprof::rank::SortKey;
use deferprof::report::{Format, Json, Note, Options, ScanReport, ScanTable, Weight};

fn at(width: usize) -> Options {
    Options {
        width,
        ..Options::default()
    }
}

#[test]
fn table_of_80_columns() {
    assert_golden("api.80.txt", &text(&api(), Format::Table, &at(80)));
}

#[test]
fn table_of_200_columns() {
    assert_golden("api.200.txt", &text(&api(), Format::Table, &at(200)));
}

#[test]
fn a_limited_table_counts_what_it_hides() {
    let options = Options {
        limit: Some(2),
        sort: SortKey::Registered,
        ..at(120)
    };
    assert_golden("api.top2.txt", &text(&api(), Format::Table, &options));
}

#[test]
fn times_and_pool_get_columns_when_measured() {
    let mut profile = api();
    let json = serde_json::json!({
        "count": 1000, "below_floor": 10, "min": 40, "p50": 1200, "p90": 5000, "p99": 45_000,
        "p999": 90_000, "max": 1_000_000, "mean": 2000.0});
    let site = &mut profile.sites[1];
    site.latency_ns = serde_json::from_value(serde_json::json!({"call": json, "held": json})).ok();
    site.pool =
        serde_json::from_value(serde_json::json!({"hit": 960, "refill": 10, "miss": 30})).ok();
    assert!(site.latency_ns.is_some() && site.pool.is_some());
    let options = Options {
        sort: SortKey::Held,
        ..at(80)
    };
    assert_golden("api.times.80.txt", &text(&profile, Format::Table, &options));
}

#[test]
fn paths_and_times_get_columns_within_the_width() {
    for width in [80, 240] {
        let options = Options {
            sort: SortKey::Held,
            ..at(width)
        };
        let table = text(&shop(), Format::Table, &options);
        assert_golden(&format!("shop.{width}.txt"), &table);
    }
}

#[test]
fn advice_tells_the_story_of_each_row() {
    let options = Options {
        advice: true,
        ..at(100)
    };
    let table = text(&shop(), Format::Table, &options);
    assert_golden("shop.advice.100.txt", &table);
}

#[test]
fn color_changes_nothing_but_escapes() {
    let colored = Options {
        color: true,
        ..at(120)
    };
    let colored = text(&api(), Format::Table, &colored);
    assert!(colored.contains("\x1b[31mheap"), "{colored}");
    let stripped = regex::Regex::new("\x1b\\[[0-9]+m").unwrap();
    let plain = stripped.replace_all(&colored, "");
    assert_eq!(plain, text(&api(), Format::Table, &at(120)));
}

#[test]
fn folded_by_count_and_by_cost() {
    assert_golden("api.folded", &text(&api(), Format::Folded, &at(120)));
    let by_cost = Options {
        weight: Weight::Cost,
        ..at(120)
    };
    assert_golden("api.cost.folded", &text(&api(), Format::Folded, &by_cost));
}

#[test]
fn json_says_what_the_file_said() {
    for (profile, name) in [(api(), "data/api.json"), (shop(), "data/shop.json")] {
        let written = text(&profile, Format::Json, &at(120));
        let read: serde_json::Value = serde_json::from_str(&written).unwrap();
        let original: serde_json::Value = serde_json::from_slice(&file(name)).unwrap();
        assert_eq!(read, original, "{name}");
    }
}

#[test]
fn a_saved_profile_gives_the_same_in_every_format() {
    let saved = text(&api(), Format::Json, &at(120));
    let again = Profile::from_json(saved.as_bytes()).unwrap();
    assert_eq!(again, api());
    for format in [
        Format::Table,
        Format::Json,
        Format::Folded,
        Format::Svg,
        Format::Pprof,
    ] {
        assert_eq!(
            bytes(&again, format, &at(120)),
            bytes(&api(), format, &at(120)),
            "{format:?}"
        );
    }
}

#[test]
fn an_empty_profile_says_so() {
    let mut profile = api();
    for site in &mut profile.sites {
        site.registered = Some(0);
    }
    assert_golden("empty.txt", &text(&profile, Format::Table, &at(80)));
    let (svg, notes) = bytes(&profile, Format::Svg, &at(80));
    assert!(
        String::from_utf8(svg)
            .unwrap()
            .contains("No defer statement ran")
    );
    assert_eq!(notes, [Note::Empty]);
    let (folded, notes) = bytes(&profile, Format::Folded, &at(80));
    assert!(folded.is_empty());
    assert_eq!(notes, [Note::Empty]);
}

#[test]
fn without_stacks_each_site_stands_alone_and_a_note_says_so() {
    let mut profile = api();
    profile.stacks = None;
    profile.frames = None;
    let (folded, notes) = bytes(&profile, Format::Folded, &at(80));
    assert_eq!(notes, [Note::NoStacks]);
    assert_golden("alone.folded", &String::from_utf8(folded).unwrap());
}

#[test]
fn scan_as_table_and_json() {
    let scan: Scan = serde_json::from_slice(&file("data/scan.json")).unwrap();
    let mut table = Vec::new();
    ScanTable::new(&at(80)).write(&scan, &mut table).unwrap();
    assert_golden("scan.80.txt", &String::from_utf8(table).unwrap());
    let mut json = Vec::new();
    ScanReport::write(&Json, &scan, &mut json).unwrap();
    let read: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let original: serde_json::Value = serde_json::from_slice(&file("data/scan.json")).unwrap();
    assert_eq!(read, original);
}
