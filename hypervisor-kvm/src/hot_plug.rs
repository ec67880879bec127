//! Disks and network ports that come and go while a machine runs on PCI.

use std::sync::{Arc, PoisonError};

use instance_core::machine::{Detach, DiskSpec, MachineError, MachineState, NetSpec};
use instance_core::net::MacAddress;

use crate::Transport;
use crate::error::{Result, unsupported};
use crate::machine::Shared;
use crate::saved;
use crate::slots::{Other, Placed, Role};
use crate::thread::Thread;
use crate::virtio::{Block, Device, KernelNet, Net, VirtioDevice, check_descriptors};

impl Shared {
    /// Gives the guest one more disk. One at a time calls this.
    pub(crate) fn attach_disk(self: &Arc<Self>, disk: &DiskSpec) -> Result<()> {
        const ACTION: &str = "attach a disk to";
        if self.find_live(ACTION, |placed| placed.is_disk(&disk.serial))?.is_some() {
            return Err(MachineError::disk_exists(&disk.serial));
        }
        check_descriptors([disk])?;
        let block = Block::new(disk.disk.clone(), &disk.serial, self.processors());
        let role = Role::Disk(saved::Disk::of(disk), block.engine());
        self.plug(ACTION, role, block, |_| Ok(()))
    }

    /// Gives the guest one more network port. One at a time calls this.
    pub(crate) fn attach_net(self: &Arc<Self>, net: &NetSpec) -> Result<()> {
        const ACTION: &str = "attach a network port to";
        if self.find_live(ACTION, |placed| placed.is_net(net.mac))?.is_some() {
            return Err(MachineError::port_exists(net.mac));
        }
        let role = Role::Net(saved::Port::of(net));
        let connect = |device: &VirtioDevice| {
            net.port.set_waker(Some(Arc::new(device.waker()?)));
            Ok(())
        };
        match KernelNet::new(self.vhost_net, net, None, &self.memory)? {
            Some(device) => self.plug(ACTION, role, device, connect),
            None => {
                let net = Net::new(net, self.processors()).sharing(self.spares.clone());
                self.plug(ACTION, role, net, connect)
            }
        }
    }

    /// Puts a device into a place that is free, and tells the guest when it is `connected`.
    fn plug(
        self: &Arc<Self>,
        action: &str,
        role: Role,
        device: impl Device + 'static,
        connect: impl FnOnce(&VirtioDevice) -> Result<()>,
    ) -> Result<()> {
        let slots = &self.devices.virtio;
        self.join_departed();
        let counts = |placed: &Placed| !matches!(placed.role, Role::Other(_)) && !placed.is_hollow();
        let taken = slots.all().iter().filter(|placed| counts(placed)).count();
        let is_console = |placed: &Placed| matches!(placed.role, Role::Other(Other::Console));
        let most = Transport::Pci.device_places(slots.find(is_console).is_some());
        // The first is for a disk that stays.
        let most = most - usize::from(slots.get(0).is_none());
        let Some(number) = slots.free().filter(|_| taken < most) else {
            let why = if taken < most {
                "the places that are left are held by what was taken by force, until the guest lets go of it"
            } else {
                "that is all there is room for"
            };
            return Err(unsupported(format!("the machine has {taken} disks and network ports, and {why}")));
        };
        let device = VirtioDevice::late(&self.memory, device)?;
        let _plugging = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.gate.join_late() {
            return Err(MachineError::wrong_state(action, &self.state.get()));
        }
        let placed = slots.put(Placed::new(number, role, device));
        self.spawn_device(&placed).inspect_err(|_| slots.withdraw(&self.vm, &placed))?;
        if let Err(error) = connect(&placed.device) {
            slots.withdraw(&self.vm, &placed);
            self.join_departed();
            return Err(error);
        }
        slots.announce(&placed);
        self.devices.tell_of_hot_plug(&self.vm);
        Ok(())
    }

    /// Takes a disk from the guest.
    pub(crate) fn detach_disk(&self, serial: &str, how: Detach) -> Result<()> {
        const ACTION: &str = "detach a disk from";
        let missing = || MachineError::no_such_disk(serial);
        let placed = self.find_live(ACTION, |placed| placed.is_disk(serial))?.ok_or_else(missing)?;
        if !placed.can_go() {
            return Err(unsupported(format!("disk {serial:?} is the first disk, which stays")));
        }
        self.unplug(ACTION, &placed, how, || MachineError::held(serial), missing)
    }

    /// Takes a network port from the guest.
    pub(crate) fn detach_net(&self, mac: MacAddress, how: Detach) -> Result<()> {
        const ACTION: &str = "detach a network port from";
        let missing = || MachineError::no_such_port(mac);
        let placed = self.find_live(ACTION, |placed| placed.is_net(mac))?.ok_or_else(missing)?;
        self.unplug(ACTION, &placed, how, || MachineError::port_held(mac), missing)
    }

    fn unplug(
        &self,
        action: &str,
        placed: &Arc<Placed>,
        how: Detach,
        held: impl FnOnce() -> MachineError,
        missing: impl FnOnce() -> MachineError,
    ) -> Result<()> {
        let slots = &self.devices.virtio;
        match how {
            Detach::Ask { until } => {
                slots.ask_to_go(placed);
                self.devices.tell_of_hot_plug(&self.vm);
                let ended = || self.state.get().exit_cause().is_some();
                if !slots.wait_until_gone(placed, until, ended) {
                    return Err(held());
                }
                if slots.is_in_place(placed) {
                    return Err(MachineError::wrong_state(action, &self.state.get()));
                }
            }
            _ => {
                if !placed.hollow_out() {
                    return Err(missing());
                }
                slots.ask_to_go(placed);
                self.devices.tell_of_hot_plug(&self.vm);
                return Ok(());
            }
        }
        self.join_departed();
        Ok(())
    }

    /// The device of a machine that is running or paused of which `is` says so, if there is one.
    pub(crate) fn find_live(
        &self,
        action: &str,
        is: impl Fn(&Placed) -> bool,
    ) -> Result<Option<Arc<Placed>>> {
        match self.state.get() {
            MachineState::Running | MachineState::Paused => Ok(self.devices.virtio.find(is)),
            state => Err(MachineError::wrong_state(action, &state)),
        }
    }

    /// Waits for the threads of devices that are no longer there.
    fn join_departed(&self) {
        self.gate.nudge();
        self.devices.virtio.departed().into_iter().for_each(Thread::join);
    }
}
