//! What is checked of an ext4 file system before the reader sees it.

use crate::{Error, ErrorKind, Result};

pub(crate) const OFFSET: u64 = 1024;
pub(crate) const SIZE: usize = 1024;

/// The largest journal that is replayed. `mke2fs` makes none larger.
const MAX_JOURNAL: u64 = 1 << 30;
/// The most block groups; 128 TiB with blocks of 4 KiB.
const MAX_GROUPS: u64 = 1 << 20;

const HAS_JOURNAL: u32 = 0x4;
const NEEDS_RECOVERY: u32 = 0x4;
const JOURNAL_MAGIC: u32 = 0xc03b_3998;
const IS_64_BIT: u32 = 0x80;
const METADATA_CHECKSUMS: u32 = 0x400;

/// A superblock whose sizes fit the partition that it lies in.
#[derive(Debug, Clone)]
pub(crate) struct Superblock {
    bytes: Box<[u8; SIZE]>,
    pub(crate) block_size: u64,
}

impl Superblock {
    /// Whether the bytes are an ext2, ext3 or ext4 superblock at all.
    pub(crate) fn is_one(bytes: &[u8; SIZE]) -> bool {
        u16_at(bytes, 0x38) == 0xef53
    }

    /// Checks a superblock in a partition of `partition_len` bytes. Afterwards the reader allocates
    /// for block groups and block cache no more than a few MiB.
    pub(crate) fn parse(bytes: Box<[u8; SIZE]>, partition_len: u64) -> Result<Self> {
        let has_checksum = u32_at(&*bytes, 0x64) & METADATA_CHECKSUMS != 0;
        // ext4 leaves out the inversion that ends a CRC32C elsewhere.
        if has_checksum && u32_at(&*bytes, 0x3fc) != !crc32c::crc32c(&bytes[..0x3fc]) {
            return Err(corrupt("the checksum of the ext4 superblock is wrong"));
        }
        let block_size = match u32_at(&*bytes, 0x18) {
            log @ 0..=6 => 1024u64 << log,
            log => return Err(corrupt(format!("the ext4 file system has blocks of 2^{log} KiB"))),
        };
        let high = if u32_at(&*bytes, 0x60) & IS_64_BIT != 0 { u32_at(&*bytes, 0x150) } else { 0 };
        let blocks = u64::from(high) << 32 | u64::from(u32_at(&*bytes, 0x4));
        if blocks.checked_mul(block_size).is_none_or(|size| size > partition_len) {
            return Err(corrupt(format!(
                "the ext4 file system has {blocks} blocks of {block_size} bytes, more than the {partition_len} \
                 bytes it lies in"
            )));
        }
        let blocks_per_group = u64::from(u32_at(&*bytes, 0x20));
        if blocks_per_group == 0 || blocks / blocks_per_group >= MAX_GROUPS {
            return Err(corrupt(format!("the ext4 file system has groups of {blocks_per_group} blocks")));
        }
        Ok(Self { bytes, block_size })
    }

    /// The superblock as the reader is to see it: without metadata checksums. Checking that of a
    /// directory's hash tree, the reader trusts the entry count in the block and panics when it
    /// leaves the block; unchecked, the same count is a plain error.
    pub(crate) fn for_reader(&self) -> [u8; SIZE] {
        let mut bytes = *self.bytes;
        let features = u32_at(&bytes, 0x64) & !METADATA_CHECKSUMS;
        bytes[0x64..0x68].copy_from_slice(&features.to_le_bytes());
        bytes
    }

