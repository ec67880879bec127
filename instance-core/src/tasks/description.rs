//! What is told of a task.

use ami_core::{AccountId, AmiId, StateReason, Timestamp};
use serde::{Deserialize, Serialize};

use super::Done;
use super::reason_of;
use crate::Result;
use crate::error::chain;

/// How a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum TaskStatus {
    /// It is under way.
    Active,
    /// It was cancelled, or cut off by the closing of its region, and has not ended yet.
    Deleting,
    /// It was cancelled, or has failed, and has left nothing.
    Deleted,
    /// It has done what it was to do.
    Completed,
}

impl TaskStatus {
    /// EC2's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
            Self::Completed => "completed",
        }
    }

    /// Whether it comes to nothing else any more.
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Deleted | Self::Completed)
    }
}

/// What is known of a task (`DescribeImportImageTasks`, `DescribeExportImageTasks`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TaskDescription<Id> {
    /// Its id.
    pub id: Id,
    /// The account that it belongs to.
    pub owner: AccountId,
    /// How it is.
    pub status: TaskStatus,
    /// What it is at, or why it has failed; of one that has made an image of an instance, how
    /// [consistent](crate::ImageConsistency) that is.
    pub status_message: String,
    /// How much of it is done, in percent.
    pub progress: u8,
    /// The image: that which is exported, or that which the task has made.
    pub image_id: Option<AmiId>,
    /// The name of the image that it makes, if it makes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_name: Option<String>,
    /// Why it has been given up or has failed, in EC2's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<StateReason>,
    /// When it was begun.
    pub create_time: Timestamp,
}

impl<Id> TaskDescription<Id> {
    /// The same of a task that has come to this end.
    pub(super) fn after(self, end: &Result<Done>) -> Self {
        match end {
            Ok(done) => Self {
                status: TaskStatus::Completed,
                status_message: done.message.clone().into_owned(),
                progress: 100,
                image_id: Some(done.image),
                ..self
            },
            Err(e) => {
                let (status_message, state_reason) = (chain(e), Some(reason_of(e)));
                Self { status: TaskStatus::Deleted, status_message, state_reason, ..self }
            }
        }
    }
}
