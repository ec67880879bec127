//! The log that says which blocks a volume's overlay holds.

mod window;

use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ami_core::Digest;

use self::window::Window;
use crate::format::{
    self, BATCH_HEADER, BATCH_MAX, BATCH_RECORD, BLOCK, CLOSING_BYTES, Closing, LOG_ALIGN, LOG_HEADER,
    LOG_NAME, Run, State, VolumeHeader, VolumeKey,
};
use crate::fs::{self, File};
use crate::map::StateMap;
use crate::pack::read_dir;
use crate::raw::write_zeroes;
use crate::store::{parent, sync_dir};
use crate::{Error, ErrorKind, Result};

/// The least length of a log that says anything: zeroes are written ahead, so that most appends change no metadata.
const INITIAL: u64 = 32 << 10;
/// How far ahead zeroes are written.
const AHEAD: u64 = 256 << 10;
/// Logs shorter than this are never rewritten.
const REWRITE_MIN: u64 = 1 << 20;

/// The log of a volume that had a header from the beginning.
const PLAIN: &str = "log";
/// A log that is being written to take another's place.
const TEMPORARY: &str = "log.tmp";

const BATCH_BYTES: usize = (BATCH_HEADER + BATCH_MAX * BATCH_RECORD).next_multiple_of(LOG_ALIGN);

/// An open log. Each append is one batch, durable before the next is written.
///
/// That of a new volume is an empty file whose name says what its header would: names are all that has to be made
/// durable then, and a journal has these in one commit. The first append writes the log into the file beside it, and gives
/// it that name; an empty log that stands alone was cut.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    header: VolumeHeader,
    /// The number and the place of the next batch.
    sequence: u64,
    end: u64,
    /// The length of the file, all zeroes from `end`; none, if it has no header yet.
    len: u64,
    /// `end` after the log was last rewritten.
    rewritten: u64,
    /// While it has no header: the file that it will be written into, with room for a log of the least length. What was
    /// written to a volume until its disk was full can then be flushed.
    room: Option<File>,
    /// What stood behind the last batch when it was opened.
    closing: Option<Closing>,
}

/// Why an append failed.
pub(crate) enum AppendError {
    /// It can be tried again.
    Write(Error),
    /// Nobody knows what is on the disk.
    Sync(Error),
}

impl Log {
    /// Makes a log in a volume's directory. It is durable after [`sync_all`](Self::sync_all), but for its name. After a failure
    /// nothing is left of it, and all that others had there.
    pub(crate) fn create(
        dir: &Path,
        size: u64,
        base: Option<Digest>,
        key: Option<VolumeKey>,
    ) -> Result<Self> {
        let undo = |paths: &[&PathBuf]| {
            for path in paths {
                let _ = remove(path);
            }
        };
        if key.is_some() {
            let path = dir.join(PLAIN);
            let file = create(&path)?;
            let header = random().map(|log| VolumeHeader { size, base, log, key });
            return header
                .and_then(|header| Self::write(path.clone(), file, header))
                .inspect_err(|_| undo(&[&path]));
        }
        let path = dir.join(format::log_name(size, base.as_ref()));
        let log = Self::new(path.clone(), create(&path)?, VolumeHeader { size, base, log: 0, key });
        let room_path = dir.join(TEMPORARY);
        let room = create(&room_path).inspect_err(|_| undo(&[&path]))?;
        make_room(&room, dir).inspect_err(|_| undo(&[&path, &room_path]))?;
        Ok(Self { room: Some(room), ..log })
    }

    /// Begins a log with a header.
    fn write(path: PathBuf, file: File, header: VolumeHeader) -> Result<Self> {
        let failed = |e| Error::io(e, format!("cannot write {}", path.display()));
        let mut bytes = format::encode_volume(&header);
        bytes.resize(INITIAL as usize, 0);
        file.write_all_at(&bytes, 0).map_err(failed)?;
        Ok(Self { len: INITIAL, ..Self::new(path, file, header) })
    }

