//! The report for people.

use std::io::{self, Write};

use super::Report;

/// How wide the names on the left are.
const NAME: usize = 14;

pub(super) fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let Report {
        kernel, process, ..
    } = report;
    let verdict = match (report.ready, &report.target) {
        (true, Some(target)) => format!("process {} can be profiled", target.pid),
        (true, None) => "defers can be profiled here".to_owned(),
        (false, _) => "no defers can be profiled here; see the problems below".to_owned(),
    };
    writeln!(out, "deferprof {}: {verdict}.\n", report.deferprof)?;

    let mut line = |name: &str, value: &str| writeln!(out, "{name:NAME$}{value}");
    line(
        "kernel",
        &format!("Linux {} ({})", kernel.release, kernel.architecture),
    )?;
    let offers = [
        ("uprobes", Some(kernel.uprobes)),
        ("BPF", Some(kernel.bpf)),
        ("BTF", Some(kernel.btf)),
        ("uprobe_multi", kernel.uprobe_multi),
        ("cookies", kernel.cookies),
    ];
    let offers: Vec<_> = offers
        .iter()
        .map(|(name, there)| format!("{name} {}", yes(*there)))
        .collect();
    line("", &offers.join(", "))?;
    for (name, value) in [
        (
            "unprivileged_bpf_disabled",
            &kernel.unprivileged_bpf_disabled,
        ),
        ("perf_event_paranoid", &kernel.perf_event_paranoid),
        ("lockdown", &kernel.lockdown),
    ] {
        line(
            "",
            &format!("{name} {}", value.as_deref().unwrap_or("unknown")),
        )?;
    }
    line("user", &process.user.to_string())?;
    line("capabilities", &or_none(&process.capabilities))?;
    if !process.missing_capabilities.is_empty() {
        line(
            "",
            &format!("without {}", process.missing_capabilities.join(", ")),
        )?;
    }
    line(
        "container",
        process.container.as_deref().unwrap_or("none seen"),
    )?;
    line(
        "pid namespace",
        if process.initial_pid_namespace {
            "the initial one"
        } else {
            "one of its own"
        },
    )?;
    for (index, link) in report.links.iter().enumerate() {
        let name = if index == 0 { "links" } else { "" };
        let result = match &link.reason {
            None => "works".to_owned(),
            Some(reason) => format!("no: {reason}"),
        };
        line(name, &format!("{:13} {result}", link.kind))?;
    }
    if let Some(cost) = &report.cost {
        line(
            "cost of a hit",
            &format!(
                "{:.0} ns emulated, {:.0} ns single-stepped ({})",
                cost.emulated_ns, cost.single_stepped_ns, cost.link
            ),
        )?;
    }
    if let Some(target) = &report.target {
        line("target", &format!("process {}, {}", target.pid, target.exe))?;
        line("", &format!("{}, {}", target.go_version, target.arch))?;
        let mechanisms: Vec<_> = target
            .mechanisms
            .iter()
            .map(|(mechanism, sites)| format!("{sites} {mechanism}"))
            .collect();
        line(
            "",
            &format!("{} sites: {}", target.sites, or_none(&mechanisms)),
        )?;
        line(
            "",
            &format!(
                "{} probes for all, {} emulated",
                target.probes, target.emulated
            ),
        )?;
        let tracer = target
            .tracer
            .map_or("none".to_owned(), |pid| format!("process {pid}"));
        line(
            "",
            &format!("traced by {tracer}, stopped: {}", yes(Some(target.stopped))),
        )?;
    }
    if !report.problems.is_empty() {
        writeln!(out, "\nproblems")?;
    }
    for problem in &report.problems {
        let weight = if problem.blocks { "must" } else { "note" };
        writeln!(out, "  {weight}  {}", problem.what)?;
        if let Some(fix) = &problem.fix {
            writeln!(out, "        fix: {fix}")?;
        }
    }
    Ok(())
}

fn yes(there: Option<bool>) -> &'static str {
    match there {
        Some(true) => "yes",
        Some(false) => "no",
        None => "unknown",
    }
}

fn or_none<T: AsRef<str>>(list: &[T]) -> String {
    if list.is_empty() {
        return "none".to_owned();
    }
    let list: Vec<_> = list.iter().map(AsRef::as_ref).collect();
    list.join(", ")
}
