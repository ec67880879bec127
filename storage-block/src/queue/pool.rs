//! Threads that do what would block.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::request::Job;
use super::signal::Event;
use crate::store::lock;
use crate::{Disk, Error, ErrorKind, Result};

/// A few threads, begun as they are needed and ended with the pool.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    most: usize,
    /// Jobs whose results have not been collected.
    running: usize,
}

#[derive(Debug)]
struct Shared {
    disk: Disk,
    event: Arc<Event>,
    jobs: Mutex<Jobs>,
    wake: Condvar,
    done: Mutex<Vec<Done>>,
    /// How many are in `done`, so that looking costs no lock.
    done_count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// Threads that wait for a job.
    idle: usize,
    stop: bool,
}

/// A slot's request has ended.
pub(super) type Done = (usize, Result<()>);

impl Pool {
    pub(super) fn new(disk: &Disk, event: &Arc<Event>, most: usize) -> Self {
        let shared = Shared {
            disk: disk.clone(),
            event: Arc::clone(event),
            jobs: Mutex::default(),
            wake: Condvar::new(),
            done: Mutex::default(),
            done_count: AtomicUsize::new(0),
        };
        Self { shared: Arc::new(shared), threads: Vec::new(), most: most.max(1), running: 0 }
    }

    /// Begins a thread, so that it is known that there can be any.
    pub(super) fn grow(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("disk-queue".to_owned()).spawn(move || shared.work());
        self.threads.push(thread.map_err(|e| Error::io(e, "cannot begin a thread for a disk's requests"))?);
        Ok(())
    }

    /// How many jobs there are whose results have not been collected.
    pub(super) fn running(&self) -> usize {
        self.running
    }

    pub(super) fn push(&mut self, job: Job) {
        self.running += 1;
        let mut jobs = lock(&self.shared.jobs);
        jobs.waiting.push_back(job);
        let short = jobs.waiting.len() > jobs.idle && self.threads.len() < self.most;
        // Who does not wait looks for more before it does; and to notify nobody is a system call, too.
        let someone_waits = jobs.idle > 0;
        drop(jobs);
        if someone_waits {
            self.shared.wake.notify_one();
        }
        // Where there are no more threads to be had, fewer do the work; where there are none at all, this one.
        if short && self.grow().is_err() && self.threads.is_empty() {
            let job = lock(&self.shared.jobs).waiting.pop_back();
            job.into_iter().for_each(|job| self.shared.run(job));
        }
    }

    /// Takes the jobs back that no thread has begun, and says of which slots they are.
    pub(super) fn take_back(&mut self) -> Vec<usize> {
        let waiting = std::mem::take(&mut lock(&self.shared.jobs).waiting);
        self.running -= waiting.len();
        waiting.into_iter().map(|job| job.slot).collect()
    }

    /// Takes what has ended.
    pub(super) fn collect(&mut self, mut each: impl FnMut(Done)) {
        if self.running == 0 || self.shared.done_count.load(Ordering::Acquire) == 0 {
            return;
        }
        let done = {
            let mut done = lock(&self.shared.done);
            self.shared.done_count.store(0, Ordering::Release);
            std::mem::take(&mut *done)
        };
        self.running -= done.len();
        done.into_iter().for_each(&mut each);
    }
}

impl Shared {
    fn work(&self) {
        let mut jobs = lock(&self.jobs);
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                drop(jobs);
                self.run(job);
                jobs = lock(&self.jobs);
            } else if jobs.stop {
                return;
            } else {
                jobs.idle += 1;
                jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                jobs.idle -= 1;
            }
        }
    }

    fn run(&self, job: Job) {
        let slot = job.slot;
        // A backend that panics fails the request; its queue would else wait for it for ever.
        let result = catch_unwind(AssertUnwindSafe(|| job.run(&self.disk)));
        let result = result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the disk's backend panicked")));
        let mut done = lock(&self.done);
        done.push((slot, result));
        let first = done.len() == 1;
        self.done_count.store(done.len(), Ordering::Release);
        drop(done);
        // Of those that follow it has been told: who takes the first forgets the signal before, and takes all.
        if first {
            self.event.signal();
        }
    }
}

impl Drop for Pool {
    /// Waits for all jobs.
    fn drop(&mut self) {
        lock(&self.shared.jobs).stop = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
