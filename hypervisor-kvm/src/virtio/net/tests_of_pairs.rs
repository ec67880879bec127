//! Drivers of several pairs of queues, good and bad.

mod limits;

use instance_core::machine::NetSpec;
use instance_core::net::{self, Frame, MacAddress, NetPort, Offloads};
use virtio_bindings::virtio_mmio as reg;

use super::{MAX_PAIRS, Net, WAITING_MAX};
use crate::virtio::Mmio;
use crate::virtio::core::Step;
use crate::virtio::driver::{BUFFERS, Driver, QUEUE_SIZE, WRITE};

const PAIRS: usize = 3;
const CONTROL: usize = 2 * PAIRS;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;

/// Where a command is, and its answer; frames from the guest; and those to it, by pairs and numbers.
const COMMAND: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 0x100;
const SENT: u64 = BUFFERS + 0x1000;
const RECEIVED: u64 = 0x10_0000;
const BUFFER_LEN: u32 = 0x800;

const OK: u8 = 0;
const ERR: u8 = 1;

fn receive(pair: usize) -> usize {
    2 * pair
}

fn transmit(pair: usize) -> usize {
    2 * pair + 1
}

/// A UDP frame of the guest's from this port, or to it.
fn frame(port: u16, from_guest: bool, number: u8) -> Vec<u8> {
    let mut bytes = vec![number; 60];
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..34].fill(0);
    (bytes[14], bytes[23]) = (0x45, 17);
    let (guest, other) = (([10, 0, 0, 12], port), ([10, 0, 0, 1], 53u16));
    let (from, to) = if from_guest { (guest, other) } else { (other, guest) };
    bytes[26..30].copy_from_slice(&from.0);
    bytes[30..34].copy_from_slice(&to.0);
    bytes[34..36].copy_from_slice(&from.1.to_be_bytes());
    bytes[36..38].copy_from_slice(&to.1.to_be_bytes());
    bytes
}

struct Guest {
    driver: Driver,
    network: NetPort,
    /// How many buffers of each pair were offered.
    buffers: [u16; PAIRS],
}

impl Guest {
    fn new(without: u64) -> Self {
        Self::limited(without, |_| ())
    }

    fn limited(without: u64, change: impl FnOnce(&mut NetSpec)) -> Self {
        let (port, network) = net::link();
        network.set_takes(Offloads::ALL);
        let mut spec = NetSpec::new(port, MacAddress([2, 0, 10, 0, 0, 12]));
        change(&mut spec);
        let driver = Driver::new(Net::new(&spec, PAIRS), 2 * PAIRS + 1, without);
        let mut guest = Self { driver, network, buffers: [0; PAIRS] };
        // Has the network told what this driver takes.
        guest.driver.step(receive(0));
        guest
    }

    /// Gives a command of these bytes, with so much room for its answer.
    fn command(&mut self, queue: usize, bytes: &[u8], room: u32) -> Option<u8> {
        self.driver.put(COMMAND, bytes);
        self.driver.put(ANSWER, &[0xee]);
        let chain = [(COMMAND, bytes.len() as u32, 0), (ANSWER, room, WRITE)];
        self.driver.offer(queue, 0, if room == 0 { &chain[..1] } else { &chain });
        match self.driver.step(queue) {
            Step::Served { .. } => Some(self.driver.bytes(ANSWER, 1)[0]),
            Step::Broken(_) => None,
            Step::Idle => panic!("the command was not looked at"),
        }
    }

    fn use_pairs(&mut self, pairs: u16) {
        let [low, high] = pairs.to_le_bytes();
        assert_eq!(self.command(CONTROL, &[4, 0, low, high], 1), Some(OK));
    }

    fn send(&mut self, pair: usize, frame: &[u8]) -> Step {
        self.driver.put(SENT, &[0; 12]);
        self.driver.put(SENT + 12, frame);
        self.driver.offer(transmit(pair), 0, &[(SENT, 12 + frame.len() as u32, 0)]);
        self.driver.step(transmit(pair))
    }

    fn offer_buffer(&mut self, pair: usize) {
        let n = self.buffers[pair] % QUEUE_SIZE;
        self.buffers[pair] += 1;
        let at = RECEIVED + 0x8_0000 * pair as u64 + u64::from(n) * u64::from(BUFFER_LEN);
        self.driver.offer(receive(pair), n, &[(at, BUFFER_LEN, WRITE)]);
    }

    /// Has all queues served, in turn, until there is nothing to do.
    fn serve(&mut self) {
        while (0..2 * PAIRS).filter(|queue| self.driver.step(*queue) != Step::Idle).count() > 0 {}
    }

