//! EC2's calls on a region's images, and the catalogue under them.

use std::sync::{Arc, PoisonError};

use ami_core::{
    Action, AmiId, BlockDeviceMapping, Catalog, CatalogExt, DescribeImages, DeviceName, Image,
    ModifyImageAttribute, Page, Query, Timestamp,
};
use storage_block::Disk;

use crate::record::{FormerImage, ImageRecord};
use crate::region::{Inner, Owner, Region};
use crate::{Error, ErrorKind, Result};

impl<H> Region<H> {
    /// The images that the account may launch, and its own, in the order of their ids: all that
    /// [`describe_images`](Self::describe_images) can tell it of.
    ///
    /// # Errors
    ///
    /// What reading the state store met.
    pub fn images(&self) -> Result<Vec<Image>> {
        Ok(self.catalog().list(&Query::all().visible_to(*self.account()))?)
    }

    /// The image with this id, if the account sees it.
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), or what reading the state store met.
    pub fn image(&self, id: AmiId) -> Result<Image> {
        Ok(self.catalog().as_account(*self.account()).get(&id)?)
    }

    /// The records of all images of all accounts, without permissions: for who runs the region. With it an
    /// image gets a record that was not made here; its content has to be in the region when it is launched. One that was
    /// deregistered does not come back under the id that it had.
    ///
    /// ```
    /// # use instance_core::{Region, testing::FakeHypervisor};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// use ami_core::{Catalog, Query};
    ///
    /// assert!(region.catalog().list(&Query::all())?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn catalog(&self) -> RegionCatalog {
        RegionCatalog(self.inner.clone())
    }

    /// The images that the request asks for (`DescribeImages`): those that are there. Those that are being made, or could not
    /// be, are known [by name](Self::unfinished_images).
    ///
    /// ```
    /// # use instance_core::{Region, testing::FakeHypervisor};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// use ami_core::{DescribeImages, Filter};
    ///
    /// let request = DescribeImages::new().owner("self".parse()?).filter(Filter::new("name", ["web-*"])?);
    /// assert!(region.describe_images(&request)?.items.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound) for an id of no image that the account sees,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination),
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken), or what reading the state store met.
    pub fn describe_images(&self, request: &DescribeImages) -> Result<Page<Image>> {
        Ok(self.catalog().as_account(*self.account()).describe(request)?)
    }

    /// Changes attributes of an image of the account's (`ModifyImageAttribute`).
    /// [`as_account`](Self::as_account) shows it in use.
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure) for another's,
    /// those of [`ModifyImageAttribute::apply`], or what the host met.
    pub fn modify_image_attribute(&self, id: AmiId, change: &ModifyImageAttribute) -> Result<Image> {
        Ok(self.catalog().as_account(*self.account()).modify(&id, change)?)
    }

    /// Sets an image of the account's aside: nobody else sees it, nobody launches it, and its permissions are
    /// gone (`DisableImage`).
    ///
    /// ```
    /// # use ami_core::{Ami, ImageState, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// region.disable_image(ami.id())?;
    /// let refused = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?)).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::ImageUnavailable);
    /// assert_eq!(region.enable_image(ami.id())?.state(), ImageState::Available);
    /// region.enable_image_deprecation(ami.id(), None)?; // from now on
    /// region.disable_image_deprecation(ami.id())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure) for another's,
    /// [`IncorrectState`](ErrorKind::IncorrectState) unless it is available, or what the host met.
    pub fn disable_image(&self, id: AmiId) -> Result<Image> {
        Ok(self.catalog().as_account(*self.account()).disable(&id)?)
    }

    /// Takes an image into use again that was [disabled](Self::disable_image) (`EnableImage`).
    ///
    /// # Errors
    ///
    /// As [`disable_image`](Self::disable_image), unless it is disabled.
    pub fn enable_image(&self, id: AmiId) -> Result<Image> {
        Ok(self.catalog().as_account(*self.account()).enable(&id)?)
    }

    /// Deprecates an image of the account's from the minute nearest to `at` on, or from now on
    /// (`EnableImageDeprecation`): others are told of it only by its id, and can launch it all the same.
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure) for another's,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a moment that has passed or is more than ten
    /// years off or, of a public image, more than two years after it was made, or what the host met.
    pub fn enable_image_deprecation(&self, id: AmiId, at: Option<Timestamp>) -> Result<Image> {
        Ok(self.catalog().as_account(*self.account()).enable_deprecation(&id, at)?)
    }

    /// Takes a deprecation back (`DisableImageDeprecation`).
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure) for another's, or
    /// what the host met.
    pub fn disable_image_deprecation(&self, id: AmiId) -> Result<Image> {
        Ok(self.catalog().as_account(*self.account()).disable_deprecation(&id)?)
    }

    /// The bytes of a volume of an image's, to read: what is exported, and what EC2's EBS direct APIs read. They stay
    /// for as long as the disk, also when the image goes.
    ///
    /// The crate `image-formats` makes a file of them, and opens files that images are
    /// [registered](Self::register_image) of.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let root = region.image_disk(ami.id(), "/dev/xvda")?;
    /// assert_eq!((root.size(), root.read_only()), (disk.size(), true));
    /// let none = region.image_disk(ami.id(), "/dev/sdf").unwrap_err();
    /// assert_eq!(none.kind(), ErrorKind::InvalidBlockDeviceMapping);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure) without the permission
    /// to copy it, and for an image with a product code, [`ImageUnavailable`](ErrorKind::ImageUnavailable),
    /// [`InvalidBlockDeviceMapping`](ErrorKind::InvalidBlockDeviceMapping) for a device at which the image has no
    /// content, or what the host met.
    pub fn image_disk(&self, id: AmiId, device: &str) -> Result<Disk> {
        let image = self.inner.image(id)?.image;
        image.authorize(self.account(), Action::Export)?;
        let manifest = image.ami().manifest();
        let named = device.parse::<DeviceName>().ok();
        let same = |mapping: &&BlockDeviceMapping| {
            let there = mapping.validate().ok();
            named.as_ref().zip(there).is_some_and(|(named, there)| there.same_disk(named))
        };
        let mapping = manifest.block_device_mappings().iter().find(same);
        let content = mapping.and_then(|mapping| mapping.content().copied());
        let content = content.ok_or_else(|| {
            let what = format!("{id} has no content at {device:?}");
            Error::new(ErrorKind::InvalidBlockDeviceMapping, what)
        })?;
        let content = self.inner.content(&content);
        Ok(content.inspect_err(|e| self.inner.look_for_damage(id, e))?.disk())
    }

    /// Deregisters an image of the account's (`DeregisterImage`). Instances made from it go on; the bytes that nothing else
    /// names go, as soon as nothing is being imported, copied or made an image or a snapshot of. Its id is not used again,
    /// also if the same is registered anew.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// region.deregister_image(ami.id())?;
    /// let gone = region.image(ami.id()).err().map(|e| e.kind());
    /// assert_eq!(gone, Some(ErrorKind::ImageNotFound));
    /// let next = server.create_image("web-2")?; // it goes on
    /// assert_eq!(region.image(next.ami.id())?.ami(), &next.ami);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ImageNotFound`](ErrorKind::ImageNotFound), [`AuthFailure`](ErrorKind::AuthFailure) for another
    /// account's, or what the host met.
    pub fn deregister_image(&self, id: AmiId) -> Result<()> {
        self.catalog().as_account(*self.account()).deregister(&id)?;
        Ok(())
    }
}

