//! Requests that are served while their submitter does other things.
#![allow(unsafe_code, reason = "requests in flight use memory whose life their submitter promises")]

#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "it is test code, outside of a test function")]
pub(crate) mod fuzzing;
mod options;
mod pool;
mod request;
mod ring;
mod serve;
mod signal;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use options::{Completion, Engine, QueueOptions};
use pool::Pool;
use request::{Memory, Request};
use ring::Ring;
use signal::Signal;

use crate::buffer::total;
use crate::disk::Op;
use crate::{Disk, Error, ErrorKind, IoBuf, IoBufMut, Limiter, Result};

/// The most threads of a queue, unless the options say otherwise: as many as keep a disk busy that is read from, and
/// beside a ring those that write to the page cache.
const THREADS: usize = 16;
const THREADS_BESIDE_RING: usize = 4;

/// A line of requests to a disk, made by [`Disk::queue`]. One thread has it; a disk can have many.
///
/// A request is pushed with a token, and that token comes back once in a [`Completion`]. Pushing never fails and
/// never blocks: a request that the disk would refuse is reported as failed, and what goes beyond the queue's
/// depth or the disk's limits waits its turn. [`submit`](Self::submit) begins what was pushed, all at once, so
/// that a batch costs one system call; [`completed`](Self::completed) and [`wait`](Self::wait) report what has
/// ended, in any order. To wait for several things there is a descriptor, [`fd`](Self::fd).
///
/// # Order
///
/// Requests under way at once are served in any order, as if from as many threads. A flush covers every write whose
/// completion was reported before the flush was pushed.
///
/// # Ending
///
/// Dropping the queue waits for requests that have begun, forgets those that have not, and leaves no thread
/// and no descriptor behind.
///
/// # Engines
///
/// With [`Engine::IoUring`] the kernel serves reads of what lies in one file, and all else is done by a few threads
/// of the queue's own, which begin when they are first needed. Many containers and older kernels do not allow io_uring;
/// then all is done by threads. Which it is was found out when the queue was made: [`engine`](Self::engine).
///
/// ```
/// use storage_block::MemoryDisk;
///
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let mut queue = disk.queue(32)?;
/// for block in 0..100 {
///     queue.write(block, block * 4096, vec![block as u8; 4096]);
/// }
/// queue.submit();
/// while let Some(done) = queue.wait() {
///     done.result?;
///     assert_eq!(done.buffer.map(|buffer| buffer[0]), Some(done.token as u8));
/// }
/// queue.flush(100);
/// queue.submit();
/// assert_eq!(queue.wait().map(|done| done.token), Some(100));
/// assert_eq!(queue.in_flight(), 0);
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug)]
pub struct Queue {
    // The engines come first, so that they have ended before memory or the disk goes.
    ring: Option<Ring>,
    pool: Pool,
    depth: usize,
    signal: Signal,
    /// Requests that have begun, by the number that engines know them by.
    slots: Vec<Option<Request>>,
    free: Vec<usize>,
    /// Requests that have not begun.
    backlog: VecDeque<Request>,
    ready: VecDeque<Completion>,
    /// Slots that the ring has not done with, and whether a thread is to go on; kept for its memory.
    unfinished: Vec<(usize, bool)>,
    /// The disk's limits keep the first of the backlog waiting.
    delayed: bool,
    /// Without its limits.
    disk: Disk,
    limiters: Option<Arc<[Limiter]>>,
}

impl Queue {
    pub(crate) fn new(disk: &Disk, options: &QueueOptions) -> Result<Self> {
        let limiters = disk.limiters.clone();
        let disk = disk.unlimited();
        let signal = Signal::new(limiters.is_some())?;
        let ring = match options.engine {
            Some(Engine::Threads) => None,
            None if !disk.capabilities().in_files => None,
            wanted => match Ring::new(options.depth, &signal.event) {
                Ok(ring) => Some(ring),
                Err(e) if wanted.is_some() => return Err(Error::io(e, "io_uring is not to be had")),
                Err(error) => {
                    tracing::debug!(%error, "no io_uring, a disk's requests are served by threads");
                    None
                }
            },
        };
        let threads = if ring.is_some() { THREADS_BESIDE_RING } else { THREADS };
        let threads = options.threads.unwrap_or(threads).min(options.depth as usize);
        let mut pool = Pool::new(&disk, &signal.event, threads);
        if ring.is_none() {
            pool.grow()?;
        }
        let depth = options.depth as usize;
        Ok(Self {
            ring,
            pool,
            depth,
            signal,
            slots: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            ready: VecDeque::new(),
            unfinished: Vec::new(),
            delayed: false,
            disk,
            limiters,
        })
    }

    /// What serves the requests.
    pub fn engine(&self) -> Engine {
        if self.ring.is_some() { Engine::IoUring } else { Engine::Threads }
    }

