//! What stands above and below the rows: the target, the sums, what is missing, what to do.

use std::io::{self, Write};

use super::columns::FLOOR;
use crate::cost::CostBasis;
use crate::profile::{Profile, ProfileSite, Totals};
use crate::rank::SortKey;
use crate::report::advice;
use crate::report::paint::{Paint, Tint};
use crate::report::text::{
    clean, count, join, keep_end, plural, rate, share, short_function, time, width, wrap,
};

const DOT: &str = " · ";

/// The target and the sums, up to the table.
pub(super) fn header(
    profile: &Profile,
    totals: &Totals,
    columns: usize,
    paint: Paint,
    out: &mut dyn Write,
) -> io::Result<()> {
    let target = &profile.target;
    let exe = clean(&target.exe);
    let who = [
        keep_end(&exe, columns.saturating_sub(12)).into_owned(),
        format!("pid {}", target.pid),
        clean(&target.go_version).into_owned(),
        clean(&target.arch).into_owned(),
        format!(
            "{} from {}",
            time(profile.window.duration_ns as f64),
            profile.window.start.strftime("%Y-%m-%d %H:%M:%S UTC"),
        ),
    ];
    lines(join(who, DOT, columns), Tint::Bold, paint, out)?;
    for parts in [sums(profile, totals), mechanisms(profile, totals)] {
        lines(join(parts, DOT, columns), Tint::Plain, paint, out)?;
    }
    lines(join(means(profile), DOT, columns), Tint::Dim, paint, out)
}

/// How many and how dear.
fn sums(profile: &Profile, totals: &Totals) -> Vec<String> {
    if totals.ran == 0 {
        return vec![];
    }
    let mut parts = vec![plural_count(totals.registered)];
    if let Some(seconds) = profile.window.seconds() {
        parts.push(format!("{}/s", rate(totals.registered as f64 / seconds)));
        parts.push(format!(
            "about {} of CPU time a second ({} of one core)",
            time(totals.cost_ns / seconds),
            share(totals.cost_ns / seconds, 1e9),
        ));
    } else {
        parts.push(format!("about {} of CPU time", time(totals.cost_ns)));
    }
    parts
}

/// Which share of the defers is of which mechanism, and what open coding would save.
fn mechanisms(profile: &Profile, totals: &Totals) -> Vec<String> {
    let mut parts = Vec::new();
    for mechanism in crate::profile::MECHANISMS {
        let of_it = profile
            .sites
            .iter()
            .filter(|s| s.info.mechanism == mechanism);
        let registered = of_it.map(ProfileSite::count).fold(0, u64::saturating_add);
        if registered > 0 {
            let part = share(registered as f64, totals.registered as f64);
            parts.push(format!("{part} {mechanism}"));
        }
    }
    if let Some(seconds) = profile.window.seconds().filter(|_| totals.saving_ns > 0.0) {
        parts.push(format!(
            "open coding all would save about {} a second",
            time(totals.saving_ns / seconds)
        ));
    }
    parts
}

fn plural_count(n: u64) -> String {
    let noun = if n == 1 { "defer" } else { "defers" };
    format!("{} {noun}", count(n))
}

/// The engine and what it cost the target.
fn means(profile: &Profile) -> Vec<String> {
    let engine = profile.engine.as_str();
    let mut parts = vec![match profile.link {
        Some(link) => format!("{engine} by {}", link.as_str()),
        None => engine.to_owned(),
    }];
    if let Some(overhead) = profile.overhead {
        parts.push(plural(overhead.probes, "probe", "probes"));
        if let Some(ns) = overhead.ns_per_hit {
            parts.push(format!("{} a hit", time(ns)));
        }
        if let Some(part) = overhead.target_share {
            parts.push(format!("probes took {} of one core", share(part, 1.0)));
        }
    }
    parts
}

/// What the rows do not show, from the table down.
#[derive(Clone, Copy)]
pub(super) struct Footer<'a> {
    pub profile: &'a Profile,
    pub totals: &'a Totals,
    pub sort: SortKey,
    pub shown: &'a [&'a ProfileSite],
    pub hidden: &'a [&'a ProfileSite],
    /// Whether each row's story is told, rather than what its reason means.
    pub advice: bool,
}

