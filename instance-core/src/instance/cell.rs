//! What stands behind the handles of an instance.

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use ami_core::{AccountId, InstanceId, VolumeId};
use storage_block::{Limiter, Volume};

use crate::capacity::Claim;
use crate::console::Console;
use crate::description::{Attachment, InstanceDescription, StateReason};
use crate::error::chain;
use crate::guest_agent::{Turn, Turns};
use crate::machine::{DiskSpec, Machine};
use crate::net::FrameLimits;
use crate::record::InstanceRecord;
use crate::region::Paths;
use crate::status::Boot;
use crate::supervisor::Reports;
use crate::vsock::Vsock;
use crate::watch::Publisher;
use crate::{Error, ErrorKind, InstanceState, Result, Transition};

/// What all handles of an instance share.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) id: InstanceId,
    pub(crate) owner: AccountId,
    pub(crate) console: Console,
    pub(crate) description: Publisher<Arc<InstanceDescription>>,
    live: Mutex<Live>,
    /// What is known of its machine, for status checks, which wait for nothing that is done to it.
    boot: Mutex<Option<Boot>>,
    /// Who has its guest's file systems stand still.
    agent: Arc<Turns>,
}

/// What changes, under the lock that every action on the instance holds.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) record: InstanceRecord,
    /// The machine, before the volumes: it is dropped first.
    pub(crate) machine: Option<Box<dyn Machine>>,
    /// Its volumes while it has a machine, in the order of its attachments.
    pub(crate) volumes: Vec<Volume>,
    /// What holds its machine's disks to the bandwidth of its type.
    pub(crate) limiters: Vec<Limiter>,
    /// What holds its machine's ports to it: frames to the guest, and from it.
    pub(crate) frame_limits: Option<[FrameLimits; 2]>,
    /// Its root device while it runs, if that is instance store.
    pub(crate) root: Option<Volume>,
    /// Its instance store while it runs, under the names of the disks.
    pub(crate) instance_store: Vec<DiskSpec>,
    /// The host's end of its machine's streams, if it has a place for them.
    pub(crate) vsock: Option<Vsock>,
    /// What it takes of the host while it has a machine.
    pub(crate) claim: Option<Claim>,
    /// Counts its machines, so that the end of an earlier one is not taken for the end of this.
    pub(crate) generation: u64,
    /// Which of its machines has a guest that was asked to power itself off, and what for.
    powers_off: Option<(u64, PowerOffFor)>,
    /// A volume of its launch cannot be made yet, which has been said.
    pub(crate) waits_for_room: bool,
}

/// What a guest was asked to power itself off for whose instance goes on after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PowerOffFor {
    /// It boots anew, by whoever sees it first.
    Reboot,
    /// An image is made, and whoever makes it has it boot anew.
    Image,
}

impl Cell {
    pub(crate) fn new(record: InstanceRecord) -> Self {
        let description = record.told();
        Self {
            id: description.id,
            owner: description.owner,
            console: Console::new(),
            description: Publisher::new(description),
            live: Mutex::new(Live {
                record,
                machine: None,
                volumes: Vec::new(),
                limiters: Vec::new(),
                frame_limits: None,
                root: None,
                instance_store: Vec::new(),
                vsock: None,
                claim: None,
                generation: 0,
                powers_off: None,
                waits_for_room: false,
            }),
            boot: Mutex::new(None),
            agent: Arc::default(),
        }
    }

    pub(crate) fn boot(&self) -> MutexGuard<'_, Option<Boot>> {
        self.boot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for whoever else has its guest freeze, and until that has thawed. Taken before it is [held](Self::hold).
    pub(crate) fn agent(&self) -> Turn<'_> {
        Turn::take(&self.agent)
    }

    /// What its guest's agent has still to be told.
    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.agent
    }

    /// Waits for whatever else is done to the instance, then holds it.
    pub(crate) fn hold(&self, reports: Reports) -> Hold<'_> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        Hold { cell: self, live: Some(live), reports }
    }

    /// Holds the instance if nothing else is done to it.
    pub(crate) fn try_hold(&self, reports: Reports) -> Option<Hold<'_>> {
        let live = match self.live.try_lock() {
            Ok(live) => live,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Hold { cell: self, live: Some(live), reports })
    }

    /// The host keys that its console has shown and that its record is to say, if it does not.
    pub(crate) fn shown_host_keys(&self, record: &InstanceRecord) -> Option<Vec<String>> {
        // What never ran, and what is gone, has no record that stays.
        let stays = [InstanceState::Running, InstanceState::Stopping, InstanceState::Stopped];
        let state = record.description.state;
        let others = stays.contains(&state) && self.console.has_other_host_keys(&record.host_keys);
        others.then(|| self.console.host_keys())
    }

    /// Lets go of machine and volumes, and of a root device that ends with the machine, when the region is closed. Gives the
    /// record if that says more now: that the volumes of its launch are durable, or its host keys.
    pub(crate) fn release(&self, paths: &Paths) -> Option<InstanceRecord> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let launched = live.record.launched;
        let shown = self.shown_host_keys(&live.record);
        if let Err(e) = live.end_machine() {
            tracing::error!(instance = %self.id, error = chain(&e), "what an instance had written is lost");
        }
        live.volumes.clear();
        // What stays is removed when the region is opened again.
        if live.root.take().is_some() {
            if let Err(e) = fs::remove_dir_all(paths.store_root(self.id)) {
                tracing::warn!(instance = %self.id, error = chain(&e), "cannot remove a root device");
            }
        }
        let changed = live.record.launched != launched || shown.is_some();
        live.record.host_keys = shown.unwrap_or_else(|| std::mem::take(&mut live.record.host_keys));
        changed.then(|| live.record.clone())
    }
}

