//! Files that are no profile: an error that says so, never a panic.

use crate::common::file;
use deferprof::profile::{LoadError, Profile};
use serde_json::{Value, json};

/// The good file after a change.
fn changed(change: impl FnOnce(&mut Value)) -> Result<Profile, LoadError> {
    let mut value = serde_json::from_slice(&file("data/api.json")).unwrap();
    change(&mut value);
    Profile::from_json(&serde_json::to_vec(&value).unwrap())
}

fn message(result: Result<Profile, LoadError>) -> String {
    result.expect_err("it is not a profile").to_string()
}

#[test]
fn nothing_and_other_things() {
    let message = |text: &str| message(Profile::from_json(text.as_bytes()));
    assert!(message("").starts_with("it is empty"));
    assert!(message(" \n\t").starts_with("it is empty"));
    assert!(message("hello").starts_with("it is not valid JSON"));
    assert!(message("\u{0}\u{0}").starts_with("it is not valid JSON"));
    assert!(message("{}").contains("no \"schema\""));
    assert!(message("[1,2]").contains("no \"schema\""));
    assert!(message("null").contains("no \"schema\""));
    assert!(message(r#"{"schema":7}"#).contains("no \"schema\""));
    assert!(message(r#"{"schema":"deferprof.scan/1"}"#).contains("result of a scan"));
    assert!(message(&"[".repeat(100_000)).starts_with("it is"));
    let later = message(r#"{"schema":"deferprof.profile/2"}"#);
    assert!(later.contains("\"deferprof.profile/2\"") && later.contains("\"deferprof.profile/1\""));
}

#[test]
fn a_file_cut_off_anywhere_is_an_error() {
    let whole = file("data/api.json");
    let end = whole.trim_ascii_end().len();
    for length in 0..end {
        assert!(Profile::from_json(&whole[..length]).is_err(), "at {length}");
    }
}

#[test]
fn fields_of_later_versions_are_ignored() {
    let profile = changed(|value| {
        value["later"] = json!({"a": [1]});
        value["sites"][0]["later"] = json!("x");
        value["target"]["later"] = json!(null);
        value["sites"][0]["reason"] = json!("a-rule-of-2031");
    })
    .unwrap();
    assert_eq!(
        profile.sites[0].info.reason.as_ref().unwrap().as_str(),
        "a-rule-of-2031"
    );
}

#[test]
fn fields_that_may_be_null_may_be_missing() {
    let profile = changed(|value| {
        for site in value["sites"].as_array_mut().unwrap() {
            site.as_object_mut()
                .unwrap()
                .retain(|_, field| !field.is_null());
        }
        for field in [
            "link", "runtime", "panics", "stacks", "frames", "overhead", "loss", "warnings",
        ] {
            value.as_object_mut().unwrap().remove(field);
        }
    })
    .unwrap();
    assert_eq!(profile.stacks, None);
    assert_eq!(profile.totals().registered, 3_510_000);
}

/// As version 0.1 wrote it: no `pending`, `panics`, `cost_basis`, `unmatched`.
#[test]
fn files_of_older_versions_are_read() {
    let profile = changed(|value| {
        for site in value["sites"].as_array_mut().unwrap() {
            for field in ["pending", "cost_basis"] {
                site.as_object_mut().unwrap().remove(field).unwrap();
            }
        }
        value.as_object_mut().unwrap().remove("panics").unwrap();
        value["loss"]
            .as_object_mut()
            .unwrap()
            .remove("unmatched")
            .unwrap();
    })
    .unwrap();
    assert_eq!(profile.sites[1].cost_basis, None);
    assert_eq!(profile.loss.unwrap().unmatched, None);
    assert_eq!(profile.sites[1].cost_ns, Some(20_000_000.0));
}

#[test]
fn contradictions_are_named() {
    let twice = changed(|value| value["sites"][1]["id"] = value["sites"][0]["id"].clone());
    assert!(message(twice).contains("listed twice"));
    let nobody = changed(|value| value["stacks"][0]["site"] = json!("main.nobody#1"));
    assert!(message(nobody).contains("\"main.nobody#1\""));
    let outside = changed(|value| value["stacks"][0]["locations"][0] = json!(99));
    assert!(message(outside).contains("frame 99 of a table of 8"));
    let uneven = changed(|value| value["stacks"][0]["locations"] = json!([0]));
    assert!(message(uneven).contains("3 frames but 1 locations"));
    let mechanism = changed(|value| value["sites"][0]["mechanism"] = json!("magic"));
    assert!(message(mechanism).contains("\"magic\""));
    let address = changed(|value| value["sites"][0]["pc"] = json!("0x+1"));
    assert!(message(address).contains("\"0x+1\""));
    let negative = changed(|value| value["sites"][0]["registered"] = json!(-1));
    assert!(message(negative).contains("does not follow the schema"));
    let gain = changed(|value| value["sites"][0]["cost_ns"] = json!(-1.5));
    assert!(message(gain).contains("-1.5 ns"));
    let time = changed(|value| {
        value["sites"][0]["latency_ns"] = json!({"call": {"count": 1, "below_floor": 0, "min": 1,
            "p50": 1, "p90": 1, "p99": 1, "p999": 1, "max": 1, "mean": -2.0}});
    });
    assert!(message(time).contains("-2 ns"));
    let when = changed(|value| value["window"]["start"] = json!("yesterday"));
    assert!(message(when).contains("does not follow the schema"));
}

#[test]
fn the_documentation_names_every_field() {
    fn names(value: &Value, all: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    all.push(name.clone());
                    names(value, all);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| names(item, all)),
            _ => {}
        }
    }

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/profile-format.md");
    let documentation = std::fs::read_to_string(path).unwrap();
    let mut all = Vec::new();
    for name in ["data/api.json", "data/shop.json", "data/scan.json"] {
        names(&serde_json::from_slice(&file(name)).unwrap(), &mut all);
    }
    for name in all {
        // In a list of fields, under a path, or as the path to others.
        let known = [
            format!("`{name}`"),
            format!(".{name}`"),
            format!("`{name}."),
        ]
        .iter()
        .any(|form| documentation.contains(form));
        assert!(known, "{name:?} is not in docs/profile-format.md");
    }
}
