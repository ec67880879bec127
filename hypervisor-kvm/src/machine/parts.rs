//! What a machine is put together from: its devices, each in its place.

use std::sync::{Arc, Mutex};

use instance_core::console::ConsolePort;
use instance_core::machine::{DiskSpec, MachineSpec, MachineState, NetSpec};
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
use crate::gone::Gone;
use crate::memory::Memory;
use crate::pci::Bus;
use crate::power::Power;
use crate::rtc::Rtc;
use crate::serial::SerialPort;
use crate::slots::{Other, Placed, Role, Slots};
use crate::virtio::{
    Balloon, Block, Console, Device, KernelNet, Net, Rng, Spares, VirtioDevice, Vsock, Wish,
    check_descriptors,
};
use crate::{Kvm, Transport, VhostNet, layout, saved};

/// What a machine is put together from.
pub(super) struct Parts<'a> {
    pub(super) name: &'a str,
    pub(super) transport: Transport,
    pub(super) disks: &'a [DiskSpec],
    pub(super) nets: &'a [NetSpec],
    pub(super) vsock: Option<&'a VsockSpec>,
    /// Which place each device has: the disks', the network ports', and the others'.
    pub(super) places: Places,
    pub(super) console: &'a ConsolePort,
    pub(super) virtio_console: Option<&'a ConsolePort>,
    /// These are dropped in this order: the memory last.
    pub(super) processors: Vec<VcpuFd>,
    pub(super) vm: VmFd,
    pub(super) memory: Memory,
}

/// Which places devices have.
pub(super) struct Places {
    /// With the number of queues that each has.
    disks: Vec<(usize, usize)>,
    /// And for how many pairs of queues each has room.
    nets: Vec<(usize, usize)>,
    others: Vec<(Other, usize)>,
    /// Those whose disk or cable was taken away, with the number of queues that each has.
    gone: Vec<(Gone, usize, usize)>,
}

impl Places {
    /// Of a new machine: one after the other.
    pub(super) fn of_new(spec: &MachineSpec) -> Self {
        let asked = [(Other::Vsock, spec.vsock.is_some()), (Other::Console, spec.virtio_console.is_some())];
        let asked = asked.into_iter().filter(|(_, asked)| *asked).map(|(other, _)| other);
        let (disks, others_from) = (spec.disks.len(), spec.disks.len() + spec.nets.len());
        let pairs = spec.vcpus.get() as usize;
        Self {
            disks: (0..disks).map(|place| (place, pairs)).collect(),
            nets: (disks..others_from).map(|place| (place, pairs)).collect(),
            others: [Other::Entropy, Other::Balloon].into_iter().chain(asked).zip(others_from..).collect(),
            gone: Vec::new(),
        }
    }

    /// Of one that was saved, where devices may have come and gone.
    pub(super) fn of_saved(state: &saved::State) -> Self {
        let mut places = Self { disks: Vec::new(), nets: Vec::new(), others: Vec::new(), gone: Vec::new() };
        for device in &state.virtio {
            let (place, queues) = (device.place.into(), device.state.queues());
            match (state.gone(device.place), device.role) {
                (Some(gone), _) => places.gone.push((gone.clone(), place, queues)),
                (None, saved::Role::Disk) => places.disks.push((place, queues)),
                (None, saved::Role::Net) => places.nets.push((place, Net::pairs_of(queues))),
                (None, saved::Role::Other) => {
                    places.others.extend(Other::of(device.state.kind()).map(|other| (other, place)));
                }
            }
        }
        places
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.disks.len() + self.nets.len() + self.others.len()
    }
}

