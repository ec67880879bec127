//! What is done to the files of stores and volumes, in one place.
//!
//! Whatever changes a file or a name, or makes either durable, is done here and by the standard library's
//! names, so that a test can record it and play it back into every state that a crash could leave. Nothing
//! is added to the calls outside of tests. Reading needs no recording, but tests can have it fail; paths are looked at and
//! listed with [`std::fs`].

use std::fs::{Metadata, OpenOptions};
use std::io::{self, Read};
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, FlockOperation, OFlags};

use crate::format::BLOCK;
use crate::store::parent;
#[cfg(test)]
use crate::tests::{
    fault,
    tape::{self, Op},
};
use crate::{IoBuf, buffer};

/// Does something that changes a file, and in tests has it recorded.
macro_rules! act {
    ($tape:expr, $op:expr, $act:expr) => {{
        #[cfg(test)]
        let result = tape::act($tape, || $op, || $act);
        #[cfg(not(test))]
        let result = $act;
        result
    }};
}

/// An open file. It gives out no descriptor but for reading, so that nothing is done to it unseen.
#[derive(Debug)]
pub(crate) struct File {
    file: std::fs::File,
    #[cfg(test)]
    track: Option<tape::Track>,
}

impl File {
    /// Opens a file for reading, and for being made durable.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).open(path).map(|file| Self::new(file, path))
    }

    /// Opens a file for reading and writing.
    pub(crate) fn open_writable(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(path).map(|file| Self::new(file, path))
    }

    /// Opens a file for writing past the page cache, in multiples that the file system names.
    pub(crate) fn open_direct(path: &Path) -> io::Result<Self> {
        let direct = OFlags::DIRECT.bits() as i32;
        OpenOptions::new().write(true).custom_flags(direct).open(path).map(|file| Self::new(file, path))
    }

    /// Opens a file for reading and writing, making it if it is not there.
    pub(crate) fn open_or_create(path: &Path) -> io::Result<Self> {
        Self::made(OpenOptions::new().read(true).write(true).create(true).truncate(false), path)
    }

    /// Makes a file that is not there yet.
    pub(crate) fn create_new(path: &Path) -> io::Result<Self> {
        Self::made(OpenOptions::new().read(true).write(true).create_new(true), path)
    }

    /// Makes a file, or empties the one that is there.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = Self::open_or_create(path)?;
        file.set_len(0)?;
        Ok(file)
    }

    fn made(options: &OpenOptions, path: &Path) -> io::Result<Self> {
        let file = act!(&tape::of(path), Op::Create { path: path.into() }, options.open(path))?;
        Ok(Self::new(file, path))
    }

    #[cfg_attr(not(test), expect(unused_variables, reason = "tests alone ask for the name"))]
    fn new(file: std::fs::File, path: &Path) -> Self {
        Self {
            file,
            #[cfg(test)]
            track: tape::of_file(path),
        }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            #[cfg(test)]
            track: self.track.clone(),
        })
    }

    /// The descriptor, to read from and for nothing else.
    pub(crate) fn for_reading(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes all of several buffers, from where they are.
    pub(crate) fn write_all_vectored_at(&self, mut bufs: &mut [IoBuf<'_>], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        let bytes = to_vec(bufs);
        act!(
            &self.track,
            Op::Write { offset, bytes },
            buffer::write_all_at(self.file.as_fd(), &mut bufs, offset)
        )
    }

    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        act!(&self.track, Op::SetLen { len }, self.file.set_len(len))
    }

    /// Sees to it that there is room for so many bytes, where the file system can; the file is as long as before.
    pub(crate) fn reserve(&self, len: u64) -> io::Result<()> {
        let reserve = || match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, len) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            reserved => reserved.map_err(io::Error::from),
        };
        act!(&self.track, Op::Reserve { len }, reserve())
    }

    /// Gives the space of a range back, where the file system can; the range reads as zeroes then.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        act!(
            &self.track,
            Op::Punch { offset, len },
            rustix::fs::fallocate(&self.file, flags, offset, len).map_err(io::Error::from)
        )
    }

    /// Makes the file's bytes and its length durable.
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        act!(&self.track, Op::Sync, self.file.sync_data())
    }

    /// The same with its metadata; not its name.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        act!(&self.track, Op::Sync, self.file.sync_all())
    }

    /// Has bytes on their way from the disk, where they are not in memory.
    pub(crate) fn fetch(&self, offset: u64, len: u64) {
        // Whoever reads them fetches them if nobody else has.
        let _ = rustix::fs::fadvise(&self.file, offset, NonZero::new(len), Advice::WillNeed);
    }

    pub(crate) fn flock(&self, operation: FlockOperation) -> rustix::io::Result<()> {
        rustix::fs::flock(&self.file, operation)
    }
}

