//! Prints the probes of a binary's deferpool: `cargo run --example pool -- BINARY…`
fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let bytes = std::fs::read(&path)?;
        println!("{path}");
        match deferprof_symbols::Binary::parse(&bytes)?.pool_probes() {
            Ok(pool) => {
                for probe in pool.probes {
                    let (event, point) = (probe.event, probe.point);
                    println!("  {event:?} {} {:?}", point.address, point.kind);
                    for caller in probe.callers {
                        println!("    {caller:?}");
                    }
                }
            }
            Err(error) => println!("  {error}"),
        }
    }
    Ok(())
}
