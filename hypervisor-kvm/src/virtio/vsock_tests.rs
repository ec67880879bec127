//! Drivers, good and bad, against the socket device's logic, with the program's end of the cable.

use std::io::{Read, Write};
use std::num::NonZeroU32;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

use instance_core::vsock::{self, VsockSpec};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::chain::Malformed;
use super::core::Step;
use super::device::Device;
use super::driver::{BUFFERS, Driver, WRITE};
use super::mmio::Mmio;
use super::ring::Ring;
use super::vsock::{EVENTS, RECEIVE, TRANSMIT, Vsock};
use crate::memory;

const CID: u32 = 42;
const HEADER: usize = 44;
/// Where the packets from the guest are, and the buffers for those to it.
const SENT: u64 = BUFFERS;
const RECEIVED: u64 = 0x10_0000;
const BUFFER_LEN: u32 = 4096;
/// The room that the guest says it has.
const ROOM: u32 = 1000;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

struct Guest {
    driver: Driver,
    host: vsock::Vsock,
    seen: u16,
}

impl Deref for Guest {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

/// A packet, with the fields of its header in their order but for the length.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sent {
    cids: (u64, u64),
    ports: (u32, u32),
    kind: u16,
    op: u16,
    flags: u32,
    credit: (u32, u32),
    data: Vec<u8>,
}

impl Sent {
    /// From the guest's port to the host's.
    fn new(ports: (u32, u32), op: u16) -> Self {
        let cids = (CID.into(), 2);
        Self { cids, ports, kind: 1, op, flags: 0, credit: (ROOM, 0), data: Vec::new() }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.cids.0.to_le_bytes());
        bytes.extend(self.cids.1.to_le_bytes());
        bytes.extend(self.ports.0.to_le_bytes());
        bytes.extend(self.ports.1.to_le_bytes());
        bytes.extend((self.data.len() as u32).to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.credit.0.to_le_bytes());
        bytes.extend(self.credit.1.to_le_bytes());
        assert_eq!(bytes.len(), HEADER);
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!(word(24) as usize, bytes.len() - HEADER);
        Self {
            cids: (long(0), long(8)),
            ports: (word(16), word(20)),
            kind: half(28),
            op: half(30),
            flags: word(32),
            credit: (word(36), word(40)),
            data: bytes[HEADER..].to_vec(),
        }
    }
}

impl Guest {
    /// A guest that has offered some buffers.
    fn new() -> Self {
        let (port, host) = vsock::cable();
        let mut spec = VsockSpec::new(port);
        spec.cid = CID;
        let mut guest = Self { driver: Driver::new(Vsock::new(&spec), 3, 0), host, seen: 0 };
        (0..8).for_each(|n| guest.offer_buffer(n, BUFFER_LEN));
        guest
    }

    /// One that goes on where another machine's was saved.
    fn continued() -> Self {
        let (port, host) = vsock::cable();
        let mut spec = VsockSpec::new(port);
        spec.cid = CID;
        let mut guest = Self { driver: Driver::new(Vsock::new(&spec), 3, 0), host, seen: 0 };
        let saved = guest.device.save();
        let mut device = Vsock::new(&spec);
        device.break_streams();
        guest.driver.device = Mmio::new(device);
        guest.driver.device.restore(&guest.driver.memory, &saved).unwrap();
        guest
    }

    fn offer_buffer(&mut self, n: u16, len: u32) {
        self.offer(RECEIVE, n, &[(RECEIVED + u64::from(n) * 0x1_0000, len, WRITE)]);
    }

    fn send_bytes(&mut self, bytes: &[u8]) -> Step {
        self.put(SENT, bytes);
        let header = bytes.len().min(HEADER);
        let chain = [(SENT, header as u32, 0), (SENT + header as u64, (bytes.len() - header) as u32, 0)];
        self.offer(TRANSMIT, 0, &chain[..if bytes.len() > HEADER { 2 } else { 1 }]);
        self.step(TRANSMIT)
    }

    fn send(&mut self, packet: &Sent) {
        let sent = self.used(TRANSMIT);
        assert_eq!(self.send_bytes(&packet.to_bytes()), Step::Served { interrupt: true });
        assert_eq!(self.used(TRANSMIT), sent.wrapping_add(1));
    }

