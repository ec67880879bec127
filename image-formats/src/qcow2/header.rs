//! The header of a qcow2 image, checked before the reader sees it.
//!
//! The fields, and the limits that QEMU has, are those of "Qcow2 Image File Format" in QEMU's documentation
//! (docs/interop/qcow2).

use crate::bytes::{be32, be64, put};
use crate::error::{corrupt, unsupported};
use crate::{Error, ErrorKind, OpenOptions, Result};

pub(super) const MAGIC: &[u8] = b"QFI\xfb";
/// Version 2 has 72 bytes, version 3 at least 104.
const LEN_2: usize = 72;
pub(super) const LEN_3: usize = 104;
/// Where version 3 may say how clusters are packed.
pub(super) const COMPRESSION_TYPE: usize = 104;
/// Clusters have 512 bytes to 2 MiB.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The largest tables, as in QEMU.
pub(super) const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

pub(super) const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
pub(super) const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const END: u32 = 0;
const ENCRYPTION_HEADER: u32 = 0x0537_be77;
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// How the clusters are packed that are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Deflate,
    Zstd,
}

/// A header that describes a disk in one file, whose tables lie within that file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// The size of the disk in bytes; not zero.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    /// So many entries of the L1 table as the disk needs.
    pub(super) l1_entries: u64,
    /// Where the refcount table lies; nothing else may.
    pub(super) refcount_table: std::ops::Range<u64>,
    pub(super) packing: Packing,
}

/// How many bytes of a file `parse` wants to see: the largest header cluster that can matter.
pub(super) const HEAD: usize = 64 << 10;

impl Header {
    /// Checks what a file of `len` bytes begins with.
    pub(super) fn parse(head: &[u8], len: u64, options: &OpenOptions) -> Result<Self> {
        if !head.starts_with(MAGIC) {
            return Err(corrupt("the file is no qcow2 image"));
        }
        if head.len() < LEN_2 {
            return Err(corrupt("the qcow2 header is cut short"));
        }
        let version = be32(head, 4);
        if !matches!(version, 2 | 3) {
            return Err(unsupported(format!("the qcow2 image is of version {version}; 2 and 3 are read")));
        }
        if be64(head, 8) != 0 {
            return Err(Error::new(ErrorKind::OtherFile, "the qcow2 image has a backing file"));
        }
        if be32(head, 32) != 0 {
            return Err(Error::new(ErrorKind::Encrypted, "the qcow2 image is encrypted"));
        }
        let cluster_bits = be32(head, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(corrupt(format!("the qcow2 image has clusters of 2^{cluster_bits} bytes")));
        }
        let cluster = 1 << cluster_bits;
        let packing = if version == 2 { Packing::Deflate } else { version_3(head, cluster)? };
        check_extensions(head, if version == 2 { LEN_2 } else { be32(head, 100) as usize }, cluster)?;
        if be32(head, 60) != 0 {
            return Err(unsupported("the qcow2 image has snapshots inside; convert it to one without"));
        }

        let size = be64(head, 24);
        options.check_size(size)?;
        if size == 0 {
            return Err(unsupported("the disk in the qcow2 image has no bytes"));
        }
        let l1_entries = size.div_ceil(cluster * (cluster / 8));
        if l1_entries > MAX_L1 / 8 {
            return Err(Error::new(ErrorKind::TooLarge, "the L1 table of the qcow2 image is too large"));
        }
        if u64::from(be32(head, 36)) < l1_entries {
            return Err(corrupt("the L1 table of the qcow2 image is too short for its disk"));
        }
        let l1_offset = be64(head, 40);
        check_table("L1 table", l1_offset, l1_entries * 8, cluster, len)?;
        let refcount_offset = be64(head, 48);
        let refcount_len = u64::from(be32(head, 56)) * cluster;
        if refcount_len > MAX_REFCOUNT_TABLE.max(cluster) {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "the refcount table of the qcow2 image is too large",
            ));
        }
        check_table("refcount table", refcount_offset, refcount_len, cluster, len)?;
        let refcount_table = refcount_offset..refcount_offset + refcount_len;
        Ok(Self { version, cluster_bits, size, l1_offset, l1_entries, refcount_table, packing })
    }

    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The header as the reader is to see it: nothing in it but where the L1 table lies and for how large a disk.
    pub(super) fn for_reader(&self) -> Vec<u8> {
        // An end of extensions follows, of eight bytes.
        let mut bytes = vec![0; LEN_3 + 8];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, &3u32.to_be_bytes());
        put(&mut bytes, 20, &self.cluster_bits.to_be_bytes());
        put(&mut bytes, 24, &self.size.to_be_bytes());
        put(&mut bytes, 36, &(self.l1_entries as u32).to_be_bytes());
        put(&mut bytes, 40, &self.l1_offset.to_be_bytes());
        put(&mut bytes, 48, &self.refcount_table.start.to_be_bytes());
        put(&mut bytes, 96, &4u32.to_be_bytes());
        put(&mut bytes, 100, &(LEN_3 as u32).to_be_bytes());
        bytes
    }
}

