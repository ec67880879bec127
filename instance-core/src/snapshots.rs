//! Snapshots as resources of their own: made of volumes, deleted and described.
//!
//! Those that images name are the images' and have no id.

use std::sync::PoisonError;

use ami_core::{AccountId, Digest, Page, SnapshotId, Tags, Timestamp, VolumeId, may_export};
use serde::{Deserialize, Serialize};
use storage_block::Disk;

use crate::describe::{DescribeSnapshots, Filterable, tag_values};
use crate::products::ProductCodes;
use crate::record::{ImageRecord, SnapshotRecord, VolumeRecord};
use crate::region::{Inner, Region};
use crate::storing::Instant;
use crate::volumes::volume_not_found;
use crate::{Error, ErrorKind, Result};

const GIB: u64 = 1 << 30;

/// The state of a snapshot. Making one is done when its call returns, so that there is one state to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SnapshotState {
    /// All of it is there.
    Completed,
}

impl SnapshotState {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
        }
    }
}

/// What is known of a snapshot (`DescribeSnapshots`).
///
/// ```
/// # use instance_core::{Region, testing::FakeHypervisor};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// use instance_core::{DescribeSnapshots, SnapshotState, VolumeSpec};
///
/// let volume = region.create_volume(VolumeSpec::new(1))?;
/// let backup = region.create_snapshot(volume.id, "before the upgrade")?;
/// assert_eq!((backup.state, backup.volume_id, backup.volume_size_gib), (SnapshotState::Completed, volume.id, 1));
/// region.delete_volume(volume.id)?;
/// let again = region.create_volume(VolumeSpec::of_snapshot(backup.id))?;
/// assert_eq!(again.snapshot_id, Some(backup.id));
/// region.delete_snapshot(backup.id)?; // what was made of it keeps its content
/// assert!(region.describe_snapshots(&DescribeSnapshots::new())?.items.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotDescription {
    /// Its id.
    pub id: SnapshotId,
    /// The account that it belongs to.
    pub owner: AccountId,
    /// Its content; not in EC2. A [`BlockDeviceMapping`](ami_core::BlockDeviceMapping) names it so.
    pub digest: Digest,
    /// The volume that it was made of.
    pub volume_id: VolumeId,
    /// The size of that volume in GiB.
    pub volume_size_gib: u64,
    /// Its state.
    pub state: SnapshotState,
    /// What its user says of it.
    pub description: String,
    /// The key that wraps its data key, if it is encrypted, as it is if the volume was.
    pub kms_key_id: Option<String>,
    /// The products whose content it has: its bytes are not read by who does not sell them.
    pub product_codes: ProductCodes,
    /// When it was made.
    pub start_time: Timestamp,
    /// Its tags.
    pub tags: Tags,
}

impl From<SnapshotRecord> for SnapshotDescription {
    fn from(record: SnapshotRecord) -> Self {
        Self {
            id: record.id,
            owner: record.owner,
            digest: record.digest,
            volume_id: record.volume_id,
            volume_size_gib: record.size.div_ceil(GIB),
            state: SnapshotState::Completed,
            description: record.description,
            kms_key_id: record.kms_key_id,
            product_codes: record.product_codes,
            start_time: record.created,
            tags: record.tags,
        }
    }
}

impl<H> Region<H> {
    /// Makes a snapshot of a volume of the account's, as it is at one instant (`CreateSnapshot`). An instance
    /// that has it goes on meanwhile; what its guest holds in its page cache is not on the volume.
    ///
    /// # Errors
    ///
    /// [`VolumeNotFound`](ErrorKind::VolumeNotFound), [`VolumeInUse`](ErrorKind::VolumeInUse) while somebody has its
    /// [disk](Self::volume_disk), [`InvalidParameter`](ErrorKind::InvalidParameter) for a description of more than 255 characters, [`InsufficientCapacity`](ErrorKind::InsufficientCapacity), or
    /// what the host met.
    pub fn create_snapshot(&self, volume: VolumeId, description: &str) -> Result<SnapshotDescription> {
        if description.chars().count() > 255 {
            let what = "the description of a snapshot has at most 255 characters";
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        let inner = &self.inner;
        inner.making(|| inner.create_snapshot(*self.account(), volume, description)).map(Into::into)
    }

    /// The bytes of a snapshot of the account's, to read. They stay for as long as the disk, also when the snapshot is
    /// deleted.
    ///
    /// # Errors
    ///
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound), [`AuthFailure`](ErrorKind::AuthFailure) for one with a product
    /// code, or what the host met.
    pub fn snapshot_disk(&self, id: SnapshotId) -> Result<Disk> {
        let record = self.inner.snapshot(*self.account(), id)?;
        may_export(&record.product_codes, &format!("the snapshot {id}"))?;
        Ok(self.inner.content(&record.digest)?.disk())
    }

