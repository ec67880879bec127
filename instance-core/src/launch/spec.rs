//! What an image is launched with: the parameters of `RunInstances`.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ami_core::{AmiId, BlockDeviceMapping, Digest, SecurityGroupId, SubnetId, Tags};
use serde::Serialize;

use crate::network::PlacementRequest;
use crate::{Error, ErrorKind, InstanceType, MetadataOptions, Result, ShutdownBehavior};

/// What to launch an image with.
///
/// ```
/// use ami_core::BlockDeviceMapping;
/// use instance_core::{LaunchSpec, ShutdownBehavior};
///
/// let spec = LaunchSpec::new("t3.micro".parse()?)
///     .count(1, 3)
///     .user_data("#!/bin/sh\necho hello")
///     .key_name("laptop")
///     .block_device(BlockDeviceMapping::blank("/dev/xvda", 20)) // a larger root volume
///     .shutdown_behavior(ShutdownBehavior::Terminate)
///     .termination_protection(true)
///     .client_token("deploy-17")
///     .tag("Name", "employee-directory")
///     .volume_tag("Name", "employee-directory");
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, Serialize)]
pub struct LaunchSpec {
    pub(super) instance_type: InstanceType,
    pub(super) min_count: u32,
    pub(super) max_count: u32,
    pub(super) user_data: Option<Vec<u8>>,
    pub(super) key_name: Option<String>,
    pub(super) tags: BTreeMap<String, String>,
    pub(super) volume_tags: BTreeMap<String, String>,
    pub(super) block_devices: Vec<BlockDeviceMapping>,
    pub(super) shutdown_behavior: ShutdownBehavior,
    pub(super) termination_protection: bool,
    pub(super) stop_protection: bool,
    pub(super) metadata_options: MetadataOptions,
    #[serde(skip_serializing_if = "PlacementRequest::is_default")]
    pub(super) placement: PlacementRequest,
    #[serde(skip)]
    pub(super) client_token: Option<String>,
    #[serde(skip)]
    pub(super) dry_run: bool,
}

impl LaunchSpec {
    /// The most bytes of user data, before it is encoded.
    pub const MAX_USER_DATA: usize = 16 * 1024;
    /// The most characters of a client token.
    pub const MAX_CLIENT_TOKEN: usize = 64;
    /// The most characters of the name of a key pair.
    pub const MAX_KEY_NAME: usize = 255;

    /// This hardware, and EC2's defaults for the rest.
    pub fn new(instance_type: InstanceType) -> Self {
        Self {
            instance_type,
            min_count: 1,
            max_count: 1,
            user_data: None,
            key_name: None,
            tags: BTreeMap::new(),
            volume_tags: BTreeMap::new(),
            block_devices: Vec::new(),
            shutdown_behavior: ShutdownBehavior::default(),
            termination_protection: false,
            stop_protection: false,
            metadata_options: MetadataOptions::default(),
            placement: PlacementRequest::default(),
            client_token: None,
            dry_run: false,
        }
    }

    /// How many instances: as many as can be, up to `max`, and none if that is less than `min`. One, unless
    /// this says otherwise.
    #[must_use]
    pub fn count(mut self, min: u32, max: u32) -> Self {
        (self.min_count, self.max_count) = (min, max);
        self
    }

    /// What the guest is told by its metadata, to configure itself by: up to 16 KiB, as they are.
    #[must_use]
    pub fn user_data(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.user_data = Some(bytes.into());
        self
    }

    /// The name of the key pair that its user logs in with, which the region's network knows. Without a network, the
    /// name is kept and handed out.
    #[must_use]
    pub fn key_name(mut self, name: impl Into<String>) -> Self {
        self.key_name = Some(name.into());
        self
    }

