//! Snapshots that are not there yet, or could not be made: what is kept of them, and what a crash has left.

use ami_core::{AccountId, SnapshotId, StateReason, Tags, Timestamp, VolumeId};
use serde::{Deserialize, Serialize};
use storage_block::Snapshot;

use super::{GIB, SnapshotDescription, SnapshotState};
use crate::products::ProductCodes;
use crate::record::{SnapshotRecord, VolumeRecord};
use crate::region::Inner;
use crate::store::{Changes, Record};
use crate::{Error, ErrorKind, Result};

/// A snapshot of a user's without content. A table of its own: where there is one in the table of snapshots, it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnfinishedSnapshotRecord {
    pub(crate) id: SnapshotId,
    pub(crate) owner: AccountId,
    pub(crate) volume_id: VolumeId,
    /// Of the volume, in bytes.
    pub(crate) size: u64,
    pub(crate) description: String,
    pub(crate) created: Timestamp,
    pub(crate) tags: Tags,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kms_key_id: Option<String>,
    #[serde(default, skip_serializing_if = "ProductCodes::is_empty")]
    pub(crate) product_codes: ProductCodes,
    /// Why it could not be made, if it is not being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) failed: Option<StateReason>,
}

impl Record for UnfinishedSnapshotRecord {
    const TABLE: &'static str = "unfinished-snapshots";

    fn key(&self) -> String {
        self.id.to_string()
    }
}

impl UnfinishedSnapshotRecord {
    /// A snapshot of a volume, as far as it is known before there is one.
    pub(super) fn of(volume: VolumeRecord, description: &str, tags: Tags) -> Result<Self> {
        Ok(Self {
            id: SnapshotId::random().map_err(|e| Error::io(e, "cannot make an id"))?,
            owner: volume.owner,
            volume_id: volume.id,
            size: volume.size,
            description: description.to_owned(),
            created: Timestamp::now(),
            tags,
            kms_key_id: volume.kms_key_id,
            product_codes: volume.product_codes,
            failed: None,
        })
    }

    /// The same with its content.
    pub(super) fn with(self, content: &Snapshot) -> SnapshotRecord {
        SnapshotRecord {
            id: self.id,
            owner: self.owner,
            digest: content.digest(),
            volume_id: self.volume_id,
            // No less than its content, of which volumes are made by default.
            size: self.size.max(content.size()),
            description: self.description,
            created: self.created,
            tags: self.tags,
            kms_key_id: content.key_id().map(str::to_owned),
            product_codes: self.product_codes,
        }
    }

    pub(super) fn describe(self, progress: u8) -> SnapshotDescription {
        SnapshotDescription {
            id: self.id,
            owner: self.owner,
            digest: None,
            volume_id: self.volume_id,
            volume_size_gib: self.size.div_ceil(GIB),
            state: if self.failed.is_some() { SnapshotState::Error } else { SnapshotState::Pending },
            progress,
            state_reason: self.failed,
            description: self.description,
            kms_key_id: self.kms_key_id,
            product_codes: self.product_codes,
            start_time: self.created,
            tags: self.tags,
        }
    }
}

impl Inner {
    /// The record of a snapshot of this account's that is not there yet, or could not be made.
    pub(crate) fn unfinished_snapshot(
        &self,
        owner: AccountId,
        id: SnapshotId,
    ) -> Result<Option<UnfinishedSnapshotRecord>> {
        let record: Option<UnfinishedSnapshotRecord> = self.store.get(&id.to_string())?;
        record.filter(|record| record.owner == owner).map_or(Ok(None), |record| self.as_it_is(record))
    }

    /// What has become of one that was not there yet, if nothing else has. Of one that nobody makes, and whose end could not be
    /// written down, nobody need wait for the end.
    pub(super) fn as_it_is(
        &self,
        record: UnfinishedSnapshotRecord,
    ) -> Result<Option<UnfinishedSnapshotRecord>> {
        // Whoever makes it is there before its record is, and goes when its end is written down: in this order, it has ended.
        if record.failed.is_some() || self.pending_snapshots.get(record.id).is_some() {
            return Ok(Some(record));
        }
        let ended: Option<UnfinishedSnapshotRecord> = self.store.get(&record.id.to_string())?;
        Ok(ended.map(|mut record| {
            record.failed.get_or_insert_with(|| {
                let what = "what has become of the snapshot could not be written down";
                StateReason::new("Server.InternalError", what)
            });
            record
        }))
    }

    /// Those that were being made when their process ended could not be.
    pub(crate) fn recover_snapshots(&self) -> Result<()> {
        let mut left = self.store.all::<UnfinishedSnapshotRecord>()?;
        left.retain(|record| record.failed.is_none());
        self.store.commit(|c: &mut Changes| {
            left.iter_mut().try_for_each(|record| {
                let what = "the process that owned the region ended while the snapshot was pending";
                record.failed = Some(StateReason::new("Server.InternalError", what));
                c.put(record)
            })
        })
    }
}

/// That a snapshot is not one that anything can be made of.
pub(super) fn is_unfinished(record: &UnfinishedSnapshotRecord) -> Error {
    let id = record.id;
    let what = match &record.failed {
        None => format!("the snapshot {id} is pending; wait until it is completed"),
        Some(why) => format!("the snapshot {id} could not be made ({why})"),
    };
    Error::new(ErrorKind::IncorrectState, what)
}
