//! The workspace's own tools: `cargo xtask COMMAND`.
//!
//! | command | what it does |
//! |---|---|
//! | `quickstart` | goes the whole way, from packages to two equal live servers |
//! | `employee-directory` | launches a web application on a stock Debian into a network, logs in, makes an image |
//! | `guest` | makes the Linux guests that examples, tests and benchmarks boot |
//! | `figures` | measures what has a bar, and says what falls short of it |
//! | `proofs` | runs the random tests with their large numbers, which takes hours |
//! | `test`  | checks format, lints, documentation and tests, KVM in the lab among them |
//! | `lab`   | runs a command in a virtual machine that has a true `/dev/kvm`, on any host |
//!
//! `cargo xtask COMMAND --help` says the rest. What a command makes it keeps under `target/`; what it
//! needs from the host's distribution it names, and installs only where it runs as root.
//!
//! Adding a command: a module with a `clap::Args` struct and a `run` function, one variant of
//! [`Command`], one line in [`main`].

#[allow(dead_code, reason = "shared with the tests of hypervisor-kvm, which use the rest")]
#[path = "../../hypervisor-kvm/tests/common/guest.rs"]
mod bare_guest;
mod employee_directory;
mod figures;
mod guest;
mod lab;
mod prerequisites;
mod process;
mod progress;
mod proofs;
mod quickstart;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The workspace's own tools")]
struct Xtask {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Launch a web application on a stock Debian, log in, make an image of it and launch more
    EmployeeDirectory(employee_directory::EmployeeDirectoryArgs),
    /// Measure what has a bar, and say what falls short of it
    Figures(figures::FiguresArgs),
    /// Make the Linux guests that examples, tests and benchmarks boot
    Guest(guest::GuestArgs),
    /// Run a command in a virtual machine that has a true /dev/kvm
    Lab(lab::LabArgs),
    /// Run the random tests with their large numbers, which takes hours
    Proofs(proofs::ProofsArgs),
    /// Do the whole of it: from packages to two equal live servers
    Quickstart(quickstart::QuickstartArgs),
    /// Check all that has to hold: format, lints, documentation, tests, and KVM in the lab
    Test(test::TestArgs),
}

fn main() -> ExitCode {
    let outcome = match Xtask::parse().command {
        Command::EmployeeDirectory(args) => employee_directory::run(&args),
        Command::Figures(args) => figures::run(&args),
        Command::Guest(args) => guest::run(&args),
        Command::Lab(args) => lab::run(args),
        Command::Proofs(args) => proofs::run(&args),
        Command::Quickstart(args) => quickstart::run(&args),
        Command::Test(args) => test::run(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