    /// How many requests are served at once.
    pub fn depth(&self) -> u32 {
        self.depth as u32
    }

    /// How many requests have been pushed and not reported.
    pub fn in_flight(&self) -> usize {
        self.running() + self.backlog.len() + self.ready.len()
    }

    /// Pushes a read that fills `buffer`, which comes back with the completion.
    pub fn read(&mut self, token: u64, offset: u64, mut buffer: Vec<u8>) {
        // SAFETY: the buffer is kept with the request, and nobody touches it until that has ended.
        let memory = unsafe { Memory::target(&mut [IoBufMut::new(&mut buffer)]) };
        self.push(token, Op::Read, offset, Some(buffer.len() as u64), memory, Some(buffer));
    }

    /// Pushes a write of `buffer`, which comes back with the completion.
    pub fn write(&mut self, token: u64, offset: u64, buffer: Vec<u8>) {
        // SAFETY: the buffer is kept with the request, and nobody touches it until that has ended.
        let memory = unsafe { Memory::source(&[IoBuf::new(&buffer)]) };
        self.push(token, Op::Write, offset, Some(buffer.len() as u64), memory, Some(buffer));
    }

    /// Pushes a read into memory that the submitter keeps.
    ///
    /// # Safety
    ///
    /// The memory of the buffers stays valid, as [`IoBufMut::from_raw`] says, and is not used through any
    /// reference until the completion was reported or the queue was dropped; the lifetime in the buffers'
    /// type does not see to that. The memory may be used from any thread.
    pub unsafe fn read_raw(&mut self, token: u64, offset: u64, bufs: &mut [IoBufMut<'_>]) {
        // SAFETY: the caller promises it.
        let memory = unsafe { Memory::target(bufs) };
        self.push(token, Op::Read, offset, total(bufs), memory, None);
    }

    /// Pushes a write of memory that the submitter keeps.
    ///
    /// # Safety
    ///
    /// The memory of the buffers stays valid, as [`IoBuf::from_raw`] says, until the completion was reported
    /// or the queue was dropped; the lifetime in the buffers' type does not see to that. The memory may be used
    /// from any thread.
    pub unsafe fn write_raw(&mut self, token: u64, offset: u64, bufs: &[IoBuf<'_>]) {
        // SAFETY: the caller promises it.
        let memory = unsafe { Memory::source(bufs) };
        self.push(token, Op::Write, offset, total(bufs), memory, None);
    }

    /// Pushes a flush.
    pub fn flush(&mut self, token: u64) {
        self.enqueue(Request {
            token,
            op: Op::Flush,
            offset: 0,
            len: 0,
            memory: Memory::None,
            owned: None,
            passed: 0,
        });
    }

    /// Pushes a discard; see [`Disk::discard`].
    pub fn discard(&mut self, token: u64, offset: u64, len: u64) {
        self.push(token, Op::Discard, offset, Some(len), Memory::None, None);
    }

    /// Pushes the zeroing of a range; see [`Disk::write_zeroes`].
    pub fn write_zeroes(&mut self, token: u64, offset: u64, len: u64) {
        self.push(token, Op::WriteZeroes, offset, Some(len), Memory::None, None);
    }

    /// Begins what was pushed, as far as depth and limits let it.
    pub fn submit(&mut self) {
        self.begin();
        if self.signal.watched() && !self.ready.is_empty() {
            self.signal.event.signal();
        }
    }

    /// Lets no more of what was pushed begin: requests that have not are reported as
    /// [`Cancelled`](ErrorKind::Cancelled), in the order in which they were pushed. Those under way go on. What one has
    /// taken of one limit while it waits for another is given back.
    ///
    /// ```
    /// use storage_block::{ErrorKind, IoLimits, Limiter, MemoryDisk, Rate};
    ///
    /// let limiter = Limiter::new(IoLimits { ops: Some(Rate::per_second(1)), ..IoLimits::NONE });
    /// let mut queue = MemoryDisk::new(1 << 20)?.into_disk().limited(&limiter).queue(8)?;
    /// (0..60).for_each(|token| queue.flush(token)); // a minute's worth
    /// queue.submit();
    /// queue.cancel();
    /// let ended = std::iter::from_fn(|| queue.wait());
    /// let cancelled = ended.filter_map(|done| done.result.err()).map(|error| error.kind());
    /// assert!(cancelled.filter(|kind| *kind == ErrorKind::Cancelled).count() > 50);
    /// # Ok::<(), storage_block::Error>(())
    /// ```
    pub fn cancel(&mut self) {
        self.delayed = false;
        self.give_back();
        let cancelled = self.backlog.drain(..).map(|Request { token, owned: buffer, .. }| Completion {
            token,
            result: Err(cancelled()),
            buffer,
        });
        self.ready.extend(cancelled);
        if self.signal.watched() && !self.ready.is_empty() {
            self.signal.event.signal();
        }
    }

    /// Gives up all that can be: as [`cancel`](Self::cancel), and requests that wait for a thread are reported as cancelled
    /// too, before those that were pushed after them, while others that were pushed between them go on.
    ///
    /// ```
    /// use storage_block::MemoryDisk;
    ///
    /// let mut queue = MemoryDisk::new(1 << 20)?.into_disk().queue(8)?;
    /// (0..8).for_each(|token| queue.flush(token));
    /// queue.submit();
    /// queue.abandon();
    /// assert_eq!(std::iter::from_fn(|| queue.wait()).count(), 8); // done or cancelled, each is reported
    /// # Ok::<(), storage_block::Error>(())
    /// ```
    pub fn abandon(&mut self) {
        for slot in self.pool.take_back() {
            self.finish(slot, Err(cancelled()));
        }
        self.cancel();
    }

    /// Reports a request that has ended, if one has, and begins others that have waited for that. It does
    /// not block.
    pub fn completed(&mut self) -> Option<Completion> {
        if self.ready.is_empty() {
            if self.signal.watched() {
                self.signal.reset();
            }
            self.collect();
        }
        self.ready.pop_front()
    }

    /// Waits until a request has ended, and reports it. Returns `None` when none is left to wait for. What was
    /// pushed and not submitted is submitted.
    pub fn wait(&mut self) -> Option<Completion> {
        loop {
            if let Some(done) = self.completed() {
                return Some(done);
            }
            if self.in_flight() == 0 {
                return None;
            }
            let ring_alone = self.pool.running() == 0 && !self.delayed;
            match &mut self.ring {
                Some(ring) if ring_alone && ring.running() > 0 => ring.wait(),
                _ => self.sleep(),
            }
        }
    }

    /// A descriptor that can be polled: it is readable when something may have ended, or can go on. Whoever polls it
    /// then calls [`completed`](Self::completed) until that returns `None`, which makes it unreadable again. Nothing
    /// else may be done with it, and it is the same one each time.
    ///
    /// ```
    /// use rustix::event::{PollFd, PollFlags, poll};
    /// use storage_block::MemoryDisk;
    ///
    /// let mut queue = MemoryDisk::new(1 << 20)?.into_disk().queue(8)?;
    /// queue.read(1, 0, vec![0; 512]);
    /// queue.submit();
    /// let mut done = None;
    /// while done.is_none() {
    ///     poll(&mut [PollFd::from_borrowed_fd(queue.fd(), PollFlags::IN)], None)?;
    ///     done = queue.completed();
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn fd(&mut self) -> BorrowedFd<'_> {
        if !self.signal.watched() {
            if let Some(ring) = &mut self.ring {
                ring.signals(true);
            }
            self.signal.reset();
            self.signal.set_watched(true);
            // Whatever has ended unseen.
            self.collect();
            if !self.ready.is_empty() {
                self.signal.event.signal();
            }
        }
        self.signal.fd()
    }

    /// Says that nobody waits for the [descriptor](Self::fd) until it is asked for again. While there is always
    /// something else to do, that spares telling of each request that it has ended.
    ///
    /// ```
    /// use storage_block::MemoryDisk;
    ///
    /// let mut queue = MemoryDisk::new(1 << 20)?.into_disk().queue(8)?;
    /// let descriptor = queue.fd().try_clone_to_owned()?;
    /// queue.unwatch(); // and `fd` again before `descriptor` is waited for
    /// # drop(descriptor);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unwatch(&mut self) {
        if self.signal.watched() {
            self.signal.set_watched(false);
            if let Some(ring) = &mut self.ring {
                ring.signals(false);
            }
        }
    }

    fn running(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Blocks until something is signalled, unless something has ended already.
    fn sleep(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.signals(true);
        }
        self.signal.reset();
        self.collect();
        if self.ready.is_empty() && self.in_flight() > 0 {
            self.signal.wait();
        }
        if let Some(ring) = self.ring.as_mut().filter(|_| !self.signal.watched()) {
            ring.signals(false);
        }
    }

    fn push(
        &mut self,
        token: u64,
        op: Op,
        offset: u64,
        len: Option<u64>,
        memory: Memory,
        owned: Option<Vec<u8>>,
    ) {
        match self.disk.check(op, offset, len) {
            Ok(0) => self.ready.push_back(Completion { token, result: Ok(()), buffer: owned }),
            Ok(len) => self.enqueue(Request { token, op, offset, len, memory, owned, passed: 0 }),
            Err(error) => self.ready.push_back(Completion { token, result: Err(error), buffer: owned }),
        }
    }

    fn enqueue(&mut self, request: Request) {
        self.backlog.push_back(request);
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "it was cancelled before it began")
}

impl Drop for Queue {
    /// What has begun is waited for, by the engines; what has not is not made.
    fn drop(&mut self) {
        self.give_back();
    }
}
