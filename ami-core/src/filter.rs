//! Filters with EC2's names and wildcards, and the query made of them.

use std::str::FromStr;

use crate::error::{Error, ErrorKind, invalid_value, quote};
use crate::{AccountId, AmiId, BlockDeviceKind, Category, Image, OsFamily, OwnerAlias, Pattern, Timestamp};

/// A condition on images: a field has one of several values.
///
/// A value is a [`Pattern`], with `*` and `?`.
///
/// | Name | Compared with |
/// |---|---|
/// | `architecture` | `i386`, `x86_64`, `arm64` |
/// | `block-device-mapping.delete-on-termination`, `.device-name`, `.encrypted`, `.volume-size`, `.volume-type` | each mapping, sizes in GiB |
/// | `block-device-mapping.snapshot-digest` | the content of each mapping; not in EC2 |
/// | `block-device-mapping.snapshot-id` | each snapshot of a user's that it was registered of |
/// | `boot-mode` | `legacy-bios`, `uefi`, `uefi-preferred` |
/// | `creation-date` | the time, such as `2026-01-31T12:00:00.000Z` |
/// | `description`, `image-id`, `name`, `state` | |
/// | `digest` | `sha256:` and digits; not in EC2 |
/// | `image-type` | `machine` |
/// | `imds-support`, `tpm-support` | `v2.0`; not in EC2 |
/// | `is-public` | `true`, `false` |
/// | `manifest-location` | [where it is](Image::location), such as `123456789012/web` |
/// | `owner-alias`, `owner-id` | |
/// | `platform` | `windows`, for nothing else has one |
/// | `product-code`, `product-code.type` | each product code |
/// | `root-device-name`, `root-device-type` | the type is `ebs` |
/// | `source-image-id`, `source-image-region` | what it is a copy of, or its instance was made from |
/// | `source-instance-id` | the instance that it is an image of |
/// | `state-reason-code`, `state-reason-message` | |
/// | `tag:KEY`, `tag-key` | the value of that tag; each key |
/// | `virtualization-type` | `hvm` |
///
/// An image that has no value there fits no pattern. Of EC2's names, those are errors that ask for what no image here has or
/// could have: `ena-support`, `free-tier-eligible`, `hypervisor`, `image-allowed`, `kernel-id`, `ramdisk-id` and
/// `sriov-net-support`.
///
/// ```
/// use ami_core::Filter;
///
/// assert!(Filter::new("name", ["debian-12-*", "debian-13-*"]).is_ok());
/// assert!(Filter::new("image-id", vec!["*"; Filter::MAX_VALUES + 1]).is_err());
/// let err = Filter::new("colour", ["red"]).unwrap_err();
/// assert_eq!(err.to_string(), r#""colour" is no name of a filter for images"#);
/// let err = Filter::new("kernel-id", ["aki-*"]).unwrap_err();
/// assert_eq!(err.to_string(), r#"images have no "kernel-id" here to filter by: they are not paravirtual"#);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    field: Field,
    patterns: Vec<Pattern>,
}

impl Filter {
    /// The most values that a filter has.
    pub const MAX_VALUES: usize = 200;

    /// The condition that the field `name` has one of `values`.
    ///
    /// # Errors
    ///
    /// [`InvalidParameterValue`](crate::ErrorKind::InvalidParameterValue) if there is no filter of that
    /// name for images, or if there is no value, and
    /// [`FilterLimitExceeded`](crate::ErrorKind::FilterLimitExceeded) for more than [so many](Self::MAX_VALUES).
    pub fn new<V: Into<String>>(name: &str, values: impl IntoIterator<Item = V>) -> Result<Self, Error> {
        let field = name.parse()?;
        let patterns: Vec<Pattern> =
            values.into_iter().take(Self::MAX_VALUES + 1).map(Pattern::new).collect();
        let message = || format!("the filter {} must have 1 to {} values", quote(name), Self::MAX_VALUES);
        match patterns.len() {
            0 => Err(invalid_value(message())),
            n if n > Self::MAX_VALUES => Err(Error::new(ErrorKind::FilterLimitExceeded, message())),
            _ => Ok(Self { field, patterns }),
        }
    }

