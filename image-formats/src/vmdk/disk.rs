//! Extents one after the other as a disk.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use storage_block::{Disk, RawFile};

use crate::error::corrupt;
use crate::read_only::ReadImage;
use crate::source::Source;
use crate::{Error, ErrorKind, Result};

use super::SECTOR;
use super::descriptor::{Descriptor, Place};
use super::sparse::Sparse;

/// A part of the disk.
#[derive(Debug)]
pub(super) enum Extent {
    Zeroes(u64),
    /// So many bytes of a file, from an offset.
    Flat(Disk, u64, u64),
    Sparse(Sparse),
}

impl Extent {
    fn size(&self) -> u64 {
        match self {
            Self::Zeroes(size) | Self::Flat(_, _, size) => *size,
            Self::Sparse(sparse) => sparse.size(),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Self::Zeroes(_) => {
                buf.fill(0);
                Ok(())
            }
            Self::Flat(disk, start, _) => disk.read_at(buf, start + offset).map_err(unreadable),
            Self::Sparse(sparse) => sparse.read_at(buf, offset),
        }
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        match self {
            Self::Zeroes(_) => Ok(None),
            Self::Flat(disk, start, size) => {
                let found = disk.next_data(start + offset).map_err(unreadable)?;
                let found = found.map(|found| found.start - start..(found.end - start).min(*size));
                Ok(found.filter(|found| found.start < found.end))
            }
            Self::Sparse(sparse) => sparse.next_data(offset),
        }
    }
}

fn unreadable(e: storage_block::Error) -> Error {
    Error::disk(e, "an extent of the VMDK image cannot be read")
}

/// Opens the files of a descriptor, all in `directory`; where there is none, an image may have none.
pub(super) fn assemble(descriptor: &Descriptor, directory: Option<&Path>) -> Result<Image> {
    let mut extents = Vec::new();
    for part in &descriptor.parts {
        let size = part.sectors * SECTOR;
        if size == 0 {
            continue;
        }
        extents.push(match &part.place {
            Place::Zeroes => Extent::Zeroes(size),
            Place::Flat(name, sector) => {
                let source = open_beside(directory, name)?;
                let start = sector.checked_mul(SECTOR);
                let end = start.and_then(|start| start.checked_add(size));
                if end.is_none_or(|end| end > source.len()) {
                    return Err(corrupt(format!(
                        "the extent {name:.80} is shorter than the VMDK image says"
                    )));
                }
                let raw = RawFile::from_file(source.into_file(), true).map_err(unreadable)?;
                let raw = raw.named(format_args!("the extent {name:.80}"));
                Extent::Flat(raw.into_disk(), start.unwrap_or(0), size)
            }
            Place::Sparse(name) => {
                let sparse = Sparse::load(open_beside(directory, name)?)?;
                if sparse.size() != size {
                    return Err(corrupt(format!(
                        "the extent {name:.80} is not as long as the VMDK image says"
                    )));
                }
                Extent::Sparse(sparse)
            }
        });
    }
    Ok(Image::new(extents))
}

/// Opens a file of a directory. Its name, which the image says, may lead nowhere else.
fn open_beside(directory: Option<&Path>, name: &str) -> Result<Source> {
    let other = |why: &str| Error::new(ErrorKind::OtherFile, format!("the VMDK image {why} ({name:.80})"));
    let Some(directory) = directory else {
        return Err(other("has its disk in other files, which was not allowed"));
    };
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(other("names a file outside of its directory"));
    }
    let path = if directory.as_os_str().is_empty() { Path::new(name) } else { &directory.join(name) };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(file) => {
            Source::from_file(File::from(file)).map_err(|e| e.about(format_args!("the extent {name:.80}")))
        }
        Err(rustix::io::Errno::LOOP) => Err(other("has an extent that is a symbolic link")),
        Err(error) => Err(Error::io(error.into(), format!("the extent {name:.80} cannot be opened"))),
    }
}

/// A VMDK image as a disk.
#[derive(Debug)]
pub(super) struct Image {
    /// With where each begins; none is empty.
    extents: Vec<(u64, Extent)>,
    size: u64,
}

impl Image {
    pub(super) fn new(extents: Vec<Extent>) -> Self {
        let mut size = 0;
        let place = |extent: Extent| {
            let start = size;
            size += extent.size();
            (start, extent)
        };
        let extents = extents.into_iter().map(place).collect();
        Self { extents, size }
    }

    /// The extents from the one with the byte at `offset` on.
    fn from(&self, offset: u64) -> &[(u64, Extent)] {
        let after = self.extents.partition_point(|(start, _)| *start <= offset);
        &self.extents[after.saturating_sub(1)..]
    }
}

impl ReadImage for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        for (start, extent) in self.from(offset) {
            if buf.is_empty() {
                break;
            }
            let within = offset - start;
            let len = (extent.size() - within).min(buf.len() as u64) as usize;
            let (part, rest) = buf.split_at_mut(len);
            extent.read_at(part, within)?;
            (buf, offset) = (rest, offset + len as u64);
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        for (start, extent) in self.from(offset) {
            if let Some(found) = extent.next_data(offset.saturating_sub(*start))? {
                return Ok(Some(start + found.start..start + found.end));
            }
        }
        Ok(None)
    }
}
