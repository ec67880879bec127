//! Writing a qcow2 image from its first cluster to its last, once.
//!
//! From the specification, "Qcow2 Image File Format" in QEMU's documentation (docs/interop/qcow2): version 3, refcounts
//! of 16 bits. Clusters of data and the L2 tables lie in the order in which they became known; the refcounts follow
//! when all of that is, and then the L1 table and the header are put in the place kept for them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::bytes::put;
use crate::export::Write;
use crate::{Compression, Error, ErrorKind, Result, pack};

use super::header::{CLUSTER_BITS, COMPRESSION, COMPRESSION_TYPE, LEN_3, MAGIC, MAX_L1};
use super::tables::{COPIED, Packed};

/// How hard deflate tries, as where nobody asks for more.
const LEVEL: u8 = 6;

/// How an image is to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    cluster_bits: u32,
    compression: Compression,
}

impl Options {
    pub(crate) fn new(cluster_size: u64, compression: Compression) -> Result<Self> {
        let cluster_bits = cluster_size.trailing_zeros();
        if !cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
            let context = format!("a qcow2 image cannot have clusters of {cluster_size} bytes");
            return Err(Error::new(ErrorKind::InvalidOption, context));
        }
        Ok(Self { cluster_bits, compression })
    }
}

/// An image that is being written.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    options: Options,
    size: u64,
    l1: Vec<u64>,
    /// The L2 table that clusters are coming in for, and which one that is.
    l2: Option<(usize, Vec<u64>)>,
    /// Of each cluster of the file, so far.
    refcounts: Vec<u16>,
    /// The end of what is taken in the file.
    end: u64,
}

impl Writer {
    pub(crate) fn new(file: File, size: u64, options: Options) -> Result<Self> {
        let cluster = 1u64 << options.cluster_bits;
        let entries = size.div_ceil(cluster * (cluster / 8));
        if entries * 8 > MAX_L1 {
            let context = format!("a disk of {size} bytes needs clusters of more than {cluster}");
            return Err(Error::new(ErrorKind::InvalidOption, context));
        }
        let l1 = vec![0; entries as usize];
        let mut writer = Self { file, options, size, l1, l2: None, refcounts: Vec::new(), end: 0 };
        writer.take(1 + (entries * 8).div_ceil(cluster));
        Ok(writer)
    }

