//! Drivers, good and bad, against the network device's logic, and what comes out at the other end of the cable.

mod receive;

use instance_core::machine::NetSpec;
use instance_core::net::{
    self, Checksum, FRAMES_KEPT, Frame, MacAddress, NetPort, Offloads, Protocol, Segmentation,
};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::Net;
use crate::memory::{self, Memory};
use crate::virtio::Mmio;
use crate::virtio::core::{Effect, Step};

/// The queues of the first pair.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const QUEUE_SIZE: u16 = 64;
/// Where each queue has its three parts.
const QUEUES: [u64; 2] = [0x1_0000, 0x2_0000];
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where the buffers of the frames from the guest are, and those to it.
const SENT: u64 = 0x3_0000;
const RECEIVED: u64 = 0x6_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const MRG_RXBUF: u64 = 1 << 15;
const EVENT_IDX: u64 = 1 << 29;

const MAC: MacAddress = MacAddress([2, 0, 10, 0, 0, 12]);

/// A driver with both queues, and the network at the other end of its cable.
struct Driver {
    memory: Memory,
    device: Mmio,
    network: NetPort,
    offered: [u16; 2],
}

impl Driver {
    /// Accepts all that is offered but for the features in `without`, to a network that takes everything.
    fn without(without: u64) -> Self {
        Self::on(Offloads::ALL, without)
    }

    fn on(takes: Offloads, without: u64) -> Self {
        let (port, network) = net::link();
        network.set_takes(takes);
        let memory = memory::allocate(std::num::NonZeroU32::MIN).unwrap();
        let device = Mmio::new(Net::new(&NetSpec::new(port, MAC), 1));
        let mut driver = Self { memory, device, network, offered: [0; 2] };
        driver.begin(without);
        driver
    }

    fn begin(&mut self, without: u64) {
        for status in [0, 1, 3] {
            self.set(reg::VIRTIO_MMIO_STATUS, status);
        }
        for half in 0..2 {
            self.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            let offered = self.get(reg::VIRTIO_MMIO_DEVICE_FEATURES);
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, offered & !((without >> (32 * half)) as u32));
        }
        self.set(reg::VIRTIO_MMIO_STATUS, 11);
        for (n, at) in (0..).zip(QUEUES) {
            self.memory.write_slice(&[0; 0x3000], GuestAddress(at)).unwrap();
            self.set(reg::VIRTIO_MMIO_QUEUE_SEL, n);
            self.set(reg::VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into());
            self.set(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, at as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, (at + AVAILABLE) as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_USED_LOW, (at + USED) as u32);
            assert_eq!(self.set(reg::VIRTIO_MMIO_QUEUE_READY, 1), Effect::None);
        }
        assert_eq!(self.set(reg::VIRTIO_MMIO_STATUS, 15), Effect::Notify);
        self.offered = [0; 2];
        // Has the network told what this driver takes.
        assert_eq!(self.step(RECEIVE), Step::Idle);
    }

    fn set(&mut self, register: u32, value: u32) -> Effect {
        self.device.write(&self.memory, register.into(), &value.to_le_bytes())
    }

    fn get(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.device.read(register.into(), &mut word, 0);
        u32::from_le_bytes(word)
    }

    fn step(&mut self, queue: usize) -> Step {
        self.device.step(&self.memory, queue)
    }

    fn needs_reset(&self) -> bool {
        self.get(reg::VIRTIO_MMIO_STATUS) & 64 != 0
    }

    /// Makes a chain of these descriptors available, whose first is number `head`.
    fn offer(&mut self, queue: usize, head: u16, chain: &[(u64, u32, u16)]) {
        let at = QUEUES[queue];
        for (n, (address, len, flags)) in (head..).zip(chain.iter().copied()) {
            let next = if usize::from(n - head) + 1 < chain.len() { NEXT } else { 0 };
            let descriptor = GuestAddress(at + 16 * u64::from(n));
            self.memory.write_obj(address, descriptor).unwrap();
            let rest = u64::from(len) | u64::from(flags | next) << 32 | u64::from(n + 1) << 48;
            self.memory.write_obj(rest, GuestAddress(descriptor.0 + 8)).unwrap();
        }
        let sent = &mut self.offered[queue];
        let slot = at + AVAILABLE + 4 + 2 * u64::from(*sent % QUEUE_SIZE);
        *sent = sent.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory.write_obj(*sent, GuestAddress(at + AVAILABLE + 2)).unwrap();
    }

    /// Sends a frame as a good driver does: header and frame in a descriptor each.
    fn send(&mut self, header: [u8; 12], frame: &[u8]) -> Step {
        self.memory.write_slice(&header, GuestAddress(SENT)).unwrap();
        self.memory.write_slice(frame, GuestAddress(SENT + 12)).unwrap();
        let whole = [(SENT, 12, 0), (SENT + 12, frame.len() as u32, 0)];
        self.offer(TRANSMIT, 0, &whole[..if frame.is_empty() { 1 } else { 2 }]);
        self.step(TRANSMIT)
    }

    /// Offers a buffer of so many bytes for a frame, the `n`th of its kind.
    fn offer_buffer(&mut self, n: u16, len: u32) {
        self.offer(RECEIVE, n, &[(RECEIVED + 0x1_0000 * u64::from(n), len, WRITE)]);
    }

    /// How far the used ring is.
    fn used(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(QUEUES[queue] + USED + 2)).unwrap()
    }

    /// What was written into the `n`th buffer that was used.
    fn received(&self, n: u16) -> Vec<u8> {
        let element = GuestAddress(QUEUES[RECEIVE] + USED + 4 + 8 * u64::from(n % QUEUE_SIZE));
        let [head, len] = self.memory.read_obj::<[u32; 2]>(element).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(RECEIVED + 0x1_0000 * u64::from(head))).unwrap();
        bytes
    }
}

