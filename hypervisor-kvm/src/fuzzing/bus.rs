//! The bodies for all that a guest reaches by ports and by addresses that are not RAM, of a machine with PCI and of one on
//! virtio-mmio.

use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use instance_core::console::Console;
use instance_core::machine::{DiskSpec, ExitCause, NetSpec};
use instance_core::net::{self, MacAddress};
use instance_core::vsock::{self, VsockSpec};
use kvm_ioctls::VmFd;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Input, limited_disk};
use crate::bus::Devices;
use crate::gate::Gate;
use crate::memory::{self, Memory};
use crate::pci::{self, Bus};
use crate::power::Power;
use crate::rtc::Rtc;
use crate::serial::SerialPort;
use crate::slots::{Other, Placed, Role, Slots};
use crate::thread::{Stacks, Thread};
use crate::virtio::{self, Balloon, Block, Device, DeviceState, Net, Rng, VirtioDevice, Vsock, Wish};
use crate::{Transport, layout, saved};

/// Where a machine's ports are, by which the input names them.
const PORTS: [u16; 10] = [
    layout::PCI_ADDRESS_PORT,
    layout::PCI_ADDRESS_PORT + 4,
    layout::HOT_PLUG_PORT,
    layout::HOT_PLUG_PORT + layout::HOT_PLUG_EJECT,
    layout::PM1_EVENT_PORT,
    layout::GPE_PORT,
    layout::SERIAL_PORT,
    layout::RTC_PORT,
    layout::PANIC_PORT,
    layout::I8042_PORT,
];

/// What the machine has, in the order of the places. Disks and ports may go, but for the first disk.
const STAYS: [bool; 7] = [true, false, false, true, true, true, true];

