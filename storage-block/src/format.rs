//! The bytes of every file, as functions without files: see `docs/storage-format.md`.
//!
//! All numbers are little-endian. Every decoder takes any bytes and answers with what is wrong.

mod closing;
mod key;
mod name;
mod pack;
mod root;

use ami_core::Digest;

pub(crate) use closing::{CLOSING_BYTES, Closing, encode_closing, parse_closing};
pub(crate) use key::{KEY_CHECK, KEY_ID_MAX, KEY_MAX, WRAPPED_MAX, WrappedKey, encode_key, parse_key};
pub(crate) use name::{LOG_NAME, is_name_of_other_version, log_name, parse_log_name};
pub(crate) use pack::*;
pub(crate) use root::{RootParts, encode_root, parse_root};

/// The unit of content addressing and of packs.
pub(crate) const CHUNK: u64 = 64 << 10;
/// The unit in which a volume tells its own bytes from its snapshot's.
pub(crate) const BLOCK: u64 = 4 << 10;
/// Chunk ids in a manifest leaf.
pub(crate) const LEAF_IDS: usize = 1024;
/// Bytes of a manifest leaf.
pub(crate) const LEAF_BYTES: usize = LEAF_IDS * Digest::LEN;
/// Bytes of disk that a manifest leaf speaks of.
pub(crate) const LEAF_SPAN: u64 = CHUNK * LEAF_IDS as u64;
/// Bytes of a snapshot's root before its leaf digests.
pub(crate) const ROOT_HEADER: usize = 64;
/// Bytes of the longest root: that of the largest disk, with the longest key.
pub(crate) const ROOT_MAX: usize = ROOT_HEADER + (MAX_SIZE / LEAF_SPAN) as usize * Digest::LEN + KEY_MAX;
/// Where the first batch of a volume's log begins.
pub(crate) const LOG_HEADER: u64 = 4096;
/// Batches begin at multiples of this, so that a torn write never touches an older batch.
pub(crate) const LOG_ALIGN: usize = 512;
/// Bytes of a batch before its records.
pub(crate) const BATCH_HEADER: usize = 32;
/// Bytes of a record of a batch.
pub(crate) const BATCH_RECORD: usize = 16;
/// Records in a batch, at most.
pub(crate) const BATCH_MAX: usize = 65536;
/// The size of the largest disk: 64 TiB, as in EBS.
pub(crate) const MAX_SIZE: u64 = 64 << 40;

/// The newest format version. Each kind of file has its own reasons to be of the older one, which is read for
/// ever. A change of any layout is a new number.
pub(crate) const VERSION: u32 = 3;

const VOLUME_MAGIC: &[u8; 8] = b"BLKVOLM\0";
const BATCH_MAGIC: u32 = 0x4843_5442;
/// Where the checksum of the header of a volume's log stands in version 1, and in version 2.
const LOG_CRC_1: usize = 64;
const LOG_CRC: usize = LOG_HEADER as usize - 4;
/// Bytes from which the key of an overlay is made, with the volume's data key.
pub(crate) const SALT: usize = 32;

// Files written with other numbers are out there for ever: none of these may change under these versions.
const _: () = {
    assert!(VERSION == 3);
    assert!(CHUNK == 65536 && BLOCK == 4096 && LEAF_IDS == 1024 && LEAF_BYTES == 32768);
    assert!(LEAF_SPAN == 64 << 20 && ROOT_HEADER == 64 && ROOT_MAX == (32 << 20) + 64 + KEY_MAX);
    assert!(LOG_HEADER == 4096 && LOG_ALIGN == 512 && BATCH_HEADER == 32 && BATCH_RECORD == 16);
    assert!(BATCH_MAX == 65536 && Digest::LEN == 32);
    assert!(LOG_CRC_1 == 64 && LOG_CRC == 4092 && SALT == 32 && 100 + KEY_MAX <= LOG_CRC);
};

/// An id as it stands in a manifest; all zeroes is a hole.
pub(crate) type Id = [u8; Digest::LEN];
/// The id of what is all zeroes and therefore not stored.
pub(crate) const HOLE: Id = [0; Digest::LEN];

