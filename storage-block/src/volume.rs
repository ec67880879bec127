//! Volumes: disks that begin as a snapshot and are their own from then on.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use ami_core::Digest;

use crate::format::{BLOCK, CHUNK, MAX_SIZE, Run, State};
use crate::freeze::Freeze;
use crate::fs::{self, File};
use crate::import::Builder;
use crate::log::{AppendError, Log};
use crate::map::StateMap;
use crate::store::{Locked, lock, parent, read, sync_dir, write};
use crate::{BlockBackend, Disk, Error, ErrorKind, Result, Snapshot, SnapshotStats, Store};

/// A disk that can be written, and that begins as a snapshot or as zeroes.
///
/// A volume is a directory with two files: the overlay holds the blocks of 4 KiB that the volume has
/// written, each at its own offset, and the log says which those are. Nothing of the snapshot is copied, so that
/// making a volume takes the same time however large it is. A read goes to the overlay or to the
/// snapshot's packs, and never further.
///
/// # Durability
///
/// A flush makes the overlay durable and then, if blocks were written for the first time, the log: one
/// synchronisation or two, none if nothing was written since the last. After a crash the volume is what
/// it was at the last flush, and of each block written since either that or something newer. When a
/// synchronisation fails the kernel forgets what it could not write, so this and every later
/// flush is an error until the volume is opened again.
///
/// Cheap to clone; all clones are the same volume.
///
/// ```
/// use storage_block::{MemoryDisk, Store, Volume};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path().join("store"))?;
/// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let (snapshot, _) = store.import(&image, &mut |_| ())?;
///
/// let volume = Volume::create(&dir.path().join("vol"), Some(&snapshot), 8 << 20)?;
/// volume.disk().write_at(&[9; 512], 0)?;
/// volume.disk().flush()?;
/// let (next, stats) = volume.snapshot(&store)?;
/// assert_eq!((next.size(), stats.changed_bytes), (volume.size(), 4096));
///
/// let dir = volume.dir().to_owned();
/// drop(volume);
/// let volume = Volume::open(&dir, &store)?;
/// assert_eq!(volume.base(), Some(snapshot.digest()));
/// volume.delete()?;
/// Volume::remove(&dir)?; // of one that is not open; here nothing is left
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Volume(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    size: u64,
    base: Option<Snapshot>,
    /// Holds the lock on the volume too.
    overlay: Locked,
    map: StateMap,
    /// Held for reading by writes of whole blocks and of blocks that are in the overlay already; for
    /// writing by whatever takes a block out of the overlay, or carries bytes from a block's old place into
    /// its new one, or wants nobody to write.
    gate: RwLock<()>,
    /// One snapshot at a time.
    snapshot: Mutex<()>,
    freeze: Freeze,
    /// What the log does not say yet, in the order in which it happened.
    pending: Mutex<Vec<Run>>,
    log: Mutex<Log>,
    /// Something was written since the last flush began.
    dirty: AtomicBool,
    /// A synchronisation has failed.
    failed: AtomicBool,
}

const OVERLAY: &str = "overlay";
const LOG: &str = "log";

impl Volume {
    /// Makes a volume of `size` bytes in `dir`, which is made too; its parent exists.
    ///
    /// It is durable on return. That takes three synchronisations, of the log, of `dir` and of its parent; on
    /// a journalling file system the first does the work of all three. The overlay is left out: what is lost of it
    /// in a crash is its length, which opening restores.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](ErrorKind::InvalidSize) unless `size` is a multiple of 4096, no less than the
    /// snapshot's and at most 64 TiB; [`AlreadyExists`](ErrorKind::AlreadyExists);
    /// [`NoSpace`](ErrorKind::NoSpace). After a failure nothing is left.
    pub fn create(dir: &Path, base: Option<&Snapshot>, size: u64) -> Result<Self> {
        let volume = Self::create_unsynced(dir, base, size)?;
        match volume.sync_created() {
            Ok(()) => Ok(volume),
            Err(error) => {
                // What cannot be removed either is found by whoever looks for it.
                let _ = volume.delete();
                Err(error)
            }
        }
    }

