//! What can be done to an instance, and what its guest does to it.
//!
//! Every change of state goes through [`Inner::transition`]: committed first, then published.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ami_core::{Digest, Timestamp};
use storage_block::Volume;

use crate::attach::disk_of;
use crate::description::{InstanceDescription, ShutdownBehavior, StateReason};
use crate::error::chain;
use crate::instance::{Cell, Live};
use crate::machine::{Boot, ExitCause, Identity, Machine, MachineErrorKind, MachineSpec, NetSpec};
use crate::network::Guest;
use crate::record::InstanceRecord;
use crate::region::{Inner, StateChange};
use crate::store::Changes;
use crate::supervisor::Message;
use crate::{Error, ErrorKind, InstanceState, InstanceType, Result, Transition};

impl StateChange {
    pub(crate) fn of(description: &InstanceDescription) -> Self {
        Self {
            instance_id: description.id,
            state: description.state,
            reason: description.state_reason.clone(),
            at: SystemTime::now(),
        }
    }
}

impl Inner {
    pub(crate) fn transition(
        &self,
        cell: &Cell,
        live: &mut Live,
        by: Transition,
        reason: Option<StateReason>,
    ) -> Result<()> {
        self.transition_with(cell, live, by, reason, |_| Ok(()))
    }

    /// Moves an instance to its next state, in one commit with what else `change` collects.
    pub(crate) fn transition_with(
        &self,
        cell: &Cell,
        live: &mut Live,
        by: Transition,
        reason: Option<StateReason>,
        change: impl FnOnce(&mut Changes) -> Result<()>,
    ) -> Result<()> {
        let record = live.after(by, reason)?;
        self.store.commit(|c| {
            change(c)?;
            c.put(&record)
        })?;
        self.publish(cell, live, record);
        Ok(())
    }

    /// Tells everybody of a record that was committed.
    pub(crate) fn publish(&self, cell: &Cell, live: &mut Live, record: InstanceRecord) {
        let moved = record.description.state != live.record.description.state;
        // In this order: whoever is told of a state finds it.
        self.directory.set(record.description.clone());
        cell.description.set(record.description.clone());
        if moved {
            cell.console.wake_readers();
            self.announce(&StateChange::of(&record.description));
        }
        live.record = record;
        self.tell_network(&live.record);
    }

    pub(crate) fn stop(&self, cell: &Cell, patience: Duration) -> Result<()> {
        let mut live = cell.hold(self.supervisor.sender());
        if live.record.description.stop_protection {
            return Err(protected(cell, "stopped"));
        }
        match live.record.description.state {
            InstanceState::Stopped => return Ok(()),
            // An earlier stop failed half way; this one finishes it.
            InstanceState::Stopping => {}
            _ => self.transition(cell, &mut live, Transition::Stop, Some(StateReason::user_initiated()))?,
        }
        let asked = live.machine.as_deref().filter(|machine| asked_to_power_off(*machine, patience));
        if let Some(state) = asked.map(Machine::state) {
            let generation = live.generation;
            // Not held meanwhile: others may terminate it, or stop it with less patience.
            drop(live);
            // Whether it obeyed or not, the machine is dropped next.
            let _ = state.wait(Instant::now() + patience, |s| s.exit_cause().is_some());
            live = cell.hold(self.supervisor.sender());
            if live.generation != generation || live.record.description.state == InstanceState::Stopped {
                return Ok(());
            }
        }
        self.finish_stop(cell, &mut live, StateReason::user_initiated())
    }

    fn finish_stop(&self, cell: &Cell, live: &mut Live, reason: StateReason) -> Result<()> {
        live.end_machine()?;
        self.power_off(live);
        self.transition(cell, live, Transition::Stopped, Some(reason))
    }