/// A virtual machine whose interrupts are raised, which one at a time has.
fn vm() -> Option<MutexGuard<'static, VmFd>> {
    // To make one takes longer than all else, and what is left in it of one input is nothing that another sees.
    static VM: OnceLock<Option<Mutex<VmFd>>> = OnceLock::new();
    let vm = VM.get_or_init(|| {
        let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()).ok()?;
        vm.create_irq_chip().ok().map(|()| Mutex::new(vm))
    });
    vm.as_ref().map(|vm| vm.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether there is KVM, without which the bodies do nothing. Under CI there is.
#[cfg(test)]
pub(super) fn can_run() -> bool {
    let can = vm().is_some();
    if !can {
        assert!(std::env::var_os("CI").is_none(), "there is no KVM, and CI needs it");
        eprintln!("SKIPPED: there is no KVM");
    }
    can
}

/// A guest that does what it likes with ports and addresses, and whose devices are served. It ejects no device that has to stay, and ends
/// its machine by nothing but what ends machines; a device that is alone in its place is heard there.
pub fn bus(bytes: &[u8]) {
    let (Some(vm), Ok(memory)) = (vm(), memory::allocate(NonZeroU32::MIN)) else { return };
    let vm = &*vm;
    let Some(devices) = devices(&memory, Transport::Pci) else { return };
    let (gate, mut input) = (Gate::new(), Input(bytes));
    gate.open();
    while let Some([action, at, low, high]) = input.take() {
        let mut data = input.take::<8>().unwrap_or_default();
        let len = [1, 2, 4, 8][usize::from(action >> 4 & 3)];
        let port = PORTS[usize::from(at) % PORTS.len()].wrapping_add(u16::from(low % 12));
        let address = u64::from(layout::PCI_MEMORY)
            + (u64::from(at) << 14)
            + u64::from(u16::from_le_bytes([low, high]));
        match action % 6 {
            0 => devices.port_read(port, &mut data[..len]),
            1 => write_port(&devices, vm, &gate, port, &data[..len]),
            2 => devices.memory_read(address, &mut data[..len]),
            3 => devices.memory_write(vm, &gate, address, &data[..len]),
            4 => _ = memory.write_slice(&data[..len], GuestAddress(u16::from_le_bytes([low, high]).into())),
            // The host wants one to go, or its thread serves it, or is to stand still.
            _ => {
                if let Some(placed) = devices.virtio.get(usize::from(at)) {
                    match low % 3 {
                        0 => devices.virtio.ask_to_go(&placed),
                        1 => _ = placed.device.step(vm, &gate),
                        _ => placed.device.settle(vm),
                    }
                }
            }
        }
        let all = devices.virtio.all();
        for placed in all.iter() {
            let Some(address) = placed.device.pci_address() else { continue };
            let is_at = |other: &&Arc<Placed>| other.device.pci_address() == Some(address);
            let is_heard = |other: &&Arc<Placed>| other.device.notified_at() == Some(address);
            let is_alone = all.iter().filter(is_at).count() == 1;
            let expected = is_heard(&placed) == placed.device.needs_thread();
            assert!(expected || !is_alone, "the device at {address:#x} is not heard");
            let mut others = all.iter().filter(|other| !is_at(other));
            assert!(!others.any(|other| is_heard(&other)), "another is heard at {address:#x}");
        }
        for (place, stays) in STAYS.into_iter().enumerate() {
            assert!(!stays || devices.virtio.get(place).is_some(), "the device in place {place} is gone");
        }
    }
    devices.virtio.all().iter().for_each(|placed| placed.device.end());
    devices.virtio.departed().into_iter().for_each(Thread::join);
    for placed in devices.virtio.all() {
        placed.device.stop(vm);
        let thread = placed.thread().take();
        thread.into_iter().for_each(Thread::join);
    }
}

/// The same of a machine on virtio-mmio. An access reaches the device whose the address is and no other, a read changes
/// nothing, and one of another width than a register has is none.
pub fn bus_on_mmio(bytes: &[u8]) {
    let (Some(vm), Ok(memory)) = (vm(), memory::allocate(NonZeroU32::MIN)) else { return };
    let vm = &*vm;
    let Some(devices) = devices(&memory, Transport::Mmio) else { return };
    let (gate, mut input) = (Gate::new(), Input(bytes));
    let states = || -> Vec<DeviceState> { devices.virtio.all().iter().map(|at| at.device.save()).collect() };
    let mut before = states();
    while let Some([action, at, low, high]) = input.take() {
        let mut data = input.take::<8>().unwrap_or_default();
        let len = [1, 2, 4, 8][usize::from(action >> 4 & 3)];
        let offset = u64::from(u16::from_le_bytes([low, high]));
        // Mostly of a device, or where there is room for more of them.
        let address = match high >> 4 {
            15 => u64::from_le_bytes(data),
            _ => layout::VIRTIO + u64::from(at) % 20 * layout::VIRTIO_LEN + offset % layout::VIRTIO_LEN,
        };
        let whose = whose(address, before.len());
        let is_register = |(_, offset): (usize, u64)| offset < VIRTIO_MMIO_CONFIG.into();
        let fits = len == 4 && address % 4 == 0;
        let mut may_change = None;
        match action % 4 {
            0 => {
                let read = &mut data[..len];
                devices.memory_read(address, read);
                match whose {
                    None => {
                        assert!(read.iter().all(|byte| *byte == 0xff), "something answers at {address:#x}")
                    }
                    Some((_, 0)) if fits => assert!(*read == *b"virt", "the registers are another device's"),
                    Some(at) if is_register(at) && !fits => {
                        assert!(read.iter().all(|byte| *byte == 0), "a part of a register is read");
                    }
                    Some(_) => {}
                }
            }
            1 => {
                devices.memory_write(vm, &gate, address, &data[..len]);
                may_change = whose.filter(|at| fits || !is_register(*at)).map(|(number, _)| number);
            }
            2 => assert!(memory.write_slice(&data[..len], GuestAddress(offset)).is_ok()),
            _ => {
                let port = PORTS[usize::from(at) % PORTS.len()].wrapping_add(u16::from(low % 12));
                write_port(&devices, vm, &gate, port, &data[..len]);
                devices.port_read(port, &mut data[..len]);
                let hot_plug = layout::HOT_PLUG_PORT..layout::HOT_PLUG_PORT + layout::HOT_PLUG_LEN;
                let of_pci = pci::PORTS.contains(&port) || hot_plug.contains(&port);
                assert!(!of_pci || data[..len].iter().all(|byte| *byte == 0xff), "there is no PCI");
            }
        }
        let after = states();
        for (number, (had, has)) in before.iter().zip(&after).enumerate() {
            assert!(had == has || may_change == Some(number), "device {number} at {address:#x}");
        }
        assert_eq!(after.len(), STAYS.len(), "a device is gone");
        before = after;
    }
    devices.virtio.all().iter().for_each(|placed| placed.device.end());
}

/// Which of so many devices on virtio-mmio an address is of, and how far it is into its registers.
fn whose(address: u64, devices: usize) -> Option<(usize, u64)> {
    (0..devices).find_map(|number| {
        let first = layout::VIRTIO + number as u64 * layout::VIRTIO_LEN;
        (first..first + layout::VIRTIO_LEN).contains(&address).then(|| (number, address - first))
    })
}

fn write_port(devices: &Devices, vm: &VmFd, gate: &Gate, port: u16, data: &[u8]) {
    match devices.port_write(vm, gate, port, data) {
        ControlFlow::Continue(()) => {}
        ControlFlow::Break(ExitCause::PowerOff) => assert!(port >> 4 == layout::PM1_EVENT_PORT >> 4),
        ControlFlow::Break(ExitCause::Panic) => assert_eq!(port, layout::PANIC_PORT),
        ControlFlow::Break(ExitCause::Reset) => {
            assert!([layout::RESET_PORT, layout::I8042_PORT].contains(&port));
        }
        ControlFlow::Break(other) => panic!("a guest cannot end its machine by {other:?}"),
    }
}

/// A device whose requests a thread of a machine's would serve. On virtio-mmio it is one without, as KVM takes a device's
/// notification once.
fn served(
    memory: &Memory,
    place: usize,
    transport: Transport,
    device: impl Device + 'static,
) -> Option<VirtioDevice> {
    match transport {
        Transport::Mmio => Some(VirtioDevice::new(memory, place, transport, device)),
        Transport::Pci => VirtioDevice::late(memory, device).ok(),
    }
}

/// Devices of all types, of which those that have a thread are served by nobody.
fn devices(memory: &Memory, transport: Transport) -> Option<Devices> {
    let stacks = Stacks::default();
    let disk = |serial| Some(DiskSpec::new(limited_disk()?, serial));
    let (first, second) = (disk("vol-0")?, disk("vol-1")?);
    let net = NetSpec::new(net::link().0, MacAddress([2, 0, 0, 0, 0, 1]));
    let of_disk = |place, spec: &DiskSpec| {
        let block = Block::new(spec.disk.clone(), &spec.serial, 2);
        let role = Role::Disk(saved::Disk::of(spec), block.engine());
        Some((role, served(memory, place, transport, block)?))
    };
    let balloon = Balloon::new(Arc::new(Wish::new(1)));
    let vsock = Vsock::new(&VsockSpec::new(vsock::cable().0));
    let console = virtio::Console::new(Console::new().port());
    let all = [
        of_disk(0, &first)?,
        of_disk(1, &second)?,
        (Role::Net(saved::Port::of(&net)), served(memory, 2, transport, Net::new(&net, 1))?),
        (Role::Other(Other::Entropy), VirtioDevice::new(memory, 3, transport, Rng)),
        (Role::Other(Other::Balloon), VirtioDevice::new(memory, 4, transport, balloon)),
        (Role::Other(Other::Vsock), served(memory, 5, transport, vsock)?),
        (Role::Other(Other::Console), served(memory, 6, transport, console)?),
    ];
    let mut placed = Vec::new();
    for (place, (role, device)) in all.into_iter().enumerate() {
        let at = Placed::new(place, role, device);
        if at.device.needs_thread() {
            *at.thread() = Some(Thread::spawn(&stacks, "fuzz", || ()).ok()?);
        }
        placed.push(at);
    }
    let interrupt = EventFd::new(EFD_NONBLOCK).ok()?;
    Some(Devices {
        serial: SerialPort::new(Console::new().port(), interrupt),
        power: Power::default(),
        rtc: Mutex::new(Rtc::new()),
        pci: (transport == Transport::Pci).then(Bus::new),
        virtio: Slots::new(transport.places(), placed),
    })
}
