//! The body for saved machines: the file, the state, and the devices of it.

use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use instance_core::console::Console;
use instance_core::machine::{DiskSpec, NetSpec, RestoreSpec, SavedMachine};
use instance_core::net::{self, MacAddress};
use instance_core::vsock::{self, VsockSpec};
use storage_block::MemoryDisk;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::DISK;
use crate::memory::{self, Memory};
use crate::pci::Bus;
use crate::power::Power;
use crate::saved::{self, Loaded, State};
use crate::serial::SerialPort;
use crate::slots::{Other, Slots};
use crate::virtio::{self, Balloon, Block, DeviceState, Mmio, Net, Pci, RANGE_LEN, Rng, Vsock, Wish};
use crate::{layout, rtc};

/// Machines of more memory are not looked at, since their files are as long.
const MIB_MAX: u32 = 64;

/// Anybody's bytes as a saved machine's state of any version, and as its whole file. What can be decoded is encoded again as it was, and
/// its devices go on where they were saved.
pub fn saved_machine(bytes: &[u8]) {
    restored(bytes);
}

/// How many devices have gone on, of all versions.
pub(super) fn restored(bytes: &[u8]) -> usize {
    let _ = read(bytes, bytes.len() as u64);
    (1..=saved::VERSION).map(|version| restored_of(version, bytes)).sum()
}

/// A file of this length that begins with these bytes, as it is read.
fn read(bytes: &[u8], len: u64) -> Option<crate::error::Result<(Loaded, SavedMachine)>> {
    let file = tempfile::tempfile().ok()?;
    file.write_all_at(bytes, 0).ok()?;
    file.set_len(len).ok()?;
    let machine = SavedMachine::new(file).ok()?;
    Some(Loaded::read(&machine).map(|loaded| (loaded, machine)))
}

fn restored_of(version: u32, bytes: &[u8]) -> usize {
    let decoded = saved::decode(version, bytes);
    // By somebody who knows the format.
    let checksum = crc32c::crc32c(bytes).to_le_bytes();
    let header = [&b"AMI-KVM\n"[..], &version.to_le_bytes(), &checksum, &(bytes.len() as u64).to_le_bytes()];
    let head = [&header.concat()[..], &[0; 8], bytes].concat();
    let mib = decoded.as_ref().map_or(0, |state| state.memory_mib).min(MIB_MAX);
    let file = read(&head, (head.len() as u64).next_multiple_of(4096) + (u64::from(mib) << 20));
    if let (Ok(state), Some(Ok((loaded, machine)))) = (&decoded, &file) {
        assert_eq!((loaded.version, loaded.state.memory_mib), (version, state.memory_mib));
        assert_eq!(loaded.memory(machine).is_ok(), mib > 0);
    }
    let whole = matches!(&file, Some(Ok(_)));
    assert!(whole || decoded.as_ref().map_or(true, |state| state.memory_mib > MIB_MAX), "{file:?}");
    let memory = memory::allocate(NonZeroU32::MIN.saturating_add(mib.saturating_sub(1)));
    let (Ok(state), Ok(memory)) = (decoded, memory) else { return 0 };
    check(&state, file.and_then(Result::ok).map(|(_, machine)| machine));
    platform(&state);
    // Numbers may be encoded in more bytes than they need.
    let again = saved::encode(&state).expect("what was decoded can be encoded");
    let twice = saved::decode(saved::VERSION, &again).map(|state| saved::encode(&state));
    assert!(matches!(twice, Ok(Ok(twice)) if twice == again), "it is encoded in two ways");
    state.virtio.iter().filter(|device| goes_on(&device.state, &memory)).count()
}