    /// Refuses a journal that would take minutes to replay, and has one that holds nothing left alone.
    /// `read` reads the partition.
    ///
    /// Linux says that a file system has to be recovered as soon as it is mounted; its journal gets its
    /// features, without which the reader refuses it, with the first transaction some seconds later.
    pub(crate) fn check_journal(&mut self, mut read: impl FnMut(&mut [u8], u64) -> Result<()>) -> Result<()> {
        let sb = &*self.bytes;
        if u32_at(sb, 0x5c) & HAS_JOURNAL == 0 || u32_at(sb, 0x60) & NEEDS_RECOVERY == 0 {
            return Ok(());
        }
        let inode = self.inode(u32_at(sb, 0xe0), &mut read)?;
        let size = u64::from(u32_at(&inode, 0x6c)) << 32 | u64::from(u32_at(&inode, 0x4));
        if size > MAX_JOURNAL {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!(
                    "the ext4 journal is {size} bytes long and has to be replayed; at most {MAX_JOURNAL} are"
                ),
            ));
        }
        let Some(block) = first_block(&inode) else { return Ok(()) };
        let Some(offset) = block.checked_mul(self.block_size) else { return Ok(()) };
        let mut journal = [0; 0x20];
        read(&mut journal, offset)?;
        // `journal_superblock_t`, big-endian: its magic number, and the first block of its log, zero if
        // that is empty.
        let [magic, start] = [0, 0x1c].map(|at| u32_at(&journal, at).swap_bytes());
        if magic == JOURNAL_MAGIC && start == 0 {
            let clean = u32_at(&*self.bytes, 0x60) & !NEEDS_RECOVERY;
            self.bytes[0x60..0x64].copy_from_slice(&clean.to_le_bytes());
        }
        Ok(())
    }

    /// The first 128 bytes of the inode with this number.
    fn inode(&self, inode: u32, mut read: impl FnMut(&mut [u8], u64) -> Result<()>) -> Result<[u8; 128]> {
        let sb = &*self.bytes;
        let bad = || corrupt("the ext4 superblock names no valid journal inode");
        let index = inode.checked_sub(1).ok_or_else(bad)?;
        let per_group = u32_at(sb, 0x28);
        let group = u64::from(index.checked_div(per_group).ok_or_else(bad)?);
        let is_64_bit = u32_at(sb, 0x60) & IS_64_BIT != 0;
        let descriptor_size = if is_64_bit { u64::from(u16_at(sb, 0xfe)) } else { 32 };
        if is_64_bit && descriptor_size < 64 {
            return Err(bad());
        }
        // The descriptors follow the superblock's block.
        let table = if self.block_size == 1024 { 2048 } else { self.block_size };
        let mut descriptor = [0; 64];
        let len = descriptor_size.min(64) as usize;
        read(&mut descriptor[..len], table + group * descriptor_size)?;
        let high = if is_64_bit { u32_at(&descriptor, 0x28) } else { 0 };
        let inodes = u64::from(high) << 32 | u64::from(u32_at(&descriptor, 0x8));

        let within = u64::from(index % per_group) * u64::from(u16_at(sb, 0x58));
        let offset =
            inodes.checked_mul(self.block_size).and_then(|o| o.checked_add(within)).ok_or_else(bad)?;
        let mut inode = [0; 128];
        read(&mut inode, offset)?;
        Ok(inode)
    }

    /// What in a block would make the reader walk an extent tree for long, if the block is a node of one.
    ///
    /// A node of more than two levels below the root: the children of a node need not differ, so each level
    /// multiplies the time by the entries of a block; no file that this crate reads needs a third level. A
    /// leaf without extents, or with one that has no blocks: of these any number may be walked before the file
    /// is as long as it says. ext4 has none.
    pub(crate) fn costly_extent_node(block: &[u8]) -> Option<&'static str> {
        if block.len() < 12 || u16_at(block, 0) != 0xf30a {
            return None;
        }
        let (entries, max, depth) = (u16_at(block, 2), u16_at(block, 4), u16_at(block, 6));
        if entries > max || (usize::from(max) + 1) * 12 > block.len() {
            return None;
        }
        let mut extents = block[12..].chunks_exact(12).take(entries.into());
        match depth {
            0 if entries == 0 || extents.any(|extent| u16_at(extent, 4) == 0) => {
                Some("an extent tree has a leaf with nothing in it")
            }
            2..=5 => Some("an extent tree is too deep"),
            _ => None,
        }
    }
}

/// Where a file's first block is, where its inode says it: in the only level of an extent tree, or as the
/// first of a list of blocks.
fn first_block(inode: &[u8; 128]) -> Option<u64> {
    const EXTENTS: u32 = 0x8_0000;
    const EXTENT_MAGIC: u16 = 0xf30a;
    if u32_at(inode, 0x20) & EXTENTS == 0 {
        return Some(u64::from(u32_at(inode, 0x28)));
    }
    let [magic, entries, depth] = [0x28, 0x2a, 0x2e].map(|at| u16_at(inode, at));
    let first = u32_at(inode, 0x34);
    let flat = magic == EXTENT_MAGIC && entries > 0 && depth == 0 && first == 0;
    flat.then(|| u64::from(u16_at(inode, 0x3a)) << 32 | u64::from(u32_at(inode, 0x3c)))
}

fn corrupt(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

/// The offsets here are constants within arrays and blocks whose length is known.
fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset + 2)) << 16 | u32::from(u16_at(bytes, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_what_the_reader_allocates() {
        // The block size's logarithm, blocks, blocks per group, the partition's size, and the answer.
        for (log, blocks, per_group, partition_len, is_good) in [
            (2, 1 << 20, 32_768, 1 << 32, true),
            (2, 1 << 20, 32_768, (1 << 32) - 1, false),
            (0, 1 << 20, 8192, 1 << 30, true),
            (6, 1 << 10, 65_528, 1 << 26, true),
            (7, 1 << 10, 65_528, 1 << 40, false),
            (21, 0, 1, u64::MAX, false),
            (u32::MAX, 0, 1, u64::MAX, false),
            (2, 1 << 20, 0, 1 << 32, false),
            (2, u32::MAX, 1, u64::MAX, false),
            (2, (1 << 20) - 1, 1, u64::MAX, true),
            (2, 1 << 20, 1, u64::MAX, false),
        ] {
            let mut bytes = Box::new([0; SIZE]);
            bytes[0x18..0x1c].copy_from_slice(&u32::to_le_bytes(log));
            bytes[0x4..0x8].copy_from_slice(&u32::to_le_bytes(blocks));
            bytes[0x20..0x24].copy_from_slice(&u32::to_le_bytes(per_group));
            let parsed =
                Superblock::parse(bytes, partition_len).map(|sb| sb.block_size).map_err(|e| e.kind());
            let expected = if is_good { Ok(1024 << log) } else { Err(ErrorKind::Corrupt) };
            assert_eq!(parsed, expected, "2^{log} KiB, {blocks} blocks in groups of {per_group}");
        }
    }
}
