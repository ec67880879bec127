//! What is put in order when a region is opened.

use std::collections::HashSet;
use std::fs::File;
use std::sync::Arc;

use ami_core::RootDeviceType;
use storage_block::{ErrorKind as BlockErrorKind, Volume};

use crate::description::StateReason;
use crate::error::chain;
use crate::garbage::remove_others;
use crate::instance::Cell;
use crate::launch::When;
use crate::record::{InstanceRecord, VolumeRecord};
use crate::region::Inner;
use crate::{Error, InstanceState, Result, Transition};

impl Inner {
    /// Puts in order what the last owner left.
    pub(crate) fn recover(&self) -> Result<()> {
        let records = self.store.all::<InstanceRecord>()?;
        let hibernated: HashSet<String> = (records.iter())
            .filter(|record| record.saved.is_some())
            .map(|record| record.description.id.to_string())
            .collect();
        let (old, mut records): (Vec<_>, Vec<_>) =
            records.into_iter().partition(InstanceRecord::is_forgotten);
        // Those of a launch with a token are remembered in its order.
        records.sort_by_key(|record| record.description.launch_index);
        let mut changed = Vec::new();
        for record in records {
            changed.extend(self.recover_instance(record)?);
        }
        // In one, for there may be thousands.
        self.store.commit(|c| {
            old.iter().for_each(|record| c.remove::<InstanceRecord>(record.description.id));
            changed.iter().try_for_each(|record| c.put(record))
        })?;
        self.recover_tasks()?;
        self.recover_snapshots()?;
        let volumes = self.store.all::<VolumeRecord>()?;
        self.finish_growth(&volumes)?;
        let volumes: HashSet<String> = volumes.iter().map(|v| v.id.to_string()).collect();
        remove_others(&self.paths.volumes(), &volumes)?;
        remove_others(&self.paths.instances(), &HashSet::new())?;
        remove_others(&self.paths.hibernated(), &hibernated)?;
        if let Some(network) = &self.network {
            let cells = self.cells();
            let descriptions = cells.values().map(|cell| cell.description.get());
            let alive = descriptions.filter(|description| description.state != InstanceState::Terminated);
            network.keep_only(
                &alive.filter_map(|description| Some(description.network.as_ref()?.interface_id)).collect(),
            )?;
        }
        self.collect_garbage()
    }

    /// Makes those volumes as large as they are said to be that a crash has found growing.
    fn finish_growth(&self, volumes: &[VolumeRecord]) -> Result<()> {
        let mut grown = Vec::new();
        for volume in volumes.iter().filter(|volume| volume.growing) {
            match self.open_volume(volume.id).and_then(|open| self.settle_size(volume, &open)) {
                Ok(volume) => grown.push(volume),
                // The next time it is modified, or the region is opened with its key.
                Err(e) => {
                    tracing::error!(volume = %volume.id, error = chain(&e), "a volume has not become as large as it should be");
                }
            }
        }
        self.store.commit(|c| grown.iter().try_for_each(|volume| c.put(volume)))
    }

    /// Gives the record of an instance of which something has become different, for it to be committed.
    fn recover_instance(&self, mut record: InstanceRecord) -> Result<Option<InstanceRecord>> {
        let state = record.description.state;
        // Nothing is left of a root device that is instance store, and so nothing of its instance.
        let goes = matches!(state, InstanceState::ShuttingDown | InstanceState::Terminated)
            || record.description.root_device_type == RootDeviceType::InstanceStore;
        let mut changed = false;
        let mut attachments = record.description.attachments.iter();
        // As long as there is nothing of any of its volumes, that is as good as all of it.
        if !record.launched && !attachments.all(|attachment| self.is_unwritten(attachment)) {
            match self.make_lost_volumes(&record, goes) {
                Ok(()) => (record.launched, changed) = (true, true),
                // They may come to be made when the region is opened again, with the keys that they take.
                Err(e) => {
                    tracing::error!(instance = %record.description.id, error = chain(&e), "a volume is missing");
                }
            }
        }
        let lost = || {
            let what = format!("the process that owned the region ended while the instance was {state}");
            StateReason::new("Server.InternalError", what)
        };
        if goes && state != InstanceState::Terminated {
            let attachments = &record.description.attachments;
            let doomed: Vec<_> =
                attachments.iter().filter(|a| a.delete_on_termination).map(|a| a.volume_id).collect();
            self.remove_volumes(&doomed)?;
            let asked_for = record.description_mut().state_reason.take();
            let reason = asked_for.filter(|_| state == InstanceState::ShuttingDown).unwrap_or_else(lost);
            record.enter(InstanceState::Terminated, Some(reason));
            changed = true;
        } else if let Some(next) = state.after(Transition::Lost) {
            record.enter(next, Some(lost()));
            changed = true;
        }
        if let Some(ended) = record.ended {
            self.terminated.add(record.description.id, ended);
        }
        self.tokens.remember(&record);
        self.directory.set(record.told());
        let changed = changed.then(|| record.clone());
        let cell = Arc::new(Cell::new(record));
        self.cells().insert(cell.id, cell);
        Ok(changed)
    }

    /// Makes those volumes again, as they were made, that had not been written, or were not durable yet when a crash took
    /// them. Nothing that was flushed to them is lost: what is flushed makes the volume durable. What a crash leaves of one
    /// may look damaged; that a volume which was flushed is damaged in the second before it is known to be durable is not
    /// told from that.
    fn make_lost_volumes(&self, record: &InstanceRecord, goes: bool) -> Result<()> {
        for attachment in record.description.attachments.iter().filter(|a| !goes || !a.delete_on_termination)
        {
            let id = attachment.volume_id;
            // One without a record went with an instance that was being terminated.
            let Some(volume) = self.store.get::<VolumeRecord>(&id.to_string())? else { continue };
            let dir = self.paths.volume(id);
            match Volume::open(&dir, &self.blocks) {
                Ok(volume) => {
                    // What is read of it need not be on the disk yet.
                    volume.disk().flush().map_err(|e| Error::storage(e, format!("cannot flush {id}")))?;
                    continue;
                }
                Err(e) if matches!(e.kind(), BlockErrorKind::NotFound | BlockErrorKind::Corrupt) => {}
                // It is there: only who has its key is missing.
                Err(e) if e.kind() == BlockErrorKind::KeyUnavailable => continue,
                Err(e) => return Err(Error::storage(e, format!("cannot open the volume {id}"))),
            }
            let failed = |e| Error::storage(e, format!("cannot make the volume {id} again"));
            // It may be what the volume began as that is missing.
            volume.base.map(|base| self.content(&base)).transpose()?;
            tracing::warn!(volume = %id, "a volume is made again that was not durable yet when the process ended");
            Volume::remove(&dir).map_err(failed)?;
            let made = self.make_volume(&volume, volume.kms_key_id.is_some(), When::Now)?;
            made.sync_created().map_err(failed)?;
        }
        // Nor are the names of those that are found.
        self.sync_volume_names()
    }

    pub(crate) fn sync_volume_names(&self) -> Result<()> {
        File::open(self.paths.volumes())
            .and_then(|dir| dir.sync_all())
            .map_err(|e| Error::io(e, "cannot make the names of volumes durable"))
    }
}
