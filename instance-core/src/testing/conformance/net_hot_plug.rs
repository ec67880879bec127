//! Network ports that come and go while the machine runs.

use std::time::{Duration, Instant};

use super::hot_plug::refused;
use super::nets::{FIRST, Peer, SECOND, up};
use super::{Guest, TestBed};
use crate::console::Console;
use crate::machine::{Detach, MachineError, MachineErrorKind, NetSpec};
use crate::net::MacAddress;
use crate::testing::ping::Station;

impl Guest {
    fn until_it_has_ports(&mut self, ports: usize) {
        let deadline = self.deadline();
        while self.ask("nets", "nets") != ports.to_string() {
            assert!(Instant::now() < deadline, "the guest does not have {ports} network ports");
        }
    }

    /// Plugs a port in, and waits until it is the guest's `n`th and answers.
    fn plug(&mut self, n: usize, station: Station, bed: &TestBed<'_>) -> Peer {
        let (spec, peer) = Peer::of(bed, station);
        self.machine.attach_net(spec).expect("attached");
        self.until_it_has_ports(n + 1);
        self.expect_answer(&format!("mac {n}"), &format!("mac {}", station.mac));
        self.expect_answer(&format!("up {n} {}", station.address), "up");
        peer.ping(b"plugged in", bed.patience);
        peer
    }

    fn ask_to_unplug(&self, station: Station) -> Result<(), MachineError> {
        self.machine.detach_net(station.mac, Detach::Ask { until: self.deadline() })
    }
}

/// That there is no hot-plugging of ports, which then says so.
fn is_refused(bed: &TestBed<'_>) -> bool {
    let can = bed.hypervisor.capabilities();
    if !can.net_hot_plug && can.max_nets > 0 {
        let guest = bed.up(Vec::new());
        refused(guest.machine.attach_net(Peer::of(bed, FIRST).0), MachineErrorKind::Unsupported);
        refused(guest.machine.detach_net(FIRST.mac, Detach::Force), MachineErrorKind::Unsupported);
    }
    if !can.net_hot_plug {
        println!("network ports cannot come and go: not checked");
    }
    !can.net_hot_plug
}

pub(super) fn attaches_and_detaches(bed: &TestBed<'_>) {
    if is_refused(bed) {
        return;
    }
    let soon = Detach::Ask { until: Instant::now() + bed.patience };
    let console = Console::new();
    let early = bed.hypervisor.create(bed.spec(&console, Vec::new(), &std::env::temp_dir())).expect("made");
    refused(early.attach_net(Peer::of(bed, FIRST).0), MachineErrorKind::WrongState);
    refused(early.detach_net(FIRST.mac, soon), MachineErrorKind::WrongState);
    drop(early);

    let Some((mut guest, peers)) = up(bed, &[FIRST], |_| ()) else { return };
    refused(guest.machine.attach_net(Peer::of(bed, FIRST).0), MachineErrorKind::PortExists);
    let (spec, _peer) = Peer::of(bed, SECOND);
    let nobody = NetSpec::new(spec.port, MacAddress::BROADCAST);
    refused(guest.machine.attach_net(nobody), MachineErrorKind::Unsupported);
    refused(guest.machine.detach_net(SECOND.mac, soon), MachineErrorKind::NoSuchPort);
    for _ in 0..3 {
        let second = guest.plug(1, SECOND, bed);
        peers[0].ping(b"beside the other", bed.patience);
        guest.ask_to_unplug(SECOND).expect("detached");
        assert!(!second.is_connected(), "the machine still holds the port");
        guest.until_it_has_ports(1);
        refused(guest.machine.detach_net(SECOND.mac, soon), MachineErrorKind::NoSuchPort);
    }
    // One that was there from the start goes as well.
    peers[0].ping(b"still there", bed.patience);
    guest.ask_to_unplug(FIRST).expect("detached");
    assert!(!peers[0].is_connected());
    guest.until_it_has_ports(0);
    let second = guest.plug(0, SECOND, bed);
    guest.machine.kill();
    assert!(!second.is_connected(), "a port of a machine that has ended is still there");
    refused(guest.machine.attach_net(Peer::of(bed, FIRST).0), MachineErrorKind::WrongState);
    refused(guest.machine.detach_net(SECOND.mac, soon), MachineErrorKind::WrongState);
}

pub(super) fn takes_a_port_that_is_held(bed: &TestBed<'_>) {
    if is_refused(bed) {
        return;
    }
    let Some((mut guest, peers)) = up(bed, &[FIRST], |_| ()) else { return };
    peers[0].ping(b"before", bed.patience);
    // A guest that stands still lets nothing go.
    guest.machine.pause().expect("pauses");
    let a_moment = Detach::Ask { until: Instant::now() + Duration::from_millis(200) };
    refused(guest.machine.detach_net(FIRST.mac, a_moment), MachineErrorKind::Held);
    assert!(peers[0].is_connected(), "a guest that holds a port has it");
    guest.machine.detach_net(FIRST.mac, Detach::Force).expect("by force");
    assert!(!peers[0].is_connected(), "the machine still holds the port");
    refused(guest.machine.detach_net(FIRST.mac, Detach::Force), MachineErrorKind::NoSuchPort);
    guest.machine.resume().expect("resumes");
    guest.until_it_has_ports(0);
    let first = guest.plug(0, FIRST, bed);
    guest.machine.detach_net(FIRST.mac, Detach::Force).expect("by force");
    assert!(!first.is_connected(), "the machine still holds the port");
    guest.until_it_has_ports(0);
}
