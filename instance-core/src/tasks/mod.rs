//! Tasks that import, export, copy and create images, in threads of their own.

mod calls;
mod description;
mod import;
mod record;
mod unfinished;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use ami_core::{
    AccountId, AmiId, CopyImageTaskId, CreateImageTaskId, ExportImageTaskId, ImportImageTaskId, Timestamp,
};

pub use self::calls::{Exported, Tell};
pub use self::description::{TaskDescription, TaskStatus};
pub use self::import::ImportImage;
pub(crate) use self::record::{TaskId, put_completed};
use self::record::{TaskRecord, is_long_gone};
pub use self::unfinished::UnfinishedImage;
pub(crate) use self::unfinished::{kind_of, reason_of};
use crate::describe::Describe;
use crate::error::chain;
use crate::watch::{Publisher, Watch};
use crate::{Error, ErrorKind, Result};

/// The most tasks of an account that are under way at once.
const MOST: usize = 20;

/// A task that imports, exports, copies or creates an image. Cheap to clone; all clones are the same task, which goes on without them.
///
/// A task ends with its region, which cuts it off when it is closed and waits for it, or with its process: what it had done
/// until then is removed, and it has failed. It is told of for an hour after it has ended, also when the region is opened again
/// meanwhile.
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, Region};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path().join("region"), FakeHypervisor::new())?;
/// use std::time::{Duration, Instant};
/// use instance_core::{DescribeImportImageTasks, TaskStatus};
///
/// // Any disk is imported, of whatever format: those of the crate `image-formats` are disks.
/// let disk = storage_block::MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let boot = Some(DirectBoot::new(tiny_elf(), None, "console=ttyS0"));
/// let import = region.import_image(Ami::<X86_64>::builder("web"), disk, boot)?;
/// import.watch().subscribe(|task| println!("{} {} % {}", task.id, task.progress, task.status_message));
/// let image = import.wait(Instant::now() + Duration::from_secs(60))?.image_id.ok_or("it has made one")?;
/// assert_eq!(region.describe_import_image_tasks(&DescribeImportImageTasks::new())?.items[0].progress, 100);
///
/// // And a disk is what an export is given, with somebody to tell how far it is.
/// let path = dir.path().join("web.raw");
/// let export = region.export_image(image, "/dev/xvda", move |disk, tell| {
///     let mut bytes = vec![0; disk.size() as usize];
///     disk.read_at(&mut bytes, 0)?;
///     if tell(disk.size() / 2, disk.size()).is_break() {
///         return Err("cancelled".into());
///     }
///     Ok(std::fs::write(path, bytes)?)
/// })?;
/// let ended = export.wait(Instant::now() + Duration::from_secs(60))?;
/// assert_eq!((ended.status, ended.progress), (TaskStatus::Completed, 100));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Task<Id>(Arc<State<Id>>);

/// A task that imports an image.
pub type ImportImageTask = Task<ImportImageTaskId>;
/// A task that exports an image.
pub type ExportImageTask = Task<ExportImageTaskId>;
/// A task that copies an image of another region.
pub type CopyImageTask = Task<CopyImageTaskId>;
/// A task that makes an image of an instance.
pub type CreateImageTask = Task<CreateImageTaskId>;
/// A request for tasks that import images.
pub type DescribeImportImageTasks = Describe<ImportImageTaskId>;
/// A request for tasks that export images.
pub type DescribeExportImageTasks = Describe<ExportImageTaskId>;
/// A request for tasks that copy images.
pub type DescribeCopyImageTasks = Describe<CopyImageTaskId>;
/// A request for tasks that make images of instances.
pub type DescribeCreateImageTasks = Describe<CreateImageTaskId>;

/// What a task has come to.
#[derive(Debug, Clone)]
pub(crate) struct Done {
    image: AmiId,
    message: Cow<'static, str>,
}

impl Done {
    pub(crate) fn new(image: AmiId) -> Self {
        Self { image, message: Cow::Borrowed("") }
    }

    /// With something to say of it.
    pub(crate) fn saying(self, message: impl Into<Cow<'static, str>>) -> Self {
        Self { message: message.into(), ..self }
    }
}

struct State<Id> {
    told: Publisher<TaskDescription<Id>>,
    cancelled: AtomicBool,
    /// Not by its user: by the region, which is being closed.
    cut_off: AtomicBool,
    ended: Mutex<Option<(Timestamp, Option<Failure>)>>,
}

/// Why something has failed, for everybody who waits for it.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    kind: ErrorKind,
    code: &'static str,
    text: String,
}

