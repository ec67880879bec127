//! Making images: from a disk, and from an instance.

use std::sync::atomic::Ordering;
use std::sync::{PoisonError, TryLockError};
use std::time::{Duration, Instant};

use ami_core::{
    AccountId, Ami, AmiBuilder, AmiId, AnyAmi, Arch, BlockDeviceMapping, Boot, Ebs, Image, ImageState,
    Manifest, RegionName, RootDeviceType, SnapshotId, VolumeType,
};
use storage_block::{FrozenVolumes, Snapshot, SnapshotStats, Volume};

use crate::boot_cache::{BootPlan, Found};
use crate::description::StateReason;
use crate::error::chain;
use crate::image_source::{ImageSource, Root};
use crate::instance::{Cell, Live};
use crate::lifecycle::check_ebs_root;
use crate::machine::{Machine, MachineError};
use crate::power::no_root_volume;
use crate::record::{FormerImage, ImageRecord, VolumeRecord};
use crate::region::{Inner, Region};
use crate::store::Changes;
use crate::{Error, ErrorKind, InstanceState, Result};

const GIB: u64 = 1 << 30;

/// What making an image of an instance gave.
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// let instance = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
/// let made = instance.create_image("web-2")?;
/// assert_eq!(made.ami.manifest().parent(), Some(&ami.digest()));
/// assert_eq!((made.changed_bytes, made.stored_bytes), (0, 0), "nothing was written yet");
/// println!("{} stood still for {:?}", instance.id(), made.paused);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CreatedImage {
    /// The image.
    pub ami: AnyAmi,
    /// The bytes of the blocks that were written since the instance was launched.
    pub changed_bytes: u64,
    /// The bytes that were new to the region and had to be stored.
    pub stored_bytes: u64,
    /// How long the instance stood still.
    pub paused: Duration,
}

impl<H> Region<H> {
    /// Registers an image made of `source` (`ImportSnapshot` and `RegisterImage` in one).
    ///
    /// The builder says the rest; its root device, boot source and root volume are set here.
    ///
    /// # Errors
    ///
    /// [`NotBootable`](ErrorKind::NotBootable),
    /// [`ArchitectureMismatch`](ErrorKind::ArchitectureMismatch) for a kernel of another
    /// architecture than the image's, [`InvalidImage`](ErrorKind::InvalidImage),
    /// [`ImageNameDuplicate`](ErrorKind::ImageNameDuplicate),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) for an encrypted root device of instance store,
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable), [`InsufficientCapacity`](ErrorKind::InsufficientCapacity), [`Cancelled`](ErrorKind::Cancelled). Nothing is left of
    /// it then.
    pub fn register_image<A: Arch>(&self, builder: AmiBuilder<A>, source: ImageSource<'_>) -> Result<Ami<A>> {
        let inner = &self.inner;
        inner.making(|| inner.import(*self.account(), builder, source, |_, _| Ok(())))
    }
}