    pub(crate) fn start(&self, cell: &Cell) -> Result<()> {
        let mut live = cell.hold(self.supervisor.sender());
        if live.record.description.state == InstanceState::Running {
            if live.machine.is_some() {
                return Ok(());
            }
            // Its machine was lost, and that could not be recorded then.
            let reason = StateReason::new("Server.InternalError", "the machine was lost");
            self.transition(cell, &mut live, Transition::Lost, Some(reason))?;
        }
        let mut record = live.after(Transition::Start, None)?;
        record.description.launch_time = Timestamp::now();
        live.claim = Some(self.meter.claim(&record.description.instance_type)?);
        let begun = self.store.commit(|c| c.put(&record));
        begun.inspect_err(|_| live.claim = None)?;
        self.publish(cell, &mut live, record);
        let begun = self.power_on_again(cell, &mut live);
        begun.and_then(|()| self.transition(cell, &mut live, Transition::Started, None)).or_else(|e| {
            self.power_off(&mut live);
            let reason = StateReason::new("Server.InternalError", chain(&e));
            self.transition(cell, &mut live, Transition::StartFailed, Some(reason))?;
            Err(e)
        })
    }

    pub(crate) fn reboot(&self, cell: &Cell) -> Result<()> {
        let mut live = cell.hold(self.supervisor.sender());
        let state = live.record.description.state;
        if state != InstanceState::Running {
            let what = format!("{} is {state}, in which it cannot be rebooted", cell.id);
            return Err(Error::new(ErrorKind::IncorrectInstanceState, what));
        }
        self.reset(cell, &mut live)
    }

    /// Gives a running instance a new machine, or stops it where that fails.
    fn reset(&self, cell: &Cell, live: &mut Live) -> Result<()> {
        cell.begin_boot();
        let ended = live.end_machine();
        // What it takes of the host it keeps.
        let claim = live.claim.take();
        self.power_off(live);
        live.claim = claim;
        ended.and_then(|()| self.power_on_again(cell, live)).inspect_err(|e| {
            let reason = StateReason::new("Server.InternalError", format!("cannot reboot: {}", chain(e)));
            self.lose(cell, live, reason);
        })
    }

    pub(crate) fn terminate(&self, cell: &Cell) -> Result<()> {
        self.forget_terminated(Instant::now());
        let mut live = cell.hold(self.supervisor.sender());
        let description = &live.record.description;
        let protection = description.termination_protection || description.stop_protection;
        // One that is on its way goes it to the end.
        if protection && description.state.after(Transition::Terminate).is_some() {
            return Err(protected(cell, "terminated"));
        }
        self.terminate_held(cell, &mut live, StateReason::user_initiated())
    }

    fn terminate_held(&self, cell: &Cell, live: &mut Live, reason: StateReason) -> Result<()> {
        match live.record.description.state {
            InstanceState::Terminated => return Ok(()),
            // An earlier termination failed half way; this one finishes it.
            InstanceState::ShuttingDown => {}
            _ => self.transition(cell, live, Transition::Terminate, Some(reason.clone()))?,
        }
        // A volume that goes on has what the guest was told it has; where that fails, the end is none the less.
        if let Err(e) = live.end_machine_of(|attachment| !attachment.delete_on_termination) {
            tracing::error!(instance = %cell.id, error = chain(&e), "what a kept volume should hold is lost");
        }
        self.power_off(live);
        let doomed = live.record.description.attachments.iter().filter(|a| a.delete_on_termination);
        let doomed: Vec<_> = doomed.map(|a| a.volume_id).collect();
        self.remove_volumes(&doomed)?;
        self.release_place(&live.record.description);
        self.transition(cell, live, Transition::Terminated, Some(reason))?;
        cell.set_terminated(Instant::now());
        Ok(())
    }

    /// A machine has ended by itself, or by its guest.
    pub(crate) fn machine_ended(&self, id: ami_core::InstanceId, generation: u64) {
        let Some(cell) = self.cells().get(&id).cloned() else { return };
        // Whoever holds the instance reports the end again when done.
        let Some(mut live) = cell.try_hold(self.supervisor.sender()) else { return };
        if live.generation != generation {
            return;
        }
        let Some(cause) = live.machine.as_ref().and_then(|m| m.state().get().exit_cause().cloned()) else {
            return;
        };
        if let Err(e) = self.follow(&cell, &mut live, &cause) {
            tracing::error!(instance = %id, %cause, error = chain(&e), "cannot follow a machine's end");
        }
    }

