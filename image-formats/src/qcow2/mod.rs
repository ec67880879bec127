//! qcow2 images.
//!
//! They are read through imago, which follows the tables. What imago does not do is done here: nothing of a hostile
//! image reaches it unchecked (`header`, `tables`, `guard`), packed clusters are unpacked, and images are written (`write`), which imago does without packing only.

mod guard;
mod header;
mod tables;
mod write;

use std::fmt;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};
use storage_block::{Disk, SECTOR};

use crate::error::corrupt;
use crate::read_only::{ReadImage, ReadOnly};
use crate::source::Source;
use crate::{Error, OpenOptions, Result, pack};

use guard::Guard;
use header::Packing;
use tables::Tables;

pub(crate) use write::{Options, Writer};

/// How far one look for data goes; a guest's tables may be long.
const DATA_STEP: u64 = 32 << 20;

/// Whether a file that begins so is a qcow2 image.
pub(crate) fn is_one(head: &[u8]) -> bool {
    head.starts_with(header::MAGIC)
}

/// Opens an image to be read.
pub(crate) fn open(source: Source, options: &OpenOptions) -> Result<Disk> {
    let name = source.name().to_owned();
    let tables = Arc::new(Tables::load(source, options)?);
    let opened =
        contain(|| Qcow2::<Guard>::builder(Guard::new(&tables)).open(DenyImplicitOpenGate::default()));
    let image = FormatAccess::new(opened.map_err(|e| e.into_error("the qcow2 image cannot be opened"))?);
    let image = ReadOnly::new(Image { image, tables }, name);
    Disk::new(image).map_err(|e| Error::disk(e, "the qcow2 image is no disk"))
}

/// A qcow2 image as a disk.
struct Image {
    image: FormatAccess<Guard>,
    tables: Arc<Tables>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("header", &self.tables.header).finish_non_exhaustive()
    }
}

/// What imago said, or that it panicked.
enum Failure {
    Said(io::Error),
    Panicked,
}

impl Failure {
    fn into_error(self, what: &str) -> Error {
        match self {
            Self::Said(e) if e.kind() == guard::FILE_FAILED => Error::io(e, what),
            Self::Said(e) => corrupt(format!("{what} ({e})")),
            Self::Panicked => corrupt(format!("{what}, and its reader gave up")),
        }
    }
}

/// Calls imago, whose panics would otherwise be the caller's. Its locks are not poisoned by one, and what they guard
/// are caches of tables that were read whole.
fn contain<T>(call: impl FnOnce() -> io::Result<T>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(Failure::Said),
        Err(_) => Err(Failure::Panicked),
    }
}

/// What there is at a place of the disk.
enum Part {
    Zeroes,
    Data,
    Packed,
}

impl Image {
    /// What there is at `offset`, and how far that goes.
    fn part(&self, offset: u64, len: u64) -> Result<(Part, u64)> {
        let found = contain(|| {
            let (mapping, len) = self.image.get_mapping(offset, len)?;
            let part = match mapping {
                Mapping::Raw { .. } => Part::Data,
                Mapping::Special { .. } => Part::Packed,
                _ => Part::Zeroes,
            };
            Ok((part, len))
        });
        match found {
            Ok((_, 0)) => Err(corrupt("the disk ends before its end")),
            found => found.map_err(|e| e.into_error("the tables of the qcow2 image cannot be read")),
        }
    }

    /// Reads from packed clusters. imago unpacks deflate too, but a stream that refers to what was before its beginning
    /// gets it what lay in memory there.
    fn read_packed(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let cluster = self.tables.header.cluster();
        let mut unpacked = vec![0; cluster as usize];
        while !buf.is_empty() {
            let gone = || corrupt("the qcow2 image has changed while it was read");
            let place = self.tables.packed(offset)?.ok_or_else(gone)?;
            let mut packed = vec![0; place.len as usize];
            self.tables.source.read_padded_at(&mut packed, place.offset)?;
            match self.tables.header.packing {
                Packing::Deflate => pack::inflate(&packed, &mut unpacked)?,
                Packing::Zstd => pack::unzstd(&packed, &mut unpacked)?,
            }
            let from = &unpacked[(offset % cluster) as usize..];
            let len = from.len().min(buf.len());
            let (now, later) = buf.split_at_mut(len);
            now.copy_from_slice(&from[..len]);
            buf = later;
            offset += len as u64;
        }
        Ok(())
    }
}

impl ReadImage for Image {
    fn size(&self) -> u64 {
        self.tables.header.size.next_multiple_of(SECTOR)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        // The disk in the image need not end with a sector.
        let there = self.tables.header.size.saturating_sub(offset).min(buf.len() as u64);
        let (buf, beyond) = buf.split_at_mut(there as usize);
        beyond.fill(0);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (part, len) = self.part(at, (buf.len() - done) as u64)?;
            let into = &mut buf[done..];
            let len = into.len().min(len as usize);
            match part {
                Part::Zeroes => into[..len].fill(0),
                Part::Data => {
                    let read = contain(|| self.image.read(&mut into[..len], at));
                    read.map_err(|e| e.into_error("the qcow2 image cannot be read"))?;
                }
                Part::Packed => self.read_packed(&mut into[..len], at)?,
            }
            done += len;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.tables.header.size;
        let mut at = offset;
        let mut start = None;
        while at < size && start.is_none_or(|start| at - start < DATA_STEP) {
            match (self.part(at, size - at)?, start) {
                ((Part::Zeroes, _), Some(_)) => break,
                ((Part::Zeroes, len), None) => at = self.tables.skip_holes(at + len),
                ((_, len), _) => {
                    start = start.or(Some(at));
                    at += len;
                }
            }
        }
        Ok(start.map(|start| start..at))
    }
}
