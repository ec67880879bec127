//! What the fuzz targets run, and the tests over the corpus. No part of the interface.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::RwLock;

use crate::format::{self, BLOCK, INDEX_HEADER, INDEX_RECORD, Run, State};
use crate::map::StateMap;
use crate::nbd::fuzzing as nbd;
use crate::{Disk, MemoryDisk};

/// A snapshot's root, and a leaf: what is read is what is written.
pub fn snapshot(bytes: &[u8]) {
    if let Ok((size, leaves)) = format::parse_root(bytes) {
        let mut again = format::encode_root(size, &leaves);
        // What is reserved may hold anything, as the digest covers it too.
        again[40..format::ROOT_HEADER].copy_from_slice(&bytes[40..format::ROOT_HEADER]);
        assert_eq!(again, bytes);
        assert!(size <= format::MAX_SIZE && size.div_ceil(format::LEAF_SPAN) == leaves.len() as u64);
    }
    let ids = format::split_ids(bytes);
    assert_eq!(ids.as_flattened(), &bytes[..bytes.len() / 32 * 32]);
}

/// A pack's index: a record that is taken is the one that was written there, and nowhere else.
pub fn pack_index(bytes: &[u8]) {
    for number in [0, 7] {
        let whole = format::check_index_header(bytes, number).is_ok();
        let header = format::index_header(number);
        assert!(!whole || bytes[..28] == header[..28]);
        assert!(format::check_pack_header(bytes, number).is_err() || bytes.len() >= 4096);
    }
    let records = bytes.get(INDEX_HEADER..).unwrap_or(bytes).chunks(INDEX_RECORD);
    for (record, slot) in records.zip(0..) {
        if let Some((id, kind)) = format::parse_index_record(7, slot, record) {
            assert_eq!(format::index_record(7, slot, &id, kind), record);
        }
        let Some(id) = record.first_chunk::<32>() else { continue };
        let written = format::index_record(7, slot, id, format::Kind::Leaf);
        assert_eq!(format::parse_index_record(7, slot, &written), Some((*id, format::Kind::Leaf)));
        assert_eq!(format::parse_index_record(7, slot + 1, &written), None);
        assert_eq!(format::parse_index_record(8, slot, &written), None);
        let mut torn = written;
        torn[usize::from(record[0]) % INDEX_RECORD] ^= record[0] | 1;
        assert_eq!(format::parse_index_record(7, slot, &torn), None);
    }
}

/// Blocks of the volume whose log is fuzzed: three leaves of the map and a part of one.
const BLOCKS: u64 = 3 * 16384 + 777;

/// A volume's log: batches of any runs are read as they were written, and leave the map as they
/// leave a plain list of states.
pub fn volume_log(bytes: &[u8]) {
    if let Ok(header) = format::parse_volume(bytes) {
        assert_eq!(format::encode_volume(&header)[..68], bytes[..68]);
    }
    if let Some((sequence, runs, len)) = format::parse_batch(1, BLOCKS, bytes) {
        assert!(len <= bytes.len() && runs.iter().all(|run| run.first + run.count <= BLOCKS));
        assert_eq!(format::encode_batch(1, sequence, &runs)[..28], bytes[..28]);
    }
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

/// Requests of an NBD client: on a disk, in one session, against a plain list of bytes.
pub fn nbd_requests(bytes: &[u8]) {
    const SIZE: usize = 64 << 10;
    nbd::request(bytes);
    let disk = memory(SIZE);
    let mut plain = vec![0; SIZE];
    session(&disk, |stream| {
        for (number, word) in bytes.chunks_exact(9).take(40).enumerate() {
            let command = u16::from(word[0] % 8);
            let flags = u16::from(word[1] & 3) & if word[1] & 0x80 == 0 { 1 } else { 3 };
            // Mostly within the disk, and sometimes beyond its end or that of all numbers.
            let mut offset = u64::from(u16::from_le_bytes([word[2], word[3]]));
            let mut len = u32::from(u16::from_le_bytes([word[4], word[5]])) >> (word[6] % 8);
            if word[7] == 0xff {
                offset = u64::MAX - offset;
            }
            if word[7] == 0xfe && command != 1 {
                len = u32::MAX - len;
            }
            if command == 2 {
                continue;
            }
            let data = vec![word[8]; if command == 1 { len as usize } else { 0 }];
            let handle = (number as u64).to_be_bytes();
            stream.write_all(&nbd::encode(flags, command, handle, offset, len)).unwrap();
            stream.write_all(&data).unwrap();
            let mut reply = [0; 16];
            stream.read_exact(&mut reply).unwrap();
            let errno = u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]);
            assert_eq!(reply[8..], handle);

            let end = offset.checked_add(u64::from(len)).filter(|end| *end <= SIZE as u64);
            let known = if command == 6 { 3 } else { 1 };
            let fine = match command {
                3 => flags & !known == 0,
                0 | 1 | 4 | 6 => flags & !known == 0 && end.is_some(),
                _ => false,
            };
            assert_eq!(errno == 0, fine, "command {command}, flags {flags}, {len} at {offset}: {errno}");
            let (Some(end), true) = (end, fine) else { continue };
            let range = offset as usize..end as usize;
            match command {
                0 => {
                    let mut found = vec![0; len as usize];
                    stream.read_exact(&mut found).unwrap();
                    assert!(found == plain[range], "{len} bytes at {offset}");
                }
                1 => plain[range].fill(word[8]),
                4 | 6 => plain[range].fill(0),
                _ => {}
            }
        }
    });
    let mut found = vec![0; SIZE];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found == plain);
}

/// A client that says anything: it is served or hung up on, and no thread stays.
pub fn nbd_client(bytes: &[u8]) {
    let disk = memory(4096);
    let (client, server) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = nbd::serve(&disk, &server, &RwLock::default());
            let _ = rustix::net::shutdown(&server, rustix::net::Shutdown::Both);
        });
        scope.spawn(|| {
            // Whatever it answers is read, so that it never waits for room.
            let _ = std::io::copy(&mut &client, &mut std::io::sink());
        });
        let _ = (&client).write_all(bytes);
        let _ = rustix::net::shutdown(&client, rustix::net::Shutdown::Write);
    });
}

fn memory(size: usize) -> Disk {
    MemoryDisk::from_vec(vec![0; size]).unwrap().into_disk()
}

/// A session after the handshake, to its orderly end.
fn session(disk: &Disk, talk: impl FnOnce(&mut UnixStream)) {
    let (mut client, server) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| nbd::serve(disk, &server, &RwLock::default()).unwrap());
        let mut greeting = [0; 18];
        client.read_exact(&mut greeting).unwrap();
        client.write_all(&nbd::export_name()).unwrap();
        client.read_exact(&mut [0; 10]).unwrap();
        talk(&mut client);
        client.write_all(&nbd::encode(0, 2, [0; 8], 0, 0)).unwrap();
    });
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
                super::volume_log,
                super::nbd_requests,
                super::nbd_client,
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
