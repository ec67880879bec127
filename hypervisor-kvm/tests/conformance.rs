//! KVM passes the suite of the contract with a small bare-metal guest, also where KVM emulates what
//! guests do in kernel mode.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Duration;

use ami_core::Architecture;
use hypervisor_kvm::Confinement;
use instance_core::testing::conformance::TestBed;

#[test]
fn kvm_conforms_on_bare_metal() {
    let Some(kvm) = common::kvm() else { return };
    let bed = |kvm| TestBed {
        hypervisor: kvm,
        boot: common::guest::boot().unwrap(),
        architecture: Architecture::X86_64,
        foreign_architecture: Architecture::Arm64,
        patience: Duration::from_secs(20),
        kill_within: Duration::from_secs(1),
        vcpus: 2,
        memory_mib: 64,
        link: instance_core::net::link,
    };
    bed(&kvm).run();
    println!("confined:");
    let confined = kvm.clone().with_confinement(Confinement::new());
    bed(&confined).run();
    println!("for 32-bit x86:");
    let narrow = TestBed { architecture: Architecture::X86, ..bed(&kvm) };
    narrow.run_those(|check| check.contains("console") || check.contains("disks"));
}
