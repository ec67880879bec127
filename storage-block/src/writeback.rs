//! Packs that are made durable while more is appended to them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::JoinHandle;

use crate::pack::Pack;
use crate::{Error, Result};

/// Bytes that are appended before they are sent to the disk: enough that what a synchronisation costs beside them
/// is little.
const STEP: u64 = 8 << 20;
/// Bytes that may wait where they are to leave the page cache: whoever writes them waits for the disk then, which is what
/// the end of all would wait for.
const MOST: u64 = 64 << 20;

/// Sends what a session appends to the disk, so that the disk works while the processors do, and little is left to
/// wait for at the end.
///
/// It promises nothing: what is to be durable is synchronised by whoever needs it, when all of it is written. What
/// that one would not be told any more is an error that was met here, and so [`finish`](Self::finish) tells it.
#[derive(Debug)]
pub(crate) struct Writeback {
    /// What was appended to a pack since the disk was last told to go to work.
    waiting: Option<Part>,
    /// How many bytes of what the disk has are to stay in the page cache: the first ones.
    stay: u64,
    thread: Option<Thread>,
}

/// A range of a pack's bytes.
type Part = (Arc<Pack>, Range<u64>);

/// It is given what was appended, and ends when no more can come or a pack could not be synchronised.
type Thread = (SyncSender<Part>, JoinHandle<Result<()>>);

impl Writeback {
    /// Of what is written, so many bytes stay in the page cache when they are durable. The memory of the others is taken for
    /// what is written next, so that much that is written takes little memory: new memory costs more than hashing what goes
    /// there where the machine is a virtual one whose host has to find it first, and is taken from what is read again
    /// and again where there is no more.
    pub(crate) fn new(stay: u64) -> Self {
        Self { waiting: None, stay, thread: None }
    }

    /// This was written to a pack, behind all that was written there before.
    pub(crate) fn wrote(&mut self, pack: &Arc<Pack>, range: Range<u64>) {
        // The end of a pack that is full waits for the end of all.
        let same = self.waiting.take().filter(|(of, _)| Arc::ptr_eq(of, pack));
        let part = (Arc::clone(pack), same.map_or(range.start, |(_, before)| before.start)..range.end);
        let len = part.1.end - part.1.start;
        if len < STEP {
            self.waiting = Some(part);
            return;
        }
        if self.thread.is_none() {
            let (sender, parts) = mpsc::sync_channel::<Part>(0);
            let thread = std::thread::Builder::new().name("storage-sync".to_owned());
            let mut stay = self.stay;
            let synced = move || parts.into_iter().try_for_each(|part| write_back(&part, &mut stay));
            // Without a thread all is done at the end.
            self.thread = thread.spawn(synced).ok().map(|thread| (sender, thread));
        }
        let Some((sender, _)) = &self.thread else { return };
        if self.stay < u64::MAX && len >= MOST {
            let _ = sender.send(part);
            return;
        }
        // While it is busy with what it was given, more gathers.
        if let Err(TrySendError::Full(part)) = sender.try_send(part) {
            self.waiting = Some(part);
        }
    }

    /// Waits until nothing is under way, and says what went wrong.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let Some((sender, thread)) = self.thread.take() else { return Ok(()) };
        drop(sender);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Waits until nothing is under way: what is undone after this is not being written any more.
    pub(crate) fn stop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

impl Drop for Writeback {
    fn drop(&mut self) {
        self.stop();
    }
}

fn write_back((pack, range): &Part, stay: &mut u64) -> Result<()> {
    sync(pack)?;
    let staying = (range.end - range.start).min(*stay);
    *stay -= staying;
    let rest = range.start + staying..range.end;
    // Of no bytes it would be all up to the end of the file.
    if !rest.is_empty() {
        pack.file()?.drop_cached(&rest);
    }
    Ok(())
}

/// Makes what has been written to a pack durable.
pub(crate) fn sync(pack: &Pack) -> Result<()> {
    let synced = pack.file()?.sync_data();
    synced.map_err(|e| Error::io(e, format!("cannot write {}", pack.path.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    use super::*;
    use crate::fs::File;

    /// Tells it of so many bytes until it has taken them.
    fn insist(writeback: &mut Writeback, pack: &Arc<Pack>) {
        writeback.wrote(pack, 0..STEP);
        while writeback.waiting.is_some() {
            std::thread::yield_now();
            writeback.wrote(pack, STEP..STEP);
        }
    }

    /// Whether a file's bytes are read without the disk.
    fn is_cached(path: &Path, at: u64) -> bool {
        let (file, mut buf) = (std::fs::File::open(path).unwrap(), [0; 4096]);
        let bufs = &mut [std::io::IoSliceMut::new(&mut buf)];
        rustix::io::preadv2(file, bufs, at, rustix::io::ReadWriteFlags::NOWAIT).is_ok()
    }

    /// Whether this file system has a disk that what is dropped can be read from again.
    fn can_drop(path: &Path) -> bool {
        let file = std::fs::File::create_new(path).unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.sync_data().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        !is_cached(path, 0)
    }

    #[test]
    fn an_error_is_told_at_the_end_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        let lost = Arc::new(Pack::new(1, path.clone(), 2));
        let file = File::create_new(&path).unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        let good = Arc::new(Pack::with_file(1, path.clone(), file));
        std::fs::remove_file(&path).unwrap();

        let mut writeback = Writeback::new(u64::MAX);
        writeback.wrote(&lost, 0..STEP - 1);
        assert!(writeback.thread.is_none(), "it is not enough to begin with");
        writeback.finish().unwrap();

        let mut writeback = Writeback::new(u64::MAX);
        insist(&mut writeback, &good);
        insist(&mut writeback, &lost);
        // Nobody takes it any more, and nobody waits for that.
        insist(&mut writeback, &good);
        assert!(writeback.finish().is_err());
        writeback.finish().unwrap();
    }

    #[test]
    fn what_is_durable_leaves_the_page_cache_where_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        if !can_drop(&dir.path().join("any")) {
            eprintln!("skipped: {} is on a file system that keeps all in memory", dir.path().display());
            return;
        }
        for (stay, stays) in [(0, [false, false]), (STEP / 2, [true, false]), (u64::MAX, [true, true])] {
            let path = dir.path().join(stay.to_string());
            let file = File::create_new(&path).unwrap();
            file.write_all_at(&vec![1; STEP as usize + 4096], 0).unwrap();
            let pack = Arc::new(Pack::with_file(1, path.clone(), file));
            let mut writeback = Writeback::new(stay);
            insist(&mut writeback, &pack);
            writeback.finish().unwrap();
            assert_eq!([0, STEP / 2].map(|at| is_cached(&path, at)), stays, "{stay}");
            assert!(is_cached(&path, STEP), "of what is written behind it nothing goes");
        }
    }
}
