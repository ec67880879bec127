//! The fake machine passes the suite that it is there to help with.

use std::time::Duration;

use ami_core::Architecture;
use instance_core::machine::Boot;
use instance_core::testing::conformance::TestBed;
use instance_core::testing::{FakeHypervisor, fake_kernel};

#[test]
fn the_fake_machine_conforms() {
    TestBed {
        hypervisor: &FakeHypervisor::new(),
        boot: Boot::new(fake_kernel("").unwrap(), None, ""),
        architecture: Architecture::X86_64,
        foreign_architecture: Architecture::Arm64,
        patience: Duration::from_secs(10),
        kill_within: Duration::from_millis(100),
        vcpus: 2,
        memory_mib: 128,
        link: instance_core::net::link,
    }
    .run();
}
