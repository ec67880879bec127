//! Disks that come and go while a machine runs on PCI.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use instance_core::machine::{Detach, DiskSpec, MachineError, MachineErrorKind};

use crate::Transport;
use crate::error::{Result, unsupported};
use crate::machine::Shared;
use crate::saved;
use crate::slots::{Other, Placed, Role};
use crate::thread::Thread;
use crate::virtio::{Block, VirtioDevice};

impl Shared {
    /// Gives the guest one more disk. One at a time calls this.
    pub(crate) fn attach(self: &Arc<Self>, disk: &DiskSpec) -> Result<()> {
        const ACTION: &str = "attach a disk to";
        let slots = &self.devices.virtio;
        match self.live_disk(ACTION, &disk.serial) {
            Ok(_) => return Err(MachineError::disk_exists(&disk.serial)),
            Err(e) if e.kind() == MachineErrorKind::NoSuchDisk => {}
            Err(e) => return Err(e),
        }
        self.join_departed();
        let taken = slots
            .all()
            .iter()
            .filter(|placed| !matches!(placed.role, Role::Other(_)) && !placed.is_hollow())
            .count();
        let is_console = |placed: &Placed| matches!(placed.role, Role::Other(Other::Console));
        let most = Transport::Pci.device_places(slots.find(is_console).is_some());
        let Some(number) = slots.free().filter(|_| taken < most) else {
            return Err(unsupported(format!(
                "the machine has {most} disks and network ports, which is all there is room for"
            )));
        };
        let block = Block::new(disk.disk.clone(), &disk.serial, self.processors());
        let device = VirtioDevice::late(&self.memory, block)?;
        let _plugging = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.gate.join_late() {
            return Err(MachineError::wrong_state(ACTION, &self.state.get()));
        }
        let placed = slots.put(Placed::new(number, Role::Disk(saved::Disk::of(disk)), device));
        self.spawn_device(&placed).inspect_err(|_| slots.withdraw(&self.vm, &placed))?;
        slots.announce(&placed);
        self.devices.tell_of_hot_plug(&self.vm);
        Ok(())
    }

    /// Takes a disk from the guest.
    pub(crate) fn detach(&self, serial: &str, how: Detach) -> Result<()> {
        const ACTION: &str = "detach a disk from";
        let slots = &self.devices.virtio;
        let placed = self.live_disk(ACTION, serial)?;
        if !placed.can_go() {
            return Err(unsupported(format!("disk {serial:?} is the first disk, which stays")));
        }
        match how {
            Detach::Ask { until } => {
                slots.ask_to_go(&placed);
                self.devices.tell_of_hot_plug(&self.vm);
                let ended = || self.state.get().exit_cause().is_some();
                if !slots.wait_until_gone(&placed, until, ended) {
                    return Err(MachineError::held(serial));
                }
                if slots.is_in_place(&placed) {
                    return Err(MachineError::wrong_state(ACTION, &self.state.get()));
                }
            }
            _ => {
                if placed.hollow.swap(true, Ordering::AcqRel) {
                    return Err(MachineError::no_such_disk(serial));
                }
                // Waits for the request that is under way.
                placed.device.end();
                slots.ask_to_go(&placed);
                self.devices.tell_of_hot_plug(&self.vm);
                return Ok(());
            }
        }
        self.join_departed();
        Ok(())
    }

    /// Waits for the threads of devices that are no longer there.
    fn join_departed(&self) {
        self.gate.nudge();
        self.devices.virtio.departed().into_iter().for_each(Thread::join);
    }
}
