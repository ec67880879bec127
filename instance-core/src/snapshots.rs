//! Snapshots as resources of their own: made of volumes, deleted and described.
//!
//! Those that images name are the images' and have no id.

mod pending;
mod take;
mod unfinished;

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Instant;

use ami_core::{AccountId, Digest, Page, SnapshotId, StateReason, Tags, Timestamp, VolumeId, may_export};
use serde::{Deserialize, Serialize};
use storage_block::Disk;

pub use self::pending::PendingSnapshot;
pub(crate) use self::pending::PendingSnapshots;
pub use self::take::CreateSnapshots;
use self::take::Wanted;
use self::unfinished::{UnfinishedSnapshotRecord, is_unfinished};

use crate::describe::{DescribeSnapshots, Filterable, tag_values};
use crate::products::ProductCodes;
use crate::record::{ImageRecord, SnapshotRecord};
use crate::region::{Inner, Region};
use crate::tasks::kind_of;
use crate::watch::{Publisher, Watch};
use crate::{Error, ErrorKind, Result};

const GIB: u64 = 1 << 30;

/// The state of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SnapshotState {
    /// It is being made, and nothing can be made of it yet.
    Pending,
    /// All of it is there.
    Completed,
    /// It could not be made. It is told of until it is deleted.
    Error,
}

impl SnapshotState {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Completed => "completed",
            Self::Error => "error",
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
    /// Its content, once it is completed; not in EC2. A [`BlockDeviceMapping`](ami_core::BlockDeviceMapping) names it so.
    pub digest: Option<Digest>,
    /// The volume that it was made of.
    pub volume_id: VolumeId,
    /// The size of that volume in GiB.
    pub volume_size_gib: u64,
    /// Its state.
    pub state: SnapshotState,
    /// How much of it is stored, in percent.
    pub progress: u8,
    /// Why it could not be made.
    pub state_reason: Option<StateReason>,
    /// What its user says of it.
    pub description: String,
    /// The key that wraps its data key, if it is encrypted, as it is if the volume was.
    pub kms_key_id: Option<String>,
    /// The products whose content it has: its bytes are not read by who does not sell them.
    pub product_codes: ProductCodes,
    /// When it was begun: what it holds is the volume's of then.
    pub start_time: Timestamp,
    /// Its tags.
    pub tags: Tags,
}