impl Inner {
    /// Makes and registers an image, in one commit with what else `also` collects.
    pub(crate) fn import<A: Arch>(
        &self,
        owner: AccountId,
        builder: AmiBuilder<A>,
        source: ImageSource<'_>,
        also: impl FnOnce(&mut Changes, AmiId) -> Result<()>,
    ) -> Result<Ami<A>> {
        let stored = match source.root {
            Root::Disk(_) => None,
            Root::Snapshot(id) => Some((id, self.content(&self.snapshot(owner, id)?.digest)?)),
        };
        let root_device = (source.root_device, source.root_device_type);
        if source.encrypted && root_device.1 == RootDeviceType::InstanceStore {
            let what = "an image whose root device is instance store cannot be encrypted";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        // What cannot boot is refused before its bytes are copied.
        let direct = source.boot.is_some();
        let found = match (source.boot, source.root, &stored) {
            (Some(boot), ..) => Found::with_kernel(&boot.kernel, boot.initrd, boot.command_line)?,
            (None, Root::Disk(disk), _) => Found::on_disk(disk)?,
            (None, _, Some((_, snapshot))) => Found::on_disk(&snapshot.disk())?,
            (None, Root::Snapshot(_), None) => return Err(no_root_volume()),
        };
        let (snapshots, snapshot) = match (source.root, stored) {
            (Root::Disk(disk), _) => {
                let mut nobody = |_| ();
                let progress = source.progress.unwrap_or(&mut nobody);
                let failed = |e| Error::storage(e, "cannot copy the disk into the region");
                let imported = match source.encrypted {
                    true => {
                        let key = self.blocks.new_key(None).map_err(failed)?;
                        self.blocks.import_encrypted(disk, &key, progress)
                    }
                    false => self.blocks.import(disk, progress),
                };
                let (snapshot, _) = imported.map_err(failed)?;
                (Vec::new(), snapshot)
            }
            (_, Some((id, snapshot))) => (vec![id], snapshot),
            (Root::Snapshot(_), None) => return Err(no_root_volume()),
        };
        let plan = self.boot.keep(&found)?;
        let boot = match direct {
            true => Boot::direct(plan.kernel, plan.initrd, plan.command_line.clone()),
            false => Boot::root_volume(),
        };
        let ami = builder
            .root_device(root_device.0)
            .block_device(root_mapping(root_device, &snapshot)?)
            .boot(boot)
            .build(&self.region.name, &owner)
            .map_err(invalid_image)?;
        found.check_architecture(ami.architecture())?;
        self.check_mappings(ami.manifest())?;
        self.register(ami.clone().into_any(), plan, snapshots, also)?;
        Ok(ami)
    }

    /// Refuses volumes that no instance could have.
    fn check_mappings(&self, manifest: &Manifest) -> Result<()> {
        for mapping in manifest.block_device_mappings() {
            let Some(digest) = mapping.content() else { continue };
            let name = mapping.device_name();
            let snapshot = self.blocks.snapshot(digest).map_err(|e| {
                let what = format!("{name}: the region has no snapshot {digest}");
                Error::new(ErrorKind::InvalidImage, what).with_code("InvalidSnapshot.NotFound").with_source(e)
            })?;
            mapping.check_snapshot_size(snapshot.size()).map_err(invalid_image)?;
            if snapshot.encrypted() && !mapping.as_ebs().is_some_and(Ebs::encrypted) {
                let what = format!("{name}: its content is encrypted, and so is a volume of it");
                return Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, what));
            }
        }
        Ok(())
    }

    fn register(
        &self,
        ami: AnyAmi,
        boot: BootPlan,
        snapshots: Vec<SnapshotId>,
        also: impl FnOnce(&mut Changes, AmiId) -> Result<()>,
    ) -> Result<()> {
        let _naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        self.check_name(&ami)?;
        for id in &snapshots {
            self.snapshot(*ami.owner(), *id)?;
        }
        self.store.commit(|c| {
            also(c, ami.id())?;
            c.put(&ImageRecord { image: Image::new(ami), boot: Some(boot), snapshots })
        })
    }

    /// Refuses a name that an image of this owner has.
    pub(crate) fn check_name(&self, ami: &AnyAmi) -> Result<()> {
        self.check_free(ami.name(), ami.owner(), ami.region())
    }

    fn check_free(&self, name: &str, owner: &AccountId, region: &RegionName) -> Result<()> {
        let images = self.store.all::<ImageRecord>()?;
        let holds = |image: &Image| {
            let ami = image.ami();
            ami.name() == name
                && ami.owner() == owner
                && ami.region() == region
                && image.state() != ImageState::Deregistered
        };
        match images.iter().find(|r| holds(&r.image)) {
            None => Ok(()),
            Some(holder) => {
                let what = format!("the name {name:?} is that of the image {}", holder.image.id());
                Err(Error::new(ErrorKind::ImageNameDuplicate, what))
            }
        }
    }

    /// Makes something that has content. What it needs is not collected meanwhile, and nothing is left of what fails, once
    /// nothing else is being made.
    pub(crate) fn making<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let making = self.making_images.read().unwrap_or_else(PoisonError::into_inner);
        let made = make();
        drop(making);
        self.half_made.fetch_or(made.is_err(), Ordering::SeqCst);
        if self.half_made.load(Ordering::SeqCst) {
            self.discard_half_made();
        }
        made
    }

    /// Removes what something that failed has left; the error that made it fail is the one to tell. While something else is
    /// being made that is left to whoever ends last: nobody waits for another's copy to fail.
    fn discard_half_made(&self) {
        let _alone = match self.making_images.try_write() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        self.half_made.store(false, Ordering::SeqCst);
        if let Err(e) = self.collect_garbage() {
            tracing::warn!(error = chain(&e), "cannot remove what a failed image left");
        }
    }

    pub(crate) fn create_image(&self, cell: &Cell, name: &str) -> Result<CreatedImage> {
        // Held in this order, so that the instance can be stopped while another image is removed.
        self.making(|| self.create_image_held(cell, &mut cell.hold(self.supervisor.reports()), name))
    }

    fn create_image_held(&self, cell: &Cell, live: &mut Live, name: &str) -> Result<CreatedImage> {
        // Before anything is copied.
        check_ebs_root(&live.record.description, "made an image of")?;
        self.check_free(name, &cell.owner, &self.region.name)?;
        let parent = self.parent(live.record.description.image_id)?;
        let (frozen, paused) = self.freeze_volumes(cell, live)?;
        let taken = frozen.store(&mut |_| ());
        let taken = taken.map_err(|e| Error::storage(e, "cannot take a snapshot of a volume"))?;
        let ami = child_of(&parent, live, name, &taken, self)?;
        let plan = match (&live.record.direct_boot, taken.first()) {
            (Some(plan), _) => plan.clone(),
            (None, Some((root, _))) => self.boot.keep_from_disk(&root.disk())?,
            (None, None) => return Err(no_root_volume()),
        };
        self.register(ami.clone(), plan, Vec::new(), |_, _| Ok(()))?;
        Ok(CreatedImage {
            ami,
            changed_bytes: taken.iter().map(|(_, stats)| stats.changed_bytes).sum(),
            stored_bytes: taken.iter().map(|(_, stats)| stats.stored_bytes).sum(),
            paused,
        })
    }

    /// The image that an instance was made from, whether or not it is still registered.
    fn parent(&self, id: AmiId) -> Result<AnyAmi> {
        match self.store.get::<FormerImage>(&id.to_string())? {
            Some(former) => Ok(former.0.ami().clone()),
            None => Ok(self.image(id)?.image.ami().clone()),
        }
    }

    /// All volumes at one instant, in the order of the attachments, and how long the instance stood still.
    fn freeze_volumes(&self, cell: &Cell, live: &mut Live) -> Result<(FrozenVolumes, Duration)> {
        let state = live.record.description.state;
        let begun = Instant::now();
        match (&live.machine, state) {
            (Some(machine), InstanceState::Running) => {
                machine.pause().map_err(|e| Error::machine(e, format!("cannot pause {}", cell.id)))?;
                let frozen = Volume::freeze(&live.volumes, &self.blocks);
                if let Err(e) = machine.resume() {
                    drop(frozen);
                    return Err(self.not_resumed(cell, live, e));
                }
                Ok((frozen, begun.elapsed()))
            }
            (None, InstanceState::Stopped) => {
                Ok((Volume::freeze(&self.open_volumes(live)?, &self.blocks), begun.elapsed()))
            }
            _ => {
                let what = format!("{} is {state}, in which no image can be made of it", cell.id);
                Err(Error::new(ErrorKind::IncorrectInstanceState, what))
            }
        }
    }

    /// Nobody would resume it later: a machine that stands still is no running instance.
    pub(crate) fn not_resumed(&self, cell: &Cell, live: &mut Live, e: MachineError) -> Error {
        let stands = |machine: &dyn Machine| machine.state().get().exit_cause().is_none();
        let failed = Error::machine(e, format!("cannot resume {}", cell.id));
        // The end of one that has ended is followed up with its own reason.
        if live.machine.as_deref().is_some_and(stands) {
            self.lose(cell, live, StateReason::new("Server.InternalError", chain(&failed)));
        }
        failed
    }
}

