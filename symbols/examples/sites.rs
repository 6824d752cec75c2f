//! Lists the defer sites of a Go executable: `cargo run --release --example sites -- BINARY`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: sites BINARY")?;
    let bytes = std::fs::read(path)?;
    let start = std::time::Instant::now();
    let inventory = deferprof_symbols::Binary::parse(&bytes)?.inventory()?;
    eprintln!("scanned in {:?}", start.elapsed());
    for s in &inventory.sites {
        println!(
            "{}:{}\t{}\t{}\t{}\t{}\t{:?}\t{}\t{}\t{}",
            s.file,
            s.line,
            s.mechanism,
            s.id,
            s.registration.kind.as_str(),
            s.registration.basis.as_str(),
            s.bit,
            s.exits.len(),
            s.callee.as_deref().unwrap_or("-"),
            s.registration.address
        );
    }
    for warning in inventory.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(())
}
