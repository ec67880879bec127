//! The catalog: where a region keeps the records of its images.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::Error;
use crate::{AccountId, AccountImages, AmiId, ErrorKind, Image, ImageState, Query};

/// Where the records of images are kept.
///
/// ```
/// use ami_core::{Catalog, Error, Filter, Image, ImageState, MemoryCatalog, Query};
///
/// /// Sets every image aside whose name begins so. For whatever keeps the images.
/// fn disable(catalog: &dyn Catalog, prefix: &str) -> Result<usize, Error> {
///     let found = catalog.list(&Query::all().filter(Filter::new("name", [format!("{prefix}*")])?))?;
///     for current in &found {
///         let mut next = current.clone();
///         next.set_state(ImageState::Disabled)?;
///         catalog.update(current, next)?; // a Conflict if somebody else was faster
///     }
///     Ok(found.len())
/// }
/// assert_eq!(disable(&MemoryCatalog::new(), "web-")?, 0);
/// # Ok::<(), Error>(())
/// ```
///
/// # Contract
///
/// - A method that returned `Ok` has happened, and every later call on any thread sees it. One that
///   returned an error has changed nothing.
/// - The records come validated: an [`Image`] cannot be an invalid one. The catalog checks only what
///   concerns several records: ids and names.
/// - Within one region and owner, no two images have the same name. Images that are deregistered do not
///   count.
/// - No id is used twice. One that was removed is not put back, for whoever kept its id would find another record by it; the
///   same [after it](Image::with_incarnation) is another. A catalog may know of each image only the last incarnation that was
///   removed, and take all before it for used.
/// - It asks for no permission: [`CatalogExt::as_account`] does, by [`Image::authorize`].
/// - Any thread may call at any time.
///
/// [`testing::catalog_conformance`](crate::testing::catalog_conformance) checks an implementation.
pub trait Catalog: Send + Sync {
    /// The image `id`.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound).
    fn get(&self, id: &AmiId) -> Result<Image, Error>;

    /// What [`Query::select`] makes of all images.
    ///
    /// # Errors
    ///
    /// Only those of the catalog's own storage.
    fn list(&self, query: &Query) -> Result<Vec<Image>, Error>;

    /// Adds an image.
    ///
    /// # Errors
    ///
    /// [`DuplicateName`](ErrorKind::DuplicateName) if the owner has an image of that name in that
    /// region, or if the very image is there already, or was there and is removed.
    fn put(&self, image: Image) -> Result<(), Error>;

    /// Replaces the record `current` by `next`, if it is still the one that is kept.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound), [`Conflict`](crate::ErrorKind::Conflict) if another
    /// record is kept, [`InvalidParameterValue`](ErrorKind::InvalidParameterValue) if `next` is
    /// of another image, and [`DuplicateName`](ErrorKind::DuplicateName) if a deregistered image
    /// would come back under a name that is taken.
    fn update(&self, current: &Image, next: Image) -> Result<(), Error>;

    /// Removes an image, and gives its last record.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound).
    fn remove(&self, id: &AmiId) -> Result<Image, Error>;
}

/// What can be done with every [`Catalog`].
///
/// ```
/// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, MemoryCatalog, X86_64};
/// use ami_core::{Catalog, CatalogExt};
///
/// # let ami = Ami::<X86_64>::builder("web")
/// #     .root_device("/dev/xvda")
/// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
/// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// let catalog = MemoryCatalog::new();
/// catalog.put(Image::new(ami.clone()))?;
/// catalog.modify(&ami.id(), |image| image.tags_mut().insert("stage", "production").map(drop))?;
/// let last = catalog.remove(&ami.id())?;
/// assert_eq!(last.tags().get("stage"), Some("production"));
/// # Ok::<(), ami_core::Error>(())
/// ```
pub trait CatalogExt: Catalog {
    /// The images as `account` sees and changes them: EC2's calls, each with its permission.
    fn as_account(&self, account: AccountId) -> AccountImages<'_, Self> {
        AccountImages::new(self, account)
    }

    /// Changes the record of an image, again with the new one if someone else changed it meanwhile, and
    /// gives the record as it is kept then.
    ///
    /// # Errors
    ///
    /// Those of `change`, and those of the catalog.
    fn modify(
        &self,
        id: &AmiId,
        mut change: impl FnMut(&mut Image) -> Result<(), Error>,
    ) -> Result<Image, Error> {
        loop {
            let current = self.get(id)?;
            let mut next = current.clone();
            change(&mut next)?;
            match self.update(&current, next.clone()) {
                Ok(()) => return Ok(next),
                Err(err) if err.kind() == ErrorKind::Conflict => {}
                Err(err) => return Err(err),
            }
        }
    }
}

