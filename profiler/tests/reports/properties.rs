//! What must hold for every profile: widths, sums, nothing raw on a terminal, well-formed XML.

use crate::common::{api, text};
use deferprof::profile::{Histogram, Latency, Profile, ProfileSite, Ran, Scan, Stack};
use deferprof::report::{Format, Options, ScanExplained, ScanReport, ScanTable, Weight};
use deferprof_symbols::Mechanism;
use unicode_width::UnicodeWidthStr;

const MECHANISMS: [Mechanism; 4] = [
    Mechanism::Heap,
    Mechanism::Stack,
    Mechanism::OpenCoded,
    Mechanism::RangeFunc,
];

/// Names as a hostile or merely international binary could hold them.
fn nasty(i: usize) -> String {
    match i % 10 {
        0 => format!("main.f{i}"),
        1 => format!("github.com/{}/x.(*T).m{i}", "deep/".repeat(100)),
        2 => format!("main.{}{i}", "ü".repeat(500)),
        3 => format!("main.函数名称很长的一个函数{}{i}", "宽".repeat(100)),
        4 => format!("main.\x1b[2J\x1b]0;title\x07\u{9b}31m{i}"),
        5 => format!("main.a;b c\nd\te\r\u{202e}fe\u{2028}{i}"),
        6 => format!("a.com/p.F[go.shape.struct {{ X a.com/q.T; Y <&\"'> }}].func{i}"),
        7 => format!("main.👩\u{200d}👩\u{200d}👧\u{fe0f}🇩🇪e\u{301}\u{301}{i}"),
        8 => "/".repeat(i % 300),
        _ => String::new(),
    }
}

fn numbers(i: usize) -> u64 {
    let mixed = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed >> (mixed % 60)
}

/// `n` sites with nasty names; every third has two stacks that cover a part of it.
fn profile(n: usize) -> Profile {
    let mut profile = api();
    let model = profile.sites[0].clone();
    profile.target.exe = nasty(n + 1);
    profile.warnings = (0..n.min(12)).map(nasty).collect();
    let mut stacks = Vec::new();
    profile.sites = (0..n)
        .map(|i| {
            let mut site: ProfileSite = model.clone();
            site.info.id = format!("{}#{i}", nasty(i));
            site.info.function = nasty(i);
            site.info.file = nasty(i / 10 + i);
            site.info.line = (i % 7 != 0).then_some(i as u32);
            site.info.mechanism = MECHANISMS[i % 4];
            site.info.callee = (i % 3 == 0).then(|| nasty(i + 4));
            site.info.reason = match i % 5 {
                0 => None,
                // A word that no version knows.
                1 if n > 100 => serde_json::from_value(nasty(i).into()).ok(),
                2 => serde_json::from_value("range-func-in-function".into()).ok(),
                _ => serde_json::from_value("loop".into()).ok(),
            };
            let registered = match i % 11 {
                0 => None,
                1 => Some(0),
                _ => Some((numbers(i) >> 14) + 1),
            };
            site.registered = registered;
            site.cost_ns = registered.map(|n| n as f64 * 20.0);
            site.saving_ns = registered.map(|n| n as f64 * 19.5);
            site.ran = (i % 2 == 0).then(|| Ran {
                r#return: numbers(i + 1),
                panic: numbers(i + 2) % 3,
                goexit: numbers(i + 3),
            });
            site.pending = (i % 4 == 0).then(|| numbers(i + 4) % 2);
            let times = |i: usize| {
                let count = numbers(i);
                (!i.is_multiple_of(3)).then(|| Histogram {
                    count,
                    below_floor: count / (1 + i as u64 % 3),
                    min: 0,
                    p50: numbers(i + 1),
                    p90: 0,
                    p99: numbers(i + 2),
                    p999: 0,
                    max: 0,
                    mean: numbers(i + 3) as f64,
                })
            };
            site.latency_ns = (i % 5 < 3).then(|| Latency {
                register: times(i),
                call: times(i + 1),
                held: times(i + 2),
            });
            if let Some(half) = registered.filter(|_| i % 3 == 0).map(|n| n / 3) {
                for root in ["main.main", "root;\nof\x1b all"] {
                    stacks.push(Stack {
                        site: site.info.id.clone(),
                        frames: vec![nasty(i), nasty(i + 5), root.to_owned()],
                        locations: None,
                        registered: half,
                        cost_ns: Some(half as f64 * 20.0),
                    });
                }
            }
            site
        })
        .collect();
    profile.stacks = Some(stacks);
    profile.frames = None;
    profile
}

fn scan(profile: &Profile) -> Scan {
    let sites: Vec<_> = profile.sites.iter().map(|site| &site.info).collect();
    serde_json::from_value(serde_json::json!({
        "schema": "deferprof.scan/1",
        "binary": {"path": nasty(1), "go_version": "go1.25", "arch": "arm64", "build_id": null,
                   "pie": true, "stripped": true, "optimized": false},
        "sites": sites,
        "warnings": [nasty(4), nasty(2)],
    }))
    .unwrap()
}

fn check_lines(text: &str, width: usize, what: &str) {
    for line in text.lines() {
        assert!(
            line.width() <= width,
            "{what}: {} columns instead of {width}: {line}",
            line.width()
        );
        assert_eq!(line, line.trim_end(), "{what}: blanks at the end");
    }
    let raw = text.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(raw, None, "{what}: a raw control character");
}

