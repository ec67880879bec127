//! Volumes as resources of their own: made, deleted and described.

use std::sync::PoisonError;

use ami_core::{AccountId, InstanceId, Page, SnapshotId, Tags, Timestamp, VolumeId, VolumeType};
use serde::{Deserialize, Serialize};
use storage_block::VolumeOptions;

use crate::describe::{DescribeVolumes, Filterable, tag_values};
use crate::description::InstanceDescription;
use crate::instance::Live;
use crate::products::ProductCodes;
use crate::record::{InstanceRecord, VolumeRecord};
use crate::region::{Inner, Region};
use crate::{Error, ErrorKind, InstanceState, Result};

pub(crate) const GIB: u64 = 1 << 30;

/// The state of a volume. Making and deleting are done when their calls return, so that nobody sees a volume
/// in between. [`Region::watch_volume`] shows it in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum VolumeState {
    /// No instance has it.
    Available,
    /// It is attached to an instance.
    InUse,
    /// It is there no more, which only who [watches](Region::watch_volume) it sees.
    Deleted,
}

impl VolumeState {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::InUse => "in-use",
            Self::Deleted => "deleted",
        }
    }
}

/// Where a volume is attached; [`VolumeDescription`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeAttachment {
    /// The instance.
    pub instance_id: InstanceId,
    /// The device name there.
    pub device_name: String,
    /// Whether it goes with the instance.
    pub delete_on_termination: bool,
}

/// What is known of a volume (`DescribeVolumes`).
///
/// ```
/// # use instance_core::{Region, testing::FakeHypervisor};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// use instance_core::{DescribeVolumes, VolumeSpec, VolumeState};
///
/// let made = region.create_volume(VolumeSpec::new(8).tag("Name", "data"))?;
/// assert_eq!((made.size_gib, made.state, &made.attachment), (8, VolumeState::Available, &None));
/// let found = region.describe_volumes(&DescribeVolumes::new().filter("tag:Name", ["d*"]))?;
/// assert_eq!(found.items, [made.clone()]);
/// region.delete_volume(made.id)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeDescription {
    /// Its id.
    pub id: VolumeId,
    /// The account that it belongs to.
    pub owner: AccountId,
    /// Its size in GiB.
    pub size_gib: u64,
    /// Its type.
    pub volume_type: VolumeType,
    /// Its state.
    pub state: VolumeState,
    /// Where it is attached, if it is.
    pub attachment: Option<VolumeAttachment>,
    /// The snapshot that it was made of, if it was made of one by its id.
    pub snapshot_id: Option<SnapshotId>,
    /// The key that wraps its data key, if it is encrypted.
    pub kms_key_id: Option<String>,
    /// The products whose content it has.
    pub product_codes: ProductCodes,
    /// When it was made.
    pub create_time: Timestamp,
    /// Its tags.
    pub tags: Tags,
}

impl VolumeDescription {
    pub(crate) fn of(record: VolumeRecord, holder: Option<&InstanceDescription>) -> Self {
        let attachment = holder.and_then(|holder| {
            let attachment = holder.attachments.iter().find(|a| a.volume_id == record.id)?;
            Some(VolumeAttachment {
                instance_id: holder.id,
                device_name: attachment.device_name.clone(),
                delete_on_termination: attachment.delete_on_termination,
            })
        });
        Self {
            id: record.id,
            owner: record.owner,
            size_gib: record.size.div_ceil(GIB),
            volume_type: record.volume_type,
            state: if attachment.is_some() { VolumeState::InUse } else { VolumeState::Available },
            attachment,
            snapshot_id: record.snapshot_id,
            kms_key_id: record.kms_key_id,
            product_codes: record.product_codes,
            create_time: record.created,
            tags: record.tags,
        }
    }
}

/// What to make a volume with (`CreateVolume`). [`VolumeDescription`] shows it in use.
#[derive(Debug, Clone)]
#[must_use = "a specification makes nothing by itself"]
pub struct VolumeSpec {
    size_gib: Option<u32>,
    snapshot: Option<SnapshotId>,
    volume_type: VolumeType,
    encrypted: bool,
    kms_key_id: Option<String>,
    tags: Vec<(String, String)>,
}

impl VolumeSpec {
    /// An empty volume of so many GiB.
    pub fn new(size_gib: u32) -> Self {
        let (encrypted, kms_key_id, tags) = Default::default();
        let (size_gib, volume_type) = (Some(size_gib), VolumeType::Gp3);
        Self { size_gib, snapshot: None, volume_type, encrypted, kms_key_id, tags }
    }

