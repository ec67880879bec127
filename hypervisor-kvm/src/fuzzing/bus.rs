//! The body for all that a guest reaches by ports and by addresses that are not RAM, of a machine with PCI.

use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, OnceLock};

use instance_core::console::Console;
use instance_core::machine::{DiskSpec, ExitCause, NetSpec};
use instance_core::net::{self, MacAddress};
use instance_core::vsock::{self, VsockSpec};
use kvm_ioctls::VmFd;
use storage_block::MemoryDisk;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DISK, Input};
use crate::bus::Devices;
use crate::gate::Gate;
use crate::memory::{self, Memory};
use crate::pci::Bus;
use crate::power::Power;
use crate::rtc::Rtc;
use crate::serial::SerialPort;
use crate::slots::{Other, Placed, Role, Slots};
use crate::thread::{Stacks, Thread};
use crate::virtio::{self, Balloon, Block, Net, Rng, VirtioDevice, Vsock, Wish};
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

/// A guest that does what it likes with ports and addresses. It ejects no device that has to stay, and ends its machine by nothing but
/// what ends machines.
pub fn bus(bytes: &[u8]) {
    // To make one takes longer than all else, and what is left in it of one input is nothing that another sees.
    static VM: OnceLock<Option<VmFd>> = OnceLock::new();
    let vm = VM.get_or_init(|| {
        let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()).ok()?;
        vm.create_irq_chip().ok().map(|()| vm)
    });
    let (Some(vm), Ok(memory)) = (vm, memory::allocate(NonZeroU32::MIN)) else { return };
    let Some(devices) = devices(&memory) else { return };
    let (gate, mut input) = (Gate::new(), Input(bytes));
    while let Some([action, at, low, high]) = input.take() {
        let mut data = input.take::<8>().unwrap_or_default();
        let len = [1, 2, 4, 8][usize::from(action >> 4 & 3)];
        let port = PORTS[usize::from(at) % PORTS.len()].wrapping_add(u16::from(low % 12));
        let address = u64::from(layout::PCI_MEMORY)
            + (u64::from(at) << 14)
            + u64::from(u16::from_le_bytes([low, high]));
        match action % 6 {
            0 => devices.port_read(port, &mut data[..len]),
            1 => match devices.port_write(vm, &gate, port, &data[..len]) {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(ExitCause::PowerOff) => assert!(port >> 4 == layout::PM1_EVENT_PORT >> 4),
                ControlFlow::Break(ExitCause::Panic) => assert_eq!(port, layout::PANIC_PORT),
                ControlFlow::Break(ExitCause::Reset) => {
                    assert!([layout::RESET_PORT, layout::I8042_PORT].contains(&port));
                }
                ControlFlow::Break(other) => panic!("a guest cannot end its machine by {other:?}"),
            },
            2 => devices.memory_read(address, &mut data[..len]),
            3 => devices.memory_write(vm, &gate, address, &data[..len]),
            4 => _ = memory.write_slice(&data[..len], GuestAddress(u16::from_le_bytes([low, high]).into())),
            // The host wants one to go.
            _ => {
                if let Some(placed) = devices.virtio.get(usize::from(at)) {
                    devices.virtio.ask_to_go(&placed);
                }
            }
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

/// Devices of all types on PCI, of which those that have a thread are served by nobody.
fn devices(memory: &Memory) -> Option<Devices> {
    let stacks = Stacks::default();
    let disk = |serial| Some(DiskSpec::new(MemoryDisk::new(DISK).ok()?.into_disk(), serial));
    let (first, second) = (disk("vol-0")?, disk("vol-1")?);
    let net = NetSpec::new(net::link().0, MacAddress([2, 0, 0, 0, 0, 1]));
    let of_disk = |spec: &DiskSpec| {
        let device = VirtioDevice::late(memory, Block::new(spec.disk.clone(), &spec.serial, 2));
        Some((Role::Disk(saved::Disk::of(spec)), device.ok()?))
    };
    let all = [
        of_disk(&first)?,
        of_disk(&second)?,
        (Role::Net(saved::Port::of(&net)), VirtioDevice::late(memory, Net::new(&net, 1)).ok()?),
        (Role::Other(Other::Entropy), VirtioDevice::new(memory, 3, Transport::Pci, Rng)),
        (
            Role::Other(Other::Balloon),
            VirtioDevice::new(memory, 4, Transport::Pci, Balloon::new(Arc::new(Wish::new(1)))),
        ),
        (
            Role::Other(Other::Vsock),
            VirtioDevice::late(memory, Vsock::new(&VsockSpec::new(vsock::cable().0))).ok()?,
        ),
        (
            Role::Other(Other::Console),
            VirtioDevice::late(memory, virtio::Console::new(Console::new().port())).ok()?,
        ),
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
        pci: Some(Bus::new()),
        virtio: Slots::new(layout::PCI_MAX, placed),
    })
}
