//! Requests of a block device that are under way: many at once, ending in any order, and never after somebody has
//! said that they are not to be any more.

mod ended_early;
mod engine;
mod unheard;

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{PollFd, PollFlags, poll};
use storage_block::{BlockBackend, Disk, Error, ErrorKind, IoLimits, Limiter, MemoryDisk, Result};
use virtio_bindings::virtio_mmio as reg;

use super::block::{Block, QUEUES_MAX};
use super::chain::Malformed;
use super::core::{Effect, Step};
use super::driver::{Driver, WRITE, to_the_end};
use super::mmio::Mmio;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

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
        1 << 27
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

    fn write_zeroes(&self, offset: u64, _: u64) -> Result<()> {
        self.wait(offset);
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

    /// The `n`th request, to write so many MiB of zeroes.
    fn offer_zeroes(&mut self, queue: usize, n: u16, sector: u64, mib: u32) {
        self.offer_range(queue, n, WRITE_ZEROES, sector, mib << 11);
    }

    /// The `n`th request, about so many sectors and without their content.
    fn offer_range(&mut self, queue: usize, n: u16, kind: u32, sector: u64, sectors: u32) {
        let at = request_at(queue, n);
        self.0.put(at, &[u64::from(kind).to_le_bytes(), [0; 8]].concat());
        self.0.put(at + 512, &[sector.to_le_bytes(), u64::from(sectors).to_le_bytes()].concat());
        self.0.put(at + 16, &[NONE]);
        self.0.offer(queue, n * 3, &[(at, 16, 0), (at + 512, 16, 0), (at + 16, 1, WRITE)]);
    }

    /// The `n`th request, with no data.
    fn offer_empty(&mut self, queue: usize, n: u16, kind: u32) {
        let at = request_at(queue, n);
        self.0.put(at, &[u64::from(kind).to_le_bytes(), [0; 8]].concat());
        self.0.put(at + 16, &[NONE]);
        self.0.offer(queue, n * 3, &[(at, 16, 0), (at + 16, 1, WRITE)]);
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
