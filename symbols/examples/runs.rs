//! Prints the probes on a binary's deferred calls: `cargo run --example runs -- BINARY…`
fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let bytes = std::fs::read(&path)?;
        println!("{path}");
        let binary = deferprof_symbols::Binary::parse(&bytes)?;
        let sites = binary.inventory()?.sites;
        match binary.run_probes(&sites) {
            Ok(runs) => {
                println!("  {:?}, {} frames", runs.layout, runs.frames.len());
                for probe in runs.probes {
                    let (event, point) = (probe.event, probe.point);
                    println!("  {event:?} {} {:?}", point.address, point.kind);
                    for runner in probe.runners {
                        println!("    {runner:?}");
                    }
                }
            }
            Err(error) => println!("  {error}"),
        }
        let exits = || sites.iter().flat_map(|site| &site.exits);
        let kinds = |emulated| {
            let starts = exits().filter_map(|exit| exit.start);
            starts.filter(|p| p.kind.is_emulated() == emulated).count()
        };
        let entered = exits().filter(|exit| exit.entered.is_some()).count();
        println!(
            "  {} exits: {} emulated, {} single-stepped, of these {entered} by entry",
            exits().count(),
            kinds(true),
            kinds(false)
        );
        for site in &sites {
            let outside = site
                .exits
                .iter()
                .filter(|e| e.start.is_none() || e.end.is_none());
            if outside.count() > 0 || (site.bit.is_some() && site.exits.is_empty()) {
                println!("  {}: no exit, or one without a point", site.id);
            }
        }
    }
    Ok(())
}