    /// The last bytes of the frames that a pair has been given.
    fn received(&self, pair: usize) -> Vec<u8> {
        let used = self.driver.used(receive(pair));
        let at = |n: u16| {
            let (head, len) = self.driver.used_chain(receive(pair), n);
            RECEIVED + 0x8_0000 * pair as u64 + u64::from(head) * u64::from(BUFFER_LEN) + len as u64 - 1
        };
        (0..used).map(|n| self.driver.bytes(at(n), 1)[0]).collect()
    }

    fn network_sends(&self, port: u16, number: u8) {
        self.network.send(Frame::new(frame(port, false, number))).unwrap();
    }
}

#[test]
fn several_pairs_are_offered_where_there_are_several() {
    for (pairs, queues, told) in [(0, 2, 0), (1, 2, 0), (2, 5, 2), (3, 7, 3), (100, 2 * MAX_PAIRS + 1, 8)] {
        let (port, _network) = net::link();
        let mut device = Mmio::new(Net::new(&NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1])), pairs));
        let memory = crate::memory::allocate(std::num::NonZeroU32::MIN).unwrap();
        let _ = device.write(&memory, reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL.into(), &[0; 4]);
        let (mut offered, mut config) = ([0; 4], [0; 2]);
        device.read(reg::VIRTIO_MMIO_DEVICE_FEATURES.into(), &mut offered, 0);
        device.read(u64::from(reg::VIRTIO_MMIO_CONFIG) + 8, &mut config, 0);
        let offered = u64::from(u32::from_le_bytes(offered)) & (CTRL_VQ | MQ);
        assert_eq!(offered, if told > 1 { CTRL_VQ | MQ } else { 0 }, "{pairs}");
        assert_eq!((device.queues(), u16::from_le_bytes(config)), (queues, told), "{pairs}");
    }
}

#[test]
fn commands_are_obeyed_if_they_are_whole_and_possible() {
    for (bytes, answer) in [
        (&[4, 0, 1, 0][..], OK),
        (&[4, 0, 3, 0], OK),
        (&[4, 0, 0, 0], ERR),
        (&[4, 0, 4, 0], ERR),
        (&[4, 0, 0, 1], ERR),
        (&[4, 0, 0xff, 0xff], ERR),
        // Of every other length.
        (&[4, 0], ERR),
        (&[4, 0, 3], ERR),
        (&[4, 0, 3, 0, 0], ERR),
        // Of other commands and classes: hashes, modes, addresses, VLANs, announcements.
        (&[4, 1, 3, 0], ERR),
        (&[4, 2, 3, 0], ERR),
        (&[0, 0, 1, 0], ERR),
        (&[1, 1, 2, 0], ERR),
        (&[2, 0, 1, 0], ERR),
        (&[3, 0], ERR),
        (&[0xff, 0xff, 0xff, 0xff], ERR),
    ] {
        let mut guest = Guest::new(0);
        assert_eq!(guest.command(CONTROL, bytes, 1), Some(answer), "{bytes:?}");
        assert_eq!(guest.driver.used_chain(CONTROL, 0), (0, 1));
        // A refused one leaves all as it was, and the next is heard.
        guest.use_pairs(2);
    }
    for (bytes, room) in [(&[][..], 1), (&[4], 1), (&[4, 0, 1, 0], 0)] {
        let mut guest = Guest::new(0);
        assert_eq!(guest.command(CONTROL, bytes, room), None, "{bytes:?}, room for {room}");
        assert!(guest.driver.needs_reset());
    }
}

