//! The handle by which disks are used.

use std::ops::Range;
use std::sync::Arc;

use crate::buffer::{Buffer, take_first, total};
use crate::limit::{Cost, Stop};
use crate::{
    BlockBackend, Capabilities, Error, IoBuf, IoBufMut, Limiter, Queue, QueueOptions, Result, SECTOR,
};

/// A handle to a disk. Cheap to clone; all clones are the same disk, which is closed with the last.
///
/// Every request is checked here, once: one that leaves the disk, or that would change a read-only
/// one, is an error and reaches no backend.
///
/// ```
/// use storage_block::MemoryDisk;
///
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// disk.write_at(b"hello", 4096)?;
/// let mut buf = [0; 5];
/// disk.read_at(&mut buf, 4096)?;
/// assert_eq!(&buf, b"hello");
/// disk.discard(4096, 512)?;
/// disk.write_zeroes(8192, 512)?;
/// disk.flush()?;
/// assert!(disk.read_at(&mut buf, disk.size()).is_err(), "beyond its end");
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Disk {
    pub(crate) backend: Arc<dyn BlockBackend>,
    /// What the backend is like. That does not change, and so it is asked once.
    traits: Traits,
    /// What its requests wait for, all of them.
    pub(crate) limiters: Option<Arc<[Limiter]>>,
    /// When they wait for that no longer.
    stop: Option<Arc<Stop>>,
}

/// What is asked about a backend at every request.
#[derive(Clone, Copy, Debug)]
struct Traits {
    /// How long a request may be.
    max_request: u64,
    /// Zeroing is writing so many bytes.
    writes_zeroes: bool,
    /// A discard is that, too.
    writes_discards: bool,
}

impl Traits {
    fn of(backend: &impl BlockBackend) -> Self {
        let Capabilities { max_request, cheap_zeroes, discard_frees, .. } = backend.capabilities();
        Self {
            max_request: max_request.clamp(SECTOR, 1 << 40),
            writes_zeroes: !cheap_zeroes,
            writes_discards: !cheap_zeroes && !discard_frees,
        }
    }
}

impl Disk {
    /// A handle to a backend.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) if the backend's size is not a multiple of
    /// [`SECTOR`].
    pub fn new(backend: impl BlockBackend) -> Result<Self> {
        let size = backend.size();
        if size % SECTOR != 0 {
            return Err(Error::invalid_size(size, "is not a multiple of 512 bytes"));
        }
        Ok(Self::from_backend(backend))
    }

    /// For the backends of this crate, whose constructors have checked the size.
    pub(crate) fn from_backend(backend: impl BlockBackend) -> Self {
        let traits = Traits::of(&backend);
        Self { backend: Arc::new(backend), traits, limiters: None, stop: None }
    }

    /// The size in bytes. A disk may grow while it is in use ([`Volume::grow`](crate::Volume::grow)); it never
    /// shrinks.
    pub fn size(&self) -> u64 {
        self.backend.size()
    }

    /// Whether the disk can only be read.
    pub fn read_only(&self) -> bool {
        self.backend.read_only()
    }

    /// What the disk is good at.
    pub fn capabilities(&self) -> Capabilities {
        self.backend.capabilities()
    }

    /// The same disk, whose requests wait until `limiter` lets them pass. Requests by other handles do not;
    /// whoever is to be limited gets no other. Limits add up: of several, a request waits for each.
    ///
    /// ```
    /// use storage_block::{IoLimits, Limiter, MemoryDisk, Rate};
    ///
    /// let limiter = Limiter::new(IoLimits { ops: Some(Rate::per_second(3000)), ..IoLimits::NONE });
    /// let disk = MemoryDisk::new(1 << 20)?.into_disk().limited(&limiter);
    /// disk.write_at(b"within the burst", 0)?;
    /// limiter.set(IoLimits::NONE); // at any time
    /// # Ok::<(), storage_block::Error>(())
    /// ```
    #[must_use]
    pub fn limited(&self, limiter: &Limiter) -> Self {
        let had = self.limiters.iter().flat_map(|limiters| limiters.iter());
        let limiters = had.chain([limiter]).cloned().collect();
        Self { limiters: Some(limiters), stop: self.stop.clone(), ..self.unlimited() }
    }

