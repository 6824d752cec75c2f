//! What the columns of the table say.

use crate::profile::{Histogram, Pool, Profile, ProfileSite, Ran, Totals};
use crate::report::advice::below_floor;
use crate::report::grid::{Align, Cell, Column, Grid, Need, Place};
use crate::report::paint::Tint;
use crate::report::text::{clean, count, plural, rate, share, time};

/// The rows of `sites`, which are already in order.
pub(super) fn grid(profile: &Profile, totals: &Totals, sites: &[&ProfileSite]) -> Grid {
    let seconds = profile.window.seconds();
    let registered = totals.registered as f64;
    let per_second = |n: f64| seconds.map(|seconds| rate(n / seconds));
    let ns_per_second = |ns: f64| seconds.map(|seconds| time(ns / seconds));

    let mut columns = vec![
        Column {
            cells: (1..=sites.len())
                .map(|rank| plain(rank.to_string()))
                .collect(),
            ..right("#", String::new())
        },
        numbers(right("COST", share(1.0, 1.0)), sites, |site| {
            site.cost_ns.map(|ns| share(ns, totals.cost_ns))
        }),
        numbers(
            if_room(1, right("COST/S", dash(ns_per_second(totals.cost_ns)))),
            sites,
            |site| site.cost_ns.and_then(ns_per_second),
        ),
        numbers(right("DEFERS", count(totals.registered)), sites, |site| {
            site.registered.map(count)
        }),
        numbers(
            right("PER S", dash(per_second(registered))),
            sites,
            |site| site.registered.and_then(|n| per_second(n as f64)),
        ),
        numbers(right("SHARE", share(1.0, 1.0)), sites, |site| {
            site.registered.map(|n| share(n as f64, registered))
        }),
    ];
    columns.extend(measured(sites));
    columns.push(numbers(
        if_room(2, right("SAVING/S", dash(ns_per_second(totals.saving_ns)))),
        sites,
        |site| site.saving_ns.and_then(ns_per_second),
    ));
    columns.push(Column {
        title: "MECHANISM",
        align: Align::Left,
        need: Need::Always,
        cells: sites
            .iter()
            .map(|site| Cell {
                text: site.info.mechanism.to_string(),
                tint: Tint::from(site.info.mechanism),
            })
            .collect(),
        total: String::new(),
    });
    columns.push(Column {
        title: "REASON",
        align: Align::Left,
        need: Need::Always,
        cells: sites
            .iter()
            .map(|site| {
                let reason = site.info.reason.as_ref();
                plain(reason.map_or_else(String::new, |r| clean(r.as_str()).into_owned()))
            })
            .collect(),
        total: String::new(),
    });
    Grid {
        columns,
        places: sites.iter().map(|site| Place::from(&site.info)).collect(),
        total: match sites.len() {
            1 if totals.ran == 1 => String::new(),
            _ => plural(totals.ran as u64, "site ran", "sites ran"),
        },
    }
}

/// The columns of what this profile measured besides counts.
fn measured(sites: &[&ProfileSite]) -> Vec<Column> {
    let mut columns = Vec::new();
    if sites.iter().any(|site| site.pool.is_some()) {
        columns.push(numbers(detail("MISS"), sites, |site| site.pool.map(misses)));
    }
    // Calls on a return are the rest, and nearly all: not worth a column.
    type Calls = fn(Ran) -> u64;
    let paths: [(_, Calls); 2] = [("PANIC", |ran| ran.panic), ("GOEXIT", |ran| ran.goexit)];
    for (title, calls) in paths {
        if sites
            .iter()
            .filter_map(|site| site.ran)
            .any(|ran| calls(ran) > 0)
        {
            columns.push(numbers(detail(title), sites, |site| {
                site.ran.map(|ran| count(calls(ran)))
            }));
        }
    }
    if sites.iter().any(|site| site.pending.is_some_and(|n| n > 0)) {
        columns.push(numbers(detail("PENDING"), sites, |site| {
            site.pending.map(count)
        }));
    }
    type Which = fn(&ProfileSite) -> Option<Histogram>;
    let times: [([_; 2], Which); 3] = [
        (["REGISTER P50", "REGISTER P99"], |site| {
            site.latency_ns.and_then(|latency| latency.register)
        }),
        (["CALL P50", "CALL P99"], |site| {
            site.latency_ns.and_then(|latency| latency.call)
        }),
        (["HELD P50", "HELD P99"], |site| {
            site.latency_ns.and_then(|latency| latency.held)
        }),
    ];
    for ([p50, p99], which) in times {
        let measured = |site: &ProfileSite| which(site).filter(|h| h.count > 0);
        if sites.iter().any(|site| measured(site).is_some()) {
            columns.push(numbers(detail(p50), sites, |site| {
                measured(site).map(|h| quantile(&h, 50, h.p50))
            }));
            columns.push(numbers(detail(p99), sites, |site| {
                measured(site).map(|h| quantile(&h, 99, h.p99))
            }));
        }
    }
    columns
}

/// What stands for a time that cannot be told from the probes' own cost.
pub(super) const FLOOR: &str = "<floor";

fn quantile(histogram: &Histogram, percent: u64, value: u64) -> String {
    match below_floor(histogram, percent) {
        true => FLOOR.to_owned(),
        false => time(value as f64),
    }
}

fn misses(pool: Pool) -> String {
    let all = [pool.hit, pool.refill, pool.miss].map(|n| n as f64);
    share(pool.miss as f64, all.iter().sum())
}

fn right(title: &'static str, total: String) -> Column {
    Column {
        title,
        align: Align::Right,
        need: Need::Always,
        cells: Vec::new(),
        total,
    }
}

fn detail(title: &'static str) -> Column {
    Column {
        need: Need::Detail,
        ..right(title, String::new())
    }
}

fn if_room(priority: u8, column: Column) -> Column {
    Column {
        need: Need::IfRoom(priority),
        ..column
    }
}

/// The column with a cell for each site; a dash where nothing was measured.
fn numbers(
    column: Column,
    sites: &[&ProfileSite],
    text: impl Fn(&ProfileSite) -> Option<String>,
) -> Column {
    Column {
        cells: sites.iter().map(|site| plain(dash(text(site)))).collect(),
        ..column
    }
}

fn dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

fn plain(text: String) -> Cell {
    Cell {
        text,
        tint: Tint::Plain,
    }
}
