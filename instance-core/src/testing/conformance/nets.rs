//! Network ports: frames between a guest and what it is plugged into.

use std::net::Ipv4Addr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use storage_block::{IoLimits, Limiter, Rate};

use super::{Guest, TestBed};
use crate::console::Console;
use crate::machine::{MachineErrorKind, MachineSpec, NetSpec};
use crate::net::{Frame, FrameLimits, MacAddress, NetPort, Offloads, SendError};
use crate::testing::ping::Station;

pub(super) const FIRST: Station =
    Station { mac: MacAddress([2, 0, 10, 0, 0, 12]), address: Ipv4Addr::new(10, 0, 0, 12) };
pub(super) const SECOND: Station =
    Station { mac: MacAddress([2, 0, 10, 0, 1, 12]), address: Ipv4Addr::new(10, 0, 1, 12) };

/// For how long nothing comes where nothing may.
const SILENCE: Duration = Duration::from_millis(200);

/// What a guest's port is plugged into: the other end of its cable.
pub(super) struct Peer {
    port: NetPort,
    woken: Receiver<()>,
    own: Station,
    guest: Station,
}

impl Peer {
    /// A cable to a guest that is to be `guest`, and the guest's end of it.
    pub(super) fn of(bed: &TestBed<'_>, guest: Station) -> (NetSpec, Self) {
        let (machine, port) = (bed.link)();
        port.set_takes(Offloads::NONE);
        let (wake, woken) = channel();
        port.set_waker(Some(Arc::new(move || _ = wake.send(()))));
        let [a, b, c, _] = guest.address.octets();
        let own = Station { mac: MacAddress([2, 0, 0, 0, 0, 1]), address: Ipv4Addr::new(a, b, c, 1) };
        (NetSpec::new(machine, guest.mac), Self { port, woken, own, guest })
    }

    /// The next frame that is not a question, which are answered.
    fn hear(&self, until: Instant) -> Option<Vec<u8>> {
        loop {
            while let Some(frame) = self.port.recv() {
                assert!(frame.is_sound() && frame.is_taken_by(Offloads::NONE), "{frame:?} is not complete");
                match self.own.answer(&frame.data) {
                    Some(answer) => self.send(answer),
                    None => return Some(frame.data),
                }
            }
            self.woken.recv_timeout(until.checked_duration_since(Instant::now())?).ok()?;
        }
    }

    fn send(&self, frame: Vec<u8>) {
        self.port.send(Frame::new(frame)).expect("there is room");
    }

    /// Pings with these bytes until the reply has come, which may be to an earlier one.
    pub(super) fn ping(&self, bytes: &[u8], patience: Duration) {
        const AGAIN: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            self.send(self.own.who_has(self.guest.address));
            self.send(self.own.ping(self.guest, bytes));
            let again = deadline.min(Instant::now() + AGAIN);
            while let Some(frame) = self.hear(again) {
                if self.own.reply(&frame) == Some(bytes) {
                    return;
                }
            }
        }
        panic!("a ping with {} bytes has no reply", bytes.len());
    }

    /// Whether the guest's end is plugged in.
    pub(super) fn is_connected(&self) -> bool {
        self.port.is_connected()
    }

    /// How many replies come in a while. A guest may say other things between them.
    fn replies(&self, until: Instant, most: usize) -> usize {
        let heard = std::iter::from_fn(|| self.hear(until));
        heard.filter(|frame| self.own.reply(frame).is_some()).take(most).count()
    }
}

/// A guest with these ports, which are up. None where machines have no ports.
pub(super) fn up(
    bed: &TestBed<'_>,
    stations: &[Station],
    change: impl FnOnce(&mut MachineSpec),
) -> Option<(Guest, Vec<Peer>)> {
    if bed.hypervisor.capabilities().max_nets < stations.len() {
        println!("machines have no network ports: not checked");
        return None;
    }
    let (specs, peers): (Vec<_>, Vec<_>) = stations.iter().map(|station| Peer::of(bed, *station)).unzip();
    let mut guest = bed.up_with(Vec::new(), |spec| {
        spec.nets = specs;
        change(spec);
    });
    for (n, station) in stations.iter().enumerate() {
        guest.expect_answer(&format!("up {n} {}", station.address), "up");
    }
    Some((guest, peers))
}

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 256) as u8).collect()
}

pub(super) fn refuses_ports_that_cannot_be(bed: &TestBed<'_>) {
    let most = bed.hypervisor.capabilities().max_nets;
    for what in ["too many", "no address", "no MTU"] {
        let (spec, _peer) = Peer::of(bed, FIRST);
        let mut machine = bed.spec(&Console::new(), Vec::new(), &std::env::temp_dir());
        machine.nets = match what {
            "too many" => vec![spec; most + 1],
            "no address" => vec![NetSpec::new(spec.port, MacAddress::BROADCAST)],
            _ => {
                let mut spec = spec;
                spec.mtu = NetSpec::MIN_MTU - 1;
                vec![spec]
            }
        };
        let refused = bed.hypervisor.create(machine).expect_err(what);
        assert_eq!(refused.kind(), MachineErrorKind::Unsupported, "{what}: {refused}");
    }
}

