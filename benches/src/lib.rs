//! What the benchmarks measure, shared by `cargo bench -p ami-benches`, which shows it to a developer, and
//! by `cargo xtask figures`, which compares it with its bar.
//!
//! The machines that measure are noisy, so a figure is a ratio of two things timed in turn in one run, or
//! a time counted in instructions in the lab. Each has a name, by which the program `measure` finds it.

mod bare;
#[allow(dead_code, reason = "shared with the tests of hypervisor-kvm, which use the rest")]
#[path = "../../hypervisor-kvm/tests/common/guest.rs"]
mod guest;
pub mod guests;
pub mod kvm;
pub mod kvm_boot;
pub mod kvm_disk;
pub mod launch;
pub mod nat;
pub mod network;
pub mod region;
pub mod samples;
pub mod storage;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::samples::Measurement;
use crate::storage::Bench;

/// Takes the measurement of this name.
///
/// # Errors
///
/// When there is none, or what it needs is not there.
pub fn measure(name: &str, bench: &Bench) -> anyhow::Result<Measurement> {
    match name {
        "first_instruction" => launch::first_instruction(),
        "first_userspace_line" => launch::first_userspace_line(),
        "launch_256g_over_1g" => launch::launch_256g_over_1g(),
        "machine_first_instruction" => kvm::machine_first_instruction(),
        "restored_instruction" => kvm::restored_instruction(),
        "restored_2g_over_128m" => kvm::restored_2g_over_128m(),
        "bare_2g_over_128m" => kvm::bare_2g_over_128m(),
        "thousandth_machine_over_first" => kvm::thousandth_machine_over_first(),
        "thousandth_bare_over_first" => kvm::thousandth_bare_over_first(),
        "machine_beyond_guest" => kvm::machine_beyond_guest(),
        "machine_boot_to_exit" => kvm_boot::machine_boot_to_exit(),
        "machine_exits_per_request" => kvm_disk::machine_exits_per_request(bench),
        "machine_random_reads_over_host" => kvm_disk::machine_random_reads_over_host(bench),
        "machine_random_writes_over_host" => kvm_disk::machine_random_writes_over_host(bench),
        "launch_over_append" => region::launch_over_append(),
        "describe_10000" => region::describe_10000(),
        "describe_10000_over_100" => region::describe_10000_over_100(),
        "launch_16_threads_over_1" => region::launch_16_threads_over_1(),
        "firewall_100_rules_over_0" => network::firewall_100_rules_over_0(),
        "firewall_100_rules_over_0_beginning" => network::firewall_100_rules_over_0_beginning(),
        "tracked_1000000" => network::tracked_1000000(),
        "established_lost_to_flood" => network::established_lost_to_flood(),
        "switch_over_loopback" => network::switch_over_loopback(),
        "tcp_guests_over_loopback" => guests::tcp_guests_over_loopback(),
        "metadata_beyond_loopback" => guests::metadata_beyond_loopback(),
        "nat_out_over_passt" => nat::nat_out_over_passt(),
        "nat_in_over_passt" => nat::nat_in_over_passt(),
        _ => storage::measure(name, bench),
    }
}

/// The whole of a program that takes one measurement, called as `PROGRAM NAME [DIR [quick]]`.
pub fn run(measure: impl Fn(&str, &Bench) -> anyhow::Result<Measurement>) -> ExitCode {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    if name == guests::IN_GUEST {
        return guests::work_in_guest(&args.next().unwrap_or_default());
    }
    let dir = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let bench = Bench::new(&dir, args.next().is_some_and(|arg| arg == "quick"));
    if name == kvm_boot::ONCE {
        return match kvm_boot::once(&dir) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    match measure(&name, &bench).and_then(|measured| Ok(serde_json::to_string(&measured)?)) {
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
