//! Block device mappings as they are asked for: what they leave unsaid is the image's.

use ami_core::{BlockDeviceKind, BlockDeviceMapping, DeviceName, Digest, Ebs, VolumeType};
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// A disk of an instance, or of an image of one, as a request names it: another in the place of the one that is at that
/// device name, or one more.
///
/// It says what is to be other than the image has it, and nothing of the rest. A volume where the image has none is by
/// default of gp3, goes with its instance, is not encrypted, and is of the size of its snapshot; one that begins empty has
/// no default size.
///
/// ```
/// use ami_core::VolumeType;
/// use instance_core::{BlockDeviceMappingRequest, LaunchSpec};
///
/// // The image's root volume, with more room; all else is as in the image.
/// let root = BlockDeviceMappingRequest::new("/dev/xvda").size_gib(20);
/// let data = BlockDeviceMappingRequest::new("/dev/sdf").size_gib(125).volume_type(VolumeType::St1);
/// let spec = LaunchSpec::new("t3.micro".parse()?)
///     .block_device(root)
///     .block_device(data.delete_on_termination(false))
///     .block_device(BlockDeviceMappingRequest::ephemeral("/dev/sdb", "ephemeral0"))
///     .block_device(BlockDeviceMappingRequest::no_device("/dev/sdc"));
/// assert_eq!(spec.block_devices.len(), 4);
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[non_exhaustive]
pub struct BlockDeviceMappingRequest {
    /// The device name, which is checked by the call that it is given to.
    pub device_name: String,
    /// What is to be there.
    pub kind: BlockDeviceRequestKind,
}

/// What is to be at a device name. [`BlockDeviceMappingRequest`] shows it in use.
// A request that says everything is written as the mapping itself is, in which earlier versions kept it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
#[non_exhaustive]
pub enum BlockDeviceRequestKind {
    /// An EBS volume.
    Ebs(EbsRequest),
    /// An instance store volume.
    Ephemeral {
        /// `ephemeral0` to `ephemeral23`.
        virtual_name: String,
    },
    /// Nothing: suppresses what would be there otherwise.
    NoDevice,
}

/// What a request says of an EBS volume; what is `None` is the image's. [`BlockDeviceMappingRequest`] shows it in use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[non_exhaustive]
pub struct EbsRequest {
    /// The content that it starts with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Digest>,
    /// Its size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_size_gib: Option<u32>,
    /// Whether it goes when its instance is terminated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_on_termination: Option<bool>,
    /// Its type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_type: Option<VolumeType>,
    /// Whether it is encrypted. What is encrypted in the image stays so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
}

impl BlockDeviceMappingRequest {
    /// A volume of which nothing is said yet.
    pub fn new(device_name: impl Into<String>) -> Self {
        let kind = BlockDeviceRequestKind::Ebs(EbsRequest::default());
        Self { device_name: device_name.into(), kind }
    }

    /// An instance store volume, `ephemeral0` to `ephemeral23`.
    pub fn ephemeral(device_name: impl Into<String>, virtual_name: impl Into<String>) -> Self {
        let kind = BlockDeviceRequestKind::Ephemeral { virtual_name: virtual_name.into() };
        Self { device_name: device_name.into(), kind }
    }

    /// No device under this name.
    pub fn no_device(device_name: impl Into<String>) -> Self {
        Self { device_name: device_name.into(), kind: BlockDeviceRequestKind::NoDevice }
    }

    /// The content that the volume starts with. Without meaning for anything but a volume, as is what follows.
    #[must_use]
    pub fn snapshot(self, snapshot: Digest) -> Self {
        self.with_ebs(|ebs| ebs.snapshot = Some(snapshot))
    }

    /// The size of the volume.
    #[must_use]
    pub fn size_gib(self, size: u32) -> Self {
        self.with_ebs(|ebs| ebs.volume_size_gib = Some(size))
    }

    /// Whether the volume is deleted when its instance is terminated.
    #[must_use]
    pub fn delete_on_termination(self, delete: bool) -> Self {
        self.with_ebs(|ebs| ebs.delete_on_termination = Some(delete))
    }

    /// The type of the volume.
    #[must_use]
    pub fn volume_type(self, volume_type: VolumeType) -> Self {
        self.with_ebs(|ebs| ebs.volume_type = Some(volume_type))
    }

    /// Whether the volume is encrypted. What is encrypted in the image stays so.
    #[must_use]
    pub fn encrypted(self, encrypted: bool) -> Self {
        self.with_ebs(|ebs| ebs.encrypted = Some(encrypted))
    }

    fn with_ebs(mut self, change: impl FnOnce(&mut EbsRequest)) -> Self {
        if let BlockDeviceRequestKind::Ebs(ebs) = &mut self.kind {
            change(ebs);
        }
        self
    }

    /// The content that it names.
    pub(crate) fn content(&self) -> Option<&Digest> {
        match &self.kind {
            BlockDeviceRequestKind::Ebs(ebs) => ebs.snapshot.as_ref(),
            _ => None,
        }
    }

    /// Whether it is of the same disk as that device name.
    pub(crate) fn is_at(&self, device_name: &str) -> bool {
        let named = self.device_name.parse().ok().zip(device_name.parse().ok());
        named.is_some_and(|(one, other): (DeviceName, DeviceName)| one.same_disk(&other))
    }

