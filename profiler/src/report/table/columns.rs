//! What the columns of the table say.

use crate::profile::{Histogram, Pool, Profile, ProfileSite, Totals};
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
    type Value = fn(&Histogram) -> u64;
    type Which = fn(&ProfileSite) -> Option<Histogram>;
    let call: Which = |site| site.latency_ns.and_then(|latency| latency.call);
    let held: Which = |site| site.latency_ns.and_then(|latency| latency.held);
    let times: [(_, Which, Value); 4] = [
        ("CALL P50", call, |h| h.p50),
        ("CALL P99", call, |h| h.p99),
        ("HELD P50", held, |h| h.p50),
        ("HELD P99", held, |h| h.p99),
    ];
    for (title, which, value) in times {
        if sites.iter().any(|site| which(site).is_some()) {
            columns.push(numbers(detail(title), sites, |site| {
                let histogram = which(site).filter(|h| h.count > 0)?;
                Some(time(value(&histogram) as f64))
            }));
        }
    }
    columns
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