/// What only version 3 says.
fn version_3(head: &[u8], cluster: u64) -> Result<Packing> {
    let len = be32(head, 100);
    if (len as usize) < LEN_3 || u64::from(len) > cluster || !len.is_multiple_of(8) || head.len() < LEN_3 {
        return Err(corrupt("the length of the qcow2 header is wrong"));
    }
    if be32(head, 96) > 6 {
        return Err(corrupt("the refcounts of the qcow2 image have too many bits"));
    }
    let features = be64(head, 72);
    if features & CORRUPT != 0 {
        return Err(corrupt("the qcow2 image is marked as corrupt"));
    }
    if features & DATA_FILE != 0 {
        return Err(Error::new(ErrorKind::OtherFile, "the qcow2 image has its data in another file"));
    }
    if features & EXTENDED_L2 != 0 {
        return Err(unsupported("the qcow2 image has extended L2 entries; convert it to one without"));
    }
    // An image that was not closed has refcounts that may be wrong. Who only reads needs none.
    let unknown = features & !(DIRTY | COMPRESSION);
    if unknown != 0 {
        return Err(unsupported(format!("the qcow2 image has features that are not known ({unknown:#x})")));
    }
    let kind = if len as usize > COMPRESSION_TYPE { head.get(COMPRESSION_TYPE).copied() } else { None };
    match (features & COMPRESSION != 0, kind.unwrap_or(0)) {
        (false, 0) => Ok(Packing::Deflate),
        (true, 1) => Ok(Packing::Zstd),
        (true, kind @ 2..) => Err(unsupported(format!("clusters are packed in a way not known ({kind})"))),
        _ => Err(corrupt("the qcow2 header contradicts itself about how clusters are packed")),
    }
}

/// Looks for header extensions that make the image more than what lies in it.
fn check_extensions(head: &[u8], mut at: usize, cluster: u64) -> Result<()> {
    let area = &head[..head.len().min(cluster as usize)];
    // Version 2 need not have any, and then not even their end.
    while let Some(extension) = area.get(at..).filter(|rest| rest.len() >= 8) {
        let (kind, len) = (be32(extension, 0), be32(extension, 4) as usize);
        match kind {
            END => return Ok(()),
            DATA_FILE_NAME => {
                return Err(Error::new(ErrorKind::OtherFile, "the qcow2 image names a data file"));
            }
            ENCRYPTION_HEADER => {
                return Err(Error::new(ErrorKind::Encrypted, "the qcow2 image has a header for encryption"));
            }
            _ if len > area.len() => return Err(corrupt("a qcow2 header extension is too long")),
            _ => at += 8 + len.next_multiple_of(8),
        }
    }
    Ok(())
}

/// Checks that a table is aligned, not in the header's cluster, and within the file.
fn check_table(what: &str, offset: u64, table_len: u64, cluster: u64, len: u64) -> Result<()> {
    let end = offset.checked_add(table_len);
    if !offset.is_multiple_of(cluster) || offset == 0 || end.is_none_or(|end| end > len) {
        return Err(corrupt(format!("the {what} of the qcow2 image does not lie where one can")));
    }
    Ok(())
}
