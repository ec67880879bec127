//! What an image was made of.

use serde::{Deserialize, Serialize};

use super::Image;
use crate::{AmiId, InstanceId, RegionName, SnapshotId};

/// The image that another is a copy of, or whose instance it was made of; it may be gone. [`Image::source_image`] shows it in
/// use.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceImage {
    /// Its region.
    pub region: RegionName,
    /// Its id there.
    pub id: AmiId,
}

impl Image {
    /// The image that this one is a copy of, or that the instance was made from that it is an image of, if it is either
    /// (`SourceImageRegion`, `SourceImageId`).
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

    /// The instance that it is an image of, if it was made of one (`SourceInstanceId`). It may be gone; a copy does not say it.
    pub fn source_instance(&self) -> Option<InstanceId> {
        self.source_instance
    }

    /// Says of which image or its instance it was made, or of none: for those who make it, and for those who keep it.
    ///
    /// ```
    /// # use ami_core::{Ami, BlockDeviceMapping, Digest, Image, X86_64};
    /// use ami_core::{Filter, InstanceId, SourceImage};
    ///
    /// # let ami = Ami::<X86_64>::builder("web")
    /// #     .root_device("/dev/xvda")
    /// #     .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
    /// #     .build(&"us-east-1".parse()?, &"123456789012".parse()?)?;
    /// let (parent, server) = ("ami-0123456789abcdef0".parse()?, "i-0123456789abcdef0".parse()?);
    /// let mut image = Image::new(ami);
    /// image.set_source(Some(SourceImage { region: "us-east-1".parse()?, id: parent }), Some(server));
    /// assert_eq!((image.source_image().map(|image| image.id), image.source_instance()), (Some(parent), Some(server)));
    /// assert!(Filter::new("source-instance-id", [server.to_string()])?.matches(&image));
    /// # Ok::<(), ami_core::Error>(())
    /// ```
    pub fn set_source(&mut self, image: Option<SourceImage>, instance: Option<InstanceId>) {
        self.source_image = image;
        self.source_instance = instance;
    }

    /// The snapshots that it was registered of. The content of those that it was not is the image's alone.
    pub fn snapshots(&self) -> impl ExactSizeIterator<Item = SnapshotId> + '_ {
        self.snapshots.iter().copied()
    }

    /// Says of which snapshots it was registered: for those who register it.
    pub fn set_snapshots(&mut self, snapshots: impl IntoIterator<Item = SnapshotId>) {
        self.snapshots = snapshots.into_iter().collect();
    }
}
