//! The body for requests that a disk's limits hold up: what becomes of each is known, as its driver is a good one.

use std::collections::HashMap;
use std::num::NonZeroU32;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use storage_block::{Disk, IoLimits, Limiter, MemoryDisk, Rate};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::{DISK, Input};
use crate::memory::{self, Memory};
use crate::virtio::{Block, Mmio, Step};

const QUEUES: usize = 2;
/// How many requests a queue has at most, of so many descriptors each.
const SLOTS: u16 = 16;
const DESCRIPTORS: u16 = 4;

/// Where a queue is, and its parts; where its requests are.
const QUEUE_LEN: u64 = 0x3000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUESTS: u64 = 0x1_0000;
const REQUEST_LEN: u64 = 0x1000;
/// The parts of a request.
const STATUS: u64 = 0x10;
const DATA: u64 = 0x100;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const FLUSH_BIT: u32 = 1 << 9;
const EVENT_INDEX_BIT: u32 = 1 << 29;

const SECTOR: usize = 512;
const ID_LEN: u32 = 20;
/// A status that no device writes.
const NONE: u8 = 0xee;

/// What a request is to do, and where on the disk; of no bytes, if of none.
#[derive(Debug, Clone, Copy)]
struct Request {
    kind: Kind,
    start: usize,
    len: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    /// Writes this byte.
    Write(u8),
    Zero,
    Flush,
    Id,
}

impl Request {
    /// By its number in the protocol.
    fn kind(&self) -> u32 {
        match self.kind {
            Kind::Read => 0,
            Kind::Write(_) => 1,
            Kind::Flush => 4,
            Kind::Id => 8,
            Kind::Zero => 13,
        }
    }

    /// What is on the disk when it has been done, if it changes that.
    fn leaves(&self) -> Option<u8> {
        match self.kind {
            Kind::Write(byte) => Some(byte),
            Kind::Zero => Some(0),
            Kind::Read | Kind::Flush | Kind::Id => None,
        }
    }

    /// Whether what becomes of one depends on which is done first.
    fn is_in_the_way_of(&self, other: &Self) -> bool {
        let overlaps = self.start < other.start + other.len && other.start < self.start + self.len;
        overlaps && (self.leaves().is_some() || other.leaves().is_some())
    }
}

/// A driver, its disk, and what it knows of them.
struct Guest {
    memory: Memory,
    device: Mmio,
    disk: Disk,
    limiter: Limiter,
    /// Features that it does not accept.
    without: u32,
    /// What is on the disk, but for what is under way.
    content: Vec<u8>,
    queues: [Queue; QUEUES],
}

/// What was offered by its head, and how far the driver is with the rings.
#[derive(Default)]
struct Queue {
    offered: HashMap<u16, Request>,
    available: u16,
    used: u16,
}

/// A good driver of a disk whose limits let few requests pass, in a machine that is now and then paused, or saved and continued
/// as another, and whose queues are taken back. Each request is answered once, what was written is read, and of what was
/// taken back each is done or not.
pub fn block_requests(bytes: &[u8]) {
    let mut input = Input(bytes);
    let [per_second, burst, features] = input.take().unwrap_or_default();
    let (Ok(memory), Ok(disk)) = (memory::allocate(NonZeroU32::MIN), MemoryDisk::new(DISK)) else { return };
    // A pause waits for one flush, and so for no more than the inverse of that.
    let rate = Rate { per_second: 1000 + 100 * u64::from(per_second), burst: 1 + u64::from(burst % 8) };
    let (disk, limiter) = (disk.into_disk(), Limiter::new(IoLimits { ops: Some(rate), bytes: None }));
    let device = device(&disk, &limiter);
    let without = if features & 1 != 0 { FLUSH_BIT } else { 0 } | EVENT_INDEX_BIT;
    let content = vec![0; DISK as usize];
    let mut guest = Guest { memory, device, disk, limiter, without, content, queues: Default::default() };
    guest.begin();
    while let Some([action, what, sector, byte]) = input.take() {
        let queue = usize::from(action >> 7);
        match action % 16 {
            0..=9 => guest.offer(queue, what, sector, byte),
            10 | 11 => guest.step(queue),
            12 | 13 => guest.settle(queue),
            14 if what % 4 == 0 => guest.take_back(queue),
            14 => guest.step(queue),
            _ if what % 8 == 0 => guest.begin(),
            _ => guest.go_on_as_another(),
        }
    }
    guest.end();
}

fn device(disk: &Disk, limiter: &Limiter) -> Mmio {
    Mmio::new(Block::new(disk.limited(limiter), "vol-fuzz", QUEUES))
}

