//! Making what a launch asks for: volumes, machines and their records, or nothing.

use ami_core::{InstanceId, VolumeId};
use storage_block::{Snapshot, Volume, VolumeOptions};

use super::Launching;
use super::plan::Planned;
use crate::description::{Attachment, StateReason};
use crate::error::chain;
use crate::instance::{Cell, Hold};
use crate::machine::Boot;
use crate::record::{InstanceRecord, VolumeRecord};
use crate::region::Inner;
use crate::state_changes::StateChange;
use crate::volumes::volume_not_found;
use crate::{Error, ErrorKind, InstanceState, Result, Transition};

/// When the files of a volume are made.
pub(crate) enum When {
    Now,
    /// With the first write to it, or what else needs them, after which all volumes of this instance are to become durable.
    Written(InstanceId),
}

impl Inner {
    /// Makes volumes, machines and records, and says of each instance what came of it; an error if fewer than
    /// `min` run.
    ///
    /// Nobody waits for the volumes to become durable: the records say what they are made of, and that they may have to
    /// be made again. See [`InstanceRecord::launched`].
    pub(super) fn make(&self, launching: &mut [Launching<'_>], boot: &Boot, min: usize) -> Result<()> {
        for one in launching.iter_mut() {
            one.done = match self.make_volumes(one.cell.id, one.planned) {
                Ok(volumes) => {
                    one.hold.volumes = volumes;
                    self.power_on(one.cell, &mut one.hold, boot.clone())
                }
                Err(e) => Err(e),
            };
        }
        enough(launching, min)?;
        let started = self.commit_started(launching)?;
        for (one, record) in launching.iter_mut().zip(started) {
            if let Some(record) = record {
                self.publish(one.cell, &mut one.hold, record);
            }
        }
        Ok(())
    }

    fn make_volumes(&self, instance: InstanceId, planned: &[Planned]) -> Result<Vec<Volume>> {
        let make = |planned: &Planned| {
            // What goes on without its instance must not depend on what that says, nor on the disk's room at that moment.
            let when = match planned.attachment.delete_on_termination {
                true => When::Written(instance),
                false => When::Now,
            };
            self.make_volume(&planned.record, planned.encrypted, when)
        };
        planned.iter().map(make).collect()
    }

    /// Whether there is nothing of a volume of an instance that is not [`launched`](InstanceRecord::launched), and need not
    /// be.
    pub(crate) fn is_unwritten(&self, attachment: &Attachment) -> bool {
        let there = self.paths.volume(attachment.volume_id).try_exists().unwrap_or(true);
        attachment.delete_on_termination && !there
    }

    /// Makes such a volume as its launch made it.
    pub(crate) fn make_unwritten(&self, instance: InstanceId, id: VolumeId) -> Result<Volume> {
        let record = self.store.get::<VolumeRecord>(&id.to_string())?.ok_or_else(|| volume_not_found(id))?;
        self.make_volume(&record, record.kms_key_id.is_some(), When::Written(instance))
    }

    /// Makes the volume that the record speaks of, which is [not durable yet](Volume::create_unsynced).
    pub(crate) fn make_volume(&self, record: &VolumeRecord, encrypted: bool, when: When) -> Result<Volume> {
        let failed = |e| Error::storage(e, format!("cannot make the volume {}", record.id));
        let base = record.base.map(|digest| self.content(&digest)).transpose()?;
        // What begins as encrypted content stays under the key of that.
        let options = match encrypted && !base.as_ref().is_some_and(Snapshot::encrypted) {
            true => {
                let key = self.blocks.new_key(record.kms_key_id.as_deref()).map_err(failed)?;
                VolumeOptions::new().encrypt(&key)
            }
            false => VolumeOptions::new(),
        };
        let dir = self.paths.volume(record.id);
        let made = match when {
            When::Now => options.create_unsynced(&dir, base.as_ref(), record.size),
            When::Written(instance) => {
                let reports = self.supervisor.reports();
                let told = move || reports.unsettled(instance);
                options.create_on_write(&dir, base.as_ref(), record.size, told)
            }
        };
        made.map_err(failed)
    }

    /// Commits all instances that run, and all that is theirs, in one: what a crash leaves of a launch is all
    /// of it or nothing. Gives their records.
    fn commit_started(&self, launching: &[Launching<'_>]) -> Result<Vec<Option<InstanceRecord>>> {
        let started = launching.iter().map(|one| match one.done {
            Ok(()) => one.hold.after(Transition::Started, None).map(Some),
            Err(_) => Ok(None),
        });
        let started = started.collect::<Result<Vec<_>>>()?;
        self.store.commit(|c| {
            launching.iter().zip(&started).try_for_each(|(one, record)| {
                let Some(record) = record else { return Ok(()) };
                let mut volumes = one.planned.iter().zip(&one.hold.volumes);
                volumes.try_for_each(|(planned, volume)| c.put(&planned.as_made(volume)))?;
                c.put(record)
            })
        })?;
        Ok(started)
    }

    /// Leaves nothing of a launch that failed. Files that cannot be removed now are when the region is opened
    /// again: no record names them.
    pub(super) fn undo_launch(&self, cell: &Cell, mut live: Hold<'_>, planned: &[Planned], why: &Error) {
        self.power_off(&mut live);
        self.cells().remove(&cell.id);
        self.release_place(&live.record.description);
        let left = planned.iter().try_for_each(|p| {
            let failed = |e| Error::storage(e, format!("cannot remove the volume {}", p.record.id));
            Volume::remove(&self.paths.volume(p.record.id)).map_err(failed)
        });
        if let Err(e) = self.forget(&live.record.description).and(left) {
            tracing::error!(instance = %cell.id, error = chain(&e), "a failed launch left something behind");
        }
        // Whoever waits to act on it finds that it is gone, and writes nothing down of it.
        live.record.enter(InstanceState::Terminated, Some(reason_of(why)));
        self.listeners.tell(&StateChange::of(&live.record.description));
        self.directory.remove(cell.id);
        cell.description.set(live.record.told());
    }
}

/// Why a launch has failed, in EC2's words: they say whose fault it was.
fn reason_of(why: &Error) -> StateReason {
    let code = match why.kind() {
        ErrorKind::InsufficientCapacity | ErrorKind::InsufficientVolumeCapacity => {
            "Server.InsufficientInstanceCapacity"
        }
        ErrorKind::KeyUnavailable => "Client.InvalidKMSKey.InvalidState",
        ErrorKind::SnapshotNotFound => "Client.InvalidSnapshot.NotFound",
        ErrorKind::NotBootable | ErrorKind::Unsupported => "Client.InternalError",
        _ => "Server.InternalError",
    };
    StateReason::new(code, chain(why))
}

/// The first failure, if fewer than `min` are without one.
fn enough(launching: &mut [Launching<'_>], min: usize) -> Result<()> {
    if launching.iter().filter(|one| one.done.is_ok()).count() >= min {
        return Ok(());
    }
    let mut failures = launching.iter_mut().filter_map(|one| std::mem::replace(&mut one.done, Ok(())).err());
    Err(failures
        .next()
        .unwrap_or_else(|| Error::new(ErrorKind::Internal, "a launch failed without a reason")))
}
