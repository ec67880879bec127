//! QEMU passes the suite of the contract, with Linux as the guest.

mod common;

use std::time::Duration;

use ami_core::Architecture;
use instance_core::testing::conformance::TestBed;

#[test]
fn qemu_conforms() {
    let (Some(qemu), Some(boot)) = (common::qemu(), common::linux()) else { return };
    TestBed {
        hypervisor: &qemu,
        boot,
        architecture: Architecture::X86_64,
        foreign_architecture: Architecture::Arm64,
        patience: Duration::from_secs(30),
        kill_within: Duration::from_secs(1),
        vcpus: 2,
        memory_mib: 256,
    }
    .run();
}
