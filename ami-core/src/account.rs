//! A catalog as one account uses it: EC2's calls on images, each with its permission.

use crate::error::{Error, invalid_value};
use crate::{
    AccountId, Action, AmiId, Catalog, CatalogExt, DescribeImages, Image, ImageState, LaunchPermissions,
    ModifyImageAttribute, Page, Query, Timestamp,
};

/// A year in milliseconds, which is a leap year where EC2's limits do not say.
const YEAR: u64 = 366 * 24 * 60 * 60 * 1000;

/// The longest time until an image is deprecated: ten years (`EnableImageDeprecation`).
const FURTHEST_DEPRECATION: u64 = 10 * YEAR;

/// The longest time from when a public image was made until it is deprecated: two years.
const FURTHEST_PUBLIC_DEPRECATION: u64 = 2 * YEAR;

/// The images of a [`Catalog`] as one account sees and changes them. [`CatalogExt::as_account`] gives one.
///
/// What the account may do is decided by [`Image::authorize`] alone.
///
/// ```
/// # use ami_core::{Ami, BlockDeviceMapping, Digest, X86_64};
/// use ami_core::{Catalog, CatalogExt, DescribeImages, ErrorKind, Grantee, Image, MemoryCatalog};
/// use ami_core::ModifyImageAttribute;
///
/// # let (region, owner) = ("us-east-1".parse()?, "123456789012".parse()?);
/// # let ami = Ami::<X86_64>::builder("web")
/// #     .root_device("/dev/xvda")
/// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
/// #     .build(&region, &owner)?;
/// let catalog = MemoryCatalog::new();
/// catalog.put(Image::new(ami.clone()))?;
/// let (mine, theirs) = (catalog.as_account(owner), catalog.as_account("210987654321".parse()?));
/// assert_eq!(theirs.get(&ami.id()).unwrap_err().kind(), ErrorKind::NotFound);
///
/// mine.modify(&ami.id(), &ModifyImageAttribute::new().add_launch_permission(Grantee::All))?;
/// assert_eq!(theirs.describe(&DescribeImages::new())?.items.len(), 1);
/// assert_eq!(theirs.deregister(&ami.id()).unwrap_err().kind(), ErrorKind::AuthFailure);
///
/// mine.enable_deprecation(&ami.id(), "2099-01-31T12:00:00Z".parse().ok()).unwrap_err(); // too far
/// mine.disable(&ami.id())?; // for nobody but its owner
/// assert!(theirs.describe(&DescribeImages::new())?.items.is_empty());
/// mine.enable(&ami.id())?;
/// mine.disable_deprecation(&ami.id())?;
/// mine.deregister(&ami.id())?;
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug)]
pub struct AccountImages<'a, C: ?Sized> {
    catalog: &'a C,
    account: AccountId,
    now: Option<Timestamp>,
}

impl<'a, C: Catalog + ?Sized> AccountImages<'a, C> {
    pub(crate) fn new(catalog: &'a C, account: AccountId) -> Self {
        Self { catalog, account, now: None }
    }

    /// The same at the moment `now`, whatever the clock says.
    #[must_use]
    pub fn at(self, now: Timestamp) -> Self {
        Self { now: Some(now), ..self }
    }

    fn now(&self) -> Timestamp {
        self.now.unwrap_or_else(Timestamp::now)
    }

    /// The images that the request asks for (`DescribeImages`).
    ///
    /// # Errors
    ///
    /// As [`DescribeImages::answer`], and those of the catalog.
    pub fn describe(&self, request: &DescribeImages) -> Result<Page<Image>, Error> {
        let seen = self.catalog.list(&Query::all().visible_to(self.account))?;
        request.answer(&self.account, self.now(), &seen)
    }

    /// The image `id`, if the account sees it.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound), and those of the catalog.
    pub fn get(&self, id: &AmiId) -> Result<Image, Error> {
        self.authorized(id, Action::See)
    }

    /// The image `id`, if the account may do `action` with it.
    ///
    /// # Errors
    ///
    /// As [`Image::authorize`], and those of the catalog.
    pub fn authorized(&self, id: &AmiId, action: Action) -> Result<Image, Error> {
        let image = self.catalog.get(id)?;
        image.authorize(&self.account, action)?;
        Ok(image)
    }