impl Failure {
    pub(crate) fn of(error: &Error) -> Self {
        Self { kind: error.kind(), code: error.code(), text: chain(error) }
    }

    pub(crate) fn error(&self) -> Error {
        Error::new(self.kind, self.text.clone()).with_code(self.code)
    }
}

/// How much is done, in percent, which is not all before it has ended.
pub(crate) fn percent(done: u64, total: u64) -> u8 {
    percent_of_part(done, total, 0, 1)
}

/// The same of something of several parts, of which it is at the `nth`, from 0.
fn percent_of_part(done: u64, total: u64, nth: usize, of: usize) -> u8 {
    let part = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or_default().min(100);
    let (nth, of) = (nth as u128, of as u128);
    let percent = (nth * 100 + part).checked_div(of).unwrap_or_default().min(99);
    u8::try_from(percent).unwrap_or_default()
}

impl<Id> Clone for Task<Id> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Id: fmt::Debug> fmt::Debug for Task<Id> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Task").field(&self.0.told).finish()
    }
}

impl<Id: Copy + fmt::Display + Send + Sync + 'static> Task<Id> {
    pub(crate) fn new(id: Id, owner: AccountId, image_id: Option<AmiId>, at: &str) -> Self {
        let told = TaskDescription {
            id,
            owner,
            status: TaskStatus::Active,
            status_message: at.to_owned(),
            progress: 0,
            image_id,
            image_name: None,
            state_reason: None,
            create_time: Timestamp::now(),
        };
        Self::recovered(TaskRecord { description: told, ended: None })
    }

    /// One that makes an image of this name.
    pub(crate) fn making(id: Id, owner: AccountId, name: &str, at: &str) -> Self {
        let task = Self::new(id, owner, None, at);
        let image_name = Some(name.to_owned());
        Self::recovered(TaskRecord {
            description: TaskDescription { image_name, ..task.describe() },
            ended: None,
        })
    }

    /// One that was under way in an earlier process, or has ended there: why, its message and the code of its reason say.
    fn recovered(record: TaskRecord<Id>) -> Self {
        let TaskRecord { description, ended } = record;
        let (told, ended) = (Publisher::new(description), Mutex::new(ended.map(|at| (at, None))));
        let (cancelled, cut_off) = (AtomicBool::default(), AtomicBool::default());
        Self(Arc::new(State { told, cancelled, cut_off, ended }))
    }

    /// Its id.
    pub fn id(&self) -> Id {
        self.describe().id
    }

    /// All that is known of it.
    pub fn describe(&self) -> TaskDescription<Id> {
        self.0.told.get()
    }

    /// What is known of it, to wait for: by blocking with a deadline or as a future.
    pub fn watch(&self) -> Watch<TaskDescription<Id>> {
        self.0.told.watch()
    }

    /// Ends it (`CancelImportTask`, `CancelExportTask`): it leaves nothing. Does nothing to one that is being cancelled or
    /// was.
    ///
    /// # Errors
    ///
    /// [`IncorrectState`](ErrorKind::IncorrectState) if it has completed. Whoever cancels when it is all but done may find
    /// it completed in the end.
    pub fn cancel(&self) -> Result<()> {
        if self.describe().status == TaskStatus::Completed {
            let what = format!("the task {} has completed", self.id());
            return Err(Error::new(ErrorKind::IncorrectState, what));
        }
        self.0.cancelled.store(true, Ordering::Release);
        self.0.told.update(|task| {
            let active = task.status == TaskStatus::Active;
            if active {
                task.status = TaskStatus::Deleting;
            }
            active
        });
        Ok(())
    }

    /// Blocks until it has ended, and gives what is known of it then.
    ///
    /// # Errors
    ///
    /// Why it has failed, of which [`Cancelled`](ErrorKind::Cancelled) is one. Of a task that ended before the region was opened
    /// the kind is that of its reason's code; what EC2 has one code for is [`InvalidParameter`](ErrorKind::InvalidParameter) then.
    /// [`IncorrectState`](ErrorKind::IncorrectState) if it is still under way at the deadline.
    pub fn wait(&self, deadline: Instant) -> Result<TaskDescription<Id>> {
        match self.watch().wait(deadline, |task| task.status.has_ended()) {
            Ok(task) if task.status == TaskStatus::Completed => Ok(task),
            Ok(task) => Err(match self.ended().as_ref().and_then(|(_, failure)| failure.clone()) {
                Some(failure) => failure.error(),
                None => Error::new(kind_of(task.state_reason.as_ref()), task.status_message),
            }),
            Err(task) => {
                let what = format!("{} is {} at the deadline", task.id, task.status.as_str());
                Err(Error::new(ErrorKind::IncorrectState, what))
            }
        }
    }

    fn ended(&self) -> MutexGuard<'_, Option<(Timestamp, Option<Failure>)>> {
        self.0.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it has ended so long before `now` that it is told of no more.
    fn has_long_gone(&self, now: Timestamp) -> bool {
        self.ended().as_ref().is_some_and(|(at, _)| is_long_gone(*at, now))
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Ends it because the region is being closed.
    fn cut_off(&self) {
        // What its user had given up before stays given up.
        self.0.cut_off.store(!self.is_cancelled(), Ordering::Release);
        // One that has completed needs no end.
        drop(self.cancel());
    }

    /// What it has come to, as it is told: that it was cut off is nobody's wish.
    fn told_end(&self, end: Result<Done>) -> Result<Done> {
        match end {
            Err(e) if e.kind() == ErrorKind::Cancelled && self.0.cut_off.load(Ordering::Acquire) => {
                Err(Error::new(ErrorKind::Internal, "the region was closed while the task was under way"))
            }
            end => end,
        }
    }

    /// Tells how far it is, where that is news.
    pub(crate) fn reach(&self, done: u64, total: u64) {
        self.reach_part(done, total, 0, 1);
    }

    /// The same of something of several parts, of which it is at the `nth`, from 0.
    pub(crate) fn reach_part(&self, done: u64, total: u64, nth: usize, of: usize) {
        let percent = percent_of_part(done, total, nth, of);
        self.0.told.update(|task| {
            let news = percent > task.progress;
            task.progress = task.progress.max(percent);
            news
        });
    }

    fn end(&self, with: &Result<Done>) {
        let failure = with.as_ref().err().map(Failure::of);
        // Before it is told: whoever is told finds it.
        *self.ended() = Some((Timestamp::now(), failure));
        self.0.told.update(|task| {
            *task = task.clone().after(with);
            true
        });
    }
}

