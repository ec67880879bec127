//! Writing a VMDK image in one file, once, grain after grain.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::bytes::put;
use crate::export::Write;
use crate::{Error, ErrorKind, Result, pack};

use super::SECTOR;
use super::header::{
    AT_END, COMPRESSED, GRAINS, Header, MARKER_DIRECTORY, MARKER_FOOTER, MARKER_TABLE, MARKERS, NEWLINES,
    REDUNDANT, TABLE_SECTORS,
};

/// 64 KiB, as everywhere.
const GRAIN: u64 = 128;
const GRAIN_BYTES: u64 = GRAIN * SECTOR;
/// The descriptor follows the header and has room for a user's additions.
const DESCRIPTOR: u64 = 1;
const DESCRIPTOR_LEN: u64 = 20;
/// How hard zlib tries, as where nobody asks for more.
const LEVEL: u8 = 6;

/// The kinds of image that are one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Grains packed with zlib, and what says where they lie after them.
    StreamOptimized,
    /// Grains as they are, after what says where they lie.
    MonolithicSparse,
}

/// An image that is being written.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    kind: Kind,
    name: String,
    header: Header,
    /// Where each grain table lies, in sectors; zero while it does not.
    directory: Vec<u32>,
    /// The grain table that grains are coming in for, and which one that is.
    table: Option<(usize, Vec<u32>)>,
    /// The end of what is taken in the file, in sectors.
    end: u64,
    /// Of all data so far; the image's content id is made of it.
    checksum: u32,
}

impl Writer {
    pub(crate) fn new(file: File, size: u64, name: &Path, kind: Kind) -> Result<Self> {
        let capacity = size / SECTOR;
        let (version, flags) = match kind {
            Kind::StreamOptimized => (3, NEWLINES | COMPRESSED | MARKERS),
            Kind::MonolithicSparse => (1, NEWLINES | REDUNDANT),
        };
        let mut header = Header {
            version,
            flags,
            capacity,
            grain: GRAIN,
            descriptor: DESCRIPTOR,
            descriptor_len: DESCRIPTOR_LEN,
            redundant_directory: 0,
            directory: AT_END,
            overhead: 0,
        };
        let mut end = DESCRIPTOR + DESCRIPTOR_LEN;
        let mut directory = vec![0; header.tables() as usize];
        if kind == Kind::MonolithicSparse {
            // Both directories, each with its tables after it. Those without grains stay holes of the file.
            let len = directory_len(&header) + header.tables() * TABLE_SECTORS;
            (header.redundant_directory, header.directory) = (end, end + len);
            end += 2 * len;
            for (table, number) in directory.iter_mut().zip(0..) {
                *table = sector(header.directory + directory_len(&header) + number * TABLE_SECTORS)?;
            }
        }
        header.overhead = end.next_multiple_of(GRAIN);
        let name = name.to_string_lossy().replace(|c: char| c == '"' || c.is_control(), "_");
        let end = header.overhead;
        Ok(Self { file, kind, name, header, directory, table: None, end, checksum: 0 })
    }

    fn write(&self, bytes: &[u8], sector: u64) -> Result<()> {
        self.file.write_all_at(bytes, sector * SECTOR).map_err(|e| Error::io(e, "cannot be written"))
    }

    /// Writes bytes after the last ones; says at which sector.
    fn append(&mut self, bytes: &[u8]) -> Result<u32> {
        let at = sector(self.end)?;
        self.write(bytes, self.end)?;
        self.end += (bytes.len() as u64).div_ceil(SECTOR);
        Ok(at)
    }

    /// Writes a marker, which says what follows and how many sectors it has.
    fn append_marker(&mut self, kind: u32, sectors: u64) -> Result<()> {
        let mut marker = [0; SECTOR as usize];
        put(&mut marker, 0, &sectors.to_le_bytes());
        put(&mut marker, 12, &kind.to_le_bytes());
        self.append(&marker).map(drop)
    }

