//! What is told of an instance: data, which does not change with it.

use std::collections::BTreeMap;

pub(crate) use ami_core::StateReason;
use ami_core::{
    AccountId, AmiId, Architecture, DeviceName, InstanceId, ReservationId, RootDeviceType, Timestamp,
    VolumeId,
};
use serde::{Deserialize, Serialize};

use crate::network::{Network, NetworkPlacement};
use crate::products::ProductCodes;
use crate::{Error, ErrorKind, InstanceState, InstanceType, MetadataOptions, Result};

/// What happens when the guest powers itself off (`InstanceInitiatedShutdownBehavior`).
///
/// ```
/// use instance_core::{LaunchSpec, ShutdownBehavior};
///
/// // A worker that is gone when it powers itself off.
/// let worker = LaunchSpec::new("t3.micro".parse()?).shutdown_behavior(ShutdownBehavior::Terminate);
/// assert_eq!(ShutdownBehavior::default(), ShutdownBehavior::Stop);
/// # Ok::<(), instance_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownBehavior {
    /// The instance is stopped, and can be started again.
    #[default]
    Stop,
    /// The instance is terminated.
    Terminate,
}

impl ShutdownBehavior {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Terminate => "terminate",
        }
    }
}

/// The reason of what a user asked for.
pub(crate) fn user_initiated() -> StateReason {
    StateReason::new("Client.UserInitiatedShutdown", "asked for by the user")
}

/// What a state is reached by, now, in the words of `StateTransitionReason`.
fn transition(reason: &StateReason) -> String {
    match reason.code.starts_with("Client.UserInitiated") {
        // 2026-01-31T12:00:00.250Z, without the T, the fraction and the Z.
        true => {
            let now = Timestamp::now().to_string();
            let (date, time) = now.split_once('T').unwrap_or((&now, ""));
            format!("User initiated ({date} {} GMT)", time.split('.').next().unwrap_or(time))
        }
        false => reason.to_string(),
    }
}

/// A volume at its place in an instance; [`InstanceDescription`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Attachment {
    /// The device name in the image's block device mapping.
    pub device_name: String,
    /// The volume.
    pub volume_id: VolumeId,
    /// Whether the volume goes with the instance.
    pub delete_on_termination: bool,
}

/// What is known of an instance, as `DescribeInstances` tells it: a copy, which does not change with
/// the instance.
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// let instance = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?).tag("Name", "one"))?;
/// let running = instance.describe();
/// assert_eq!((running.image_id, running.instance_type.name()), (ami.id(), "t2.nano"));
/// assert_eq!(running.tags["Name"], "one");
/// let root = &running.attachments[0];
/// assert_eq!((root.device_name.as_str(), root.delete_on_termination), ("/dev/xvda", true));
///
/// instance.stop(std::time::Duration::from_secs(60))?;
/// let why = instance.describe().state_reason.ok_or("a stop has a reason")?;
/// assert_eq!(why.code, "Client.UserInitiatedShutdown");
/// assert!(instance.describe().state_transition_reason.starts_with("User initiated ("));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InstanceDescription {
    /// Its id.
    pub id: InstanceId,
    /// The account that it belongs to.
    pub owner: AccountId,
    /// The launch that it came from.
    pub reservation_id: ReservationId,
    /// Its place in that launch, from 0.
    pub launch_index: u32,
    /// When it was launched, or last started.
    pub launch_time: Timestamp,
    /// The token that the launch came with.
    pub client_token: Option<String>,
    /// The image that it was made from.
    pub image_id: AmiId,
    /// Its architecture.
    pub architecture: Architecture,
    /// Its hardware.
    pub instance_type: InstanceType,
    /// Its state.
    pub state: InstanceState,
    /// Why it is in that state, where there is something to say.
    pub state_reason: Option<StateReason>,
    /// The same as EC2 words it, with the time where a user asked for it (`StateTransitionReason`); empty where there is
    /// nothing to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub state_transition_reason: String,
    /// What happens when the guest powers itself off.
    pub shutdown_behavior: ShutdownBehavior,
    /// Whether it cannot be terminated (`DisableApiTermination`).
    pub termination_protection: bool,
    /// Whether it can be neither stopped nor terminated (`DisableApiStop`).
    pub stop_protection: bool,
    /// Whether it can hibernate (`HibernationOptions`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hibernation: bool,
    /// The name of the key pair that its user logs in with.
    pub key_name: Option<String>,
    /// How its metadata is offered to its guest.
    pub metadata_options: MetadataOptions,
    /// The device name of its root volume.
    pub root_device_name: String,
    /// What its root device is. One of instance store is none of its volumes.
    #[serde(default, skip_serializing_if = "is_ebs")]
    pub root_device_type: RootDeviceType,
    /// Its volumes, the root volume first unless it is detached. One that is terminated has none.
    pub attachments: Vec<Attachment>,
    /// The products that it runs: those of its image, and of volumes that were attached to it.
    #[serde(default, skip_serializing_if = "ProductCodes::is_empty")]
    pub product_codes: ProductCodes,
    /// Where it is in the region's network, if that has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPlacement>,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
}

impl InstanceDescription {
    /// Puts it into a state, which has a reason or not.
    pub(crate) fn enter(&mut self, state: InstanceState, reason: Option<StateReason>) {
        self.state = state;
        self.state_transition_reason = reason.as_ref().map(transition).unwrap_or_default();
        self.state_reason = reason;
    }

    /// Whether this names the root device, whatever else the image calls it by: `/dev/sda1` is `/dev/xvda`.
    pub(crate) fn is_root_device(&self, name: &str) -> bool {
        let root = self.root_device_name.as_str();
        let named: Option<(DeviceName, DeviceName)> = name.parse().ok().zip(root.parse().ok());
        named.map_or(name == root, |(name, root)| name.same_disk(&root))
    }

    /// Which of its volumes is the root volume, by its place among them. It has none while that is detached, or where its
    /// root device is instance store.
    pub(crate) fn root_volume(&self) -> Option<usize> {
        match self.root_device_type {
            RootDeviceType::Ebs => self.attachments.iter().position(|a| self.is_root_device(&a.device_name)),
            _ => None,
        }
    }

    /// Whether this volume is its root volume.
    pub(crate) fn is_root_volume(&self, id: VolumeId) -> bool {
        self.root_volume().is_some_and(|place| self.attachments[place].volume_id == id)
    }

    /// That it has something to boot.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) while its root volume is detached.
    pub(crate) fn check_root_volume(&self) -> Result<()> {
        if self.root_device_type == RootDeviceType::Ebs && self.root_volume().is_none() {
            let what =
                format!("{} has no volume attached at its root device, {}", self.id, self.root_device_name);
            return Err(Error::new(ErrorKind::IncorrectInstanceState, what));
        }
        Ok(())
    }

    /// The same with the security groups that it is in by what its network says. One that is gone keeps those that it had: what
    /// becomes of an interface that stays has nothing to do with it.
    pub(crate) fn with_groups_of(mut self, network: Option<&dyn Network>) -> Self {
        let place = self.network.as_mut().filter(|_| self.state != InstanceState::Terminated);
        if let (Some(place), Some(network)) = (place, network) {
            if let Some(groups) = network.security_groups(place) {
                place.security_groups = groups;
            }
        }
        self
    }
}

fn is_ebs(root: &RootDeviceType) -> bool {
    *root == RootDeviceType::Ebs
}