/// Why bytes are not what they should be.
pub(crate) type Wrong = String;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

/// Checks what all headers share: length, magic, and the version, which it returns.
fn check_magic(bytes: &[u8], len: usize, magic: &[u8; 8], newest: u32) -> Result<u32, Wrong> {
    if bytes.len() < len {
        return Err(format!("its header ends after {} of {len} bytes", bytes.len()));
    }
    if &bytes[..8] != magic {
        return Err("it does not begin with its magic number".to_owned());
    }
    match u32_at(bytes, 8) {
        version if (1..=newest).contains(&version) => Ok(version),
        version => {
            Err(format!("it has format version {version}, and this is a reader of versions 1 to {newest}"))
        }
    }
}

/// Checks the checksum that stands at `at` and is of all bytes before it.
fn check_crc(bytes: &[u8], at: usize) -> Result<(), Wrong> {
    if u32_at(bytes, at) == crc32c::crc32c(&bytes[..at]) {
        Ok(())
    } else {
        Err("the checksum of its header is wrong".to_owned())
    }
}

/// The number of leaves that a disk of `size` bytes has.
pub(crate) fn leaf_count(size: u64) -> u64 {
    size.div_ceil(LEAF_SPAN)
}

/// The ids in a list of them; `slice::as_chunks` is newer than the oldest compiler supported.
pub(crate) fn split_ids(bytes: &[u8]) -> Vec<Id> {
    bytes.chunks_exact(Digest::LEN).filter_map(|id| id.try_into().ok()).collect()
}

/// What the header of a volume's log says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeHeader {
    pub(crate) size: u64,
    pub(crate) base: Option<Digest>,
    /// Random, in every batch: a batch of another log is not one of this.
    pub(crate) log: u64,
    /// Of an encrypted volume.
    pub(crate) key: Option<VolumeKey>,
}

/// How an encrypted volume's overlay is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeKey {
    pub(crate) wrapped: WrappedKey,
    /// Random: the overlays of two volumes with one data key have nothing in common.
    pub(crate) salt: [u8; SALT],
}

/// Version 1 unless the volume is encrypted; 2 if its key was wrapped for no context.
pub(crate) fn encode_volume(header: &VolumeHeader) -> Vec<u8> {
    let mut bytes = vec![0; LOG_HEADER as usize];
    let version = key::version_of(header.key.as_ref().map(|key| &key.wrapped));
    put(&mut bytes, 0, VOLUME_MAGIC);
    put(&mut bytes, 8, &version.to_le_bytes());
    put(&mut bytes, 12, &(BLOCK as u32).to_le_bytes());
    put(&mut bytes, 16, &header.size.to_le_bytes());
    put(&mut bytes, 24, &header.log.to_le_bytes());
    put(&mut bytes, 32, header.base.as_ref().map_or(&HOLE, |base| base.as_bytes()));
    let at = match &header.key {
        None => LOG_CRC_1,
        Some(key) => {
            let wrapped = encode_key(&key.wrapped);
            put(&mut bytes, 64, &key.salt);
            put(&mut bytes, 96, &(wrapped.len() as u32).to_le_bytes());
            put(&mut bytes, 100, &wrapped);
            LOG_CRC
        }
    };
    let crc = crc32c::crc32c(&bytes[..at]);
    put(&mut bytes, at, &crc.to_le_bytes());
    bytes
}

/// Whether these are the first bytes of a volume's log, of whatever version.
pub(crate) fn is_volume(bytes: &[u8]) -> bool {
    bytes.starts_with(VOLUME_MAGIC)
}

