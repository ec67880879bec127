//! Reading files of an ext4 file system that nobody vouches for.
//!
//! The reader behind it is sound on ordinary images, but trusts some sizes that an image says. What
//! would make it panic, allocate without bound or run for hours is kept from it here: by checking
//! the superblock first, by resolving paths one name at a time so that the size of each directory
//! and link is known before it is read, and by looking at blocks as they go by.

use std::error::Error as StdError;
use std::io;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use crate::budget::Budget;
use crate::superblock::{self, Superblock};
use crate::window::Window;
use crate::{Error, ErrorKind, Result};

/// The largest directory that is searched; some 15,000 names.
const MAX_DIRECTORY: u64 = 1 << 20;
/// The longest target of a symbolic link, and the most links in a path, as in Linux.
const MAX_LINK: u64 = 4095;
const MAX_LINKS: u32 = 40;
/// The longest path, as in Linux; a longer one leads nowhere.
pub(crate) const MAX_PATH: usize = 4095;
/// How many bytes of a directory are gone through, and how many of a text are read and parsed, for a unit of
/// work. A list of all names costs as much as a text.
const DIRECTORY_PER_UNIT: u64 = 4096;
const TEXT_PER_UNIT: u64 = 256;

/// An ext4 file system, to be read.
#[derive(Debug)]
pub(crate) struct FileSystem {
    ext4: Ext4,
    budget: Budget,
}

/// What a path leads to.
struct Found {
    /// The path without links, `.` and `..`; empty for the root.
    path: String,
    is_directory: bool,
    is_file: bool,
    size: u64,
    /// What it takes to look up a name in it, if it is a directory. The reader begins at the root each time and
    /// may go through all of each directory on the way.
    reach: u64,
}

impl FileSystem {
    /// Opens the file system in `window`; `None` if what lies there is no ext4.
    pub(crate) fn open(mut window: Window, budget: &Budget) -> Result<Option<Self>> {
        if window.len() < superblock::OFFSET + superblock::SIZE as u64 {
            return Ok(None);
        }
        let mut bytes = Box::new([0; superblock::SIZE]);
        read(&mut window, &mut bytes[..], superblock::OFFSET)?;
        if !Superblock::is_one(&bytes) {
            return Ok(None);
        }
        let mut superblock = Superblock::parse(bytes, window.len())?;
        superblock.check_journal(|buf, offset| read(&mut window, buf, offset))?;
        let ext4 = Ext4::load(Box::new(Guard { window, superblock }))
            .map_err(|e| error(e, "the ext4 file system cannot be opened"))?;
        Ok(Some(Self { ext4, budget: budget.clone() }))
    }

    /// The file system's own id.
    pub(crate) fn uuid(&self) -> String {
        self.ext4.uuid().to_string()
    }

    pub(crate) fn is_directory(&self, path: &str) -> Result<bool> {
        Ok(self.find(path)?.is_some_and(|found| found.is_directory))
    }

    /// Where a path leads without symbolic links, `.` and `..`, if a regular file is there.
    pub(crate) fn file(&self, path: &str) -> Result<Option<String>> {
        Ok(self.find(path)?.filter(|found| found.is_file).map(|found| found.path))
    }

