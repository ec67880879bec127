//! An extent that has its data in grains, packed or not.

use std::ops::Range;

use crate::bytes::{le32, le64};
use crate::error::{corrupt, unsupported};
use crate::source::Source;
use crate::{Error, ErrorKind, OpenOptions, Result, pack};

use super::SECTOR;
use super::descriptor::{self, Descriptor};
use super::header::{AT_END, COMPRESSED, GRAINS, Header, LEN, MARKER_FOOTER, TABLE_SECTORS, ZERO_GRAINS};

/// The largest grain directory: of 128 TiB in grains of 64 KiB.
const MAX_DIRECTORY: u64 = 16 << 20;
/// What precedes a packed grain: its first sector of the disk, and its length.
const GRAIN_MARKER: usize = 12;

/// An extent whose header and grain directory have been checked.
#[derive(Debug)]
pub(super) struct Sparse {
    source: Source,
    header: Header,
    /// Where the grain tables lie, in sectors; zero for those that are not there.
    directory: Vec<u32>,
    /// The same in ascending order, without those.
    tables: Vec<u32>,
    /// Where the directory lies, in sectors.
    place: Range<u64>,
}

impl Sparse {
    /// Opens a file that is an image of its own.
    pub(super) fn open(source: Source, options: &OpenOptions) -> Result<(Self, Descriptor)> {
        let header = Header::parse(&source.head(LEN)?)?;
        options.check_size(header.capacity * SECTOR)?;
        if header.descriptor == 0 {
            return Err(unsupported("the file is one extent of a VMDK image; open the image's descriptor"));
        }
        if header.descriptor_len > descriptor::MAX_LEN / SECTOR {
            return Err(Error::new(ErrorKind::TooLarge, "the VMDK descriptor is too long"));
        }
        let mut text = vec![0; (header.descriptor_len * SECTOR) as usize];
        let offset = header.descriptor.checked_mul(SECTOR);
        let offset = offset.ok_or_else(|| corrupt("the VMDK descriptor does not lie where one can"))?;
        source.read_exact_at(&mut text, offset)?;
        let descriptor = Descriptor::parse_text(&text)?;
        let sparse = Self::load(source)?;
        // A footer may say something else.
        options.check_size(sparse.size())?;
        Ok((sparse, descriptor))
    }