    /// A tag of each instance.
    #[must_use]
    pub fn tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.insert(key.into(), value.into());
        self
    }

    /// A tag of each of their volumes.
    #[must_use]
    pub fn volume_tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.volume_tags.insert(key.into(), value.into());
        self
    }

    /// A disk in the place of the image's at that device name, or beside the image's.
    ///
    /// One that names no content keeps that of the image's disk there and changes the rest, such as the size.
    /// [`NoDevice`](ami_core::BlockDeviceKind::NoDevice) leaves the image's disk out.
    #[must_use]
    pub fn block_device(mut self, mapping: BlockDeviceMapping) -> Self {
        self.block_devices.push(mapping);
        self
    }

    /// What happens when the guest powers itself off.
    #[must_use]
    pub fn shutdown_behavior(mut self, behavior: ShutdownBehavior) -> Self {
        self.shutdown_behavior = behavior;
        self
    }

    /// Refuses to terminate it until this is taken back (`DisableApiTermination`). A guest that powers itself
    /// off is terminated all the same, if that is its [`shutdown_behavior`](Self::shutdown_behavior).
    #[must_use]
    pub fn termination_protection(mut self, protect: bool) -> Self {
        self.termination_protection = protect;
        self
    }

    /// Refuses to stop and to terminate it until this is taken back (`DisableApiStop`).
    #[must_use]
    pub fn stop_protection(mut self, protect: bool) -> Self {
        self.stop_protection = protect;
        self
    }

    /// How its metadata is offered to its guest.
    #[must_use]
    pub fn metadata_options(mut self, options: MetadataOptions) -> Self {
        self.metadata_options = options;
        self
    }

    /// The subnet of the region's network; the default one, unless this says otherwise.
    #[must_use]
    pub fn subnet(mut self, id: SubnetId) -> Self {
        self.placement.subnet_id = Some(id);
        self
    }

    /// One more security group; the default one, if there is none.
    #[must_use]
    pub fn security_group(mut self, id: SecurityGroupId) -> Self {
        self.placement.security_groups.push(id);
        self
    }

    /// The address in the subnet, of one instance; one that is free, unless this says otherwise.
    #[must_use]
    pub fn private_ip(mut self, address: Ipv4Addr) -> Self {
        self.placement.private_ip = Some(address);
        self
    }

    /// A name for this launch: whoever launches again with the same token and parameters gets the instances
    /// of the first time, for as long as one of them is remembered.
    #[must_use]
    pub fn client_token(mut self, token: impl Into<String>) -> Self {
        self.client_token = Some(token.into());
        self
    }

    /// Launches nothing, and says by its error whether it would:
    /// [`DryRunOperation`](ErrorKind::DryRunOperation) if it would,
    /// [`UnauthorizedOperation`](ErrorKind::UnauthorizedOperation) if the account may not, and otherwise
    /// what is wrong.
    #[must_use]
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    pub(crate) fn check_user_data(bytes: Option<&[u8]>) -> Result<()> {
        match bytes.map(<[u8]>::len) {
            Some(len) if len > Self::MAX_USER_DATA => {
                let what = format!("the user data has {len} bytes; it is limited to {}", Self::MAX_USER_DATA);
                Err(Error::new(ErrorKind::InvalidParameter, what))
            }
            _ => Ok(()),
        }
    }

    /// Checks what can be checked without looking at the region.
    pub(super) fn check(&self) -> Result<Checked> {
        let (min, max) = (self.min_count, self.max_count);
        if min < 1 || max < min {
            let what =
                format!("{min} to {max} instances cannot be launched; use 1 or more, and no less at most");
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        if max > 1 && self.placement.private_ip.is_some() {
            let what = "several instances cannot have one address";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        Self::check_user_data(self.user_data.as_deref())?;
        check_ascii("client token", self.client_token.as_deref(), Self::MAX_CLIENT_TOKEN)?;
        check_ascii("key name", self.key_name.as_deref(), Self::MAX_KEY_NAME)?;
        let tags = Tags::try_from(self.tags.clone())?;
        self.metadata_options.check(&tags)?;
        for (place, mapping) in self.block_devices.iter().enumerate() {
            let name = mapping.validate()?;
            let same =
                |other: &BlockDeviceMapping| other.validate().is_ok_and(|other| other.same_disk(&name));
            if self.block_devices[..place].iter().any(same) {
                let what = format!("the device {name} is mapped twice");
                return Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, what));
            }
        }
        Ok(Checked { volume_tags: Tags::try_from(self.volume_tags.clone())? })
    }

    /// The digest of all that has to be the same for a launch to be a repeated one.
    pub(super) fn parameters(&self, image: AmiId) -> Result<Digest> {
        let json = serde_json::to_vec(&(image, self))
            .map_err(|e| Error::new(ErrorKind::Internal, "cannot serialise a launch").with_source(e))?;
        Ok(Digest::of(&json))
    }
}

fn check_ascii(what: &str, text: Option<&str>, max: usize) -> Result<()> {
    match text {
        Some(text)
            if !(1..=max).contains(&text.len()) || !text.bytes().all(|b| (b' '..=b'~').contains(&b)) =>
        {
            let what = format!("the {what} must be 1 to {max} ASCII characters");
            Err(Error::new(ErrorKind::InvalidParameter, what))
        }
        _ => Ok(()),
    }
}

/// What a check has made of the texts.
pub(super) struct Checked {
    pub(super) volume_tags: Tags,
}
