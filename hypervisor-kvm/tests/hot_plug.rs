//! Network ports that come and go, with a guest that takes no notice: what the machine does by itself. Guests that do
//! are in `linux.rs`.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::{Duration, Instant};

use ami_core::Architecture;
use hypervisor_kvm::{Kvm, Transport};
use instance_core::console::Console;
use instance_core::machine::{Detach, Hypervisor, Machine, MachineErrorKind, MachineSpec, NetSpec};
use instance_core::net::{self, MacAddress, NetPort};

const MAC: MacAddress = MacAddress([2, 0, 10, 0, 0, 12]);

fn running(kvm: &Kvm) -> Box<dyn Machine> {
    let boot = common::guest::boot().unwrap();
    let spec = MachineSpec::new("deaf", Architecture::X86_64, boot, Console::new().port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    machine
}

fn port() -> (NetSpec, NetPort) {
    let (machine, network) = net::link();
    (NetSpec::new(machine, MAC), network)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(
    done: Result<T, instance_core::machine::MachineError>,
    kind: MachineErrorKind,
) {
    assert_eq!(done.unwrap_err().kind(), kind);
}

fn a_moment() -> Detach {
    Detach::Ask { until: Instant::now() + Duration::from_millis(50) }
}

#[test]
fn a_port_is_the_machines_until_the_guest_or_force_lets_go() {
    let Some(kvm) = common::kvm() else { return };
    let machine = running(&kvm.with_transport(Transport::Pci));
    refused(machine.detach_net(MAC, Detach::Force), MachineErrorKind::NoSuchPort);
    for _ in 0..3 {
        let (spec, network) = port();
        machine.attach_net(spec).unwrap();
        refused(machine.attach_net(port().0), MachineErrorKind::PortExists);
        refused(machine.detach_net(MAC, a_moment()), MachineErrorKind::Held);
        assert!(network.is_connected());
        machine.detach_net(MAC, Detach::Force).unwrap();
        assert!(!network.is_connected());
        refused(machine.detach_net(MAC, Detach::Force), MachineErrorKind::NoSuchPort);
    }
    let (spec, network) = port();
    machine.attach_net(spec).unwrap();
    machine.kill();
    assert!(!network.is_connected());
    refused(machine.attach_net(port().0), MachineErrorKind::WrongState);
}

#[test]
fn a_port_that_cannot_be_is_unplugged() {
    let Some(kvm) = common::kvm() else { return };
    let (spec, network) = port();
    refused(running(&kvm).attach_net(spec), MachineErrorKind::Unsupported);
    assert!(!network.is_connected(), "virtio-mmio has no hot-plugging");
    let kvm = kvm.with_transport(Transport::Pci);
    let (machine, most) = (running(&kvm), kvm.capabilities().max_nets);
    let plug = |n: usize| {
        let (mut spec, network) = port();
        spec.mac.0[5] = n as u8;
        machine.attach_net(spec).map(|()| network)
    };
    let networks: Vec<NetPort> = (0..most).map(|n| plug(n).unwrap()).collect();
    refused(plug(most), MachineErrorKind::Unsupported);
    assert!(networks.iter().all(NetPort::is_connected));
    drop(machine);
    assert!(!networks.iter().any(NetPort::is_connected), "they end with their machine");
}