/// The image of an instance: what its parent says of it, with the instance's volumes as they are now.
fn child_of(
    parent: &AnyAmi,
    live: &Live,
    name: &str,
    taken: &[(Snapshot, SnapshotStats)],
    region: &Inner,
) -> Result<AnyAmi> {
    let manifest = parent.manifest();
    let description = &live.record.description;
    let mut mappings = Vec::new();
    for (attachment, (snapshot, _)) in description.attachments.iter().zip(taken) {
        let volume: Option<VolumeRecord> = region.store.get(&attachment.volume_id.to_string())?;
        let volume_type = volume.map_or(VolumeType::Gp3, |volume| volume.volume_type);
        let mapping =
            BlockDeviceMapping::ebs(&attachment.device_name, snapshot.digest(), gib(snapshot.size())?);
        mappings.push(
            mapping
                .delete_on_termination(attachment.delete_on_termination)
                .volume_type(volume_type)
                .encrypted(snapshot.encrypted()),
        );
    }
    // What is no volume the image has as its parent had it.
    let others = manifest.block_device_mappings().iter().filter(|m| m.as_ebs().is_none());
    let taken: Vec<&str> = description.attachments.iter().map(|a| a.device_name.as_str()).collect();
    mappings.extend(others.filter(|m| !taken.contains(&m.device_name())).cloned());
    let mut builder = AnyAmi::builder_for(parent.architecture(), name)
        .root_device(&description.root_device_name)
        .block_devices(mappings)
        .software_list(manifest.software().iter().cloned())
        .boot(manifest.boot().clone())
        .parent(parent.digest());
    if let Some(os) = manifest.operating_system() {
        builder = builder.operating_system(os.clone());
    }
    builder.build(&region.region.name, &description.owner).map_err(invalid_image)
}

/// EC2 counts volumes in whole GiB; a smaller disk gets a volume with room to grow.
fn root_mapping(
    (device, of_type): (&str, RootDeviceType),
    snapshot: &Snapshot,
) -> Result<BlockDeviceMapping> {
    let (digest, size) = (snapshot.digest(), gib(snapshot.size())?);
    Ok(match of_type {
        RootDeviceType::InstanceStore => BlockDeviceMapping::instance_store_root(device, digest, size),
        _ => BlockDeviceMapping::ebs(device, digest, size).encrypted(snapshot.encrypted()),
    })
}

fn gib(bytes: u64) -> Result<u32> {
    u32::try_from(bytes.div_ceil(GIB).max(1))
        .map_err(|_| Error::new(ErrorKind::InvalidParameter, "the disk is too large for a volume"))
}

fn invalid_image(e: ami_core::Error) -> Error {
    let code = e.code();
    Error::new(ErrorKind::InvalidImage, "the image description breaks a rule").with_code(code).with_source(e)
}
