//! What a region keeps of its images, instances and volumes.

use std::sync::Arc;

use ami_core::{
    AccountId, BlockDeviceKind, BlockDeviceMapping, Digest, LaunchTemplateId, RegionName, SnapshotId,
    StoreRoot, Tags, Timestamp, VolumeId, VolumeType,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use crate::boot_cache::BootPlan;
use crate::description::StateReason;
pub(crate) use crate::image_record::{FormerImage, ImageRecord};
use crate::network::Guest;
use crate::products::ProductCodes;
use crate::store::Record;
use crate::{Error, ErrorKind, InstanceDescription, InstanceState, NoCloudSeed, Result};

/// The region itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RegionRecord {
    /// The version of the directory's format.
    pub(crate) format: u32,
    pub(crate) name: RegionName,
    /// The account whose the region's handles are unless another is named.
    pub(crate) account: AccountId,
}

impl RegionRecord {
    pub(crate) const FORMAT: u32 = 4;
    pub(crate) const KEY: &'static str = "region";
}

impl Record for RegionRecord {
    const TABLE: &'static str = "region";

    fn key(&self) -> String {
        Self::KEY.to_owned()
    }
}

/// A volume, which outlives its instance if it was told to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeRecord {
    pub(crate) id: VolumeId,
    pub(crate) owner: AccountId,
    /// In bytes.
    pub(crate) size: u64,
    /// The content that it began with.
    pub(crate) base: Option<Digest>,
    /// The snapshot that it was made of, if it was made of one by its id.
    pub(crate) snapshot_id: Option<SnapshotId>,
    pub(crate) volume_type: VolumeType,
    pub(crate) created: Timestamp,
    pub(crate) tags: Tags,
    /// The key that wraps its data key, if it is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kms_key_id: Option<String>,
    /// The products whose content it has.
    #[serde(default, skip_serializing_if = "ProductCodes::is_empty")]
    pub(crate) product_codes: ProductCodes,
    /// What was last changed of it, if anything was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) modification: Option<ModificationRecord>,
    /// Whether it is being made as large as this says, so that its disk need not be so yet; see
    /// [`settle_size`](crate::region::Inner::settle_size).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) growing: bool,
}

/// What was last changed of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ModificationRecord {
    /// In bytes.
    pub(crate) original_size: u64,
    pub(crate) target_size: u64,
    pub(crate) original_type: VolumeType,
    pub(crate) target_type: VolumeType,
    pub(crate) started: Timestamp,
    pub(crate) ended: Timestamp,
}

impl Record for VolumeRecord {
    const TABLE: &'static str = "volumes";

    fn key(&self) -> String {
        self.id.to_string()
    }
}

/// A snapshot that a user made of a volume. Those that images name have no record: they are the image's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    pub(crate) id: SnapshotId,
    pub(crate) owner: AccountId,
    pub(crate) digest: Digest,
    pub(crate) volume_id: VolumeId,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) description: String,
    pub(crate) created: Timestamp,
    pub(crate) tags: Tags,
    /// The key that wraps its data key, if it is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kms_key_id: Option<String>,
    /// The products whose content it has.
    #[serde(default, skip_serializing_if = "ProductCodes::is_empty")]
    pub(crate) product_codes: ProductCodes,
}

impl Record for SnapshotRecord {
    const TABLE: &'static str = "snapshots";

    fn key(&self) -> String {
        self.id.to_string()
    }
}

