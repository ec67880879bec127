//! The configurations of all devices, of which a driver writes next to nothing.

use std::sync::Arc;

use instance_core::console;
use instance_core::machine::NetSpec;
use instance_core::net::{MacAddress, link};
use instance_core::vsock::{VsockSpec, cable};
use storage_block::testing;

use super::*;
use crate::virtio::{Balloon, Console, Net, Vsock, Wish};

#[test]
fn a_configuration_is_not_the_drivers_to_write() {
    let disk = || MemoryDisk::new(MIB).unwrap().into_disk();
    let (net, _network) = link();
    let (vsock, _host) = cable();
    let devices = [
        Driver::new(disk()),
        Driver::of(Rng, disk()),
        Driver::of(Net::new(&NetSpec::new(net, MacAddress([2, 0, 0, 0, 0, 1])), 2), disk()),
        Driver::of(Console::new(console::Console::new().port()), disk()),
        Driver::of(Vsock::new(&VsockSpec::new(vsock)), disk()),
        Driver::of(Balloon::new(Arc::new(Wish::new(1))), disk()),
    ];
    for mut driver in devices {
        let kind = driver.get(reg::VIRTIO_MMIO_DEVICE_ID);
        let config = |driver: &Driver| {
            let mut bytes = vec![0xee; 0x100];
            driver.device.read(reg::VIRTIO_MMIO_CONFIG.into(), &mut bytes, 0);
            bytes
        };
        let before = config(&driver);
        for offset in (0..0x100).chain([u64::MAX - 0x100]) {
            for len in [1, 2, 4, 8] {
                // A balloon's second word is the one there is that a driver writes.
                if (kind, offset, len) != (5, 4, 4) {
                    let at = u64::from(reg::VIRTIO_MMIO_CONFIG) + offset;
                    assert_eq!(driver.device.write(&driver.memory, at, &[0xff; 8][..len]), Effect::None);
                }
            }
        }
        assert_eq!(config(&driver), before, "device {kind}");
    }
}

const CAN_DISCARD: u64 = 1 << 13;

#[test]
fn a_disk_is_offered_as_what_it_is() {
    const TOPOLOGY: u64 = 1 << 10;
    // What the disk says of its blocks, and what the driver reads: the one, and how often it can be doubled.
    for ((logical, physical), (size, exponent)) in [
        ((512, 4096), (512, 3)),
        ((512, 512), (512, 0)),
        ((4096, 16384), (4096, 2)),
        ((4096, 512), (4096, 0)),
        // What cannot be: no power of two, less than a sector, or more than the disk is a multiple of.
        ((3000, 5000), (512, 0)),
        ((0, 0), (512, 0)),
        ((2 * MIB as u32, 4096), (512, 3)),
    ] {
        for frees in [false, true] {
            let mut claimed = MemoryDisk::new(MIB).unwrap().into_disk().capabilities();
            (claimed.logical_block, claimed.physical_block, claimed.discard_frees) =
                (logical, physical, frees);
            let mut driver = Driver::new(testing::claiming(MIB, claimed).unwrap());
            let offered = driver.offered();
            assert_eq!((offered & TOPOLOGY != 0, offered & CAN_DISCARD != 0), (true, frees));
            let mut config = [0xee; 32];
            driver.device.read(reg::VIRTIO_MMIO_CONFIG.into(), &mut config, 0);
            assert_eq!(config[20..24], u32::to_le_bytes(size), "{logical} {physical}");
            assert_eq!(config[24..], [exponent, 0, 0, 0, 0, 0, 0, 0], "{logical} {physical}");
        }
    }
}

/// What a driver was offered where its machine was saved it has where that goes on, also where nobody would be offered it.
#[test]
fn discards_stay_with_whoever_negotiated_them() {
    let saved = Driver::ready();
    let memory = MemoryDisk::new(MIB).unwrap().into_disk();
    let mut restored = Driver::new(memory.clone());
    assert_eq!(restored.offered() & CAN_DISCARD, 0);
    restored.device.restore(&restored.memory, &saved.device.save()).unwrap();
    memory.write_at(&[7; 1024], 0).unwrap();
    restored.put_data(&Driver::range(1, 1, 0));
    assert_eq!(restored.request(DISCARD, 0, 16, 0), (OK, 1));
    let mut bytes = [1; 1024];
    memory.read_at(&mut bytes, 0).unwrap();
    assert_eq!((&bytes[..512], &bytes[512..]), (&[7; 512][..], &[0; 512][..]));
    // One that can only be read serves none, whoever asks.
    let mut read_only = Driver::new(Disk::new(ReadOnly(memory)).unwrap());
    read_only.device.restore(&read_only.memory, &saved.device.save()).unwrap_err();
}
