//! The file under the state store: a `redb` database that bears a full disk, a crash at any moment
//! and bytes that are not its own.

#![expect(clippy::result_large_err, reason = "redb's errors are large; they become ours before they leave")]

use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::backends::FileBackend;
use redb::{Database as Redb, StorageBackend};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// A result with redb's error.
pub(crate) type Result<T, E = redb::Error> = std::result::Result<T, E>;

/// An open database.
///
/// After an error of the operating system redb refuses everything until the file is opened again,
/// so that is done, as if the process had crashed in the middle of the failed commit.
#[derive(Debug)]
pub(crate) struct Database {
    file: PathBuf,
    /// `None` while it could not be opened again.
    open: RwLock<Option<Redb>>,
}

impl Database {
    /// Opens the database in `file`, made when it is not there.
    pub(crate) fn open(file: &Path) -> Result<Self> {
        if !file.try_exists()? {
            create(file)?;
        }
        let open = RwLock::new(Some(open(file)?));
        Ok(Self { file: file.to_owned(), open })
    }

    /// Does something with the database. It is done a second time if it came to nothing because of
    /// an earlier failure.
    pub(crate) fn with<T>(&self, act: impl Fn(&Redb) -> Result<T>) -> Result<T> {
        match self.attempt(&act) {
            Err(redb::Error::PreviousIo) => self.attempt(&act),
            result => result,
        }
    }

    fn attempt<T>(&self, act: impl Fn(&Redb) -> Result<T>) -> Result<T> {
        let result = match &*self.open.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => contained(|| act(database)),
            None => Err(redb::Error::PreviousIo),
        };
        if let Err(redb::Error::Io(_) | redb::Error::PreviousIo | redb::Error::Corrupted(_)) = &result {
            let mut database = self.open.write().unwrap_or_else(PoisonError::into_inner);
            // Closed before it is opened again: it is locked.
            *database = None;
            *database = Some(open(&self.file)?);
        }
        result
    }
}

/// Makes a database that is there whole or not at all: one that was being laid out in a crash
/// could not be opened.
fn create(file: &Path) -> Result<()> {
    let half_made = file.with_extension("tmp");
    match fs::remove_file(&half_made) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let made = open(&half_made).and_then(|database| {
        drop(database);
        fs::rename(&half_made, file)?;
        let dir = file.parent().unwrap_or(Path::new("."));
        Ok(File::open(dir)?.sync_all()?)
    });
    if made.is_err() {
        // The error that made it fail is the one to tell.
        let _ = fs::remove_file(&half_made);
    }
    made
}

fn open(file: &Path) -> Result<Redb> {
    contained(|| {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(file)?;
        let backend = Reserved { file: file.try_clone()?, backend: FileBackend::new(file)? };
        // The format of redb 3 and 4, so that a later version reads what this one wrote.
        Ok(Redb::builder().create_with_file_format_v3(true).create_with_backend(backend)?)
    })
}

/// redb asserts what it finds in its file, and a file that was tampered with is no reason to panic.
fn contained<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(act))
        .unwrap_or_else(|_| Err(redb::Error::Corrupted("its pages contradict each other".to_owned())))
}

/// A file whose blocks are all there from the moment that it grows: a commit within its length then
/// needs no space, and what gives space back can be committed to a disk that is full.
#[derive(Debug)]
struct Reserved {
    backend: FileBackend,
    file: File,
}

impl StorageBackend for Reserved {
    fn len(&self) -> io::Result<u64> {
        self.backend.len()
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.backend.read(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.len()? {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len) {
                // A file system that reserves nothing.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                reserved => reserved?,
            }
        }
        self.backend.set_len(len)
    }

    fn sync_data(&self, eventual: bool) -> io::Result<()> {
        self.backend.sync_data(eventual)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.backend.write(offset, data)
    }
}
