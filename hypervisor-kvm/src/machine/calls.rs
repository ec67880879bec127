//! What a machine's owner asks of it.

use std::fs::File;
use std::sync::PoisonError;

use instance_core::machine::{
    Detach, DiskEngine, DiskSpec, ExitCause, Machine, MachineError, MachineState, NetSpec, VmExits,
};
use instance_core::net::MacAddress;
use instance_core::watch::Watch;

use super::KvmMachine;
use crate::error::{Result, unsupported};
use crate::exits::Exits;
use crate::saved;
use crate::thread::Thread;

impl Machine for KvmMachine {
    fn state(&self) -> Watch<MachineState> {
        self.shared.state.watch()
    }

    fn start(&self) -> Result<()> {
        let _action = self.begin("start", &MachineState::Created)?;
        self.publish("start", MachineState::Running)?;
        self.shared.gate.open();
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        let _action = self.begin("pause", &MachineState::Running)?;
        self.shared.gate.close();
        self.shared.wake();
        self.shared.gate.wait_until_still();
        self.publish("pause", MachineState::Paused)
    }

    fn resume(&self) -> Result<()> {
        let _action = self.begin("resume", &MachineState::Paused)?;
        self.publish("resume", MachineState::Running)?;
        self.shared.gate.open();
        Ok(())
    }

    fn power_button(&self) -> Result<()> {
        let _action = self.begin("press the power button of", &MachineState::Running)?;
        self.shared.devices.press_power_button(&self.shared.vm);
        Ok(())
    }

    fn attach_disk(&self, disk: DiskSpec) -> Result<()> {
        self.check_hot_plug("take no disks")?;
        disk.check()?;
        let _action = self.actions.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.attach_disk(&disk)
    }

    fn detach_disk(&self, serial: &str, how: Detach) -> Result<()> {
        self.check_hot_plug("give up no disks")?;
        let _action = self.begin_force(&how);
        self.shared.detach_disk(serial, how)
    }

    fn attach_net(&self, net: NetSpec) -> Result<()> {
        self.check_hot_plug("take no network ports")?;
        net.check()?;
        let _action = self.actions.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.attach_net(&net)
    }

    fn detach_net(&self, mac: MacAddress, how: Detach) -> Result<()> {
        self.check_hot_plug("give up no network ports")?;
        let _action = self.begin_force(&how);
        self.shared.detach_net(mac, how)
    }

    fn disk_grown(&self, serial: &str) -> Result<()> {
        let grown = self.shared.find_live("grow a disk of", |placed| placed.is_disk(serial))?;
        let grown = grown.ok_or_else(|| MachineError::no_such_disk(serial))?;
        grown.device.refresh(&self.shared.vm);
        Ok(())
    }

    fn save(&self, to: &File) -> Result<()> {
        let Some(msrs) = &self.shared.msrs else {
            return Err(unsupported("this host's KVM does not tell all of a machine's state"));
        };
        let _action = self.begin("save", &MachineState::Paused)?;
        saved::write(to, &self.shared.save(msrs)?, &self.shared.memory)
    }

    fn vm_exits(&self) -> Vec<VmExits> {
        self.shared.exits.iter().map(Exits::read).collect()
    }

    fn disk_engines(&self) -> Vec<DiskEngine> {
        self.shared.devices.virtio.all().iter().filter_map(|placed| placed.disk_engine()).collect()
    }

    fn set_balloon(&self, mib: u32) -> Result<()> {
        match self.shared.state.get() {
            MachineState::Running | MachineState::Paused => {}
            state => return Err(MachineError::wrong_state("ask for memory of", &state)),
        }
        self.shared.balloon()?.1.set_mib(mib)?;
        self.shared.refresh_balloon();
        Ok(())
    }

    fn balloon(&self) -> Result<u32> {
        Ok(self.shared.balloon()?.1.actual_mib())
    }

    /// Not in turn with other actions: it ends what they wait for.
    fn reset(&self) -> Result<()> {
        let wrong_state = |state: &MachineState| MachineError::wrong_state("reset", state);
        match self.shared.state.get() {
            MachineState::Running | MachineState::Paused => self.end(ExitCause::Reset),
            state => return Err(wrong_state(&state)),
        }
        // A guest may have been faster, by its own end. Of a hook's call nothing has come yet.
        match self.shared.state.get() {
            state @ MachineState::Exited(_) if state.exit_cause() != Some(&ExitCause::Reset) => {
                Err(wrong_state(&state))
            }
            _ => Ok(()),
        }
    }

    fn kill(&self) {
        self.end(ExitCause::Killed);
    }
}

impl KvmMachine {
    /// Ends the machine and gives back its threads; the first cause stays.
    fn end(&self, cause: ExitCause) {
        self.shared.end(cause);
        // A watcher's hook runs in the last thread to leave, which cannot wait for itself.
        if self.shared.is_own_thread() {
            return;
        }
        self.shared.gate.wait_until_over();
        let _nobody_comes = self.shared.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let threads = std::mem::take(&mut *self.shared.threads());
        // One that panicked has ended the machine as well: see `Leaving`.
        let slots = &self.shared.devices.virtio;
        let placed = slots.all();
        let of_devices = placed.iter().filter_map(|placed| placed.thread().take()).chain(slots.departed());
        threads.vcpus.into_iter().chain(of_devices).for_each(Thread::join);
    }
}
