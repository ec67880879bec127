//! EC2's calls on tasks, and the threads that do what they ask for.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use ami_core::{
    AccountId, AmiBuilder, AmiId, Arch, CopyImageTaskId, CreateImageTaskId, ExportImageTaskId,
    ImportImageTaskId, Page, Timestamp,
};
use storage_block::{Disk, Progress};

use super::record::put_completed;
use super::{
    CopyImageTask, CreateImageTask, DescribeCopyImageTasks, DescribeCreateImageTasks,
    DescribeExportImageTasks, DescribeImportImageTasks, Done, ExportImageTask, ImportImage, ImportImageTask,
    Shelf, Task, TaskDescription, TaskId, TaskRecord, TaskStatus,
};
use crate::describe::{Describe, Filterable};
use crate::error::chain;
use crate::image_source::ImageSource;
use crate::region::{Inner, Region};
use crate::store::Changes;
use crate::{Error, ErrorKind, Result};

/// Tells how many bytes of how many are done, and is told whether to go on.
pub type Tell<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// What comes of putting the bytes of an image somewhere: why that failed, if it did.
pub type Exported = Result<(), Box<dyn std::error::Error + Send + Sync>>;

impl<H> Region<H> {
    /// Begins to register an image made of a disk (`ImportImage`), as [`register_image`](Self::register_image) does, in a
    /// thread of its own. The disk has to boot by itself unless there is a kernel to go with it, which may be given alone.
    ///
    /// # Errors
    ///
    /// [`ResourceLimitExceeded`](ErrorKind::ResourceLimitExceeded) with twenty under way, or what the host met. Whatever is
    /// wrong with the image [the task](ImportImageTask::wait) says.
    pub fn import_image<A: Arch>(
        &self,
        builder: AmiBuilder<A>,
        disk: Disk,
        how: impl Into<ImportImage>,
    ) -> Result<ImportImageTask> {
        let how = how.into();
        let (inner, owner) = (&self.inner, *self.account());
        let id = ImportImageTaskId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        let task = Task::making(id, owner, builder.name(), "converting");
        inner.begin(&task, &inner.tasks.imports, move |region, task| {
            let mut progress = |progress: Progress| {
                task.reach(progress.done, progress.total);
                if task.is_cancelled() {
                    progress.cancel();
                }
            };
            let mut source = ImageSource::new(&disk).encrypted(how.encrypted).progress(&mut progress);
            (source.boot, source.imds_support) = (how.boot, how.imds_support);
            let put = |c: &mut Changes, image| put_completed(task, c, &Done::new(image));
            region.making(|| region.import(owner, builder, source, put)).map(|ami| Done::new(ami.id()))
        })
    }

