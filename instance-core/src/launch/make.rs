//! Making what a launch asks for: volumes, machines and their records, or nothing.

use std::thread;

use storage_block::{Snapshot, Volume, VolumeOptions};

use super::Launching;
use super::plan::Planned;
use crate::description::StateReason;
use crate::error::chain;
use crate::instance::{Cell, Hold};
use crate::machine::Boot;
use crate::record::InstanceRecord;
use crate::region::{Inner, StateChange};
use crate::{Error, ErrorKind, InstanceState, Result, Transition};

impl Inner {
    /// Makes volumes, machines and records, and says of each instance what came of it; an error if fewer than
    /// `min` run.
    ///
    /// The volumes become durable while the machines are made and the records committed, so that only one of
    /// the two is waited for. The records say so: see [`InstanceRecord::launched`].
    pub(super) fn make(&self, launching: &mut [Launching<'_>], boot: &Boot, min: usize) -> Result<()> {
        for one in launching.iter_mut() {
            match self.make_volumes(one.planned) {
                Ok(volumes) => one.hold.volumes = volumes,
                Err(e) => one.done = Err(e),
            }
        }
        let volumes: Vec<Vec<Volume>> = launching.iter().map(|one| one.hold.volumes.clone()).collect();
        let sync = || -> Vec<Result<(), storage_block::Error>> {
            volumes.iter().map(|volumes| volumes.iter().try_for_each(Volume::sync_created)).collect()
        };
        let (started, synced) = thread::scope(|scope| {
            let syncing = thread::Builder::new().name("sync-volumes".to_owned()).spawn_scoped(scope, sync);
            for one in launching.iter_mut().filter(|one| one.done.is_ok()) {
                one.done = self.power_on(one.cell, &mut one.hold, boot.clone());
            }
            let started = enough(launching, min).and_then(|()| self.commit_started(launching));
            let synced = match syncing {
                Ok(syncing) => syncing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // No thread to be had: in this one, then.
                Err(_) => sync(),
            };
            (started, synced)
        });
        let started = started?;
        for (one, synced) in launching.iter_mut().zip(synced) {
            if let (Ok(()), Err(e)) = (&one.done, synced) {
                one.done = Err(Error::storage(e, "cannot make a volume durable"));
            }
        }
        enough(launching, min)?;
        let running = launching.iter_mut().zip(started);
        for (one, record) in running.filter(|(one, _)| one.done.is_ok()) {
            let Some(record) = record else { continue };
            // With whatever is committed next: until then opening the region looks at the volumes themselves.
            if let Err(e) = self.store.later(|c| c.put(&record)) {
                tracing::warn!(instance = %one.cell.id, error = chain(&e), "cannot note that a launch is whole");
            }
            self.publish(one.cell, &mut one.hold, record);
        }
        Ok(())
    }

    fn make_volumes(&self, planned: &[Planned]) -> Result<Vec<Volume>> {
        planned
            .iter()
            .map(|Planned { record, encrypted, .. }| {
                let failed = |e| Error::storage(e, format!("cannot make the volume {}", record.id));
                let base = record.base.map(|digest| self.content(&digest)).transpose()?;
                let dir = self.paths.volume(record.id);
                // What begins as encrypted content stays under the key of that.
                let options = match *encrypted && !base.as_ref().is_some_and(Snapshot::encrypted) {
                    true => VolumeOptions::new().encrypt(&self.blocks.new_key(None).map_err(failed)?),
                    false => VolumeOptions::new(),
                };
                options.create_unsynced(&dir, base.as_ref(), record.size).map_err(failed)
            })
            .collect()
    }

    /// Commits all instances that run, and all that is theirs, in one: what a crash leaves of a launch is all
    /// of it or nothing. Gives their records as they are once their volumes are durable.
    fn commit_started(&self, launching: &[Launching<'_>]) -> Result<Vec<Option<InstanceRecord>>> {
        let started = launching.iter().map(|one| match one.done {
            Ok(()) => one.hold.after(Transition::Started, None).map(Some),
            Err(_) => Ok(None),
        });
        let mut started = started.collect::<Result<Vec<_>>>()?;
        self.store.commit(|c| {
            launching.iter().zip(&started).try_for_each(|(one, record)| {
                let Some(record) = record else { return Ok(()) };
                let mut volumes = one.planned.iter().zip(&one.hold.volumes);
                volumes.try_for_each(|(planned, volume)| c.put(&planned.as_made(volume)))?;
                c.put(record)
            })
        })?;
        started.iter_mut().flatten().for_each(|record| record.launched = true);
        Ok(started)
    }

    /// Leaves nothing of a launch that failed. Files that cannot be removed now are when the region is opened
    /// again: no record names them.
    pub(super) fn undo_launch(&self, cell: &Cell, mut live: Hold<'_>, planned: &[Planned], why: &Error) {
        self.power_off(&mut live);
        self.cells().remove(&cell.id);
        self.release_place(&live.record.description);
        // A commit that failed may have got as far as to say so.
        live.record.launched = false;
        let left = planned.iter().try_for_each(|p| {
            let failed = |e| Error::storage(e, format!("cannot remove the volume {}", p.record.id));
            Volume::remove(&self.paths.volume(p.record.id)).map_err(failed)
        });
        if let Err(e) = self.forget(&live.record).and(left) {
            tracing::error!(instance = %cell.id, error = chain(&e), "a failed launch left something behind");
        }
        let mut gone = live.record.description.clone();
        gone.state = InstanceState::Terminated;
        gone.state_reason = Some(StateReason::new(why.code(), chain(why)));
        self.announce(&StateChange::of(&gone));
        self.directory.remove(cell.id);
        cell.description.set(gone);
    }
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