    /// Whether the condition holds for `image`.
    pub fn matches(&self, image: &Image) -> bool {
        self.field.values(image).iter().any(|value| self.patterns.iter().any(|p| p.matches(value)))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Field {
    Architecture,
    BootMode,
    CreationDate,
    DeleteOnTermination,
    Description,
    DeviceName,
    Digest,
    Encrypted,
    ImageId,
    ImageType,
    ImdsSupport,
    IsPublic,
    Location,
    Name,
    OwnerAlias,
    OwnerId,
    Platform,
    ProductCode,
    ProductCodeType,
    RootDeviceName,
    RootDeviceType,
    SnapshotDigest,
    SnapshotId,
    SourceImageId,
    SourceImageRegion,
    SourceInstanceId,
    State,
    StateReasonCode,
    StateReasonMessage,
    Tag(String),
    TagKey,
    TpmSupport,
    VirtualizationType,
    VolumeSize,
    VolumeType,
}

impl FromStr for Field {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Ok(match name {
            "architecture" => Self::Architecture,
            "block-device-mapping.delete-on-termination" => Self::DeleteOnTermination,
            "block-device-mapping.device-name" => Self::DeviceName,
            "block-device-mapping.encrypted" => Self::Encrypted,
            "block-device-mapping.snapshot-digest" => Self::SnapshotDigest,
            "block-device-mapping.snapshot-id" => Self::SnapshotId,
            "block-device-mapping.volume-size" => Self::VolumeSize,
            "block-device-mapping.volume-type" => Self::VolumeType,
            "boot-mode" => Self::BootMode,
            "creation-date" => Self::CreationDate,
            "description" => Self::Description,
            "digest" => Self::Digest,
            "image-id" => Self::ImageId,
            "image-type" => Self::ImageType,
            "imds-support" => Self::ImdsSupport,
            "is-public" => Self::IsPublic,
            "manifest-location" => Self::Location,
            "name" => Self::Name,
            "owner-alias" => Self::OwnerAlias,
            "owner-id" => Self::OwnerId,
            "platform" => Self::Platform,
            "product-code" => Self::ProductCode,
            "product-code.type" => Self::ProductCodeType,
            "root-device-name" => Self::RootDeviceName,
            "root-device-type" => Self::RootDeviceType,
            "source-image-id" => Self::SourceImageId,
            "source-image-region" => Self::SourceImageRegion,
            "source-instance-id" => Self::SourceInstanceId,
            "state" => Self::State,
            "state-reason-code" => Self::StateReasonCode,
            "state-reason-message" => Self::StateReasonMessage,
            "tag-key" => Self::TagKey,
            "tpm-support" => Self::TpmSupport,
            "virtualization-type" => Self::VirtualizationType,
            _ => match name.strip_prefix("tag:") {
                Some(key) if !key.is_empty() => Self::Tag(key.to_owned()),
                _ => return Err(invalid_value(why_not(name))),
            },
        })
    }
}

/// Why images are not filtered by what has this name.
fn why_not(name: &str) -> String {
    let why = match name {
        "ena-support" | "sriov-net-support" => "their network devices are virtio's",
        "free-tier-eligible" => "nothing is billed",
        "hypervisor" => "any that runs their architecture runs them",
        "image-allowed" => "an account may use all that it sees",
        "kernel-id" | "ramdisk-id" => "they are not paravirtual",
        _ => return format!("{} is no name of a filter for images", quote(name)),
    };
    format!("images have no {} here to filter by: {why}", quote(name))
}

impl Field {
    /// The values that `image` has for this field: none, one or several.
    fn values(&self, image: &Image) -> Vec<String> {
        let (ami, manifest) = (image.ami(), image.ami().manifest());
        let mappings = || manifest.block_device_mappings().iter();
        let volumes = || mappings().filter_map(|mapping| mapping.as_ebs());
        match self {
            Self::Architecture => vec![ami.architecture().to_string()],
            Self::BootMode => manifest.boot().boot_mode().iter().map(ToString::to_string).collect(),
            Self::CreationDate => vec![ami.created().to_string()],
            Self::DeleteOnTermination => volumes().map(|v| v.delete_on_termination().to_string()).collect(),
            Self::Description => vec![image.description().to_owned()],
            Self::DeviceName => mappings()
                .filter(|mapping| *mapping.kind() != BlockDeviceKind::NoDevice)
                .map(|mapping| mapping.device_name().to_owned())
                .collect(),
            Self::Digest => vec![ami.digest().to_string()],
            Self::Encrypted => volumes().map(|v| v.encrypted().to_string()).collect(),
            Self::ImageId => vec![ami.id().to_string()],
            Self::ImageType => vec!["machine".to_owned()],
            Self::ImdsSupport => image.imds_support().iter().map(ToString::to_string).collect(),
            Self::IsPublic => vec![image.launch_permissions().is_public().to_string()],
            Self::Location => vec![image.location()],
            Self::Name => vec![ami.name().to_owned()],
            Self::OwnerAlias => image.owner_alias().iter().map(ToString::to_string).collect(),
            Self::OwnerId => vec![ami.owner().to_string()],
            Self::Platform => manifest
                .operating_system()
                .filter(|os| os.family() == OsFamily::Windows)
                .map(|os| os.family().to_string())
                .into_iter()
                .collect(),
            Self::ProductCode => image.product_codes().map(|code| code.id.clone()).collect(),
            Self::ProductCodeType => image.product_codes().map(|code| code.kind.to_string()).collect(),
            Self::RootDeviceName => vec![manifest.root_device_name().to_string()],
            Self::RootDeviceType => vec![manifest.root_device_type().to_string()],
            Self::SnapshotDigest => volumes().filter_map(|v| v.snapshot()).map(ToString::to_string).collect(),
            Self::SnapshotId => image.snapshots().map(|id| id.to_string()).collect(),
            Self::SourceImageId => image.source_image().map(|s| s.id.to_string()).into_iter().collect(),
            Self::SourceImageRegion => {
                image.source_image().map(|s| s.region.to_string()).into_iter().collect()
            }
            Self::SourceInstanceId => image.source_instance().iter().map(ToString::to_string).collect(),
            Self::State => vec![image.state().to_string()],
            Self::StateReasonCode => image.state_reason().map(|r| r.code.clone()).into_iter().collect(),
            Self::StateReasonMessage => image.state_reason().map(|r| r.message.clone()).into_iter().collect(),
            Self::Tag(key) => image.tags().get(key).map(str::to_owned).into_iter().collect(),
            Self::TagKey => image.tags().iter().map(|(key, _)| key.to_owned()).collect(),
            Self::TpmSupport => manifest.boot().tpm_support().iter().map(ToString::to_string).collect(),
            Self::VirtualizationType => vec![manifest.virtualization_type().to_string()],
            Self::VolumeSize => volumes().map(|v| v.volume_size_gib().to_string()).collect(),
            Self::VolumeType => volumes().map(|v| v.volume_type().to_string()).collect(),
        }
    }
}

/// Which images to list: those for which every condition holds.
///
/// ```
/// use ami_core::{Filter, Query};
///
/// let query = Query::all()
///     .visible_to("123456789012".parse()?)
///     .filter(Filter::new("architecture", ["arm64"])?)
///     .filter(Filter::new("name", ["debian-*"])?)
///     .limit(20);
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a query does nothing by itself"]
pub struct Query {
    ids: Vec<AmiId>,
    owners: Vec<AccountId>,
    owner_aliases: Vec<OwnerAlias>,
    viewer: Option<AccountId>,
    category: Option<(AccountId, Category)>,
    hide_deprecated: Option<Timestamp>,
    filters: Vec<Filter>,
    after: Option<AmiId>,
    limit: Option<usize>,
}

impl Query {
    /// Every image.
    pub fn all() -> Self {
        Self::default()
    }

