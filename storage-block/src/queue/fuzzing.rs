//! Requests of any kind, place and shape, for the fuzz target.

use std::sync::OnceLock;

use crate::{Disk, ErrorKind, IoBuf, IoBufMut, MemoryDisk, Queue, RawFile, Result, Snapshot, Store, Volume};

const SIZE: usize = 192 << 10;
/// Bytes that say what one request is.
const RECORD: usize = 16;
/// More than most inputs ask for, and little enough to be done soon.
const REQUESTS: usize = 64;

/// What every disk begins as: bytes that differ from their neighbours, and a hole of a chunk and a half.
fn beginning() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..SIZE).map(|at| (at % 253) as u8 + 1).collect();
    bytes[(60 << 10)..(156 << 10)].fill(0);
    bytes
}

/// A snapshot of that, one for all runs.
fn base() -> &'static Snapshot {
    static BASE: OnceLock<(tempfile::TempDir, Store, Snapshot)> = OnceLock::new();
    let (_, _, base) = BASE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let image = MemoryDisk::from_vec(beginning()).unwrap().into_disk();
        let (snapshot, _) = store.import(&image, &mut |_| ()).unwrap();
        (dir, store, snapshot)
    });
    base
}

/// Requests to a file and to a volume, by calls and by a queue: each does to the disk what it does to plain
/// memory, or is refused and does nothing.
pub(crate) fn disk_requests(bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let raw = RawFile::create(dir.path().join("raw"), SIZE as u64).unwrap().into_disk();
    raw.write_at(&beginning(), 0).unwrap();
    let volume =
        Volume::create_unsynced(&dir.path().join("volume"), Some(base()), SIZE as u64).unwrap().disk();
    for disk in [&raw, &volume] {
        let mut oracle = beginning();
        let mut queue = disk.queue(4).unwrap();
        for record in bytes.chunks_exact(RECORD).take(REQUESTS) {
            request(disk, &mut queue, &mut oracle, record);
        }
        let mut found = vec![0; SIZE];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == oracle, "the disk is another than plain memory");
    }
}

fn request(disk: &Disk, queue: &mut Queue, oracle: &mut [u8], record: &[u8]) {
    let word = |at: usize| u16::from_le_bytes([record[at], record[at + 1]]);
    let offset = match record[1] {
        0xff => u64::MAX - u64::from(word(2)),
        high => u64::from(high % 4) << 16 | u64::from(word(2)),
    };
    let mut parts: Vec<Vec<u8>> =
        [4, 6, 8, 10].map(|at| vec![record[12] | 1; usize::from(word(at))]).into_iter().collect();
    parts.truncate(usize::from(record[13] % 5));
    let len: u64 = parts.iter().map(|part| part.len() as u64).sum();
    let inside = offset.checked_add(len).is_some_and(|end| end <= SIZE as u64);
    let range = if inside { offset as usize..(offset + len) as usize } else { 0..0 };
    let queued = record[0] & 0x80 != 0;
    let op = record[0] % 5;
    let result = match (op, queued) {
        (0, true) => {
            let mut bufs: Vec<_> = parts.iter_mut().map(|part| IoBufMut::new(part)).collect();
            // SAFETY: the request is waited for before the memory is looked at.
            unsafe { queue.read_raw(1, offset, &mut bufs) };
            wait(queue)
        }
        (0, false) => {
            let mut bufs: Vec<_> = parts.iter_mut().map(|part| IoBufMut::new(part)).collect();
            disk.read_vectored_at(&mut bufs, offset)
        }
        (1, true) => {
            let bufs: Vec<_> = parts.iter().map(|part| IoBuf::new(part)).collect();
            // SAFETY: the request is waited for before the memory goes.
            unsafe { queue.write_raw(1, offset, &bufs) };
            wait(queue)
        }
        (1, false) => {
            let mut bufs: Vec<_> = parts.iter().map(|part| IoBuf::new(part)).collect();
            disk.write_vectored_at(&mut bufs, offset)
        }
        (2, true) => {
            queue.discard(1, offset, len);
            wait(queue)
        }
        (2, false) => disk.discard(offset, len),
        (3, true) => {
            queue.write_zeroes(1, offset, len);
            wait(queue)
        }
        (3, false) => disk.write_zeroes(offset, len),
        _ => {
            queue.flush(1);
            assert!(wait(queue).is_ok());
            return;
        }
    };
    let expected = if inside { Ok(()) } else { Err(ErrorKind::OutOfBounds) };
    assert_eq!(result.map_err(|error| error.kind()), expected);
    match op {
        0 if inside => assert!(parts.concat() == oracle[range], "a read finds other bytes"),
        1 => oracle[range].fill(record[12] | 1),
        2 | 3 => oracle[range].fill(0),
        _ => {}
    }
}

fn wait(queue: &mut Queue) -> Result<()> {
    let done = queue.wait().unwrap();
    assert_eq!((done.token, queue.in_flight()), (1, 0));
    done.result
}
