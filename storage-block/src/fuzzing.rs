//! What the fuzz targets run, and the tests over the corpus. No part of the interface.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use ami_core::Digest;

use crate::Compression;
use crate::codec;
use crate::format::{
    self, BLOCK, Closing, Encoding, INDEX_HEADER, INDEX_RECORD, INDEX_RECORD_1, Kind, Patch, Record,
    RootParts, Run, Slot, State, VolumeHeader,
};
use crate::keys::{EncryptionKey, KeyProvider, LocalKey};
use crate::log::Log;
use crate::map::StateMap;
use crate::{ErrorKind, Result};

/// A snapshot's root, and a leaf: what is read is what is written.
pub fn snapshot(bytes: &[u8]) {
    if let Ok(RootParts { size, leaves, key }) = format::parse_root(bytes) {
        let mut again = format::encode_root(size, &leaves, key.as_ref());
        // What is reserved may hold anything, as the digest covers it too.
        let reserved = if key.is_some() { 44..format::ROOT_HEADER } else { 40..format::ROOT_HEADER };
        again[reserved.clone()].copy_from_slice(&bytes[reserved]);
        assert_eq!(again, bytes);
        assert!(size <= format::MAX_SIZE && size.div_ceil(format::LEAF_SPAN) == leaves.len() as u64);
    }
    if let Ok(key) = format::parse_key(bytes, true) {
        assert_eq!(format::encode_key(&key), bytes);
    }
    let ids = format::split_ids(bytes);
    assert_eq!(ids.as_flattened(), &bytes[..bytes.len() / 32 * 32]);
}

/// Requests of any kind, place and shape.
pub fn disk_requests(bytes: &[u8]) {
    crate::queue::fuzzing::disk_requests(bytes);
}

/// A pack's index: a record that is taken is the one that was written there, and nowhere else.
pub fn pack_index(bytes: &[u8]) {
    for number in [0, 7] {
        if let Ok(version) = format::check_index_header(bytes, number) {
            assert_eq!(bytes[..28], format::index_header(version, number)[..28]);
        }
        assert!(format::check_pack_header(bytes, number).is_err() || bytes.len() >= 4096);
    }
    let rest = bytes.get(INDEX_HEADER..).unwrap_or(bytes);
    for (record, place) in rest.chunks(INDEX_RECORD_1).zip(0..) {
        let read = |number, place, record: &[u8]| format::parse_index_record(1, number, place, record);
        if let Some((id, slot, None)) = read(7, place, record) {
            assert_eq!(format::index_record_1(7, place, &id, slot.kind), record);
        }
        let Some(id) = record.first_chunk::<32>() else { continue };
        let written = format::index_record_1(7, place, id, Kind::Leaf);
        let slot =
            Slot { start: place * 16, len: 32 << 10, crc: None, kind: Kind::Leaf, encoding: Encoding::RAW };
        check_record(&written, record[0], place, read, (*id, slot, None));
    }
    for (record, place) in rest.chunks(INDEX_RECORD).zip(0..) {
        let read = |number, place, record: &[u8]| format::parse_index_record(2, number, place, record);
        if let Some((id, slot, patch)) = read(7, place, record) {
            assert_eq!(format::index_record(7, place, &id, &slot, patch.as_ref()), record);
            assert!(slot.end() <= format::PACK_UNITS && slot.start < slot.end());
        }
        let Some(id) = record.first_chunk::<32>() else { continue };
        let start = u32::from_le_bytes([id[3], id[4], 0, 0]);
        let patch =
            Patch { mask: u16::from_le_bytes([id[1], id[2]]).clamp(1, u16::MAX - 1), base: [id[6]; 32] };
        let (len, encoding, patch) = if id[5] & 4 == 0 {
            (1 + u32::from(patch.mask) % 65535, Encoding::LZ4.with(Encoding(id[5] & 2)), None)
        } else {
            (patch.mask.count_ones() * 4096, Encoding(id[5] & 6), (patch.base != *id).then_some(patch))
        };
        let slot = Slot { start, len, crc: Some(7), kind: Kind::Chunk, encoding };
        let written = format::index_record(7, place, id, &slot, patch.as_ref());
        if slot.encoding.patch() == patch.is_some() {
            check_record(&written, record[0], place, read, (*id, slot, patch));
        }
    }
}

