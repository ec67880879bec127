//! Requests that are served while their submitter does other things.
#![allow(unsafe_code, reason = "requests in flight use memory whose life their submitter promises")]

#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "it is test code, outside of a test function")]
pub(crate) mod fuzzing;
mod pool;
mod request;
mod ring;
mod signal;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use pool::Pool;
use request::{Job, Memory, Request};
use ring::Ring;
use signal::Signal;

use crate::buffer::total;
use crate::disk::Op;
use crate::{Disk, Error, Extent, IoBuf, IoBufMut, Limiter, Result};

/// What serves the requests of a [`Queue`].
///
/// ```
/// use storage_block::{Engine, MemoryDisk};
///
/// let queue = MemoryDisk::new(512)?.into_disk().queue(1)?;
/// assert_eq!(queue.engine(), Engine::Threads, "there is no file that the kernel could read");
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// The kernel's io_uring for reads of what lies in files as it is, and threads for all else.
    IoUring,
    /// Threads that make blocking calls.
    Threads,
}

/// How a [`Queue`] is made.
///
/// ```
/// use storage_block::{Engine, MemoryDisk, QueueOptions};
///
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let queue = disk.queue_with(&QueueOptions::new(32).engine(Engine::Threads).threads(2))?;
/// assert_eq!((queue.depth(), queue.engine()), (32, Engine::Threads));
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QueueOptions {
    depth: u32,
    engine: Option<Engine>,
    threads: Option<usize>,
}

/// The most requests that a queue serves at once.
const DEPTH_MAX: u32 = 4096;
/// The most threads of a queue, unless the options say otherwise: as many as keep a disk busy that is read from, and
/// beside a ring those that write to the page cache.
const THREADS: usize = 16;
const THREADS_BESIDE_RING: usize = 4;
/// A queue that waits for its disk's limits looks at them at least so often, since they may have changed.
const LIMITS_AGE: Duration = Duration::from_millis(100);

impl QueueOptions {
    /// At most `depth` requests are served at once; at least one and at most 4096. The best engine that is to be had
    /// serves them, with a few threads.
    pub fn new(depth: u32) -> Self {
        Self { depth: depth.clamp(1, DEPTH_MAX), engine: None, threads: None }
    }

    /// This engine and no other.
    #[must_use]
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = Some(engine);
        self
    }

    /// At most so many threads, at least one.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }
}

