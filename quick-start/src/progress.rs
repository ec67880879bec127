//! How far a build is, and how to end it early.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::Context as _;
use crate::{Error, ErrorKind, Result};

/// How far a build is, and the way to end it.
///
/// Whoever is told of it may show it, keep it, send it to another thread, and [`cancel`](Self::cancel) from there.
///
/// ```no_run
/// use quick_start::{Build, ErrorKind, Progress};
///
/// # let stop = || false;
/// let mut show = |progress: Progress| {
///     println!("{} % {}", progress.done * 100 / progress.total, progress.what);
///     if stop() {
///         progress.cancel();
///     }
/// };
/// let recipe = quick_start::recipe("minimal")?;
/// match Build::new(recipe, "images/minimal").run_with(&mut show) {
///     Err(e) if e.kind() == ErrorKind::Cancelled => println!("nothing is left of it"),
///     built => println!("{}", built?.disk().display()),
/// }
/// # Ok::<(), quick_start::Error>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Progress {
    /// What is being done, such as `fetching the kernel`.
    pub what: String,
    /// How much is behind us: an estimate by the time that it takes.
    pub done: u64,
    /// How much there is.
    pub total: u64,
    cancel: Arc<Cancel>,
}

impl Progress {
    /// Ends the build, which fails with [`ErrorKind::Cancelled`]: programs that it has called are ended, and what was
    /// half made is removed. When all is done it is too late.
    pub fn cancel(&self) {
        self.cancel.set();
    }
}

/// A wish to end, which can be waited for.
#[derive(Debug)]
pub(crate) struct Cancel {
    wished: AtomicBool,
    event: OwnedFd,
}

impl Cancel {
    fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            wished: AtomicBool::default(),
            event: event.context(|| "cannot make an event".to_owned())?,
        })
    }

    pub(crate) fn set(&self) {
        self.wished.store(true, Ordering::Release);
        // It can only be full, which is as good.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// An error if the build is to end.
    pub(crate) fn check(&self) -> Result<()> {
        match self.wished.load(Ordering::Acquire) {
            true => Err(Error::new(ErrorKind::Cancelled, "it was cancelled")),
            false => Ok(()),
        }
    }
}

impl AsFd for Cancel {
    /// Readable once the build is to end.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Tells somebody how far a build is, and knows whether it has been cancelled.
pub(crate) struct Reporter<'c> {
    tell: &'c mut dyn FnMut(Progress),
    progress: Progress,
    /// What the whole is of.
    step: String,
    /// What `done` will be when this step is.
    end: u64,
}

impl<'c> Reporter<'c> {
    /// What a whole build is.
    const TOTAL: u64 = 100;

    pub(crate) fn new(tell: &'c mut dyn FnMut(Progress)) -> Result<Self> {
        let cancel = Arc::new(Cancel::new()?);
        let progress = Progress { what: String::new(), done: 0, total: Self::TOTAL, cancel };
        Ok(Self { tell, progress, step: String::new(), end: 0 })
    }

    /// Ends the step before and begins one at the end of which so many percent are done.
    pub(crate) fn step(&mut self, what: impl Into<String>, end: u64) -> Result<()> {
        self.progress.done = self.end.min(Self::TOTAL);
        self.end = end;
        self.step = what.into();
        self.progress.what = self.step.clone();
        (self.tell)(self.progress.clone());
        self.check()
    }

    /// Tells what a step is at. It comes nearer to its end each time, and does not reach it.
    pub(crate) fn detail(&mut self, what: &str) {
        self.progress.done += self.end.saturating_sub(self.progress.done) / 3;
        self.progress.what = format!("{}: {what}", self.step);
        (self.tell)(self.progress.clone());
    }

    pub(crate) fn cancel(&self) -> Arc<Cancel> {
        self.progress.cancel.clone()
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.progress.cancel.check()
    }

    /// Tells that all is done, which nobody can cancel any more.
    pub(crate) fn finish(mut self) {
        self.progress.done = Self::TOTAL;
        self.progress.what = "done".to_owned();
        (self.tell)(self.progress);
    }
}
