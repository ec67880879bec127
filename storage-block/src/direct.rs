//! Packs that are written past the page cache.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use rustix::io::Errno;

use crate::fs::File;
use crate::pack::Pack;
use crate::room::Room;
use crate::{Error, Result};

/// Bytes that are written at once: enough that what a write costs beside them is little.
const PART: usize = if cfg!(test) { 128 << 10 } else { 4 << 20 };
/// Parts there are when there is much: one is written while another is filled, and one waits so that the disk does not.
const PARTS: usize = 3;
/// What file systems say that want larger multiples, or do no such writes.
const REFUSED: [Errno; 2] = [Errno::INVAL, Errno::OPNOTSUPP];

/// Writes what a session appends to packs, and lets it go on meanwhile.
///
/// Much goes to the disk past the page cache: no memory is taken for it, nor from what is read again and again. What is
/// less than one part is written at the end and stays in the cache.
///
/// It promises nothing: what is to be durable is synchronised by whoever needs it, when all of it is written.
#[derive(Debug, Default)]
pub(crate) struct Direct {
    /// What is being filled.
    part: Option<Part>,
    thread: Option<Thread>,
}

/// A thread that writes parts until no more can come or one could not be written.
#[derive(Debug)]
struct Thread {
    parts: Sender<Part>,
    /// Memory of parts that are written.
    free: Receiver<Room>,
    handle: JoinHandle<Result<()>>,
}

/// Bytes of a pack that lie one behind the other.
#[derive(Debug)]
struct Part {
    pack: Arc<Pack>,
    at: u64,
    len: usize,
    /// Of [`PART`] bytes.
    room: Room,
}

impl Part {
    /// Whether bytes at this place come right behind it.
    fn goes_on(&self, pack: &Arc<Pack>, at: u64) -> bool {
        self.len < PART && self.at + self.len as u64 == at && Arc::ptr_eq(&self.pack, pack)
    }

    fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }

    fn write_cached(&self) -> Result<()> {
        self.pack.file()?.write_all_at(self.bytes(), self.at).map_err(|e| not_written(e, &self.pack))
    }
}

impl Direct {
    /// Has whole units written to a pack. It waits where the disk has fallen behind.
    ///
    /// An error may be that of what was to be written before.
    pub(crate) fn write(&mut self, pack: &Arc<Pack>, mut at: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.part.as_ref().is_some_and(|part| !part.goes_on(pack, at)) {
                self.send()?;
            }
            let part = match &mut self.part {
                Some(part) => part,
                None => {
                    let room = self.room()?;
                    self.part.insert(Part { pack: Arc::clone(pack), at, len: 0, room })
                }
            };
            let begin = part.len;
            let (now, rest) = bytes.split_at(bytes.len().min(PART - begin));
            part.room[begin..begin + now.len()].copy_from_slice(now);
            part.len += now.len();
            (at, bytes) = (at + now.len() as u64, rest);
        }
        Ok(())
    }

    /// Memory for a part: of ordinary pages for the first, as most snapshots have little to write.
    fn room(&mut self) -> Result<Room> {
        match self.thread.as_ref().map(|thread| thread.free.recv()) {
            None => Room::new(PART).map_err(|e| Error::io(e, NO_MEMORY)),
            Some(Ok(room)) => Ok(room),
            Some(Err(_)) => Err(self.stopped()),
        }
    }

    /// Gives a part to the thread.
    fn send(&mut self) -> Result<()> {
        let Some(part) = self.part.take() else { return Ok(()) };
        if self.thread.is_none() {
            self.thread = Thread::start();
        }
        match &self.thread {
            // All that is lost without a thread is time.
            None => part.write_cached(),
            Some(thread) => match thread.parts.send(part) {
                Ok(()) => Ok(()),
                Err(_) => Err(self.stopped()),
            },
        }
    }

    /// Why the thread takes nothing more.
    fn stopped(&mut self) -> Error {
        let what = "packs are not written any more";
        self.finish().err().unwrap_or_else(|| Error::new(crate::ErrorKind::Io, what))
    }

    /// Waits until all is written, and says what went wrong.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let part = self.part.take();
        let Some(Thread { parts, handle, free: _free }) = self.thread.take() else {
            return part.map_or(Ok(()), |part| part.write_cached());
        };
        // If it cannot take it, it says why.
        let _ = part.map(|part| parts.send(part));
        drop(parts);
        handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Direct {
    /// What is undone after this is not being written any more.
    fn drop(&mut self) {
        if let Some(Thread { parts, handle, .. }) = self.thread.take() {
            drop(parts);
            let _ = handle.join();
        }
    }
}

