//! Copies of images: within a region, and from another one.

mod content;

use std::sync::PoisonError;

use ami_core::{
    AccountId, Action, AmiId, AnyAmi, BlockDeviceMapping, CopyImageTaskId, Image, ImageState, Manifest,
    RootDeviceType,
};
use storage_block::{Progress, Snapshot};

use crate::boot_cache::BootPlan;
use crate::machine::Boot;
use crate::record::ImageRecord;
use crate::region::{Inner, Region};
use crate::store::Changes;
use crate::tasks::{CopyImageTask, Done, put_completed};
use crate::{Error, ErrorKind, Result};

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
#[derive(Debug, Clone)]
#[must_use = "a specification makes nothing by itself"]
pub struct CopyImage {
    name: String,
    description: Option<String>,
    encrypted: bool,
    kms_key_id: Option<String>,
}

impl CopyImage {
    /// A copy of this name, with the description of its source.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), description: None, encrypted: false, kms_key_id: None }
    }

    /// Another description.
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = Some(description.into());
        self
    }

    /// Stores all of its disks encrypted, under a data key that the default key of the region's
    /// [keys](crate::RegionOptions::keys) wraps. What is encrypted in the source is stored so in any case.
    pub fn encrypted(mut self, encrypted: bool) -> Self {
        self.encrypted = encrypted;
        self
    }

    /// Encrypted, with this key of the region's keys to wrap the data key.
    pub fn kms_key_id(mut self, key_id: impl Into<String>) -> Self {
        self.kms_key_id = Some(key_id.into());
        self.encrypted(true)
    }
}

/// Told how far a content is, which of the image's it is, and of how many.
type Told<'a> = dyn FnMut(Progress, usize, usize) + 'a;

/// An image of another region, and all that a copy takes of it, whatever becomes of both meanwhile.
struct Original {
    image: Image,
    /// What it boots. Of one that was put into the catalogue alone that is found out when it is launched.
    boot: Option<(BootPlan, Boot)>,
    /// What its disks begin with, in their order.
    contents: Vec<Snapshot>,
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
    /// [`ImageNameDuplicate`](ErrorKind::ImageNameDuplicate),
    /// [`MalformedImageName`](ErrorKind::MalformedImageName), or what the host met.
    pub fn copy_image(&self, id: AmiId, name: &str) -> Result<AnyAmi> {
        let inner = &self.inner;
        let _naming = inner.naming.write().unwrap_or_else(PoisonError::into_inner);
        let ImageRecord { image, boot } = inner.image(id)?;
        let mut copy = image.copy_to(self.account(), &inner.region.name, name)?;
        copy.set_state(ImageState::Available)?;
        let copy = inner.under_new_id(copy)?;
        inner.check_name(copy.ami())?;
        let ami = copy.ami().clone();
        inner.store.commit(|c| c.put(&ImageRecord { image: copy, boot }))?;
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
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) where what is to be encrypted has a root device
    /// of instance store, [`InsufficientVolumeCapacity`](ErrorKind::InsufficientVolumeCapacity), or what either host met. Nothing is left
    /// of it then.
    pub fn copy_image_from<S>(&self, source: &Region<S>, id: AmiId, copy: CopyImage) -> Result<AnyAmi> {
        self.copy_image_from_with(source, id, copy, &mut |_| ())
    }

