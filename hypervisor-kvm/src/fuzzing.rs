//! What a guest and a kernel file can reach, as functions of bytes: the bodies of the fuzz targets in
//! `fuzz/`. Each checks more than that nothing panics. Not part of the public interface.

mod bus;
mod devices;
mod ports;
mod queue;
mod requests;
mod saved_machine;

use std::io::Write;
use std::num::NonZeroU32;

use instance_core::machine::{BootFile, NetSpec};
use instance_core::net::{self, Checksum, Frame, MacAddress, Offloads, Protocol, Segmentation};
use storage_block::{Disk, IoLimits, Limiter, MemoryDisk, Rate};
use vm_memory::{Bytes, GuestAddress};

use crate::kernel::Kernel;
use crate::virtio::{Block, Effect, Mmio, Net, Pci, RANGE_LEN, Step};
use crate::{layout, memory};

pub use bus::{bus, bus_on_mmio};
pub use devices::{clock, virtio_balloon, virtio_console, virtio_rng, virtio_vsock, vsock_streams};
pub use ports::ports;
pub use queue::virtio_queue;
pub use requests::block_requests;
pub use saved_machine::saved_machine;

const DISK: u64 = 64 << 10;

/// Takes the input apart.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }
}

/// A disk with limits that hold up all but a few requests, for a moment.
fn limited_disk() -> Option<Disk> {
    let ops = Some(Rate { per_second: 10_000, burst: 2 });
    let disk = MemoryDisk::new(DISK).ok()?.into_disk();
    Some(disk.limited(&Limiter::new(IoLimits { ops, bytes: None })))
}

/// A guest that writes what it likes to its memory and to a block device's registers.
pub fn virtio_block(bytes: &[u8]) {
    let (Ok(memory), Some(disk)) = (memory::allocate(NonZeroU32::MIN), limited_disk()) else { return };
    let mut device = Mmio::new(Block::new(disk.clone(), "vol-fuzz", 2));
    let mut input = Input(bytes);
    let mut broken = false;
    while let Some([action, at, low, high]) = input.take() {
        match action % 4 {
            // A register of the device, mostly with a width that it has.
            0 => {
                let value = input.take::<4>().unwrap_or_default();
                let offset = u64::from(at) * 4;
                let reset =
                    offset == u64::from(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS) && value == [0; 4];
                let _ = device.write(&memory, offset, if low == 0xff { &value[..1] } else { &value });
                broken &= !(reset && low != 0xff);
            }
            1 => {
                let mut data = [0; 8];
                device.read(u64::from(at) * 4 + u64::from(low % 4), &mut data[..usize::from(high % 9)], 0);
            }
            // The first 64 KiB of the memory, where a driver of this fuzzer has all it has.
            2 => {
                let value = input.take::<8>().unwrap_or_default();
                let address = u64::from(u16::from_le_bytes([low, high]));
                let len = usize::from(at % 9);
                assert!(memory.write_slice(&value[..len], GuestAddress(address)).is_ok());
            }
            _ => {
                let queue = usize::from(at % 2);
                let step =
                    if low % 4 == 3 { device.settle(&memory, queue) } else { device.step(&memory, queue) };
                assert!(!broken || step == Step::Idle, "a device that waits for a reset has done {step:?}");
                broken |= matches!(step, Step::Broken(_));
            }
        }
    }
    assert_eq!(disk.size(), DISK);
}

/// A guest that writes what it likes to its memory, and to a block device on PCI by its configuration space
/// and its registers.
pub fn virtio_pci(bytes: &[u8]) {
    let (Ok(memory), Some(disk)) = (memory::allocate(NonZeroU32::MIN), limited_disk()) else { return };
    let mut device = Pci::new(Block::new(disk, "vol-fuzz", 2), Some(layout::PCI_MEMORY));
    let mut input = Input(bytes);
    let mut broken = false;
    while let Some([action, low, high]) = input.take() {
        let at = u16::from_le_bytes([low, high]);
        let len = 1 << (action >> 4 & 3);
        let value = input.take::<8>().unwrap_or_default();
        match action % 5 {
            0 => {
                let done = device.write(&memory, at.into(), &value[..len]);
                broken = done.effect != Effect::Reset && (broken || matches!(done.effect, Effect::Broken(_)));
            }
            1 => {
                let done = device.write_space(&memory, usize::from(at % 256), &value[..len]);
                broken = done.effect != Effect::Reset && (broken || matches!(done.effect, Effect::Broken(_)));
            }
            2 => {
                device.read(at.into(), &mut [0; 8][..len]);
                device.read_space(usize::from(at), &mut [0; 8][..len]);
            }
            3 => assert!(memory.write_slice(&value[..len], GuestAddress(at.into())).is_ok()),
            _ => {
                let queue = usize::from(low % 2);
                let step =
                    if low < 0xc0 { device.step(&memory, queue) } else { device.settle(&memory, queue) };
                assert!(!broken || step == Step::Idle, "a device that waits for a reset has done {step:?}");
                broken |= matches!(step, Step::Broken(_));
                let _ = (device.queue_message(low.into()), device.config_message());
            }
        }
        let range = device.range();
        assert!(range.is_none_or(|range| range.end - range.start == u64::from(RANGE_LEN)));
    }
}

