//! QEMU passes the suite of the contract, with Linux as the guest.

mod common;

use std::time::Duration;

use ami_core::Architecture;
use instance_core::testing::conformance::TestBed;
use instance_core::testing::taps;

#[test]
fn qemu_conforms() {
    let (Some(qemu), Some(boot)) = (common::qemu(), common::linux()) else { return };
    let bed = TestBed {
        hypervisor: &qemu,
        boot,
        architecture: Architecture::X86_64,
        foreign_architecture: Architecture::Arm64,
        patience: Duration::from_secs(30),
        kill_within: Duration::from_secs(1),
        vcpus: 2,
        memory_mib: 256,
        link: instance_core::net::link,
    };
    bed.run();
    if let Err(error) = taps::available() {
        assert!(std::env::var_os("CI").is_none(), "nothing may be skipped under CI, but: {error}");
        return eprintln!("SKIPPED: {error}");
    }
    println!("on TAP devices:");
    let on_taps = TestBed { link: taps::link, ..bed };
    on_taps
        .run_those(|check| ["carries frames", "no frame", "limits"].iter().any(|what| check.contains(what)));
}