    /// One of which nothing is known but this.
    fn new(path: PathBuf, file: File, header: VolumeHeader) -> Self {
        let (end, rewritten) = (LOG_HEADER, LOG_HEADER);
        Self { path, file, header, sequence: 0, end, len: 0, rewritten, room: None, closing: None }
    }

    /// Whether it has said nothing yet, so that there is nothing of it but its name.
    pub(crate) fn is_blank(&self) -> bool {
        self.len == 0
    }

    /// The name of a log that has said nothing yet, which says it all.
    pub(crate) fn blank_name(&self) -> Option<&str> {
        let name = self.path.file_name().and_then(|name| name.to_str());
        name.filter(|_| self.is_blank())
    }

    /// Makes a new log durable.
    pub(crate) fn sync_all(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io(e, format!("cannot flush {}", self.path.display())))
    }

    /// Opens the log in a volume's directory and replays it. What a crash cut off at its end was never acknowledged, and
    /// goes.
    pub(crate) fn open(dir: &Path) -> Result<(Self, StateMap)> {
        let path = Self::find(dir)?;
        let file = File::open_writable(&path)
            .map_err(|e| Error::io(e, format!("cannot open {}", path.display())))?;
        let mut log = Self::new(path, file, VolumeHeader { size: 0, base: None, log: 0, key: None });
        let map = log.replay()?;
        log.clear_tail()?;
        // A process may have died between a batch and its synchronisation, or between a log's name and its. What
        // is relied on from here on must not go with the power, nor what is relied on no more come back.
        log.file.sync_data().map_err(|e| Error::io(e, format!("cannot flush {}", log.path.display())))?;
        sync_dir(dir)?;
        if log.is_blank() {
            let room = log.open_room()?;
            // On a full disk it goes on without.
            let _ = make_room(&room, dir);
            log.room = Some(room);
        } else {
            remove(&dir.join(TEMPORARY))?;
        }
        Ok((log, map))
    }

    /// Makes again what is missing of a log to which nothing was ever appended, and which is called `name`.
    pub(crate) fn restore<'n>(dir: &Path, name: impl FnOnce() -> Result<&'n str>) -> Result<()> {
        let names = Self::names(dir)?;
        let room = dir.join(TEMPORARY);
        let log = match names.iter().find(|path| **path != room) {
            Some(path) => path.clone(),
            None => {
                let path = dir.join(name()?);
                create(&path)?;
                path
            }
        };
        let blank = std::fs::metadata(&log).is_ok_and(|metadata| metadata.len() == 0);
        if blank && !names.contains(&room) {
            create(&room)?;
        }
        Ok(())
    }

    /// The path of the log in a volume's directory.
    pub(crate) fn find(dir: &Path) -> Result<PathBuf> {
        let mut logs = Self::names(dir)?;
        logs.retain(|path| !path.ends_with(TEMPORARY));
        match (logs.pop(), logs.is_empty()) {
            // Who opens this is told what is wrong with its name, or that it is not there.
            (None, _) => {
                let other = list(dir)?.into_iter().find(|name| name.starts_with(LOG_NAME));
                Ok(dir.join(other.as_deref().unwrap_or(PLAIN)))
            }
            (Some(log), true) => Ok(log),
            (Some(_), false) => Err(Error::corrupt(dir, "it has two logs")),
        }
    }

    /// Whether there is anything in a directory that is or was to be a log.
    pub(crate) fn is_there(dir: &Path) -> Result<bool> {
        let later = list(dir)?.iter().any(|name| format::is_name_of_other_version(name));
        Ok(later || !Self::names(dir)?.is_empty())
    }

    /// Removes whatever is or was to be a log in a directory. What is called as others call their files, too, is taken for one
    /// if there is an overlay, or if there is nothing in it but what is in a log.
    pub(crate) fn remove(dir: &Path, overlay: bool) -> Result<()> {
        for path in Self::names(dir)? {
            let telling = path.file_name().and_then(|name| name.to_str()).is_some_and(is_telling);
            if overlay || telling || begins_as_log(&path)? {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn names(dir: &Path) -> Result<Vec<PathBuf>> {
        let is_log = |name: &String| name == PLAIN || name == TEMPORARY || is_telling(name);
        Ok(list(dir)?.iter().filter(|name| is_log(name)).map(|name| dir.join(name)).collect())
    }

    pub(crate) fn header(&self) -> &VolumeHeader {
        &self.header
    }

    /// What was said when it was closed. It is on the disk no more.
    pub(crate) fn take_closing(&mut self) -> Option<Closing> {
        self.closing.take()
    }

    /// Says something behind the last batch, for who opens it next. What a crash leaves of that is no harm: it is taken
    /// for a batch that was never acknowledged.
    pub(crate) fn close(&self, closing: &Closing) -> std::io::Result<()> {
        match format::encode_closing(self.header.log, self.sequence, closing) {
            Some(bytes) if !self.is_blank() => self.file.write_all_at(&bytes, self.end),
            _ => Ok(()),
        }
    }

    /// Appends runs and makes them durable.
    pub(crate) fn append(&mut self, runs: &[Run]) -> Result<(), AppendError> {
        if self.is_blank() && !runs.is_empty() {
            return self.replace(runs.to_vec());
        }
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
        let end = self.write_batch(runs).map_err(AppendError::Write)?;
        let synced = self.file.sync_data();
        synced.map_err(|e| {
            AppendError::Sync(Error::io(e, format!("cannot append to {}", self.path.display())))
        })?;
        self.end = end;
        self.sequence += 1;
        Ok(())
    }

    /// Writes a batch behind the last one, and says where it ends.
    fn write_batch(&mut self, runs: &[Run]) -> Result<u64> {
        let batch = format::encode_batch(self.header.log, self.sequence, runs);
        let failed = |e| Error::io(e, format!("cannot append to {}", self.path.display()));
        let end = self.end + batch.len() as u64;
        if end > self.len {
            let len = end.next_multiple_of(AHEAD);
            write_zeroes(&self.file, self.len, len - self.len).map_err(failed)?;
            self.len = len;
        }
        self.file.write_all_at(&batch, self.end).map_err(failed)?;
        Ok(end)
    }

    /// Reads the log from its beginning to its last whole batch.
    fn replay(&mut self) -> Result<StateMap> {
        let corrupt = |why: String| Error::corrupt(&self.path, why);
        let metadata = self.file.metadata();
        self.len =
            metadata.map_err(|e| Error::io(e, format!("cannot look at {}", self.path.display())))?.len();
        if self.len == 0 {
            let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let (size, base) = format::parse_log_name(name).map_err(corrupt)?;
            self.header = VolumeHeader { size, base, log: 0, key: None };
            return Ok(StateMap::default());
        }
        let mut window = Window::new(&self.file, &self.path);
        self.header = format::parse_volume(window.get(0, LOG_HEADER as usize)?).map_err(corrupt)?;
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
        let bytes = window.get(self.end, CLOSING_BYTES)?;
        self.closing = format::parse_closing(self.header.log, self.sequence, self.header.size, bytes);
        Ok(map)
    }

    /// Zeroes what is left of a batch that a crash cut off, and what was said at the end: it holds until the volume is
    /// written.
    fn clear_tail(&mut self) -> Result<()> {
        let failed = |e| Error::io(e, format!("cannot clear the end of {}", self.path.display()));
        let mut window = Window::new(&self.file, &self.path);
        let mut at = self.end;
        while at < self.len {
            let bytes = window.get(at, LOG_ALIGN)?;
            if !crate::import::is_zero(bytes) {
                return write_zeroes(&self.file, self.end, self.len - self.end).map_err(failed);
            }
            at += LOG_ALIGN as u64;
        }
        Ok(())
    }

    /// Opens the file beside an empty log. It is there from the first, and goes with the first append alone.
    fn open_room(&self) -> Result<File> {
        let path = parent(&self.path).join(TEMPORARY);
        File::open_writable(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::corrupt(&self.path, "it has been cut to 0 bytes"),
            _ => Error::io(e, format!("cannot open {}", path.display())),
        })
    }

    /// Writes the log anew with these runs or else with what it comes to, for a volume of this size, and takes the place
    /// of the old one.
    fn rewrite(&mut self, size: u64, runs: Option<Vec<Run>>) -> Result<(), AppendError> {
        let path = parent(&self.path).join(TEMPORARY);
        let renamed = self.write_anew(&path, size, runs).and_then(|new| {
            let failed = |e| Error::io(e, format!("cannot replace {}", self.path.display()));
            fs::rename(&path, &self.path).map_err(failed).map(|()| new)
        });
        let mut new = renamed.map_err(|error| {
            let _ = match &self.room {
                Some(room) => make_room(room, parent(&self.path)),
                None => remove(&path),
            };
            AppendError::Write(error)
        })?;
        // From here on only the new log has a name, whether or not that is durable.
        new.rewritten = new.end;
        new.path = std::mem::take(&mut self.path);
        *self = new;
        sync_dir(parent(&self.path)).map_err(AppendError::Sync)
    }

    /// A new log at `path` that says these runs, or else what this one comes to, durable but for its name.
    fn write_anew(&self, path: &Path, size: u64, runs: Option<Vec<Run>>) -> Result<Self> {
        let mut runs = runs.map_or_else(|| self.comes_to(), Ok)?;
        runs.retain(|run| run.state != State::Base);

        let file = match &self.room {
            Some(room) => room.try_clone().map_err(|e| Error::io(e, "cannot duplicate a file"))?,
            None => create_anew(path)?,
        };
        let header = VolumeHeader { size, log: random()?, ..self.header.clone() };
        let mut new = Self::write(path.to_owned(), file, header)?;
        for part in runs.chunks(BATCH_MAX) {
            new.end = new.write_batch(part)?;
            new.sequence += 1;
        }
        // All of it must be on the disk before it takes the old one's place, and nobody reads it before.
        new.sync_all()?;
        Ok(new)
    }

    /// What all batches together say.
    fn comes_to(&self) -> Result<Vec<Run>> {
        let file = self.file.try_clone().map_err(|e| Error::io(e, "cannot duplicate a file"))?;
        let mut log = Self::new(self.path.clone(), file, self.header.clone());
        Ok(log.replay()?.runs(0, self.header.size / BLOCK))
    }
}

/// Whether it is a name that says what a header would; who else has something beside a volume may call it by one that
/// begins alike.
fn is_telling(name: &str) -> bool {
    format::parse_log_name(name).is_ok()
}

/// Whether a file begins as a log does, or as one that a crash kept from having anything in it. What cannot be a log's is not.
fn begins_as_log(path: &Path) -> Result<bool> {
    if !path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(false);
    }
    let failed = |e| Error::io(e, format!("cannot look into {}", path.display()));
    let mut begin = Vec::new();
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        file => file.map_err(failed)?,
    };
    file.take(LOG_ALIGN as u64).read_to_end(&mut begin).map_err(failed)?;
    Ok(format::is_volume(&begin) || crate::import::is_zero(&begin))
}

/// The names in a directory, which need not be there.
fn list(dir: &Path) -> Result<Vec<String>> {
    match read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        names => names,
    }
}

fn create(path: &Path) -> Result<File> {
    File::create_new(path).map_err(|e| Error::io(e, format!("cannot create {}", path.display())))
}

/// Makes a file, in the place of the one that is there.
fn create_anew(path: &Path) -> Result<File> {
    remove(path)?;
    create(path)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(e, format!("cannot remove {}", path.display())))
        }
        _ => Ok(()),
    }
}

/// Makes room in the file that the first log of a volume is to be written into, whatever was left in it.
fn make_room(room: &File, dir: &Path) -> Result<()> {
    let failed = |e| Error::io(e, format!("cannot make room for {}", dir.join(TEMPORARY).display()));
    room.set_len(0).and_then(|()| room.reserve(INITIAL)).map_err(failed)
}

fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    crate::keys::random(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
