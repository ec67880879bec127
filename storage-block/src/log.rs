//! The log that says which blocks a volume's overlay holds.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::format::{
    self, BATCH_HEADER, BATCH_MAX, BATCH_RECORD, BLOCK, LOG_ALIGN, LOG_HEADER, Run, State, VolumeHeader,
    VolumeKey,
};
use crate::fs::{self, File};
use crate::map::StateMap;
use crate::raw::write_zeroes;
use crate::store::{parent, sync_dir};
use crate::{Error, Result};

/// The length of a new log: zeroes are written ahead, so that most appends change no metadata.
const INITIAL: u64 = 32 << 10;
/// How far ahead zeroes are written.
const AHEAD: u64 = 256 << 10;
/// Logs shorter than this are never rewritten.
const REWRITE_MIN: u64 = 1 << 20;

/// An open log. Each append is one batch, durable before the next is written.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    header: VolumeHeader,
    /// The number and the place of the next batch.
    sequence: u64,
    end: u64,
    /// The length of the file, all zeroes from `end`.
    len: u64,
    /// `end` after the log was last rewritten.
    rewritten: u64,
}

/// Why an append failed.
pub(crate) enum AppendError {
    /// It can be tried again.
    Write(Error),
    /// Nobody knows what is on the disk.
    Sync(Error),
}

impl Log {
    /// Makes a log. It is durable after [`sync_created`](Self::sync_created), but for its name.
    pub(crate) fn create(
        path: &Path,
        size: u64,
        base: Option<ami_core::Digest>,
        key: Option<VolumeKey>,
    ) -> Result<Self> {
        let header = VolumeHeader { size, base, log: random()?, key };
        let failed = |e| Error::io(e, format!("cannot write {}", path.display()));
        let file = File::create_new(path).map_err(failed)?;
        let mut bytes = format::encode_volume(&header);
        bytes.resize(INITIAL as usize, 0);
        file.write_all_at(&bytes, 0).map_err(failed)?;
        let path = path.to_owned();
        Ok(Self { path, file, header, sequence: 0, end: LOG_HEADER, len: INITIAL, rewritten: LOG_HEADER })
    }