impl<C: Catalog + ?Sized> CatalogExt for C {}

/// A catalog in memory.
///
/// ```
/// use ami_core::{Ami, BlockDeviceMapping, Catalog, Digest, Image, MemoryCatalog, Query, X86_64};
///
/// let catalog = MemoryCatalog::new();
/// let ami = Ami::<X86_64>::builder("web")
///     .root_device("/dev/xvda")
///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
///     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// catalog.put(Image::new(ami.clone()))?;
/// assert_eq!(catalog.get(&ami.id())?.ami(), &ami);
/// assert_eq!(catalog.list(&Query::all())?.len(), 1);
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct MemoryCatalog {
    kept: RwLock<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    images: BTreeMap<AmiId, Image>,
    removed: BTreeSet<AmiId>,
}

impl MemoryCatalog {
    /// A catalog without images.
    pub fn new() -> Self {
        Self::default()
    }

    // Nothing that is done under the lock panics half way, so that its poison means nothing.
    fn read(&self) -> RwLockReadGuard<'_, Kept> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Kept> {
        self.kept.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Catalog for MemoryCatalog {
    fn get(&self, id: &AmiId) -> Result<Image, Error> {
        self.read().images.get(id).cloned().ok_or_else(|| Error::not_found(id))
    }

    fn list(&self, query: &Query) -> Result<Vec<Image>, Error> {
        Ok(query.select(self.read().images.values()))
    }

    fn put(&self, image: Image) -> Result<(), Error> {
        let Kept { images, removed } = &mut *self.write();
        if images.contains_key(&image.id()) {
            let ami = image.ami();
            return Err(Error::duplicate_name(ami.name(), ami.owner(), &ami.id()));
        }
        if removed.contains(&image.id()) {
            return Err(Error::used_id(&image.id()));
        }
        check_name_is_free(images, &image)?;
        images.insert(image.id(), image);
        Ok(())
    }

    fn update(&self, current: &Image, next: Image) -> Result<(), Error> {
        let Kept { images, .. } = &mut *self.write();
        let id = current.id();
        let Some(kept) = images.get(&id) else { return Err(Error::not_found(&id)) };
        current.check_update(kept, &next)?;
        check_name_is_free(images, &next)?;
        images.insert(id, next);
        Ok(())
    }

    fn remove(&self, id: &AmiId) -> Result<Image, Error> {
        let Kept { images, removed } = &mut *self.write();
        let image = images.remove(id).ok_or_else(|| Error::not_found(id))?;
        removed.insert(*id);
        Ok(image)
    }
}

/// Checks that no other image has the name of `image`, unless that one gives it up itself.
fn check_name_is_free(images: &BTreeMap<AmiId, Image>, image: &Image) -> Result<(), Error> {
    if image.state() == ImageState::Deregistered {
        return Ok(());
    }
    let ami = image.ami();
    let holds_name = |other: &&Image| {
        other.ami().name() == ami.name()
            && other.ami().owner() == ami.owner()
            && other.ami().region() == ami.region()
            && other.id() != ami.id()
            && other.state() != ImageState::Deregistered
    };
    match images.values().find(holds_name) {
        Some(holder) => Err(Error::duplicate_name(ami.name(), ami.owner(), &holder.id())),
        None => Ok(()),
    }
}