impl Footer<'_> {
    pub fn write(&self, columns: usize, paint: Paint, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out)?;
        for sentence in gaps(self.profile, self.totals, self.sort, self.hidden) {
            lines(wrap(&sentence, columns), Tint::Plain, paint, out)?;
        }
        let notes = [floor(self.shown), basis(self.profile, self.totals)];
        for sentence in notes.into_iter().flatten() {
            lines(wrap(&sentence, columns), Tint::Dim, paint, out)?;
        }
        match self.advice {
            true => self.stories(columns, paint, out)?,
            false => reasons(self.shown, columns, paint, out)?,
        }
        for warning in &self.profile.warnings {
            let sentence = format!("Warning: {}", clean(warning));
            lines(wrap(&sentence, columns), Tint::Yellow, paint, out)?;
        }
        Ok(())
    }

    /// A paragraph for each row, under its number.
    fn stories(&self, columns: usize, paint: Paint, out: &mut dyn Write) -> io::Result<()> {
        if !self.shown.is_empty() {
            writeln!(out)?;
        }
        let indent = self.shown.len().to_string().len() + 2;
        let room = columns.saturating_sub(indent);
        let seconds = self.profile.window.seconds();
        for (rank, site) in (1..).zip(self.shown) {
            let id = clean(&site.info.id);
            let id = short_function(&id, room);
            let number = format!("{rank:<indent$}");
            writeln!(out, "{number}{}", paint.paint(Tint::Bold, &id))?;
            for line in wrap(&advice::story(site, seconds), room) {
                writeln!(out, "{:indent$}{line}", "")?;
            }
        }
        Ok(())
    }
}

/// What `<floor` means, where it stands.
fn floor(shown: &[&ProfileSite]) -> Option<String> {
    let times = shown.iter().filter_map(|site| site.latency_ns);
    let mut all = times.flat_map(|latency| [latency.register, latency.call, latency.held]);
    let any =
        all.any(|histogram| histogram.is_some_and(|h| h.count > 0 && advice::below_floor(&h, 50)));
    any.then(|| format!("{FLOOR}: too short to tell from what the probes themselves cost."))
}

/// A sentence for everything that the table leaves out.
fn gaps(profile: &Profile, totals: &Totals, sort: SortKey, hidden: &[&ProfileSite]) -> Vec<String> {
    let mut sentences = Vec::new();
    let never = |sites| plural(sites as u64, "site", "sites");
    if totals.ran == 0 {
        sentences.push(format!(
            "No defer statement ran in these {}; {} watched.",
            time(profile.window.observed_ns as f64),
            plural(totals.never_ran as u64, "site was", "sites were"),
        ));
    } else if sort != SortKey::Cost && !profile.sites.iter().any(|site| sort.value(site).is_some())
    {
        sentences.push(format!(
            "The order is by count, because {:?} was not measured in this profile.",
            sort.as_str()
        ));
    }
    if !hidden.is_empty() {
        let cost: f64 = hidden.iter().filter_map(|site| site.cost_ns).sum();
        sentences.push(format!(
            "{} with {} of the cost ran and {} not shown.",
            plural(hidden.len() as u64, "more site", "more sites"),
            share(cost, totals.cost_ns),
            if hidden.len() == 1 { "is" } else { "are" },
        ));
    }
    if totals.never_ran > 0 && totals.ran > 0 {
        sentences.push(format!(
            "{} never ran.",
            plural(totals.never_ran as u64, "further site", "further sites")
        ));
    }
    if totals.unwatched > 0 {
        sentences.push(format!(
            "{} could not be watched, so nothing is known about {}.",
            never(totals.unwatched),
            if totals.unwatched == 1 { "it" } else { "them" },
        ));
    }
    if let Some(panics) = profile.panics.filter(|panics| panics.started > 0) {
        sentences.push(format!(
            "{}; {} recovered.",
            plural(panics.started, "panic started", "panics started"),
            plural(panics.recovered, "was", "were"),
        ));
    }
    if let Some(loss) = profile.loss {
        if let Some(dropped) = loss.dropped.filter(|&n| n > 0) {
            sentences.push(format!(
                "{} lost, so counts are too low by that many.",
                plural(dropped, "hit was", "hits were")
            ));
        }
        if let Some(evicted) = loss.evicted.filter(|&n| n > 0) {
            sentences.push(format!(
                "{} evicted before its end was seen, so times and stacks are incomplete.",
                plural(evicted, "entry was", "entries were")
            ));
        }
        if let Some(unmatched) = loss.unmatched.filter(|&n| n > 0) {
            sentences.push(format!(
                "{} no counterpart, so {} missing.",
                plural(unmatched, "start or end has", "starts and ends have"),
                if unmatched == 1 {
                    "its time is"
                } else {
                    "their times are"
                },
            ));
        }
    }
    sentences
}