/// What buffers that nobody else changes hold.
#[cfg(test)]
fn to_vec(bufs: &[IoBuf<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; buffer::total(bufs).unwrap_or(0) as usize];
    buffer::gather(bufs, &mut bytes);
    bytes
}

impl Read for File {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        #[cfg(test)]
        fault::check_next(&self.file, buf.len())?;
        self.file.read(buf)
    }
}

impl FileExt for File {
    #[inline]
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        #[cfg(test)]
        fault::check(&self.file, offset, buf.len())?;
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        act!(&self.track, Op::Write { offset, bytes: buf.into() }, self.file.write_at(buf, offset))
    }
}

/// Writes a file under a name of its own, makes its bytes durable and gives it the name `path`, whose
/// directory is still to be made durable. A failure leaves nothing.
pub(crate) fn write_named(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let create = |path: &Path| File::made(&options, path);
    let (file, temporary) = tempfile::Builder::new().suffix(".tmp").make_in(dir, create)?.into_parts();
    let written = file.write_all_at(bytes, 0).and_then(|()| file.sync_data());
    let named = written.and_then(|()| rename(&temporary, path));
    if named.is_err() {
        let _ = remove_file(&temporary);
    }
    // It has no such name any more.
    let _ = temporary.keep();
    named
}

pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    act!(&tape::of(from), Op::Rename { from: from.into(), to: to.into() }, std::fs::rename(from, to))
}

pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    act!(&tape::of(path), Op::Remove { path: path.into() }, std::fs::remove_file(path))
}

/// How long a file in a directory may be, up to `len`: one that never has a name is made as long, and nothing is left of it.
pub(crate) fn longest_file(dir: &Path, len: u64) -> io::Result<u64> {
    let probe = tempfile::tempfile_in(dir)?;
    let takes = |blocks: u64| match probe.set_len(blocks * BLOCK) {
        Err(e) if e.kind() == io::ErrorKind::FileTooLarge => Ok(false),
        taken => taken.map(|()| true),
    };
    let (mut longest, mut too_long) = (0, len / BLOCK + 1);
    let mut next = len / BLOCK;
    while too_long - longest > 1 {
        if takes(next)? {
            longest = next;
        } else {
            too_long = next;
        }
        next = longest.midpoint(too_long);
    }
    Ok(longest * BLOCK)
}

/// Makes a symbolic link, which need not lead anywhere: it comes with what it says, so that its name is all there is to make
/// durable.
pub(crate) fn symlink(target: &str, path: &Path) -> io::Result<()> {
    act!(
        &tape::of(path),
        Op::Symlink { path: path.into(), target: target.into() },
        std::os::unix::fs::symlink(target, path)
    )
}

pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    act!(&tape::of(path), Op::CreateDir { path: path.into() }, std::fs::create_dir(path))
}

/// Makes a directory and those above it. The names of those above are durable then, and its own is not yet.
pub(crate) fn create_dir_all(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    if !above.is_dir() {
        create_dir_all(above)?;
        sync_dir(parent(above))?;
    }
    match create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result,
    }
}

pub(crate) fn remove_dir(path: &Path) -> io::Result<()> {
    act!(&tape::of(path), Op::RemoveDir { path: path.into() }, std::fs::remove_dir(path))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    act!(
        &tape::of(path),
        Op::SyncDir { path: path.into() },
        std::fs::File::open(path).and_then(|dir| dir.sync_all())
    )
}
