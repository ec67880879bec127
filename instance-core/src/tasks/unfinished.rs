//! Images that are being made, or could not be: what EC2 calls `pending` and `failed`.
//!
//! They have no ids, which are digests of what is not there yet. What they have from the beginning is their names, of which
//! an account has each once.

use std::fmt;
use std::time::Instant;

use ami_core::{AccountId, AmiId, Image, ImageState, StateReason, Timestamp};

use super::{Shelf, TaskDescription, TaskId, TaskStatus};
use crate::error::chain;
use crate::record::ImageRecord;
use crate::region::{Inner, Region};
use crate::{Error, ErrorKind, Result};

/// The code of the reason of what its user gave up.
const CANCELLED: &str = "Client.UserInitiatedCancel";

/// An image that a task makes, or could not make; [`Region::unfinished_images`] shows it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnfinishedImage {
    /// The name that it is to have.
    pub name: String,
    /// The account that it is to belong to.
    pub owner: AccountId,
    /// The id of the task that makes it.
    pub task_id: String,
    /// [`Pending`](ImageState::Pending) or [`Failed`](ImageState::Failed).
    pub state: ImageState,
    /// Why it has failed.
    pub state_reason: Option<StateReason>,
    /// How much of it is done, in percent.
    pub progress: u8,
    /// When it was begun.
    pub create_time: Timestamp,
}

impl<H> Region<H> {
    /// The account's images that tasks are making, which are [`Pending`](ImageState::Pending), and those that could not be
    /// made within the last hour, which have [`Failed`](ImageState::Failed), in the order in which they were begun. Those that
    /// were made are [`images`](Self::images); those that were cancelled are nowhere.
    ///
    /// [`describe_images`](Self::describe_images) does not know of them, unlike EC2's: it is asked for ids, and answers with
    /// manifests and digests, of which they have none yet. Who makes an image without a task has it when the call returns.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// use std::time::{Duration, Instant};
    /// use ami_core::ImageState;
    ///
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// let boot = Some(DirectBoot::new(tiny_elf(), None, ""));
    /// region.import_image(Ami::<X86_64>::builder("web"), disk.clone(), boot)?;
    /// region.import_image(Ami::<X86_64>::builder("broken"), disk, None)?; // no kernel anywhere
    ///
    /// let deadline = Instant::now() + Duration::from_secs(60);
    /// let web = region.wait_for_image_named("web", deadline)?; // aws ec2 wait image-available
    /// assert_eq!((web.state(), web.ami().name()), (ImageState::Available, "web"));
    /// let refused = region.wait_for_image_named("broken", deadline).unwrap_err();
    /// let [failed] = &region.unfinished_images()[..] else { return Err("web is finished".into()) };
    /// assert_eq!((failed.name.as_str(), failed.state), ("broken", ImageState::Failed));
    /// let why = failed.state_reason.clone().ok_or("it says why")?;
    /// assert_eq!(why.message, refused.to_string());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unfinished_images(&self) -> Vec<UnfinishedImage> {
        let (tasks, account) = (&self.inner.tasks, *self.account());
        let mut all = Vec::new();
        all.extend(tasks.imports.unfinished(account));
        all.extend(tasks.copies.unfinished(account));
        all.extend(tasks.creations.unfinished(account));
        all.sort_by(|a, b| (a.create_time, &a.task_id).cmp(&(b.create_time, &b.task_id)));
        all
    }

    /// Blocks until the account's image of this name is available, and gives it: one that is there, or that a task is making.
    ///
    /// # Errors
    ///
    /// Why it could not be made, where a task tried to last, and none is still trying; [`ImageNotFound`](ErrorKind::ImageNotFound)
    /// if there is none of that name and no task makes one; [`IncorrectState`](ErrorKind::IncorrectState) if it is not available
    /// at the deadline, or cannot become it any more.
    pub fn wait_for_image_named(&self, name: &str, deadline: Instant) -> Result<Image> {
        let id = match self.inner.image_named(self.account(), name)? {
            Some(id) => id,
            None => self.wait_for_task_of(name, deadline)?,
        };
        self.wait_for_image(id, ImageState::Available, deadline)?;
        self.image(id)
    }

    /// Waits for the task that is making an image of this name, or else the one that tried last.
    fn wait_for_task_of(&self, name: &str, deadline: Instant) -> Result<AmiId> {
        let (tasks, account) = (&self.inner.tasks, *self.account());
        let making = [
            tasks.imports.making(account, name),
            tasks.copies.making(account, name),
            tasks.creations.making(account, name),
        ];
        let last = making.into_iter().flatten().max_by_key(|(chance, _)| *chance);
        let missing = || {
            let what = format!("the account has no image {name:?}, and no task makes one");
            Error::new(ErrorKind::ImageNotFound, what)
        };
        let (_, wait) = last.ok_or_else(missing)?;
        wait(deadline)
    }
}