/// What became of a request.
///
/// ```
/// use storage_block::{Completion, ErrorKind, MemoryDisk};
///
/// let mut queue = MemoryDisk::from_vec(vec![7; 512])?.into_disk().queue(1)?;
/// queue.read(1, 0, vec![0; 512]);
/// let Some(Completion { token: 1, result: Ok(()), buffer: Some(bytes) }) = queue.wait() else { unreachable!() };
/// assert_eq!(bytes, [7; 512]);
/// queue.read(2, 512, bytes);
/// let refused = queue.wait().and_then(|done| done.result.err());
/// assert_eq!(refused.map(|error| error.kind()), Some(ErrorKind::OutOfBounds));
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug)]
pub struct Completion {
    /// The submitter's name for it.
    pub token: u64,
    /// How it ended.
    pub result: Result<()>,
    /// The buffer that came with it: of a read that ended well, with what was read.
    pub buffer: Option<Vec<u8>>,
}

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
/// of the queue's own, which begin when they are first needed. Many containers and older kernels do not allow io_uring; then all is done by threads. Which
/// it is was found out when the queue was made: [`engine`](Self::engine).
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
        let disk = Disk { backend: Arc::clone(&disk.backend), limiters: None };
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
            // For whatever has ended unseen.
            self.signal.event.signal();
        }
        self.signal.watch()
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

    /// Begins as many requests as may be under way.
    fn begin(&mut self) {
        self.delayed = false;
        while self.running() < self.depth && !self.backlog.is_empty() {
            if let Err(delay) = self.pass_limits() {
                self.delayed = true;
                self.signal.after(delay.min(LIMITS_AGE));
                break;
            }
            let slot = self.free.pop().unwrap_or_else(|| {
                self.slots.push(None);
                self.slots.len() - 1
            });
            self.slots[slot] = self.backlog.pop_front();
            self.start(slot);
        }
        if let Some(ring) = &mut self.ring {
            ring.submit();
            if ring.unsent() && self.signal.watched() {
                // Nothing tells when the kernel takes more; whoever polls tries again.
                self.signal.event.signal();
            }
        }
    }

    /// Lets the first of the backlog through the disk's limits, or says how long it has to wait for the next.
    fn pass_limits(&mut self) -> Result<(), Duration> {
        let (Some(limiters), Some(request)) = (&self.limiters, self.backlog.front_mut()) else {
            return Ok(());
        };
        for limiter in &limiters[request.passed..] {
            limiter.try_take(request.op.cost(request.len))?;
            request.passed += 1;
        }
        Ok(())
    }

    /// Gives what is left of a request to whoever serves it.
    fn start(&mut self, slot: usize) {
        let (Some(ring), Some(request)) = (&mut self.ring, &mut self.slots[slot]) else {
            return self.start_on_thread(slot);
        };
        // Whether a write goes where the block is already is for the backend to decide, and threads write faster.
        let extent = match request.op {
            Op::Read => self.disk.backend.extent(request.offset, request.len),
            _ => Extent::Backend { len: request.len },
        };
        match extent {
            // SAFETY: the file is open as long as the backend is, which the queue keeps until the ring is empty. The
            // memory is the request's, valid until it is reported; the request stays in its slot as it is until the
            // ring gives that back. No more slots are in use than the ring has entries.
            Extent::File { file, offset, len } if len >= request.len => unsafe {
                ring.push(slot, file, offset, &mut request.memory);
            },
            Extent::Zeroes { len } if len >= request.len => {
                request.memory.zero();
                self.finish(slot, Ok(()));
            }
            _ => self.start_on_thread(slot),
        }
    }

    fn start_on_thread(&mut self, slot: usize) {
        let Some(request) = &mut self.slots[slot] else { return };
        let memory = std::mem::replace(&mut request.memory, Memory::None);
        self.pool.push(Job { slot, op: request.op, offset: request.offset, len: request.len, memory });
    }

    /// Takes what has ended from the engines, and begins more.
    fn collect(&mut self) {
        let mut again = std::mem::take(&mut self.unfinished);
        if let Some(mut ring) = self.ring.take() {
            ring.collect(|slot, result| match self.ended(slot, result) {
                Next::Done => self.finish(slot, Ok(())),
                next => again.push((slot, matches!(next, Next::Thread))),
            });
            self.ring = Some(ring);
        }
        for (slot, on_thread) in again.drain(..) {
            if on_thread { self.start_on_thread(slot) } else { self.start(slot) }
        }
        self.unfinished = again;
        let (slots, free, ready) = (&mut self.slots, &mut self.free, &mut self.ready);
        self.pool.collect(|(slot, result)| finish(slots, free, ready, slot, result));
        self.begin();
    }

    /// What to do after the ring has done some of a read.
    fn ended(&mut self, slot: usize, result: Result<usize, i32>) -> Next {
        const AGAIN: [i32; 2] = [libc::EINTR, libc::EAGAIN];
        let Some(request) = &mut self.slots[slot] else { return Next::Done };
        match result {
            Err(code) if AGAIN.contains(&code) => Next::Again,
            Ok(done) if done as u64 >= request.len => Next::Done,
            Ok(done) if done > 0 => {
                request.memory.advance(done);
                request.offset += done as u64;
                request.len -= done as u64;
                Next::Again
            }
            // The backend does better, or knows what is wrong.
            _ => Next::Thread,
        }
    }

    fn finish(&mut self, slot: usize, result: Result<()>) {
        finish(&mut self.slots, &mut self.free, &mut self.ready, slot, result);
    }
}

/// How a request goes on that the ring is done with.
enum Next {
    Done,
    Again,
    Thread,
}

fn finish(
    slots: &mut [Option<Request>],
    free: &mut Vec<usize>,
    ready: &mut VecDeque<Completion>,
    slot: usize,
    result: Result<()>,
) {
    if let Some(request) = slots[slot].take() {
        free.push(slot);
        ready.push_back(Completion { token: request.token, result, buffer: request.owned });
    }
}