    /// A volume with the content of a snapshot, as large as the volume that this was made of unless
    /// [`size_gib`](Self::size_gib) says more.
    pub fn of_snapshot(snapshot: SnapshotId) -> Self {
        Self { size_gib: None, snapshot: Some(snapshot), ..Self::new(0) }
    }

    /// The size in GiB.
    pub fn size_gib(mut self, size_gib: u32) -> Self {
        self.size_gib = Some(size_gib);
        self
    }

    /// The type; gp3 unless this says otherwise.
    pub fn volume_type(mut self, volume_type: VolumeType) -> Self {
        self.volume_type = volume_type;
        self
    }

    /// Encrypted under a data key of its own, which the default key of the region's [keys](crate::RegionOptions::keys)
    /// wraps. One that is made of an encrypted snapshot is encrypted under the snapshot's data key, unless this is said.
    pub fn encrypted(mut self, encrypted: bool) -> Self {
        self.encrypted = encrypted;
        self
    }

    /// Encrypted, with this key of the region's keys to wrap its data key.
    pub fn kms_key_id(mut self, key_id: impl Into<String>) -> Self {
        self.kms_key_id = Some(key_id.into());
        self.encrypted(true)
    }

    /// A tag.
    pub fn tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.push((key.into(), value.into()));
        self
    }
}

impl<H> Region<H> {
    /// Makes a volume of the account's (`CreateVolume`).
    ///
    /// # Errors
    ///
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound), [`InvalidParameter`](ErrorKind::InvalidParameter) for
    /// a size that the type does not have or that is less than the snapshot's,
    /// [`MalformedTagKey`](ErrorKind::MalformedTagKey), [`TagLimitExceeded`](ErrorKind::TagLimitExceeded),
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable), [`InsufficientVolumeCapacity`](ErrorKind::InsufficientVolumeCapacity), or what
    /// the host met.
    pub fn create_volume(&self, spec: VolumeSpec) -> Result<VolumeDescription> {
        self.inner.create_volume(*self.account(), spec)
    }

    /// Deletes a volume of the account's that is attached to nothing (`DeleteVolume`).
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound), [`VolumeInUse`](ErrorKind::VolumeInUse), or what the host
    /// met.
    pub fn delete_volume(&self, id: VolumeId) -> Result<()> {
        let inner = &self.inner;
        let resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
        inner.volume(*self.account(), id)?;
        inner.check_free_to_go(id)?;
        let removed = inner.remove_volumes(&[id]);
        drop(resources);
        // Its files may have stayed when its record has gone.
        inner.tell_volume(id);
        removed
    }

    /// The account's volumes that the request asks for (`DescribeVolumes`), those that outlived their
    /// instances too.
    ///
    /// Filters: `attachment.delete-on-termination`, `.device`, `.instance-id` and `.status`, `create-time`,
    /// `encrypted`, `size`, `snapshot-id`, `status`, `tag:KEY`, `tag-key`, `volume-id`, `volume-type`.
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound) for an id that is not there,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination),
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken), or what reading the state store met.
    pub fn describe_volumes(&self, request: &DescribeVolumes) -> Result<Page<VolumeDescription>> {
        request.check::<VolumeDescription>()?;
        let mut records = self.inner.store.all::<VolumeRecord>()?;
        records.retain(|record| record.owner == *self.account());
        let describe = |record: VolumeRecord| {
            let holder = self.inner.directory.attached(record.id);
            Some(VolumeDescription::of(record, holder.as_deref()))
        };
        request.answer(records, |record| record.id, describe, volume_not_found)
    }
}

impl Inner {
    /// The record of a volume of this account's.
    pub(crate) fn volume(&self, owner: AccountId, id: VolumeId) -> Result<VolumeRecord> {
        let record: Option<VolumeRecord> = self.store.get(&id.to_string())?;
        record.filter(|record| record.owner == owner).ok_or_else(|| volume_not_found(id))
    }

    /// That nobody has a volume, neither an instance nor who was given its disk.
    pub(crate) fn check_free_to_go(&self, id: VolumeId) -> Result<()> {
        self.check_detached(id)?;
        match self.open_volume(id) {
            Err(e) if e.kind() == ErrorKind::VolumeInUse => Err(e),
            // What else is wrong with it is met by whoever reads it.
            _ => Ok(()),
        }
    }

    pub(crate) fn check_detached(&self, id: VolumeId) -> Result<()> {
        match self.directory.attached(id) {
            Some(holder) => {
                let what = format!("the volume {id} is attached to {}", holder.id);
                Err(Error::new(ErrorKind::VolumeInUse, what))
            }
            None => Ok(()),
        }
    }