    /// Opens an extent.
    pub(super) fn load(source: Source) -> Result<Self> {
        let mut header = Header::parse(&source.head(LEN)?)?;
        if header.directory == AT_END {
            header = footer(&source)?;
        }
        let len = header.tables() * 4;
        if len > MAX_DIRECTORY {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "the grain directory of the VMDK image is too large",
            ));
        }
        let mut bytes = vec![0; len as usize];
        let offset = header.directory.checked_mul(SECTOR).filter(|offset| *offset != 0);
        let offset = offset.ok_or_else(|| corrupt("the grain directory does not lie where one can"))?;
        source.read_exact_at(&mut bytes, offset)?;
        let directory: Vec<u32> = bytes.chunks_exact(4).map(|entry| le32(entry, 0)).collect();
        let mut tables: Vec<u32> = directory.iter().copied().filter(|table| *table != 0).collect();
        tables.sort_unstable();
        let place = header.directory..header.directory + len.div_ceil(SECTOR);
        let sparse = Self { source, header, directory, tables, place };
        sparse.check_tables()?;
        Ok(sparse)
    }

    /// No grain table may lie outside of the file, or on the directory or another table.
    fn check_tables(&self) -> Result<()> {
        let ranges = self.tables.iter().map(|table| u64::from(*table)..u64::from(*table) + TABLE_SECTORS);
        let mut last = 1;
        for table in ranges {
            let overlaps = table.start < self.place.end && self.place.start < table.end;
            if table.start < last || overlaps || table.end * SECTOR > self.source.len() {
                return Err(corrupt(format!("a grain table cannot lie at sector {}", table.start)));
            }
            last = table.end;
        }
        Ok(())
    }

    pub(super) fn size(&self) -> u64 {
        self.header.capacity * SECTOR
    }

    fn grain(&self) -> u64 {
        self.header.grain * SECTOR
    }

    /// Reads some entries of a grain table.
    fn entries(&self, first: u64, count: u64) -> Result<Vec<u32>> {
        let table = self.directory.get((first / GRAINS) as usize).copied().unwrap_or(0);
        let mut bytes = vec![0; count as usize * 4];
        if table != 0 {
            self.source.read_exact_at(&mut bytes, u64::from(table) * SECTOR + first % GRAINS * 4)?;
        }
        Ok(bytes.chunks_exact(4).map(|entry| le32(entry, 0)).collect())
    }

    fn is_hole(&self, entry: u32) -> bool {
        entry == 0 || entry == 1 && self.header.flags & ZERO_GRAINS != 0
    }

    /// Whether a grain may begin at a sector: something of it lies in the file, and no table does.
    fn is_free(&self, sector: u64) -> bool {
        let before = self.tables.partition_point(|table| u64::from(*table) <= sector);
        let in_table = before > 0 && sector < u64::from(self.tables[before - 1]) + TABLE_SECTORS;
        sector * SECTOR < self.source.len() && !in_table && !self.place.contains(&sector)
    }

    /// Fills `buf` with the bytes at `offset`, all of which are the extent's.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let grain = self.grain();
        let mut done = 0;
        while done < buf.len() {
            // As many grains as one table has.
            let at = offset + done as u64;
            let (first, within) = (at / grain, at % grain);
            let count = (within + (buf.len() - done) as u64).div_ceil(grain).min(GRAINS - first % GRAINS);
            let len = (count * grain - within).min((buf.len() - done) as u64) as usize;
            let entries = self.entries(first, count)?;
            let mut rest = &mut buf[done..done + len];
            let mut within = within;
            for (entry, number) in entries.into_iter().zip(first..) {
                let (part, later) = rest.split_at_mut(rest.len().min((grain - within) as usize));
                self.read_grain(part, entry, number, within)?;
                (rest, within) = (later, 0);
            }
            done += len;
        }
        Ok(())
    }

    /// Reads a part of a grain.
    fn read_grain(&self, buf: &mut [u8], entry: u32, number: u64, within: u64) -> Result<()> {
        if self.is_hole(entry) {
            buf.fill(0);
            return Ok(());
        }
        let sector = u64::from(entry);
        if !self.is_free(sector) {
            return Err(corrupt(format!("a grain cannot lie at sector {sector}")));
        }
        if self.header.flags & COMPRESSED == 0 {
            // The last grain need not be all there.
            return self.source.read_padded_at(buf, sector * SECTOR + within);
        }
        let unpacked = self.unpack(sector, number)?;
        let from = &unpacked[within as usize..];
        buf.copy_from_slice(&from[..buf.len()]);
        Ok(())
    }

    fn unpack(&self, sector: u64, number: u64) -> Result<Vec<u8>> {
        let mut marker = [0; GRAIN_MARKER];
        self.source.read_exact_at(&mut marker, sector * SECTOR)?;
        let len = le32(&marker, 8) as usize;
        let mut unpacked = vec![0; self.grain() as usize];
        // Deflate makes nothing longer by more than a few bytes for each of its blocks.
        if le64(&marker, 0) != number * self.header.grain || len > unpacked.len() + unpacked.len() / 64 + 64 {
            return Err(corrupt(format!("sector {sector} does not hold the grain that it should")));
        }
        let mut packed = vec![0; len];
        self.source.read_exact_at(&mut packed, sector * SECTOR + GRAIN_MARKER as u64)?;
        let filled = pack::unzlib(&packed, &mut unpacked)?;
        let wanted = (self.size() - number * self.grain()).min(self.grain());
        if (filled as u64) < wanted {
            return Err(corrupt(format!("the grain at sector {sector} is too short")));
        }
        Ok(unpacked)
    }

    /// The next grains that are there, at or after `offset`, as far as one table says.
    pub(super) fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let (grain, grains) = (self.grain(), self.size().div_ceil(self.grain()));
        let mut at = offset / grain;
        while at < grains {
            let count = (GRAINS - at % GRAINS).min(grains - at);
            if self.directory.get((at / GRAINS) as usize).is_some_and(|table| *table != 0) {
                let holes: Vec<bool> =
                    self.entries(at, count)?.into_iter().map(|e| self.is_hole(e)).collect();
                if let Some(start) = holes.iter().position(|hole| !hole) {
                    let len = holes[start..].iter().position(|hole| *hole).unwrap_or(holes.len() - start);
                    let start = at + start as u64;
                    return Ok(Some(start * grain..((start + len as u64) * grain).min(self.size())));
                }
            }
            at += count;
        }
        Ok(None)
    }
}

/// The header at the end of an image that was streamed: a marker, the header, and an end, of a sector each.
fn footer(source: &Source) -> Result<Header> {
    let mut end = [0; 3 * LEN];
    let offset = source.len().checked_sub(end.len() as u64);
    source.read_exact_at(&mut end, offset.ok_or_else(|| corrupt("the VMDK image is cut short"))?)?;
    let [marker, header, last] = [0, 1, 2].map(|sector| &end[sector * LEN..][..LEN]);
    if le32(marker, 12) != MARKER_FOOTER || le64(last, 0) != 0 || le64(last, 8) != 0 {
        return Err(corrupt("the VMDK image does not end with a footer"));
    }
    let header = Header::parse(header)?;
    if header.directory == AT_END {
        return Err(corrupt("the VMDK image's footer names no grain directory"));
    }
    Ok(header)
}
