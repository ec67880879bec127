//! Disks and network ports that come and go, with a guest that takes no notice: what the machine does by itself. Guests that do
//! are in `linux.rs`.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::{Duration, Instant};

use ami_core::Architecture;
use hypervisor_kvm::{Kvm, Transport};
use instance_core::console::Console;
use instance_core::machine::{
    Detach, DiskSpec, Hypervisor, Machine, MachineErrorKind, MachineSpec, NetSpec, RestoreSpec, SavedMachine,
};
use instance_core::net::{self, MacAddress, NetPort};
use storage_block::MemoryDisk;

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
    // What was taken by force keeps its place until the guest lets go, which this one never does. The place that is kept for
    // a device of streams goes first.
    let again = |n: usize| {
        machine.detach_net(MacAddress([2, 0, 10, 0, 0, n as u8]), Detach::Force).unwrap();
        plug(n)
    };
    let said = (0..most).find_map(|n| again(n).err()).expect("there is no room for ever").to_string();
    assert!(said.contains("held by what was taken by force"), "{said}");
    drop(machine);
    assert!(!networks.iter().any(NetPort::is_connected), "they end with their machine");
}

#[test]
fn a_machine_whose_guest_has_not_let_go_is_saved() {
    let Some(kvm) = common::kvm() else { return };
    if !kvm.capabilities().save {
        return eprintln!("SKIPPED: this host's KVM does not tell all of a machine's state");
    }
    let disk = || DiskSpec::new(MemoryDisk::new(1 << 20).unwrap().into_disk(), "vol-hot");
    let kvm = kvm.with_transport(Transport::Pci);
    let mut machine = running(&kvm);
    // The second time it is one that was restored.
    for round in 0..2 {
        if round == 0 {
            machine.attach_disk(disk()).unwrap();
            machine.attach_net(port().0).unwrap();
            machine.detach_disk("vol-hot", Detach::Force).unwrap();
            machine.detach_net(MAC, Detach::Force).unwrap();
            // Beside one that it still has, of the same address.
            machine.attach_net(port().0).unwrap();
        }
        machine.pause().unwrap();
        let file = tempfile::tempfile().unwrap();
        machine.save(&file).unwrap();
        let saved = SavedMachine::new(file).unwrap();
        let restore = |disks: Vec<DiskSpec>, nets: Vec<NetSpec>| {
            let mut spec = RestoreSpec::new("restored", saved.clone(), Console::new().port());
            (spec.disks, spec.nets) = (disks, nets);
            kvm.restore(spec)
        };
        refused(restore(vec![disk()], vec![port().0]), MachineErrorKind::Saved);
        refused(restore(vec![], vec![]), MachineErrorKind::Saved);
        let (net, network) = port();
        let restored = restore(vec![], vec![net]).unwrap();
        refused(restored.detach_disk("vol-hot", Detach::Force), MachineErrorKind::NoSuchDisk);
        assert!(network.is_connected());
        restored.resume().unwrap();
        machine = restored;
    }
    machine.attach_disk(disk()).unwrap();
    machine.detach_net(MAC, Detach::Force).unwrap();
    refused(machine.detach_net(MAC, Detach::Force), MachineErrorKind::NoSuchPort);
}
