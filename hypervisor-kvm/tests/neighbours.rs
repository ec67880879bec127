//! A driver that breaks the rules loses its device until it resets it, and nothing else does: not its own guest, not the
//! machine's other devices, not a machine beside it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::Architecture;
use common::soon;
use hypervisor_kvm::{Kvm, Transport};
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, Hypervisor, Machine, MachineSpec, MachineState, NetSpec};
use instance_core::net;
use instance_core::vsock::{self, VsockSpec};
use storage_block::MemoryDisk;

const TRANSPORTS: [Transport; 2] = [Transport::Mmio, Transport::Pci];

struct Guest {
    machine: Box<dyn Machine>,
    console: Console,
    _network: net::NetPort,
    _streams: vsock::Vsock,
}

impl Guest {
    /// Two guests on this transport, each with two disks and one of everything else.
    fn two(kvm: &Kvm, transport: Transport) -> [Self; 2] {
        println!("{transport:?}");
        let kvm = kvm.clone().with_transport(transport);
        [Self::new(&kvm), Self::new(&kvm)]
    }

    fn new(kvm: &Kvm) -> Self {
        let console = Console::new();
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("rules", Architecture::X86_64, boot, console.port());
        let disk = |id| DiskSpec::new(MemoryDisk::new(1 << 20).unwrap().into_disk(), id);
        spec.disks = vec![disk("vol-0"), disk("vol-1")];
        let ((port, network), (streams, host)) = (net::link(), vsock::cable());
        spec.nets = vec![NetSpec::new(port, "02:00:0a:00:00:0c".parse().unwrap())];
        spec.vsock = Some(VsockSpec::new(streams));
        spec.virtio_console = Some(Console::new().port());
        let machine = kvm.create(spec).unwrap();
        machine.start().unwrap();
        let guest = Self { machine, console, _network: network, _streams: host };
        guest.console.reader().wait_for("GUEST READY\n", soon()).unwrap();
        guest
    }

    #[track_caller]
    fn says(&self, line: &str, answer: &str) {
        let mut reader = self.console.reader_from_now();
        self.console.write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
        let said = reader.wait_for("\n", soon()).unwrap();
        assert_eq!(String::from_utf8_lossy(&said), format!("{answer}\n"), "{line}");
    }
}

#[test]
fn who_breaks_the_rules_loses_one_device_until_it_is_reset() {
    let Some(kvm) = common::kvm() else { return };
    for transport in TRANSPORTS {
        loses_one_device(&Guest::two(&kvm, transport));
    }
}

fn loses_one_device([guilty, beside]: &[Guest; 2]) {
    beside.says("write 0 0 beside", "wrote");
    for rule in ["loop", "outside", "index", "short", "live"] {
        guilty.says("write 0 0 before", "wrote");
        guilty.says("write 1 0 other", "wrote");
        // The first disk waits for a reset.
        guilty.says(&format!("break 0 {rule}"), "broken");
        guilty.says("read 1 0", "data other");
        guilty.says("write 1 1 still", "wrote");
        guilty.says("read 1 1", "data still");
        guilty.says("up 0 10.0.0.12", "up");
        guilty.says("cid", "cid 3");
        guilty.says("ping x", "pong x");
        beside.says("read 0 0", "data beside");
        // And is there again for a driver that begins anew.
        guilty.says("forget 0", "forgot");
        guilty.says("read 0 0", "data before");
        for guest in [guilty, beside] {
            assert_eq!(guest.machine.state().get(), MachineState::Running, "{rule}");
        }
    }
}

/// Devices that have a thread of their own and such as the processor serves whose guest notifies, each by a queue that is read
/// when it is notified.
#[test]
fn every_kind_of_device_is_lost_alone_and_comes_back() {
    let Some(kvm) = common::kvm() else { return };
    for transport in TRANSPORTS {
        comes_back(&Guest::two(&kvm, transport));
    }
}

fn comes_back([guilty, beside]: &[Guest; 2]) {
    const OTHERS: [(&str, &str); 5] = [
        ("network port", "1 1"),
        ("console", "3 1"),
        ("entropy", "4 0"),
        ("balloon", "5 0"),
        ("streams", "19 1"),
    ];
    beside.says("write 0 0 beside", "wrote");
    guilty.says("write 0 0 before", "wrote");
    for (name, broken) in OTHERS {
        println!("{name}");
        guilty.says(&format!("misuse {broken}"), "broken");
        guilty.says("read 0 0", "data before");
        guilty.says("write 1 0 still", "wrote");
        for (_, other) in OTHERS.iter().filter(|(other, _)| *other != name) {
            guilty.says(&format!("use {other}"), "used");
        }
        guilty.says("ping x", "pong x");
        beside.says("read 0 0", "data beside");
        for (_, other) in OTHERS {
            beside.says(&format!("use {other}"), "used");
        }
        guilty.says(&format!("use {broken}"), "used");
        for guest in [guilty, beside] {
            assert_eq!(guest.machine.state().get(), MachineState::Running, "{name}");
        }
    }
}