    /// Makes a new log durable.
    pub(crate) fn sync_created(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io(e, format!("cannot flush {}", self.path.display())))
    }

    /// Opens a log and replays it. What a crash cut off at its end was never acknowledged, and goes.
    pub(crate) fn open(path: &Path) -> Result<(Self, StateMap)> {
        let file =
            File::open_writable(path).map_err(|e| Error::io(e, format!("cannot open {}", path.display())))?;
        let mut log = Self {
            path: path.to_owned(),
            file,
            header: VolumeHeader { size: 0, base: None, log: 0, key: None },
            sequence: 0,
            end: LOG_HEADER,
            len: 0,
            rewritten: LOG_HEADER,
        };
        let map = log.replay()?;
        log.clear_tail()?;
        // A process may have died between a batch and its synchronisation, or between a log's name and its. What
        // is relied on from here on must not go with the power.
        log.file.sync_data().map_err(|e| Error::io(e, format!("cannot flush {}", path.display())))?;
        sync_dir(parent(path))?;
        Ok((log, map))
    }

    pub(crate) fn header(&self) -> &VolumeHeader {
        &self.header
    }

    /// Appends runs and makes them durable.
    pub(crate) fn append(&mut self, runs: &[Run]) -> Result<(), AppendError> {
        // One batch after the other, each durable before the next begins: a whole batch behind a damaged
        // one is then always a sign of rot and never one of a crash.
        for part in runs.chunks(BATCH_MAX) {
            self.append_batch(part)?;
        }
        if self.end > REWRITE_MIN && self.end / 2 > self.rewritten {
            match self.rewrite(self.header.size, None) {
                // The log as it is stays good, so a failure costs nothing but space.
                Err(AppendError::Write(error)) => {
                    tracing::warn!(log = %self.path.display(), %error, "cannot rewrite the log");
                    self.rewritten = self.end;
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Says that the volume has another size from now on, which is durable on return.
    pub(crate) fn grow(&mut self, size: u64) -> Result<(), AppendError> {
        self.rewrite(size, None)
    }

    /// Says what the log comes to with all that happened since, which is durable on return.
    pub(crate) fn replace(&mut self, runs: Vec<Run>) -> Result<(), AppendError> {
        self.rewrite(self.header.size, Some(runs))
    }

    fn append_batch(&mut self, runs: &[Run]) -> Result<(), AppendError> {
        let batch = format::encode_batch(self.header.log, self.sequence, runs);
        let failed = |e| Error::io(e, format!("cannot append to {}", self.path.display()));
        let end = self.end + batch.len() as u64;
        if end > self.len {
            let len = end.next_multiple_of(AHEAD);
            write_zeroes(&self.file, self.len, len - self.len).map_err(|e| AppendError::Write(failed(e)))?;
            self.len = len;
        }
        self.file.write_all_at(&batch, self.end).map_err(|e| AppendError::Write(failed(e)))?;
        self.file.sync_data().map_err(|e| AppendError::Sync(failed(e)))?;
        self.end = end;
        self.sequence += 1;
        Ok(())
    }

    /// Reads the log from its beginning to its last whole batch.
    fn replay(&mut self) -> Result<StateMap> {
        let mut window = Window { file: &self.file, path: &self.path, at: 0, bytes: Vec::new(), last: false };
        let corrupt = |why: String| Error::corrupt(&self.path, why);
        self.header = format::parse_volume(window.get(0, LOG_HEADER as usize)?).map_err(corrupt)?;
        let metadata = self.file.metadata();
        self.len =
            metadata.map_err(|e| Error::io(e, format!("cannot look at {}", self.path.display())))?.len();
        if self.len < INITIAL {
            return Err(corrupt(format!("it has been cut to {} bytes", self.len)));
        }
        let blocks = self.header.size / BLOCK;
        let map = StateMap::default();
        loop {
            let bytes = window.get(self.end, BATCH_BYTES)?;
            let Some((sequence, runs, len)) = format::parse_batch(self.header.log, blocks, bytes) else {
                break;
            };
            if sequence != self.sequence {
                return Err(corrupt(format!("batch {sequence} stands where batch {} should", self.sequence)));
            }
            runs.into_iter().filter(|run| run.count > 0).for_each(|run| map.set(run));
            self.sequence += 1;
            self.end += len as u64;
        }
        let mut at = self.end + LOG_ALIGN as u64;
        while at < self.len {
            let bytes = window.get(at, BATCH_BYTES)?;
            if let Some((later, ..)) = format::parse_batch(self.header.log, blocks, bytes) {
                let damaged = self.sequence;
                return Err(corrupt(format!(
                    "batch {damaged} is damaged, and batch {later} after it is whole"
                )));
            }
            at += LOG_ALIGN as u64;
        }
        Ok(map)
    }

    /// Zeroes what is left of a batch that a crash cut off.
    fn clear_tail(&mut self) -> Result<()> {
        let failed = |e| Error::io(e, format!("cannot clear the end of {}", self.path.display()));
        let mut window = Window { file: &self.file, path: &self.path, at: 0, bytes: Vec::new(), last: false };
        let mut at = self.end;
        while at < self.len {
            let bytes = window.get(at, LOG_ALIGN)?;
            if !crate::import::is_zero(bytes) {
                write_zeroes(&self.file, self.end, self.len - self.end).map_err(failed)?;
                return self.file.sync_data().map_err(failed);
            }
            at += LOG_ALIGN as u64;
        }
        Ok(())
    }

    /// Writes the log anew with these runs or else with what it comes to, for a volume of this size, and takes the place
    /// of the old one.
    fn rewrite(&mut self, size: u64, runs: Option<Vec<Run>>) -> Result<(), AppendError> {
        let path = self.path.with_extension("tmp");
        let renamed = self.write_anew(&path, size, runs).and_then(|new| {
            let failed = |e| Error::io(e, format!("cannot replace {}", self.path.display()));
            fs::rename(&path, &self.path).map_err(failed).map(|()| new)
        });
        let mut new = renamed.map_err(|error| {
            let _ = fs::remove_file(&path);
            AppendError::Write(error)
        })?;
        // From here on only the new log has a name, whether or not that is durable.
        new.rewritten = new.end;
        new.path = std::mem::take(&mut self.path);
        *self = new;
        match self.path.parent() {
            Some(dir) => sync_dir(dir).map_err(AppendError::Sync),
            None => Ok(()),
        }
    }

    /// A new log at `path` that says these runs, or else what this one comes to, durable but for its name.
    fn write_anew(&self, path: &Path, size: u64, runs: Option<Vec<Run>>) -> Result<Self> {
        let mut runs = runs.map_or_else(|| self.comes_to(), Ok)?;
        runs.retain(|run| run.state != State::Base);

        match fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(e, format!("cannot remove {}", path.display())));
            }
            _ => {}
        }
        let mut new = Self::create(path, size, self.header.base, self.header.key.clone())?;
        // Its header too must be on the disk before it takes the old one's place.
        new.sync_created()?;
        for part in runs.chunks(BATCH_MAX) {
            new.append_batch(part).map_err(|failed| match failed {
                AppendError::Write(error) | AppendError::Sync(error) => error,
            })?;
        }
        Ok(new)
    }

    /// What all batches together say.
    fn comes_to(&self) -> Result<Vec<Run>> {
        let mut log = Self {
            path: self.path.clone(),
            file: self.file.try_clone().map_err(|e| Error::io(e, "cannot duplicate a file"))?,
            header: self.header.clone(),
            sequence: 0,
            end: LOG_HEADER,
            ..*self
        };
        Ok(log.replay()?.runs(0, self.header.size / BLOCK))
    }
}

const BATCH_BYTES: usize = (BATCH_HEADER + BATCH_MAX * BATCH_RECORD).next_multiple_of(LOG_ALIGN);

/// A part of a file, read in large pieces and looked at in small ones.
struct Window<'f> {
    file: &'f File,
    path: &'f Path,
    at: u64,
    bytes: Vec<u8>,
    /// Nothing comes behind `bytes`.
    last: bool,
}

impl Window<'_> {
    /// `len` bytes from `at`, fewer only at the end of the file.
    fn get(&mut self, at: u64, len: usize) -> Result<&[u8]> {
        let held = self.at..self.at + self.bytes.len() as u64;
        if at < held.start || (at + len as u64 > held.end && !self.last) {
            self.bytes.resize(len.max(2 * BATCH_BYTES), 0);
            let mut filled = 0;
            self.last = false;
            while filled < self.bytes.len() {
                match self.file.read_at(&mut self.bytes[filled..], at + filled as u64) {
                    Ok(0) => {
                        self.last = true;
                        break;
                    }
                    Ok(read) => filled += read,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(Error::io(e, format!("cannot read {}", self.path.display()))),
                }
            }
            self.bytes.truncate(filled);
            self.at = at;
        }
        let start = ((at - self.at) as usize).min(self.bytes.len());
        let end = (start + len).min(self.bytes.len());
        Ok(&self.bytes[start..end])
    }
}

fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    crate::keys::random(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
