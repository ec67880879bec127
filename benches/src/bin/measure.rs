//! `measure NAME`: takes a measurement and writes it to standard output as JSON.

use std::process::ExitCode;

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    match ami_benches::measure(&name).and_then(|measured| Ok(serde_json::to_string(&measured)?)) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