    fn finish_table(&mut self) -> Result<()> {
        let Some((number, table)) = self.table.take() else { return Ok(()) };
        let bytes = little_endian(&table);
        match self.kind {
            Kind::StreamOptimized => {
                self.append_marker(MARKER_TABLE, TABLE_SECTORS)?;
                self.directory[number] = self.append(&bytes)?;
            }
            Kind::MonolithicSparse => {
                let place = u64::from(self.directory[number]);
                self.write(&bytes, place)?;
                self.write(&bytes, place - self.header.directory + self.header.redundant_directory)?;
            }
        }
        Ok(())
    }

    fn descriptor(&self) -> String {
        let kind = match self.kind {
            Kind::StreamOptimized => "streamOptimized",
            Kind::MonolithicSparse => "monolithicSparse",
        };
        // The last two ids say that there is no content, and that it may be another by now.
        let id = self.checksum.min(u32::MAX - 2);
        let (capacity, name) = (self.header.capacity, &self.name);
        let cylinders = capacity.div_ceil(255 * 63).min(65_535);
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={id:08x}\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n\
             # Extent description\nRW {capacity} SPARSE \"{name}\"\n\n\
             # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n"
        )
    }
}

impl Write for Writer {
    fn unit(&self) -> u64 {
        GRAIN_BYTES
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.checksum = crc32c::crc32c_append(self.checksum, &offset.to_le_bytes());
        self.checksum = crc32c::crc32c_append(self.checksum, bytes);
        let grain = (offset / GRAIN_BYTES) as usize;
        let (number, within) = (grain / GRAINS as usize, grain % GRAINS as usize);
        if self.table.as_ref().is_none_or(|(current, _)| *current != number) {
            self.finish_table()?;
            self.table = Some((number, vec![0; GRAINS as usize]));
        }
        let place = match self.kind {
            Kind::StreamOptimized => {
                let packed = pack::zlib(bytes, LEVEL);
                let packed = packed.ok_or_else(|| Error::new(ErrorKind::Io, "a grain cannot be packed"))?;
                let mut grain = Vec::with_capacity(12 + packed.len());
                grain.extend_from_slice(&(offset / SECTOR).to_le_bytes());
                grain.extend_from_slice(&(packed.len() as u32).to_le_bytes());
                grain.extend_from_slice(&packed);
                self.append(&grain)?
            }
            Kind::MonolithicSparse => self.append(bytes)?,
        };
        if let Some((_, table)) = &mut self.table {
            table[within] = place;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.finish_table()?;
        let directory = little_endian(&self.directory);
        match self.kind {
            Kind::StreamOptimized => {
                self.append_marker(MARKER_DIRECTORY, directory_len(&self.header))?;
                let place = self.append(&directory)?.into();
                self.append_marker(MARKER_FOOTER, 1)?;
                let footer = Header { directory: place, ..self.header };
                self.append(&footer.encode())?;
                // The end is a marker for nothing.
                self.append_marker(0, 0)?;
            }
            Kind::MonolithicSparse => {
                self.write(&directory, self.header.directory)?;
                let back = (self.header.directory - self.header.redundant_directory) as u32;
                let redundant: Vec<u32> = self.directory.iter().map(|table| table - back).collect();
                self.write(&little_endian(&redundant), self.header.redundant_directory)?;
            }
        }
        self.file.set_len(self.end * SECTOR).map_err(|e| Error::io(e, "cannot be written"))?;
        let mut descriptor = self.descriptor().into_bytes();
        descriptor.resize((DESCRIPTOR_LEN * SECTOR) as usize, 0);
        self.write(&descriptor, DESCRIPTOR)?;
        self.write(&self.header.encode(), 0)
    }
}

/// A place in the file as the tables say it.
fn sector(at: u64) -> Result<u32> {
    u32::try_from(at)
        .map_err(|_| Error::new(ErrorKind::TooLarge, "a VMDK image has no more than 2 TiB of data"))
}

/// How many sectors a directory has.
fn directory_len(header: &Header) -> u64 {
    (header.tables() * 4).div_ceil(SECTOR)
}

fn little_endian(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
