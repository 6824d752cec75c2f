//! The tables of `deferprof scan`.

use std::io::{self, Write};

use deferprof_symbols::Mechanism;

use super::grid::{Align, Cell, Column, Grid, Need, Place};
use super::paint::{Paint, Tint};
use super::table::LEAST_WIDTH;
use super::text::{clean, join, keep_end, plural, wrap};
use super::{Options, ScanReport};
use crate::profile::{MECHANISMS, Scan, ScanSite, SiteInfo};

/// Every site of a binary: dear mechanisms first, then by name.
#[derive(Clone, Debug)]
pub struct ScanTable {
    width: usize,
    paint: Paint,
    limit: Option<usize>,
}

/// `scan --explain`: where each site would be counted, and why exactly there.
#[derive(Clone, Debug)]
pub struct ScanExplained(ScanTable);

impl ScanTable {
    /// A table of a width and a number of rows.
    pub fn new(options: &Options) -> Self {
        Self {
            width: options.width.max(LEAST_WIDTH),
            paint: Paint(options.color),
            limit: options.limit,
        }
    }

    fn write(
        &self,
        scan: &Scan,
        out: &mut dyn Write,
        columns: fn(&[&ScanSite]) -> Vec<Column>,
    ) -> io::Result<()> {
        header(scan, self.width, self.paint, out)?;
        let mut sites: Vec<_> = scan.sites.iter().collect();
        let dearness = |mechanism| MECHANISMS.iter().position(|&m| m == mechanism);
        sites.sort_by_key(|site| dearness(site.info.mechanism));
        let shown = sites.len().min(self.limit.unwrap_or(usize::MAX));
        let (shown, hidden) = sites.split_at(shown);
        if !shown.is_empty() {
            writeln!(out)?;
            let grid = Grid {
                columns: columns(shown),
                places: shown.iter().map(|site| Place::from(&site.info)).collect(),
                total: String::new(),
            };
            grid.write(out, self.width, self.paint)?;
        }
        if !hidden.is_empty() || !scan.warnings.is_empty() {
            writeln!(out)?;
        }
        if !hidden.is_empty() {
            let more = plural(hidden.len() as u64, "more site is", "more sites are");
            writeln!(out, "{more} not shown.")?;
        }
        for warning in &scan.warnings {
            for line in wrap(&format!("Warning: {}", clean(warning)), self.width) {
                writeln!(out, "{}", self.paint.paint(Tint::Yellow, &line))?;
            }
        }
        Ok(())
    }
}

impl ScanExplained {
    /// A table of a width and a number of rows.
    pub fn new(options: &Options) -> Self {
        Self(ScanTable::new(options))
    }
}

impl ScanReport for ScanTable {
    fn write(&self, scan: &Scan, out: &mut dyn Write) -> io::Result<()> {
        self.write(scan, out, |sites| {
            vec![
                mechanism(sites),
                column("REASON", sites, |site| {
                    let reason = site.info.reason.as_ref();
                    reason.map_or_else(String::new, |r| clean(r.as_str()).into_owned())
                }),
            ]
        })
    }
}

impl ScanReport for ScanExplained {
    fn write(&self, scan: &Scan, out: &mut dyn Write) -> io::Result<()> {
        self.0.write(scan, out, |sites| {
            let probe = |text: fn(&super::super::profile::ScanProbe) -> String| {
                move |site: &ScanSite| site.probe.as_ref().map_or_else(String::new, text)
            };
            vec![
                mechanism(sites),
                column("PC", sites, |site| site.info.pc.to_string()),
                column("PROBE", sites, probe(|p| p.point.address.to_string())),
                column(
                    "INSTRUCTION",
                    sites,
                    probe(|p| p.point.kind.as_str().to_owned()),
                ),
                column(
                    "WHY EXACT",
                    sites,
                    probe(|p| p.point.basis.as_str().to_owned()),
                ),
                column("EXITS", sites, |site| match site.probe {
                    Some(probe) if site.info.mechanism == Mechanism::OpenCoded => {
                        probe.exits.to_string()
                    }
                    _ => String::new(),
                }),
            ]
        })
    }
}

/// The binary and how many sites it has of each mechanism.
fn header(scan: &Scan, columns: usize, paint: Paint, out: &mut dyn Write) -> io::Result<()> {
    let binary = &scan.binary;
    let path = clean(&binary.path);
    let mut facts = vec![
        keep_end(&path, columns.saturating_sub(12)).into_owned(),
        clean(&binary.go_version).into_owned(),
        clean(&binary.arch).into_owned(),
    ];
    let marks = [
        (binary.pie, "position-independent"),
        (binary.stripped, "stripped"),
        (!binary.optimized, "not optimized"),
    ];
    facts.extend(
        marks
            .iter()
            .filter(|(is, _)| *is)
            .map(|(_, word)| (*word).to_owned()),
    );
    for line in join(facts, " · ", columns) {
        writeln!(out, "{}", paint.paint(Tint::Bold, &line))?;
    }
    if scan.sites.is_empty() {
        return writeln!(out, "This binary has no defer statement.");
    }
    let mut sums = vec![plural(scan.sites.len() as u64, "defer site", "defer sites")];
    for mechanism in MECHANISMS {
        let of_it = |site: &&ScanSite| site.info.mechanism == mechanism;
        let number = scan.sites.iter().filter(of_it).count();
        if number > 0 {
            sums.push(format!("{number} {mechanism}"));
        }
    }
    for line in join(sums, " · ", columns) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn mechanism(sites: &[&ScanSite]) -> Column {
    let mut column = column("MECHANISM", sites, |site| site.info.mechanism.to_string());
    for (cell, site) in column.cells.iter_mut().zip(sites) {
        cell.tint = Tint::from(site.info.mechanism);
    }
    column
}

fn column(title: &'static str, sites: &[&ScanSite], text: impl Fn(&ScanSite) -> String) -> Column {
    Column {
        title,
        align: Align::Left,
        need: Need::Always,
        cells: sites
            .iter()
            .map(|site| Cell {
                text: text(site),
                tint: Tint::Plain,
            })
            .collect(),
        total: String::new(),
    }
}

impl From<&SiteInfo> for Place {
    fn from(info: &SiteInfo) -> Self {
        let file = clean(&info.file);
        Self {
            function: clean(&info.function).into_owned(),
            path: match info.line {
                Some(line) => format!("{file}:{line}"),
                None => file.into_owned(),
            },
            callee: clean(info.callee.as_deref().unwrap_or_default()).into_owned(),
        }
    }
}
