//! What is removed because nothing needs it any more.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError, RwLockReadGuard, TryLockError};
use std::time::{Duration, Instant};

use ami_core::{AmiId, Digest, VolumeId};

use crate::description::InstanceDescription;
use crate::error::chain;
use crate::launch::Needs;
use crate::record::{FormerImage, ImageRecord, InstanceRecord, SnapshotRecord, VolumeRecord};
use crate::region::Inner;
use crate::store::Record;
use crate::{Error, InstanceState, Result};

/// For how long what could not be collected is left to whoever removes something: to look for it takes long in a large region.
const AGAIN: Duration = Duration::from_secs(60);

/// Somebody makes something that has content, or looks at some: none is collected meanwhile. What there is to collect then,
/// whoever ends last collects.
pub(crate) struct Making<'r> {
    region: &'r Inner,
    /// [`making_images`](Inner::making_images), until this ends.
    held: Option<RwLockReadGuard<'r, ()>>,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.held = None;
        if self.region.collect_again().is_some_and(|at| Instant::now() < at) {
            return;
        }
        if let Err(e) = self.region.collect_unless_making() {
            // No reason for what was made not to be there: it is tried again.
            tracing::warn!(error = chain(&e), "cannot remove what nothing names");
        }
    }
}

impl Inner {
    /// Begins to make something that has content, or to look at some.
    pub(crate) fn begin_making(&self) -> Making<'_> {
        let held = self.making_images.read().unwrap_or_else(PoisonError::into_inner);
        Making { region: self, held: Some(held) }
    }

    /// Makes something that has content. What it needs is not collected meanwhile, and nothing is left of what fails, once
    /// nothing else is being made.
    pub(crate) fn making<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let _making = self.begin_making();
        let made = make();
        self.garbage.fetch_or(made.is_err(), Ordering::SeqCst);
        made
    }

    /// Removes what nothing names any more: now, or, while something is being made, when that ends. Nobody waits for another's
    /// copy, nor has whoever wants to begin one meanwhile wait.
    pub(crate) fn collect_soon(&self) -> Result<()> {
        // Before it is tried: whoever is in the way sees it at the end.
        self.garbage.store(true, Ordering::SeqCst);
        self.collect_unless_making()
    }

    fn collect_unless_making(&self) -> Result<()> {
        // Once more for what another has found in the way of this.
        while self.garbage.load(Ordering::SeqCst) {
            let _alone = match self.making_images.try_write() {
                Ok(alone) => alone,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return Ok(()),
            };
            self.garbage.store(false, Ordering::SeqCst);
            let collected = self.collect_garbage();
            // What stays goes when something else has been made later, or removed.
            *self.collect_again() = collected.is_err().then(|| Instant::now() + AGAIN);
            collected.inspect_err(|_| self.garbage.store(true, Ordering::SeqCst))?;
        }
        Ok(())
    }

    /// From when on those who have made something collect again.
    fn collect_again(&self) -> MutexGuard<'_, Option<Instant>> {
        self.collect_again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes every snapshot and boot file that no image, no snapshot of a user's, no volume and no launch
    /// needs. The caller holds [`making_images`](Self::making_images) for writing, or is alone.
    pub(crate) fn collect_garbage(&self) -> Result<()> {
        // No snapshot comes to be from here on that is not kept.
        let sweep = self.blocks.sweep();
        // First what launches begin with, which can go meanwhile and does not come; then what those need that are under
        // way; then what they leave. So what a launch needs is found in one of them, whenever it begins and ends.
        let former = self.store.all::<FormerImage>()?;
        let images = self.store.all::<ImageRecord>()?;
        let snapshots = self.store.all::<SnapshotRecord>()?;
        let launches = self.in_flight.needs();
        let volumes = self.store.all::<VolumeRecord>()?;
        let instances = self.instances_that_live()?;
        let mut keep: HashSet<Digest> = images.iter().flat_map(snapshots_of).collect();
        keep.extend(snapshots.iter().map(|snapshot| snapshot.digest));
        keep.extend(launches.iter().flat_map(|launch| &launch.contents));
        keep.extend(volumes.iter().filter_map(|volume| volume.base));
        sweep
            .remove_unreferenced(&keep)
            .map_err(|e| Error::storage(e, "cannot remove the snapshots that nothing names"))?;
        self.forget_former_images(former, &launches, &instances)?;
        let plans = (images.iter().filter_map(|i| i.boot.as_ref()))
            .chain(instances.iter().filter_map(|i| i.direct_boot.as_ref()))
            .chain(launches.iter().filter_map(|launch| launch.direct_boot.as_ref()));
        self.boot.remove_unreferenced(plans)?;
        self.remove_software_bills(&images);
        Ok(())
    }

    /// Removes the bills of software of what is no image's root device any more, and where they lie if there is none. One that
    /// cannot be removed does no harm, and is no reason not to open a region.
    fn remove_software_bills(&self, images: &[ImageRecord]) {
        let dir = self.paths.software_bills();
        let warn = |path: &Path, e: &io::Error| {
            tracing::warn!(path = %path.display(), error = %e, "cannot remove a bill of software");
        };
        let bills = match fs::read_dir(&dir) {
            Ok(bills) => bills,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return,
            Err(e) => return warn(&dir, &e),
        };
        let roots = images.iter().filter_map(|record| record.image.ami().manifest().root_device()?.content());
        let keep: HashSet<String> = roots.map(Digest::to_hex).collect();
        for bill in bills {
            match bill.map(|bill| bill.path()) {
                Ok(path) if path.file_name().is_some_and(|name| keep.contains(&*name.to_string_lossy())) => {}
                Ok(path) => remove_any(&path).unwrap_or_else(|e| warn(&path, &e)),
                Err(e) => warn(&dir, &e),
            }
        }
        // It is not empty, unless nothing is kept.
        let _ = fs::remove_dir(&dir);
    }

    /// The records of instances that need what they were made from.
    fn instances_that_live(&self) -> Result<Vec<InstanceRecord>> {
        let mut instances = self.store.all::<InstanceRecord>()?;
        instances.retain(|i| i.description.state != InstanceState::Terminated);
        Ok(instances)
    }

    /// Whether an instance was made, or is being made, of an image.
    pub(crate) fn has_instances(&self, image: AmiId) -> Result<bool> {
        let launches = self.in_flight.needs();
        let instances = self.instances_that_live()?;
        Ok(is_needed(image, &launches, &instances))
    }

    /// Forgets those of the deregistered images that no instance was made from any more. No more are made: their ids are not
    /// used again.
    fn forget_former_images(
        &self,
        mut former: Vec<FormerImage>,
        launches: &[Needs],
        instances: &[InstanceRecord],
    ) -> Result<()> {
        former.retain(|f| !is_needed(f.0.ami().id(), launches, instances));
        self.store.commit(|c| {
            former.iter().for_each(|f| c.remove::<FormerImage>(f.key()));
            Ok(())
        })
    }

    /// Removes an instance's record and its volumes.
    pub(crate) fn forget(&self, instance: &InstanceDescription) -> Result<()> {
        let volumes: Vec<VolumeId> = instance.attachments.iter().map(|a| a.volume_id).collect();
        self.remove_volumes(&volumes)?;
        self.store.commit(|c| {
            c.remove::<InstanceRecord>(instance.id);
            Ok(())
        })
    }

    /// Removes volumes: their records first, so that a crash leaves files that nothing names, not
    /// names without files.
    pub(crate) fn remove_volumes(&self, ids: &[VolumeId]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        self.store.commit(|c| {
            ids.iter().for_each(|id| c.remove::<VolumeRecord>(id));
            Ok(())
        })?;
        ids.iter().try_for_each(|id| self.remove_volume_files(*id))
    }
}