#[test]
fn no_line_of_a_table_is_wider_than_the_terminal() {
    let cases = [(0, 1), (1, 1), (40, 1), (333, 19), (5_000, 190)];
    for (sites, step) in cases {
        let profile = profile(sites);
        let scan = scan(&profile);
        for width in (60..=250).step_by(step) {
            let options = Options {
                width,
                ..Options::default()
            };
            let what = format!("{sites} sites in {width} columns");
            check_lines(&text(&profile, Format::Table, &options), width, &what);
            if width % 10 == 0 || sites < 40 {
                let advised = Options {
                    advice: true,
                    ..options.clone()
                };
                check_lines(&text(&profile, Format::Table, &advised), width, &what);
            }
            for report in [
                Box::new(ScanTable::new(&options)) as Box<dyn ScanReport>,
                Box::new(ScanExplained::new(&options)),
            ] {
                let mut out = Vec::new();
                report.write(&scan, &mut out).unwrap();
                check_lines(&String::from_utf8(out).unwrap(), width, &what);
            }
        }
    }
}

#[test]
fn no_data_column_is_ever_cut() {
    let profile = profile(40);
    for width in 60..=250 {
        let options = Options {
            width,
            ..Options::default()
        };
        let table = text(&profile, Format::Table, &options);
        for word in [
            "range-func-in-function",
            "open-coded",
            "range-func",
            "stack",
        ] {
            assert!(
                table.contains(word),
                "{word:?} is missing in {width} columns"
            );
        }
    }
}

#[test]
fn folded_weights_add_up_to_the_registered_totals() {
    for sites in [0, 1, 40, 333] {
        let profile = profile(sites);
        let folded = text(&profile, Format::Folded, &Options::default());
        let mut sum = 0;
        for line in folded.lines() {
            let (stack, weight) = line.rsplit_once(' ').unwrap();
            assert!(stack.chars().all(|c| !c.is_control()), "{stack:?}");
            assert!(
                stack.rsplit(';').next().unwrap().starts_with("defer "),
                "{stack:?}"
            );
            sum += weight.parse::<u64>().unwrap();
        }
        assert_eq!(sum, profile.totals().registered, "{sites} sites");
    }
}

#[test]
fn stacks_that_claim_more_than_their_site_do_not_inflate_it() {
    let mut profile = api();
    profile.stacks.as_mut().unwrap()[0].registered = u64::MAX;
    let folded = text(&profile, Format::Folded, &Options::default());
    let weight = |line: &str| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap();
    assert_eq!(folded.lines().map(weight).sum::<u64>(), 3_510_000);
}

#[test]
fn svg_is_well_formed_and_shows_the_total() {
    for (sites, weight) in [
        (0, Weight::Cost),
        (40, Weight::Registered),
        (333, Weight::Cost),
    ] {
        let options = Options {
            weight,
            ..Options::default()
        };
        let svg = text(&profile(sites), Format::Svg, &options);
        well_formed(&svg);
        assert!(svg.chars().all(|c| !c.is_control() || "\n\r\t".contains(c)));
    }
    let svg = text(&api(), Format::Svg, &Options::default());
    well_formed(&svg);
    assert!(svg.contains("all (3,510,000 defers, 100%)"), "{svg}");
}

fn well_formed(svg: &str) {
    use quick_xml::events::Event;
    let mut reader = quick_xml::Reader::from_str(svg);
    let mut depth = 0;
    loop {
        match reader.read_event() {
            Ok(Event::Start(_)) => depth += 1,
            Ok(Event::End(_)) => depth -= 1,
            Ok(Event::Eof) => break,
            Ok(_) => {}
            Err(error) => panic!("{error} at {}", reader.error_position()),
        }
    }
    assert_eq!(depth, 0);
}

#[test]
fn counts_at_the_end_of_the_scale_do_no_harm() {
    let mut profile = api();
    for site in &mut profile.sites {
        site.registered = Some(u64::MAX);
        site.cost_ns = Some(f64::MAX);
    }
    profile.window.observed_ns = 0;
    for format in [
        Format::Table,
        Format::Json,
        Format::Folded,
        Format::Svg,
        Format::Pprof,
    ] {
        let (bytes, _) = crate::common::bytes(&profile, format, &Options::default());
        assert!(!bytes.is_empty(), "{format:?}");
    }
}

#[test]
fn json_keeps_every_character_and_shows_none_raw() {
    let profile = profile(40);
    let json = text(&profile, Format::Json, &Options::default());
    assert!(json.chars().all(|c| c == '\n' || !c.is_control()));
    assert!(!json.contains('\u{202e}'));
    assert_eq!(Profile::from_json(json.as_bytes()).unwrap(), profile);
}

#[test]
fn a_reader_that_goes_away_is_an_error_that_says_so() {
    struct Closing(usize);
    impl std::io::Write for Closing {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            match taken {
                0 => Err(std::io::ErrorKind::BrokenPipe.into()),
                _ => Ok(taken),
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    for format in [
        Format::Table,
        Format::Json,
        Format::Folded,
        Format::Svg,
        Format::Pprof,
    ] {
        for room in [0, 1, 100, 300] {
            let report = format.report(&Options::default());
            let error = report.write(&api(), &mut Closing(room)).unwrap_err();
            let kind = error.kind();
            assert_eq!(kind, std::io::ErrorKind::BrokenPipe, "{format:?}");
        }
    }
}