    /// Only this image, or one of those that are named so.
    pub fn id(mut self, id: AmiId) -> Self {
        self.ids.push(id);
        self
    }

    /// Only images of this account, or of one of those that are named so.
    pub fn owner(mut self, owner: AccountId) -> Self {
        self.owners.push(owner);
        self
    }

    /// Only images of this group of publishers, or of one of those named by this or
    /// [`owner`](Self::owner).
    pub fn owner_alias(mut self, alias: OwnerAlias) -> Self {
        self.owner_aliases.push(alias);
        self
    }

    /// Only images that this account sees.
    pub fn visible_to(mut self, viewer: AccountId) -> Self {
        self.viewer = Some(viewer);
        self
    }

    /// Only images that are in this category for this account.
    pub fn in_category(mut self, viewer: AccountId, category: Category) -> Self {
        self.category = Some((viewer, category));
        self
    }

    /// Only images that are not deprecated at the moment `now`, and the viewer's own.
    pub fn hide_deprecated(mut self, now: Timestamp) -> Self {
        self.hide_deprecated = Some(now);
        self
    }

    /// Only images for which this holds too.
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filters.push(filter);
        self
    }

    /// Only images whose id comes after this one: with the last id of a list, the next list.
    pub fn after(mut self, id: AmiId) -> Self {
        self.after = Some(id);
        self
    }

