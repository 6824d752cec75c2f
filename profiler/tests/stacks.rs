//! Call stacks against the machine code: whoever stands above a function on a stack must hold a CALL
//! of it, by `objdump`; the leaf is the site's own function, the root is where goroutines start.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use deferprof_fixtures::{Build, Fixture, Options, Toolchain};
use support::{Deferprof, or_skip, uprobes_work};

/// Function → the functions with a direct CALL of it.
fn callers(binary: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new("objdump")
        .args(["-d", "--no-show-raw-insn"])
        .arg(binary)
        .output();
    let output = output.expect("objdump (binutils) is needed");
    let mut callers: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut caller = "";
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines() {
        if let Some((_, name)) = line.strip_suffix(">:").and_then(|l| l.split_once(" <")) {
            caller = name;
        } else if let Some((_, target)) = line.split_once("call ")
            && let Some((_, name)) = target.strip_suffix('>').and_then(|t| t.split_once(" <"))
        {
            callers
                .entry(name.to_owned())
                .or_default()
                .insert(caller.to_owned());
        }
    }
    callers
}

fn check(release: &str, name: &str) {
    if !uprobes_work() {
        return;
    }
    let what = format!("{name} go{release}");
    let Some(toolchain) = or_skip(&what, Toolchain::find(release)) else {
        return;
    };
    let fixture = Fixture::find(name).unwrap();
    let Some(binary) = or_skip(&what, fixture.build(&toolchain, &Build::default())) else {
        return;
    };
    let options = match name {
        "shop" => Options::default().seconds(1.0),
        _ => Options::default(),
    };
    let arguments = ["--format=json".to_owned(), "--stacks".to_owned()];
    let mut deferprof = Deferprof::run(&arguments, &binary, &options.arguments());
    let (_, profile) = deferprof.output_and_profile();
    let callers = callers(&binary);
    let functions: BTreeMap<&str, &str> = profile["sites"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| (s["id"].as_str().unwrap(), s["function"].as_str().unwrap()))
        .collect();
    let frames = profile["frames"].as_array().unwrap();
    let (mut checked, mut stacks) = (0, 0);
    for stack in profile["stacks"].as_array().unwrap() {
        stacks += 1;
        let locations: Vec<&serde_json::Value> = stack["locations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| &frames[usize::try_from(i.as_u64().unwrap()).unwrap()])
            .collect();
        let names: Vec<&str> = locations
            .iter()
            .map(|f| f["function"].as_str().unwrap())
            .collect();
        assert_eq!(
            names[0],
            functions[stack["site"].as_str().unwrap()],
            "{what}: {names:?}"
        );
        let root = *names.last().unwrap();
        assert!(
            [
                "runtime.goexit",
                "runtime.mstart",
                "runtime.rt0_go",
                "runtime.systemstack"
            ]
            .contains(&root)
                || root == "[truncated]" && names.len() > 127,
            "{what}: {names:?}"
        );
        // What was compiled into its caller is no function of its own in the machine code.
        let physical: Vec<&str> = locations
            .iter()
            .filter(|f| f["inlined"] != true)
            .map(|f| f["function"].as_str().unwrap())
            .collect();
        for pair in physical.windows(2) {
            // Closures and methods may also be called indirectly.
            let direct = callers.get(pair[0]);
            let last = pair[0].rsplit('/').next().unwrap_or_default();
            let closure_or_method = last.contains(".func") || last.matches('.').count() > 1;
            let indirect_possible = direct.is_none() || closure_or_method;
            if !indirect_possible {
                let direct = direct.unwrap();
                assert!(
                    direct.contains(pair[1]) || pair[1] == "[truncated]",
                    "{what}: {} is not called by {}, but by {direct:?}; stack {names:?}",
                    pair[0],
                    pair[1]
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 0, "{what}: nothing was checked");
    println!("{what}: {checked} calls in {stacks} stacks agree");
}

macro_rules! stacks {
    ($($test:ident: $release:literal $fixture:literal;)*) => {
        $(#[test] fn $test() { check($release, $fixture); })*
    };
}

stacks! {
    conditionals_1_21: "1.21" "conditionals";
    conditionals_1_27: "1.27" "conditionals";
    returns_1_27: "1.27" "returns";
    recursion_1_21: "1.21" "recursion";
    recursion_1_27: "1.27" "recursion";
    nested_1_27: "1.27" "nested";
    mutex_1_23: "1.23" "mutex";
    mutex_1_27: "1.27" "mutex";
    stress_1_27: "1.27" "stress";
    shop_1_21: "1.21" "shop";
    shop_1_27: "1.27" "shop";
}