/// The images of a region as a [`Catalog`]. [`Region::catalog`] gives one.
#[derive(Clone)]
pub struct RegionCatalog(Arc<Owner>);

impl std::fmt::Debug for RegionCatalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RegionCatalog").field(&self.0.region.name).finish()
    }
}

impl Catalog for RegionCatalog {
    fn get(&self, id: &AmiId) -> Result<Image, ami_core::Error> {
        Ok(self.0.image(*id).map_err(outwards)?.image)
    }

    fn list(&self, query: &Query) -> Result<Vec<Image>, ami_core::Error> {
        let images = self.0.store.all::<ImageRecord>().map_err(outwards)?;
        Ok(query.select(images.iter().map(|record| &record.image)))
    }

    fn put(&self, image: Image) -> Result<(), ami_core::Error> {
        self.0.put_image(image).map_err(outwards)
    }

    fn update(&self, current: &Image, next: Image) -> Result<(), ami_core::Error> {
        let naming = self.0.naming.write().unwrap_or_else(PoisonError::into_inner);
        let kept = self.0.image(current.id()).map_err(outwards)?;
        current.check_update(&kept.image, &next)?;
        let takes_a_name = |image: &Image| image.state() != ami_core::ImageState::Deregistered;
        if takes_a_name(&next) && !takes_a_name(&kept.image) {
            self.0.check_name(next.ami()).map_err(outwards)?;
        }
        let id = next.id();
        self.0.store.commit(|c| c.put(&ImageRecord { image: next, ..kept })).map_err(outwards)?;
        drop(naming);
        self.0.tell_image(id);
        Ok(())
    }

    /// The bytes that nothing else names go with it.
    fn remove(&self, id: &AmiId) -> Result<Image, ami_core::Error> {
        self.0.remove_image(*id).map_err(outwards)
    }
}

impl Inner {
    fn put_image(&self, image: Image) -> Result<()> {
        let _naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        if self.store.get::<ImageRecord>(&image.id().to_string())?.is_some() {
            let what = format!("the image {} is there already", image.id());
            return Err(Error::new(ErrorKind::ImageNameDuplicate, what));
        }
        if self.was_used(image.ami())? {
            return Err(ami_core::Error::used_id(&image.id()).into());
        }
        if image.state() != ami_core::ImageState::Deregistered {
            self.check_name(image.ami())?;
        }
        self.store.commit(|c| c.put(&ImageRecord { image, boot: None }))
    }

    fn remove_image(&self, id: AmiId) -> Result<Image> {
        let naming = self.naming.write().unwrap_or_else(PoisonError::into_inner);
        let image = self.image(id)?.image;
        let needed = self.has_instances(id)?;
        self.store.commit(|c| {
            c.remove::<ImageRecord>(id);
            self.put_used(c, &image)?;
            if needed { c.put(&FormerImage::of(image.clone())) } else { Ok(()) }
        })?;
        drop(naming);
        let collected = self.collect_soon();
        self.tell_image(id);
        collected.map(|()| image)
    }
}

/// An error under the kinds of `ami-core`.
fn outwards(e: Error) -> ami_core::Error {
    let kind = match e.kind() {
        ErrorKind::ImageNotFound => ami_core::ErrorKind::NotFound,
        ErrorKind::ImageNameDuplicate => ami_core::ErrorKind::DuplicateName,
        _ => return ami_core::Error::new(ami_core::ErrorKind::Internal, "the region failed").with_source(e),
    };
    ami_core::Error::new(kind, e.to_string())
}
