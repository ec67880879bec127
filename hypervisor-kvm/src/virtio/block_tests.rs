//! Requests of a block device that are under way: many at once, ending in any order, and never after somebody has
//! said that they are not to be any more.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use storage_block::{BlockBackend, Disk, Error, ErrorKind, IoLimits, Limiter, MemoryDisk, Rate, Result};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::block::{Block, QUEUES_MAX};
use super::chain::Malformed;
use super::core::{Effect, Step};
use super::driver::{Driver, WRITE, to_the_end};
use super::mmio::Mmio;

const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;
const FLUSH: u32 = 4;

const OK: u8 = 0;
const IOERR: u8 = 1;
/// A status that no device writes.
const NONE: u8 = 0xee;

/// Features.
const CAN_FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;

const SECTOR: usize = 512;
/// What lies on the disk of these tests.
const ON_DISK: u8 = 7;

/// A disk that tells what it does, and does what begins at the sectors up to the gated one when it is told to.
#[derive(Debug)]
struct Backend {
    tell: Mutex<Sender<Did>>,
    go_on: Mutex<Receiver<()>>,
    gated: u64,
    flushes_fail: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Did {
    Begin(u64),
    Read(u64),
    Write(u64),
    Flush,
}

impl Backend {
    fn did(&self, what: Did) {
        // Nobody may listen any more.
        let _ = self.tell.lock().unwrap().send(what);
    }

    fn wait(&self, offset: u64) {
        let sector = offset / SECTOR as u64;
        if sector < self.gated {
            self.did(Did::Begin(sector));
            // Who is gone lets everybody go on.
            let _ = self.go_on.lock().unwrap().recv();
        }
    }
}

impl BlockBackend for Backend {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.wait(offset);
        buf.fill(ON_DISK);
        self.did(Did::Read(offset / SECTOR as u64));
        Ok(())
    }