fn header(flags: u8, gso: u8, gso_size: u16, start: u16, offset: u16) -> [u8; 12] {
    let ([g0, g1], [s0, s1], [o0, o1]) = (gso_size.to_le_bytes(), start.to_le_bytes(), offset.to_le_bytes());
    [flags, gso, 0, 0, g0, g1, s0, s1, o0, o1, 0, 0]
}

/// Bytes that differ everywhere, with a TCP header of 20 bytes where one is behind IPv4's.
fn content(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|n| (n * 7 + n / 256) as u8).collect();
    if let Some(byte) = bytes.get_mut(34 + 12) {
        *byte = 5 << 4;
    }
    bytes
}

#[test]
fn tells_address_link_and_mtu() {
    let driver = Driver::without(0);
    let mut config = [0xee; 14];
    driver.device.read(reg::VIRTIO_MMIO_CONFIG.into(), &mut config[..12], 0);
    assert_eq!(config, [2, 0, 10, 0, 0, 12, 1, 0, 0, 0, 220, 5, 0xee, 0xee]);
}

#[test]
fn offers_what_the_network_takes() {
    let checksum = {
        let mut takes = Offloads::NONE;
        takes.checksum = true;
        takes
    };
    for (takes, expect) in
        [(Offloads::NONE, 0), (checksum, CSUM), (Offloads::ALL, CSUM | HOST_TSO4 | HOST_TSO6)]
    {
        let mut driver = Driver::on(takes, 0);
        driver.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let offered = u64::from(driver.get(reg::VIRTIO_MMIO_DEVICE_FEATURES));
        assert_eq!(offered & (CSUM | HOST_TSO4 | HOST_TSO6), expect, "{takes:?}");
    }
}

#[test]
fn tells_the_network_what_the_driver_takes() {
    for (without, checksum, tcp4) in
        [(0, true, true), (GUEST_TSO4, true, false), (GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6, false, false)]
    {
        let mut driver = Driver::without(without);
        let takes = driver.network.peer_takes();
        assert_eq!((takes.checksum, takes.tcp4), (checksum, tcp4));
        driver.set(reg::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.network.peer_takes(), Offloads::NONE, "after a reset");
    }
}

#[test]
fn frames_from_the_guest_arrive_as_they_are() {
    let mut driver = Driver::without(EVENT_IDX);
    for (n, len) in (1..).zip((14..1519).chain(14..600)) {
        assert_eq!(driver.send([0; 12], &content(len)), Step::Served { interrupt: true });
        assert_eq!(driver.network.recv(), Some(Frame::new(content(len))), "{len} bytes");
        assert_eq!(driver.used(TRANSMIT), n);
    }
}

#[test]
fn what_is_left_to_be_done_is_passed_on() {
    let mut driver = Driver::without(0);
    driver.send(header(1, 0, 0, 34, 16), &content(100));
    let sent = driver.network.recv().unwrap();
    assert_eq!(sent.checksum, Checksum::Partial { start: 34, offset: 16 });
    driver.send(header(1, 1, 1448, 34, 16), &content(60_000));
    let sent = driver.network.recv().unwrap();
    assert_eq!(sent.data, content(60_000));
    let cut = Segmentation { protocol: Protocol::Tcp4, size: 1448, header_len: 54 };
    assert_eq!(sent.segmentation, Some(cut));
}

/// Each is lost, its buffer comes back, and the next one arrives.
#[test]
fn frames_that_are_none_are_dropped() {
    let no_tcp_header = {
        let mut frame = content(2000);
        frame[46] = 0xff;
        frame.truncate(60);
        frame
    };
    let table: [([u8; 12], Vec<u8>); 8] = [
        ([0; 12], vec![]),
        ([0; 12], content(13)),
        ([0; 12], content(1519)),
        ([0; 12], content(Frame::MAX_LEN + 1)),
        (header(1, 0, 0, 34, u16::MAX), content(100)),
        (header(1, 0, 0, 99, 0), content(100)),
        (header(1, 1, 0, 34, 16), content(100)),
        (header(1, 1, 1448, 34, 16), no_tcp_header),
    ];
    let mut driver = Driver::without(0);
    for (n, (header, frame)) in (0..).zip(table) {
        driver.send(header, &frame);
        assert_eq!(driver.network.recv(), None, "case {n}");
        driver.send([0; 12], &content(60));
        assert_eq!(driver.network.recv(), Some(Frame::new(content(60))), "after case {n}");
        assert_eq!((driver.used(TRANSMIT), driver.needs_reset()), (2 * n + 2, false));
    }
}