impl Thread {
    fn start() -> Option<Self> {
        let (give_back, free) = mpsc::channel();
        for _ in 0..PARTS {
            let _ = give_back.send(Room::of_large_pages(PART).ok()?);
        }
        let (parts, waiting) = mpsc::channel();
        let thread = std::thread::Builder::new().name("storage-write".to_owned());
        let handle = thread.spawn(move || write_parts(waiting, &give_back)).ok()?;
        Some(Self { parts, free, handle })
    }
}

fn write_parts(parts: Receiver<Part>, give_back: &Sender<Room>) -> Result<()> {
    let mut way: Option<Way> = None;
    for part in parts {
        let known = way.take().filter(|way| way.pack == part.pack.number);
        let mut now = known.unwrap_or_else(|| Way::to(&part.pack));
        now.write(&part)?;
        way = Some(now);
        // The first part's is not used again. Nobody takes the others' when there are no more parts.
        if part.room.has_large_pages() {
            let _ = give_back.send(part.room);
        }
    }
    Ok(())
}

/// How bytes get into a pack.
struct Way {
    pack: u32,
    /// Past the page cache; nothing where the file system knows no such way.
    direct: Option<File>,
}

impl Way {
    fn to(pack: &Pack) -> Self {
        // Who cannot be opened so may be written otherwise, and if not says why then.
        Self { pack: pack.number, direct: File::open_direct(&pack.path).ok() }
    }

    fn write(&mut self, part: &Part) -> Result<()> {
        if let Some(file) = &self.direct {
            match file.write_all_at(part.bytes(), part.at) {
                Err(error) if Errno::from_io_error(&error).is_some_and(|errno| REFUSED.contains(&errno)) => {
                    self.direct = None;
                }
                written => return written.map_err(|e| not_written(e, &part.pack)),
            }
        }
        part.write_cached()?;
        // Little is left to wait for at the end.
        part.pack.sync()
    }
}

const NO_MEMORY: &str = "there is no memory to write from";

