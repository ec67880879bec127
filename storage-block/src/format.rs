//! The bytes of every file, as functions without files: see `docs/storage-format.md`.
//!
//! All numbers are little-endian. Every decoder takes any bytes and answers with what is wrong.

use ami_core::Digest;

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
/// Where the first slot of a pack begins.
pub(crate) const PACK_HEADER: u64 = 4096;
/// Slots in a full pack.
pub(crate) const PACK_SLOTS: u32 = 16384;
/// Where the first record of a pack's index begins.
pub(crate) const INDEX_HEADER: usize = 64;
/// Bytes of a record of a pack's index.
pub(crate) const INDEX_RECORD: usize = 40;
/// Bytes of a snapshot's root before its leaf digests.
pub(crate) const ROOT_HEADER: usize = 64;
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

/// The format version in every header. A change of any layout below is a new number.
pub(crate) const VERSION: u32 = 1;

const PACK_MAGIC: &[u8; 8] = b"BLKPACK\0";
const INDEX_MAGIC: &[u8; 8] = b"BLKINDX\0";
const ROOT_MAGIC: &[u8; 8] = b"BLKSNAP\0";
const VOLUME_MAGIC: &[u8; 8] = b"BLKVOLM\0";
const BATCH_MAGIC: u32 = 0x4843_5442;
const SHA_256: u32 = 1;

// Files written with other numbers are out there for ever: none of these may change under VERSION 1.
const _: () = {
    assert!(VERSION == 1);
    assert!(CHUNK == 65536 && BLOCK == 4096 && LEAF_IDS == 1024 && LEAF_BYTES == 32768);
    assert!(LEAF_SPAN == 64 << 20 && PACK_HEADER == 4096 && PACK_SLOTS == 16384);
    assert!(INDEX_HEADER == 64 && INDEX_RECORD == 40 && ROOT_HEADER == 64);
    assert!(LOG_HEADER == 4096 && LOG_ALIGN == 512 && BATCH_HEADER == 32 && BATCH_RECORD == 16);
    assert!(BATCH_MAX == 65536 && Digest::LEN == 32);
};

/// An id as it stands in a manifest; all zeroes is a hole.
pub(crate) type Id = [u8; Digest::LEN];
/// The id of what is all zeroes and therefore not stored.
pub(crate) const HOLE: Id = [0; Digest::LEN];

/// What a slot of a pack holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Chunk = 1,
    Leaf = 2,
}

impl Kind {
    /// The number of bytes in the slot that the digest is of.
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::Chunk => CHUNK as usize,
            Self::Leaf => LEAF_BYTES,
        }
    }
}

/// Why bytes are not what they should be.
pub(crate) type Wrong = String;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

/// Checks what all headers share: length, magic, version, and the checksum at `crc`.
fn check_header(bytes: &[u8], len: usize, magic: &[u8; 8], crc: Option<usize>) -> Result<(), Wrong> {
    if bytes.len() < len {
        return Err(format!("its header ends after {} of {len} bytes", bytes.len()));
    }
    if &bytes[..8] != magic {
        return Err("it does not begin with its magic number".to_owned());
    }
    let version = u32_at(bytes, 8);
    if version != VERSION {
        return Err(format!("it has format version {version}, and this is a reader of version {VERSION}"));
    }
    match crc {
        Some(at) if u32_at(bytes, at) != crc32c::crc32c(&bytes[..at]) => {
            Err("the checksum of its header is wrong".to_owned())
        }
        _ => Ok(()),
    }
}

fn pack_like_header(magic: &[u8; 8], number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    put(&mut bytes, 0, magic);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 12, &(CHUNK as u32).to_le_bytes());
    put(&mut bytes, 16, &u64::from(number).to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..24]);
    put(&mut bytes, 24, &crc.to_le_bytes());
    bytes
}

fn check_pack_like(bytes: &[u8], magic: &[u8; 8], number: u32, len: usize) -> Result<(), Wrong> {
    check_header(bytes, len, magic, Some(24))?;
    if u32_at(bytes, 12) != CHUNK as u32 {
        return Err(format!("its slots have {} bytes", u32_at(bytes, 12)));
    }
    if u64_at(bytes, 16) != u64::from(number) {
        return Err(format!("it says that it is pack {}", u64_at(bytes, 16)));
    }
    Ok(())
}

pub(crate) fn pack_header(number: u32) -> Vec<u8> {
    pack_like_header(PACK_MAGIC, number, PACK_HEADER as usize)
}

pub(crate) fn check_pack_header(bytes: &[u8], number: u32) -> Result<(), Wrong> {
    check_pack_like(bytes, PACK_MAGIC, number, PACK_HEADER as usize)
}

pub(crate) fn index_header(number: u32) -> Vec<u8> {
    pack_like_header(INDEX_MAGIC, number, INDEX_HEADER)
}

pub(crate) fn check_index_header(bytes: &[u8], number: u32) -> Result<(), Wrong> {
    check_pack_like(bytes, INDEX_MAGIC, number, INDEX_HEADER)
}