    /// Begins to put the bytes of a volume of an image's somewhere (`ExportImage`), in a thread of its own: the disk is
    /// that of [`image_disk`](Self::image_disk), and where it goes and in which format is `to`'s, which tells how far it is and
    /// leaves nothing when it is told not to go on.
    ///
    /// ```text
    /// let options = ExportOptions::new(Format::Vmdk); // of the crate image-formats
    /// let task = region.export_image(ami.id(), "/dev/xvda", move |disk, tell| {
    ///     image_formats::export(disk, path, &options, &mut |p| tell(p.done, p.total))?;
    ///     Ok(())
    /// })?;
    /// ```
    ///
    /// # Errors
    ///
    /// As [`image_disk`](Self::image_disk), and as [`import_image`](Self::import_image).
    pub fn export_image(
        &self,
        image: AmiId,
        device: &str,
        to: impl FnOnce(&Disk, &mut Tell<'_>) -> Exported + Send + 'static,
    ) -> Result<ExportImageTask> {
        let disk = self.image_disk(image, device)?;
        let inner = &self.inner;
        let id = ExportImageTaskId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
        let task = Task::new(id, *self.account(), Some(image), "converting");
        inner.begin(&task, &inner.tasks.exports, move |_, task| {
            let mut tell = |done, total| {
                task.reach(done, total);
                if task.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            to(&disk, &mut tell).map(|()| Done::new(image)).map_err(|e| {
                let kind = if task.is_cancelled() { ErrorKind::Cancelled } else { ErrorKind::Internal };
                Error::new(kind, format!("cannot export {image}")).with_source(e)
            })
        })
    }

    /// The account's tasks that import images, or some of them (`DescribeImportImageTasks`). Filter: `task-state`.
    ///
    /// # Errors
    ///
    /// [`TaskNotFound`](ErrorKind::TaskNotFound) for an id that is not there,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) and
    /// [`InvalidNextToken`](ErrorKind::InvalidNextToken).
    pub fn describe_import_image_tasks(
        &self,
        request: &DescribeImportImageTasks,
    ) -> Result<Page<TaskDescription<ImportImageTaskId>>> {
        describe(self.inner.tasks.imports.of(*self.account()), request)
    }

    /// The account's tasks that export images, or some of them (`DescribeExportImageTasks`). Filter: `task-state`.
    ///
    /// # Errors
    ///
    /// As [`describe_import_image_tasks`](Self::describe_import_image_tasks), but
    /// [`ExportTaskNotFound`](ErrorKind::ExportTaskNotFound).
    pub fn describe_export_image_tasks(
        &self,
        request: &DescribeExportImageTasks,
    ) -> Result<Page<TaskDescription<ExportImageTaskId>>> {
        describe(self.inner.tasks.exports.of(*self.account()), request)
    }

    /// The account's tasks that copy images, or some of them. Filter: `task-state`.
    ///
    /// # Errors
    ///
    /// As [`describe_import_image_tasks`](Self::describe_import_image_tasks).
    pub fn describe_copy_image_tasks(
        &self,
        request: &DescribeCopyImageTasks,
    ) -> Result<Page<TaskDescription<CopyImageTaskId>>> {
        describe(self.inner.tasks.copies.of(*self.account()), request)
    }

    /// The account's tasks that make images of instances, or some of them. Filter: `task-state`.
    ///
    /// # Errors
    ///
    /// As [`describe_import_image_tasks`](Self::describe_import_image_tasks).
    pub fn describe_create_image_tasks(
        &self,
        request: &DescribeCreateImageTasks,
    ) -> Result<Page<TaskDescription<CreateImageTaskId>>> {
        describe(self.inner.tasks.creations.of(*self.account()), request)
    }

    /// The account's task with this id.
    ///
    /// # Errors
    ///
    /// [`TaskNotFound`](ErrorKind::TaskNotFound).
    pub fn import_image_task(&self, id: ImportImageTaskId) -> Result<ImportImageTask> {
        self.inner.tasks.imports.one(*self.account(), id)
    }

    /// The account's task with this id.
    ///
    /// # Errors
    ///
    /// [`ExportTaskNotFound`](ErrorKind::ExportTaskNotFound).
    pub fn export_image_task(&self, id: ExportImageTaskId) -> Result<ExportImageTask> {
        self.inner.tasks.exports.one(*self.account(), id)
    }

    /// The account's task with this id.
    ///
    /// # Errors
    ///
    /// [`TaskNotFound`](ErrorKind::TaskNotFound).
    pub fn copy_image_task(&self, id: CopyImageTaskId) -> Result<CopyImageTask> {
        self.inner.tasks.copies.one(*self.account(), id)
    }

    /// The account's task with this id.
    ///
    /// # Errors
    ///
    /// [`TaskNotFound`](ErrorKind::TaskNotFound).
    pub fn create_image_task(&self, id: CreateImageTaskId) -> Result<CreateImageTask> {
        self.inner.tasks.creations.one(*self.account(), id)
    }
}

impl<Id: TaskId> Shelf<Id> {
    fn one(&self, owner: AccountId, id: Id) -> Result<Task<Id>> {
        self.of(owner).into_iter().find(|task| task.id() == id).ok_or_else(|| id.not_found())
    }
}

impl Inner {
    /// Writes a task down and has a thread do what it is to do. One that cannot begin is not there.
    pub(crate) fn begin<Id: TaskId>(
        self: &Arc<Self>,
        task: &Task<Id>,
        shelf: &Shelf<Id>,
        work: impl FnOnce(&Self, &Task<Id>) -> Result<Done> + Send + 'static,
    ) -> Result<Task<Id>> {
        let forgotten = shelf.add(task)?;
        let written = self.store.commit(|c| {
            forgotten.iter().for_each(|id| c.remove::<TaskRecord<Id>>(id));
            c.put(&TaskRecord { description: task.describe(), ended: None })
        });
        let begun = written.and_then(|()| self.spawn(task, work));
        begun.map(|()| task.clone()).inspect_err(|_| {
            shelf.lock().remove(&task.id());
            let removed = self.store.commit(|c| {
                c.remove::<TaskRecord<Id>>(task.id());
                Ok(())
            });
            if let Err(e) = removed {
                tracing::warn!(task = %task.id(), error = chain(&e), "a task that could not begin is written down");
            }
        })
    }

    fn spawn<Id: TaskId>(
        self: &Arc<Self>,
        task: &Task<Id>,
        work: impl FnOnce(&Self, &Task<Id>) -> Result<Done> + Send + 'static,
    ) -> Result<()> {
        // The region outlives its tasks: whoever closes it waits for them.
        let (region, own) = (self.clone(), task.clone());
        let run = move || {
            let done = catch_unwind(AssertUnwindSafe(|| work(&region, &own)));
            let panicked = |_| Err(Error::new(ErrorKind::Internal, "the task has panicked"));
            let done = own.told_end(done.unwrap_or_else(panicked));
            own.end(&region.write_end(&own, done));
        };
        self.spawn_task("image-task", run)
    }

    /// Has a thread do something that is waited for when the region is closed.
    pub(crate) fn spawn_task(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let spawned = thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread = spawned.map_err(|e| Error::io(e, "cannot start a thread for a task"))?;
        let mut threads = self.tasks.threads();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Writes down what a task has come to, and gives it. If it cannot be, the task is taken for one that was cut off.
    fn write_end<Id: TaskId>(&self, task: &Task<Id>, done: Result<Done>) -> Result<Done> {
        // What was written with the image is what it has come to, whatever has failed since: the image is there.
        if let Some(completed) = self.completed(task) {
            return Ok(completed);
        }
        let record = TaskRecord { description: task.describe().after(&done), ended: Some(Timestamp::now()) };
        if let Err(e) = self.store.commit(|c| c.put(&record)) {
            tracing::warn!(task = %task.id(), error = chain(&e), "cannot write down what a task has come to");
        }
        done
    }

    /// What is written of a task, if that is that it has completed.
    fn completed<Id: TaskId>(&self, task: &Task<Id>) -> Option<Done> {
        let written = self.store.get::<TaskRecord<Id>>(&task.id().to_string()).ok()??.description;
        let image = written.image_id.filter(|_| written.status == TaskStatus::Completed)?;
        Some(Done::new(image).saying(written.status_message))
    }
}

fn describe<Id: TaskId>(tasks: Vec<Task<Id>>, request: &Describe<Id>) -> Result<Page<TaskDescription<Id>>> {
    request.check::<TaskDescription<Id>>()?;
    request.answer(tasks, Task::id, |task| Some(task.describe()), Id::not_found)
}

impl<Id> Filterable for TaskDescription<Id> {
    const WHAT: &'static str = "tasks";
    const NAMES: &'static [&'static str] = &["task-state"];

    fn values(&self, name: &str) -> Vec<String> {
        match name {
            "task-state" => vec![self.status.as_str().to_owned()],
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::FakeHypervisor;

    /// The image is there: what comes after it takes that back from nobody.
    #[test]
    fn a_task_that_panics_after_its_commit_has_completed() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let (inner, image) = (&region.inner, "ami-0123456789abcdef0".parse().unwrap());
        let new =
            || ImportImageTask::making(ImportImageTaskId::random().unwrap(), *region.account(), "web", "");
        let done = move || Done::new(image).saying("as it was written");
        let begin = |task: ImportImageTask| {
            let work = move |region: &Inner, task: &ImportImageTask| {
                region.store.commit(|c| put_completed(task, c, &done()))?;
                panic!("after the commit")
            };
            inner.begin(&task, &inner.tasks.imports, work).unwrap()
        };
        let task = begin(new());
        let ended = task.wait(Instant::now() + Duration::from_secs(60)).unwrap();
        assert_eq!((ended.image_id, &*ended.status_message), (Some(image), "as it was written"));
        drop(region);
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        assert_eq!(region.import_image_task(task.id()).unwrap().describe(), ended);

        // An hour later it is told of no more, whether or not another has begun.
        let known = region.inner.tasks.imports.lock()[&task.id()].clone();
        let hour = |millis: u64| {
            let at = Timestamp::now().as_unix_millis() - 60 * 60 * 1000 + millis;
            *known.ended() = Timestamp::from_unix_millis(at).map(|at| (at, None));
            region.describe_import_image_tasks(&DescribeImportImageTasks::new()).unwrap().items.len()
        };
        assert_eq!((hour(60_000), hour(0)), (1, 0));
        assert_eq!(region.import_image_task(task.id()).unwrap_err().kind(), ErrorKind::TaskNotFound);
    }
}
