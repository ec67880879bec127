//! Volumes that are being stored as they were at one instant, while their instances go on.
//!
//! Such a volume stays open until it is stored, whatever becomes of its instance meanwhile: that may be stopped and
//! started, have it detached, or be terminated. Nobody holds the instance for that, so that all of this happens at once.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use ami_core::VolumeId;
use storage_block::{FrozenVolumes, Progress, Snapshot, SnapshotStats, Volume};

use crate::instance::{Cell, Hold, Live};
use crate::region::Inner;
use crate::{Error, Result};

/// The volumes that are being stored.
#[derive(Debug, Default)]
pub(crate) struct Storing {
    open: Mutex<BTreeMap<VolumeId, Volume>>,
    stored: Condvar,
}

impl Storing {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Volume>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that is being stored: it is open, and cannot be opened once more.
    pub(crate) fn open(&self, id: VolumeId) -> Option<Volume> {
        self.lock().get(&id).cloned()
    }

    /// Blocks until a volume is stored.
    pub(crate) fn wait(&self, id: VolumeId) {
        let storing = |open: &mut BTreeMap<VolumeId, Volume>| open.contains_key(&id);
        drop(self.stored.wait_while(self.lock(), storing).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Volumes as they were at one instant, to be stored.
pub(crate) struct Instant<'r> {
    region: &'r Inner,
    frozen: Option<FrozenVolumes>,
    ids: Vec<VolumeId>,
}

impl Instant<'_> {
    /// Stores them, in the order in which they were named.
    pub(crate) fn store(
        mut self,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<(Snapshot, SnapshotStats)>> {
        let stored = self.frozen.take().map(|frozen| frozen.store(progress)).transpose();
        let stored = stored.map_err(|e| Error::storage(e, "cannot take a snapshot of a volume"))?;
        Ok(stored.unwrap_or_default())
    }
}

impl Drop for Instant<'_> {
    fn drop(&mut self) {
        // First: who finds that a volume is not open here may open it.
        self.frozen = None;
        let mut open = self.region.storing.lock();
        self.ids.iter().for_each(|id| drop(open.remove(id)));
        drop(open);
        self.region.storing.stored.notify_all();
    }
}

impl Inner {
    /// Holds an instance of whose volumes none is being stored. What else is done to it need not wait for that.
    pub(crate) fn hold_to_freeze<'c>(&self, cell: &'c Cell) -> Hold<'c> {
        loop {
            let live = cell.hold(self.supervisor.reports());
            let Some(id) = self.storing_of(&live) else { return live };
            drop(live);
            self.storing.wait(id);
        }
    }

    /// One of an instance's volumes that is being stored.
    pub(crate) fn storing_of(&self, live: &Live) -> Option<VolumeId> {
        let attachments = &live.record.description.attachments;
        attachments.iter().map(|a| a.volume_id).find(|id| self.storing.open(*id).is_some())
    }

    /// Takes volumes as they are now. Whoever calls keeps everybody else from opening them, and knows that none is being
    /// stored.
    pub(crate) fn freeze(&self, volumes: Vec<(VolumeId, Volume)>) -> Instant<'_> {
        let frozen = Volume::freeze(volumes.iter().map(|(_, volume)| volume), &self.blocks);
        let ids = volumes.iter().map(|(id, _)| *id).collect();
        self.storing.lock().extend(volumes);
        Instant { region: self, frozen: Some(frozen), ids }
    }

    /// Removes the files of a volume that no machine has. Those of one that is being stored go with the end of that.
    pub(crate) fn remove_volume_files(&self, id: VolumeId) -> Result<()> {
        let removed = match self.storing.open(id) {
            Some(volume) => volume.delete(),
            None => Volume::remove(&self.paths.volume(id)),
        };
        removed.map_err(|e| Error::storage(e, format!("cannot remove the volume {id}")))
    }
}
