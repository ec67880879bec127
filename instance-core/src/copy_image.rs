//! Copies of images: within a region, and from another one.

use std::sync::PoisonError;

use ami_core::{AccountId, AmiId, AnyAmi, Digest, Image, ImageState, Manifest, VolumeId};
use storage_block::keys::EncryptionKey;
use storage_block::{Progress, Snapshot, Volume};

use crate::record::{ImageRecord, SnapshotRecord};
use crate::region::{Inner, Region};
use crate::{Error, ErrorKind, Result};

/// How much is copied at once: what a chunk of a snapshot holds.
const BLOCK: u64 = 64 << 10;
/// With how many contents of its own a region compares one that is to come, before all of it is copied.
const COMPARED: usize = 32;

/// What becomes of a copy of an image (`CopyImage`).
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{CopyImage, DirectBoot, ImageSource, Region};
/// # let dir = tempfile::tempdir()?;
/// # let open = |name| Region::open(dir.path().join(name), FakeHypervisor::new());
/// let (frankfurt, dublin) = (open("eu-central-1")?, open("eu-west-1")?);
/// let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// let ami = frankfurt.register_image(Ami::<X86_64>::builder("web"), source)?;
///
/// let copy = dublin.copy_image_from(&frankfurt, ami.id(), CopyImage::new("web").description("of Frankfurt"))?;
/// assert_eq!((copy.digest(), copy.region()), (ami.digest(), dublin.name()));
/// assert_ne!(copy.id(), ami.id());
/// let source = dublin.image(copy.id())?.source_image().cloned().ok_or("it is a copy")?;
/// assert_eq!((source.id, &source.region), (ami.id(), frankfurt.name()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a specification makes nothing by itself"]
pub struct CopyImage<'a> {
    name: &'a str,
    description: Option<&'a str>,
    encrypted: bool,
    kms_key_id: Option<&'a str>,
    progress: Option<&'a mut dyn FnMut(Progress)>,
}

impl<'a> CopyImage<'a> {
    /// A copy of this name, with the description of its source.
    pub fn new(name: &'a str) -> Self {
        Self { name, description: None, encrypted: false, kms_key_id: None, progress: None }
    }

    /// Another description.
    pub fn description(mut self, description: &'a str) -> Self {
        self.description = Some(description);
        self
    }

    /// Stores all of its disks encrypted, under a data key that the default key of the region's
    /// [keys](crate::RegionOptions::keys) wraps. What is encrypted in the source is stored so in any case.
    pub fn encrypted(mut self, encrypted: bool) -> Self {
        self.encrypted = encrypted;
        self
    }

    /// Encrypted, with this key of the region's keys to wrap the data key.
    pub fn kms_key_id(mut self, key_id: &'a str) -> Self {
        self.kms_key_id = Some(key_id);
        self.encrypted(true)
    }

    /// Told how far the storing of each disk is, and able to end it.
    pub fn progress(mut self, progress: &'a mut dyn FnMut(Progress)) -> Self {
        self.progress = Some(progress);
        self
    }
}

impl std::fmt::Debug for CopyImage<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, description, encrypted, kms_key_id, .. } = self;
        f.debug_struct("CopyImage")
            .field("name", name)
            .field("description", description)
            .field("encrypted", encrypted)
            .field("kms_key_id", kms_key_id)
            .finish_non_exhaustive()
    }
}

impl<H> Region<H> {
    /// Makes an image of the account's own of one that it may launch, in this region (`CopyImage`). It has
    /// the same content and description, and neither permissions nor tags.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let copy = region.copy_image(ami.id(), "web-copy")?;
    /// assert_eq!(copy.digest(), ami.digest());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure) without
    /// permission, [`ImageUnavailable`](ErrorKind::ImageUnavailable),
    /// [`ImageNameDuplicate`](ErrorKind::ImageNameDuplicate), [`InvalidImage`](ErrorKind::InvalidImage) for a
    /// name that breaks the rule, or what the host met.
    pub fn copy_image(&self, id: AmiId, name: &str) -> Result<AnyAmi> {
        let inner = &self.inner;
        let _naming = inner.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let ImageRecord { image, boot, .. } = inner.image(id)?;
        let mut copy = image.copy_to(self.account(), &inner.region.name, name)?;
        copy.set_state(ImageState::Available)?;
        inner.check_name(copy.ami())?;
        let ami = copy.ami().clone();
        inner.store.commit(|c| c.put(&ImageRecord { image: copy, boot, snapshots: Vec::new() }))?;
        Ok(ami)
    }