impl From<SnapshotRecord> for SnapshotDescription {
    fn from(record: SnapshotRecord) -> Self {
        Self {
            id: record.id,
            owner: record.owner,
            digest: Some(record.digest),
            volume_id: record.volume_id,
            volume_size_gib: record.size.div_ceil(GIB),
            state: SnapshotState::Completed,
            progress: 100,
            state_reason: None,
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
    /// [disk](Self::volume_disk), [`InvalidParameter`](ErrorKind::InvalidParameter) for a description of more than 255 characters, [`InsufficientVolumeCapacity`](ErrorKind::InsufficientVolumeCapacity), or
    /// what the host met.
    pub fn create_snapshot(&self, volume: VolumeId, description: &str) -> Result<SnapshotDescription> {
        let wanted = Wanted::Volume { id: volume, description: description.to_owned() };
        let made = self.inner.create_snapshots(*self.account(), &wanted)?;
        made.into_iter().next().ok_or_else(no_snapshot)
    }

    /// Begins the same, as EC2 does, and returns when the volume is taken: what is written to it from then on is not in the
    /// snapshot. That is stored in a thread of its own, is [`Pending`](SnapshotState::Pending) until then, and nothing is made of
    /// it ([`IncorrectState`](ErrorKind::IncorrectState)). It waits for another snapshot of the volume that is being stored.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot), and [`PendingSnapshotLimitExceeded`](ErrorKind::PendingSnapshotLimitExceeded)
    /// with a hundred pending. What comes in the way later [the snapshot](PendingSnapshot::wait) says.
    pub fn begin_create_snapshot(&self, volume: VolumeId, description: &str) -> Result<PendingSnapshot> {
        let wanted = Wanted::Volume { id: volume, description: description.to_owned() };
        let begun = self.inner.begin_snapshots(*self.account(), wanted)?;
        begun.into_iter().next().ok_or_else(no_snapshot)
    }

    /// Makes snapshots of the volumes of an instance, all as they are at one instant, in the order in which it has them
    /// (`CreateSnapshots`). It goes on meanwhile; what its guest holds in its page cache is not on the volumes. All of them come
    /// to be, or none.
    ///
    /// # Errors
    ///
    /// [`InstanceNotFound`](ErrorKind::InstanceNotFound), [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) for one
    /// that is pending or terminated, [`InvalidParameter`](ErrorKind::InvalidParameter) for a long description and to leave out
    /// what is no data volume of it, [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) if no volume is left,
    /// [`MalformedTagKey`](ErrorKind::MalformedTagKey), [`TagLimitExceeded`](ErrorKind::TagLimitExceeded),
    /// [`InsufficientVolumeCapacity`](ErrorKind::InsufficientVolumeCapacity), or what the host met.
    pub fn create_snapshots(&self, request: &CreateSnapshots) -> Result<Vec<SnapshotDescription>> {
        self.inner.create_snapshots(*self.account(), &Wanted::Instance(request.clone()))
    }

    /// Begins the same, as [`begin_create_snapshot`](Self::begin_create_snapshot) does. If one of them could not be made none of
    /// them is; those that are deleted meanwhile keep the others from nothing.
    ///
    /// # Errors
    ///
    /// As [`create_snapshots`](Self::create_snapshots) and [`begin_create_snapshot`](Self::begin_create_snapshot).
    pub fn begin_create_snapshots(&self, request: &CreateSnapshots) -> Result<Vec<PendingSnapshot>> {
        self.inner.begin_snapshots(*self.account(), Wanted::Instance(request.clone()))
    }

    /// What is known of a snapshot of the account's, to wait for: by blocking with a deadline or as a future.
    ///
    /// # Errors
    ///
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound), or what reading the state store met.
    pub fn watch_snapshot(&self, id: SnapshotId) -> Result<Watch<SnapshotDescription>> {
        // In this order: one that ends between the two looks is found as it is then.
        let pending = self.inner.pending_snapshots.get(id);
        let all = self.inner.snapshots_of(*self.account())?;
        let found =
            all.into_iter().find(|snapshot| snapshot.id == id).ok_or_else(|| snapshot_not_found(id))?;
        Ok(match pending {
            Some(pending) => pending.watch(),
            None => Publisher::new(found).watch(),
        })
    }

    /// Blocks until a snapshot of the account's is completed, and gives what is known of it then (`aws ec2 wait
    /// snapshot-completed`).
    ///
    /// # Errors
    ///
    /// As [`watch_snapshot`](Self::watch_snapshot); why it could not be made, and [`IncorrectState`](ErrorKind::IncorrectState)
    /// if it is pending at the deadline.
    pub fn wait_for_snapshot(&self, id: SnapshotId, deadline: Instant) -> Result<SnapshotDescription> {
        match self.watch_snapshot(id)?.wait(deadline, |now| now.state != SnapshotState::Pending) {
            Ok(now) if now.state == SnapshotState::Completed => Ok(now),
            Ok(now) => {
                let why =
                    now.state_reason.as_ref().map_or_else(String::new, |why| format!(": {}", why.message));
                let what = format!("the snapshot {id} could not be made{why}");
                Err(Error::new(kind_of(now.state_reason.as_ref()), what))
            }
            Err(_) => {
                let what = format!("the snapshot {id} is pending at the deadline");
                Err(Error::new(ErrorKind::IncorrectState, what))
            }
        }
    }

    /// The bytes of a snapshot of the account's, to read. They stay for as long as the disk, also when the snapshot is
    /// deleted.
    ///
    /// # Errors
    ///
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound), [`IncorrectState`](ErrorKind::IncorrectState) for one that is not
    /// completed, [`AuthFailure`](ErrorKind::AuthFailure) for one with a product code, or what the host met.
    pub fn snapshot_disk(&self, id: SnapshotId) -> Result<Disk> {
        let record = self.inner.snapshot(*self.account(), id)?;
        may_export(&record.product_codes, &format!("the snapshot {id}"))?;
        Ok(self.inner.content(&record.digest)?.disk())
    }