impl Live {
    /// What the guest of its machine was asked to power itself off for, if its instance goes on after that.
    pub(crate) fn powers_off_for(&self) -> Option<PowerOffFor> {
        self.powers_off.filter(|(of, _)| *of == self.generation).map(|(_, what)| what)
    }

    pub(crate) fn set_powers_off_for(&mut self, what: Option<PowerOffFor>) {
        self.powers_off = what.map(|what| (self.generation, what));
    }

    /// The record in the next state.
    pub(crate) fn after(&self, by: Transition, reason: Option<StateReason>) -> Result<InstanceRecord> {
        let mut record = self.record.clone();
        let description = &record.description;
        let now = description.state;
        let next = now.after(by).ok_or_else(|| {
            let what = format!("{} is {now}, from which it cannot be {}", description.id, words(by));
            Error::new(ErrorKind::IncorrectInstanceState, what)
        })?;
        record.enter(next, reason);
        // Once its guest goes on, or it ends, what was saved is of no more use.
        if matches!(by, Transition::Started | Transition::Terminate) {
            record.saved = None;
        }
        if by != Transition::Stopped {
            record.shut_down = false;
        }
        Ok(record)
    }

    /// Ends the machine and makes durable what its guest has written: a guest is told that a write
    /// is done when the volume has it, and no end of its machine takes that back. Where it has written to none of its volumes
    /// they take no space for that.
    pub(crate) fn end_machine(&mut self) -> Result<()> {
        self.end_machine_of(|_| true)?;
        if self.volumes.iter().any(Volume::has_files) {
            // What was written is durable. Where there is no room for the others, the guest has lost nothing.
            if let Err(e) = self.settle() {
                let id = self.record.description.id;
                tracing::warn!(instance = %id, error = chain(&e), "a volume cannot be made yet");
            }
        }
        Ok(())
    }

    /// The same for some of the volumes.
    pub(crate) fn end_machine_of(&mut self, keep: impl Fn(&Attachment) -> bool) -> Result<()> {
        self.machine = None;
        let volumes = self.record.description.attachments.iter().zip(&self.volumes);
        // All of them, also if one fails.
        let written = volumes.filter(|(a, volume)| keep(a) && volume.has_files());
        let flushed: Vec<_> = written.map(|(_, volume)| volume.disk().flush()).collect();
        let flushed: Result<(), _> = flushed.into_iter().collect();
        flushed.map_err(|e| Error::storage(e, "cannot flush a volume"))
    }

    /// One of its volumes, if that is open.
    pub(crate) fn volume(&self, id: VolumeId) -> Option<Volume> {
        let place = self.record.description.attachments.iter().position(|a| a.volume_id == id)?;
        self.volumes.get(place).cloned()
    }

    /// Its root volume, if that is attached and open.
    pub(crate) fn root_volume(&self) -> Option<&Volume> {
        self.volumes.get(self.record.description.root_volume()?)
    }

    /// Makes the volumes durable that its launch made, unless they are known to be. They are open.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if !self.record.launched {
            self.sync_those(|_| true)?;
            self.note_durable();
        }
        Ok(())
    }

    /// The same for those that something has been written to.
    pub(crate) fn settle_written(&self) -> Result<()> {
        if self.record.launched { Ok(()) } else { self.sync_those(Volume::has_files) }
    }

    fn sync_those(&self, which: impl Fn(&Volume) -> bool) -> Result<()> {
        // All of them, also if one fails.
        let those = self.volumes.iter().filter(|volume| which(volume));
        let synced: Vec<_> = those.map(Volume::sync_created).collect();
        let synced: Result<(), _> = synced.into_iter().collect();
        synced.map_err(|e| Error::storage(e, "cannot make a volume durable"))
    }

    /// All volumes that are open and have files are durable. Nothing is known of those that are not open.
    fn note_durable(&mut self) {
        let all = self.volumes.len() == self.record.description.attachments.len();
        if all && self.volumes.iter().all(Volume::has_files) {
            self.record.launched = true;
        }
    }
}

fn words(by: Transition) -> &'static str {
    match by {
        Transition::Start => "started",
        Transition::Stop => "stopped",
        Transition::Terminate => "terminated",
        _ => "moved on",
    }
}

/// The right to act on an instance.
///
/// While it is held the supervisor leaves the instance alone, so a machine that ends meanwhile is
/// reported again when the hold is given up, as is one of which something is not known to be durable.
pub(crate) struct Hold<'a> {
    cell: &'a Cell,
    live: Option<MutexGuard<'a, Live>>,
    reports: Reports,
}

impl std::ops::Deref for Hold<'_> {
    type Target = Live;

    fn deref(&self) -> &Live {
        match &self.live {
            Some(live) => live,
            None => unreachable!("only dropping takes the guard"),
        }
    }
}

impl std::ops::DerefMut for Hold<'_> {
    fn deref_mut(&mut self) -> &mut Live {
        match &mut self.live {
            Some(live) => live,
            None => unreachable!("only dropping takes the guard"),
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        // Who waits for a guest to shut down for an image sees it.
        let awaited = self.powers_off_for() == Some(PowerOffFor::Image);
        let watched = self.machine.as_ref().filter(|_| !awaited).map(|m| (m.state(), self.generation));
        let unsettled = !self.record.launched && self.volumes.iter().any(Volume::has_files)
            || self.cell.shown_host_keys(&self.record).is_some();
        self.live = None;
        if unsettled {
            self.reports.unsettled(self.cell.id);
        }
        // Looked at only after the lock is free: an end after this look finds the supervisor able
        // to act on it.
        if let Some((state, generation)) = watched {
            if let Some(cause) = state.get().exit_cause() {
                self.reports.ended(self.cell.id, generation, cause);
            }
        }
    }
}
