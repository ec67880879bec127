//! The record of an image: the immutable [`AnyAmi`], and the attributes that its owner can change.

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, ErrorKind, check_text, invalid_value, words};
use crate::{AccountId, Action, AmiId, AnyAmi, Manifest, RegionName, Tags, Timestamp};

words! {
    /// The state of an image.
    ///
    /// | From | To |
    /// |---|---|
    /// | pending | available, transient, failed, error, invalid, deregistered |
    /// | transient | pending, available, failed, error, invalid, deregistered |
    /// | available | disabled, invalid, deregistered |
    /// | disabled | available, deregistered |
    /// | invalid, failed, error | deregistered |
    /// | deregistered | nothing |
    ///
    /// ```
    /// use ami_core::ImageState;
    ///
    /// assert!(ImageState::Pending.can_become(ImageState::Available));
    /// let leads_nowhere = |from: ImageState| ImageState::ALL.iter().all(|to| !from.can_become(*to));
    /// let ends: Vec<_> = ImageState::ALL.iter().filter(|state| leads_nowhere(**state)).collect();
    /// assert_eq!(ends, [&ImageState::Deregistered]);
    /// ```
    ImageState, "state of an image" {
        /// Being made.
        Pending = "pending",
        /// Ready to be launched.
        Available = "available",
        /// Its content is no longer whole.
        Invalid = "invalid",
        /// Given up: no instance can be launched any more, those that run are untouched.
        Deregistered = "deregistered",
        /// Its making has met an obstacle that may pass.
        Transient = "transient",
        /// It could not be made.
        Failed = "failed",
        /// It could not be made because of an error of the service.
        Error = "error",
        /// Set aside by its owner: hidden from everybody else, and not to be launched.
        Disabled = "disabled",
    }
}

impl ImageState {
    /// Whether an image in this state can come into the state `next`.
    pub const fn can_become(self, next: Self) -> bool {
        use ImageState::{Available, Deregistered, Disabled, Error, Failed, Invalid, Pending, Transient};
        match self {
            Pending => matches!(next, Available | Transient | Failed | Error | Invalid | Deregistered),
            Transient => matches!(next, Pending | Available | Failed | Error | Invalid | Deregistered),
            Available => matches!(next, Disabled | Invalid | Deregistered),
            Disabled => matches!(next, Available | Deregistered),
            Invalid | Failed | Error => matches!(next, Deregistered),
            Deregistered => false,
        }
    }
}

words! {
    /// A name that EC2 gives to a group of accounts that publish images.
    ///
    /// ```
    /// use ami_core::{OwnerAlias, Query};
    ///
    /// let published = Query::all().owner_alias("amazon".parse()?);
    /// assert_eq!(OwnerAlias::ALL.len(), 3);
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    OwnerAlias, "owner alias" {
        /// Amazon itself.
        Amazon = "amazon",
        /// AWS Backup.
        AwsBackupVault = "aws-backup-vault",
        /// The sellers of the AWS Marketplace.
        AwsMarketplace = "aws-marketplace",
    }
}

words! {
    /// Where an image stands in the view of an account, as EC2's console sorts them.
    ///
    /// ```
    /// use ami_core::{Category, Query};
    ///
    /// let mine = Query::all().in_category("123456789012".parse()?, Category::MyAmis);
    /// assert_eq!(Category::MyAmis.as_str(), "my-amis");
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    Category, "category of images" {
        /// Published by Amazon.
        QuickStart = "quick-start",
        /// Offered on the AWS Marketplace.
        Marketplace = "marketplace",
        /// The account's own.
        MyAmis = "my-amis",
        /// Another account's, shared with this one by name.
        Shared = "shared",
        /// Another account's, shared with everybody.
        Community = "community",
    }
}

words! {
    /// The kind of a [`ProductCode`], which shows it in use.
    ProductCodeKind, "kind of product code" {
        /// DevPay.
        Devpay = "devpay",
        /// AWS Marketplace.
        Marketplace = "marketplace",
    }
}