/// A driver is to make all queues of the pairs ready first (virtio 1.2, 5.1.6.5.6.1).
#[test]
fn pairs_whose_queues_are_not_ready_are_not_used() {
    for queue in [receive(1), transmit(1), receive(2), transmit(2)] {
        let mut guest = Guest::new(0);
        guest.driver.set(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        guest.driver.set(reg::VIRTIO_MMIO_QUEUE_READY, 0);
        let most = queue as u16 / 2;
        assert_eq!(guest.command(CONTROL, &[4, 0, 3, 0], 1), Some(ERR), "without queue {queue}");
        guest.use_pairs(most);
        assert_eq!(guest.command(CONTROL, &[4, 0, most as u8 + 1, 0], 1), Some(ERR));
    }
}

/// Although a driver is not to send by them: Linux's does, where it is told to use fewer while frames are on their way.
#[test]
fn what_is_sent_by_pairs_that_are_not_used_is_passed_on() {
    let mut guest = Guest::new(0);
    guest.use_pairs(3);
    guest.use_pairs(1);
    for pair in [2, 1, 0] {
        assert!(matches!(guest.send(pair, &frame(7, true, pair as u8)), Step::Served { .. }));
    }
    let passed = std::iter::from_fn(|| guest.network.recv()).map(|frame| *frame.data.last().unwrap());
    assert_eq!(passed.collect::<Vec<_>>(), [2, 1, 0]);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn without_several_pairs_commands_are_of_the_third_queue_and_refused() {
    let mut guest = Guest::new(MQ);
    assert_eq!(guest.command(2, &[4, 0, 1, 0], 1), Some(ERR), "it was not agreed on");
    let mut guest = Guest::new(MQ | CTRL_VQ);
    guest.driver.offer(2, 0, &[(COMMAND, 4, 0), (ANSWER, 1, WRITE)]);
    guest.network_sends(7, 1);
    guest.offer_buffer(0);
    guest.serve();
    assert_eq!((guest.driver.used(2), guest.received(0)), (0, vec![1]), "no queue but the first two is used");
    assert!(!guest.driver.needs_reset());
}

/// A driver may not accept the one without the other (virtio 1.2, 5.1.3.1): all it has then is the first pair.
#[test]
fn several_pairs_without_a_queue_of_commands() {
    // Which no driver is let have, but by a version before, and its machine was saved.
    let mut saved = Guest::new(0).driver.device.save();
    saved.core.accepted &= !CTRL_VQ;
    let mut guest = Guest::new(0);
    guest.driver.device.restore(&guest.driver.memory, &saved).unwrap();
    (0..PAIRS).for_each(|pair| guest.offer_buffer(pair));
    guest.send(2, &frame(7, true, 0));
    guest.network_sends(7, 1);
    guest.serve();
    assert_eq!([0, 1, 2].map(|pair| guest.received(pair)), [vec![1], vec![], vec![]]);
    guest.driver.offer(CONTROL, 0, &[(COMMAND, 4, 0), (ANSWER, 1, WRITE)]);
    assert_eq!((guest.driver.step(CONTROL), guest.driver.used(CONTROL)), (Step::Idle, 0));
}

#[test]
fn answers_come_by_the_pair_that_asked() {
    let mut guest = Guest::new(0);
    (0..PAIRS).for_each(|pair| (0..8).for_each(|_| guest.offer_buffer(pair)));
    guest.send(2, &frame(7, true, 0));
    guest.network_sends(7, 1);
    guest.serve();
    assert_eq!(
        [guest.received(0), guest.received(2)],
        [vec![1], vec![]],
        "one pair is used before it is said"
    );
    guest.use_pairs(3);
    for (pair, port) in [(1, 8), (2, 9), (0, 10)] {
        guest.send(pair, &frame(port, true, 0));
    }
    for (port, number) in [(7, 2), (8, 3), (9, 4), (10, 5), (7, 6)] {
        guest.network_sends(port, number);
    }
    guest.serve();
    assert_eq!([0, 1, 2].map(|pair| guest.received(pair)), [vec![1, 5], vec![3], vec![2, 4, 6]]);
    assert_eq!(
        guest.network.waiting(),
        4,
        "what the guest sent has gone to the network, whichever pair it was by"
    );
}

#[test]
fn a_pair_without_buffers_loses_nothing() {
    let mut guest = Guest::new(0);
    guest.use_pairs(2);
    guest.send(1, &frame(7, true, 0));
    guest.send(0, &frame(8, true, 0));
    (0..8).for_each(|_| guest.offer_buffer(0));
    for (port, number) in [(8, 1), (7, 2), (8, 3), (7, 4), (8, 5)] {
        guest.network_sends(port, number);
    }
    guest.serve();
    assert_eq!([guest.received(0), guest.received(1)], [vec![1, 3, 5], vec![]]);
    for expect in [&[2][..], &[2, 4]] {
        guest.offer_buffer(1);
        guest.serve();
        assert_eq!(guest.received(1), expect);
    }
}

#[test]
fn a_pair_without_buffers_does_not_stop_the_others() {
    const LOST: u8 = 10;
    let mut guest = Guest::new(0);
    guest.use_pairs(3);
    guest.send(1, &frame(7, true, 0));
    guest.send(0, &frame(8, true, 0));
    (0..2).for_each(|_| guest.offer_buffer(0));
    let most = WAITING_MAX as u8;
    (0..most + LOST).for_each(|number| guest.network_sends(7, number));
    guest.network_sends(8, 200);
    guest.serve();
    assert_eq!((guest.received(0), guest.received(1), guest.network.waiting()), (vec![200], vec![], 2));
    (0..QUEUE_SIZE).for_each(|_| guest.offer_buffer(1));
    guest.serve();
    assert_eq!(guest.received(1), (0..most).collect::<Vec<_>>());
    (0..LOST).for_each(|_| guest.offer_buffer(1));
    guest.serve();
    assert_eq!(guest.driver.used(receive(1)), u16::from(most), "the rest is lost, and takes no memory");
}

#[test]
fn a_pair_with_buffers_is_waited_for_by_the_others() {
    let mut guest = Guest::new(0);
    guest.use_pairs(3);
    guest.send(1, &frame(7, true, 0));
    guest.offer_buffer(1);
    guest.network_sends(7, 0);
    guest.serve();
    let burst = WAITING_MAX as u16 + 10;
    (0..burst).for_each(|number| guest.network_sends(7, number as u8));
    for pair in [0, 2] {
        (0..2).for_each(|_| _ = guest.driver.step(receive(pair)));
    }
    for _ in 0..2 {
        (0..QUEUE_SIZE / 2).for_each(|_| guest.offer_buffer(1));
        guest.driver.step(receive(1));
    }
    guest.driver.step(receive(0));
    (0..QUEUE_SIZE / 2).for_each(|_| guest.offer_buffer(1));
    guest.serve();
    assert_eq!(guest.driver.used(receive(1)), 1 + burst);
}

#[test]
fn a_pair_whose_queue_is_stopped_is_not_waited_for() {
    let mut guest = Guest::new(0);
    guest.use_pairs(2);
    guest.send(1, &frame(7, true, 0));
    guest.send(0, &frame(8, true, 0));
    guest.offer_buffer(1);
    guest.network_sends(7, 0);
    guest.serve();
    guest.driver.set(reg::VIRTIO_MMIO_QUEUE_SEL, receive(1) as u32);
    guest.driver.set(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    guest.offer_buffer(0);
    (0..=WAITING_MAX).for_each(|number| guest.network_sends(7, number as u8));
    guest.network_sends(8, 200);
    guest.serve();
    assert_eq!(guest.received(0), [200]);
}

#[test]
fn with_one_pair_in_use_frames_wait_in_the_cable() {
    let mut guest = Guest::new(0);
    (0..100).for_each(|number| guest.network_sends(7, number));
    guest.serve();
    for _ in 0..2 {
        (0..QUEUE_SIZE).for_each(|_| guest.offer_buffer(0));
        guest.serve();
    }
    assert_eq!(guest.driver.used(receive(0)), 100, "none is lost");
}

#[test]
fn pairs_that_are_given_up_get_no_more() {
    let mut guest = Guest::new(0);
    guest.use_pairs(3);
    guest.send(2, &frame(7, true, 0));
    for number in [1, 2] {
        guest.network_sends(7, number);
    }
    guest.serve();
    guest.use_pairs(1);
    (0..PAIRS).for_each(|pair| guest.offer_buffer(pair));
    guest.network_sends(7, 3);
    guest.serve();
    assert_eq!([0, 1, 2].map(|pair| guest.received(pair)), [vec![3], vec![], vec![]]);
    // And a reset gives up all but the first.
    guest.use_pairs(3);
    guest.driver.begin(0);
    guest.buffers = [0; PAIRS];
    (0..PAIRS).for_each(|pair| guest.offer_buffer(pair));
    guest.network_sends(9, 4);
    guest.serve();
    assert_eq!(guest.received(0), [4]);
}

#[test]
fn how_many_pairs_are_used_is_saved() {
    for (pairs, used) in [(3, 3), (3, 1)] {
        let mut guest = Guest::new(0);
        guest.use_pairs(used);
        let saved = guest.driver.device.save();
        let (port, network) = net::link();
        let spec = NetSpec::new(port, MacAddress([2, 0, 10, 0, 0, 12]));
        network.set_takes(Offloads::ALL);
        let mut restored = Mmio::new(Net::new(&spec, pairs));
        restored.restore(&guest.driver.memory, &saved).unwrap();
        assert_eq!(restored.save(), saved);
        guest.driver.device = restored;
        guest.network = network;
        (0..PAIRS).for_each(|pair| guest.offer_buffer(pair));
        guest.send(2, &frame(7, true, 0));
        guest.network_sends(7, 1);
        guest.serve();
        assert_eq!(guest.received(usize::from(used) - 1), [1]);
        for other in [1, 2] {
            assert!(Mmio::new(Net::new(&spec, other)).restore(&guest.driver.memory, &saved).is_err());
        }
    }
}
