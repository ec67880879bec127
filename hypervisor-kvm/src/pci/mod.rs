//! A PCI bus: the host bridge, the functions behind it, and the two ports by which a guest reaches their
//! configuration (PCI Local Bus 3.0, 3.2.2.3.2).

pub(crate) mod config;
pub(crate) mod msix;

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use config::{ConfigSpace, Identity};
use serde::{Deserialize, Serialize};

use crate::layout;

/// The ports: the address, then the data.
pub(crate) const PORTS: Range<u16> = layout::PCI_ADDRESS_PORT..layout::PCI_ADDRESS_PORT + 8;
const DATA_PORT: u16 = layout::PCI_ADDRESS_PORT + 4;
const ENABLED: u32 = 1 << 31;

/// The address port, and the host bridge, which is device 0.
#[derive(Debug)]
pub(crate) struct Bus {
    address: AtomicU32,
    bridge: ConfigSpace,
}

/// What an access to a port is about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nothing that needs a device; it has been answered.
    Done,
    /// The configuration of the device with this number, from this byte on.
    Device(usize, usize),
}

/// A bus as it is saved: the address port, and the host bridge's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BusState {
    address: u32,
    bridge: Vec<u8>,
}

impl Bus {
    pub(crate) fn new() -> Self {
        let bridge = Identity {
            // What others of this kind say; Linux takes a bus for real that has a host bridge.
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        Self { address: AtomicU32::new(0), bridge: ConfigSpace::new(bridge) }
    }

    /// The bus as it is now.
    pub(crate) fn save(&self) -> BusState {
        BusState { address: self.address.load(Ordering::Relaxed), bridge: self.bridge.save() }
    }

    /// Goes on where a bus was saved. False if it was another.
    pub(crate) fn restore(&mut self, state: &BusState) -> bool {
        self.address.store(state.address, Ordering::Relaxed);
        self.bridge.restore(&state.bridge)
    }

    /// The guest reads from one of the [`PORTS`]; `data` holds ones.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) -> Access {
        if port < DATA_PORT {
            if let (layout::PCI_ADDRESS_PORT, Ok(word)) = (port, <&mut [u8; 4]>::try_from(data)) {
                *word = self.address.load(Ordering::Relaxed).to_le_bytes();
            }
            return Access::Done;
        }
        match self.target(port) {
            Some((0, at)) => self.bridge.read(at, data),
            Some((device, at)) => return Access::Device(device, at),
            None => {}
        }
        Access::Done
    }

    /// The guest writes to one of them.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Access {
        if port < DATA_PORT {
            if let (layout::PCI_ADDRESS_PORT, Ok(word)) = (port, <[u8; 4]>::try_from(data)) {
                self.address.store(u32::from_le_bytes(word), Ordering::Relaxed);
            }
            return Access::Done;
        }
        match self.target(port) {
            // Nothing of the bridge is there to be changed.
            Some((0, _)) | None => Access::Done,
            Some((device, at)) => Access::Device(device, at),
        }
    }

    /// The device and byte that the address names, if it is on the bus: function 0 of bus 0.
    fn target(&self, port: u16) -> Option<(usize, usize)> {
        let address = self.address.load(Ordering::Relaxed);
        let (bus, device, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
        let on_bus = address & ENABLED != 0 && bus == 0 && function == 0;
        on_bus.then_some((device as usize, (address & 0xfc) as usize + usize::from(port - DATA_PORT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(bus: &Bus, address: u32) {
        assert_eq!(bus.write(layout::PCI_ADDRESS_PORT, &address.to_le_bytes()), Access::Done);
    }

    #[test]
    fn the_address_names_a_device_and_a_byte() {
        let bus = Bus::new();
        for (address, access) in [
            (ENABLED | 3 << 11 | 0x10, Access::Device(3, 0x12)),
            (ENABLED | 3 << 11 | 0x13, Access::Device(3, 0x12)),
            (3 << 11 | 0x10, Access::Done),
            (ENABLED | 3 << 11 | 1 << 8, Access::Done),
            (ENABLED | 1 << 16 | 3 << 11, Access::Done),
            (ENABLED, Access::Done),
        ] {
            select(&bus, address);
            assert_eq!(bus.read(DATA_PORT + 2, &mut [0; 2]), access, "{address:#x}");
            assert_eq!(bus.write(DATA_PORT + 2, &[0; 2]), access, "{address:#x}");
            let mut back = [0; 4];
            bus.read(layout::PCI_ADDRESS_PORT, &mut back);
            assert_eq!(u32::from_le_bytes(back), address);
        }
    }

    #[test]
    fn device_0_is_a_host_bridge() {
        let bus = Bus::new();
        select(&bus, ENABLED | 8);
        let mut class = [0; 4];
        assert_eq!(bus.read(DATA_PORT, &mut class), Access::Done);
        assert_eq!(class, [0, 0, 0, 6]);
    }
}