impl Parts<'_> {
    /// A machine without threads, whose devices nobody has used yet.
    pub(super) fn put_together(mut self, kvm: &Kvm, state: MachineState) -> Result<Shared> {
        let (goes_on, spares) = (state == MachineState::Paused, kvm.spares());
        let mut placed = self.disks_and_nets(kvm.vhost_net(), &spares, goes_on)?;
        let mut balloon = None;
        for (other, place) in std::mem::take(&mut self.places.others) {
            if let Some(device) = self.other(other, place, goes_on, &mut balloon)? {
                placed.push(Placed::new(place, Role::Other(other), device));
            }
        }
        let Self { name, transport, disks, console, memory, vm, processors, .. } = self;
        let serial = serial_port(&vm, console)?;
        // When the machine has all others of its own.
        check_descriptors(disks)?;
        let devices = Devices {
            serial,
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
            spares,
            processors: processors.into_iter().map(Mutex::new).collect(),
            vm,
            devices,
            balloon,
            memory,
            msrs: kvm.msrs(),
            vhost_net: kvm.vhost_net(),
            gate: Gate::new(),
            state: Publisher::new(state),
            threads: Mutex::default(),
            plugging: Mutex::default(),
        })
    }

    fn disks_and_nets(
        &self,
        vhost_net: VhostNet,
        spares: &Arc<Spares>,
        goes_on: bool,
    ) -> Result<Vec<Placed>> {
        let mut placed = Vec::new();
        for (&(place, queues), disk) in self.places.disks.iter().zip(self.disks) {
            let block = Block::new(disk.disk.clone(), &disk.serial, queues);
            let role = Role::Disk(saved::Disk::of(disk), block.engine());
            placed.push(Placed::new(place, role, self.served(place, goes_on, block)?));
        }
        for (&(place, pairs), net) in self.places.nets.iter().zip(self.nets) {
            let device = match KernelNet::new(vhost_net, net, goes_on.then_some(pairs), &self.memory)? {
                Some(device) => self.served(place, goes_on, device)?,
                None => self.served(place, goes_on, Net::new(net, pairs).sharing(spares.clone()))?,
            };
            net.port.set_waker(Some(Arc::new(device.waker()?)));
            placed.push(Placed::new(place, Role::Net(saved::Port::of(net)), device));
        }
        for (gone, place, queues) in &self.places.gone {
            let (role, device) = match gone {
                Gone::Disk(disk) => {
                    let block = Block::new(Gone::disk(disk)?, &disk.serial, *queues);
                    (Role::Disk(disk.clone(), block.engine()), self.served(*place, goes_on, block)?)
                }
                Gone::Net(port) => {
                    let net = Net::new(&Gone::net(port), Net::pairs_of(*queues));
                    (Role::Net(port.clone()), self.served(*place, goes_on, net)?)
                }
            };
            let device = Placed::new(*place, role, device);
            device.hollow_out();
            placed.push(device);
        }
        Ok(placed)
    }

    /// One of the other devices; none where the specification has none.
    fn other(
        &self,
        other: Other,
        place: usize,
        goes_on: bool,
        balloon: &mut Option<(usize, Arc<Wish>)>,
    ) -> Result<Option<VirtioDevice>> {
        let (memory, transport) = (&self.memory, self.transport);
        Ok(Some(match other {
            Other::Entropy => VirtioDevice::new(memory, place, transport, Rng),
            Other::Balloon => {
                let mib: u64 = memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20;
                let wish = Arc::new(Wish::new(mib as u32));
                *balloon = Some((place, wish.clone()));
                VirtioDevice::new(memory, place, transport, Balloon::new(wish))
            }
            Other::Vsock => {
                let Some(spec) = self.vsock else { return Ok(None) };
                let mut device = Vsock::new(spec);
                if goes_on {
                    // With streams that nobody else has.
                    device.break_streams();
                }
                let device = self.served(place, goes_on, device)?;
                spec.port.set_waker(Some(Arc::new(device.waker()?)));
                device
            }
            Other::Console => {
                let Some(port) = self.virtio_console else { return Ok(None) };
                let device = self.served(place, goes_on, Console::new(port.clone()))?.telling();
                let refresh = device.refresher()?;
                if goes_on {
                    // With a terminal that may have another size.
                    refresh();
                }
                port.set_input_notifier(Some(Arc::new(device.waker()?)));
                port.set_resize_notifier(Some(Arc::new(refresh)));
                device
            }
        }))
    }

    /// A device that a thread is going to serve. On PCI, one that goes on where another was saved has no place before
    /// it is told where that was, which may be where another one begins.
    fn served(&self, place: usize, goes_on: bool, device: impl Device + 'static) -> Result<VirtioDevice> {
        match self.transport {
            Transport::Pci if goes_on => VirtioDevice::late(&self.memory, device),
            transport => VirtioDevice::with_thread(&self.vm, &self.memory, place, transport, device),
        }
    }
}

fn serial_port(vm: &VmFd, console: &ConsolePort) -> Result<SerialPort> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
    vm.register_irqfd(&interrupt, layout::SERIAL_IRQ).host("KVM did not take the serial port's interrupt")?;
    Ok(SerialPort::new(console.clone(), interrupt))
}