/// That a record of pack 7 is read where it was written, and nowhere else, nor with a byte changed.
fn check_record(
    written: &[u8],
    noise: u8,
    place: u32,
    read: impl Fn(u32, u32, &[u8]) -> Option<Record>,
    expected: Record,
) {
    assert_eq!(read(7, place, written), Some(expected));
    assert_eq!(read(7, place + 1, written), None);
    assert_eq!(read(8, place, written), None);
    let mut torn = written.to_vec();
    torn[usize::from(noise) % written.len()] ^= noise | 1;
    assert_eq!(read(7, place, &torn), None);
}

/// What is stored as an object, compressed and encrypted or neither: any bytes are read in bounds, and what was
/// stored is read again.
pub fn stored_object(bytes: &[u8]) {
    let Some((&[kind, encoding, low, high], bytes)) = bytes.split_first_chunk() else { return };
    static KEY: OnceLock<EncryptionKey> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        let provider: Arc<dyn KeyProvider> = Arc::new(LocalKey::from_bytes([1; 32]));
        EncryptionKey::new(&provider, None).unwrap()
    });
    let key = (kind & 2 != 0).then_some(key);
    let kind = if kind & 1 == 0 { Kind::Chunk } else { Kind::Leaf };
    let id = codec::name(kind, bytes, key);

    let mut stored = bytes.to_vec();
    stored.resize(bytes.len().next_multiple_of(4096), 0);
    let len = u32::from_le_bytes([low, high, 0, 0]).min(bytes.len() as u32);
    let slot = Slot { start: 0, len, crc: None, kind, encoding: Encoding(encoding & 3) };
    if let Ok(object) = codec::decode(&slot, &id, stored, key) {
        assert_eq!(object.len(), kind.len());
    }

    let mut object: Vec<u8> = bytes.iter().copied().cycle().take(kind.len()).collect();
    object.resize(kind.len(), 0);
    let compression =
        if encoding < 100 { Compression::WherePays { percent: encoding } } else { Compression::None };
    let patch = Patch { mask: u16::from_le_bytes([low, high]), base: [9; 32] };
    let found = codec::encode(kind, &id, &object, compression, key, codec::Patches::Of(Some(patch)));
    let slot = Slot { start: 0, len: found.len, crc: None, kind, encoding: found.encoding };
    let stored = found.bytes.unwrap_or_else(|| object.clone());
    assert_eq!(slot.units() as usize * 4096, stored.len());
    assert!(stored.len() <= kind.len() && slot.encoding.patch() == found.patch.is_some());
    assert_eq!(slot.encoding.encrypted(), kind == Kind::Chunk && key.is_some());
    let written = format::index_record(7, 3, &id, &slot, found.patch.as_ref());
    let crc = Some(0);
    assert_eq!(format::parse_index_record(2, 7, 3, &written), Some((id, Slot { crc, ..slot }, found.patch)));
    if found.patch.is_none() {
        assert!(codec::decode(&slot, &id, stored, key).unwrap() == object);
    }
}

/// Blocks of the volume whose log is fuzzed: three leaves of the map and a part of one.
const BLOCKS: u64 = 3 * 16384 + 777;