    /// Deletes a snapshot of the account's (`DeleteSnapshot`). Volumes that were made of it stay. Its bytes go as soon as
    /// nothing is being imported, copied or made an image or a snapshot of.
    ///
    /// # Errors
    ///
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound), [`SnapshotInUse`](ErrorKind::SnapshotInUse) if an
    /// image was [registered of it](crate::ImageSource::of_snapshot), or what the host met.
    pub fn delete_snapshot(&self, id: SnapshotId) -> Result<()> {
        let (inner, owner) = (&self.inner, *self.account());
        let naming = inner.naming.write().unwrap_or_else(PoisonError::into_inner);
        let resources = inner.resources.lock().unwrap_or_else(PoisonError::into_inner);
        inner.snapshot(owner, id)?;
        let images = inner.store.all::<ImageRecord>()?;
        if let Some(image) = images.iter().find(|record| record.image.snapshots().any(|of| of == id)) {
            let what = format!("the image {} was registered of the snapshot {id}", image.image.id());
            return Err(Error::new(ErrorKind::SnapshotInUse, what));
        }
        inner.store.commit(|c| {
            c.remove::<SnapshotRecord>(id);
            Ok(())
        })?;
        drop((resources, naming));
        inner.collect_soon()
    }

    /// The account's snapshots that the request asks for (`DescribeSnapshots`).
    ///
    /// Filters: `description`, `encrypted`, `owner-id`, `progress`, `snapshot-id`, `start-time`, `status`,
    /// `tag:KEY`, `tag-key`, `volume-id`, `volume-size`.
    ///
    /// # Errors
    ///
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound) for an id that is not there,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination),
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken), or what reading the state store met.
    pub fn describe_snapshots(&self, request: &DescribeSnapshots) -> Result<Page<SnapshotDescription>> {
        request.check::<SnapshotDescription>()?;
        let mut records = self.inner.store.all::<SnapshotRecord>()?;
        records.retain(|record| record.owner == *self.account());
        request.answer(records, |record| record.id, |record| Some(record.into()), snapshot_not_found)
    }
}

impl Inner {
    /// The record of a snapshot of this account's.
    pub(crate) fn snapshot(&self, owner: AccountId, id: SnapshotId) -> Result<SnapshotRecord> {
        let record: Option<SnapshotRecord> = self.store.get(&id.to_string())?;
        record.filter(|record| record.owner == owner).ok_or_else(|| snapshot_not_found(id))
    }

    fn create_snapshot(&self, owner: AccountId, id: VolumeId, description: &str) -> Result<SnapshotRecord> {
        let (volume, instant) = self.take_volume(owner, id)?;
        let (snapshot, _) = instant.store(&mut |_| ())?.pop().ok_or_else(|| volume_not_found(id))?;
        let record = SnapshotRecord {
            id: SnapshotId::random().map_err(|e| Error::io(e, "cannot make an id"))?,
            owner,
            digest: snapshot.digest(),
            volume_id: id,
            // No less than its content, of which volumes are made by default.
            size: volume.size.max(snapshot.size()),
            description: description.to_owned(),
            created: Timestamp::now(),
            tags: Tags::new(),
            kms_key_id: snapshot.key_id().map(str::to_owned),
            product_codes: volume.product_codes,
        };
        self.store.commit(|c| c.put(&record))?;
        Ok(record)
    }

    /// A volume as it is now, wherever it is. Nothing is held while it is stored.
    fn take_volume(&self, owner: AccountId, id: VolumeId) -> Result<(VolumeRecord, Instant<'_>)> {
        loop {
            self.volume(owner, id)?;
            let holder = self.directory.attached(id);
            if let Some(holder) = holder {
                let cell = self.cell(owner, holder.id)?;
                let mut live = self.hold_to_freeze(&cell);
                let attachments = &live.record.description.attachments;
                let open = attachments.iter().zip(&live.volumes).find(|(a, _)| a.volume_id == id);
                if let Some((_, open)) = open {
                    return Ok((self.volume(owner, id)?, self.freeze(vec![(id, open.clone())])));
                }
                if attachments.iter().any(|a| a.volume_id == id) {
                    let volume = self.volume(owner, id)?;
                    self.settle_volumes(&mut live)?;
                    return Ok((volume, self.freeze(vec![(id, self.open_volume(id)?)])));
                }
            }
            // Attaching and deleting wait.
            let resources = self.resources.lock().unwrap_or_else(PoisonError::into_inner);
            let volume = self.volume(owner, id)?;
            // It may have been attached or detached since it was looked for.
            if self.directory.attached(id).is_some() {
                continue;
            }
            if self.storing.open(id).is_none() {
                return Ok((volume, self.freeze(vec![(id, self.open_volume(id)?)])));
            }
            drop(resources);
            self.storing.wait(id);
        }
    }
}

fn snapshot_not_found(id: SnapshotId) -> Error {
    Error::new(ErrorKind::SnapshotNotFound, format!("the snapshot {id} does not exist"))
}

impl Filterable for SnapshotDescription {
    const WHAT: &'static str = "snapshots";
    const NAMES: &'static [&'static str] = &[
        "description",
        "encrypted",
        "owner-id",
        "progress",
        "snapshot-id",
        "start-time",
        "status",
        "tag-key",
        "volume-id",
        "volume-size",
    ];

    fn values(&self, name: &str) -> Vec<String> {
        match name {
            "description" => vec![self.description.clone()],
            "encrypted" => vec![self.kms_key_id.is_some().to_string()],
            "owner-id" => vec![self.owner.to_string()],
            "progress" => vec!["100%".to_owned()],
            "snapshot-id" => vec![self.id.to_string()],
            "start-time" => vec![self.start_time.to_string()],
            "status" => vec![self.state.as_str().to_owned()],
            "volume-id" => vec![self.volume_id.to_string()],
            "volume-size" => vec![self.volume_size_gib.to_string()],
            name => tag_values(name, self.tags.iter()).unwrap_or_default(),
        }
    }
}