impl Guest {
    fn set(&mut self, register: u32, value: u32) {
        let _ = self.device.write(&self.memory, register.into(), &value.to_le_bytes());
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        assert!(self.memory.write_obj(value, GuestAddress(at)).is_ok());
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).expect("it is in the memory")
    }

    /// Resets the device and begins with it.
    fn begin(&mut self) {
        self.set(reg::VIRTIO_MMIO_STATUS, 0);
        (0..QUEUES).for_each(|queue| self.forget(queue));
        [1, 3].into_iter().for_each(|status| self.set(reg::VIRTIO_MMIO_STATUS, status));
        for half in 0..2 {
            self.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            let mut offered = [0; 4];
            self.device.read(reg::VIRTIO_MMIO_DEVICE_FEATURES.into(), &mut offered, 0);
            let without = if half == 0 { self.without } else { 0 };
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, u32::from_le_bytes(offered) & !without);
        }
        self.set(reg::VIRTIO_MMIO_STATUS, 11);
        (0..QUEUES).for_each(|queue| self.make_ready(queue));
        self.set(reg::VIRTIO_MMIO_STATUS, 15);
    }

    fn make_ready(&mut self, queue: usize) {
        let at = queue_at(queue);
        assert!(self.memory.write_slice(&[0; QUEUE_LEN as usize], GuestAddress(at)).is_ok());
        self.queues[queue] = Queue::default();
        self.set(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.set(reg::VIRTIO_MMIO_QUEUE_NUM, u32::from(SLOTS * DESCRIPTORS));
        self.set(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, at as u32);
        self.set(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, (at + AVAILABLE) as u32);
        self.set(reg::VIRTIO_MMIO_QUEUE_USED_LOW, (at + USED) as u32);
        self.set(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Takes a queue back, and uses it anew.
    fn take_back(&mut self, queue: usize) {
        self.set(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.set(reg::VIRTIO_MMIO_QUEUE_READY, 0);
        self.forget(queue);
        self.make_ready(queue);
    }

    /// What was not answered when the memory was taken back has been done as a whole, or not at all.
    fn forget(&mut self, queue: usize) {
        for (head, request) in std::mem::take(&mut self.queues[queue].offered) {
            assert_eq!(
                self.get::<u8>(request_at(queue, head) + STATUS),
                NONE,
                "it was answered, and not used"
            );
            let Some(byte) = request.leaves() else { continue };
            let range = request.start..request.start + request.len;
            let mut now = vec![0; request.len];
            assert!(self.disk.read_at(&mut now, request.start as u64).is_ok());
            let is_done = now.iter().all(|now| *now == byte);
            assert!(is_done || now == self.content[range.clone()], "{request:?} is done in part");
            self.content[range].copy_from_slice(&now);
        }
    }

    /// Offers a request, if there is room for it and none that is under way is in its way.
    fn offer(&mut self, queue: usize, what: u8, sector: u8, byte: u8) {
        let kind = match what % 8 {
            0 | 1 => Kind::Read,
            2 | 3 => Kind::Write(byte),
            4 | 5 => Kind::Zero,
            6 => Kind::Flush,
            _ => Kind::Id,
        };
        let start = usize::from(sector) % (DISK as usize / SECTOR) * SECTOR;
        let sectors = if matches!(kind, Kind::Flush | Kind::Id) { 0 } else { usize::from(what >> 3) % 4 };
        let request = Request { kind, start, len: (sectors * SECTOR).min(DISK as usize - start) };
        let mut under_way = self.queues.iter().flat_map(|queue| queue.offered.values());
        let offered = &self.queues[queue].offered;
        let free = (0..SLOTS).map(|slot| slot * DESCRIPTORS).find(|head| !offered.contains_key(head));
        let Some(head) = free.filter(|_| !under_way.any(|other| other.is_in_the_way_of(&request))) else {
            return;
        };
        let at = request_at(queue, head);
        self.put(request.kind(), at);
        self.put((start / SECTOR) as u64, at + 8);
        self.put(NONE, at + STATUS);
        let data = match kind {
            Kind::Read => Some((request.len as u32, WRITE)),
            Kind::Write(byte) => {
                let data = vec![byte; request.len];
                assert!(self.memory.write_slice(&data, GuestAddress(at + DATA)).is_ok());
                Some((request.len as u32, 0))
            }
            Kind::Zero => {
                self.put((start / SECTOR) as u64, at + DATA);
                self.put(request.len as u64 / SECTOR as u64, at + DATA + 8);
                Some((16, 0))
            }
            Kind::Id => Some((ID_LEN, WRITE)),
            Kind::Flush => None,
        };
        let data = data.filter(|(len, _)| *len > 0).map(|(len, flags)| (at + DATA, len, flags));
        let chain = [Some((at, 16, 0)), data, Some((at + STATUS, 1, WRITE))];
        let chain: Vec<(u64, u32, u16)> = chain.into_iter().flatten().collect();
        for (n, (address, len, flags)) in (head..).zip(&chain) {
            let next = if usize::from(n - head) + 1 < chain.len() { NEXT } else { 0 };
            let descriptor = queue_at(queue) + 16 * u64::from(n);
            self.put(*address, descriptor);
            let rest = u64::from(*len) | u64::from(flags | next) << 32 | u64::from(n + 1) << 48;
            self.put(rest, descriptor + 8);
        }
        let of = &mut self.queues[queue];
        let slot = queue_at(queue) + AVAILABLE + 4 + 2 * u64::from(of.available % (SLOTS * DESCRIPTORS));
        of.available = of.available.wrapping_add(1);
        of.offered.insert(head, request);
        let available = of.available;
        self.put(head, slot);
        self.put(available, queue_at(queue) + AVAILABLE + 2);
    }

    fn step(&mut self, queue: usize) {
        let step = self.device.step(&self.memory, queue);
        self.look(queue, step);
    }

    fn settle(&mut self, queue: usize) {
        let step = self.device.settle(&self.memory, queue);
        self.look(queue, step);
    }

    /// Looks at what has been answered.
    fn look(&mut self, queue: usize, step: Step) {
        assert!(!matches!(step, Step::Broken(_)), "a good driver has done {step:?}");
        let at = queue_at(queue) + USED;
        while self.get::<u16>(at + 2) != self.queues[queue].used {
            let element = at + 4 + 8 * u64::from(self.queues[queue].used % (SLOTS * DESCRIPTORS));
            self.queues[queue].used = self.queues[queue].used.wrapping_add(1);
            let (head, written) = (self.get::<u32>(element), self.get::<u32>(element + 4));
            let request = self.queues[queue].offered.remove(&(head as u16));
            let Some(request) = request else {
                panic!("head {head} was used and not offered, or used twice")
            };
            self.check(&request, request_at(queue, head as u16), written);
        }
    }

    fn check(&mut self, request: &Request, at: u64, written: u32) {
        assert_eq!(self.get::<u8>(at + STATUS), 0, "{request:?} has failed");
        let data = match request.kind {
            Kind::Read => request.len as u32,
            Kind::Id => ID_LEN,
            Kind::Write(_) | Kind::Zero | Kind::Flush => 0,
        };
        assert_eq!(written, data + 1, "{request:?}");
        let range = request.start..request.start + request.len;
        if let Some(byte) = request.leaves() {
            self.content[range].fill(byte);
        } else if request.kind == Kind::Read {
            let mut read = vec![0; request.len];
            assert!(self.memory.read_slice(&mut read, GuestAddress(at + DATA)).is_ok());
            assert!(read == self.content[range], "{request:?} has read something else than was written");
        }
    }

    /// All stands still, and another device goes on with what is left.
    fn go_on_as_another(&mut self) {
        (0..QUEUES).for_each(|queue| self.settle(queue));
        assert!(self.device.ended().is_none(), "something is under way in a machine that stands still");
        let saved = self.device.save();
        let mut other = device(&self.disk, &self.limiter);
        assert!(other.restore(&self.memory, &saved).is_ok(), "what was saved is not restored");
        self.device = other;
    }

    /// Nothing is held up any more: what was offered is answered.
    fn end(mut self) {
        self.limiter.set(IoLimits::NONE);
        while self.queues.iter().any(|queue| !queue.offered.is_empty()) {
            (0..QUEUES).for_each(|queue| self.step(queue));
            if let Some(ended) = self.device.ended() {
                let soon = Timespec { tv_sec: 10, tv_nsec: 0 };
                let ended = poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&soon));
                assert_ne!(ended, Ok(0), "a request does not end");
                continue;
            }
            let before: usize = self.queues.iter().map(|queue| queue.offered.len()).sum();
            (0..QUEUES).for_each(|queue| self.step(queue));
            let after: usize = self.queues.iter().map(|queue| queue.offered.len()).sum();
            assert!(after < before || after == 0 || self.device.ended().is_some(), "a request is lost");
        }
        let mut content = vec![0; DISK as usize];
        assert!(self.disk.read_at(&mut content, 0).is_ok());
        assert!(content == self.content, "the disk has something else than was written");
    }
}

fn queue_at(queue: usize) -> u64 {
    0x1000 + QUEUE_LEN * queue as u64
}

fn request_at(queue: usize, head: u16) -> u64 {
    REQUESTS + REQUEST_LEN * (u64::from(SLOTS) * queue as u64 + u64::from(head / DESCRIPTORS))
}
