//! What an image is launched with, as it is asked for: the parameters of `RunInstances`.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ami_core::{AmiId, NetworkInterfaceId, SecurityGroupId, SubnetId};
use serde::{Deserialize, Serialize};

use crate::network::PlacementRequest;
use crate::{BlockDeviceMappingRequest, InstanceType, MetadataOptions, NoCloudSeed, ShutdownBehavior};

/// What to launch an image with, or a part of it: what a [launch template](crate::LaunchTemplateVersion) keeps, and
/// what a launch says beside one.
///
/// A parameter that is not given is the template's, if there is one, and otherwise has EC2's default; only the
/// image and the instance type have none. Setters and fields have the same names.
///
/// ```
/// use instance_core::{BlockDeviceMappingRequest, LaunchSpec, ShutdownBehavior};
///
/// let spec = LaunchSpec::new("t3.micro".parse()?)
///     .count(1, 3)
///     .user_data("#!/bin/sh\necho hello")
///     .key_name("laptop")
///     .block_device(BlockDeviceMappingRequest::new("/dev/xvda").size_gib(20)) // a larger root volume
///     .shutdown_behavior(ShutdownBehavior::Terminate)
///     .termination_protection(true)
///     .client_token("deploy-17")
///     .tag("Name", "employee-directory")
///     .volume_tag("Name", "employee-directory");
/// assert_eq!(spec.key_name.as_deref(), Some("laptop"));
/// let nothing_yet = LaunchSpec::default();
/// assert_eq!(nothing_yet.instance_type, None);
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LaunchSpec {
    /// The image, of a launch by a template alone.
    pub image_id: Option<AmiId>,
    /// The hardware.
    pub instance_type: Option<InstanceType>,
    /// What the guest is told by its metadata.
    #[serde(with = "base64_text")]
    pub user_data: Option<Vec<u8>>,
    /// The name of the key pair.
    pub key_name: Option<String>,
    /// The tags of each instance.
    pub tags: BTreeMap<String, String>,
    /// The tags of each of their volumes.
    pub volume_tags: BTreeMap<String, String>,
    /// What is changed of the image's disks.
    pub block_devices: Vec<BlockDeviceMappingRequest>,
    /// What happens when the guest powers itself off.
    pub shutdown_behavior: Option<ShutdownBehavior>,
    /// Whether it is refused to terminate it.
    pub termination_protection: Option<bool>,
    /// Whether it is refused to stop and to terminate it.
    pub stop_protection: Option<bool>,
    /// Whether it can hibernate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hibernation: Option<bool>,
    /// How the metadata is offered.
    pub metadata_options: Option<MetadataOptions>,
    /// What it is told by a disk of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nocloud_seed: Option<NoCloudSeed>,
    /// Where it is to be in the region's network.
    pub placement: PlacementRequest,
    /// How many at least and at most; of a launch alone, as is what follows.
    #[serde(skip)]
    pub count: Option<(u32, u32)>,
    /// A name for the launch.
    #[serde(skip)]
    pub client_token: Option<String>,
    /// Whether only to ask.
    #[serde(skip)]
    pub dry_run: bool,
}

impl LaunchSpec {
    /// The most instances that a launch makes, and that it may be asked for.
    pub const MAX_COUNT: u32 = 10_000;

    /// The most bytes of user data, before it is encoded.
    pub const MAX_USER_DATA: usize = 16 * 1024;
    /// The most characters of a client token.
    pub const MAX_CLIENT_TOKEN: usize = 64;
    /// The most characters of the name of a key pair.
    pub const MAX_KEY_NAME: usize = 255;

    /// This hardware, and nothing else given.
    pub fn new(instance_type: InstanceType) -> Self {
        Self { instance_type: Some(instance_type), ..Self::default() }
    }

    /// The image, where it is not named beside this: in a template, and in a launch by one.
    #[must_use]
    pub fn image_id(mut self, id: AmiId) -> Self {
        self.image_id = Some(id);
        self
    }

    /// The hardware.
    #[must_use]
    pub fn instance_type(mut self, instance_type: InstanceType) -> Self {
        self.instance_type = Some(instance_type);
        self
    }

