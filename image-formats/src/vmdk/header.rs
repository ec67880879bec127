//! The header of an extent with grains.

use crate::Result;
use crate::bytes::{le16, le32, le64, put};
use crate::error::{corrupt, unsupported};

use super::SECTOR;

pub(super) const MAGIC: &[u8] = b"KDMV";
/// Extents of ESX before version 7, of another layout.
pub(super) const COWD: &[u8] = b"COWD";
pub(super) const LEN: usize = SECTOR as usize;
/// The grain directory's place where it is said in a footer.
pub(super) const AT_END: u64 = u64::MAX;
/// How many grains a grain table has.
pub(super) const GRAINS: u64 = 512;
pub(super) const TABLE_SECTORS: u64 = GRAINS * 4 / SECTOR;

pub(super) const NEWLINES: u32 = 1 << 0;
pub(super) const REDUNDANT: u32 = 1 << 1;
pub(super) const ZERO_GRAINS: u32 = 1 << 2;
pub(super) const COMPRESSED: u32 = 1 << 16;
pub(super) const MARKERS: u32 = 1 << 17;
const KNOWN: u32 = NEWLINES | REDUNDANT | ZERO_GRAINS | COMPRESSED | MARKERS;
/// What a transfer as text would have changed.
const LINE_ENDS: &[u8] = b"\n \r\n";

/// What precedes tables and the end in an image made to be streamed.
pub(super) const MARKER_TABLE: u32 = 1;
pub(super) const MARKER_DIRECTORY: u32 = 2;
pub(super) const MARKER_FOOTER: u32 = 3;

/// A header whose numbers are possible ones; what they point to is not checked yet. In sectors, but for flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) flags: u32,
    pub(super) capacity: u64,
    pub(super) grain: u64,
    pub(super) descriptor: u64,
    pub(super) descriptor_len: u64,
    pub(super) redundant_directory: u64,
    pub(super) directory: u64,
    pub(super) overhead: u64,
}

impl Header {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.starts_with(COWD) {
            return Err(unsupported("the VMDK extent is of ESX (COWD); convert it to a streamOptimized one"));
        }
        if !bytes.starts_with(MAGIC) || bytes.len() < LEN {
            return Err(corrupt("the file is no VMDK image"));
        }
        let header = Self {
            version: le32(bytes, 4),
            flags: le32(bytes, 8),
            capacity: le64(bytes, 12),
            grain: le64(bytes, 20),
            descriptor: le64(bytes, 28),
            descriptor_len: le64(bytes, 36),
            redundant_directory: le64(bytes, 48),
            directory: le64(bytes, 56),
            overhead: le64(bytes, 64),
        };
        if !(1..=3).contains(&header.version) {
            let version = header.version;
            return Err(unsupported(format!("the VMDK image is of version {version}; 1 to 3 are read")));
        }
        if header.flags & NEWLINES != 0 && bytes[73..77] != *LINE_ENDS {
            return Err(corrupt("the VMDK image was transferred as text"));
        }
        if header.flags & !KNOWN != 0 {
            let flags = header.flags;
            return Err(unsupported(format!("the VMDK image has features that are not known ({flags:#x})")));
        }
        let packing = le16(bytes, 77);
        let packed = header.flags & COMPRESSED != 0;
        if packed && (packing != 1 || header.flags & MARKERS == 0) {
            return Err(unsupported(format!("grains are packed in a way not known ({packing})")));
        }
        if !header.grain.is_power_of_two() || !(8..=2048).contains(&header.grain) {
            return Err(corrupt(format!("the VMDK image has grains of {} sectors", header.grain)));
        }
        if u64::from(le32(bytes, 44)) != GRAINS {
            return Err(unsupported("the VMDK image has grain tables that are not of 512 grains"));
        }
        if header.capacity > u64::MAX / SECTOR {
            return Err(corrupt("the disk in the VMDK image has no possible size"));
        }
        Ok(header)
    }

    pub(super) fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, &self.version.to_le_bytes());
        put(&mut bytes, 8, &self.flags.to_le_bytes());
        put(&mut bytes, 12, &self.capacity.to_le_bytes());
        put(&mut bytes, 20, &self.grain.to_le_bytes());
        put(&mut bytes, 28, &self.descriptor.to_le_bytes());
        put(&mut bytes, 36, &self.descriptor_len.to_le_bytes());
        put(&mut bytes, 44, &(GRAINS as u32).to_le_bytes());
        put(&mut bytes, 48, &self.redundant_directory.to_le_bytes());
        put(&mut bytes, 56, &self.directory.to_le_bytes());
        put(&mut bytes, 64, &self.overhead.to_le_bytes());
        put(&mut bytes, 73, LINE_ENDS);
        let packing = u16::from(self.flags & COMPRESSED != 0);
        put(&mut bytes, 77, &packing.to_le_bytes());
        bytes
    }

    /// How many grain tables the disk needs.
    pub(super) fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain * GRAINS)
    }
}