    /// The bytes of a regular file of at most `limit` bytes, or `None` if there is none.
    pub(crate) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(found) = self.find(path)?.filter(|found| found.is_file) else {
            return Ok(None);
        };
        if found.size > limit {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("{path} is {} bytes long; at most {limit} are read", found.size),
            ));
        }
        self.ext4.read(found.path.as_str()).map(Some).map_err(|e| error(e, format!("{path} cannot be read")))
    }

    /// As [`read`](Self::read), as text; bytes that are no UTF-8 are replaced.
    pub(crate) fn read_text(&self, path: &str, limit: u64) -> Result<Option<String>> {
        let Some(bytes) = self.read(path, limit)? else { return Ok(None) };
        self.budget.spend(1 + bytes.len() as u64 / TEXT_PER_UNIT)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The names in a directory, in no order; none if there is no such directory.
    pub(crate) fn names(&self, path: &str) -> Result<Vec<String>> {
        let Some(found) = self.find(path)?.filter(|found| found.is_directory) else {
            return Ok(Vec::new());
        };
        self.budget.spend(found.reach + found.size / TEXT_PER_UNIT)?;
        let failed = |e| error(e, format!("the directory {path} cannot be read"));
        let path = if found.path.is_empty() { "/" } else { found.path.as_str() };
        let mut names = Vec::new();
        for entry in self.ext4.read_dir(path).map_err(failed)? {
            // A name that is no UTF-8 is none that a boot loader's configuration could say.
            if let Ok(name) = entry.map_err(failed)?.file_name().as_str() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Follows a path from the root, one name at a time.
    fn find(&self, path: &str) -> Result<Option<Found>> {
        if path.len() > MAX_PATH {
            return Ok(None);
        }
        // What lies on the way, from the root on.
        let mut way = vec![self.look_at("", 0)?];
        let mut rest: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
        let mut links = 0;
        while let (Some(name), Some(parent)) = (rest.pop(), way.last()) {
            self.budget.spend(1)?;
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    way.truncate((way.len() - 1).max(1));
                    continue;
                }
                _ if !parent.is_directory => return Ok(None),
                _ => {}
            }
            let path = format!("{}/{name}", parent.path);
            let cannot = |e| error(e, format!("{path} cannot be looked up"));
            self.budget.spend(parent.reach)?;
            match self.ext4.symlink_metadata(path.as_str()) {
                Err(Ext4Error::NotFound | Ext4Error::MalformedPath | Ext4Error::PathTooLong) => {
                    return Ok(None);
                }
                Err(e) => return Err(cannot(e)),
                Ok(metadata) if metadata.is_symlink() => {
                    links += 1;
                    if links > MAX_LINKS || metadata.len() > MAX_LINK {
                        return Err(Error::new(
                            ErrorKind::Corrupt,
                            format!("{path} is too long a link, or one too many"),
                        ));
                    }
                    self.budget.spend(parent.reach)?;
                    let target = self.ext4.read_link(path.as_str()).map_err(cannot)?;
                    let Ok(target) = target.to_str() else { return Ok(None) };
                    if target.starts_with('/') {
                        way.truncate(1);
                    }
                    rest.extend(target.rsplit('/').map(str::to_owned));
                }
                Ok(_) => way.push(self.look_at(&path, parent.reach)?),
            }
        }
        Ok(way.pop())
    }

    /// What lies at a path without links, whose parent has been looked at and takes `reach` to look into.
    fn look_at(&self, path: &str, reach: u64) -> Result<Found> {
        self.budget.spend(reach)?;
        let shown = if path.is_empty() { "/" } else { path };
        let metadata = self
            .ext4
            .symlink_metadata(shown)
            .map_err(|e| error(e, format!("{shown} cannot be looked up")))?;
        let is_directory = metadata.is_dir();
        if is_directory && metadata.len() > MAX_DIRECTORY {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!(
                    "the directory {shown} is {} bytes long; at most {MAX_DIRECTORY} are read",
                    metadata.len()
                ),
            ));
        }
        let is_file = metadata.file_type().is_regular_file();
        let size = metadata.len();
        let reach = reach + 1 + size / DIRECTORY_PER_UNIT;
        Ok(Found { path: path.to_owned(), is_directory, is_file, size, reach })
    }
}

/// Hands blocks to the reader.
struct Guard {
    window: Window,
    superblock: Superblock,
}

impl Ext4Read for Guard {
    fn read(&mut self, start: u64, buf: &mut [u8]) -> Result<(), Box<dyn StdError + Send + Sync>> {
        if start == superblock::OFFSET && buf.len() == superblock::SIZE {
            buf.copy_from_slice(&self.superblock.for_reader());
            return Ok(());
        }
        self.window.read_exact_at(buf, start)?;
        let block_size = self.superblock.block_size;
        let are_blocks = start % block_size == 0 && buf.len() as u64 % block_size == 0;
        let mut blocks = buf.chunks(block_size as usize).filter(|_| are_blocks);
        match blocks.find_map(Superblock::costly_extent_node) {
            Some(why) => Err(io::Error::new(io::ErrorKind::Unsupported, why).into()),
            None => Ok(()),
        }
    }
}

fn read(window: &mut Window, buf: &mut [u8], offset: u64) -> Result<()> {
    window
        .read_exact_at(buf, offset)
        .map_err(|e| Error::new(io_kind(&e), "the ext4 file system cannot be read").because(e))
}

/// A block beyond the end of the partition is the image's fault, anything else the disk's.
fn io_kind(e: &io::Error) -> ErrorKind {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => ErrorKind::Corrupt,
        io::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

fn error(e: Ext4Error, context: impl Into<String>) -> Error {
    let kind = match &e {
        Ext4Error::Io(e) => e.downcast_ref().map_or(ErrorKind::Io, io_kind),
        Ext4Error::Incompatible(_) | Ext4Error::Encrypted => ErrorKind::Unsupported,
        _ => ErrorKind::Corrupt,
    };
    Error::new(kind, context).because(e)
}