impl Inner {
    fn image_named(&self, owner: &AccountId, name: &str) -> Result<Option<AmiId>> {
        let images = self.store.all::<ImageRecord>()?;
        let mut named = images.iter().map(|record| &record.image).filter(|image| {
            let ami = image.ami();
            (ami.owner(), ami.name(), ami.region()) == (owner, name, &self.region.name)
                && image.state() != ImageState::Deregistered
        });
        Ok(named.next().map(Image::id))
    }
}

/// Waits for a task, and gives what it has made.
type Wait = Box<dyn FnOnce(Instant) -> Result<AmiId>>;

impl<Id: TaskId> Shelf<Id> {
    fn unfinished(&self, owner: AccountId) -> Vec<UnfinishedImage> {
        self.of(owner).iter().filter_map(|task| task.describe().unfinished()).collect()
    }

    /// The task that makes an image of this name, or tried to last.
    fn making(&self, owner: AccountId, name: &str) -> Option<(Chance, Wait)> {
        let makes = |told: &TaskDescription<Id>| told.image_name.as_deref() == Some(name);
        // Looked at once: a task may end meanwhile.
        let tasks = self.of(owner).into_iter().map(|task| (task.describe(), task));
        let tasks = tasks.filter(|(told, _)| makes(told)).map(|(told, task)| (told.chance(), task));
        let (chance, task) = tasks.max_by_key(|(chance, _)| *chance)?;
        let wait = move |deadline: Instant| {
            let made = task.wait(deadline)?.image_id;
            made.ok_or_else(|| Error::new(ErrorKind::Internal, "a task has made no image"))
        };
        Some((chance, Box::new(wait)))
    }
}

/// Which of several tasks an image is to be expected of: one that has not ended, and of such the one that began last. A later
/// one may have failed because an earlier one has taken what both need.
type Chance = (bool, Timestamp);

impl<Id: fmt::Display> TaskDescription<Id> {
    fn chance(&self) -> Chance {
        (!self.status.has_ended(), self.create_time)
    }

    /// The image that it is to make, while that is not there.
    fn unfinished(self) -> Option<UnfinishedImage> {
        let name = self.image_name?;
        let cancelled = self.state_reason.as_ref().is_some_and(|reason| reason.code == CANCELLED);
        let state = match self.status {
            TaskStatus::Active | TaskStatus::Deleting => ImageState::Pending,
            TaskStatus::Deleted if !cancelled => ImageState::Failed,
            TaskStatus::Deleted | TaskStatus::Completed => return None,
        };
        Some(UnfinishedImage {
            name,
            owner: self.owner,
            task_id: self.id.to_string(),
            state,
            state_reason: self.state_reason,
            progress: self.progress,
            create_time: self.create_time,
        })
    }
}

/// Why something has failed, in EC2's words: they say whose fault it was.
pub(crate) fn reason_of(why: &Error) -> StateReason {
    let code = match (why.kind(), why.code()) {
        (ErrorKind::Cancelled, _) => CANCELLED.to_owned(),
        (ErrorKind::InsufficientCapacity | ErrorKind::InsufficientVolumeCapacity, _)
        | (_, "InternalError") => format!("Server.{}", why.code()),
        (_, code) => format!("Client.{code}"),
    };
    StateReason::new(code, chain(why))
}

/// The kind of what has failed for a reason, by its code, which is all that is kept of it.
pub(crate) fn kind_of(reason: Option<&StateReason>) -> ErrorKind {
    let code = reason.map_or("", |reason| reason.code.as_str());
    let code = code.strip_prefix("Client.").or(code.strip_prefix("Server.")).unwrap_or(code);
    match CANCELLED.strip_prefix("Client.") == Some(code) {
        true => ErrorKind::Cancelled,
        false => ErrorKind::of_task(code),
    }
}