/// An instance as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InstanceRecord {
    /// Shared with all who are told of it.
    #[serde(with = "shared")]
    pub(crate) description: Arc<InstanceDescription>,
    /// Whether its volumes were durable when this was written. Those that go with it need not be on the disk before its guest
    /// writes to one; then all become durable, soon or when it flushes them. What is not there of them until then, whether or
    /// not a crash has taken it, is made again as it was.
    pub(crate) launched: bool,
    /// What it boots if that is not read from its root volume.
    pub(crate) direct_boot: Option<BootPlan>,
    /// What its guest is told by its metadata, in base64.
    pub(crate) user_data: Option<String>,
    /// The public key of its key pair, as its launch found it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) public_key: Option<String>,
    /// What its launch was asked for with, by which a repeated one is known.
    pub(crate) parameters: Option<Digest>,
    /// The launch template that it came from, by which a repeated launch is known when that is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) launched_from: Option<LaunchedFrom>,
    /// What is mapped to instance store, of which its type may have less; its root device with it, if that is instance
    /// store.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) instance_store: Vec<BlockDeviceMapping>,
    /// What it is told by a disk of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) nocloud_seed: Option<NoCloudSeed>,
    /// The keys by which its SSH server is known, as its console has shown them last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) host_keys: Vec<String>,
    /// Whether its guest had shut itself down when it was stopped, so that its file systems are whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) shut_down: bool,
    /// Its machine as it was saved, while it hibernates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) saved: Option<SavedRecord>,
    /// When it was terminated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ended: Option<Timestamp>,
}

/// The launch template that an instance was launched from, by the name that it had then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LaunchedFrom {
    pub(crate) id: LaunchTemplateId,
    pub(crate) name: String,
}

/// A saved machine, in the place of its instance's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedRecord {
    /// In bytes.
    pub(crate) len: u64,
    /// Whether it has a place for streams.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) vsock: bool,
    /// The port of its guest's agent, if that had still to have file systems go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unthawed: Option<u32>,
}

/// What is shared is stored as what it is.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(value: &Arc<T>, to: S) -> Result<S::Ok, S::Error> {
        T::serialize(value, to)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(from).map(Arc::new)
    }
}

impl InstanceRecord {
    /// Its description, to be changed: who was told of it keeps the old one.
    pub(crate) fn description_mut(&mut self) -> &mut InstanceDescription {
        Arc::make_mut(&mut self.description)
    }

    /// Its description as it is told. One that is terminated has no volumes any more: those that go on may be another's.
    /// The record keeps them, which may have to be made again after a crash.
    pub(crate) fn told(&self) -> Arc<InstanceDescription> {
        let mut told = self.description.clone();
        if told.state == InstanceState::Terminated && !told.attachments.is_empty() {
            Arc::make_mut(&mut told).attachments.clear();
        }
        told
    }

    /// Puts the instance into a state, which has a reason or not.
    pub(crate) fn enter(&mut self, state: InstanceState, reason: Option<StateReason>) {
        self.description_mut().enter(state, reason);
        self.ended = (state == InstanceState::Terminated).then(Timestamp::now);
        if matches!(state, InstanceState::ShuttingDown | InstanceState::Terminated) {
            // No guest is told it any more, and what is to give space back should take little.
            self.user_data = None;
        }
    }

    /// What its guest is told by its metadata.
    pub(crate) fn user_data(&self) -> Result<Option<Vec<u8>>> {
        let decoded = self.user_data.as_ref().map(|text| BASE64.decode(text)).transpose();
        decoded.map_err(|e| {
            let what = format!("the user data of {} is damaged", self.description.id);
            Error::new(ErrorKind::Corrupt, what).with_source(e)
        })
    }

    /// Its root device, if that is instance store.
    pub(crate) fn store_root(&self) -> Option<&StoreRoot> {
        self.instance_store.iter().find_map(|mapping| match mapping.kind() {
            BlockDeviceKind::InstanceStore(root) => Some(root),
            _ => None,
        })
    }

    /// Says what a network is told of its guest, if it has a place in one.
    pub(crate) fn with_guest<T>(&self, tell: impl FnOnce(Guest<'_>) -> Result<T>) -> Result<Option<T>> {
        let instance = &self.description;
        let Some(placement) = &instance.network else { return Ok(None) };
        let user_data = self.user_data()?;
        let store = instance.instance_type.instance_store();
        let served = store.map(|store| store.served(&self.instance_store)).unwrap_or_default();
        let (user_data, instance_store) = (user_data.as_deref(), served.as_slice());
        let public_key = self.public_key.as_deref();
        tell(Guest { instance, placement, user_data, public_key, instance_store }).map(Some)
    }
}

impl Record for InstanceRecord {
    const TABLE: &'static str = "instances";

    fn key(&self) -> String {
        self.description.id.to_string()
    }
}
