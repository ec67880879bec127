//! The two levels of tables that say where a qcow2 image has its clusters.

use crate::bytes::be64;
use crate::error::corrupt;
use crate::source::Source;
use crate::{OpenOptions, Result};

use super::header::{HEAD, Header};

/// Bits 9 to 55 of an entry: where a table or a cluster lies.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// What an L1 entry has besides: that nobody shares the table.
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Of an entry that is not compressed: it reads as zeroes, whatever lies there.
const ZERO: u64 = 1;

/// A qcow2 image's file, with a header and an L1 table that have been checked.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) source: Source,
    pub(super) header: Header,
    /// The L1 table, as it lies in the file.
    pub(super) l1: Vec<u8>,
    /// Where the L2 tables lie, in ascending order.
    l2: Vec<u64>,
}

/// Where a packed cluster lies; its last bytes may be those of the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Packed {
    /// What an L2 entry with [`COMPRESSED`] says.
    pub(super) fn of(entry: u64, cluster_bits: u32) -> Self {
        let offset_bits = 62 - (cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        Self { offset, len: (more_sectors + 1) * 512 - offset % 512 }
    }

    /// The L2 entry for this many bytes at `offset`.
    pub(super) fn entry(offset: u64, len: u64, cluster_bits: u32) -> u64 {
        let more_sectors = (offset + len - 1) / 512 - offset / 512;
        COMPRESSED | more_sectors << (62 - (cluster_bits - 8)) | offset
    }
}

impl Tables {
    /// Reads and checks the header and the L1 table.
    pub(super) fn load(source: Source, options: &OpenOptions) -> Result<Self> {
        let head = source.head(HEAD)?;
        let header = Header::parse(&head, source.len(), options)?;
        let mut l1 = vec![0; header.l1_entries as usize * 8];
        source.read_exact_at(&mut l1, header.l1_offset)?;
        let mut tables = Self { source, header, l1, l2: Vec::new() };
        tables.check_l1()?;
        Ok(tables)
    }

    /// No L2 table may lie outside of the file, on another table, or be two.
    fn check_l1(&mut self) -> Result<()> {
        let mut l2 = Vec::new();
        for entry in self.l1.chunks_exact(8).map(|entry| be64(entry, 0)) {
            if entry & !(OFFSET | COPIED) != 0 {
                return Err(corrupt(format!("the L1 table has an entry that none can be ({entry:#x})")));
            }
            match entry & OFFSET {
                0 => {}
                offset if self.is_free(offset) && offset + self.header.cluster() <= self.source.len() => {
                    l2.push(offset);
                }
                offset => return Err(corrupt(format!("an L2 table cannot lie at {offset}"))),
            }
        }
        l2.sort_unstable();
        if l2.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(corrupt("two parts of the disk share an L2 table"));
        }
        self.l2 = l2;
        Ok(())
    }

    /// Whether an L2 table or a cluster of data can begin at `offset`: it is aligned, something of it lies in the file,
    /// and neither the header nor a table does.
    fn is_free(&self, offset: u64) -> bool {
        let cluster = self.header.cluster();
        let table = self.header.l1_offset..self.header.l1_offset + self.l1.len() as u64;
        let taken = [&table, &self.header.refcount_table].iter().any(|table| table.contains(&offset));
        offset.is_multiple_of(cluster) && offset >= cluster && offset < self.source.len() && !taken
    }

    /// Where the next L2 table begins to matter, at or after an offset of the disk; its end where none does.
    pub(super) fn skip_holes(&self, offset: u64) -> u64 {
        let span = self.header.cluster() * (self.header.cluster() / 8);
        let first = (offset / span) as usize;
        let rest = self.l1.chunks_exact(8).skip(first);
        match rest.zip(first as u64..).find(|(entry, _)| be64(entry, 0) & OFFSET != 0) {
            Some((_, number)) => offset.max(number * span),
            None => self.header.size,
        }
    }

    pub(super) fn is_l2(&self, offset: u64) -> bool {
        self.l2.binary_search(&offset).is_ok()
    }

    /// Checks an L2 table that was read.
    pub(super) fn check_l2(&self, table: &[u8]) -> Result<()> {
        let bad = table.chunks_exact(8).map(|entry| be64(entry, 0)).find(|entry| !self.is_good(*entry));
        match bad {
            Some(entry) => Err(corrupt(format!("an L2 table has an entry that none can be ({entry:#x})"))),
            None => Ok(()),
        }
    }

    fn is_good(&self, entry: u64) -> bool {
        let bits = self.header.cluster_bits;
        if entry & COMPRESSED != 0 {
            let Packed { offset, len } = Packed::of(entry, bits);
            // It may touch two clusters.
            let ends = [offset, offset + len - 1].map(|at| at >> bits << bits);
            // A full cluster never is one sector longer packed than it is.
            return entry & COPIED == 0
                && offset < self.source.len()
                && len <= self.header.cluster() + 512
                && ends.iter().all(|at| *at != 0 && !self.is_metadata(*at));
        }
        let reserved = !(OFFSET | COPIED | if self.header.version == 2 { 0 } else { ZERO });
        let offset = entry & OFFSET;
        entry & reserved == 0 && (offset == 0 || self.is_free(offset) && !self.is_l2(offset))
    }

    fn is_metadata(&self, cluster: u64) -> bool {
        let table = self.header.l1_offset..self.header.l1_offset + self.l1.len() as u64;
        table.contains(&cluster) || self.header.refcount_table.contains(&cluster) || self.is_l2(cluster)
    }

    /// Where the packed cluster with the byte at `offset` of the disk lies, if it is one.
    pub(super) fn packed(&self, offset: u64) -> Result<Option<Packed>> {
        let bits = self.header.cluster_bits;
        let entries = self.header.cluster() / 8;
        let cluster = offset >> bits;
        let l2 = be64(&self.l1, (cluster / entries) as usize * 8) & OFFSET;
        if l2 == 0 {
            return Ok(None);
        }
        let mut entry = [0; 8];
        self.source.read_exact_at(&mut entry, l2 + cluster % entries * 8)?;
        self.check_l2(&entry)?;
        let entry = u64::from_be_bytes(entry);
        Ok((entry & COMPRESSED != 0).then(|| Packed::of(entry, bits)))
    }
}
