//! What can be done to an instance, and what its guest does to it.
//!
//! Every change of state goes through [`Inner::transition`]: committed first, then published.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ami_core::{InstanceId, RootDeviceType, Timestamp};

use crate::description::{InstanceDescription, ShutdownBehavior, StateReason, user_initiated};
use crate::error::chain;
use crate::instance::{Cell, Hold, Live, PowerOffFor};
use crate::machine::{ExitCause, Machine, MachineErrorKind};
use crate::record::InstanceRecord;
use crate::region::Inner;
use crate::state_changes::StateChange;
use crate::store::Changes;
use crate::{Error, ErrorKind, InstanceState, Result, Transition};

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
        let woken = live.record.saved.is_some() && record.saved.is_none();
        // In this order: whoever is told of a state finds it.
        let told = record.told();
        self.directory.set(told.clone());
        cell.description.set(told);
        if moved {
            cell.console.wake_readers();
            self.listeners.tell(&StateChange::of(&record.description));
        }
        let before = std::mem::replace(&mut live.record, record);
        for attachment in before.description.attachments.iter().chain(&live.record.description.attachments) {
            self.tell_volume(attachment.volume_id);
        }
        if woken {
            self.remove_saved(cell.id);
        }
        self.tell_network(&live.record);
    }

    pub(crate) fn stop(&self, cell: &Cell, patience: Duration) -> Result<()> {
        let live = cell.hold(self.supervisor.reports());
        check_ebs_root(&live.record.description, "stopped")?;
        check_stoppable(&live.record.description)?;
        self.stop_held(cell, live, patience, user_initiated())
    }

    pub(crate) fn stop_held<'a>(
        &self,
        cell: &'a Cell,
        mut live: Hold<'a>,
        patience: Duration,
        reason: StateReason,
    ) -> Result<()> {
        match live.record.description.state {
            InstanceState::Stopped => return Ok(()),
            // It is being stopped in another way, or an earlier stop failed half way; this one finishes it.
            InstanceState::Stopping => {}
            _ => self.transition(cell, &mut live, Transition::Stop, Some(reason.clone()))?,
        }
        let generation = live.generation;
        live = self.let_power_off(cell, live, patience);
        if live.generation != generation || live.record.description.state == InstanceState::Stopped {
            return Ok(());
        }
        // Whoever terminates it meanwhile may have more patience.
        live.after(Transition::Stopped, None)?;
        self.finish_stop(cell, &mut live, reason)
    }

    /// Asks the guest to power itself off, if there is a machine and patience to wait for what comes of it, and waits. The
    /// instance is not held meanwhile: others may terminate it, or stop it with less patience.
    fn let_power_off<'a>(&self, cell: &'a Cell, live: Hold<'a>, patience: Duration) -> Hold<'a> {
        let asked = live.machine.as_deref().filter(|machine| asked_to_power_off(*machine, patience));
        let Some(state) = asked.map(Machine::state) else { return live };
        drop(live);
        // Whether it obeys or not, its machine is dropped next.
        let _ = state.wait(after(patience), |s| s.exit_cause().is_some());
        cell.hold(self.supervisor.reports())
    }

    fn finish_stop(&self, cell: &Cell, live: &mut Live, reason: StateReason) -> Result<()> {
        let ended = live.machine.as_ref().and_then(|machine| machine.state().get().exit_cause().cloned());
        live.record.shut_down |= ended == Some(ExitCause::PowerOff);
        live.end_machine()?;
        self.power_off(live);
        self.transition(cell, live, Transition::Stopped, Some(reason))?;
        // An earlier hibernation that failed at its end may have left something.
        self.remove_saved(cell.id);
        Ok(())
    }

    pub(crate) fn start(&self, cell: &Cell) -> Result<()> {
        let mut live = cell.hold(self.supervisor.reports());
        check_ebs_root(&live.record.description, "started")?;
        match (live.record.description.state, &live.machine) {
            (InstanceState::Running, Some(_)) => return Ok(()),
            // Its machine was lost, or could not be made when it was last started, and that could not be recorded then.
            (InstanceState::Running | InstanceState::Pending, None) => {
                let reason = StateReason::new("Server.InternalError", "the machine was lost");
                self.transition(cell, &mut live, Transition::Lost, Some(reason))?;
            }
            _ => {}
        }
        let mut record = live.after(Transition::Start, None)?;
        record.description.check_root_volume()?;
        record.description_mut().launch_time = Timestamp::now();
        live.claim = Some(self.meter.claim(&record.description.instance_type)?);
        let begun = self.store.commit(|c| c.put(&record));
        begun.inspect_err(|_| live.claim = None)?;
        self.publish(cell, &mut live, record);
        let begun = self.power_on_again(cell, &mut live);
        let begun = begun.and_then(|lost| self.transition(cell, &mut live, Transition::Started, lost));
        begun.or_else(|e| {
            self.power_off(&mut live);
            let reason = StateReason::new("Server.InternalError", chain(&e));
            self.transition(cell, &mut live, Transition::StartFailed, Some(reason))?;
            Err(e)
        })?;
        self.go_on(cell, &mut live)
    }

    pub(crate) fn reboot(&self, cell: &Cell, patience: Duration) -> Result<()> {
        let mut live = cell.hold(self.supervisor.reports());
        let generation = live.generation;
        check_running(&live)?;
        // Who makes an image has it boot anew, too.
        if live.powers_off_for().is_none() {
            live.set_powers_off_for(Some(PowerOffFor::Reboot));
        }
        live = self.let_power_off(cell, live, patience);
        // Of the machine that is there by now another may have asked it.
        if live.generation == generation && live.powers_off_for() == Some(PowerOffFor::Reboot) {
            live.set_powers_off_for(None);
        }
        check_running(&live)?;
        // Whoever saw its guest power itself off may have been faster.
        if live.generation == generation { self.reset(cell, &mut live) } else { Ok(()) }
    }

    /// Gives a running instance a new machine, or stops it where that fails.
    pub(crate) fn reset(&self, cell: &Cell, live: &mut Live) -> Result<()> {
        cell.begin_boot();
        let ended = live.end_machine();
        self.power_off_for_now(live);
        let made = ended.and_then(|()| self.power_on_again(cell, live));
        made.map(drop).inspect_err(|e| {
            let reason = StateReason::new("Server.InternalError", format!("cannot reboot: {}", chain(e)));
            self.lose(cell, live, reason);
        })
    }

    pub(crate) fn terminate(&self, cell: &Cell, patience: Duration) -> Result<()> {
        self.forget_terminated(Instant::now());
        let mut live = cell.hold(self.supervisor.reports());
        let description = &live.record.description;
        let protection = description.termination_protection || description.stop_protection;
        // One that is on its way goes it to the end.
        if protection && description.state.after(Transition::Terminate).is_some() {
            return Err(protected(description, "terminated"));
        }
        let reason = user_initiated();
        if live.machine.is_some() && !patience.is_zero() {
            if description.state != InstanceState::ShuttingDown {
                self.transition(cell, &mut live, Transition::Terminate, Some(reason.clone()))?;
            }
            live = self.let_power_off(cell, live, patience);
        }
        self.terminate_held(cell, &mut live, reason)
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
        let removed = self.remove_volumes(&doomed);
        // Their files may have stayed when their records have gone.
        doomed.iter().for_each(|id| self.tell_volume(*id));
        removed?;
        self.transition(cell, live, Transition::Terminated, Some(reason))?;
        // Once only: by another time it may be another's.
        self.release_place(&live.record.description);
        self.terminated.add(cell.id, live.record.ended.unwrap_or_else(Timestamp::now));
        Ok(())
    }

    /// A machine has ended by itself, or by its guest.
    pub(crate) fn machine_ended(&self, id: InstanceId, generation: u64) {
        let Some(cell) = self.cells().get(&id).cloned() else { return };
        // Whoever holds the instance reports the end again when done.
        let Some(mut live) = cell.try_hold(self.supervisor.reports()) else { return };
        // One whose guest shuts down for an image is started again by who makes that.
        if live.generation != generation || live.powers_off_for() == Some(PowerOffFor::Image) {
            return;
        }
        let Some(cause) = live.machine.as_ref().and_then(|m| m.state().get().exit_cause().cloned()) else {
            return;
        };
        if let Err(e) = self.follow(&cell, &mut live, &cause) {
            tracing::error!(instance = %id, %cause, error = chain(&e), "cannot follow a machine's end");
        }
    }

    /// Guests have begun to write to their volumes, which are to become durable, and all others of their instances too; or
    /// they have shown their host keys.
    pub(crate) fn settle(&self, ids: &BTreeSet<InstanceId>) {
        for id in ids {
            self.settle_one(*id);
        }
        // From here on a volume that is missing or damaged is not made again.
        if let Err(e) = self.store.commit_later() {
            tracing::warn!(error = chain(&e), "cannot note what became of instances");
        }
    }

    fn settle_one(&self, id: InstanceId) {
        let Some(cell) = self.cells().get(&id).cloned() else { return };
        // Whoever holds the instance tells of it again when done.
        let Some(mut live) = cell.try_hold(self.supervisor.reports()) else { return };
        if let Some(host_keys) = cell.shown_host_keys(&live.record) {
            let record = InstanceRecord { host_keys, ..live.record.clone() };
            match self.store.later(|c| c.put(&record)) {
                Ok(()) => live.record = record,
                Err(e) => tracing::warn!(instance = %id, error = chain(&e), "cannot keep host keys"),
            }
        }
        if live.record.launched || live.volumes.is_empty() {
            return;
        }
        if let Err(e) = live.settle_written() {
            return self.lose(&cell, &mut live, StateReason::new("Server.InternalError", chain(&e)));
        }
        let settled = live.settle().and_then(|()| self.store.later(|c| c.put(&live.record)));
        let waited = std::mem::replace(&mut live.waits_for_room, settled.is_err());
        if let (Err(e), false) = (settled, waited) {
            // One that cannot be made is as whole as it was. It is tried again, by who tells of the instance again.
            tracing::warn!(instance = %id, error = chain(&e), "a volume cannot be made yet");
        }
    }

    fn follow(&self, cell: &Cell, live: &mut Live, cause: &ExitCause) -> Result<()> {
        if live.record.description.state == InstanceState::Stopping {
            // It was asked to, for the reason that it has; whoever did need not be the first to see it.
            let reason = live.record.description.state_reason.clone();
            return self.finish_stop(cell, live, reason.unwrap_or_else(user_initiated));
        }
        if live.record.description.state == InstanceState::ShuttingDown {
            let reason = live.record.description.state_reason.clone();
            return self.terminate_held(cell, live, reason.unwrap_or_else(user_initiated));
        }
        match cause {
            ExitCause::Reset => self.reset(cell, live),
            ExitCause::PowerOff if live.powers_off_for() == Some(PowerOffFor::Reboot) => {
                self.reset(cell, live)
            }
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

    /// Gives up a running instance whose machine is of no more use: it is stopped, or terminated where nothing is left of
    /// its root device.
    pub(crate) fn lose(&self, cell: &Cell, live: &mut Live, reason: StateReason) {
        if let Err(e) = live.end_machine() {
            tracing::error!(instance = %cell.id, error = chain(&e), "what a lost instance had written is lost too");
        }
        self.power_off(live);
        let moved = match live.record.description.root_device_type {
            RootDeviceType::InstanceStore => self.terminate_held(cell, live, reason),
            _ => self.transition(cell, live, Transition::Lost, Some(reason)),
        };
        if let Err(e) = moved {
            tracing::error!(instance = %cell.id, error = chain(&e), "cannot record that an instance was lost");
        }
    }
}

/// The moment so long from now, or one that nobody lives to see.
fn after(patience: Duration) -> Instant {
    const LONG: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    Instant::now() + patience.min(LONG)
}

/// Presses the power button, if there is one and patience to wait for what comes of it; says whether.
pub(crate) fn asked_to_power_off(machine: &dyn Machine, patience: Duration) -> bool {
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

fn check_running(live: &Live) -> Result<()> {
    let InstanceDescription { id, state, .. } = &*live.record.description;
    let what = match (state, &live.machine) {
        (InstanceState::Running, Some(_)) => return Ok(()),
        // Which could not be recorded. To start it finds out whether there is room for another.
        (InstanceState::Running, None) => format!("{id} has lost its machine; start it again"),
        (state, _) => format!("{id} is {state}, in which it cannot be rebooted"),
    };
    Err(Error::new(ErrorKind::IncorrectInstanceState, what))
}

/// That the instance is not protected against being stopped.
pub(crate) fn check_stoppable(description: &InstanceDescription) -> Result<()> {
    match description.stop_protection {
        true => Err(protected(description, "stopped")),
        false => Ok(()),
    }
}

/// That the instance's root device is a volume, without which it cannot be what is asked.
pub(crate) fn check_ebs_root(description: &InstanceDescription, what: &str) -> Result<()> {
    match description.root_device_type {
        RootDeviceType::Ebs => Ok(()),
        other => {
            let what =
                format!("the root device of {} is {other}, not ebs: it cannot be {what}", description.id);
            Err(Error::new(ErrorKind::Unsupported, what))
        }
    }
}

fn protected(description: &InstanceDescription, against: &str) -> Error {
    let what = format!("{} may not be {against}; take back its protection first", description.id);
    Error::new(ErrorKind::OperationNotPermitted, what)
}

/// Lets the compiler check that handles go between threads.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<Inner>>();
};
