//! A driver that reaches a block device by PCI, good and bad.

use storage_block::{Disk, MemoryDisk, Volume};
use vm_memory::{Bytes, GuestAddress};

use super::block::Block;
use super::core::{Effect, Step};
use super::driver::to_the_end;
use super::pci::{Done, NOTIFY, Pci, RANGE_LEN};
use super::ring::QUEUE_SIZE;
use crate::memory::{self, Memory};
use crate::pci::msix::Message;

const MIB: u64 = 1 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x4100;
const MSIX_TABLE: u64 = 0x4000;
const CONFIGURATION: Message = Message { address: 0xfee0_0000, data: 0x30 };
const QUEUE: Message = Message { address: 0xfee0_0000, data: 0x31 };

struct Driver {
    memory: Memory,
    device: Pci,
}

impl Driver {
    fn new() -> Self {
        Self::of(MemoryDisk::new(MIB).unwrap().into_disk())
    }

    fn of(disk: Disk) -> Self {
        Self::with_queues(disk, 1)
    }

    fn with_queues(disk: Disk, queues: usize) -> Self {
        let memory = memory::allocate(std::num::NonZeroU32::MIN).unwrap();
        Self { memory, device: Pci::new(Block::new(disk, "vol-0123", queues), Some(0xc000_0000)) }
    }

    fn set(&mut self, offset: u64, value: &[u8]) -> Done {
        self.device.write(&self.memory, offset, value)
    }