    /// The packets that came, whose buffers are offered again.
    fn received(&mut self) -> Vec<Sent> {
        while matches!(self.step(RECEIVE), Step::Served { .. }) && self.used(RECEIVE) == self.seen {}
        let mut packets = Vec::new();
        while self.seen != self.used(RECEIVE) {
            let (head, len) = self.used_chain(RECEIVE, self.seen);
            packets.push(Sent::parse(&self.bytes(RECEIVED + u64::from(head) * 0x1_0000, len)));
            self.seen = self.seen.wrapping_add(1);
            self.offer_buffer(head, BUFFER_LEN);
        }
        packets
    }

    fn ops(&mut self) -> Vec<u16> {
        self.received().iter().map(|packet| packet.op).collect()
    }
}

fn at_once() -> Instant {
    Instant::now()
}

#[test]
fn the_guest_is_told_its_address() {
    let guest = Guest::new();
    let config = [0, 4, 8].map(|at| guest.get(reg::VIRTIO_MMIO_CONFIG + at));
    assert_eq!(config, [CID, 0, 0]);
}

#[test]
fn a_guest_connects_and_talks() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(5000).unwrap();
    guest.send(&Sent::new((1024, 5000), REQUEST));
    let answer = guest.received();
    assert_eq!(answer.len(), 1, "{answer:?}");
    let Sent { cids, ports, kind, op, credit: (room, 0), .. } = answer[0] else { panic!("{answer:?}") };
    assert_eq!((cids, ports, kind, op), ((2, CID.into()), (5000, 1024), 1, RESPONSE));
    assert!(room >= 64 << 10, "room for {room} bytes");
    let mut stream = listener.accept(at_once()).unwrap();
    assert_eq!((stream.host_port(), stream.guest_port()), (5000, 1024));
    stream.set_deadline(Some(at_once()));

    guest.send(&Sent { data: b"hello".to_vec(), ..Sent::new((1024, 5000), RW) });
    let mut bytes = [0; 16];
    assert_eq!(stream.read(&mut bytes).unwrap(), 5);
    assert_eq!(&bytes[..5], b"hello");
    assert_eq!(stream.read(&mut bytes).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    stream.write_all(b"good day").unwrap();
    let answer = guest.received();
    assert_eq!((answer[0].op, &answer[0].data[..]), (RW, &b"good day"[..]));
    assert_eq!(answer[0].credit, (room, 5), "what was read is told");

    drop(stream);
    let last = guest.received();
    assert_eq!((last[0].op, last[0].flags), (SHUTDOWN, 3));
    guest.send(&Sent::new((1024, 5000), RST));
    assert!(guest.ops().is_empty());
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(1).unwrap();
    guest.send(&Sent::new((9, 1), REQUEST));
    assert_eq!(guest.ops(), [RESPONSE]);
    let mut stream = listener.accept(at_once()).unwrap();
    let all: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
    stream.write_all(&all).unwrap();
    let mut got = Vec::new();
    let mut asked = 0;
    while got.len() < all.len() {
        for packet in guest.received() {
            match packet.op {
                RW => got.extend(packet.data),
                CREDIT_REQUEST => asked += 1,
                op => panic!("{op}"),
            }
        }
        assert!(got.len() <= all.len().min(ROOM as usize * (asked + 1)), "{} after {asked}", got.len());
        assert!(guest.ops().is_empty(), "nothing more without room");
        let credit = (ROOM, got.len() as u32);
        guest.send(&Sent { credit, ..Sent::new((9, 1), CREDIT_UPDATE) });
    }
    assert_eq!(got, all);
    // As much as a buffer holds: one with a header and three bytes.
    stream.write_all(b"abcdef").unwrap();
    let mut small = Guest::new();
    let listener = small.host.listen(1).unwrap();
    small.begin(0);
    small.seen = 0;
    small.send(&Sent::new((9, 1), REQUEST));
    (0..4).for_each(|n| small.offer_buffer(n, HEADER as u32 + if n == 0 { 0 } else { 3 }));
    listener.accept(at_once()).unwrap().write_all(b"abcdef").unwrap();
    let pieces: Vec<_> = small.received().into_iter().map(|packet| (packet.op, packet.data)).collect();
    assert_eq!(pieces[..3], [(RESPONSE, vec![]), (RW, b"abc".to_vec()), (RW, b"def".to_vec())]);
}