    /// The same of an image of another region, which this process has open too. The copy has another id and the same
    /// digest, and [says](ami_core::Image::source_image) what it is a copy of.
    ///
    /// Content that this region holds is not copied. Of other content the blocks are that differ from what this region
    /// has that is most like it; where nothing is like it, all are.
    ///
    /// What is encrypted is encrypted anew, under a key of this region's: all of it is copied, and as content that is
    /// encrypted is named by its key, the copy has another digest.
    ///
    /// # Errors
    ///
    /// As [`copy_image`](Self::copy_image), [`Cancelled`](ErrorKind::Cancelled),
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) where either region lacks a key,
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity), or what either host met. Nothing is left of it then.
    pub fn copy_image_from<S>(&self, source: &Region<S>, id: AmiId, copy: CopyImage<'_>) -> Result<AnyAmi> {
        let inner = &self.inner;
        let making = inner.making_images.read().unwrap_or_else(PoisonError::into_inner);
        let made = inner.copy_image_from(&source.inner, *self.account(), id, copy);
        drop(making);
        made.inspect_err(|_| inner.discard_half_made())
    }
}

impl Inner {
    fn copy_image_from(
        &self,
        source: &Self,
        account: AccountId,
        id: AmiId,
        request: CopyImage<'_>,
    ) -> Result<AnyAmi> {
        let ImageRecord { image, boot, .. } = source.image(id)?;
        let copy_of = |manifest: Manifest| -> Result<Image> {
            let mut copy = image.copy_as(&account, &self.region.name, request.name, manifest)?;
            copy.set_state(ImageState::Available)?;
            if let Some(description) = request.description {
                copy.set_description(description)?;
            }
            self.check_name(copy.ami())?;
            Ok(copy)
        };
        let manifest = image.ami().manifest();
        // What cannot be is refused before anything is copied.
        copy_of(manifest.clone())?;
        let contents = manifest.block_device_mappings().iter().filter_map(|disk| disk.as_ebs()?.snapshot());
        let mut secret = request.encrypted;
        for digest in contents {
            secret |= source.content(digest)?.encrypted();
        }
        let key = secret.then(|| self.blocks.new_key(request.kms_key_id)).transpose();
        let key = key.map_err(|e| Error::storage(e, "cannot encrypt the copy"))?;
        let mut nobody = |_| ();
        let progress = request.progress.unwrap_or(&mut nobody);
        let mut disks = Vec::new();
        for disk in manifest.block_device_mappings() {
            disks.push(match disk.as_ebs().and_then(|ebs| ebs.snapshot()) {
                Some(digest) => {
                    // It stays for as long as this, whatever becomes of the image.
                    let wanted = source.content(digest)?;
                    match key.as_ref().filter(|_| request.encrypted || wanted.encrypted()) {
                        Some(key) => {
                            let digest = self.encrypt_content(&wanted, key, progress)?;
                            disk.clone().snapshot(digest).encrypted(true)
                        }
                        None => {
                            self.copy_content(&wanted, progress)?;
                            disk.clone()
                        }
                    }
                }
                None => disk.clone(),
            });
        }
        // What an image that was put into the catalogue alone boots is found out when it is launched.
        let boot = boot.map(|plan| self.boot.copy_from(&source.boot, plan)).transpose()?;
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = copy_of(manifest.with_block_devices(disks)?)?;
        let ami = copy.ami().clone();
        self.store.commit(|c| c.put(&ImageRecord { image: copy, boot, snapshots: Vec::new() }))?;
        Ok(ami)
    }

