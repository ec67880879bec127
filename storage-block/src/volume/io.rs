//! How a volume is read and written.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::Ordering;
use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use super::{Gate, Inner, Volume};
use crate::buffer::{gather, take_first, total};
use crate::format::{BLOCK, CHUNK, Run, State};
use crate::log::AppendError;
use crate::store::{lock, read, write};
use crate::{BlockBackend, Capabilities, Error, ErrorKind, Extent, IoBuf, Result};

/// How much is written in one go: a snapshot that is to begin waits for writes under way.
const WRITE: u64 = 1 << 20;
/// How much is zeroed in one go. A file system may write out what is in its cache before it gives that back, as ext4 does.
const ZERO: u64 = 256 << 10;

impl Inner {
    pub(super) fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let within = offset % BLOCK;
            let blocks = (within + buf.len() as u64).div_ceil(BLOCK);
            let (state, count) = self.map.run(offset / BLOCK, blocks);
            let len = (count * BLOCK - within).min(buf.len() as u64);
            let (part, rest) = buf.split_at_mut(len as usize);
            match (state, &self.base) {
                (State::Overlay, _) => {
                    let read = self.files()?.overlay.read_at(part, offset);
                    read.map_err(|e| self.io(e, "read"))?;
                }
                (State::Base, Some(base)) => base.read(part, offset)?,
                _ => part.fill(0),
            }
            (buf, offset) = (rest, offset + len);
        }
        Ok(())
    }

    /// Where bytes lie that a read would get; what the snapshot has not looked up yet is not looked up here.
    fn extent(&self, offset: u64, len: u64) -> Extent<'_> {
        let within = offset % BLOCK;
        let (state, count) = self.map.run(offset / BLOCK, (within + len).div_ceil(BLOCK));
        let len = (count * BLOCK - within).min(len);
        match (state, &self.base) {
            (State::Overlay, _) => match self.files.get().and_then(|files| files.overlay.for_reading()) {
                Some(file) => Extent::File { file, offset, len },
                None => Extent::Backend { len },
            },
            (State::Base, Some(base)) => base.extent_in_memory(offset, len),
            _ => Extent::Zeroes { len },
        }
    }

    /// Lets writers in with this one, once no snapshot needs what is in these bytes. `len` is not zero.
    fn enter(&self, offset: u64, len: u64) -> RwLockReadGuard<'_, Gate> {
        let chunks = chunks(offset, len);
        loop {
            // What may take long is done outside of the gate.
            self.freeze.keep(chunks.clone(), self);
            let gate = read(&self.gate);
            if self.freeze.lets(chunks.clone()) {
                return gate;
            }
        }
    }

    /// The same for one who has to be alone.
    fn enter_alone(&self, offset: u64, len: u64) -> RwLockWriteGuard<'_, Gate> {
        let chunks = chunks(offset, len);
        loop {
            self.freeze.keep(chunks.clone(), self);
            let gate = write(&self.gate);
            if self.freeze.lets(chunks.clone()) {
                return gate;
            }
        }
    }

    fn write(&self, mut bufs: &mut [IoBuf<'_>], offset: u64) -> Result<()> {
        for part in parts(offset, total(bufs).unwrap_or(0), WRITE) {
            let len = part.end - part.start;
            take_first(&mut bufs, len as usize, |now| self.write_part(now, part.start, len))?;
        }
        Ok(())
    }

    fn write_part(&self, bufs: &mut [IoBuf<'_>], offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let gate = self.enter(offset, len);
        let in_place = |at: u64| at % BLOCK == 0 || self.map.get(at / BLOCK) == State::Overlay;
        if in_place(offset) && in_place(end) {
            return self.write_in_place(&gate, bufs, offset, len);
        }
        drop(gate);
        self.fetch_edges(offset, len);
        let gate = self.enter_alone(offset, len);
        self.write_around(&gate, bufs, offset, len)
    }

    /// Reads from the blocks that a range covers only in part, so that who brings the rest of them along finds it in
    /// memory and nobody has to wait for a disk at the gate.
    fn fetch_edges(&self, offset: u64, len: u64) {
        for at in [offset, offset + len] {
            if at % BLOCK != 0 {
                // An error is met again, by who needs the bytes.
                let _ = self.read(&mut [0], at - 1);
            }
        }
    }

    /// Has the snapshot look up where its chunks in a range lie, so that nobody waits for that at the gate.
    fn fetch_tables(&self, mut at: u64, end: u64) {
        let Some(base) = &self.base else { return };
        while at < end {
            match base.next_stored(at) {
                Ok(Some(stored)) => at = stored.end,
                // An error is met again, by who needs to know.
                Ok(None) | Err(_) => break,
            }
        }
    }

    /// Writes whole blocks, or blocks whose other bytes are in the overlay already.
    fn write_in_place(&self, gate: &Gate, bufs: &mut [IoBuf<'_>], offset: u64, len: u64) -> Result<()> {
        let first = offset / BLOCK;
        let count = (offset + len).div_ceil(BLOCK) - first;
        let files = self.files()?;
        // Before: a write that fails may have written something.
        gate.mark(first, count);
        files.overlay.write_vectored_at(bufs, offset).map_err(|e| self.io(e, "write"))?;
        self.change(first, count, State::Overlay);
        self.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes part of a block whose other bytes are elsewhere, and brings these along. Nobody else writes.
    fn write_around(&self, gate: &Gate, bufs: &[IoBuf<'_>], offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let (from, to) = (offset / BLOCK * BLOCK, end.next_multiple_of(BLOCK));
        let mut blocks = vec![0; (to - from) as usize];
        let last = blocks.len() - BLOCK as usize;
        if offset != from {
            self.read(&mut blocks[..BLOCK as usize], from)?;
        }
        if end != to && (last > 0 || offset == from) {
            self.read(&mut blocks[last..], to - BLOCK)?;
        }
        gather(bufs, &mut blocks[(offset - from) as usize..][..len as usize]);
        self.write_in_place(gate, &mut [IoBuf::new(&blocks)], from, to - from)
    }

    /// Puts blocks into a state, and on the list for the log those that were not in it.
    ///
    /// Both under the list's lock: who finds a block in its new state may rely on the next flush to log it, and a flush
    /// that finds no list finds all that was on it in the map.
    fn change(&self, first: u64, count: u64, state: State) {
        // What is written is most often written again.
        if self.map.is_at_once(first, count, state) {
            return;
        }
        let (mut at, end) = (first, first + count);
        while at < end {
            let (old, count) = self.map.run(at, end - at);
            if old != state {
                let run = Run { first: at, count, state };
                let mut pending = lock(&self.pending);
                pending.push(run);
                self.map.set(run);
                // Here, as what comes next may fail.
                self.dirty.store(true, Ordering::Release);
                #[cfg(test)]
                self.between.pass(self);
            }
            at += count;
        }
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        parts(offset, len, ZERO).try_for_each(|part| self.zero_range(part.start, part.end - part.start))
    }

    fn zero_range(&self, offset: u64, len: u64) -> Result<()> {
        self.fetch_edges(offset, len);
        let end = offset + len;
        let (first, last) = (offset.div_ceil(BLOCK), end / BLOCK);
        self.fetch_tables(first * BLOCK, last * BLOCK);
        let gate = self.enter_alone(offset, len);
        if first > last {
            return self.zero_part(&gate, offset, len);
        }
        self.zero_part(&gate, offset, first * BLOCK - offset)?;
        self.zero_part(&gate, last * BLOCK, end - last * BLOCK)?;
        let mut at = first;
        while at < last {
            let (state, count) = self.map.run(at, last - at);
            match state {
                State::Zero => {}
                State::Base => self.zero_base(&gate, at, at + count)?,
                State::Overlay => {
                    gate.mark(at, count);
                    self.change(at, count, State::Zero);
                    // Whether or not the space comes back, the blocks are zero.
                    let _ = self.files()?.overlay.punch(at * BLOCK, count * BLOCK);
                }
            }
            at += count;
        }
        Ok(())
    }

    /// Zeroes blocks of the snapshot, but for those that are zero already: to discard a whole empty
    /// disk shall cost nothing.
    fn zero_base(&self, gate: &Gate, mut first: u64, end: u64) -> Result<()> {
        let Some(base) = &self.base else { return Ok(()) };
        while let Some(stored) = base.next_stored(first * BLOCK)? {
            let start = stored.start / BLOCK;
            if start >= end {
                break;
            }
            let stop = stored.end.div_ceil(BLOCK).min(end);
            // What is zero has to be logged.
            self.files()?;
            gate.mark(start, stop - start);
            self.change(start, stop - start, State::Zero);
            first = stop;
            if first >= end {
                break;
            }
        }
        Ok(())
    }

    /// Zeroes less than a block, within one.
    fn zero_part(&self, gate: &Gate, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        match self.map.get(offset / BLOCK) {
            State::Zero => return Ok(()),
            State::Base if self.base.is_none() => return Ok(()),
            _ => {}
        }
        self.write_around(gate, &[IoBuf::new(&vec![0; len as usize])], offset, len)
    }

    fn flush(&self) -> Result<()> {
        let files = self.files()?;
        let mut log = lock(&files.log);
        self.check_durable()?;
        if files.are_deleted() {
            return Ok(());
        }
        self.sync_new(files, &log)?;
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        // Whatever is on the list was written before, so its bytes are durable when the log says so.
        let pending = std::mem::take(&mut *lock(&self.pending));
        let anew = pending.dropped.then(|| self.map.runs(0, self.size() / BLOCK));
        if let Err(e) = files.overlay.file().sync_data() {
            self.failed.store(true, Ordering::Release);
            return Err(self.io(e, "flush"));
        }
        let logged = match anew {
            Some(runs) => log.replace(runs),
            None => log.append(&pending.runs),
        };
        match logged {
            Ok(()) => Ok(()),
            Err(AppendError::Sync(error)) => {
                self.failed.store(true, Ordering::Release);
                Err(error)
            }
            Err(AppendError::Write(error)) => {
                lock(&self.pending).put_back(pending);
                self.dirty.store(true, Ordering::Release);
                Err(error)
            }
        }
    }

    /// An error if nobody knows what is on the disk.
    pub(super) fn check_durable(&self) -> Result<()> {
        match self.failed.load(Ordering::Acquire) {
            true => {
                let what = format!("an earlier flush of {} has failed", self.dir.display());
                Err(Error::new(ErrorKind::Io, what))
            }
            false => Ok(()),
        }
    }

    pub(super) fn io(&self, error: std::io::Error, what: &str) -> Error {
        Error::io(error, self.cannot(what))
    }

    pub(super) fn cannot(&self, what: &str) -> String {
        format!("cannot {what} the overlay in {}", self.dir.display())
    }
}

/// What the log does not say yet, in the order in which it happened.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) runs: Vec<Run>,
    /// There was too much of it: the map says it all, and the log is to be written anew from that.
    dropped: bool,
}

/// Runs that are remembered between two flushes. A guest that writes and discards one block in turn, and never flushes,
/// would have us remember them without end.
const PENDING_MAX: usize = 1 << 16;

impl Pending {
    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.state == run.state && last.first + last.count == run.first => {
                last.count += run.count;
            }
            _ if self.dropped => {}
            _ => self.runs.push(run),
        }
        self.limit();
    }

    /// Puts before all else what could not be logged.
    fn put_back(&mut self, earlier: Self) {
        self.runs.splice(..0, earlier.runs);
        self.dropped |= earlier.dropped;
        self.limit();
    }

    fn limit(&mut self) {
        if self.dropped || self.runs.len() > PENDING_MAX {
            *self = Self { runs: Vec::new(), dropped: true };
        }
    }
}

/// The chunks that have any of these bytes. `len` is not zero.
fn chunks(offset: u64, len: u64) -> RangeInclusive<u64> {
    offset / CHUNK..=(offset + len - 1) / CHUNK
}

/// Cuts a range at the multiples of `step`.
fn parts(offset: u64, len: u64, step: u64) -> impl Iterator<Item = Range<u64>> {
    let end = offset + len;
    let next = move |part: &Range<u64>| (part.end < end).then(|| part.end..end.min(part.end + step));
    let first = offset..end.min((offset / step + 1) * step);
    std::iter::successors(Some(first), next)
}

impl BlockBackend for Volume {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write(&mut [IoBuf::new(buf)], offset)
    }

    fn write_vectored_at(&self, bufs: &mut [IoBuf<'_>], offset: u64) -> Result<()> {
        self.0.write(bufs, offset)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.zero(offset, len)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            discard_frees: true,
            cheap_zeroes: true,
            knows_holes: true,
            in_files: !self.encrypted(),
            ..Capabilities::default()
        }
    }

    fn extent(&self, offset: u64, len: u64) -> Extent<'_> {
        self.0.extent(offset, len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let inner = &*self.0;
        let (mut block, end) = (offset / BLOCK, inner.size() / BLOCK);
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