pub(super) fn carries_frames(bed: &TestBed<'_>) {
    // With several processors, a port may have several queues.
    let several = |spec: &mut MachineSpec| {
        spec.vcpus = NonZeroU32::new(bed.vcpus).expect("the test bed gives processors");
        spec.nets[1].mtu = 1400;
    };
    let Some((mut guest, peers)) = up(bed, &[FIRST, SECOND], several) else { return };
    guest.expect_answer("nets", "nets 2");
    for (n, (station, mtu)) in [(FIRST, 1500), (SECOND, 1400)].into_iter().enumerate() {
        guest.expect_answer(&format!("mac {n}"), &format!("mac {}", station.mac));
        guest.expect_answer(&format!("mtu {n}"), &format!("mtu {mtu}"));
        // Headers of IP and ICMP are 28 bytes.
        for len in [0, 1, 17, 18, 19, 64, 500, 501, mtu - 29, mtu - 28] {
            peers[n].ping(&content(len), bed.patience);
        }
    }
    // Many at once; a guest answers the most of them, and its ports go on with what it does not.
    const BURST: usize = 200;
    let first = &peers[0];
    for n in 0..BURST {
        first.send(first.own.ping(first.guest, &content(n)));
    }
    let came = first.replies(Instant::now() + bed.patience, BURST / 2);
    assert!(came >= BURST / 2, "{came} of {BURST} replies came");
    first.replies(Instant::now() + SILENCE, BURST);
    first.ping(&content(99), bed.patience);
    // Each port has its own.
    first.ping(&content(100), bed.patience);
    let other = &peers[1];
    while let Some(frame) = other.hear(Instant::now() + SILENCE) {
        assert_eq!(other.own.reply(&frame), None, "a reply comes out of the wrong port");
    }
}

pub(super) fn moves_no_frame_while_paused(bed: &TestBed<'_>) {
    let Some((guest, peers)) = up(bed, &[FIRST], |_| ()) else { return };
    let peer = &peers[0];
    peer.ping(b"before", bed.patience);
    guest.machine.pause().expect("pauses");
    // What was under way when it was paused may still come.
    while peer.hear(Instant::now() + SILENCE).is_some() {}
    peer.send(peer.own.ping(peer.guest, b"meanwhile"));
    assert_eq!(peer.hear(Instant::now() + SILENCE), None, "a paused guest answers");
    guest.machine.resume().expect("resumes");
    peer.ping(b"after", bed.patience);
}

pub(super) fn holds_ports_to_limits(bed: &TestBed<'_>) {
    if bed.hypervisor.capabilities().max_nets == 0 {
        return println!("machines have no network ports: not checked");
    }
    const FRAMES: usize = 12;
    // Two at once, and then ten in a second.
    let slow = IoLimits { ops: Some(Rate { per_second: 10, burst: 2 }), ..IoLimits::NONE };
    let least = Duration::from_millis(100) * (FRAMES as u32 - 3);
    let limiter = Limiter::new(IoLimits::NONE);
    let limits = FrameLimits::new([limiter.clone()]);
    if !bed.hypervisor.capabilities().net_limits {
        let (mut spec, _peer) = Peer::of(bed, FIRST);
        spec.transmit_limits = limits;
        let mut machine = bed.spec(&Console::new(), Vec::new(), &std::env::temp_dir());
        machine.nets = vec![spec];
        let refused = bed.hypervisor.create(machine).expect_err("it has no limits");
        assert_eq!(refused.kind(), MachineErrorKind::Unsupported, "{refused}");
        return println!("ports are not held to limits: not checked");
    }
    for direction in ["to the guest", "from the guest"] {
        limiter.set(IoLimits::NONE);
        let limits = limits.clone();
        let limit = |spec: &mut MachineSpec| match direction {
            "to the guest" => spec.nets[0].receive_limits = limits,
            _ => spec.nets[0].transmit_limits = limits,
        };
        let Some((_guest, peers)) = up(bed, &[FIRST], limit) else { return };
        let peer = &peers[0];
        peer.ping(b"fast", bed.patience);
        limiter.set(slow);
        limiter.charge(2, 0);
        let begun = Instant::now();
        (0..FRAMES).for_each(|n| peer.send(peer.own.ping(peer.guest, &content(n))));
        let came = peer.replies(begun + bed.patience, FRAMES);
        assert!(
            came == FRAMES && begun.elapsed() >= least,
            "{came} replies in {:?}, {direction}",
            begun.elapsed()
        );
        limiter.set(IoLimits::NONE);
        peer.ping(b"fast again", bed.patience);
    }
}

pub(super) fn ports_end_with_their_machine(bed: &TestBed<'_>) {
    let Some((guest, peers)) = up(bed, &[FIRST], |_| ()) else { return };
    let peer = &peers[0];
    peer.ping(b"alive", bed.patience);
    guest.machine.kill();
    while peer.port.recv().is_some() {}
    assert!(!peer.port.is_connected(), "the port of a machine that has ended is still there");
    assert_eq!(peer.port.send(Frame::new(vec![0; 60])), Err(SendError::Disconnected));
}