/// A volume's log: as a file it is opened or refused; what it ends with and batches of any runs are read as they were written, and batches leave the map as
/// they leave a plain list of states.
pub fn volume_log(bytes: &[u8]) {
    if let Some((size, base)) =
        std::str::from_utf8(bytes).ok().and_then(|name| format::parse_log_name(name).ok())
    {
        assert_eq!(format::log_name(size, base.as_ref()).as_bytes(), bytes);
    }
    if let Ok(header) = format::parse_volume(bytes) {
        let key = header.key.as_ref().map(|key| format::encode_key(&key.wrapped).len());
        let said = key.map_or(68, |len| 100 + len);
        assert_eq!(format::encode_volume(&header)[..said], bytes[..said]);
    }
    if let Some((sequence, runs, len)) = format::parse_batch(1, BLOCKS, bytes) {
        assert!(len <= bytes.len() && runs.iter().all(|run| run.first + run.count <= BLOCKS));
        assert_eq!(format::encode_batch(1, sequence, &runs)[..28], bytes[..28]);
    }
    let _ = format::parse_closing(1, 0, BLOCKS * BLOCK, bytes);
    any_log(bytes);
    let chunks: BTreeMap<u64, u16> = bytes
        .chunks_exact(4)
        .map(|word| (u64::from(word[0]) << 8 | u64::from(word[1]), u16::from_le_bytes([word[2], word[3]])))
        .collect();
    let sound = chunks.iter().all(|(chunk, blocks)| *chunk < BLOCKS.div_ceil(16) && *blocks != 0);
    let closing = Closing { last: Digest::of(bytes), changed: chunks.into_iter().collect() };
    let written = format::encode_closing(9, 3, &closing);
    let read = written.and_then(|written| format::parse_closing(9, 3, BLOCKS * BLOCK, &written));
    assert_eq!(read, sound.then(|| closing.clone()));
    let runs: Vec<Run> = bytes
        .chunks_exact(7)
        .filter_map(|word| {
            let first = u64::from(u32::from_le_bytes([word[0], word[1], word[2], 0])) % (BLOCKS + 100);
            let count = u64::from(u16::from_le_bytes([word[3], word[4]])) >> (word[5] % 16);
            let state = [State::Base, State::Overlay, State::Zero][usize::from(word[6] % 3)];
            (count > 0).then_some(Run { first, count, state })
        })
        .take(200)
        .collect();
    let batch = format::encode_batch(9, 3, &runs);
    let fits = runs.iter().all(|run| run.first + run.count <= BLOCKS);
    let read = format::parse_batch(9, BLOCKS, &batch);
    assert_eq!(read, fits.then(|| (3, runs.clone(), batch.len())));
    assert_eq!(format::parse_batch(8, BLOCKS, &batch), None, "a batch of another log");
    if !fits {
        return;
    }
    whole_and_damaged_log(&runs, &closing, sound, bytes.first().copied().unwrap_or(0));
    let (map, mut plain) = (StateMap::default(), vec![State::Base; BLOCKS as usize]);
    for run in &runs {
        map.set(*run);
        plain[run.first as usize..(run.first + run.count) as usize].fill(run.state);
    }
    let (mut at, mut overlay_end) = (0, 0);
    for run in map.runs(0, BLOCKS) {
        assert_eq!(run.first, at);
        at += run.count;
        assert!(plain[run.first as usize..at as usize].iter().all(|state| *state == run.state));
        overlay_end = if run.state == State::Overlay { at } else { overlay_end };
    }
    assert_eq!((at, map.overlay_end()), (BLOCKS, overlay_end));
    for run in &runs {
        for (first, count) in [(run.first, run.count), (run.first, 1), (run.first.saturating_sub(1), 2)] {
            let there = &plain[first as usize..][..count as usize];
            let in_one_look = count <= 32 - first % 32;
            let expect = in_one_look && there.iter().all(|state| *state == run.state);
            assert_eq!(map.is_at_once(first, count, run.state), expect, "{first} {count}");
        }
    }
    let per_chunk = (format::CHUNK / BLOCK) as usize;
    let bit = |state: &State, at: u32| u16::from(*state != State::Base) << at;
    let bits = |chunk: &[State]| chunk.iter().zip(0..).map(|(state, at)| bit(state, at)).sum();
    let changed: Vec<(u64, u16)> = (plain.chunks(per_chunk).zip(0..))
        .map(|(chunk, number)| (number, bits(chunk)))
        .filter(|(_, blocks)| *blocks > 0)
        .collect();
    let found: Vec<(u64, u16)> =
        map.changed_chunks().map(|chunk| (chunk, map.changed_blocks(chunk))).collect();
    assert_eq!(found, changed);
}