    /// How many instances: as many as can be, up to `max`, and none if that is less than `min`. One, unless
    /// this says otherwise; [`MAX_COUNT`](Self::MAX_COUNT) at most.
    #[must_use]
    pub fn count(mut self, min: u32, max: u32) -> Self {
        self.count = Some((min, max));
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
    /// What it leaves unsaid is as the image has it: content, size, type, and whether it goes with its instance. What is
    /// encrypted in the image is so in any case. [`no_device`](BlockDeviceMappingRequest::no_device) leaves the image's disk out.
    #[must_use]
    pub fn block_device(mut self, mapping: BlockDeviceMappingRequest) -> Self {
        self.block_devices.push(mapping);
        self
    }

    /// What happens when the guest powers itself off. One whose root device is instance store is terminated, whatever
    /// this says.
    #[must_use]
    pub fn shutdown_behavior(mut self, behavior: ShutdownBehavior) -> Self {
        self.shutdown_behavior = Some(behavior);
        self
    }

    /// Refuses to terminate it until this is taken back (`DisableApiTermination`). A guest that powers itself
    /// off is terminated all the same, if that is its [`shutdown_behavior`](Self::shutdown_behavior).
    #[must_use]
    pub fn termination_protection(mut self, protect: bool) -> Self {
        self.termination_protection = Some(protect);
        self
    }

    /// Refuses to stop and to terminate it until this is taken back (`DisableApiStop`).
    #[must_use]
    pub fn stop_protection(mut self, protect: bool) -> Self {
        self.stop_protection = Some(protect);
        self
    }

    /// Whether it can [hibernate](crate::Instance::hibernate) (`HibernationOptions`), which is said once, here.
    #[must_use]
    pub fn hibernation(mut self, configured: bool) -> Self {
        self.hibernation = Some(configured);
        self
    }

    /// How its metadata is offered to its guest.
    #[must_use]
    pub fn metadata_options(mut self, options: MetadataOptions) -> Self {
        self.metadata_options = Some(options);
        self
    }

    /// Tells it by a small disk beside its own what metadata tells where there is a network.
    #[must_use]
    pub fn nocloud_seed(mut self, seed: NoCloudSeed) -> Self {
        self.nocloud_seed = Some(seed);
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

    /// The interface of the region's network that it has, of one instance, instead of a new one: with its subnet, groups and
    /// addresses. It stays when the instance is terminated. Named again, it is one more, at the next device index: that is
    /// [`AttachmentLimitExceeded`](crate::ErrorKind::AttachmentLimitExceeded), as an instance has one here, whatever its type.
    #[must_use]
    pub fn network_interface(mut self, id: NetworkInterfaceId) -> Self {
        match self.placement.interface_id {
            None => self.placement.interface_id = Some(id),
            Some(_) => self.placement.more_interfaces.push(id),
        }
        self
    }

    /// Whether each instance has a public address while it runs (`AssociatePublicIpAddress`): one of the host's, by which others
    /// reach it, another each time that it is started. Its subnet says whether it has, unless this does.
    #[must_use]
    pub fn associate_public_ip_address(mut self, associate: bool) -> Self {
        self.placement.public_ip = Some(associate);
        self
    }

    /// A name for this launch: whoever launches again with the same token and parameters gets the instances
    /// of the first time. When these are all terminated that is
    /// [`IdempotentInstanceTerminated`](crate::ErrorKind::IdempotentInstanceTerminated), and when the last of them is
    /// remembered no more the token is free.
    #[must_use]
    pub fn client_token(mut self, token: impl Into<String>) -> Self {
        self.client_token = Some(token.into());
        self
    }

    /// Launches nothing, and says by its error whether it would:
    /// [`DryRunOperation`](crate::ErrorKind::DryRunOperation) if it would,
    /// [`UnauthorizedOperation`](crate::ErrorKind::UnauthorizedOperation) if the account may not, and otherwise
    /// what is wrong.
    #[must_use]
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// The same, with what it does not say as `other` says it. A parameter is taken as a whole: tags and block devices
    /// that are given here are all that there are.
    pub(crate) fn or(self, other: Self) -> Self {
        fn given<T: Default + PartialEq>(this: T, other: T) -> T {
            if this == T::default() { other } else { this }
        }
        let (place, other_place) = (self.placement, other.placement);
        Self {
            image_id: self.image_id.or(other.image_id),
            instance_type: self.instance_type.or(other.instance_type),
            user_data: self.user_data.or(other.user_data),
            key_name: self.key_name.or(other.key_name),
            tags: given(self.tags, other.tags),
            volume_tags: given(self.volume_tags, other.volume_tags),
            block_devices: given(self.block_devices, other.block_devices),
            shutdown_behavior: self.shutdown_behavior.or(other.shutdown_behavior),
            termination_protection: self.termination_protection.or(other.termination_protection),
            stop_protection: self.stop_protection.or(other.stop_protection),
            hibernation: self.hibernation.or(other.hibernation),
            metadata_options: self.metadata_options.or(other.metadata_options),
            nocloud_seed: self.nocloud_seed.or(other.nocloud_seed),
            placement: PlacementRequest {
                subnet_id: place.subnet_id.or(other_place.subnet_id),
                security_groups: given(place.security_groups, other_place.security_groups),
                private_ip: place.private_ip.or(other_place.private_ip),
                more_interfaces: match place.interface_id {
                    Some(_) => place.more_interfaces,
                    None => other_place.more_interfaces,
                },
                interface_id: place.interface_id.or(other_place.interface_id),
                public_ip: place.public_ip.or(other_place.public_ip),
            },
            count: self.count.or(other.count),
            client_token: self.client_token.or(other.client_token),
            dry_run: self.dry_run || other.dry_run,
        }
    }
}

/// Bytes as a text in base64.
mod base64_text {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        bytes: &Option<Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        bytes.as_ref().map(|bytes| BASE64.encode(bytes)).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Vec<u8>>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| BASE64.decode(text).map_err(D::Error::custom)).transpose()
    }
}
