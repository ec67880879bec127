//! Network ports on TAP devices, whose frames a thread moves or the host's kernel.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::Path;
use std::time::Duration;

use ami_core::Architecture;
use common::linux;
use hypervisor_kvm::{Confinement, Kvm, Transport, VhostNet};
use instance_core::machine::{Boot, Hypervisor, MachineErrorKind, MachineSpec, NetSpec};
use instance_core::net::{MacAddress, Tap};
use instance_core::testing::conformance::TestBed;
use instance_core::testing::taps;

#[test]
fn ports_on_tap_devices_conform() {
    let (Some(kvm), true) = (common::kvm(), taps_can_be_made()) else { return };
    let bare = || (common::guest::boot().unwrap(), 64);
    let debian = || (linux::boot("amd64", true), 256);
    println!("a thread moves the frames:");
    conforms(&kvm.clone().with_vhost_net(VhostNet::Never), bare(), &["limits", "restores several"]);
    if !has_vhost_net() {
        return eprintln!(
            "SKIPPED: this host has no /dev/vhost-net; `cargo xtask test` runs this in the lab"
        );
    }
    println!("vhost-net moves the frames:");
    let in_kernel = kvm.with_vhost_net(VhostNet::Always);
    conforms(&in_kernel, bare(), &["restores several"]);
    if in_kernel.execution().unwrap().is_hardware() {
        let on_pci = |kvm: Kvm| kvm.with_transport(Transport::Pci).with_confinement(Confinement::new());
        println!("a thread moves the frames of Linux, confined and on PCI:");
        conforms(&on_pci(in_kernel.clone().with_vhost_net(VhostNet::Never)), debian(), &[]);
        println!("vhost-net moves the frames of Linux:");
        conforms(&in_kernel, debian(), &[]);
        println!("vhost-net moves the frames of Linux, confined and on PCI:");
        conforms(&on_pci(in_kernel), debian(), &["restores several"]);
    }
}

/// Else says so. Under CI and in the lab they can.
fn taps_can_be_made() -> bool {
    let Err(error) = taps::available() else { return true };
    let must = ["CI", "AMI_LAB"].into_iter().find(|name| std::env::var_os(name).is_some());
    assert!(must.is_none(), "nothing may be skipped under {}, but: {error}", must.unwrap_or_default());
    eprintln!("SKIPPED: {error}");
    false
}

/// In the lab vhost-net is there.
fn has_vhost_net() -> bool {
    let there = Path::new("/dev/vhost-net").exists();
    assert!(there || std::env::var_os("AMI_LAB").is_none(), "the lab has no /dev/vhost-net");
    there
}

fn conforms(kvm: &Kvm, (boot, memory_mib): (Boot, u32), more: &[&str]) {
    let bed = TestBed {
        hypervisor: kvm,
        boot,
        architecture: Architecture::X86_64,
        foreign_architecture: Architecture::Arm64,
        patience: Duration::from_secs(60),
        kill_within: Duration::from_secs(1),
        vcpus: 2,
        memory_mib,
        link: taps::link,
    };
    let checked = ["carries frames", "no frame", "a network port from", "network ports as it runs"];
    bed.run_those(|check| checked.iter().chain(more).any(|what| check.contains(what)));
}

#[test]
fn where_vhost_net_cannot_be_used_it_says_so() {
    let (Some(kvm), true) = (common::kvm(), taps_can_be_made()) else { return };
    if Path::new("/dev/vhost-net").exists() {
        return eprintln!("SKIPPED: this host has /dev/vhost-net");
    }
    let spec = || {
        let console = instance_core::console::Console::new();
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("no vhost-net", Architecture::X86_64, boot, console.port());
        let tap = Tap::open("ami-none%d").unwrap();
        spec.nets = vec![NetSpec::new(tap.into_port(), MacAddress([2, 0, 0, 0, 0, 1]))];
        spec
    };
    let refused = kvm.clone().with_vhost_net(VhostNet::Always).create(spec()).unwrap_err();
    assert_eq!(refused.kind(), MachineErrorKind::Host);
    assert!(refused.to_string().contains("vhost-net"), "{refused}");
    kvm.create(spec()).unwrap();
}
