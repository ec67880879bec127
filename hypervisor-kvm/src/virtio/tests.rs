//! Drivers, good and bad, against the device's logic: no machine is needed for it.

mod configuration;
mod features;
mod rules;

use storage_block::{Disk, MemoryDisk, RawFile};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::block::Block;
use super::chain::Malformed;
use super::core::{Effect, Step};
use super::device::Device;
use super::driver::to_the_end;
use super::mmio::Mmio;
use super::ring::QUEUE_SIZE;
use super::rng::Rng;
use crate::memory::{self, Memory};

const MIB: u64 = 1 << 20;
/// Where the driver keeps its queue and its buffers.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const HEADER: u64 = 0x5000;
const STATUS: u64 = 0x5100;
const DATA: u64 = 0x6000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u16 = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Status bits.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

const VERSION_1: u64 = 1 << 32;
const RO: u64 = 1 << 5;

struct Driver {
    memory: Memory,
    device: Mmio,
    disk: Disk,
    sent: u16,
}

/// A disk that has everything that a driver can be offered.
fn raw_disk() -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB).unwrap();
    RawFile::from_file(file, false).unwrap().into_disk()
}

type Descriptor = (u64, u32, u16, u16);

impl Driver {
    fn new(disk: Disk) -> Self {
        Self::of(Block::new(disk.clone(), "vol-0123", 1), disk)
    }

    fn of(device: impl Device + 'static, disk: Disk) -> Self {
        let memory = memory::allocate(std::num::NonZeroU32::MIN).unwrap();
        Self { memory, device: Mmio::new(device), disk, sent: 0 }
    }