pub(crate) fn parse_volume(bytes: &[u8]) -> Result<VolumeHeader, Wrong> {
    let version = check_magic(bytes, LOG_HEADER as usize, VOLUME_MAGIC, VERSION)?;
    check_crc(bytes, if version == 1 { LOG_CRC_1 } else { LOG_CRC })?;
    let (block, size, log) = (u32_at(bytes, 12), u64_at(bytes, 16), u64_at(bytes, 24));
    if u64::from(block) != BLOCK || size % BLOCK != 0 || size > MAX_SIZE {
        return Err(format!("it speaks of {size} bytes in blocks of {block}"));
    }
    let mut base = HOLE;
    base.copy_from_slice(&bytes[32..64]);
    let base = (base != HOLE).then(|| Digest::from_bytes(base));
    let key = if version == 1 { None } else { Some(parse_volume_key(bytes, version >= 3)?) };
    Ok(VolumeHeader { size, base, log, key })
}

fn parse_volume_key(bytes: &[u8], bound: bool) -> Result<VolumeKey, Wrong> {
    let len = u32_at(bytes, 96) as usize;
    if len > KEY_MAX {
        return Err(format!("its wrapped key has {len} bytes"));
    }
    let mut salt = [0; SALT];
    salt.copy_from_slice(&bytes[64..96]);
    Ok(VolumeKey { wrapped: parse_key(&bytes[100..100 + len], bound)?, salt })
}

/// Where a block's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// In the snapshot that the volume began as, or zero where there is none.
    Base = 0,
    /// In the overlay file, at the same offset.
    Overlay = 1,
    /// Nowhere: the block is zero.
    Zero = 2,
}

/// Blocks that went into one state together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) state: State,
}

/// A batch of at most [`BATCH_MAX`] records, padded to [`LOG_ALIGN`].
pub(crate) fn encode_batch(log: u64, sequence: u64, runs: &[Run]) -> Vec<u8> {
    let mut bytes = vec![0; batch_len(runs.len())];
    put(&mut bytes, 0, &BATCH_MAGIC.to_le_bytes());
    put(&mut bytes, 4, &(runs.len() as u32).to_le_bytes());
    put(&mut bytes, 8, &sequence.to_le_bytes());
    put(&mut bytes, 16, &log.to_le_bytes());
    for (run, at) in runs.iter().zip((BATCH_HEADER..).step_by(BATCH_RECORD)) {
        put(&mut bytes, at, &run.first.to_le_bytes());
        put(&mut bytes, at + 8, &(run.count << 2 | run.state as u64).to_le_bytes());
    }
    let crc = batch_crc(&bytes, runs.len());
    put(&mut bytes, 24, &crc.to_le_bytes());
    bytes
}

/// The batch that `bytes` begin with: its sequence number, its records, and its length.
pub(crate) fn parse_batch(log: u64, blocks: u64, bytes: &[u8]) -> Option<(u64, Vec<Run>, usize)> {
    if bytes.len() < LOG_ALIGN || u32_at(bytes, 0) != BATCH_MAGIC || u64_at(bytes, 16) != log {
        return None;
    }
    let count = u32_at(bytes, 4) as usize;
    if count > BATCH_MAX || batch_len(count) > bytes.len() || u32_at(bytes, 24) != batch_crc(bytes, count) {
        return None;
    }
    let records = bytes[BATCH_HEADER..BATCH_HEADER + count * BATCH_RECORD].chunks_exact(BATCH_RECORD);
    let runs = records.map(|record| parse_run(record, blocks)).collect::<Option<Vec<_>>>()?;
    Some((u64_at(bytes, 8), runs, batch_len(count)))
}

fn parse_run(record: &[u8], blocks: u64) -> Option<Run> {
    let (first, word) = (u64_at(record, 0), u64_at(record, 8));
    let count = word >> 2;
    let state = match word & 3 {
        0 => State::Base,
        1 => State::Overlay,
        2 => State::Zero,
        _ => return None,
    };
    (first.checked_add(count)? <= blocks).then_some(Run { first, count, state })
}

fn batch_len(count: usize) -> usize {
    (BATCH_HEADER + count * BATCH_RECORD).next_multiple_of(LOG_ALIGN)
}

fn batch_crc(bytes: &[u8], count: usize) -> u32 {
    let records = &bytes[BATCH_HEADER..BATCH_HEADER + count * BATCH_RECORD];
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..24]), records)
}