/// A guest and a network that do what they like with a network device. What comes out at the network's end is
/// a sound frame that the network takes, and the bytes that were in the guest's memory.
pub fn virtio_net(bytes: &[u8]) {
    let Ok(memory) = memory::allocate(NonZeroU32::MIN) else { return };
    let mut input = Input(bytes);
    let [takes] = input.take().unwrap_or_default();
    let (port, network) = net::link();
    let mut offloads = Offloads::NONE;
    (offloads.checksum, offloads.tcp4, offloads.tcp6) = (takes & 1 != 0, takes & 2 != 0, takes & 4 != 0);
    network.set_takes(offloads);
    let pairs = usize::from(takes >> 4);
    let mut device = Mmio::new(Net::new(&NetSpec::new(port, MacAddress([2, 0, 0, 0, 0, 1])), pairs));
    let mut broken = false;
    while let Some([action, at, low, high]) = input.take() {
        match action % 5 {
            0 => {
                let value = input.take::<4>().unwrap_or_default();
                let offset = u64::from(at) * 4;
                let reset =
                    offset == u64::from(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS) && value == [0; 4];
                let _ = device.write(&memory, offset, &value);
                broken &= !reset;
            }
            1 => device.read(u64::from(at) * 4, &mut [0; 8][..usize::from(high % 9)], 0),
            2 => {
                let value = input.take::<16>().unwrap_or_default();
                let address = u64::from(u16::from_le_bytes([low, high]));
                assert!(memory.write_slice(&value[..usize::from(at % 17)], GuestAddress(address)).is_ok());
            }
            3 => {
                let mut frame = Frame::new(vec![at; usize::from(u16::from_le_bytes([low, high]))]);
                if at % 2 == 0 {
                    frame.checksum = Checksum::Partial { start: u16::from(at), offset: 16 };
                    let protocol = if at % 4 == 0 { Protocol::Tcp4 } else { Protocol::Tcp6 };
                    frame.segmentation =
                        Some(Segmentation { protocol, size: u16::from(low), header_len: u16::from(at) + 20 });
                }
                let _ = network.send(frame);
            }
            _ => {
                let step = device.step(&memory, usize::from(at % 18));
                assert!(!broken || step == Step::Idle, "a device that waits for a reset has done {step:?}");
                broken |= matches!(step, Step::Broken(_));
                while let Some(frame) = network.recv() {
                    assert!(frame.is_sound() && frame.is_taken_by(offloads) && frame.data.len() >= 14);
                }
            }
        }
    }
}

/// A kernel file of these bytes. What is accepted fits into the machine.
pub fn kernel(bytes: &[u8]) {
    let file =
        tempfile::tempfile().and_then(|mut file| file.write_all(bytes).and_then(|()| BootFile::new(file)));
    let (Ok(file), Ok(memory)) = (file, memory::allocate(NonZeroU32::MIN.saturating_add(3))) else { return };
    let low_end = memory::low_end(&memory);
    if let Ok(kernel) = Kernel::read(&file, ami_core::Architecture::X86_64, low_end) {
        assert!(kernel.end() <= low_end && kernel.end() >= layout::HIGH_MEMORY);
        assert!(kernel.load(&file, &memory).is_ok(), "what was checked cannot be loaded");
    }
}

#[cfg(test)]
mod tests {
    type Body = fn(&[u8]);