    /// Checks what can be checked of it without the image, and gives its device name.
    pub(crate) fn check(&self) -> Result<DeviceName> {
        let name = self.device_name.parse()?;
        match &self.kind {
            // What it does not say is what every size and type goes with.
            BlockDeviceRequestKind::Ebs(ebs) => {
                let volume_type = ebs.volume_type.unwrap_or(VolumeType::Gp3);
                let size = ebs.volume_size_gib.unwrap_or(volume_type.size_range_gib().1);
                BlockDeviceMapping::blank(name, size).volume_type(volume_type).validate()
            }
            BlockDeviceRequestKind::Ephemeral { virtual_name } => {
                BlockDeviceMapping::ephemeral(name, virtual_name).validate()
            }
            BlockDeviceRequestKind::NoDevice => Ok(name),
        }
        .map_err(Into::into)
    }

    /// The disk that is asked for, in the place of the image's at that name, if that has one. `size_of` gives the size of a
    /// content in GiB.
    pub(crate) fn resolved(
        &self,
        image: Option<&BlockDeviceMapping>,
        size_of: impl FnOnce(&Digest) -> Result<u32>,
    ) -> Result<BlockDeviceMapping> {
        let name = &self.device_name;
        match &self.kind {
            BlockDeviceRequestKind::Ebs(asked) => {
                let disk = asked.resolved(name, image, size_of)?;
                disk.validate()?;
                Ok(disk)
            }
            BlockDeviceRequestKind::Ephemeral { virtual_name } => {
                Ok(BlockDeviceMapping::ephemeral(name, virtual_name))
            }
            BlockDeviceRequestKind::NoDevice => Ok(BlockDeviceMapping::no_device(name)),
        }
    }
}

impl EbsRequest {
    fn resolved(
        &self,
        name: &str,
        image: Option<&BlockDeviceMapping>,
        size_of: impl FnOnce(&Digest) -> Result<u32>,
    ) -> Result<BlockDeviceMapping> {
        let (name, base) = match image.map(|disk| (disk.device_name(), disk.kind())) {
            Some((name, BlockDeviceKind::Ebs(base))) => (name, Some(base)),
            _ => (name, None),
        };
        let content = self.snapshot.as_ref().or_else(|| base?.snapshot());
        let size = match (self.volume_size_gib.or_else(|| base.map(Ebs::volume_size_gib)), content) {
            (Some(size), _) => size,
            (None, Some(content)) => size_of(content)?,
            (None, None) => {
                let what = format!("the device {name} has neither a size nor a snapshot");
                return Err(Error::new(ErrorKind::MissingParameter, what));
            }
        };
        let volume = match content {
            Some(content) => BlockDeviceMapping::ebs(name, *content, size),
            None => BlockDeviceMapping::blank(name, size),
        };
        let delete = self.delete_on_termination.or_else(|| base.map(Ebs::delete_on_termination));
        let volume_type = self.volume_type.or_else(|| base.map(Ebs::volume_type));
        // What is encrypted stays so: a request cannot have it stored in plain.
        let encrypted = self.encrypted.unwrap_or_default() || base.is_some_and(Ebs::encrypted);
        Ok(volume
            .delete_on_termination(delete.unwrap_or(true))
            .volume_type(volume_type.unwrap_or(VolumeType::Gp3))
            .encrypted(encrypted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Launch templates, and the digests of launches with a client token, that were stored before a request could leave
    /// anything unsaid.
    #[test]
    fn what_says_everything_is_stored_as_the_mapping_is() {
        let content = Digest::of(b"data");
        let said = |volume: BlockDeviceMappingRequest| {
            volume.size_gib(9).delete_on_termination(true).volume_type(VolumeType::Gp2).encrypted(false)
        };
        let table = [
            (
                said(BlockDeviceMappingRequest::new("/dev/sdf")),
                BlockDeviceMapping::blank("/dev/sdf", 9).volume_type(VolumeType::Gp2),
            ),
            (
                said(BlockDeviceMappingRequest::new("/dev/sdf").snapshot(content)),
                BlockDeviceMapping::ebs("/dev/sdf", content, 9).volume_type(VolumeType::Gp2),
            ),
            (
                BlockDeviceMappingRequest::ephemeral("/dev/sdb", "ephemeral0"),
                BlockDeviceMapping::ephemeral("/dev/sdb", "ephemeral0"),
            ),
            (BlockDeviceMappingRequest::no_device("/dev/sdb"), BlockDeviceMapping::no_device("/dev/sdb")),
        ];
        for (request, mapping) in table {
            let stored = serde_json::to_string(&mapping).unwrap();
            assert_eq!(serde_json::to_string(&request).unwrap(), stored);
            assert_eq!(serde_json::from_str::<BlockDeviceMappingRequest>(&stored).unwrap(), request);
        }
        let unsaid = serde_json::to_string(&BlockDeviceMappingRequest::new("/dev/sdf").size_gib(9)).unwrap();
        assert_eq!(unsaid, r#"{"deviceName":"/dev/sdf","kind":{"ebs":{"volumeSizeGib":9}}}"#);
    }
}