fn not_written(error: std::io::Error, pack: &Pack) -> Error {
    Error::io(error, format!("cannot write {}", pack.path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::path::Path;

    use super::*;
    use crate::ErrorKind;
    use crate::testing::Random;

    fn pack(number: u32, path: &Path) -> Arc<Pack> {
        Arc::new(Pack::with_file(number, path.to_owned(), File::create_new(path).unwrap()))
    }

    fn bytes(len: usize, seed: u64) -> Vec<u8> {
        let mut random = Random(seed);
        (0..len).map(|_| random.below(256) as u8).collect()
    }

    /// Whether the byte there is read without the disk.
    fn is_cached(path: &Path, at: usize) -> bool {
        let (file, mut buf) = (std::fs::File::open(path).unwrap(), [0]);
        let bufs = &mut [std::io::IoSliceMut::new(&mut buf)];
        rustix::io::preadv2(file, bufs, at as u64, rustix::io::ReadWriteFlags::NOWAIT).is_ok()
    }

    /// Whether this file system has a disk that what is written past the page cache can be told by.
    fn has_disk(dir: &Path) -> bool {
        let path = dir.join("any");
        let room = Room::new(4096).unwrap();
        File::create_new(&path).unwrap();
        let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
        let file = std::fs::OpenOptions::new().write(true).custom_flags(direct).open(&path);
        let written = file.and_then(|file| file.write_all_at(&room, 0));
        written.is_ok() && !is_cached(&path, 0)
    }

    /// Objects of all lengths, behind each other in packs that follow each other. Some begin where the one before has ended.
    #[test]
    fn what_is_given_in_any_pieces_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(7);
        for round in 0..20 {
            let mut direct = Direct::default();
            let (mut expected, mut end) = (Vec::new(), 4096);
            for number in 0..=random.below(3) as u32 {
                let path = dir.path().join(format!("{round}-{number}"));
                let pack = pack(number, &path);
                let begin = if round % 2 == 0 { end } else { 4096 };
                let mut content = vec![0; begin];
                for piece in 0..random.below(40) {
                    let bytes = bytes(4096 * (1 + random.below(80)) as usize, piece);
                    direct.write(&pack, content.len() as u64, &bytes).unwrap();
                    content.extend(bytes);
                }
                end = content.len();
                expected.push((path, begin, content));
            }
            direct.finish().unwrap();
            for (path, begin, content) in expected {
                let found = std::fs::read(&path).unwrap();
                assert_eq!(found.len(), if content.len() > begin { content.len() } else { 0 });
                assert!(found == content[..found.len()], "{}", path.display());
            }
        }
    }

    #[test]
    fn much_goes_past_the_page_cache_and_little_stays() {
        let dir = tempfile::tempdir().unwrap();
        if !has_disk(dir.path()) {
            eprintln!("SKIPPED: {} is on no disk; nothing goes past its page cache", dir.path().display());
            return;
        }
        for (len, cached) in [(PART, true), (PART + 4096, false), (5 * PART + 4096, false)] {
            let path = dir.path().join(format!("{len}"));
            let mut direct = Direct::default();
            direct.write(&pack(1, &path), 0, &bytes(len, 1)).unwrap();
            direct.finish().unwrap();
            let found = [0, len - 1].map(|at| is_cached(&path, at));
            assert_eq!(found, [cached; 2], "{len} bytes");
            assert!(std::fs::read(&path).unwrap() == bytes(len, 1), "{len} bytes");
        }
    }

    /// All parts but the first, which is all of most snapshots.
    #[test]
    fn much_is_written_from_large_pages() {
        let dir = tempfile::tempdir().unwrap();
        let pack = pack(1, &dir.path().join("pack"));
        let mut direct = Direct::default();
        for number in 0..5 * PARTS {
            direct.write(&pack, (number * PART) as u64, &bytes(PART, 1)).unwrap();
            let large = direct.part.as_ref().map(|part| part.room.has_large_pages());
            assert_eq!(large, Some(number > 0), "part {number}");
        }
        direct.finish().unwrap();
    }

    /// A file that cannot be opened so, and places that are no multiples of what the file system wants.
    #[test]
    fn what_cannot_go_past_the_page_cache_goes_through_it() {
        let dir = tempfile::tempdir().unwrap();
        let content = bytes(3 * PART, 3);
        for (at, removed) in [(0, true), (100, false)] {
            let path = dir.path().join("pack");
            let pack = pack(1, &path);
            if removed {
                std::fs::remove_file(&path).unwrap();
            }
            let mut direct = Direct::default();
            direct.write(&pack, at, &content).unwrap();
            direct.finish().unwrap();
            let mut found = vec![0; content.len()];
            pack.file().unwrap().read_exact_at(&mut found, at).unwrap();
            assert!(found == content, "at {at}");
        }
    }

    #[test]
    fn an_error_is_told_and_nothing_waits_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let lost = Arc::new(Pack::new(1, dir.path().join("lost"), 2));
        let content = bytes(PART, 1);
        let mut direct = Direct::default();
        direct.write(&lost, 0, &content).unwrap();
        let mut at = PART as u64;
        let error = loop {
            match direct.write(&lost, at, &content) {
                Ok(()) => at += PART as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(at <= (PARTS as u64 + 1) * PART as u64, "it was taken on to {at}");

        // One that comes to light at the end.
        for len in [4096, PART + 4096] {
            let mut direct = Direct::default();
            direct.write(&lost, 0, &bytes(len, 1)).unwrap();
            assert_eq!(direct.finish().unwrap_err().kind(), ErrorKind::NotFound, "{len} bytes");
            direct.finish().unwrap();
        }
    }
}
