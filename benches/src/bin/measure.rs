//! `measure NAME [DIR [quick]]`: takes a measurement and writes it to standard output as JSON. What is measured
//! on the disk is measured in DIR.

use std::process::ExitCode;

fn main() -> ExitCode {
    ami_benches::run(ami_benches::measure)
}