/// Opens a volume's log of these bytes, or of zeroes behind them where they are too few to be one.
fn open_log(dir: &Path, bytes: &[u8]) -> Result<(Log, StateMap)> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().max(LOG_LEAST), 0);
    std::fs::write(dir.join("log"), bytes).unwrap();
    Log::open(dir)
}

/// The length of the shortest log that says anything.
const LOG_LEAST: usize = 32 << 10;

/// A directory in memory, where there is one.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Any bytes are refused as a log, or are one that says the same when it is opened once more, but for what stood at its
/// end: that holds until it is opened.
fn any_log(bytes: &[u8]) {
    // What a volume of many terabytes says takes gigabytes.
    if format::parse_volume(bytes).is_ok_and(|header| header.size > 1 << 40) {
        return;
    }
    let dir = scratch();
    match open_log(dir.path(), bytes) {
        Ok((log, map)) => {
            let blocks = log.header().size / BLOCK;
            drop(log);
            let (mut again, same) = Log::open(dir.path()).unwrap();
            assert_eq!((same.runs(0, blocks), again.take_closing()), (map.runs(0, blocks), None));
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}"),
    }
}

/// A log of batches of these runs, of which one is damaged, or none: it says what it said before, and goes on from
/// there, if it is the last one, as a crash may have left that; else it is refused.
fn whole_and_damaged_log(runs: &[Run], closing: &Closing, sound: bool, noise: u8) {
    let dir = scratch();
    let header = VolumeHeader { size: BLOCKS * BLOCK, base: None, log: 9, key: None };
    let mut bytes = format::encode_volume(&header);
    let batches: Vec<&[Run]> = runs.chunks(20).collect();
    let damaged = usize::from(noise) % (batches.len() + 1);
    for (batch, sequence) in batches.iter().zip(0..) {
        let start = bytes.len();
        bytes.extend(format::encode_batch(9, sequence, batch));
        if sequence as usize == damaged {
            bytes[start + usize::from(noise) % 28] ^= noise | 1;
        }
    }
    bytes.extend(format::encode_closing(9, batches.len() as u64, closing).unwrap_or_default());
    let opened = open_log(dir.path(), &bytes);
    if damaged + 1 < batches.len() {
        assert_eq!(opened.map(drop).map_err(|error| error.kind()), Err(ErrorKind::Corrupt));
        return;
    }
    let map = |batches: &[&[Run]]| {
        let map = StateMap::default();
        batches.concat().iter().for_each(|run| map.set(*run));
        map.runs(0, BLOCKS)
    };
    let (mut log, found) = opened.unwrap();
    assert_eq!(found.runs(0, BLOCKS), map(&batches[..damaged]));
    let whole = damaged == batches.len();
    assert_eq!(log.take_closing(), (whole && sound).then(|| closing.clone()));
    for batch in &batches[damaged..] {
        assert!(log.append(batch).is_ok());
    }
    drop(log);
    let (mut log, found) = Log::open(dir.path()).unwrap();
    assert_eq!((found.runs(0, BLOCKS), log.take_closing()), (map(&batches), None));
}

/// What the fuzz targets of the NBD server and client run.
pub use crate::nbd::fuzzing::{nbd_client, nbd_negotiation, nbd_replies, nbd_requests, nbd_server};

#[cfg(test)]
mod tests {
    use super::Path;

    fn run_all(dir: &Path, run: &mut usize) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                run_all(&path, run);
                continue;
            }
            let bytes = std::fs::read(path).unwrap();
            for target in [
                super::snapshot,
                super::pack_index,
                super::stored_object,
                super::volume_log,
                super::nbd_requests,
                super::nbd_negotiation,
                super::nbd_client,
                super::disk_requests,
                super::nbd_replies,
                super::nbd_server,
            ] {
                target(&bytes);
                *run += 1;
            }
        }
    }

    #[test]
    fn every_target_bears_the_corpus() {
        let mut run = 0;
        for dir in ["../fuzz/seeds", "tests/golden"] {
            run_all(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), &mut run);
        }
        assert!(run > 50, "the corpus is not there");
    }
}