/// What the cost is made of, from the profile's own figures.
fn basis(profile: &Profile, totals: &Totals) -> Option<String> {
    let by = |basis| {
        let of_it = |site: &&ProfileSite| site.count() > 0 && site.cost_basis == Some(basis);
        profile.sites.iter().filter(of_it).count() as u64
    };
    let by_table = |site: &&ProfileSite| {
        site.count() > 0 && matches!(site.cost_basis, None | Some(CostBasis::Table))
    };
    let each = crate::profile::MECHANISMS
        .into_iter()
        .filter_map(|mechanism| {
            let of_it = |site: &&ProfileSite| site.info.mechanism == mechanism;
            // Many defers give the figure back without the rounding of few.
            let sites = profile.sites.iter().filter(of_it).filter(by_table);
            let site = sites.max_by_key(|site| site.count())?;
            let cost = site.cost_ns?;
            Some(format!("{mechanism} {}", time(cost / site.count() as f64)))
        });
    let each: Vec<_> = each.collect();
    let elsewhere = match profile.target.arch.as_str() {
        "amd64" => "",
        _ => ", measured on amd64",
    };
    let mut parts = Vec::new();
    for (basis, from) in [
        (CostBasis::Measured, "from the measured time of registering"),
        (CostBasis::Pool, "from where the records came from"),
    ] {
        let sites = by(basis);
        if sites > 0 {
            parts.push(format!("for {} {from}", plural(sites, "site", "sites")));
        }
    }
    if !each.is_empty() {
        let others = if parts.is_empty() { "" } else { "for others " };
        parts.push(format!(
            "{others}count × the cost of one defer ({}{elsewhere})",
            each.join(", ")
        ));
    }
    if parts.is_empty() || totals.ran == 0 {
        return None;
    }
    Some(format!("Cost is an estimate: {}.", parts.join(", ")))
}

/// What the reasons of the rows mean, each once, in order of appearance.
fn reasons(
    shown: &[&ProfileSite],
    columns: usize,
    paint: Paint,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut seen = Vec::new();
    for reason in shown.iter().filter_map(|site| site.info.reason.as_ref()) {
        if !seen.contains(&reason) {
            seen.push(reason);
        }
    }
    let known: Vec<_> = seen
        .into_iter()
        .filter_map(|reason| Some((reason.as_str(), advice::sentence(reason)?)))
        .collect();
    let indent = known.iter().map(|(word, _)| width(word)).max().unwrap_or(0) + 2;
    if !known.is_empty() {
        writeln!(out)?;
    }
    for (word, sentence) in known {
        let mut label = format!("{word:indent$}");
        for line in wrap(sentence, columns.saturating_sub(indent)) {
            writeln!(out, "{}{line}", paint.paint(Tint::Yellow, &label))?;
            label = " ".repeat(indent);
        }
    }
    Ok(())
}

fn lines(lines: Vec<String>, tint: Tint, paint: Paint, out: &mut dyn Write) -> io::Result<()> {
    for line in lines {
        writeln!(out, "{}", paint.paint(tint, &line))?;
    }
    Ok(())
}