    fn follow(&self, cell: &Cell, live: &mut Live, cause: &ExitCause) -> Result<()> {
        if live.record.description.state == InstanceState::Stopping {
            // It was asked to; whoever did need not be the first to see it.
            return self.finish_stop(cell, live, StateReason::user_initiated());
        }
        match cause {
            ExitCause::Reset => self.reset(cell, live),
            ExitCause::PowerOff => {
                let reason = StateReason::new("Client.InstanceInitiatedShutdown", cause.to_string());
                match live.record.description.shutdown_behavior {
                    ShutdownBehavior::Terminate => self.terminate_held(cell, live, reason),
                    ShutdownBehavior::Stop => {
                        self.transition(cell, live, Transition::Stop, Some(reason.clone()))?;
                        self.finish_stop(cell, live, reason)
                    }
                }
            }
            _ => {
                let code =
                    if cause.is_guest_crash() { "Client.InternalError" } else { "Server.InternalError" };
                self.lose(cell, live, StateReason::new(code, cause.to_string()));
                Ok(())
            }
        }
    }

    /// Gives up a running instance whose machine is of no more use.
    pub(crate) fn lose(&self, cell: &Cell, live: &mut Live, reason: StateReason) {
        if let Err(e) = live.end_machine() {
            tracing::error!(instance = %cell.id, error = chain(&e), "what a lost instance had written is lost too");
        }
        self.power_off(live);
        if let Err(e) = self.transition(cell, live, Transition::Lost, Some(reason)) {
            tracing::error!(instance = %cell.id, error = chain(&e), "cannot record that an instance was lost");
        }
    }

    /// Opens the volumes and boots what the root volume holds now.
    fn power_on_again(&self, cell: &Cell, live: &mut Live) -> Result<()> {
        live.volumes = self.open_volumes(live)?;
        let boot = match (&live.record.direct_boot, live.volumes.first()) {
            (Some(plan), _) => self.boot.boot(plan)?,
            (None, Some(root)) => self.boot.boot_from_disk(&root.disk())?,
            (None, None) => return Err(no_root_volume()),
        };
        self.power_on(cell, live, boot)
    }

    pub(crate) fn open_volumes(&self, live: &Live) -> Result<Vec<Volume>> {
        let attachments = live.record.description.attachments.iter();
        let opened = attachments.map(|a| {
            Volume::open(&self.paths.volume(a.volume_id), &self.blocks)
                .map_err(|e| Error::storage(e, format!("cannot open the volume {}", a.volume_id)))
        });
        opened.collect()
    }

    /// Makes a machine on the volumes that are open, and starts it.
    pub(crate) fn power_on(&self, cell: &Cell, live: &mut Live, boot: Boot) -> Result<()> {
        cell.begin_boot();
        let runtime_dir = self.paths.instance(cell.id);
        fs::create_dir_all(&runtime_dir)
            .map_err(|e| Error::io(e, format!("cannot make {}", runtime_dir.display())))?;
        let bandwidth = live.record.description.instance_type.ebs_bandwidth().filter(|_| self.ebs_limits);
        live.limiters = bandwidth.map(|bandwidth| bandwidth.limiters().to_vec()).unwrap_or_default();
        let description = &live.record.description;
        let mut spec =
            MachineSpec::new(cell.id.to_string(), description.architecture, boot, cell.console.port());
        spec.vcpus = description.instance_type.vcpus();
        spec.memory_mib = description.instance_type.memory_mib();
        spec.runtime_dir = runtime_dir;
        spec.identity = Some(identity(description));
        spec.disks = (description.attachments.iter().zip(&live.volumes))
            .map(|(a, v)| disk_of(live, a.volume_id, v))
            .collect();
        spec.nets.extend(self.plug(&live.record)?);
        self.limit(&mut spec.nets, &description.instance_type);
        let failed = |e| Error::machine(e, format!("cannot start a machine for {}", cell.id));
        let machine = self.hypervisor.create(spec).map_err(failed)?;
        live.generation += 1;
        let (ended, message) = (self.supervisor.sender(), Message::Ended(cell.id, live.generation));
        machine.state().subscribe(move |state| {
            if state.exit_cause().is_some() {
                // A supervisor that is gone follows nothing.
                let _ = ended.send(message);
            }
        });
        machine.start().map_err(failed)?;
        cell.booted(machine.state());
        live.machine = Some(machine);
        Ok(())
    }