    /// Brings the content of another region here under a key, and gives its name here. Whoever calls keeps it from being
    /// collected.
    fn encrypt_content(
        &self,
        wanted: &Snapshot,
        key: &EncryptionKey,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Digest> {
        let failed = |e| Error::storage(e, format!("cannot copy the content {}", wanted.digest()));
        let (made, _) = self.blocks.import_encrypted(&wanted.disk(), key, progress).map_err(failed)?;
        Ok(made.digest())
    }

    /// Brings the content of another region here as it is. Whoever calls keeps it from being collected.
    fn copy_content(&self, wanted: &Snapshot, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let digest = wanted.digest();
        if self.blocks.snapshot(&digest).is_ok() {
            return Ok(());
        }
        let failed = |e| Error::storage(e, format!("cannot copy the content {digest}"));
        let made = match self.most_alike(wanted)? {
            Some(base) => self.copy_changed(&base, wanted, progress)?,
            None => self.blocks.import(&wanted.disk(), progress).map_err(failed)?.0,
        };
        match made.digest() == digest {
            true => Ok(()),
            false => {
                let what = format!("the content {digest} has become {}", made.digest());
                Err(Error::new(ErrorKind::Corrupt, what))
            }
        }
    }

    /// The content of this region from which the fewest blocks of `wanted` differ, if any is worth it.
    fn most_alike(&self, wanted: &Snapshot) -> Result<Option<Snapshot>> {
        let failed = |e| Error::storage(e, "cannot compare contents");
        let images = self.store.all::<ImageRecord>()?;
        let of_images =
            images.iter().flat_map(|record| record.image.ami().manifest().block_device_mappings());
        let of_images = of_images.filter_map(|mapping| mapping.as_ebs()?.snapshot().copied());
        let of_users = self.store.all::<SnapshotRecord>()?.into_iter().map(|record| record.digest);
        let mut contents: Vec<Digest> = of_images.chain(of_users).collect();
        contents.sort_unstable();
        contents.dedup();
        let mut best = None;
        let mut fewest = wanted.blocks(BLOCK).map_err(failed)?.count();
        for digest in contents.iter().take(COMPARED) {
            // One that cannot be opened, or is larger than what a smaller volume could become, is no help.
            let Ok(base) = self.blocks.snapshot(digest) else { continue };
            if base.encrypted() || base.size() > wanted.size() {
                continue;
            }
            // No further than it can be the best.
            let differ = wanted.changed_blocks(&base, BLOCK).map_err(failed)?.take(fewest).count();
            if differ < fewest {
                (best, fewest) = (Some(base), differ);
            }
        }
        Ok(best)
    }

    /// Makes `wanted` of what is here: on a volume that no record names, so that nothing is left of it after a crash.
    fn copy_changed(
        &self,
        base: &Snapshot,
        wanted: &Snapshot,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Snapshot> {
        let failed = |e| Error::storage(e, format!("cannot copy the content {}", wanted.digest()));
        let id = VolumeId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        let dir = self.paths.volume(id);
        let mut copy = || {
            let volume = Volume::create_unsynced(&dir, Some(base), wanted.size())?;
            let (from, to) = (wanted.disk(), volume.disk());
            let mut bytes = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
            for block in wanted.changed_blocks(base, BLOCK)? {
                let block = block?;
                let at = block.index * BLOCK;
                let len = BLOCK.min(wanted.size() - at);
                match block.after {
                    true => {
                        let part = &mut bytes[..usize::try_from(len).unwrap_or_default()];
                        from.read_at(part, at)?;
                        to.write_at(part, at)?;
                    }
                    false => to.discard(at, len)?,
                }
            }
            volume.snapshot_with(&self.blocks, progress).map(|(snapshot, _)| snapshot)
        };
        let made = copy().map_err(failed);
        // What stays is removed when the region is opened again.
        if let Err(e) = Volume::remove(&dir) {
            tracing::warn!(error = crate::error::chain(&e), "cannot remove what a copy was made on");
        }
        made
    }
}
