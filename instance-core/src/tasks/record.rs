//! What a region keeps of its tasks, and what becomes of those that ended with its process.

use std::fmt;
use std::str::FromStr;

use ami_core::{
    CopyImageTaskId, CreateImageTaskId, ExportImageTaskId, ImportImageTaskId, StateReason, Timestamp,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Done, Shelf, Task, TaskDescription, TaskStatus};
use crate::region::Inner;
use crate::store::{Changes, Record};
use crate::{Error, ErrorKind, Result};

/// How long a task that has ended is told of.
const REMEMBERED_MILLIS: u64 = 60 * 60 * 1000;

/// What tasks of a kind are found by.
pub(crate) trait TaskId:
    Copy + Ord + fmt::Display + FromStr + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// The table of their kind.
    const TABLE: &'static str;

    /// What is said of an id of none of them.
    fn not_found(self) -> Error {
        Error::new(ErrorKind::TaskNotFound, format!("the task {self} does not exist"))
    }
}

impl TaskId for ImportImageTaskId {
    const TABLE: &'static str = "import-image-tasks";
}

impl TaskId for ExportImageTaskId {
    const TABLE: &'static str = "export-image-tasks";

    fn not_found(self) -> Error {
        Error::new(ErrorKind::ExportTaskNotFound, format!("the task {self} does not exist"))
    }
}

impl TaskId for CopyImageTaskId {
    const TABLE: &'static str = "copy-image-tasks";
}

impl TaskId for CreateImageTaskId {
    const TABLE: &'static str = "create-image-tasks";
}

/// A task as it is stored: when it begins, and when it has ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct TaskRecord<Id> {
    pub(super) description: TaskDescription<Id>,
    pub(super) ended: Option<Timestamp>,
}

impl<Id: TaskId> Record for TaskRecord<Id> {
    const TABLE: &'static str = Id::TABLE;

    fn key(&self) -> String {
        self.description.id.to_string()
    }
}

/// Whether a task that ended then is told of no more.
pub(super) fn is_long_gone(ended: Timestamp, now: Timestamp) -> bool {
    now.as_unix_millis().saturating_sub(ended.as_unix_millis()) >= REMEMBERED_MILLIS
}

/// Writes down that a task has made an image, in the commit of the image itself.
pub(crate) fn put_completed<Id: TaskId>(task: &Task<Id>, changes: &mut Changes, done: &Done) -> Result<()> {
    let description = task.describe().after(&Ok(done.clone()));
    changes.put(&TaskRecord { description, ended: Some(Timestamp::now()) })
}

impl Inner {
    /// Takes in the tasks that an earlier process left. What was under way came to nothing: what it had stored no
    /// record names.
    pub(crate) fn recover_tasks(&self) -> Result<()> {
        self.recover_tasks_of(&self.tasks.imports)?;
        self.recover_tasks_of(&self.tasks.exports)?;
        self.recover_tasks_of(&self.tasks.copies)?;
        self.recover_tasks_of(&self.tasks.creations)
    }

    fn recover_tasks_of<Id: TaskId>(&self, shelf: &Shelf<Id>) -> Result<()> {
        let (now, mut tasks) = (Timestamp::now(), self.store.all::<TaskRecord<Id>>()?);
        self.store.commit(|c| {
            for record in &mut tasks {
                let TaskRecord { description, ended } = record;
                match *ended {
                    Some(ended) if is_long_gone(ended, now) => c.remove::<TaskRecord<Id>>(description.id),
                    Some(_) => {}
                    None => {
                        let was = description.status.as_str();
                        let why = format!("the process that owned the region ended while the task was {was}");
                        description.state_reason = Some(StateReason::new("Server.InternalError", &why));
                        description.status_message = why;
                        description.status = TaskStatus::Deleted;
                        *ended = Some(now);
                        c.put(record)?;
                    }
                }
            }
            Ok(())
        })?;
        tasks.retain(|record| record.ended.is_none_or(|ended| !is_long_gone(ended, now)));
        shelf.lock().extend(tasks.into_iter().map(|record| (record.description.id, Task::recovered(record))));
        Ok(())
    }
}