    fn get(&mut self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.device.read(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    fn space(&mut self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.device.read_space(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where each capability is, with its id and, of a virtio one, what it points to.
    fn capabilities(&mut self) -> Vec<(usize, u32, u32)> {
        let mut found = Vec::new();
        let mut at = self.space(0x34) as usize & 0xff;
        while at != 0 {
            let head = self.space(at);
            found.push((at, head & 0xff, head >> 24));
            at = head as usize >> 8 & 0xff;
        }
        found
    }

    /// All the steps of initialisation, with both vectors.
    fn ready() -> Self {
        Self::new().negotiate()
    }

    fn negotiate(self) -> Self {
        let mut driver = self;
        let msix = driver.capabilities().into_iter().find(|found| found.1 == 0x11).unwrap().0;
        driver.device.write_space(&driver.memory, msix + 2, &0x8000u16.to_le_bytes());
        for (n, message) in [CONFIGURATION, QUEUE].into_iter().enumerate() {
            let entry = MSIX_TABLE + 16 * n as u64;
            driver.set(entry, &message.address.to_le_bytes());
            driver.set(entry + 8, &u64::from(message.data).to_le_bytes());
        }
        driver.set(20, &[0]);
        driver.set(20, &[3]);
        for half in 0..2u32 {
            driver.set(0, &half.to_le_bytes());
            let offered = driver.get(4, 4) as u32 & if half == 0 { !(1 << 29) } else { !0 };
            driver.set(8, &half.to_le_bytes());
            driver.set(12, &offered.to_le_bytes());
        }
        driver.set(20, &[11]);
        assert_eq!(driver.get(20, 1), 11);
        driver.set(16, &0u16.to_le_bytes());
        driver.set(22, &0u16.to_le_bytes());
        driver.set(26, &1u16.to_le_bytes());
        for (field, address) in [(32, DESCRIPTORS), (40, AVAILABLE), (48, USED)] {
            driver.set(field, &(address as u32).to_le_bytes());
            driver.set(field + 4, &0u32.to_le_bytes());
        }
        driver.set(28, &1u16.to_le_bytes());
        assert_eq!(driver.set(20, &[15]).effect, Effect::Notify);
        driver
    }

    /// The `n`th request: to flush.
    fn flush(&mut self, n: u16) -> Step {
        self.memory.write_obj(4u32, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
        for (at, address, len, flags, next) in
            [(DESCRIPTORS, HEADER, 16u32, 1u16, 1u16), (DESCRIPTORS + 16, STATUS, 1, 2, 0)]
        {
            self.memory.write_obj(address, GuestAddress(at)).unwrap();
            self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
        self.memory.write_obj(0u16, GuestAddress(AVAILABLE + 4 + 2 * u64::from(n))).unwrap();
        self.memory.write_obj(n + 1, GuestAddress(AVAILABLE + 2)).unwrap();
        assert_eq!(self.set(NOTIFY, &0u16.to_le_bytes()).effect, Effect::Notify);
        let Self { memory, device } = self;
        to_the_end(device, |device| device.step(memory, 0), Pci::ended)
    }
}

#[test]
fn says_where_its_parts_are() {
    let mut driver = Driver::new();
    assert_eq!(driver.space(0), 0x1042_1af4);
    let kinds: Vec<_> = driver.capabilities().into_iter().map(|(_, id, kind)| (id, kind & 0xff)).collect();
    assert_eq!(kinds[..5], [(9, 1), (9, 3), (9, 4), (9, 2), (9, 5)]);
    assert_eq!(kinds[5].0, 0x11);
    for (at, id, _) in driver.capabilities() {
        let (offset, len) = (driver.space(at + 8), driver.space(at + 12));
        assert!(id != 9 || offset + len <= RANGE_LEN, "{at:#x}");
    }
}

#[test]
fn serves_a_good_driver_and_tells_it_by_messages() {
    let mut driver = Driver::ready();
    for n in 0..3 {
        assert_eq!(driver.flush(n), Step::Served { interrupt: true });
        assert_eq!(driver.device.queue_message(0), Some(QUEUE));
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
    }
    assert_eq!(driver.get(0x2000, 8), MIB / 512, "the capacity");
}

#[test]
fn each_queue_has_a_message_of_its_own() {
    const QUEUES: u16 = 3;
    let mut driver = Driver::with_queues(MemoryDisk::new(MIB).unwrap().into_disk(), QUEUES.into());
    assert_eq!(driver.get(18, 2), u64::from(QUEUES));
    let msix = driver.capabilities().into_iter().find(|found| found.1 == 0x11).unwrap().0;
    assert_eq!(driver.space(msix) >> 16 & 0x7ff, u32::from(QUEUES), "one more than that, less one");
    driver.device.write_space(&driver.memory, msix + 2, &0x8000u16.to_le_bytes());
    let message = |queue: u16| Message { address: 0xfee0_0000, data: 0x40 + u32::from(queue) };
    for queue in 0..QUEUES {
        let entry = MSIX_TABLE + 16 * u64::from(queue + 1);
        driver.set(entry, &message(queue).address.to_le_bytes());
        driver.set(entry + 8, &u64::from(message(queue).data).to_le_bytes());
        driver.set(22, &queue.to_le_bytes());
        driver.set(26, &(queue + 1).to_le_bytes());
    }
    for queue in 0..QUEUES {
        assert_eq!(driver.device.queue_message(queue.into()), Some(message(queue)));
    }
    assert_eq!(driver.device.queue_message(QUEUES.into()), None);
}

#[test]
fn a_disk_that_has_grown_is_a_new_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::create(&dir.path().join("vol"), None, MIB).unwrap();
    let mut driver = Driver::of(volume.disk());
    assert!(!driver.device.refresh(), "a driver that is not ready is not told");
    let mut driver = driver.negotiate();
    volume.grow(2 * MIB).unwrap();
    let before = (driver.get(21, 1), driver.get(0x2000, 8));
    assert_eq!(before.1, MIB / 512, "nothing changes while a driver may be reading");
    assert!(driver.device.refresh());
    assert_eq!(driver.device.config_message(), Some(CONFIGURATION));
    assert_eq!((driver.get(21, 1), driver.get(0x2000, 8)), (before.0 + 1, 2 * MIB / 512));
}

#[test]
fn what_breaks_the_rules_stops_the_device_until_a_reset() {
    let mut driver = Driver::ready();
    assert!(matches!(driver.set(32, &[0; 4]).effect, Effect::Broken(_)), "a queue that is moved");
    assert_eq!(driver.device.config_message(), Some(CONFIGURATION));
    assert_eq!(driver.get(20, 1) & 64, 64, "it needs a reset");
    assert_eq!(driver.flush(0), Step::Idle);
    assert_eq!(driver.set(20, &[0]).effect, Effect::Reset);
    assert_eq!((driver.get(20, 1), driver.get(16, 2), driver.get(26, 2)), (0, 0xffff, 0xffff));
    assert_eq!(driver.device.queue_message(0), None);
}

#[test]
fn a_vector_that_is_not_there_is_none() {
    let mut driver = Driver::new();
    for (asked, got) in [(0u16, 0), (1, 1), (2, 0xffff), (0xffff, 0xffff)] {
        driver.set(16, &asked.to_le_bytes());
        driver.set(26, &asked.to_le_bytes());
        assert_eq!((driver.get(16, 2), driver.get(26, 2)), (got, got));
    }
    driver.set(22, &1u16.to_le_bytes());
    assert_eq!((driver.get(24, 2), driver.get(26, 2)), (0, 0xffff), "a queue that is not there");
}

#[test]
fn the_window_reaches_the_registers() {
    let mut driver = Driver::new();
    let window = driver.capabilities()[4].0;
    let mut access = |register: u64, len: u32, write: Option<&[u8]>| {
        driver.device.write_space(&driver.memory, window + 8, &(register as u32).to_le_bytes());
        driver.device.write_space(&driver.memory, window + 12, &len.to_le_bytes());
        if let Some(value) = write {
            driver.device.write_space(&driver.memory, window + 16, value);
        }
        driver.space(window + 16)
    };
    access(20, 1, Some(&[3]));
    assert_eq!(access(20, 1, None) & 0xff, 3);
    assert_eq!(access(18, 2, None) & 0xffff, 1, "queues");
    for len in [0, 3, 5, u32::MAX] {
        access(u64::from(u32::MAX), len, Some(&[0xff; 4]));
    }
    // What lies across registers, or in none: it is not the status that is written to.
    for (register, len) in [(17, 4), (19, 2), (20, 2), (20, 4), (0x6000, 1), (u64::from(RANGE_LEN), 1)] {
        access(register, len, Some(&[0; 4]));
        assert_eq!(access(20, 1, None) & 0xff, 3, "{len} bytes at {register:#x}");
    }
}

#[test]
fn what_can_only_be_read_is_not_written() {
    let mut driver = Driver::ready();
    // What is offered, how many queues, of which generation, where a queue is notified: and beyond what there is.
    for (field, len) in [(4, 4), (18, 2), (21, 1), (30, 2), (56, 2), (58, 2), (60, 4), (64, 8), (0x1000, 1)] {
        let before = driver.get(field, len);
        for value in [0, 1, 0xff] {
            assert_eq!(driver.set(field, &[value; 8][..len]).effect, Effect::None, "{field}");
            assert_eq!(driver.get(field, len), before, "{field}");
        }
    }
    // A queue ends with a reset and not before.
    assert_eq!((driver.set(28, &[0; 2]).effect, driver.get(28, 2)), (Effect::None, 1));
    assert_eq!(driver.flush(0), Step::Served { interrupt: true });
}

#[test]
fn a_queue_is_described_before_it_is_enabled() {
    let in_memory = (u64::from(QUEUE_SIZE), DESCRIPTORS, AVAILABLE, USED);
    for (size, descriptors, available, used) in [
        (0, DESCRIPTORS, AVAILABLE, USED),
        (3, DESCRIPTORS, AVAILABLE, USED),
        (u64::from(QUEUE_SIZE) * 2, DESCRIPTORS, AVAILABLE, USED),
        (in_memory.0, MIB, AVAILABLE, USED),
        (in_memory.0, DESCRIPTORS, 1 << 63, USED),
        (in_memory.0, DESCRIPTORS, AVAILABLE, u64::MAX),
        in_memory,
    ] {
        let mut driver = Driver::new();
        driver.set(24, &size.to_le_bytes()[..2]);
        for (field, address) in [(32, descriptors), (40, available), (48, used)] {
            driver.set(field, &address.to_le_bytes());
        }
        let effect = driver.set(28, &1u16.to_le_bytes()).effect;
        let is_good = (size, descriptors, available, used) == in_memory;
        assert_eq!(effect == Effect::None, is_good, "{size} {descriptors:x} {available:x} {used:x}");
        assert_eq!((driver.get(28, 2) == 1, driver.get(20, 1) == 0), (is_good, is_good));
        // Neither of a queue in use.
        for (field, len) in [(24, 2), (32, 4), (36, 4), (40, 8), (44, 4), (48, 4), (52, 4)] {
            let effect = driver.set(field, &[0; 8][..len]).effect;
            assert_eq!(matches!(effect, Effect::Broken(_)), is_good, "{field}");
        }
    }
}

#[test]
fn every_register_takes_every_width() {
    let mut driver = Driver::ready();
    for len in [2, 4, 8] {
        driver.set(20, &[0; 8][..len]);
        assert_eq!(driver.get(20, 1), 15, "{len} bytes are no status");
    }
    for offset in 0..u64::from(RANGE_LEN) {
        for len in [1, 2, 4, 8] {
            driver.get(offset, len);
            if offset != 20 {
                driver.set(offset, &[0xff; 8][..len]);
            }
        }
    }
    driver.set(20, &[0]);
    assert_eq!(driver.get(20, 1), 0);
}