#[test]
fn what_is_for_nobody_is_refused_or_dropped() {
    let refused = |packet: Sent| {
        let mut guest = Guest::new();
        guest.send(&packet);
        guest.received()
    };
    let request = Sent::new((7, 80), REQUEST);
    for packet in [
        request.clone(),
        Sent { data: b"x".to_vec(), ..Sent::new((7, 80), RW) },
        Sent { op: 99, ..request.clone() },
        Sent { kind: 2, ..request.clone() },
        Sent::new((7, 80), CREDIT_REQUEST),
    ] {
        let answer = refused(packet.clone());
        let [rst] = &answer[..] else { panic!("{packet:?}: {answer:?}") };
        assert_eq!((rst.cids, rst.ports, rst.op), ((2, CID.into()), (80, 7), RST), "{packet:?}");
        assert_eq!(rst.kind, packet.kind);
    }
    for packet in [
        Sent::new((7, 80), RST),
        Sent { kind: 2, op: RST, ..request.clone() },
        Sent { cids: (43, 2), ..request.clone() },
        Sent { cids: (CID.into(), 3), ..request.clone() },
        Sent { cids: (CID.into(), 2 | 1 << 32), ..request },
    ] {
        assert_eq!(refused(packet.clone()), [], "{packet:?}");
    }
}

/// A driver need not want to know that its packets were taken. Whoever serves it looks again all the same, since the answers
/// are in another queue.
#[test]
fn a_packet_that_nobody_is_told_of_is_answered() {
    let (port, _host) = vsock::cable();
    let mut spec = VsockSpec::new(port);
    spec.cid = CID;
    let mut driver = Driver::with_event_indices(Vsock::new(&spec), 3);
    driver.offer(RECEIVE, 0, &[(RECEIVED, BUFFER_LEN, WRITE)]);
    driver.offer(RECEIVE, 1, &[(RECEIVED, BUFFER_LEN, WRITE)]);
    driver.put(SENT, &Sent::new((7, 80), REQUEST).to_bytes());
    for (answered, step) in [(1, Step::Served { interrupt: true }), (2, Step::Served { interrupt: false })] {
        // By its event index, which stays zero, it wants to know of the first alone.
        driver.offer(TRANSMIT, 0, &[(SENT, HEADER as u32, 0)]);
        assert_eq!(driver.step(TRANSMIT), step);
        driver.step(RECEIVE);
        assert_eq!(driver.used(RECEIVE), answered);
        assert_eq!(driver.step(TRANSMIT), Step::Idle);
    }
}

/// Where it were told later, what has come since would be of streams that are no more, too.
#[test]
fn a_guest_that_is_continued_is_told_so_first() {
    let mut guest = Guest::continued();
    guest.offer_buffer(0, BUFFER_LEN);
    guest.offer(EVENTS, 0, &[(SENT, 8, WRITE)]);
    guest.send(&Sent::new((7, 80), REQUEST));
    assert_eq!((guest.step(RECEIVE), guest.used(RECEIVE)), (Step::Served { interrupt: false }, 0));
    assert!(matches!(guest.step(EVENTS), Step::Served { .. }));
    assert!(matches!(guest.step(RECEIVE), Step::Served { .. }));
    assert_eq!((guest.used(EVENTS), guest.ops()), (1, vec![RST]));
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut guest = Guest::new();
    guest.begin(0);
    guest.seen = 0;
    let mut taken = 0;
    for n in 0..1000 {
        match guest.send_bytes(&Sent::new((n, 80), REQUEST).to_bytes()) {
            Step::Served { .. } => taken += 1,
            _ => break,
        }
    }
    assert!((1..200).contains(&taken), "{taken} answers wait");
    // One is taken, and another packet is.
    guest.offer_buffer(0, BUFFER_LEN);
    assert_eq!(guest.step(RECEIVE), Step::Served { interrupt: true });
    let before = guest.used(TRANSMIT);
    assert!(matches!(guest.step(TRANSMIT), Step::Served { .. }));
    assert_eq!(guest.used(TRANSMIT), before + 1);
    // The same where the device itself refuses.
    let mut guest = Guest::new();
    guest.begin(0);
    let other = Sent { kind: 2, ..Sent::new((1, 80), REQUEST) }.to_bytes();
    assert!(matches!(guest.send_bytes(&other), Step::Served { .. }));
    assert_eq!(guest.send_bytes(&other), Step::Idle);
}