    fn create_volume(&self, owner: AccountId, spec: VolumeSpec) -> Result<VolumeDescription> {
        let mut tags = Tags::new();
        for (key, value) in spec.tags {
            tags.insert(key, value)?;
        }
        // What it is made of stays meanwhile.
        let _making = self.begin_making();
        let snapshot = spec.snapshot.map(|id| self.snapshot(owner, id)).transpose()?;
        let of_snapshot = snapshot.as_ref().map(|s| s.size.div_ceil(GIB));
        let size_gib = spec.size_gib.map(u64::from).or(of_snapshot).unwrap_or_default();
        let (min, max) = spec.volume_type.size_range_gib();
        let min = of_snapshot.unwrap_or_default().max(u64::from(min));
        if !(min..=u64::from(max)).contains(&size_gib) {
            let what = format!("a {} volume of it has {min} to {max} GiB, not {size_gib}", spec.volume_type);
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        let mut record = VolumeRecord {
            id: VolumeId::random().map_err(|e| Error::io(e, "cannot make an id"))?,
            owner,
            size: size_gib * GIB,
            base: snapshot.as_ref().map(|s| s.digest),
            snapshot_id: spec.snapshot,
            volume_type: spec.volume_type,
            created: Timestamp::now(),
            tags,
            kms_key_id: None,
            product_codes: snapshot.map(|s| s.product_codes).unwrap_or_default(),
            modification: None,
            growing: false,
        };
        let base = record.base.map(|digest| self.content(&digest)).transpose()?;
        let failed = |e| Error::storage(e, format!("cannot make the volume {}", record.id));
        let key = spec.encrypted.then(|| self.blocks.new_key(spec.kms_key_id.as_deref())).transpose();
        let options =
            key.map_err(failed)?.map_or_else(VolumeOptions::new, |key| VolumeOptions::new().encrypt(&key));
        let made = options.create(&self.paths.volume(record.id), base.as_ref(), record.size);
        let volume = made.map_err(failed)?;
        record.kms_key_id = volume.key().map(|key| key.key_id().to_owned());
        if let Err(e) = self.store.commit(|c| c.put(&record)) {
            // The commit may have got as far as to be there: record and files go.
            if let Err(left) = self.remove_volumes(&[record.id]) {
                tracing::error!(volume = %record.id, error = %left, "a failed volume left something behind");
            }
            return Err(e);
        }
        drop(volume);
        Ok(VolumeDescription::of(record, None))
    }

    /// Commits a record of an instance in the state that it is in, and tells everybody.
    pub(crate) fn change(
        &self,
        cell: &crate::instance::Cell,
        live: &mut Live,
        record: InstanceRecord,
    ) -> Result<()> {
        self.store.commit(|c| c.put(&record))?;
        self.publish(cell, live, record);
        Ok(())
    }
}

pub(crate) fn check_stopped(live: &Live) -> Result<()> {
    let description = &live.record.description;
    match description.state {
        InstanceState::Stopped => Ok(()),
        state => {
            let what = format!("{} is {state}; this is done while it is stopped", description.id);
            Err(Error::new(ErrorKind::IncorrectInstanceState, what))
        }
    }
}

pub(crate) fn volume_not_found(id: VolumeId) -> Error {
    Error::new(ErrorKind::VolumeNotFound, format!("the volume {id} does not exist"))
}

impl Filterable for VolumeDescription {
    const WHAT: &'static str = "volumes";
    const NAMES: &'static [&'static str] = &[
        "attachment.delete-on-termination",
        "attachment.device",
        "attachment.instance-id",
        "attachment.status",
        "create-time",
        "encrypted",
        "size",
        "snapshot-id",
        "status",
        "tag-key",
        "volume-id",
        "volume-type",
    ];

    fn values(&self, name: &str) -> Vec<String> {
        let attachment = || self.attachment.iter();
        match name {
            "attachment.delete-on-termination" => {
                attachment().map(|a| a.delete_on_termination.to_string()).collect()
            }
            "attachment.device" => attachment().map(|a| a.device_name.clone()).collect(),
            "attachment.instance-id" => attachment().map(|a| a.instance_id.to_string()).collect(),
            "attachment.status" => attachment().map(|_| "attached".to_owned()).collect(),
            "create-time" => vec![self.create_time.to_string()],
            "encrypted" => vec![self.kms_key_id.is_some().to_string()],
            "size" => vec![self.size_gib.to_string()],
            "snapshot-id" => self.snapshot_id.iter().map(ToString::to_string).collect(),
            "status" => vec![self.state.as_str().to_owned()],
            "volume-id" => vec![self.id.to_string()],
            "volume-type" => vec![self.volume_type.to_string()],
            name => tag_values(name, self.tags.iter()).unwrap_or_default(),
        }
    }
}