/// The tasks of a region.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    imports: Shelf<ImportImageTaskId>,
    exports: Shelf<ExportImageTaskId>,
    pub(crate) copies: Shelf<CopyImageTaskId>,
    pub(crate) creations: Shelf<CreateImageTaskId>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// The tasks of a kind.
#[derive(Debug)]
pub(crate) struct Shelf<Id>(Mutex<BTreeMap<Id, Task<Id>>>);

impl<Id> Default for Shelf<Id> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<Id: TaskId> Shelf<Id> {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Id, Task<Id>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one in, and forgets those that ended long ago, which it gives.
    fn add(&self, task: &Task<Id>) -> Result<Vec<Id>> {
        let (now, owner) = (Timestamp::now(), task.describe().owner);
        let mut tasks = self.lock();
        let forgotten: Vec<Id> =
            tasks.iter().filter(|(_, task)| task.has_long_gone(now)).map(|(id, _)| *id).collect();
        tasks.retain(|id, _| !forgotten.contains(id));
        let active = |task: &&Task<Id>| {
            let told = task.describe();
            told.owner == owner && !told.status.has_ended()
        };
        if tasks.values().filter(active).count() >= MOST {
            let what =
                format!("{MOST} tasks of the account are under way; wait for one of them, or cancel one");
            return Err(Error::new(ErrorKind::ResourceLimitExceeded, what));
        }
        tasks.insert(task.id(), task.clone());
        Ok(forgotten)
    }

    /// Those of an account that are told of.
    fn of(&self, owner: AccountId) -> Vec<Task<Id>> {
        let now = Timestamp::now();
        let told_of = |task: &&Task<Id>| task.describe().owner == owner && !task.has_long_gone(now);
        self.lock().values().filter(told_of).cloned().collect()
    }

    fn cut_off_all(&self) {
        let all: Vec<Task<Id>> = self.lock().values().cloned().collect();
        all.iter().for_each(Task::cut_off);
    }
}

impl Tasks {
    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends them all, soon.
    pub(crate) fn cut_off(&self) {
        self.imports.cut_off_all();
        self.exports.cut_off_all();
        self.copies.cut_off_all();
        self.creations.cut_off_all();
    }

    /// Whether the caller's is the thread of one of them.
    pub(crate) fn is_own_thread(&self) -> bool {
        let current = std::thread::current().id();
        self.threads().iter().any(|thread| thread.thread().id() == current)
    }

    /// Waits for their ends. Not to be called in a thread of theirs.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            // What it panicked with has been told.
            let _ = thread.join();
        }
    }
}