/// Whoever has the disks and ports that the machine had may go on with it, and nobody else may.
fn check(state: &State, machine: Option<SavedMachine>) {
    let Some(machine) = machine else { return };
    let mut spec = RestoreSpec::new("fuzz", machine, Console::new().port());
    let none = state.check(&spec, 64).is_ok();
    assert!(!none || (state.disks.is_empty() && state.nets.is_empty()), "it had {:?}", state.disks);
    let others = |kind| state.virtio.iter().any(|device| Other::of(device.state.kind()) == Some(kind));
    for disk in &state.disks {
        // The size of a disk of memory is memory.
        let Ok(made) = MemoryDisk::new(disk.size.min(DISK)) else { return };
        spec.disks.push(DiskSpec::new(made.into_disk(), disk.serial.as_str()));
    }
    for port in &state.nets {
        let mut net = NetSpec::new(net::link().0, MacAddress(port.mac));
        net.mtu = port.mtu;
        spec.nets.push(net);
    }
    spec.vsock = others(Other::Vsock).then(|| VsockSpec::new(vsock::cable().0));
    spec.virtio_console = others(Other::Console).then(|| Console::new().port());
    if state.check(&spec, 64).is_ok() {
        assert!((1..=64).contains(&state.processors.len()));
        assert!(state.virtio.iter().all(|device| usize::from(device.place) < layout::PCI_MAX));
    }
}

/// What is neither a virtio device nor KVM's.
fn platform(state: &State) {
    let fits = state.pci.as_ref().is_some_and(|state| Bus::new().restore(state));
    let Ok(interrupt) = EventFd::new(EFD_NONBLOCK) else { return };
    let serial = SerialPort::new(Console::new().port(), interrupt);
    let _ = (fits, serial.restore(state.serial.clone()), serial.read(0), serial.write(0, 0));
    let power = Power::default();
    power.restore(&state.power, |_| ());
    power.raise_event(layout::GENERATION_GPE, |_| ());
    power.read(layout::PM1_EVENT_PORT, &mut [0; 8]);
    let mut clock: rtc::Rtc = state.rtc.clone();
    for register in 0..=u8::MAX {
        clock.select(register);
        let now = std::time::Duration::from_secs(u64::from(register) << 24);
        clock.write(clock.read(now), now);
    }
    let slots = Slots::new(layout::PCI_MAX, Vec::new());
    slots.restore(state.hot_plug);
    assert_eq!(slots.save(), state.hot_plug);
    slots.read(layout::HOT_PLUG_PORT + layout::HOT_PLUG_ARRIVED, &mut [0; 4]);
}

/// Whether a device of any type goes on, and it is only one of its own.
fn goes_on(state: &DeviceState, memory: &Memory) -> bool {
    let Ok(disk) = MemoryDisk::new(DISK) else { return false };
    let net = NetSpec::new(net::link().0, MacAddress([2, 0, 0, 0, 0, 1]));
    let block = Block::new(disk.into_disk(), "vol-fuzz", state.queues());
    let net = Net::new(&net, Net::pairs_of(state.queues()));
    let console = virtio::Console::new(Console::new().port());
    let balloon = Balloon::new(Arc::new(Wish::new(1)));
    let mut vsock = Vsock::new(&VsockSpec::new(vsock::cable().0));
    vsock.break_streams();
    let mut which = 0;
    match state {
        DeviceState::Mmio(registers, _) => {
            let all = [Mmio::new(block), Mmio::new(net), Mmio::new(console)];
            for mut device in all.into_iter().chain([Mmio::new(balloon), Mmio::new(vsock), Mmio::new(Rng)]) {
                if device.restore(memory, registers).is_ok() {
                    which += 1;
                    let saved = device.save();
                    device.refresh();
                    (0..device.queues()).for_each(|queue| _ = device.step(memory, queue));
                    assert_eq!(DeviceState::Mmio(saved, 0).kind(), state.kind());
                }
            }
        }
        DeviceState::Pci(registers) => {
            let place = Some(layout::PCI_MEMORY);
            let all = [Pci::new(block, place), Pci::new(net, place), Pci::new(console, place)];
            let others = [Pci::new(balloon, place), Pci::new(vsock, place), Pci::new(Rng, place)];
            for mut device in all.into_iter().chain(others) {
                if device.restore(memory, registers).is_ok() {
                    which += 1;
                    (0..device.queues()).for_each(|queue| {
                        let _ = (device.step(memory, queue), device.queue_message(queue));
                    });
                    let range = device.range();
                    assert!(range.is_none_or(|range| range.end - range.start == u64::from(RANGE_LEN)));
                }
            }
        }
    }
    assert!(which <= 1, "{which} types of device are one");
    which == 1
}