    /// Holds the ports of an instance, together, to what its type's network gives.
    fn limit(&self, ports: &mut [NetSpec], hardware: &InstanceType) {
        let on = self.network_limits && self.hypervisor.capabilities().net_limits;
        let Some(bandwidth) = hardware.network_bandwidth().filter(|_| on) else { return };
        let (receive, transmit) = (bandwidth.limits(), bandwidth.limits());
        for port in ports {
            port.receive_limits = receive.clone();
            port.transmit_limits = transmit.clone();
        }
    }

    /// The port of an instance's machine, if it has a place in a network.
    fn plug(&self, record: &InstanceRecord) -> Result<Option<NetSpec>> {
        let Some(placement) = &record.description.network else { return Ok(None) };
        let network = self.network.as_deref().ok_or_else(|| {
            let what =
                format!("{} is in a network, and the region was opened without one", record.description.id);
            Error::new(ErrorKind::Unsupported, what)
        })?;
        let user_data = record.user_data()?;
        network.plug(Guest::new(&record.description, placement, user_data.as_deref())).map(Some)
    }

    /// Tells the network what is now known of an instance that runs.
    fn tell_network(&self, record: &InstanceRecord) {
        let running = record.description.state == InstanceState::Running;
        if let (true, Some(network), Some(place)) = (running, &self.network, &record.description.network) {
            let user_data = record.user_data().unwrap_or_default();
            network.update(Guest::new(&record.description, place, user_data.as_deref()));
        }
    }

    /// Ends the machine, if there is one, and closes the volumes.
    pub(crate) fn power_off(&self, live: &mut Live) {
        live.machine = None;
        live.volumes.clear();
        live.claim = None;
        let dir = self.paths.instance(live.record.description.id);
        if let Err(e) = fs::remove_dir_all(&dir) {
            if e.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(dir = %dir.display(), error = chain(&e), "cannot remove an instance's directory");
            }
        }
    }
}

/// What an instance of EC2 is told of itself: its UUID and serial number are the same and begin with
/// `ec2`, by which cloud-init and others know where they run (EC2 User Guide, "Identify EC2 instances").
fn identity(description: &InstanceDescription) -> Identity {
    const VENDOR: &str = "Amazon EC2";
    let id = description.id.to_string();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&Digest::of(id.as_bytes()).as_bytes()[..16]);
    (uuid[0], uuid[1]) = (0xec, 0x20 | uuid[1] & 0xf);
    let mut identity = Identity::new(uuid);
    identity.vendor = VENDOR.to_owned();
    // A type of one's own may have any name.
    let name = description.instance_type.name().chars().filter(|c| !c.is_control());
    for c in name {
        if identity.product.len() + c.len_utf8() > Identity::MAX_TEXT {
            break;
        }
        identity.product.push(c);
    }
    identity.asset_tag = id;
    identity
}

pub(crate) fn no_root_volume() -> Error {
    Error::new(ErrorKind::NotBootable, "the instance has no root volume")
}

/// Presses the power button, if there is one and patience to wait for what comes of it; says whether.
fn asked_to_power_off(machine: &dyn Machine, patience: Duration) -> bool {
    if patience.is_zero() {
        return false;
    }
    let pressed = machine.power_button();
    match &pressed {
        Ok(()) => {}
        Err(e) if e.kind() == MachineErrorKind::Unsupported => {
            tracing::info!("the machine has no power button; it is ended at once");
        }
        Err(e) => tracing::warn!(error = chain(e), "cannot press the power button"),
    }
    pressed.is_ok()
}

fn protected(cell: &Cell, against: &str) -> Error {
    let what = format!("{} may not be {against}; take back its protection first", cell.id);
    Error::new(ErrorKind::OperationNotPermitted, what)
}

/// Lets the compiler check that handles go between threads.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<Inner>>();
};
