//! The record of an image: the immutable [`AnyAmi`], and the attributes that its owner can change.

mod category;
mod imds;
mod permissions;
mod product_code;
mod source;
mod state;

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer, Serialize};

pub use self::category::{Category, OwnerAlias};
pub use self::imds::ImdsSupport;
pub use self::permissions::LaunchPermissions;
pub use self::product_code::{ProductCode, ProductCodeKind};
pub use self::source::SourceImage;
pub use self::state::{ImageState, StateReason};
use crate::error::{Error, ErrorKind, invalid_value};
use crate::{
    AccountId, Action, AmiId, AnyAmi, InstanceId, Manifest, RegionName, SnapshotId, Tags, Timestamp,
};

/// An image as its region describes it: what never changes, and the attributes that do.
///
/// ```
/// use ami_core::{Ami, BlockDeviceMapping, Digest, Image, ImageState, LaunchPermissions, X86_64};
///
/// let (region, owner, friend) = ("us-east-1".parse()?, "123456789012".parse()?, "210987654321".parse()?);
/// let ami = Ami::<X86_64>::builder("web")
///     .root_device("/dev/xvda")
///     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
///     .build(&region, &owner)?;
/// let mut image = Image::new(ami);
/// assert!(image.may_launch(&owner) && !image.may_launch(&friend));
/// *image.launch_permissions_mut() = LaunchPermissions::public();
/// assert!(image.may_launch(&friend));
/// image.set_state(ImageState::Disabled)?;
/// assert!(!image.may_launch(&owner));
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Image {
    ami: AnyAmi,
    state: ImageState,
    launch_permissions: LaunchPermissions,
    tags: Tags,
    #[serde(default, skip_serializing_if = "String::is_empty", deserialize_with = "read_description")]
    description: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deprecation: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner_alias: Option<OwnerAlias>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty", deserialize_with = "read_product_codes")]
    pub(crate) product_codes: BTreeSet<ProductCode>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source_image: Option<SourceImage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source_instance: Option<InstanceId>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    snapshots: BTreeSet<SnapshotId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    imds_support: Option<ImdsSupport>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state_reason: Option<StateReason>,
}

impl Image {
    /// The longest description in characters.
    pub const MAX_DESCRIPTION: usize = 255;

    /// The record of an image that is available: private, without tags or description.
    pub fn new(ami: impl Into<AnyAmi>) -> Self {
        Self {
            ami: ami.into(),
            state: ImageState::Available,
            launch_permissions: LaunchPermissions::private(),
            tags: Tags::new(),
            description: String::new(),
            deprecation: None,
            owner_alias: None,
            product_codes: BTreeSet::new(),
            source_image: None,
            source_instance: None,
            snapshots: BTreeSet::new(),
            imds_support: None,
            state_reason: None,
        }
    }

    /// The record of an image that is still being made.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Category, Digest, Image, ImageState, Timestamp, X86_64};
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// # let owner = *ami.owner();
    /// let mut image = Image::pending(ami.clone());
    /// assert!(!image.may_launch(&owner), "its content is not there yet");
    /// image.set_state(ImageState::Available)?;
    /// image.tags_mut().insert("stage", "production")?;
    /// image.set_description("serves the directory")?; // at most Image::MAX_DESCRIPTION characters
    /// image.set_deprecation(Some(Timestamp::now()));
    /// assert!(image.deprecation().is_some() && image.is_deprecated(Timestamp::MAX));
    /// assert!(image.may_launch(&owner) && image.is_visible_to(&owner));
    /// assert_eq!(image.category(&owner), Some(Category::MyAmis));
    ///
    /// let copy = image.copy_to(&owner, &"eu-west-1".parse()?, "web")?;
    /// assert_eq!((copy.state(), copy.description()), (ImageState::Pending, "serves the directory"));
    /// assert_eq!((copy.ami().digest(), copy.tags().len()), (ami.digest(), 0));
    /// assert!(!copy.launch_permissions().is_public());
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn pending(ami: impl Into<AnyAmi>) -> Self {
        Self { state: ImageState::Pending, ..Self::new(ami) }
    }

    /// The record of a copy of this image, made by the account `caller` for itself, now. Neither
    /// permissions nor tags are copied; the description is, and for which metadata service it is made.
    ///
    /// # Errors
    ///
    /// Those of [`authorize`](Self::authorize) for [`Action::Copy`], and [`ErrorKind::MalformedName`].
    pub fn copy_to(&self, caller: &AccountId, region: &RegionName, name: &str) -> Result<Self, Error> {
        self.copy_as(caller, region, name, self.ami.manifest().clone())
    }

    /// The same for a copy whose content has another name there, as what is encrypted has under each key: `manifest` is
    /// this image's [with it](Manifest::with_block_devices).
    ///
    /// # Errors
    ///
    /// As [`copy_to`](Self::copy_to).
    pub fn copy_as(
        &self,
        caller: &AccountId,
        region: &RegionName,
        name: &str,
        manifest: Manifest,
    ) -> Result<Self, Error> {
        self.authorize(caller, Action::Copy)?;
        let ami = AnyAmi::assemble(region.clone(), *caller, name.to_owned(), Timestamp::now(), manifest)?;
        let product_codes = self.product_codes.clone();
        let source_image = Some(SourceImage { region: self.ami.region().clone(), id: self.id() });
        let (description, imds_support) = (self.description.clone(), self.imds_support);
        Ok(Self { description, product_codes, source_image, imds_support, ..Self::pending(ami) })
    }

