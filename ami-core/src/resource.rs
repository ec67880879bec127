//! What can have tags: a resource of any kind, by its id.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, quote, words};
use crate::{AmiId, InstanceId, LaunchTemplateId, SnapshotId, VolumeId};

words! {
    /// The kind of a [`ResourceId`], which shows it in use.
    ResourceType, "type of a resource" {
        /// An image.
        Image = "image",
        /// An instance.
        Instance = "instance",
        /// A launch template.
        LaunchTemplate = "launch-template",
        /// A snapshot.
        Snapshot = "snapshot",
        /// A volume.
        Volume = "volume",
    }
}

/// The id of a resource that can have tags, whatever its kind.
///
/// ```
/// use ami_core::{InstanceId, ResourceId, ResourceType};
///
/// let id: ResourceId = "i-0123456789abcdef0".parse()?;
/// assert_eq!(id, ResourceId::Instance("i-0123456789abcdef0".parse()?));
/// assert_eq!((id.resource_type(), id.to_string().as_str()), (ResourceType::Instance, "i-0123456789abcdef0"));
/// assert_eq!("x-1".parse::<ResourceId>().unwrap_err().code(), "InvalidID");
/// # Ok::<(), ami_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum ResourceId {
    /// An image.
    Image(AmiId),
    /// An instance.
    Instance(InstanceId),
    /// A launch template.
    LaunchTemplate(LaunchTemplateId),
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A volume.
    Volume(VolumeId),
}

impl ResourceId {
    /// What it is.
    pub fn resource_type(&self) -> ResourceType {
        match self {
            Self::Image(_) => ResourceType::Image,
            Self::Instance(_) => ResourceType::Instance,
            Self::LaunchTemplate(_) => ResourceType::LaunchTemplate,
            Self::Snapshot(_) => ResourceType::Snapshot,
            Self::Volume(_) => ResourceType::Volume,
        }
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(id) => id.fmt(f),
            Self::Instance(id) => id.fmt(f),
            Self::LaunchTemplate(id) => id.fmt(f),
            Self::Snapshot(id) => id.fmt(f),
            Self::Volume(id) => id.fmt(f),
        }
    }
}

impl FromStr for ResourceId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let id = match text.split_once('-').map(|(prefix, _)| prefix) {
            Some(AmiId::PREFIX) => text.parse().map(Self::Image).ok(),
            Some(InstanceId::PREFIX) => text.parse().map(Self::Instance).ok(),
            Some(LaunchTemplateId::PREFIX) => text.parse().map(Self::LaunchTemplate).ok(),
            Some(SnapshotId::PREFIX) => text.parse().map(Self::Snapshot).ok(),
            Some(VolumeId::PREFIX) => text.parse().map(Self::Volume).ok(),
            _ => None,
        };
        id.ok_or_else(|| {
            let message = format!(
                "{} is no id of an image, instance, launch template, snapshot or volume",
                quote(text)
            );
            Error::new(ErrorKind::InvalidResourceId, message)
        })
    }
}

impl TryFrom<String> for ResourceId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<ResourceId> for String {
    fn from(id: ResourceId) -> String {
        id.to_string()
    }
}

macro_rules! from_ids {
    ($($id:ident => $variant:ident),*) => {$(
        impl From<$id> for ResourceId {
            fn from(id: $id) -> Self {
                Self::$variant(id)
            }
        }
    )*};
}

from_ids!(
    AmiId => Image, InstanceId => Instance, LaunchTemplateId => LaunchTemplate, SnapshotId => Snapshot,
    VolumeId => Volume
);