    /// The same with somebody who is told how far the storing of each disk is, and can end it.
    ///
    /// # Errors
    ///
    /// As [`copy_image_from`](Self::copy_image_from).
    pub fn copy_image_from_with<S>(
        &self,
        source: &Region<S>,
        id: AmiId,
        copy: CopyImage,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<AnyAmi> {
        let original = source.inner.original(self.account(), id)?;
        let mut tell = |at: Progress, _, _| progress(at);
        let inner = &self.inner;
        inner.making(|| inner.copy_from(original, *self.account(), &copy, &mut tell, |_, _| Ok(())))
    }

    /// Begins the same in a thread of its own. EC2 has no such task: there the copy is an image at once, which is
    /// `pending`; here it is an image when it is whole.
    ///
    /// The source may be closed meanwhile, or the image deregistered there; its directory is in use until the copy has
    /// ended.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let open = |name| Region::open(dir.path().join(name), FakeHypervisor::new());
    /// # let (frankfurt, dublin) = (open("eu-central-1")?, open("eu-west-1")?);
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = frankfurt.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// use std::time::{Duration, Instant};
    /// use instance_core::{CopyImage, DescribeCopyImageTasks};
    ///
    /// let task = dublin.begin_copy_image_from(&frankfurt, ami.id(), CopyImage::new("web"))?;
    /// task.watch().subscribe(|task| println!("{} {} %", task.id, task.progress));
    /// let copy = task.wait(Instant::now() + Duration::from_secs(60))?.image_id.ok_or("it has made one")?;
    /// assert_eq!(dublin.image(copy)?.ami().digest(), ami.digest());
    /// assert_eq!(dublin.describe_copy_image_tasks(&DescribeCopyImageTasks::new())?.items.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure),
    /// [`ImageUnavailable`](ErrorKind::ImageUnavailable), [`KeyUnavailable`](ErrorKind::KeyUnavailable) where the source
    /// lacks a key, [`ResourceLimitExceeded`](ErrorKind::ResourceLimitExceeded) with twenty under way, or what a host met.
    /// What else [`copy_image_from`](Self::copy_image_from) refuses [the task](CopyImageTask::wait) says.
    pub fn begin_copy_image_from<S>(
        &self,
        source: &Region<S>,
        id: AmiId,
        copy: CopyImage,
    ) -> Result<CopyImageTask> {
        let (inner, account) = (&self.inner, *self.account());
        let original = source.inner.original(&account, id)?;
        let task = CopyImageTaskId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        let task = CopyImageTask::making(task, account, &copy.name, "copying");
        inner.begin(&task, &inner.tasks.copies, move |region, task| {
            let mut tell = |at: Progress, nth, of| {
                task.reach_part(at.done, at.total, nth, of);
                if task.is_cancelled() {
                    at.cancel();
                }
            };
            let put = |c: &mut Changes, image| put_completed(task, c, &Done::new(image));
            let made = region.making(|| region.copy_from(original, account, &copy, &mut tell, put));
            made.map(|ami| Done::new(ami.id()))
        })
    }
}

impl Inner {
    /// What a copy of an image takes of this region, if the account may copy it.
    fn original(&self, account: &AccountId, id: AmiId) -> Result<Original> {
        // Content stays for as long as it is open here, whatever becomes of the image.
        let _making = self.begin_making();
        let ImageRecord { image, boot } = self.image(id)?;
        image.authorize(account, Action::Copy)?;
        let open = |plan: BootPlan| self.boot.boot(&plan).map(|boot| (plan, boot));
        let boot = boot.map(open).transpose()?;
        let disks = image.ami().manifest().block_device_mappings().iter();
        let contents = disks.filter_map(BlockDeviceMapping::content);
        let contents = contents.map(|digest| self.content(digest)).collect::<Result<_>>()?;
        Ok(Original { image, boot, contents })
    }

    /// Makes the copy, in one commit with what else `also` collects.
    fn copy_from(
        &self,
        original: Original,
        account: AccountId,
        request: &CopyImage,
        tell: &mut Told<'_>,
        also: impl FnOnce(&mut Changes, AmiId) -> Result<()>,
    ) -> Result<AnyAmi> {
        let Original { image, boot, contents } = original;
        let copy_of = |manifest: Manifest| -> Result<Image> {
            let mut copy = image.copy_as(&account, &self.region.name, &request.name, manifest)?;
            copy.set_state(ImageState::Available)?;
            if let Some(description) = &request.description {
                copy.set_description(description)?;
            }
            self.check_name(copy.ami())?;
            Ok(copy)
        };
        let manifest = image.ami().manifest();
        // What cannot be is refused before anything is copied.
        copy_of(manifest.clone())?;
        if request.encrypted && manifest.root_device_type() == RootDeviceType::InstanceStore {
            let what = "an image whose root device is instance store cannot be encrypted";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        let secret = request.encrypted || contents.iter().any(Snapshot::encrypted);
        let key = secret.then(|| self.blocks.new_key(request.kms_key_id.as_deref())).transpose();
        let key = key.map_err(|e| Error::storage(e, "cannot encrypt the copy"))?;
        let mut disks = manifest.block_device_mappings().to_vec();
        let with_content = disks.iter_mut().filter(|disk| disk.content().is_some());
        let of = contents.len();
        for (nth, (disk, wanted)) in with_content.zip(&contents).enumerate() {
            let mut progress = |at: Progress| tell(at, nth, of);
            match key.as_ref().filter(|_| request.encrypted || wanted.encrypted()) {
                Some(key) => {
                    let digest = self.encrypt_content(wanted, key, &mut progress)?;
                    *disk = disk.clone().snapshot(digest).encrypted(true);
                }
                None => self.copy_content(wanted, &mut progress)?,
            }
        }
        let boot = boot.map(|(plan, files)| self.boot.copy_of(plan, &files)).transpose()?;
        let manifest = manifest.with_block_devices(disks)?;
        #[cfg(feature = "sbom")]
        if let Some(root) = manifest.root_device().and_then(BlockDeviceMapping::content) {
            self.keep_software(&self.content(root)?);
        }
        let _naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        let copy = self.under_new_id(copy_of(manifest)?)?;
        let ami = copy.ami().clone();
        self.store.commit(|c| {
            also(c, ami.id())?;
            c.put(&ImageRecord { image: copy, boot })
        })?;
        Ok(ami)
    }
}