    /// A driver that has done all the steps of initialisation (virtio 1.2, 3.1.1), accepting `features`.
    fn ready_with(disk: Disk, features: u64) -> Self {
        let mut driver = Self::new(disk);
        driver.negotiate(features);
        driver.set_queue(QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, USED]);
        assert_eq!(driver.set(reg::VIRTIO_MMIO_STATUS, 15), Effect::Notify);
        driver
    }

    fn ready() -> Self {
        let disk = raw_disk();
        let offered = Self::new(disk.clone()).offered();
        // Without event indices, so that every request asks for an interrupt.
        Self::ready_with(disk, offered & !(1 << 29))
    }

    fn negotiate(&mut self, features: u64) {
        self.set(reg::VIRTIO_MMIO_STATUS, 0);
        self.set(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.set(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.set(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_queue(&mut self, size: u16, addresses: [u64; 3]) -> Effect {
        self.set(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
        self.set(reg::VIRTIO_MMIO_QUEUE_NUM, size.into());
        for (low, address) in [
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            reg::VIRTIO_MMIO_QUEUE_USED_LOW,
        ]
        .into_iter()
        .zip(addresses)
        {
            self.set(low, address as u32);
            self.set(low + 4, (address >> 32) as u32);
        }
        self.set(reg::VIRTIO_MMIO_QUEUE_READY, 1)
    }

    fn offered(&mut self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            all | u64::from(self.get(reg::VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * half)
        })
    }

    fn set(&mut self, register: u32, value: u32) -> Effect {
        self.device.write(&self.memory, register.into(), &value.to_le_bytes())
    }

    fn get(&self, register: u32) -> u32 {
        let mut word = [0xee; 4];
        self.device.read(register.into(), &mut word, 0);
        u32::from_le_bytes(word)
    }

    fn status(&self) -> u32 {
        self.get(reg::VIRTIO_MMIO_STATUS)
    }

    fn put_descriptor(&self, table: u64, n: u16, (address, len, flags, next): Descriptor) {
        let at = table + 16 * u64::from(n);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.sent % QUEUE_SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.sent = self.sent.wrapping_add(1);
        self.memory.write_obj(self.sent, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    /// A chain of these descriptors, without links.
    fn send(&mut self, chain: &[(u64, u32, u16)]) -> Step {
        for (n, (address, len, flags)) in (0..).zip(chain.iter().copied()) {
            let next = if usize::from(n) + 1 < chain.len() { NEXT } else { 0 };
            self.put_descriptor(DESCRIPTORS, n, (address, len, flags | next, n + 1));
        }
        self.offer(0);
        self.step()
    }

    fn step(&mut self) -> Step {
        let Self { memory, device, .. } = self;
        to_the_end(device, |device| device.step(memory, 0), Mmio::ended)
    }

    fn put_header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
    }

    /// A request as a good driver makes it. Returns its status and how much was written.
    fn request(&mut self, kind: u32, sector: u64, len: u32, flags: u16) -> (u8, u32) {
        self.put_header(kind, sector);
        let header = (HEADER, 16, 0);
        let status = (STATUS, 1, WRITE);
        let step = match len {
            0 => self.send(&[header, status]),
            _ => self.send(&[header, (DATA, len, flags), status]),
        };
        assert_eq!(step, Step::Served { interrupt: true });
        let status = self.memory.read_obj(GuestAddress(STATUS)).unwrap();
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, self.sent);
        let entry = USED + 4 + 8 * u64::from((used - 1) % QUEUE_SIZE);
        (status, self.memory.read_obj(GuestAddress(entry + 4)).unwrap())
    }

    fn put_data(&self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        bytes
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }
}

#[test]
fn serves_a_good_driver() {
    let mut driver = Driver::ready();
    driver.put_data(&[7; 1024]);
    assert_eq!(driver.request(OUT, 3, 1024, 0), (OK, 1));
    driver.put_data(&[0; 1024]);
    assert_eq!(driver.request(IN, 3, 1024, WRITE), (OK, 1025));
    assert_eq!(driver.data(1024), [7; 1024]);
    assert_eq!(driver.request(FLUSH, 0, 0, 0), (OK, 1));
    for len in [1, 19, 20, 512] {
        driver.put_data(&[0xee; 512]);
        assert_eq!(driver.request(GET_ID, 0, len, WRITE), (OK, len.min(20) + 1));
        assert_eq!(driver.data(512)[20..], [0xee; 492]);
    }
    assert_eq!(driver.request(GET_ID, 0, 20, WRITE), (OK, 21));
    assert_eq!(driver.data(20), *b"vol-0123\0\0\0\0\0\0\0\0\0\0\0\0");
    driver.put_data(&Driver::range(3, 1, 0));
    assert_eq!(driver.request(WRITE_ZEROES, 0, 16, 0), (OK, 1));
    let mut bytes = [1; 1024];
    driver.disk.read_at(&mut bytes, 3 * 512).unwrap();
    assert_eq!((&bytes[..512], &bytes[512..]), (&[0; 512][..], &[7; 512][..]));
    driver.put_data(&Driver::range(4, 1, 0));
    assert_eq!(driver.request(DISCARD, 0, 16, 0), (OK, 1));
    assert_eq!(driver.step(), Step::Idle);
    // Round the ring more than once.
    for n in 0..600u32 {
        driver.put_data(&n.to_le_bytes().repeat(128));
        assert_eq!(driver.request(OUT, u64::from(n), 512, 0), (OK, 1), "{n}");
        driver.put_data(&[0; 512]);
        assert_eq!(driver.request(IN, u64::from(n), 512, WRITE), (OK, 513), "{n}");
        assert_eq!(driver.data(512), n.to_le_bytes().repeat(128));
    }
}

#[test]
fn a_request_that_cannot_be_done_is_an_error_and_no_more() {
    const SECTORS: u64 = MIB / 512;
    let zeroes = Driver::range;
    let two = [zeroes(0, 1, 0), zeroes(8, 1, 0)].concat();
    let table: [(u32, u64, u32, u16, Vec<u8>, u8); 19] = [
        (IN, SECTORS, 512, WRITE, vec![], IOERR),
        (IN, SECTORS - 1, 1024, WRITE, vec![], IOERR),
        (IN, u64::MAX, 512, WRITE, vec![], IOERR),
        (IN, u64::MAX / 512, 512, WRITE, vec![], IOERR),
        (IN, 0, 511, WRITE, vec![], IOERR),
        (OUT, SECTORS, 512, 0, vec![], IOERR),
        (OUT, 0, 513, 0, vec![], IOERR),
        (99, 0, 512, 0, vec![], UNSUPP),
        (WRITE_ZEROES, 0, 15, 0, zeroes(0, 1, 0), IOERR),
        (WRITE_ZEROES, 0, 16, 0, zeroes(SECTORS, 1, 0), IOERR),
        (WRITE_ZEROES, 0, 16, 0, zeroes(u64::MAX, 1, 0), IOERR),
        (WRITE_ZEROES, 0, 16, 0, zeroes(0, u32::MAX, 0), IOERR),
        (WRITE_ZEROES, 0, 16, 0, zeroes(0, 1, 2), UNSUPP),
        (DISCARD, 0, 16, 0, zeroes(0, 1, 1), UNSUPP),
        // More ranges than may be, or no whole one.
        (WRITE_ZEROES, 0, 32, 0, two.clone(), IOERR),
        (DISCARD, 0, 32, 0, two, IOERR),
        (DISCARD, 0, 0, 0, vec![], IOERR),
        (DISCARD, 0, 16, 0, zeroes(0, (64 << 11) + 1, 0), IOERR),
        // Buffers of the other kind than the request needs: of no bytes, that lie on no sector.
        (IN, SECTORS + 1, 512, 0, vec![], IOERR),
    ];
    let mut driver = Driver::ready();
    let whole = |disk: &Disk| {
        let mut bytes = vec![0; MIB as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    driver.disk.write_at(&[5; MIB as usize], 0).unwrap();
    for (kind, sector, len, flags, data, expect) in table {
        driver.put_data(&data);
        let (status, written) = driver.request(kind, sector, len, flags);
        assert_eq!((status, written), (expect, 1), "{kind} {sector} {len}");
    }
    assert_eq!(whole(&driver.disk), [5; MIB as usize], "nothing was written");
    assert_eq!(driver.request(IN, 0, 512, WRITE), (OK, 513));
}

#[test]
fn what_a_flush_does_not_need_is_ignored() {
    let mut driver = Driver::ready();
    assert_eq!(driver.request(FLUSH, u64::MAX, 0, 0), (OK, 1));
    assert_eq!(driver.request(FLUSH, 0, 512, 0), (OK, 1));
}

#[test]
fn a_request_has_no_more_data_than_its_limits_allow() {
    const PIECE: u32 = 512 << 10;
    let disk = MemoryDisk::new(32 * MIB).unwrap().into_disk();
    for (pieces, expect) in [(31, OK), (32, IOERR)] {
        let mut driver = Driver::ready_with(disk.clone(), VERSION_1);
        driver.put_header(IN, 0);
        let data = vec![(MIB / 2, PIECE, WRITE); pieces];
        driver.send(&[&[(HEADER, 16, 0)][..], &data, &[(STATUS, 1, WRITE)]].concat());
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), expect, "{pieces} pieces");
    }
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let plain = MemoryDisk::new(MIB).unwrap().into_disk();
    assert_eq!(Driver::new(plain).offered() & RO, 0);
    let disk = Disk::new(ReadOnly(MemoryDisk::new(MIB).unwrap().into_disk())).unwrap();
    let offered = Driver::new(disk.clone()).offered();
    assert_eq!(offered & RO, RO);
    let mut driver = Driver::ready_with(disk, offered & !(1 << 29));
    assert_eq!(driver.request(OUT, 0, 512, 0), (IOERR, 1));
    driver.put_data(&Driver::range(0, 1, 0));
    assert_eq!(driver.request(WRITE_ZEROES, 0, 16, 0), (UNSUPP, 1));
    assert_eq!(driver.request(DISCARD, 0, 16, 0), (UNSUPP, 1));
}

#[derive(Debug)]
struct ReadOnly(Disk);

impl storage_block::BlockBackend for ReadOnly {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage_block::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> storage_block::Result<()> {
        panic!("a write reached a read-only disk")
    }

    fn flush(&self) -> storage_block::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64) -> storage_block::Result<()> {
        panic!("a write reached a read-only disk")
    }
}

#[test]
fn random_bytes_are_as_many_as_asked_for_and_never_the_same() {
    let mut driver = Driver::of(Rng, MemoryDisk::new(512).unwrap().into_disk());
    driver.negotiate(VERSION_1);
    driver.set_queue(QUEUE_SIZE, [DESCRIPTORS, AVAILABLE, USED]);
    driver.set(reg::VIRTIO_MMIO_STATUS, 15);
    let mut seen = vec![vec![0; 32]];
    for (n, (asked, got)) in (0..).zip([(32, 32), (32, 32), (0, 0), (64 << 10, 4096)]) {
        driver.put_data(&[0; 4096]);
        assert_eq!(driver.send(&[(DATA, asked, WRITE)]), Step::Served { interrupt: true });
        let written: u32 = driver.memory.read_obj(GuestAddress(USED + 8 + 8 * n)).unwrap();
        assert_eq!(written, got);
        if got > 0 {
            let bytes = driver.data(32);
            assert!(!seen.contains(&bytes), "{bytes:?}");
            seen.push(bytes);
        }
    }
    // A request with nothing to write to.
    let readable = Malformed("a buffer for random bytes is not for writing");
    assert_eq!(driver.send(&[(DATA, 16, 0)]), Step::Broken(readable));
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
}