    /// The bodies of devices that have seeds of their own.
    const BODIES: [(&str, Body); 8] = [
        ("kvm_block_requests", super::block_requests),
        ("kvm_virtio_queue", super::virtio_queue),
        ("kvm_virtio_rng", super::virtio_rng),
        ("kvm_virtio_console", super::virtio_console),
        ("kvm_virtio_balloon", super::virtio_balloon),
        ("kvm_virtio_vsock", super::virtio_vsock),
        ("kvm_vsock_streams", super::vsock_streams),
        ("kvm_clock", super::clock),
    ];

    #[test]
    fn the_bodies_of_devices_hold_on_their_seeds() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds");
        for (target, body) in BODIES {
            let mut count = 0;
            for seed in std::fs::read_dir(format!("{seeds}/{target}")).unwrap() {
                let bytes = std::fs::read(seed.unwrap().path()).unwrap();
                (0..=bytes.len()).for_each(|len| body(&bytes[..len]));
                count += 1;
            }
            assert!(count > 0, "{target} has no seeds");
        }
    }

    /// A whole machine's devices are made for each, which takes a while.
    #[test]
    fn the_buses_hold_on_their_seeds() {
        if !super::bus::can_run() {
            return;
        }
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds");
        for (target, body) in [("kvm_bus", super::bus as Body), ("kvm_bus_mmio", super::bus_on_mmio)] {
            let mut count = 0;
            for seed in std::fs::read_dir(format!("{seeds}/{target}")).unwrap() {
                let bytes = std::fs::read(seed.unwrap().path()).unwrap();
                for len in (0..=bytes.len()).step_by(397).chain([bytes.len()]) {
                    body(&bytes[..len]);
                }
                count += 1;
            }
            assert!(count > 2, "{target} has {count} seeds");
        }
    }

    /// These are long, and one that is cut short is mostly none.
    #[test]
    fn saved_machines_hold_on_their_seeds() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds/kvm_saved_machine");
        let mut restored = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            let bytes = std::fs::read(seed.unwrap().path()).unwrap();
            restored += super::saved_machine::restored(&bytes);
            (0..bytes.len()).step_by(997).for_each(|len| super::saved_machine(&bytes[..len]));
        }
        // Disk, network port, entropy and balloon of each, on both transports, and a console in all but the oldest. What is of
        // version 3 is of version 4, too.
        assert_eq!(restored, 8 * 4 + 6 + 2 * 5);
    }

    /// Every seed and what is left of it when it is cut short, through every body.
    #[test]
    fn the_bodies_hold_on_the_seeds() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds");
        let mut count = 0;
        for target in ["kvm_virtio_block", "kvm_virtio_net", "kvm_virtio_pci", "kvm_kernel", "kvm_ports"] {
            for seed in std::fs::read_dir(format!("{seeds}/{target}")).unwrap() {
                let bytes = std::fs::read(seed.unwrap().path()).unwrap();
                for len in (0..=bytes.len()).step_by(7).chain([bytes.len()]) {
                    super::virtio_block(&bytes[..len]);
                    super::virtio_net(&bytes[..len]);
                    super::virtio_pci(&bytes[..len]);
                    super::ports(&bytes[..len]);
                    super::kernel(&bytes[..len]);
                }
                count += 1;
            }
        }
        assert!(count >= 10, "{count} seeds");
    }

    #[test]
    fn the_buses_hold_on_random_bytes() {
        if !super::bus::can_run() {
            return;
        }
        let mut random = RANDOM;
        for len in [12, 120, 1200, 12_000].into_iter().cycle().take(20) {
            let bytes = random_bytes(&mut random, len);
            super::bus(&bytes);
            super::bus_on_mmio(&bytes);
        }
    }

    const RANDOM: u64 = 0x9e37_79b9_7f4a_7c15;

    /// At least so many, which are the same in every run.
    fn random_bytes(random: &mut u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            bytes.extend(random.to_le_bytes());
        }
        bytes
    }

    /// Not a fuzzer's work, but that the bodies hold on bytes of any kind.
    #[test]
    fn the_bodies_hold_on_random_bytes() {
        let mut random = RANDOM;
        for len in (0..400).map(|n| n % 100 * 8) {
            let bytes = random_bytes(&mut random, len);
            super::virtio_block(&bytes);
            super::virtio_net(&bytes);
            super::virtio_pci(&bytes);
            super::ports(&bytes);
            BODIES.iter().for_each(|(_, body)| body(&bytes));
            super::kernel(&[b"\x7fELF", &bytes[..]].concat());
        }
    }
}
