//! How far a long operation is, and how to end it early.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, ErrorKind, Result};

/// How far an import or a snapshot has come, and the way to end it.
///
/// Whoever is told of it may show it, keep it, send it to another thread, and
/// [`cancel`](Self::cancel) from there: all that come of one operation end that operation.
///
/// ```
/// use std::sync::mpsc;
/// use storage_block::{ErrorKind, MemoryDisk, Progress, Store};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path())?;
/// let image = MemoryDisk::from_vec(vec![7; 4 << 20])?.into_disk();
/// let mut percent = Vec::new();
/// store.import(&image, &mut |p: Progress| percent.push(p.done * 100 / p.total))?;
/// assert!(percent.is_sorted() && percent.last() == Some(&100));
///
/// // Another thread gets the first, and ends the operation with it.
/// let other = MemoryDisk::from_vec(vec![8; 4 << 20])?.into_disk();
/// let (sender, receiver) = mpsc::sync_channel::<Progress>(0);
/// let ended = std::thread::scope(|scope| {
///     scope.spawn(move || receiver.recv().map(|progress| progress.cancel()));
///     store.import(&other, &mut |progress| drop(sender.send(progress)))
/// });
/// assert_eq!(ended.err().map(|error| error.kind()), Some(ErrorKind::Cancelled));
/// assert_eq!(store.snapshots()?.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes behind us.
    pub done: u64,
    /// Bytes there are: of an import all those of the disk, holes with them; of snapshots of volumes those of the
    /// 64 KiB chunks that have changed.
    pub total: u64,
    cancelled: Arc<AtomicBool>,
}

impl Progress {
    /// Ends the operation, which fails with [`ErrorKind::Cancelled`] within about a megabyte and leaves
    /// nothing behind. When it has begun to make durable what it has done it is too late.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }
}

/// Tells somebody how far an operation is, and knows whether it has been cancelled.
pub(crate) struct Reporter<'c> {
    tell: &'c mut dyn FnMut(Progress),
    progress: Progress,
}

impl<'c> Reporter<'c> {
    /// How much is done between two reports.
    pub(crate) const STEP: u64 = 1 << 20;

    /// Tells of the beginning, so that whoever wants to cancel it can.
    pub(crate) fn begin(total: u64, tell: &'c mut dyn FnMut(Progress)) -> Result<Self> {
        let mut new = Self { tell, progress: Progress { done: 0, total, cancelled: Arc::default() } };
        new.reach(0)?;
        Ok(new)
    }

    /// Tells that so much is done.
    pub(crate) fn reach(&mut self, done: u64) -> Result<()> {
        self.progress.done = done.min(self.progress.total);
        (self.tell)(self.progress.clone());
        self.check()
    }

    /// The same where many small steps are made: it tells of one in a [`STEP`](Self::STEP).
    pub(crate) fn step(&mut self, done: u64) -> Result<()> {
        if done < self.progress.done + Self::STEP { self.check() } else { self.reach(done) }
    }

    /// An error if the operation is to end.
    pub(crate) fn check(&self) -> Result<()> {
        match self.progress.cancelled.load(Ordering::Acquire) {
            true => Err(Error::new(ErrorKind::Cancelled, "it was cancelled")),
            false => Ok(()),
        }
    }

    /// Tells that everything is done, which nobody can cancel any more.
    pub(crate) fn finish(mut self) {
        self.progress.done = self.progress.total;
        (self.tell)(self.progress);
    }
}