    /// Checks that `next` can take the place of this record while `kept` is the one that is kept: for those who
    /// implement a [`Catalog`](crate::Catalog).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameterValue`] if `next` is of another image, [`ErrorKind::Conflict`] if `kept` is
    /// another record than this.
    pub fn check_update(&self, kept: &Self, next: &Self) -> Result<(), Error> {
        let id = self.id();
        if next.ami != kept.ami || next.ami.created() != kept.ami.created() {
            return Err(invalid_value(format!(
                "the record of {id} cannot be replaced by one of {}",
                next.id()
            )));
        }
        if kept != self {
            return Err(Error::conflict(&id));
        }
        Ok(())
    }

    /// The record of the same image [after so many others](crate::Ami::with_incarnation) that were alike.
    #[must_use]
    pub fn with_incarnation(self, incarnation: u64) -> Self {
        Self { ami: self.ami.with_incarnation(incarnation), ..self }
    }

    /// The image itself.
    pub fn ami(&self) -> &AnyAmi {
        &self.ami
    }

    /// The id of the image.
    pub fn id(&self) -> AmiId {
        self.ami.id()
    }

    /// The state.
    pub fn state(&self) -> ImageState {
        self.state
    }

    /// Brings the image into another state, for which no reason is said yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::IncorrectState`] where [`ImageState::can_become`] says no.
    pub fn set_state(&mut self, next: ImageState) -> Result<(), Error> {
        if !self.state.can_become(next) {
            let message = format!("the image {} is {} and cannot become {next}", self.id(), self.state);
            return Err(Error::new(ErrorKind::IncorrectState, message));
        }
        self.state = next;
        self.state_reason = None;
        Ok(())
    }

    /// Why it is in its state, where there is something to say.
    pub fn state_reason(&self) -> Option<&StateReason> {
        self.state_reason.as_ref()
    }

    /// Says why it is in its state: until it comes into another.
    pub fn set_state_reason(&mut self, reason: Option<StateReason>) {
        self.state_reason = reason;
    }

    /// Who beside the owner may launch the image.
    pub fn launch_permissions(&self) -> &LaunchPermissions {
        &self.launch_permissions
    }

    /// Who beside the owner may launch the image, to change it.
    pub fn launch_permissions_mut(&mut self) -> &mut LaunchPermissions {
        &mut self.launch_permissions
    }

    /// The tags.
    pub fn tags(&self) -> &Tags {
        &self.tags
    }

    /// The tags, to change them.
    pub fn tags_mut(&mut self) -> &mut Tags {
        &mut self.tags
    }

    /// The description; empty if there is none.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Sets the description.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameterValue`] if it is longer than
    /// [`MAX_DESCRIPTION`](Self::MAX_DESCRIPTION).
    pub fn set_description(&mut self, description: impl Into<String>) -> Result<(), Error> {
        self.description = check_description(description.into())?;
        Ok(())
    }

    /// When the image becomes, or became, deprecated.
    pub fn deprecation(&self) -> Option<Timestamp> {
        self.deprecation
    }

    /// Deprecates the image from a point in time on, or not.
    pub fn set_deprecation(&mut self, from: Option<Timestamp>) {
        self.deprecation = from;
    }

    /// Whether the image is deprecated at the moment `now`. It can be launched all the same.
    pub fn is_deprecated(&self, now: Timestamp) -> bool {
        self.deprecation.is_some_and(|from| from <= now)
    }

    /// The group of publishers that the owner belongs to.
    pub fn owner_alias(&self) -> Option<OwnerAlias> {
        self.owner_alias
    }

    /// Sets the group of publishers that the owner belongs to.
    pub fn set_owner_alias(&mut self, alias: Option<OwnerAlias>) {
        self.owner_alias = alias;
    }

    /// The product codes.
    pub fn product_codes(&self) -> impl ExactSizeIterator<Item = &ProductCode> {
        self.product_codes.iter()
    }

    /// Which version of the metadata service it is made for, if it says so.
    pub fn imds_support(&self) -> Option<ImdsSupport> {
        self.imds_support
    }

    /// Says which version of the metadata service it is made for. It cannot be taken back.
    pub fn set_imds_support(&mut self, support: ImdsSupport) {
        self.imds_support = Some(support);
    }

    /// Where EC2 says that an image is (`ImageLocation`): the alias of its owner, or the account, and its name.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, OwnerAlias, X86_64};
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// let mut image = Image::new(ami);
    /// assert_eq!(image.location(), "123456789012/web");
    /// image.set_owner_alias(Some(OwnerAlias::Amazon));
    /// assert_eq!(image.location(), "amazon/web");
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn location(&self) -> String {
        match self.owner_alias {
            Some(alias) => format!("{alias}/{}", self.ami.name()),
            None => format!("{}/{}", self.ami.owner(), self.ami.name()),
        }
    }

    /// Adds a product code. It cannot be taken away again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameterValue`] for a code that is empty, long or unprintable.
    pub fn add_product_code(&mut self, code: ProductCode) -> Result<(), Error> {
        code.validate()?;
        self.product_codes.insert(code);
        Ok(())
    }
}

fn check_description(description: String) -> Result<String, Error> {
    if description.chars().count() > Image::MAX_DESCRIPTION {
        return Err(invalid_value(format!(
            "the description has more than {} characters",
            Image::MAX_DESCRIPTION
        )));
    }
    Ok(description)
}

fn read_description<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    check_description(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

fn read_product_codes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<ProductCode>, D::Error> {
    let codes = BTreeSet::deserialize(deserializer)?;
    codes.iter().try_for_each(ProductCode::validate).map_err(serde::de::Error::custom)?;
    Ok(codes)
}
