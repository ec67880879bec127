//! The configurations of all devices, of which a driver writes next to nothing.

use std::sync::Arc;

use instance_core::console;
use instance_core::machine::NetSpec;
use instance_core::net::{MacAddress, link};
use instance_core::vsock::{VsockSpec, cable};

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