    fn cluster(&self) -> u64 {
        1 << self.options.cluster_bits
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|e| Error::io(e, "cannot be written"))
    }

    /// Takes whole clusters; says where they begin.
    fn take(&mut self, clusters: u64) -> u64 {
        let offset = self.end.next_multiple_of(self.cluster());
        self.end = offset + clusters * self.cluster();
        self.refcounts.resize((self.end >> self.options.cluster_bits) as usize, 1);
        offset
    }

    /// Takes so many bytes right after the last ones; each cluster that they touch is used once more.
    fn take_packed(&mut self, len: u64) -> u64 {
        let bits = self.options.cluster_bits;
        let current = (self.end >> bits) as usize;
        if self.refcounts.get(current) == Some(&u16::MAX) {
            self.end = self.end.next_multiple_of(self.cluster());
        }
        let offset = self.end;
        self.end += len;
        let touched = (offset >> bits) as usize..=((self.end - 1) >> bits) as usize;
        self.refcounts.resize(self.refcounts.len().max(touched.end() + 1), 0);
        for count in &mut self.refcounts[touched] {
            *count += 1;
        }
        offset
    }

    /// Writes one cluster; says what its L2 entry is.
    fn put_cluster(&mut self, bytes: &[u8]) -> Result<u64> {
        let limit = bytes.len() - 1;
        let packed = match self.options.compression {
            Compression::None => None,
            Compression::Zlib => pack::deflate(bytes, LEVEL, limit),
            Compression::Zstd => pack::zstd(bytes, limit),
        };
        if let Some(packed) = packed {
            let len = packed.len() as u64;
            let offset = self.take_packed(len);
            self.write(&packed, offset)?;
            return Ok(Packed::entry(offset, len, self.options.cluster_bits));
        }
        let offset = self.take(1);
        self.write(bytes, offset)?;
        Ok(offset | COPIED)
    }

    fn finish_l2(&mut self) -> Result<()> {
        if let Some((number, table)) = self.l2.take() {
            let offset = self.take(1);
            self.write(&big_endian(&table), offset)?;
            self.l1[number] = offset | COPIED;
        }
        Ok(())
    }

    /// Writes refcounts for all that is there and for themselves; says where their table lies, and its clusters.
    fn write_refcounts(&mut self) -> Result<(u64, u64)> {
        let cluster = self.cluster();
        let used = self.end.div_ceil(cluster);
        let (mut blocks, mut tables) = (0, 0);
        loop {
            let needed = (used + blocks + tables).div_ceil(cluster / 2);
            let needed = (needed, needed.div_ceil(cluster / 8));
            if needed == (blocks, tables) {
                break;
            }
            (blocks, tables) = needed;
        }
        let first = self.take(blocks);
        let table = self.take(tables);
        for (block, counts) in self.refcounts.chunks((cluster / 2) as usize).enumerate() {
            let bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_be_bytes()).collect();
            self.write(&bytes, first + block as u64 * cluster)?;
        }
        let offsets: Vec<u64> = (0..blocks).map(|block| first + block * cluster).collect();
        self.write(&big_endian(&offsets), table)?;
        Ok((table, tables))
    }

    fn write_header(&self, (refcounts, refcount_clusters): (u64, u64)) -> Result<()> {
        // The compression type, padding to eight bytes, and an end of extensions.
        let mut header = vec![0; COMPRESSION_TYPE + 8 + 8];
        put(&mut header, 0, MAGIC);
        put(&mut header, 4, &3u32.to_be_bytes());
        put(&mut header, 20, &self.options.cluster_bits.to_be_bytes());
        put(&mut header, 24, &self.size.to_be_bytes());
        put(&mut header, 36, &(self.l1.len() as u32).to_be_bytes());
        put(&mut header, 40, &self.cluster().to_be_bytes());
        put(&mut header, 48, &refcounts.to_be_bytes());
        put(&mut header, 56, &(refcount_clusters as u32).to_be_bytes());
        // Refcounts of 2^4 bits.
        put(&mut header, 96, &4u32.to_be_bytes());
        put(&mut header, 100, &(LEN_3 as u32 + 8).to_be_bytes());
        if self.options.compression == Compression::Zstd {
            put(&mut header, 72, &COMPRESSION.to_be_bytes());
            header[COMPRESSION_TYPE] = 1;
        }
        self.write(&header, 0)
    }
}

impl Write for Writer {
    fn unit(&self) -> u64 {
        self.cluster()
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let entries = (self.cluster() / 8) as usize;
        let cluster = (offset >> self.options.cluster_bits) as usize;
        let (number, within) = (cluster / entries, cluster % entries);
        if self.l2.as_ref().is_none_or(|(current, _)| *current != number) {
            self.finish_l2()?;
            self.l2 = Some((number, vec![0; entries]));
        }
        let entry = self.put_cluster(bytes)?;
        if let Some((_, table)) = &mut self.l2 {
            table[within] = entry;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.finish_l2()?;
        let refcounts = self.write_refcounts()?;
        self.file.set_len(self.end).map_err(|e| Error::io(e, "cannot be written"))?;
        self.write(&big_endian(&self.l1), self.cluster())?;
        self.write_header(refcounts)
    }
}

fn big_endian(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_refcount_overflows() {
        let options = Options::new(2 << 20, Compression::Zstd).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut writer = Writer::new(file, 1 << 40, options).unwrap();
        let begin = writer.end;
        for _ in 0..70_000 {
            writer.take_packed(20);
        }
        assert_eq!(writer.refcounts[2..], [u16::MAX, (70_000 - u32::from(u16::MAX)) as u16]);
        assert!(writer.end > begin + (2 << 20));
    }
}