    /// Deletes a snapshot of the account's (`DeleteSnapshot`), also one that is pending, which comes to nothing then, or could
    /// not be made. Volumes that were made of it stay. Its bytes go as soon as
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
        if inner.unfinished_snapshot(owner, id)?.is_some() {
            inner.store.commit(|c| {
                c.remove::<UnfinishedSnapshotRecord>(id);
                Ok(())
            })?;
            // Whoever makes it collects what there is of it.
            if let Some(pending) = inner.pending_snapshots.get(id) {
                pending.give_up();
            }
            return Ok(());
        }
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

    /// The account's snapshots that the request asks for (`DescribeSnapshots`), also those that are pending or could not be made.
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
        let all = self.inner.snapshots_of(*self.account())?;
        request.answer(all, |snapshot| snapshot.id, Some, snapshot_not_found)
    }
}

impl Inner {
    /// The record of a snapshot of this account's, of which something can be made.
    pub(crate) fn snapshot(&self, owner: AccountId, id: SnapshotId) -> Result<SnapshotRecord> {
        // In this order: it may be completed between the two looks.
        let unfinished = self.unfinished_snapshot(owner, id)?;
        let record: Option<SnapshotRecord> = self.store.get(&id.to_string())?;
        record.filter(|record| record.owner == owner).ok_or_else(|| match &unfinished {
            Some(record) => is_unfinished(record),
            None => snapshot_not_found(id),
        })
    }

    /// The snapshots of an account, also those that are not there yet, in the order of their ids.
    pub(crate) fn snapshots_of(&self, owner: AccountId) -> Result<Vec<SnapshotDescription>> {
        // In this order: those that are completed between the two looks are found twice.
        let mut unfinished = Vec::new();
        for record in self.store.all::<UnfinishedSnapshotRecord>()? {
            unfinished.extend(self.as_it_is(record)?);
        }
        let mut completed = self.store.all::<SnapshotRecord>()?;
        unfinished.retain(|record| record.owner == owner);
        completed.retain(|record| record.owner == owner);
        let progress = |id| self.pending_snapshots.get(id).map_or(0, |pending| pending.describe().progress);
        let unfinished = unfinished.into_iter().map(|record| (record.id, progress(record.id), record));
        let mut all: BTreeMap<SnapshotId, SnapshotDescription> =
            unfinished.map(|(id, progress, record)| (id, record.describe(progress.min(99)))).collect();
        all.extend(completed.into_iter().map(|record| (record.id, record.into())));
        Ok(all.into_values().collect())
    }

    /// Makes snapshots, in one commit.
    fn create_snapshots(&self, owner: AccountId, wanted: &Wanted) -> Result<Vec<SnapshotDescription>> {
        wanted.check()?;
        self.making(|| {
            let (unfinished, instant) = self.take_wanted(owner, wanted)?;
            let stored = instant.store(&mut |_| ())?;
            let made = unfinished.into_iter().zip(&stored).map(|(record, (content, _))| record.with(content));
            let records: Vec<SnapshotRecord> = made.collect();
            self.store.commit(|c| records.iter().try_for_each(|record| c.put(record)))?;
            Ok(records.into_iter().map(Into::into).collect())
        })
    }
}

fn no_snapshot() -> Error {
    Error::new(ErrorKind::Internal, "no volume was stored")
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
            "progress" => vec![format!("{}%", self.progress)],
            "snapshot-id" => vec![self.id.to_string()],
            "start-time" => vec![self.start_time.to_string()],
            "status" => vec![self.state.as_str().to_owned()],
            "volume-id" => vec![self.volume_id.to_string()],
            "volume-size" => vec![self.volume_size_gib.to_string()],
            name => tag_values(name, self.tags.iter()).unwrap_or_default(),
        }
    }
}