/// The record of one slot. Its checksum covers where it stands too, so that no record is ever taken
/// for another's.
pub(crate) fn index_record(number: u32, slot: u32, id: &Id, kind: Kind) -> [u8; INDEX_RECORD] {
    let mut bytes = [0; INDEX_RECORD];
    put(&mut bytes, 0, id);
    put(&mut bytes, 32, &(kind as u32).to_le_bytes());
    let crc = index_record_crc(number, slot, &bytes);
    put(&mut bytes, 36, &crc.to_le_bytes());
    bytes
}

/// What a record of exactly [`INDEX_RECORD`] bytes says, if it is whole.
pub(crate) fn parse_index_record(number: u32, slot: u32, bytes: &[u8]) -> Option<(Id, Kind)> {
    let id: Id = bytes.get(..32)?.try_into().ok()?;
    if bytes.len() != INDEX_RECORD || u32_at(bytes, 36) != index_record_crc(number, slot, bytes) {
        return None;
    }
    match u32_at(bytes, 32) {
        1 => Some((id, Kind::Chunk)),
        2 => Some((id, Kind::Leaf)),
        _ => None,
    }
}

fn index_record_crc(number: u32, slot: u32, bytes: &[u8]) -> u32 {
    let place = (u64::from(number) << 32 | u64::from(slot)).to_le_bytes();
    crc32c::crc32c_append(crc32c::crc32c(&place), &bytes[..36])
}

/// The number of leaves that a disk of `size` bytes has.
pub(crate) fn leaf_count(size: u64) -> u64 {
    size.div_ceil(LEAF_SPAN)
}

pub(crate) fn encode_root(size: u64, leaves: &[Id]) -> Vec<u8> {
    let mut bytes = vec![0; ROOT_HEADER];
    put(&mut bytes, 0, ROOT_MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 12, &SHA_256.to_le_bytes());
    put(&mut bytes, 16, &(CHUNK as u32).to_le_bytes());
    put(&mut bytes, 20, &(LEAF_IDS as u32).to_le_bytes());
    put(&mut bytes, 24, &size.to_le_bytes());
    put(&mut bytes, 32, &(leaves.len() as u64).to_le_bytes());
    bytes.extend_from_slice(leaves.as_flattened());
    bytes
}

/// The size of the disk and the leaves' ids.
pub(crate) fn parse_root(bytes: &[u8]) -> Result<(u64, Vec<Id>), Wrong> {
    check_header(bytes, ROOT_HEADER, ROOT_MAGIC, None)?;
    let shape = (u32_at(bytes, 12), u32_at(bytes, 16), u32_at(bytes, 20));
    if shape != (SHA_256, CHUNK as u32, LEAF_IDS as u32) {
        return Err(format!("its hash, chunk size and leaf size are {shape:?}"));
    }
    let (size, leaves) = (u64_at(bytes, 24), u64_at(bytes, 32));
    if size % crate::SECTOR != 0 || size > MAX_SIZE || leaves != leaf_count(size) {
        return Err(format!("it speaks of {size} bytes in {leaves} leaves"));
    }
    let ids = &bytes[ROOT_HEADER..];
    if ids.len() as u64 != leaves * Digest::LEN as u64 {
        return Err(format!("it has {} bytes for the ids of {leaves} leaves", ids.len()));
    }
    Ok((size, split_ids(ids)))
}

/// The ids in a list of them; `slice::as_chunks` is newer than the oldest compiler supported.
pub(crate) fn split_ids(bytes: &[u8]) -> Vec<Id> {
    bytes.chunks_exact(Digest::LEN).filter_map(|id| id.try_into().ok()).collect()
}

/// What the header of a volume's log says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VolumeHeader {
    pub(crate) size: u64,
    pub(crate) base: Option<Digest>,
    /// Random, in every batch: a batch of another log is not one of this.
    pub(crate) log: u64,
}

pub(crate) fn encode_volume(header: &VolumeHeader) -> Vec<u8> {
    let mut bytes = vec![0; LOG_HEADER as usize];
    put(&mut bytes, 0, VOLUME_MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 12, &(BLOCK as u32).to_le_bytes());
    put(&mut bytes, 16, &header.size.to_le_bytes());
    put(&mut bytes, 24, &header.log.to_le_bytes());
    put(&mut bytes, 32, header.base.as_ref().map_or(&HOLE, |base| base.as_bytes()));
    let crc = crc32c::crc32c(&bytes[..64]);
    put(&mut bytes, 64, &crc.to_le_bytes());
    bytes
}

pub(crate) fn parse_volume(bytes: &[u8]) -> Result<VolumeHeader, Wrong> {
    check_header(bytes, LOG_HEADER as usize, VOLUME_MAGIC, Some(64))?;
    let (block, size, log) = (u32_at(bytes, 12), u64_at(bytes, 16), u64_at(bytes, 24));
    if u64::from(block) != BLOCK || size % BLOCK != 0 || size > MAX_SIZE {
        return Err(format!("it speaks of {size} bytes in blocks of {block}"));
    }
    let mut base = HOLE;
    base.copy_from_slice(&bytes[32..64]);
    Ok(VolumeHeader { size, log, base: (base != HOLE).then(|| Digest::from_bytes(base)) })
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
