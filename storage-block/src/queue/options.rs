//! How a queue is made, and what it reports.

use crate::Result;

/// What serves the requests of a [`Queue`](crate::Queue).
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

/// How a [`Queue`](crate::Queue) is made.
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
    pub(super) depth: u32,
    pub(super) engine: Option<Engine>,
    pub(super) threads: Option<usize>,
}

/// The most requests that a queue serves at once.
const DEPTH_MAX: u32 = 4096;
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