    fn write_at(&self, _: &[u8], offset: u64) -> Result<()> {
        self.wait(offset);
        self.did(Did::Write(offset / SECTOR as u64));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.did(Did::Flush);
        if self.flushes_fail { Err(Error::new(ErrorKind::Io, "as it should")) } else { Ok(()) }
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

/// A disk of which the first so many sectors are gated, what it tells, and what lets one request go on.
fn gated(gated: u64) -> (Disk, Receiver<Did>, Sender<()>) {
    let (tell, did) = channel();
    let (let_go, go_on) = channel();
    let backend = Backend { tell: Mutex::new(tell), go_on: Mutex::new(go_on), gated, flushes_fail: false };
    (Disk::new(backend).unwrap(), did, let_go)
}

fn limited(limits: IoLimits) -> (Disk, Limiter) {
    let limiter = Limiter::new(limits);
    let disk = MemoryDisk::from_vec(vec![ON_DISK; 1 << 20]).unwrap().into_disk();
    (disk.limited(&limiter), limiter)
}

const ONE_A_MINUTE: IoLimits = IoLimits { ops: Some(Rate { per_second: 1, burst: 1 }), bytes: None };

/// A driver of a block device, whose requests are numbered.
struct Guest(Driver);

impl Guest {
    fn new(disk: &Disk, queues: usize, without: u64) -> Self {
        Self(Driver::new(Block::new(disk.clone(), "vol-1", queues), queues, without))
    }

    /// The `n`th request, of one sector or, to flush, of none. There are 20 in a queue at most.
    fn offer(&mut self, queue: usize, n: u16, kind: u32, sector: u64) {
        let at = request_at(queue, n);
        self.0.put(at, &[u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat());
        self.0.put(at + 16, &[NONE]);
        let header = (at, 16, 0);
        let status = (at + 16, 1, WRITE);
        let data = (at + 512, SECTOR as u32, if kind == IN { WRITE } else { 0 });
        let chain = if kind == FLUSH { vec![header, status] } else { vec![header, data, status] };
        self.0.offer(queue, n * 3, &chain);
    }

    /// The heads' numbers of what was used, in this order.
    fn used(&self, queue: usize) -> Vec<u16> {
        (0..self.0.used(queue)).map(|n| self.0.used_chain(queue, n).0 / 3).collect()
    }

    fn status(&self, queue: usize, n: u16) -> u8 {
        self.0.bytes(request_at(queue, n) + 16, 1)[0]
    }

    fn data(&self, queue: usize, n: u16) -> Vec<u8> {
        self.0.bytes(request_at(queue, n) + 512, SECTOR)
    }

    /// Serves a queue until so many of its requests have ended.
    fn serve(&mut self, queue: usize, until: u16) {
        while self.0.used(queue) < until {
            if self.0.step(queue) == Step::Idle && self.0.used(queue) < until {
                let ended = self.0.device.ended().unwrap();
                poll(&mut [PollFd::new(&ended, PollFlags::IN)], None).unwrap();
            }
        }
    }

    fn serve_all(&mut self, queue: usize) -> Step {
        let Driver { memory, device, .. } = &mut self.0;
        to_the_end(device, |device| device.step(memory, queue), Mmio::ended)
    }

    fn settle(&mut self, queue: usize) -> Step {
        self.0.device.settle(&self.0.memory, queue)
    }

    fn stop_queue(&mut self, queue: usize) -> Effect {
        self.0.set(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.0.set(reg::VIRTIO_MMIO_QUEUE_READY, 0)
    }

    fn is_at_rest(&mut self) -> bool {
        self.0.device.ended().is_none()
    }
}

/// Behind what the driver has for as many queues as there can be.
fn request_at(queue: usize, n: u16) -> u64 {
    (1 << 20) + 0x8000 * queue as u64 + 1024 * u64::from(n)
}

/// What has been told until now.
fn told(did: &Receiver<Did>) -> Vec<Did> {
    did.try_iter().collect()
}

#[test]
fn a_request_does_not_wait_for_one_before_it() {
    let (disk, did, go_on) = gated(1);
    let mut guest = Guest::new(&disk, 1, 0);
    guest.offer(0, 0, IN, 0);
    guest.offer(0, 1, IN, 1);
    guest.serve(0, 1);
    assert_eq!((guest.used(0), guest.status(0, 0), guest.status(0, 1)), (vec![1], NONE, OK));
    // More come while the first is under way.
    guest.offer(0, 2, IN, 2);
    guest.serve(0, 2);
    assert!(!guest.is_at_rest());
    go_on.send(()).unwrap();
    guest.serve(0, 3);
    assert_eq!(guest.used(0), [1, 2, 0]);
    for n in 0..3 {
        assert_eq!((guest.status(0, n), guest.data(0, n)), (OK, vec![ON_DISK; SECTOR]), "{n}");
        assert_eq!(guest.0.used_chain(0, n).1, SECTOR + 1);
    }
    assert!(guest.is_at_rest());
    assert_eq!(told(&did).len(), 4);
}

#[test]
fn what_a_driver_without_flushes_writes_is_durable_when_it_is_answered() {
    for (can_flush, expect) in [(true, vec![Did::Write(5)]), (false, vec![Did::Write(5), Did::Flush])] {
        let (disk, did, _go_on) = gated(0);
        let mut guest = Guest::new(&disk, 1, if can_flush { 0 } else { CAN_FLUSH });
        guest.offer(0, 0, OUT, 5);
        guest.serve(0, 1);
        assert_eq!((guest.status(0, 0), told(&did)), (OK, expect));
    }
}

#[test]
fn a_write_that_cannot_be_made_durable_has_failed() {
    let (tell, _did) = channel();
    let (tell, go_on) = (Mutex::new(tell), Mutex::new(channel().1));
    let disk = Disk::new(Backend { tell, go_on, gated: 0, flushes_fail: true }).unwrap();
    let mut guest = Guest::new(&disk, 1, CAN_FLUSH);
    guest.offer(0, 0, OUT, 5);
    guest.serve(0, 1);
    assert_eq!(guest.status(0, 0), IOERR);
    let mut guest = Guest::new(&disk, 1, 0);
    guest.offer(0, 0, OUT, 5);
    guest.offer(0, 1, FLUSH, 0);
    guest.serve(0, 2);
    assert_eq!((guest.status(0, 0), guest.status(0, 1)), (OK, IOERR));
}

/// What takes the memory back from a device.
type TakeBack = (&'static str, fn(&mut Guest));

const TAKE_BACK: [TakeBack; 4] = [
    ("a reset", |guest| assert_eq!(guest.0.set(reg::VIRTIO_MMIO_STATUS, 0), Effect::Reset)),
    ("a driver that has given up", |guest| _ = guest.0.set(reg::VIRTIO_MMIO_STATUS, 128 | 15)),
    ("a queue that is taken back", |guest| assert_eq!(guest.stop_queue(0), Effect::Notify)),
    ("a driver that breaks the rules", |guest| {
        guest.0.set(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
        assert!(matches!(guest.0.set(reg::VIRTIO_MMIO_QUEUE_NUM, 8), Effect::Broken(_)));
    }),
];

#[test]
fn nothing_is_written_to_a_driver_that_has_taken_its_memory_back() {
    for (what, take_back) in TAKE_BACK {
        let (disk, did, go_on) = gated(2);
        let mut guest = Guest::new(&disk, 1, 0);
        guest.offer(0, 0, IN, 0);
        guest.offer(0, 1, IN, 1);
        assert_ne!(guest.0.step(0), Step::Idle);
        // Both are under way, and go on from here.
        let mut begun = [did.recv().unwrap(), did.recv().unwrap()];
        begun.sort_by_key(|did| *did == Did::Begin(1));
        assert_eq!(begun, [Did::Begin(0), Did::Begin(1)], "{what}");
        drop(go_on);
        take_back(&mut guest);
        let mut ended = told(&did);
        ended.sort_by_key(|did| *did == Did::Read(1));
        assert_eq!(ended, [Did::Read(0), Did::Read(1)], "{what} waits for both");
        assert!(guest.is_at_rest(), "{what}");
        assert_eq!(guest.0.step(0), Step::Idle, "{what}");
        assert_eq!((guest.used(0), guest.status(0, 0), guest.status(0, 1)), (vec![], NONE, NONE), "{what}");
        // It can begin anew.
        guest.0.begin(0);
        guest.offer(0, 0, IN, 9);
        guest.serve(0, 1);
        assert_eq!((guest.used(0), guest.status(0, 0)), (vec![0], OK), "{what}");
    }
}

#[test]
fn what_has_not_begun_never_does_when_the_memory_is_taken_back() {
    for (what, take_back) in TAKE_BACK {
        let (disk, _limiter) = limited(ONE_A_MINUTE);
        let mut guest = Guest::new(&disk, 1, 0);
        (0..20).for_each(|n| guest.offer(0, n, IN, 0));
        guest.0.step(0);
        let begun = Instant::now();
        take_back(&mut guest);
        assert!(begun.elapsed().as_secs() < 10, "{what} waits for the disk's limits");
        assert!(guest.is_at_rest(), "{what}");
    }
}

#[test]
fn other_queues_go_on_when_one_is_taken_back() {
    let (disk, did, go_on) = gated(2);
    let mut guest = Guest::new(&disk, 2, 0);
    guest.offer(0, 0, IN, 0);
    guest.offer(1, 0, IN, 1);
    assert_ne!((guest.0.step(0), guest.0.step(1)), (Step::Idle, Step::Idle));
    let _begun = [did.recv().unwrap(), did.recv().unwrap()];
    drop(go_on);
    assert_eq!(guest.stop_queue(1), Effect::Notify, "its thread has to look");
    assert_eq!((guest.used(0), guest.used(1)), (vec![], vec![]));
    assert_eq!(guest.serve_all(0), Step::Served { interrupt: true });
    assert_eq!((guest.used(0), guest.status(0, 0)), (vec![0], OK));
    assert_eq!((guest.0.step(1), guest.used(1), guest.status(1, 0)), (Step::Idle, vec![], NONE));
}

#[test]
fn a_machine_that_is_to_stand_still_finishes_what_it_has_begun() {
    let (disk, did, go_on) = gated(2);
    let mut guest = Guest::new(&disk, 2, 0);
    guest.offer(0, 0, IN, 0);
    guest.offer(1, 0, IN, 1);
    guest.0.step(0);
    guest.0.step(1);
    let _begun = [did.recv().unwrap(), did.recv().unwrap()];
    // This one comes too late.
    guest.offer(0, 1, IN, 2);
    drop(go_on);
    for queue in 0..2 {
        assert_eq!(guest.settle(queue), Step::Served { interrupt: true });
        assert_eq!((guest.used(queue), guest.status(queue, 0)), (vec![0], OK));
        assert_eq!(guest.settle(queue), Step::Idle);
    }
    assert!(guest.is_at_rest());
    guest.serve(0, 2);
    assert_eq!(guest.status(0, 1), OK);
}

/// A machine that is saved does not wait for the limits of its disks, and nothing is lost or done twice.
#[test]
fn what_the_limits_have_not_let_begin_goes_back_to_the_queue() {
    const REQUESTS: u16 = 20;
    let (disk, limiter) = limited(IoLimits { ops: Some(Rate { per_second: 1, burst: 5 }), bytes: None });
    let mut guest = Guest::new(&disk, 2, 0);
    // One of them needs no disk, and must not be answered before those that were taken before it.
    const AT_ONCE: u16 = 12;
    (0..REQUESTS).for_each(|n| guest.offer(0, n, if n == AT_ONCE { GET_ID } else { IN }, 0));
    guest.offer(1, 0, IN, 0);
    (0..4).for_each(|_| _ = guest.0.step(0));
    guest.0.step(1);
    guest.settle(0);
    let done = guest.used(0);
    assert!((1..=10).contains(&done.len()), "{done:?}");
    assert_eq!(guest.settle(1), Step::Idle);
    assert!(guest.is_at_rest());
    // Saved, and restored as another.
    let saved = guest.0.device.save();
    limiter.set(IoLimits::NONE);
    let other = MemoryDisk::from_vec(vec![ON_DISK; 1 << 20]).unwrap().into_disk();
    let mut restored = Mmio::new(Block::new(other, "vol-1", 2));
    restored.restore(&guest.0.memory, &saved).unwrap();
    guest.0.device = restored;
    guest.serve_all(0);
    guest.serve_all(1);
    let mut used = guest.used(0);
    assert!(used.starts_with(&done));
    used.sort_unstable();
    assert_eq!((used, guest.used(1)), ((0..REQUESTS).collect(), vec![0]));
    assert!((0..REQUESTS).all(|n| guest.status(0, n) == OK));
    assert!((0..REQUESTS).filter(|n| *n != AT_ONCE).all(|n| guest.data(0, n) == [ON_DISK; SECTOR]));
}

#[test]
fn a_write_that_is_not_durable_yet_becomes_so_before_all_stands_still() {
    // The write passes at once, and its flush a tenth of a second later.
    let (disk, did, _go_on) = gated(0);
    let limiter = Limiter::new(IoLimits { ops: Some(Rate { per_second: 10, burst: 1 }), bytes: None });
    let mut guest = Guest::new(&disk.limited(&limiter), 1, CAN_FLUSH);
    guest.offer(0, 0, OUT, 0);
    guest.0.step(0);
    assert_eq!(guest.settle(0), Step::Served { interrupt: true });
    assert_eq!((guest.used(0), guest.status(0, 0)), (vec![0], OK));
    assert_eq!(told(&did), [Did::Write(0), Did::Flush]);
}

/// So that it is not the limits, of which the flushes would be ten more operations, that a pause waits for.
#[test]
fn many_writes_become_durable_by_one_flush_before_all_stands_still() {
    const WRITES: u16 = 10;
    let (disk, did, _go_on) = gated(0);
    let once = Rate { per_second: 10, burst: WRITES.into() };
    let limiter = Limiter::new(IoLimits { ops: Some(once), bytes: None });
    let mut guest = Guest::new(&disk.limited(&limiter), 1, CAN_FLUSH);
    (0..WRITES).for_each(|n| guest.offer(0, n, OUT, n.into()));
    guest.0.step(0);
    assert_eq!(guest.settle(0), Step::Served { interrupt: true });
    assert!(guest.is_at_rest());
    assert!((0..WRITES).all(|n| guest.status(0, n) == OK));
    let did = told(&did);
    assert_eq!(did.iter().filter(|did| **did == Did::Flush).count(), 1);
    assert_eq!(did.last(), Some(&Did::Flush));
}

#[test]
fn requests_of_a_disk_that_was_taken_by_force_fail() {
    let (disk, _limiter) = limited(ONE_A_MINUTE);
    let mut guest = Guest::new(&disk, 1, CAN_FLUSH);
    (0..8).for_each(|n| guest.offer(0, n, OUT, 0));
    guest.0.step(0);
    let begun = Instant::now();
    guest.0.device.end();
    guest.serve(0, 8);
    assert!(begun.elapsed().as_secs() < 10, "it waits for the disk's limits");
    assert!(guest.is_at_rest());
    assert!((0..8).all(|n| guest.status(0, n) == IOERR));
}

#[test]
fn each_queue_has_answers_of_its_own() {
    let (disk, _did, _go_on) = gated(0);
    let mut guest = Guest::new(&disk, 4, 0);
    let mut queues = [0; 2];
    guest.0.device.read(u64::from(reg::VIRTIO_MMIO_CONFIG) + 34, &mut queues, 0);
    assert_eq!(u16::from_le_bytes(queues), 4);
    for queue in 0..4 {
        (0..=queue as u16).for_each(|n| guest.offer(queue, n, IN, 0));
    }
    for queue in (0..4).rev() {
        guest.serve_all(queue);
    }
    for queue in 0..4 {
        let mut used = guest.used(queue);
        used.sort_unstable();
        assert_eq!(used, (0..=queue as u16).collect::<Vec<_>>());
        assert!(used.iter().all(|n| guest.status(queue, *n) == OK));
    }
}

#[test]
fn a_queue_that_was_not_negotiated_is_not_served() {
    let (disk, _did, _go_on) = gated(0);
    let mut guest = Guest::new(&disk, 2, MQ);
    guest.offer(0, 0, IN, 0);
    guest.serve(0, 1);
    guest.offer(1, 0, IN, 0);
    assert_eq!(guest.0.step(1), Step::Broken(Malformed("a queue is in use that was not negotiated")));
    assert!(guest.0.needs_reset() && guest.is_at_rest());
    // A device that has one does not offer more.
    for (queues, expect) in [(0, 1), (1, 1), (2, 2), (QUEUES_MAX + 1, QUEUES_MAX)] {
        let mut device = Mmio::new(Block::new(disk.clone(), "vol-1", queues));
        assert_eq!(device.queues(), expect);
        device.write(&guest.0.memory, reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL.into(), &[0; 4]);
        let mut offered = [0; 4];
        device.read(reg::VIRTIO_MMIO_DEVICE_FEATURES.into(), &mut offered, 0);
        assert_eq!(u32::from_le_bytes(offered) as u64 & MQ != 0, expect > 1);
    }
}

/// More than are under way at once.
#[test]
fn as_many_requests_as_the_queues_hold() {
    let (disk, did, go_on) = gated(1);
    let mut guest = Guest::new(&disk, QUEUES_MAX, 0);
    for queue in 0..QUEUES_MAX {
        (0..20).for_each(|n| guest.offer(queue, n, IN, 0));
    }
    for _ in 0..4 {
        (0..QUEUES_MAX).for_each(|queue| _ = guest.0.step(queue));
    }
    assert!((0..QUEUES_MAX).all(|queue| guest.0.used(queue) == 0));
    drop(go_on);
    while (0..QUEUES_MAX).any(|queue| guest.0.used(queue) < 20) {
        (0..QUEUES_MAX).for_each(|queue| _ = guest.serve_all(queue));
    }
    assert!(guest.is_at_rest());
    assert_eq!(told(&did).iter().filter(|did| **did == Did::Read(0)).count(), 20 * QUEUES_MAX);
}

/// The guest's memory stays for as long as a request uses it, whoever has let go of it.
#[test]
fn the_memory_outlives_the_requests() {
    let (disk, did, go_on) = gated(1);
    let mut guest = Guest::new(&disk, 1, 0);
    guest.offer(0, 0, IN, 0);
    guest.0.step(0);
    assert_eq!(did.recv().unwrap(), Did::Begin(0));
    let Guest(Driver { memory, device, .. }) = guest;
    let data = memory.get_host_address(GuestAddress(request_at(0, 0) + 512)).unwrap() as usize;
    drop(memory);
    let dropped = std::thread::spawn(move || drop(device));
    assert!(is_mapped(data), "the disk is going to write there");
    go_on.send(()).unwrap();
    dropped.join().unwrap();
    assert_eq!(did.recv().unwrap(), Did::Read(0));
}

fn is_mapped(address: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
        (start..end).contains(&address)
    })
}