    /// The same without waiting for the disk: nothing of the volume is durable, flushed or not, until
    /// [`sync_created`](Self::sync_created) has returned. For those who have something else to do meanwhile.
    ///
    /// ```
    /// use storage_block::Volume;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let volume = Volume::create_unsynced(&dir.path().join("vol"), None, 1 << 30)?;
    /// volume.disk().write_at(b"at work", 0)?;
    /// volume.sync_created()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create).
    pub fn create_unsynced(dir: &Path, base: Option<&Snapshot>, size: u64) -> Result<Self> {
        if size % BLOCK != 0 || size > MAX_SIZE {
            return Err(Error::invalid_size(size, "is not a multiple of 4096 bytes up to 64 TiB"));
        }
        if base.is_some_and(|base| base.size() > size) {
            return Err(Error::invalid_size(size, "is less than that of the snapshot"));
        }
        let new = match fs::create_dir(dir) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => false,
            Err(e) => return Err(Error::io(e, format!("cannot create {}", dir.display()))),
        };
        let path = dir.join(OVERLAY);
        if let Err(e) = File::create_new(&path) {
            return Err(Error::io(e, format!("cannot create {}", path.display())));
        }
        let created = Self::create_files(dir, base, size);
        if created.is_err() {
            let _ = fs::remove_file(&dir.join(LOG));
            let _ = fs::remove_file(&path);
            if new {
                let _ = fs::remove_dir(dir);
            }
        }
        created
    }

    fn create_files(dir: &Path, base: Option<&Snapshot>, size: u64) -> Result<Self> {
        let overlay = Locked::open(&dir.join(OVERLAY), false)?;
        overlay.set_len(size).map_err(|e| {
            Error::io(e, format!("cannot make {} {size} bytes long", dir.join(OVERLAY).display()))
        })?;
        let log = Log::create(&dir.join(LOG), size, base.map(Snapshot::digest))?;
        Ok(Self::new(dir, base.cloned(), overlay, StateMap::new(size / BLOCK), log))
    }

    /// Makes a new volume durable, with what has been flushed since.
    ///
    /// # Errors
    ///
    /// What the file system says. The volume may then be there after a crash, or not.
    pub fn sync_created(&self) -> Result<()> {
        lock(&self.0.log).sync_created()?;
        sync_dir(&self.0.dir)?;
        sync_dir(parent(&self.0.dir))
    }

    /// Opens the volume in `dir`, whose snapshot is in `store`.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound) if there is none, or its snapshot is gone;
    /// [`InUse`](ErrorKind::InUse); [`Corrupt`](ErrorKind::Corrupt).
    pub fn open(dir: &Path, store: &Store) -> Result<Self> {
        let path = dir.join(OVERLAY);
        let overlay = Locked::open(&path, false)?;
        let (log, map) = Log::open(&dir.join(LOG))?;
        let header = log.header();
        let base = header.base.map(|base| store.snapshot(&base)).transpose()?;
        if base.as_ref().is_some_and(|base| base.size() > header.size) {
            return Err(Error::corrupt(&dir.join(LOG), "the volume is smaller than its snapshot"));
        }
        let failed = |e| Error::io(e, format!("cannot open {}", path.display()));
        let len = overlay.metadata().map_err(failed)?.len();
        if len < map.overlay_end() * BLOCK {
            return Err(Error::corrupt(&path, format_args!("it has been cut to {len} bytes")));
        }
        if len != header.size {
            overlay.set_len(header.size).map_err(failed)?;
        }
        let volume = Self::new(dir, base, overlay, map, log);
        // Who had it before may have died with writes that no flush has covered, and they are read now.
        volume.0.dirty.store(true, Ordering::Release);
        Ok(volume)
    }

    fn new(dir: &Path, base: Option<Snapshot>, overlay: Locked, map: StateMap, log: Log) -> Self {
        Self(Arc::new(Inner {
            dir: dir.to_owned(),
            size: log.header().size,
            base,
            overlay,
            map,
            gate: RwLock::default(),
            snapshot: Mutex::default(),
            freeze: Freeze::default(),
            pending: Mutex::default(),
            log: Mutex::new(log),
            dirty: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        }))
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The snapshot that the volume began as. The store must keep it for as long as there is the volume.
    pub fn base(&self) -> Option<Digest> {
        self.0.base.as_ref().map(Snapshot::digest)
    }

    /// The disk. It stays usable when the volume's own handles are gone.
    pub fn disk(&self) -> Disk {
        Disk::from_backend(self.clone())
    }

    /// Makes a snapshot of the volume as it is at one instant, written but not yet flushed bytes with it.
    ///
    /// Only chunks with changed blocks are read, hashed and, if the store has no such chunk, stored; all
    /// other parts of the manifest are those of the snapshot the volume began as. The volume goes on meanwhile: who
    /// writes to a chunk that is still to be read sets its 64 KiB aside first, and waits only when 16 MiB
    /// are set aside already. In a store that is not the one of the volume's snapshot everything is stored, and
    /// writers wait until it is.
    ///
    /// # Errors
    ///
    /// As [`Store::import`].
    pub fn snapshot(&self, store: &Store) -> Result<(Snapshot, SnapshotStats)> {
        let inner = &*self.0;
        let _one_at_a_time = lock(&inner.snapshot);
        let gate = write(&inner.gate);
        let base = inner.base.as_ref();
        if base.is_some_and(|base| !Arc::ptr_eq(&base.store, &store.0)) {
            return store.import(&self.disk(), &mut |_| ());
        }
        let changed: Vec<(u64, u64)> = inner.map.changed_chunks().collect();
        let frozen = inner.freeze.begin(changed.iter().map(|(chunk, _)| *chunk));
        drop(gate);

        let mut builder = Builder::new(&store.0, inner.size, base);
        for (chunk, blocks) in changed {
            builder.set(chunk, &frozen.take(chunk, |chunk| inner.chunk(chunk))?)?;
            builder.stats.changed_bytes += blocks * BLOCK;
        }
        drop(frozen);
        builder.finish()
    }

    /// Deletes the volume. Disks of it that are still held keep its bytes until they are dropped.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn delete(self) -> Result<()> {
        remove_files(&self.0.dir)
    }

    /// Deletes the volume in `dir`, whole or half-made, without opening it. It is no error if there is
    /// nothing.
    ///
    /// # Errors
    ///
    /// [`InUse`](ErrorKind::InUse), or what the file system says.
    pub fn remove(dir: &Path) -> Result<()> {
        let _lock = match Locked::open(&dir.join(OVERLAY), false) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            lock => lock.ok(),
        };
        remove_files(dir)
    }
}