    fn change(&self, id: &AmiId, change: impl Fn(&mut Image) -> Result<(), Error>) -> Result<Image, Error> {
        self.catalog.modify(id, |image| {
            image.authorize(&self.account, Action::Change)?;
            change(image)
        })
    }

    /// Changes attributes of an image, and gives its record then (`ModifyImageAttribute`).
    ///
    /// # Errors
    ///
    /// As [`Image::authorize`] and [`ModifyImageAttribute::apply`], and those of the catalog.
    pub fn modify(&self, id: &AmiId, change: &ModifyImageAttribute) -> Result<Image, Error> {
        self.change(id, |image| change.apply(image))
    }

    /// Sets an image aside: nobody but its owner sees it, nobody launches it, and what permissions it had are
    /// gone (`DisableImage`).
    ///
    /// # Errors
    ///
    /// As [`Image::authorize`], [`IncorrectState`](crate::ErrorKind::IncorrectState) unless it is available,
    /// and those of the catalog.
    pub fn disable(&self, id: &AmiId) -> Result<Image, Error> {
        self.change(id, |image| {
            image.set_state(ImageState::Disabled)?;
            *image.launch_permissions_mut() = LaunchPermissions::private();
            Ok(())
        })
    }

    /// Takes an image into use again that was [disabled](Self::disable) (`EnableImage`).
    ///
    /// # Errors
    ///
    /// As [`Image::authorize`], [`IncorrectState`](crate::ErrorKind::IncorrectState) unless it is disabled, and
    /// those of the catalog.
    pub fn enable(&self, id: &AmiId) -> Result<Image, Error> {
        self.change(id, |image| image.set_state(ImageState::Available))
    }

    /// Deprecates an image from a moment on, the full minute nearest to `at`, or from this one
    /// (`EnableImageDeprecation`). It can be launched all the same.
    ///
    /// # Errors
    ///
    /// As [`Image::authorize`], [`InvalidParameterValue`](crate::ErrorKind::InvalidParameterValue) for a
    /// moment that has passed or is more than ten years off or, of a public image, more than two years after
    /// it was made, and those of the catalog.
    pub fn enable_deprecation(&self, id: &AmiId, at: Option<Timestamp>) -> Result<Image, Error> {
        let now = self.now();
        let named = at;
        let at = match at {
            None => now,
            Some(at) if at < now => return Err(invalid_value(format!("{at} has passed"))),
            Some(at) if at.as_unix_millis() - now.as_unix_millis() > FURTHEST_DEPRECATION => {
                return Err(invalid_value(format!("{at} is more than ten years off")));
            }
            Some(at) => nearest_minute(at),
        };
        self.change(id, |image| {
            let age =
                |at: Timestamp| at.as_unix_millis().saturating_sub(image.ami().created().as_unix_millis());
            match named {
                Some(at)
                    if image.launch_permissions().is_public() && age(at) > FURTHEST_PUBLIC_DEPRECATION =>
                {
                    let what =
                        format!("{at} is more than two years after the image was made, which is public");
                    return Err(invalid_value(what));
                }
                _ => {}
            }
            image.set_deprecation(Some(at));
            Ok(())
        })
    }

    /// Takes a deprecation back, begun or not (`DisableImageDeprecation`).
    ///
    /// # Errors
    ///
    /// As [`Image::authorize`], and those of the catalog.
    pub fn disable_deprecation(&self, id: &AmiId) -> Result<Image, Error> {
        self.change(id, |image| {
            image.set_deprecation(None);
            Ok(())
        })
    }

    /// Removes an image, and gives its last record (`DeregisterImage`). What was made of it stays.
    ///
    /// # Errors
    ///
    /// As [`Image::authorize`], and those of the catalog.
    pub fn deregister(&self, id: &AmiId) -> Result<Image, Error> {
        self.authorized(id, Action::Change)?;
        self.catalog.remove(id)
    }
}

fn nearest_minute(at: Timestamp) -> Timestamp {
    const MINUTE: u64 = 60 * 1000;
    let minutes = (at.as_unix_millis() + MINUTE / 2) / MINUTE;
    Timestamp::from_unix_millis(minutes * MINUTE).unwrap_or(Timestamp::MAX)
}
