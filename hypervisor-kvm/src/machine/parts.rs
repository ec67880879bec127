//! What a machine is put together from: its devices, each in its place.

use std::sync::{Arc, Mutex};

use instance_core::console::ConsolePort;
use instance_core::machine::{DiskSpec, MachineState, NetSpec};
use instance_core::vsock::VsockSpec;
use instance_core::watch::Publisher;
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use crate::bus::Devices;
use crate::error::{HostContext, Result};
use crate::exits::Exits;
use crate::gate::Gate;
use crate::memory::Memory;
use crate::pci::Bus;
use crate::power::Power;
use crate::rtc::Rtc;
use crate::serial::SerialPort;
use crate::slots::{Placed, Role, Slots};
use crate::virtio::{Balloon, Block, Device, Net, Rng, VirtioDevice, Vsock, Wish};
use crate::{Kvm, Transport, layout, saved};

/// The most virtio devices that a machine has besides its disks and network ports: in this order the entropy
/// device; the balloon, which machines have that were not saved before there was one; and, if its specification
/// says so, the place for streams.
pub(crate) const OTHER_DEVICES: usize = 3;

/// What a machine is put together from.
pub(super) struct Parts<'a> {
    pub(super) name: &'a str,
    pub(super) transport: Transport,
    pub(super) disks: &'a [DiskSpec],
    pub(super) nets: &'a [NetSpec],
    pub(super) vsock: Option<&'a VsockSpec>,
    /// Which place each device has: the disks', the network ports', and those of as many others as there are.
    pub(super) places: Places,
    pub(super) console: &'a ConsolePort,
    pub(super) vm: VmFd,
    pub(super) memory: Memory,
    pub(super) processors: Vec<VcpuFd>,
}

/// Which places devices have.
pub(super) struct Places {
    disks: Vec<usize>,
    nets: Vec<usize>,
    others: Vec<usize>,
}

impl Places {
    /// Of a new machine: one after the other.
    pub(super) fn in_order(disks: usize, nets: usize, others: usize) -> Self {
        let from = disks + nets;
        Self {
            disks: (0..disks).collect(),
            nets: (disks..from).collect(),
            others: (from..from + others).collect(),
        }
    }

    /// Of one that was saved, where devices may have come and gone.
    pub(super) fn of(state: &saved::State) -> Self {
        let of = |role| {
            let devices = state.virtio.iter().filter(|device| device.role == role);
            devices.map(|device| usize::from(device.place)).collect()
        };
        Self { disks: of(saved::Role::Disk), nets: of(saved::Role::Net), others: of(saved::Role::Other) }
    }
}

impl Parts<'_> {
    /// A machine without threads, whose devices nobody has used yet.
    pub(super) fn put_together(self, kvm: &Kvm, state: MachineState) -> Result<Shared> {
        let Self { name, transport, disks, nets, vsock, places, console, vm, memory, processors } = self;
        let (mut placed, mut others) = (Vec::new(), places.others.into_iter());
        let way = (transport, state == MachineState::Paused);
        for (place, disk) in places.disks.into_iter().zip(disks) {
            let block = Block::new(disk.disk.clone(), &disk.serial);
            let device = served(&vm, &memory, place, way, block)?;
            placed.push(Placed::new(place, Role::Disk(saved::Disk::of(disk)), device));
        }
        for (place, net) in places.nets.into_iter().zip(nets) {
            let device = served(&vm, &memory, place, way, Net::new(net))?;
            net.port.set_waker(Some(Arc::new(device.waker()?)));
            placed.push(Placed::new(place, Role::Net(saved::Port::of(net)), device));
        }
        if let Some(place) = others.next() {
            let device = VirtioDevice::new(&vm, &memory, place, transport, Rng)?;
            placed.push(Placed::new(place, Role::Other, device));
        }
        let mut balloon = None;
        if let Some(place) = others.next() {
            let mib: u64 = memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20;
            let wish = Arc::new(Wish::new(mib as u32));
            let device = VirtioDevice::new(&vm, &memory, place, transport, Balloon::new(wish.clone()))?;
            placed.push(Placed::new(place, Role::Other, device));
            balloon = Some((place, wish));
        }
        if let (Some(place), Some(spec)) = (others.next(), vsock) {
            let mut device = Vsock::new(spec);
            if state == MachineState::Paused {
                // It goes on, with streams that nobody else has.
                device.break_streams();
            }
            let device = served(&vm, &memory, place, way, device)?;
            spec.port.set_waker(Some(Arc::new(device.waker()?)));
            placed.push(Placed::new(place, Role::Other, device));
        }
        let devices = Devices {
            serial: serial_port(&vm, console)?,
            power: Power::default(),
            rtc: Mutex::new(Rtc::new()),
            pci: (transport == Transport::Pci).then(Bus::new),
            virtio: Slots::new(transport.places(), placed),
        };
        Ok(Shared {
            name: name.to_owned(),
            filter: None,
            exits: processors.iter().map(|_| Exits::default()).collect(),
            stacks: kvm.stacks(),
            processors: processors.into_iter().map(Mutex::new).collect(),
            vm,
            devices,
            balloon,
            memory,
            msrs: kvm.msrs(),
            gate: Gate::new(),
            state: Publisher::new(state),
            threads: Mutex::default(),
            plugging: Mutex::default(),
        })
    }
}

/// A device that a thread is going to serve; whether it goes on where another was saved is said with the transport: on
/// PCI it has no place before it is told where that was, which may be where another one begins.
fn served(
    vm: &VmFd,
    memory: &Memory,
    place: usize,
    (transport, goes_on): (Transport, bool),
    device: impl Device + 'static,
) -> Result<VirtioDevice> {
    match transport {
        Transport::Pci if goes_on => VirtioDevice::late(memory, device),
        _ => VirtioDevice::with_thread(vm, memory, place, transport, device),
    }
}

fn serial_port(vm: &VmFd, console: &ConsolePort) -> Result<SerialPort> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
    vm.register_irqfd(&interrupt, layout::SERIAL_IRQ).host("KVM did not take the serial port's interrupt")?;
    Ok(SerialPort::new(console.clone(), interrupt))
}