    /// The same disk, whose requests wait for nothing.
    pub(crate) fn unlimited(&self) -> Self {
        Self { backend: Arc::clone(&self.backend), traits: self.traits, limiters: None, stop: None }
    }

    /// The same disk, whose requests end that wait for their limits when `stop` says so.
    pub(crate) fn until(self, stop: &Arc<Stop>) -> Self {
        Self { stop: Some(Arc::clone(stop)), ..self }
    }

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](crate::ErrorKind::OutOfBounds), or what the backend met.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(Op::Read, offset, Some(buf.len() as u64))?;
        let max = self.admit(buf.len() as u64, Op::Read)?;
        match buf.len() as u64 {
            0 => Ok(()),
            len if len <= max => self.backend.read_at(buf, offset),
            _ => self.read_pieces(buf, offset, max as usize),
        }
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](crate::ErrorKind::OutOfBounds), [`ReadOnly`](crate::ErrorKind::ReadOnly), or
    /// what the backend met.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check(Op::Write, offset, Some(buf.len() as u64))?;
        let max = self.admit(buf.len() as u64, Op::Write)?;
        match buf.len() as u64 {
            0 => Ok(()),
            len if len <= max => self.backend.write_at(buf, offset),
            _ => self.write_pieces(buf, offset, max as usize),
        }
    }

    /// Fills the buffers, one after the other, with the bytes at `offset`. What lies in a file goes
    /// into them with no copy between. What the buffers themselves are afterwards is of no use.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at).
    pub fn read_vectored_at(&self, bufs: &mut [IoBufMut<'_>], offset: u64) -> Result<()> {
        let len = self.check(Op::Read, offset, total(bufs))?;
        let max = self.admit(len, Op::Read)?;
        pieces(bufs, offset, len, max, |part, at| self.backend.read_vectored_at(part, at))
    }

    /// Writes the buffers, one after the other, at `offset`. What goes to a file goes there with no copy
    /// between. What the buffers themselves are afterwards is of no use.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn write_vectored_at(&self, bufs: &mut [IoBuf<'_>], offset: u64) -> Result<()> {
        let len = self.check(Op::Write, offset, total(bufs))?;
        let max = self.admit(len, Op::Write)?;
        pieces(bufs, offset, len, max, |part, at| self.backend.write_vectored_at(part, at))
    }

    /// Returns when every write that has returned is durable.
    ///
    /// # Errors
    ///
    /// What the backend met; the writes may then be lost.
    pub fn flush(&self) -> Result<()> {
        self.admit(0, Op::Flush)?;
        self.backend.flush()
    }

    /// Says that nobody needs these bytes; they read as zeroes from now on.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Op::Discard, offset, Some(len))?;
        self.admit(len, Op::Discard)?;
        if len == 0 { Ok(()) } else { self.backend.discard(offset, len) }
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Op::WriteZeroes, offset, Some(len))?;
        self.admit(len, Op::WriteZeroes)?;
        if len == 0 { Ok(()) } else { self.backend.write_zeroes(offset, len) }
    }

    /// The next range, at or after `offset`, that may hold anything but zeroes; `None` when only
    /// zeroes follow. The range is never empty and lies within the disk.
    ///
    /// ```
    /// use storage_block::{Disk, MemoryDisk, Result, Store};
    ///
    /// /// How many bytes may hold anything but zeroes.
    /// fn data(disk: &Disk) -> Result<u64> {
    ///     let (mut at, mut found) = (0, 0);
    ///     while let Some(range) = disk.next_data(at)? {
    ///         found += range.end - range.start;
    ///         at = range.end;
    ///     }
    ///     Ok(found)
    /// }
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::open(dir.path())?;
    /// let disk = MemoryDisk::new(1 << 20)?.into_disk();
    /// disk.write_at(b"hello", 512 << 10)?;
    /// assert_eq!(data(&disk)?, disk.size(), "a disk in memory does not know its holes");
    /// let (snapshot, _) = store.import(&disk, &mut |_| ())?;
    /// assert_eq!(data(&snapshot.disk())?, 64 << 10, "one chunk of a snapshot");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// What the backend met.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.size();
        if offset >= size {
            return Ok(None);
        }
        let range = self.backend.next_data(offset)?.map(|found| found.start.max(offset)..found.end.min(size));
        Ok(range.filter(|found| found.start < found.end))
    }

    /// A queue of requests that are served while their submitter does other things: at most `depth` of
    /// them at once. See [`Queue`].
    ///
    /// # Errors
    ///
    /// What the system says when it has no more threads or descriptors.
    pub fn queue(&self, depth: u32) -> Result<Queue> {
        self.queue_with(&QueueOptions::new(depth))
    }

    /// The same, made as the options say.
    ///
    /// # Errors
    ///
    /// As [`queue`](Self::queue), or that the engine that was asked for is not to be had.
    pub fn queue_with(&self, options: &QueueOptions) -> Result<Queue> {
        Queue::new(self, options)
    }

    /// What every request has to pass: it lies within the disk and changes nothing that can only be read. `len`
    /// is `None` where it is more than a number can say.
    pub(crate) fn check(&self, op: Op, offset: u64, len: Option<u64>) -> Result<u64> {
        if op.changes() && self.read_only() {
            return Err(Error::read_only());
        }
        let (len, size) = (len.unwrap_or(u64::MAX), self.size());
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(len),
            _ => Err(Error::out_of_bounds(offset, len, size)),
        }
    }

    #[cold]
    fn read_pieces(&self, buf: &mut [u8], offset: u64, max: usize) -> Result<()> {
        let mut parts = buf.chunks_mut(max).zip((offset..).step_by(max));
        parts.try_for_each(|(part, at)| self.backend.read_at(part, at))
    }

    #[cold]
    fn write_pieces(&self, buf: &[u8], offset: u64, max: usize) -> Result<()> {
        let mut parts = buf.chunks(max).zip((offset..).step_by(max));
        parts.try_for_each(|(part, at)| self.backend.write_at(part, at))
    }

    /// Waits until the limits let a request pass, and says how long one may be for the backend.
    fn admit(&self, len: u64, op: Op) -> Result<u64> {
        if self.limiters.is_some() {
            self.pay(self.cost(op, len))?;
        }
        Ok(self.traits.max_request)
    }

    /// Waits until the limits let so much pass, for what is then done with the disk [without them](Self::unlimited).
    pub(crate) fn pay(&self, cost: Cost) -> Result<()> {
        let limiters = self.limiters.as_deref().unwrap_or_default();
        for (passed, limiter) in limiters.iter().enumerate() {
            limiter.wait(cost, self.stop.as_deref()).inspect_err(|_| {
                limiters[..passed].iter().for_each(|limiter| limiter.give_back(cost));
            })?;
        }
        Ok(())
    }

    /// What a request of `len` bytes costs. Where no bytes are written for it, it counts as an operation alone.
    pub(crate) fn cost(&self, op: Op, len: u64) -> Cost {
        let moves = match op {
            Op::Read | Op::Write => true,
            Op::WriteZeroes => self.traits.writes_zeroes,
            Op::Discard => self.traits.writes_discards,
            Op::Flush => false,
        };
        Cost { ops: 1, bytes: if moves { len } else { 0 } }
    }
}

/// Calls `act` with no more than `max` bytes at a time.
fn pieces<B: Buffer>(
    mut bufs: &mut [B],
    mut offset: u64,
    mut len: u64,
    max: u64,
    mut act: impl FnMut(&mut [B], u64) -> Result<()>,
) -> Result<()> {
    while len > max {
        take_first(&mut bufs, max as usize, |part| act(part, offset))?;
        (offset, len) = (offset + max, len - max);
    }
    if len == 0 { Ok(()) } else { act(bufs, offset) }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Op {
    fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Flush)
    }
}
