//! Making images from a disk or a snapshot, and putting them into the region.

use std::sync::PoisonError;

use ami_core::{
    AccountId, Ami, AmiBuilder, AmiId, AnyAmi, Arch, BlockDeviceMapping, Boot, BootSource, Ebs, Image,
    ImageState, Manifest, RegionName, RootDeviceType,
};
use storage_block::Snapshot;

use crate::boot_cache::{BootPlan, Found};
use crate::image_source::{ImageSource, ROOT_DEVICE, Root};
use crate::power::no_root_volume;
use crate::products::ProductCodes;
use crate::record::ImageRecord;
use crate::region::{Inner, Region};
use crate::store::Changes;
use crate::{Error, ErrorKind, Result};

const GIB: u64 = 1 << 30;

impl<H> Region<H> {
    /// Registers an image made of `source` (`ImportSnapshot` and `RegisterImage` in one).
    ///
    /// The builder says the rest; boot source and content of the root volume are set here. What the builder maps at the root
    /// device says of which size and type its volume is, and whether that goes with the instance; it is as large as its
    /// content, of type gp3 and goes if the builder does not say. Content that it names for other devices has to be that of a
    /// snapshot of the account's, or of an image whose bytes it may [have](ami_core::Action::Export).
    ///
    /// ```
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, Region};
    /// use ami_core::{Ami, BlockDeviceMapping, VolumeType, X86_64};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// let root = BlockDeviceMapping::blank("/dev/xvda", 20).volume_type(VolumeType::Gp2);
    /// let ami = region.register_image(Ami::<X86_64>::builder("web").block_device(root), source)?;
    /// assert_eq!(ami.manifest().root_volume().map(|root| root.volume_size_gib()), Some(20));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotBootable`](ErrorKind::NotBootable),
    /// [`ArchitectureMismatch`](ErrorKind::ArchitectureMismatch) for a kernel of another
    /// architecture than the image's, [`MalformedImageName`](ErrorKind::MalformedImageName),
    /// [`InvalidBlockDeviceMapping`](ErrorKind::InvalidBlockDeviceMapping),
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound) for content that the account does not have,
    /// [`MissingParameter`](ErrorKind::MissingParameter), [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`ImageNameDuplicate`](ErrorKind::ImageNameDuplicate),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) for an encrypted root device of instance
    /// store, or a boot mode with a kernel beside the disk,
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable), [`InsufficientVolumeCapacity`](ErrorKind::InsufficientVolumeCapacity), [`Cancelled`](ErrorKind::Cancelled). Nothing is left of
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
        let mut codes = ProductCodes::new();
        let stored = match source.root {
            Root::Disk(_) => None,
            Root::Snapshot(id) => {
                let record = self.snapshot(owner, id)?;
                codes.extend(record.product_codes);
                Some((id, self.content(&record.digest)?))
            }
        };
        if source.encrypted && source.root_device_type == RootDeviceType::InstanceStore {
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
        let (of, snapshot) = match (source.root, stored) {
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
                (None, snapshot)
            }
            (_, Some((id, snapshot))) => (Some(id), snapshot),
            (Root::Snapshot(_), None) => return Err(no_root_volume()),
        };
        let plan = self.boot.keep(&found)?;
        let boot = match direct {
            true => Boot::direct(plan.kernel, plan.initrd, plan.command_line.clone()).source().clone(),
            false => BootSource::RootVolume,
        };
        let root_device = source.root_device.or(builder.root_device_name()).unwrap_or(ROOT_DEVICE);
        let root = root_mapping((root_device, source.root_device_type), &snapshot)?;
        let ami = builder.root_content(root).boot_source(boot).build(&self.region.name, &owner)?;
        found.check_architecture(ami.architecture())?;
        codes.extend(self.check_mappings(&owner, ami.manifest())?);
        let mut image = Image::new(ami.into_any());
        codes.into_iter().try_for_each(|code| image.add_product_code(code))?;
        image.set_snapshots(of);
        source.imds_support.into_iter().for_each(|support| image.set_imds_support(support));
        // Before the image is there, and the task that makes it has completed.
        #[cfg(feature = "sbom")]
        self.keep_software(&snapshot);
        let ami = self.register(image, plan, also)?;
        Ok(ami.typed().map_err(ami_core::Error::from)?)
    }

    /// Refuses volumes that no instance could have, and content that is not the owner's to name, whose product codes it
    /// gives otherwise. The root device's is the image's own.
    fn check_mappings(&self, owner: &AccountId, manifest: &Manifest) -> Result<ProductCodes> {
        let mut codes = ProductCodes::new();
        for mapping in manifest.block_device_mappings() {
            let Some(digest) = mapping.content() else { continue };
            let name = mapping.device_name();
            if name != manifest.root_device_name().as_str() {
                codes.extend(self.codes_of_content(owner, digest)?);
            }
            let snapshot = self.content(digest)?;
            mapping.check_snapshot_size(snapshot.size())?;
            if snapshot.encrypted() && !mapping.as_ebs().is_some_and(Ebs::encrypted) {
                let what = format!("{name}: its content is encrypted, and so is a volume of it");
                return Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, what));
            }
        }
        Ok(codes)
    }

    /// Puts an image into the region, under an id that no image had, and gives it.
    pub(crate) fn register(
        &self,
        image: Image,
        boot: BootPlan,
        also: impl FnOnce(&mut Changes, AmiId) -> Result<()>,
    ) -> Result<AnyAmi> {
        let _naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        let image = self.under_new_id(image)?;
        self.check_name(image.ami())?;
        let ami = image.ami().clone();
        for id in image.snapshots() {
            self.snapshot(*ami.owner(), id)?;
        }
        self.store.commit(|c| {
            also(c, ami.id())?;
            c.put(&ImageRecord { image, boot: Some(boot) })
        })?;
        Ok(ami)
    }

    /// Refuses a name that an image of this owner has.
    pub(crate) fn check_name(&self, ami: &AnyAmi) -> Result<()> {
        self.check_free(ami.name(), ami.owner(), ami.region())
    }

    pub(crate) fn check_free(&self, name: &str, owner: &AccountId, region: &RegionName) -> Result<()> {
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

pub(crate) fn gib(bytes: u64) -> Result<u32> {
    u32::try_from(bytes.div_ceil(GIB).max(1))
        .map_err(|_| Error::new(ErrorKind::InvalidParameter, "the disk is too large for a volume"))
}
