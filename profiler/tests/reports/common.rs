//! What the tests of reports share.

use std::fs;
use std::path::PathBuf;

use deferprof::profile::Profile;
use deferprof::report::{Format, Note, Options};

/// A file of `tests/reports/`.
pub fn file(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reports")
        .join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The profile that was made by hand: `data/api.json`.
pub fn api() -> Profile {
    Profile::from_json(&file("data/api.json")).expect("the file follows the schema")
}

/// A profile with everything that can be measured, made by hand: `data/shop.json`.
pub fn shop() -> Profile {
    Profile::from_json(&file("data/shop.json")).expect("the file follows the schema")
}

/// What a format writes, and its notes.
pub fn bytes(profile: &Profile, format: Format, options: &Options) -> (Vec<u8>, Vec<Note>) {
    let mut out = Vec::new();
    let notes = format
        .report(options)
        .write(profile, &mut out)
        .expect("a Vec takes everything");
    (out, notes)
}

/// What a text format writes.
pub fn text(profile: &Profile, format: Format, options: &Options) -> String {
    String::from_utf8(bytes(profile, format, options).0).expect("reports are UTF-8")
}

/// Compares with a golden file and shows the first line that differs.
pub fn assert_golden(name: &str, actual: &str) {
    let expected = String::from_utf8(file(&format!("golden/{name}"))).expect("it is UTF-8");
    if expected == actual {
        return;
    }
    let line = expected
        .lines()
        .zip(actual.lines())
        .position(|(expected, actual)| expected != actual)
        .unwrap_or_else(|| expected.lines().count().min(actual.lines().count()));
    panic!(
        "line {} of golden/{name} differs:\nexpected: {:?}\nactual:   {:?}\nAll of it:\n{actual}",
        line + 1,
        expected.lines().nth(line),
        actual.lines().nth(line),
    );
}