#[test]
fn a_bad_driver_stops_its_device_until_it_resets_it() {
    type Bad = fn(&mut Guest) -> Step;
    let bad: &[(&str, Bad)] = &[
        ("a packet has no header", |g| g.send_bytes(&[0; HEADER - 1])),
        ("a packet's buffers are not for reading", |g| {
            g.offer(TRANSMIT, 0, &[(SENT, 44, 0), (SENT, 44, WRITE)]);
            g.step(TRANSMIT)
        }),
        ("a packet is shorter than it says", |g| {
            let mut bytes = Sent { data: vec![0; 10], ..Sent::new((1, 2), RW) }.to_bytes();
            bytes.pop();
            g.send_bytes(&bytes)
        }),
        ("a packet is longer than any stream has room for", |g| {
            let mut bytes = Sent::new((1, 2), RW).to_bytes();
            bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
            g.send_bytes(&bytes)
        }),
        ("a buffer for packets is shorter than their header", |g| {
            g.begin(0);
            g.offer_buffer(0, 43);
            g.send(&Sent::new((1, 2), REQUEST));
            g.step(RECEIVE)
        }),
        ("a buffer for packets is not for writing", |g| {
            g.begin(0);
            g.offer(RECEIVE, 0, &[(RECEIVED, 4096, 0)]);
            g.send(&Sent::new((1, 2), REQUEST));
            g.step(RECEIVE)
        }),
        ("a buffer for events is not for writing", |g| {
            *g = Guest::continued();
            g.offer(EVENTS, 0, &[(SENT, 4, 0), (SENT, 8, WRITE)]);
            g.step(EVENTS)
        }),
    ];
    for (expect, misbehave) in bad {
        let mut guest = Guest::new();
        let broken = misbehave(&mut guest);
        let Step::Broken(Malformed(why)) = broken else { panic!("{expect}: {broken:?}") };
        assert_eq!(why, *expect);
        assert!(guest.needs_reset());
        guest.begin(0);
        guest.seen = 0;
        guest.offer_buffer(0, BUFFER_LEN);
        guest.send(&Sent::new((1, 2), REQUEST));
        assert_eq!(guest.ops(), [RST], "{expect}");
    }
}

#[test]
fn a_driver_that_begins_anew_and_a_machine_that_ends_have_no_streams() {
    let ends: [fn(&mut Guest); 2] = [|guest| guest.begin(0), |guest| guest.device.end()];
    for end in ends {
        let mut guest = Guest::new();
        let listener = guest.host.listen(1).unwrap();
        guest.send(&Sent::new((9, 1), REQUEST));
        let mut stream = listener.accept(at_once()).unwrap();
        guest.send(&Sent { data: b"last".to_vec(), ..Sent::new((9, 1), RW) });
        end(&mut guest);
        let mut rest = Vec::new();
        let error = stream.read_to_end(&mut rest).unwrap_err();
        assert_eq!((&rest[..], error.kind()), (&b"last"[..], std::io::ErrorKind::ConnectionReset));
    }
}

#[test]
fn a_guest_that_is_continued_is_told_that_its_streams_are_no_more() {
    let (port, _host) = vsock::cable();
    let mut device = Vsock::new(&VsockSpec::new(port));
    let memory = memory::allocate(NonZeroU32::MIN).unwrap();
    let mut ring = Ring::new();
    // The queue's parts at these places, and one buffer of 8 bytes in it, twice.
    ring.describe(|queue| {
        (queue.size, queue.descriptors, queue.available, queue.used) = (2, 0x1000, 0x2000, 0x3000);
    })
    .unwrap();
    ring.make_ready(&memory, 0).unwrap();
    memory.write_obj([RECEIVED as u32 >> 4, 0, 8, u32::from(WRITE)], GuestAddress(0x1000)).unwrap();
    memory.write_obj([0u16, 2, 0, 0], GuestAddress(0x2000)).unwrap();
    let at = GuestAddress(RECEIVED >> 4);
    memory.write_obj([0xeeu8; 8], at).unwrap();
    assert_eq!(device.serve(EVENTS, &mut ring.run(&memory), 0), Ok(false), "nothing has happened");
    device.break_streams();
    assert_eq!(device.serve(EVENTS, &mut ring.run(&memory), 0), Ok(true));
    assert_eq!(memory.read_obj::<[u8; 8]>(at).unwrap(), [0, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
    assert_eq!(memory.read_obj::<[u32; 3]>(GuestAddress(0x3000)).unwrap(), [1 << 16, 0, 4]);
    assert_eq!(device.serve(EVENTS, &mut ring.run(&memory), 0), Ok(false), "it is told once");
    // Whose buffer is shorter than an event.
    device.break_streams();
    memory.write_obj(3u32, GuestAddress(0x1008)).unwrap();
    let too_short = Malformed("a buffer for events is too short");
    assert_eq!(device.serve(EVENTS, &mut ring.run(&memory), 0), Err(too_short));
}