fn is_needed(image: AmiId, launches: &[Needs], instances: &[InstanceRecord]) -> bool {
    launches.iter().any(|launch| launch.image == image)
        || instances.iter().any(|i| i.description.image_id == image)
}

pub(crate) fn snapshots_of(record: &ImageRecord) -> Vec<Digest> {
    let mappings = record.image.ami().manifest().block_device_mappings();
    mappings.iter().filter_map(|m| m.content().copied()).collect()
}

/// Removes every directory in `dir` that is not in `keep`.
pub(crate) fn remove_others(dir: &Path, keep: &HashSet<String>) -> Result<()> {
    let failed = |e| Error::io(e, format!("cannot clear {}", dir.display()));
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !keep.contains(entry.file_name().to_string_lossy().as_ref()) {
            remove_any(&entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Removes a file or a directory, whatever somebody has put there.
pub(crate) fn remove_any(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ami_core::{Ami, X86_64};
    use storage_block::MemoryDisk;

    use super::*;
    use crate::testing::{FakeHypervisor, tiny_elf};
    use crate::{DirectBoot, ImageSource, Region, VolumeSpec};

    #[test]
    fn what_cannot_be_collected_is_not_looked_for_all_the_time() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
        disk.write_at(&[7; 4096], 0).unwrap();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let ami = region.register_image(Ami::<X86_64>::builder("base"), source).unwrap();
        let stored = fs::read_dir(dir.path().join("blocks/snapshots")).unwrap();
        let content = stored.map(|entry| entry.unwrap().path()).next().unwrap();
        let aside = dir.path().join("aside");
        fs::rename(&content, &aside).unwrap();
        fs::create_dir_all(content.join("in the way")).unwrap();
        region.deregister_image(ami.id()).unwrap_err();
        fs::remove_dir_all(&content).unwrap();
        fs::rename(&aside, &content).unwrap();
        region.create_volume(VolumeSpec::new(1)).unwrap();
        assert!(content.exists(), "it was looked for a moment ago");
        *region.inner.collect_again() = Some(Instant::now());
        region.create_volume(VolumeSpec::new(1)).unwrap();
        assert!(!content.exists(), "it is time");
        assert_eq!(*region.inner.collect_again(), None);
    }
}