    /// Only the first so many images by id.
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Whether every condition on a single image holds for `image`: all but the limit.
    pub fn matches(&self, image: &Image) -> bool {
        let owner = image.ami().owner();
        let owner_fits = self.owners.is_empty() && self.owner_aliases.is_empty()
            || self.owners.contains(owner)
            || image.owner_alias().is_some_and(|alias| self.owner_aliases.contains(&alias));
        let deprecated = self.hide_deprecated.is_some_and(|now| image.is_deprecated(now));

        owner_fits
            && (self.ids.is_empty() || self.ids.contains(&image.id()))
            && self.viewer.is_none_or(|viewer| image.is_visible_to(&viewer))
            && self.category.is_none_or(|(viewer, category)| image.category(&viewer) == Some(category))
            && (!deprecated || self.viewer.as_ref() == Some(owner))
            && self.after.is_none_or(|after| image.id() > after)
            && self.filters.iter().all(|filter| filter.matches(image))
    }

    /// The answer to the query from all images of a catalog: those that match, sorted by id, up to the
    /// limit.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, Timestamp, X86_64};
    /// use ami_core::{AccountId, Category, Error, Filter, OwnerAlias, Query};
    ///
    /// let (region, amazon) = ("us-east-1".parse()?, "000000000001".parse()?);
    /// let me: AccountId = "123456789012".parse()?;
    /// # let make = |name: &str, owner: &AccountId| -> Result<Image, Error> {
    /// #     let root = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8);
    /// #     let image = Ami::<X86_64>::builder(name).root_device("/dev/xvda").block_device(root);
    /// #     Ok(Image::new(image.build(&region, owner)?))
    /// # };
    /// let (mine, mut theirs) = (make("web", &me)?, make("linux", &amazon)?);
    /// theirs.launch_permissions_mut().set_public(true);
    /// theirs.set_owner_alias(Some(OwnerAlias::Amazon));
    /// theirs.set_deprecation(Some("2026-01-31T12:00:00Z".parse()?));
    /// let images = [mine.clone(), theirs.clone()];
    /// let select = |query: Query| query.select(&images);
    ///
    /// assert_eq!(select(Query::all().owner(me)), [mine.clone()]);
    /// assert_eq!(select(Query::all().id(theirs.id())), [theirs.clone()]);
    /// assert_eq!(select(Query::all().owner_alias(OwnerAlias::Amazon)), [theirs.clone()]);
    /// assert_eq!(select(Query::all().in_category(me, Category::MyAmis)), [mine.clone()]);
    /// assert_eq!(select(Query::all().visible_to(me).hide_deprecated(Timestamp::now())), [mine.clone()]);
    /// // A page of one, and the next.
    /// let first = select(Query::all().limit(1));
    /// assert_eq!(select(Query::all().after(first[0].id())).len(), 1);
    /// assert!(Filter::new("name", ["w?b"])?.matches(&mine) && Query::all().matches(&mine));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn select<'a>(&self, images: impl IntoIterator<Item = &'a Image>) -> Vec<Image> {
        let mut found: Vec<&Image> = images.into_iter().filter(|image| self.matches(image)).collect();
        found.sort_by_key(|image| image.id());
        found.into_iter().take(self.limit.unwrap_or(usize::MAX)).cloned().collect()
    }
}