/// The code of a product whose use is billed with the image.
///
/// ```
/// # use ami_core::{Ami, BlockDeviceMapping, Digest, ErrorKind, Image, X86_64};
/// use ami_core::{ProductCode, ProductCodeKind};
///
/// # let ami = Ami::<X86_64>::builder("web")
/// #     .root_device("/dev/xvda")
/// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
/// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
/// let mut image = Image::new(ami);
/// image.launch_permissions_mut().set_public(true);
/// image.add_product_code(ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace })?;
/// assert_eq!(image.product_codes().len(), 1);
/// // Others may launch it now, but not carry it away.
/// let other = "210987654321".parse()?;
/// assert!(image.may_launch(&other));
/// let copied = image.copy_to(&other, &"eu-west-1".parse()?, "mine");
/// assert_eq!(copied.err().map(|e| e.kind()), Some(ErrorKind::AuthFailure));
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProductCode {
    /// The code.
    pub id: String,
    /// Its kind.
    pub kind: ProductCodeKind,
}

impl ProductCode {
    /// Whether the code is one: 1 to 255 printable characters.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidParameterValue`].
    pub fn validate(&self) -> Result<(), Error> {
        check_text("product code", &self.id, 255)
    }
}

/// Who beside the owner may launch an image.
///
/// ```
/// use ami_core::{AccountId, LaunchPermissions};
///
/// let friend: AccountId = "210987654321".parse()?;
/// let mut permissions = LaunchPermissions::private();
/// permissions.add(friend);
/// assert!(permissions.allows(&friend) && !permissions.is_public());
/// assert_eq!(permissions.accounts().collect::<Vec<_>>(), [&friend]);
/// permissions.remove(&friend);
/// permissions.set_public(true);
/// assert_eq!(permissions, LaunchPermissions::public());
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchPermissions {
    public: bool,
    accounts: BTreeSet<AccountId>,
}

impl LaunchPermissions {
    /// Nobody.
    pub fn private() -> Self {
        Self::default()
    }

    /// Everybody.
    pub fn public() -> Self {
        Self { public: true, accounts: BTreeSet::new() }
    }

    /// Lets everybody launch, or only the accounts that were added.
    pub fn set_public(&mut self, public: bool) {
        self.public = public;
    }

    /// Lets an account launch; gives whether that is new.
    pub fn add(&mut self, account: AccountId) -> bool {
        self.accounts.insert(account)
    }

    /// Takes an account's permission back; gives whether it had one.
    pub fn remove(&mut self, account: &AccountId) -> bool {
        self.accounts.remove(account)
    }

    /// Whether everybody may launch.
    pub fn is_public(&self) -> bool {
        self.public
    }

    /// The accounts that were added.
    pub fn accounts(&self) -> impl ExactSizeIterator<Item = &AccountId> {
        self.accounts.iter()
    }

    /// Whether `account` may launch, be it as one of everybody.
    pub fn allows(&self, account: &AccountId) -> bool {
        self.public || self.accounts.contains(account)
    }
}

/// The image that another is a copy of, which may be gone; [`Image::source_image`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceImage {
    /// Its region.
    pub region: RegionName,
    /// Its id there.
    pub id: AmiId,
}

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

    /// The record of a copy of this image, made by the account `caller` for itself. Neither
    /// permissions nor tags are copied; the description is.
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
        let ami = AnyAmi::assemble(region.clone(), *caller, name.to_owned(), self.ami.created(), manifest)?;
        let product_codes = self.product_codes.clone();
        let source_image = Some(SourceImage { region: self.ami.region().clone(), id: self.id() });
        Ok(Self { description: self.description.clone(), product_codes, source_image, ..Self::pending(ami) })
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

    /// Brings the image into another state.
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
        Ok(())
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

    /// The image that this one is a copy of, if it is one (`SourceImageRegion`, `SourceImageId`).
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, X86_64};
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// let image = Image::new(ami);
    /// let copy = image.copy_to(image.ami().owner(), &"eu-west-1".parse()?, "web")?;
    /// let source = copy.source_image().ok_or("it is a copy")?;
    /// assert_eq!((source.region.as_str(), source.id), ("us-east-1", image.id()));
    /// assert_eq!(image.source_image(), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn source_image(&self) -> Option<&SourceImage> {
        self.source_image.as_ref()
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