/// The log first: without it there is no volume.
fn remove_files(dir: &Path) -> Result<()> {
    let gone = |result: std::io::Result<()>, path: &Path| match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(e, format!("cannot remove {}", path.display())))
        }
        _ => Ok(()),
    };
    for name in [LOG, "tmp", OVERLAY] {
        let path = if name == "tmp" { dir.join(LOG).with_extension(name) } else { dir.join(name) };
        gone(fs::remove_file(&path), &path)?;
    }
    gone(fs::remove_dir(dir), dir)?;
    let parent = parent(dir);
    if parent.exists() { sync_dir(parent) } else { Ok(()) }
}

impl Inner {
    fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let within = offset % BLOCK;
            let blocks = (within + buf.len() as u64).div_ceil(BLOCK);
            let (state, count) = self.map.run(offset / BLOCK, blocks);
            let len = (count * BLOCK - within).min(buf.len() as u64);
            let (part, rest) = buf.split_at_mut(len as usize);
            match (state, &self.base) {
                (State::Overlay, _) => {
                    let read = self.overlay.read_exact_at(part, offset);
                    read.map_err(|e| self.io(e, "read"))?;
                }
                (State::Base, Some(base)) => base.read(part, offset)?,
                _ => part.fill(0),
            }
            (buf, offset) = (rest, offset + len);
        }
        Ok(())
    }

    /// A whole chunk, filled up with zeroes beyond the end of the volume.
    fn chunk(&self, chunk: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; CHUNK as usize];
        let at = chunk * CHUNK;
        let len = (self.size - at).min(CHUNK) as usize;
        self.read(&mut bytes[..len], at)?;
        Ok(bytes)
    }

    /// Sets bytes aside that a snapshot is still to read. `len` is not zero.
    fn keep(&self, offset: u64, len: u64) -> Result<()> {
        self.freeze.keep(offset / CHUNK..=(offset + len - 1) / CHUNK, |chunk| self.chunk(chunk))
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let gate = read(&self.gate);
        let end = offset + buf.len() as u64;
        let in_place = |at: u64| at % BLOCK == 0 || self.map.get(at / BLOCK) == State::Overlay;
        if in_place(offset) && in_place(end) {
            return self.write_in_place(buf, offset);
        }
        drop(gate);
        let _gate = write(&self.gate);
        self.write_around(buf, offset)
    }

    /// Writes whole blocks, or blocks whose other bytes are in the overlay already.
    fn write_in_place(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.keep(offset, buf.len() as u64)?;
        self.overlay.write_all_at(buf, offset).map_err(|e| self.io(e, "write"))?;
        let first = offset / BLOCK;
        let count = (offset + buf.len() as u64).div_ceil(BLOCK) - first;
        self.change(first, count, State::Overlay);
        self.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes part of a block whose other bytes are elsewhere, and brings these along. Nobody else writes.
    fn write_around(&self, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let (from, to) = (offset / BLOCK * BLOCK, end.next_multiple_of(BLOCK));
        let mut blocks = vec![0; (to - from) as usize];
        let last = blocks.len() - BLOCK as usize;
        if offset != from {
            self.read(&mut blocks[..BLOCK as usize], from)?;
        }
        if end != to && (last > 0 || offset == from) {
            self.read(&mut blocks[last..], to - BLOCK)?;
        }
        blocks[(offset - from) as usize..][..buf.len()].copy_from_slice(buf);
        self.write_in_place(&blocks, from)
    }

    /// Puts blocks into a state, and on the list for the log those that were not in it.
    ///
    /// The list comes first: who finds a block in its new state may rely on the next flush to log it.
    fn change(&self, first: u64, count: u64, state: State) {
        let (mut at, end) = (first, first + count);
        while at < end {
            let (old, count) = self.map.run(at, end - at);
            if old != state {
                let run = Run { first: at, count, state };
                let mut pending = lock(&self.pending);
                match pending.last_mut() {
                    Some(last) if last.state == state && last.first + last.count == at => last.count += count,
                    _ => pending.push(run),
                }
                drop(pending);
                self.map.set(run);
            }
            at += count;
        }
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let _gate = write(&self.gate);
        self.keep(offset, len)?;
        let end = offset + len;
        let (first, last) = (offset.div_ceil(BLOCK), end / BLOCK);
        if first > last {
            return self.zero_part(offset, len);
        }
        self.zero_part(offset, first * BLOCK - offset)?;
        self.zero_part(last * BLOCK, end - last * BLOCK)?;
        let mut at = first;
        while at < last {
            let (state, count) = self.map.run(at, last - at);
            match state {
                State::Zero => {}
                State::Base => self.zero_base(at, at + count)?,
                State::Overlay => {
                    self.change(at, count, State::Zero);
                    // Whether or not the space comes back, the blocks are zero.
                    let _ = self.overlay.punch(at * BLOCK, count * BLOCK);
                }
            }
            at += count;
        }
        self.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// Zeroes blocks of the snapshot, but for those that are zero already: to discard a whole empty
    /// disk shall cost nothing.
    fn zero_base(&self, mut first: u64, end: u64) -> Result<()> {
        let Some(base) = &self.base else { return Ok(()) };
        while let Some(stored) = base.next_stored(first * BLOCK)? {
            let start = stored.start / BLOCK;
            if start >= end {
                break;
            }
            let stop = stored.end.div_ceil(BLOCK).min(end);
            self.change(start, stop - start, State::Zero);
            first = stop;
            if first >= end {
                break;
            }
        }
        Ok(())
    }

    /// Zeroes less than a block, within one.
    fn zero_part(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        match self.map.get(offset / BLOCK) {
            State::Zero => return Ok(()),
            State::Base if self.base.is_none() => return Ok(()),
            _ => {}
        }
        self.write_around(&vec![0; len as usize], offset)
    }

    fn flush(&self) -> Result<()> {
        let mut log = lock(&self.log);
        if self.failed.load(Ordering::Acquire) {
            let what = format!("an earlier flush of {} has failed", self.dir.display());
            return Err(Error::new(ErrorKind::Io, what));
        }
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        // Whatever is on the list was written before, so its bytes are durable when the log says so.
        let runs = std::mem::take(&mut *lock(&self.pending));
        if let Err(e) = self.overlay.sync_data() {
            self.failed.store(true, Ordering::Release);
            return Err(self.io(e, "flush"));
        }
        match log.append(&runs) {
            Ok(()) => Ok(()),
            Err(AppendError::Sync(error)) => {
                self.failed.store(true, Ordering::Release);
                Err(error)
            }
            Err(AppendError::Write(error)) => {
                lock(&self.pending).splice(..0, runs);
                self.dirty.store(true, Ordering::Release);
                Err(error)
            }
        }
    }

    fn io(&self, error: std::io::Error, what: &str) -> Error {
        Error::io(error, format!("cannot {what} the overlay in {}", self.dir.display()))
    }
}

impl BlockBackend for Volume {
    fn size(&self) -> u64 {
        self.0.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write(buf, offset)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.zero(offset, len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let inner = &*self.0;
        let (mut block, end) = (offset / BLOCK, inner.size / BLOCK);
        while block < end {
            let (state, count) = inner.map.run(block, end - block);
            let run = block * BLOCK..(block + count) * BLOCK;
            let found = match (state, &inner.base) {
                (State::Overlay, _) => Some(run),
                (State::Base, Some(base)) => base
                    .next_stored(run.start.max(offset))?
                    .map(|stored| stored.start..stored.end.min(run.end))
                    .filter(|stored| stored.start < stored.end),
                _ => None,
            };
            if found.is_some() {
                return Ok(found);
            }
            block += count;
        }
        Ok(None)
    }
}