/// Flags that are the device's to set, or nobody's; lengths that the device knows better.
#[test]
fn what_has_no_meaning_in_a_header_is_ignored() {
    let mut driver = Driver::without(0);
    let mut header = header(0xfe, 0, 1448, 34, u16::MAX);
    (header[2], header[10], header[11]) = (0xff, 0xff, 0xff);
    driver.send(header, &content(100));
    assert_eq!(driver.network.recv(), Some(Frame::new(content(100))));
}

/// What a driver must not do (virtio 1.2, 5.1.6.2.1 and 5.1.6.3.1): the device waits for a reset, and works after it.
#[test]
fn a_driver_that_breaks_the_rules_is_stopped() {
    type Break = fn(&mut Driver) -> usize;
    let table: [(&str, u64, Break); 13] = [
        ("a header cut short", 0, |d| {
            d.offer(TRANSMIT, 0, &[(SENT, 11, 0)]);
            TRANSMIT
        }),
        ("a frame that is to be written", 0, |d| {
            d.offer(TRANSMIT, 0, &[(SENT, 12, 0), (SENT, 60, WRITE)]);
            TRANSMIT
        }),
        ("a frame outside the memory", 0, |d| {
            d.offer(TRANSMIT, 0, &[(1 << 40, 72, 0)]);
            TRANSMIT
        }),
        ("a checksum without the feature", CSUM | HOST_TSO4 | HOST_TSO6, |d| {
            d.send(header(1, 0, 0, 34, 16), &content(100));
            TRANSMIT
        }),
        ("a segmentation without the feature", HOST_TSO4, |d| {
            d.send(header(1, 1, 1448, 34, 16), &content(100));
            TRANSMIT
        }),
        ("a segmentation without a checksum", 0, |d| {
            d.send(header(0, 1, 1448, 34, 16), &content(100));
            TRANSMIT
        }),
        ("an unknown segmentation", 0, |d| {
            d.send(header(1, 9, 1448, 34, 16), &content(100));
            TRANSMIT
        }),
        ("UDP's segmentation", 0, |d| {
            d.send(header(1, 3, 1448, 34, 16), &content(100));
            TRANSMIT
        }),
        ("congestion in a segmentation", 0, |d| {
            d.send(header(1, 0x81, 1448, 34, 16), &content(100));
            TRANSMIT
        }),
        ("a buffer that is to be read", 0, |d| {
            d.offer(RECEIVE, 0, &[(RECEIVED, 2000, 0)]);
            RECEIVE
        }),
        ("a buffer shorter than a header", 0, |d| {
            d.offer_buffer(0, 11);
            RECEIVE
        }),
        ("a second buffer that is to be read", 0, |d| {
            d.offer(RECEIVE, 0, &[(RECEIVED, 40, WRITE)]);
            d.offer(RECEIVE, 1, &[(RECEIVED, 2000, 0)]);
            RECEIVE
        }),
        ("a chain without an end", 0, |d| {
            d.offer(RECEIVE, 0, &[(RECEIVED, 8, WRITE), (RECEIVED, 8, WRITE)]);
            let looping = u64::from(8u32) | u64::from(WRITE | NEXT) << 32;
            d.memory.write_obj(looping, GuestAddress(QUEUES[RECEIVE] + 24)).unwrap();
            RECEIVE
        }),
    ];
    for (what, without, break_rule) in table {
        let mut driver = Driver::without(without);
        driver.network.send(Frame::new(content(60))).unwrap();
        let queue = break_rule(&mut driver);
        driver.step(queue);
        assert!(driver.needs_reset(), "{what}");
        assert_eq!(driver.network.recv(), None, "{what}");
        assert_eq!(driver.step(queue), Step::Idle);
        driver.begin(0);
        driver.send([0; 12], &content(60));
        assert_eq!(driver.network.recv(), Some(Frame::new(content(60))), "{what}, after a reset");
    }
}

#[test]
fn a_full_network_is_waited_for() {
    let mut driver = Driver::without(0);
    let mut sent = 0;
    while driver.network.waiting() < FRAMES_KEPT {
        driver.send([0; 12], &content(60));
        sent += 1;
    }
    // One more is held, and none taken behind it.
    driver.send([0; 12], &content(61));
    driver.send([0; 12], &content(62));
    assert_eq!(driver.used(TRANSMIT), sent + 1);
    let got = std::iter::from_fn(|| driver.network.recv()).count();
    driver.step(TRANSMIT);
    let rest: Vec<usize> = std::iter::from_fn(|| driver.network.recv()).map(|f| f.data.len()).collect();
    assert_eq!((got, rest), (FRAMES_KEPT, vec![61, 62]));
}

#[test]
fn an_end_unplugs_the_cable() {
    let mut driver = Driver::without(0);
    assert!(driver.network.is_connected());
    driver.device.end();
    assert!(!driver.network.is_connected());
    driver.offer_buffer(0, 1526);
    assert_eq!(driver.step(RECEIVE), Step::Idle);
}
