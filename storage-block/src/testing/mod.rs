//! What every [`BlockBackend`](crate::BlockBackend) has to pass.

mod claiming;
pub(crate) mod queue;
mod vectored;

pub use self::claiming::claiming;
use crate::{Disk, ErrorKind, IoBufMut, IoLimits, Limiter, Rate};

/// Checks that disks behave as the contract of [`BlockBackend`](crate::BlockBackend) says: `make` makes
/// one of the size it is given, writable and all zeroes. Meant to be called in a test.
///
/// It covers the bounds of requests, alignment, several buffers at once, several threads at once, queues with each
/// engine that there is, limits, and random operations; all against plain memory.
///
/// Where there is no io_uring to be had it says so on the standard error. Where the environment has a `CI`, and the kernel
/// permits one all the same, it fails.
///
/// ```
/// use storage_block::{MemoryDisk, testing};
///
/// testing::conformance(|size| MemoryDisk::new(size).expect("a size it can have").into_disk());
/// ```
///
/// # Panics
///
/// When a disk does not.
pub fn conformance(make: impl Fn(u64) -> Disk) {
    bounds(&make(1 << 20));
    edges(&make(1 << 20));
    neighbours(&make(1 << 20));
    vectored::bounds(&make(1 << 20));
    vectored::shapes(&make(1 << 20));
    vectored::capabilities(&make(1 << 20));
    queue::random_requests(&make(3 << 20), 500);
    limited(&make(1 << 20));
    random_operations(&make(3 << 20), 600, 1);
}

/// Checks a disk that can only be read against what it should hold.
///
/// ```
/// use storage_block::{MemoryDisk, Store, testing};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path())?;
/// let (snapshot, _) = store.import(&MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk(), &mut |_| ())?;
/// testing::read_only(&snapshot.disk(), &[7; 1 << 20]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Panics
///
/// When it can be written, or holds anything else.
pub fn read_only(disk: &Disk, contents: &[u8]) {
    assert!(disk.read_only(), "it does not say that it can only be read");
    let results = [disk.write_at(&[1], 0), disk.discard(0, 512), disk.write_zeroes(0, 512)];
    for (result, what) in results.into_iter().zip(["write", "discard", "zeroing"]) {
        assert_eq!(result.map_err(|e| e.kind()), Err(ErrorKind::ReadOnly), "{what}");
    }
    disk.flush().expect("a flush of what cannot change");
    vectored::capabilities(disk);
    compare(disk, contents, "of what can only be read");
    read_edges(disk, contents);
    let mut random = Random(7);
    let mut queue = disk.queue(8).expect("a queue");
    for _ in 0..200 {
        let lens = [random.below(5000), random.below(70_000)].map(|len| len.min(disk.size() / 2));
        let offset = random.below(disk.size() - lens[0] - lens[1] + 1);
        let mut parts = lens.map(|len| vec![0xee; len as usize]);
        let [first, second] = &mut parts;
        disk.read_vectored_at(&mut [IoBufMut::new(first), IoBufMut::new(second)], offset).expect("a read");
        let expected = &contents[offset as usize..][..(lens[0] + lens[1]) as usize];
        assert!(parts.concat() == expected, "a read of {lens:?} at {offset} finds other bytes");
        queue.read(offset, offset, vec![0xee; expected.len()]);
    }
    while let Some(done) = queue.wait() {
        done.result.expect("a read");
        let found = done.buffer.expect("its buffer");
        assert!(found == contents[done.token as usize..][..found.len()], "a queue finds other bytes");
    }
}

/// Reads that begin and end anywhere find what they cover, and those that leave the disk are refused.
fn read_edges(disk: &Disk, contents: &[u8]) {
    let size = contents.len();
    for at in [0, 1, 511, 4095, 65_535, 65_536, size / 3, size.saturating_sub(1)].map(|at| at.min(size)) {
        for len in [1, 512, 4097, 70_000].map(|len| len.min(size - at)) {
            let mut buf = vec![0xee; len];
            disk.read_at(&mut buf, at as u64).expect("a read");
            assert!(buf == contents[at..at + len], "a read of {len} bytes at {at} finds other bytes");
        }
    }
    for (at, len) in [(size as u64, 1), (size as u64 - 1, 2), (u64::MAX, 1)] {
        let refused = disk.read_at(&mut vec![0; len], at).map_err(|error| error.kind());
        assert_eq!(refused, Err(ErrorKind::OutOfBounds), "a read of {len} bytes at {at}");
    }
}

/// Limits change what a disk does in no way.
fn limited(disk: &Disk) {
    let all = Rate { per_second: 1 << 30, burst: 100 };
    let limiter = Limiter::new(IoLimits { ops: Some(all), bytes: Some(all) });
    let limited = disk.limited(&limiter);
    assert_eq!((limited.size(), limited.read_only()), (disk.size(), disk.read_only()));
    random_operations(&limited, 200, 11);
    disk.write_zeroes(0, disk.size()).expect("zeroing");
    queue::random_requests(&limited, 200);
}

/// Requests that leave the disk are refused, and change nothing.
fn bounds(disk: &Disk) {
    let size = disk.size();
    assert_eq!(size, 1 << 20, "the size is not the one asked for");
    let mut buf = [1; 512];
    for (offset, len, ok) in [
        (0, 0, true),
        (0, 512, true),
        (size - 512, 512, true),
        (size, 0, true),
        (size, 1, false),
        (size - 511, 512, false),
        (u64::MAX, 1, false),
        (u64::MAX - 511, 512, false),
    ] {
        let part = &mut buf[..len as usize];
        let results = [
            disk.read_at(part, offset),
            disk.write_at(&vec![0; len as usize], offset),
            disk.discard(offset, len),
            disk.write_zeroes(offset, len),
        ];
        for (result, what) in results.into_iter().zip(["read", "write", "discard", "zeroing"]) {
            let kind = result.map_err(|error| error.kind());
            let expected = if ok { Ok(()) } else { Err(ErrorKind::OutOfBounds) };
            assert_eq!(kind, expected, "{what} of {len} bytes at {offset}");
        }
    }
    zeroes(disk, "when it is new");
}

/// Requests that begin and end anywhere change what they cover and nothing else.
fn edges(disk: &Disk) {
    let mut oracle = vec![0; disk.size() as usize];
    let places = [0, 1, 511, 512, 4095, 4096, 4097, 65535, 65536, 65537, (1 << 20) - 70000];
    let lens = [1, 511, 512, 4096, 4097, 65536, 69999];
    for (round, (offset, len)) in places.iter().flat_map(|p| lens.map(|l| (*p, l))).enumerate() {
        let bytes = vec![round as u8 | 1; len];
        disk.write_at(&bytes, offset as u64).expect("a write");
        oracle[offset..offset + len].copy_from_slice(&bytes);
        let zeroed = offset + len / 3..offset + len / 2;
        let (from, count) = (zeroed.start as u64, zeroed.len() as u64);
        if round % 2 == 0 { disk.discard(from, count) } else { disk.write_zeroes(from, count) }
            .expect("zeroing");
        oracle[zeroed].fill(0);
        disk.flush().expect("a flush");
    }
    compare(disk, &oracle, "after writes at edges");
}

/// Threads that write to different bytes of one block do not undo each other's work.
fn neighbours(disk: &Disk) {
    const PART: usize = 512;
    for round in 1..=20u8 {
        std::thread::scope(|scope| {
            for part in 0..16 {
                scope.spawn(move || {
                    let offset = u64::from(round) * 8192 + part * PART as u64;
                    match part % 3 {
                        0 => disk.write_at(&[round; PART], offset).expect("a write"),
                        1 => {
                            disk.write_at(&[round; PART], offset).expect("a write");
                            disk.discard(offset, PART as u64).expect("a discard");
                        }
                        _ => {
                            disk.write_zeroes(offset, PART as u64).expect("zeroing");
                            disk.write_at(&[round; PART], offset).expect("a write");
                        }
                    }
                });
            }
        });
        let mut buf = vec![0; 8192];
        disk.read_at(&mut buf, u64::from(round) * 8192).expect("a read");
        for (part, bytes) in buf.chunks(PART).enumerate() {
            let expected = if part % 3 == 1 { 0 } else { round };
            assert!(
                bytes.iter().all(|b| *b == expected),
                "part {part} of round {round} is not all {expected}"
            );
        }
    }
}

/// Random operations against plain memory.
fn random_operations(disk: &Disk, count: usize, seed: u64) {
    let mut oracle = vec![0; disk.size() as usize];
    let mut random = Random(seed);
    for _ in 0..count {
        random_operation(disk, &mut oracle, &mut random);
    }
    compare(disk, &oracle, "after random operations");
}

/// Does one operation to a disk and to what it should hold.
pub(crate) fn random_operation(disk: &Disk, oracle: &mut [u8], random: &mut Random) {
    let size = oracle.len() as u64;
    // Most requests are short, some span chunks, and every second begins on a block.
    let limit = [4096, 16384, 300_000][random.below(3) as usize];
    let align = [1, 4096][random.below(2) as usize];
    let offset = random.below(size / align) * align;
    let len = (random.below(limit).next_multiple_of(align)).min(size - offset);
    let range = offset as usize..(offset + len) as usize;
    match random.below(10) {
        0..=4 => {
            let fill = random.below(255) as u8 + 1;
            disk.write_at(&vec![fill; len as usize], offset).expect("a write");
            oracle[range].fill(fill);
        }
        5 => {
            disk.discard(offset, len).expect("a discard");
            oracle[range].fill(0);
        }
        6 => {
            disk.write_zeroes(offset, len).expect("zeroing");
            oracle[range].fill(0);
        }
        7 => disk.flush().expect("a flush"),
        _ => {
            let mut buf = vec![0xee; len as usize];
            disk.read_at(&mut buf, offset).expect("a read");
            assert!(buf == oracle[range], "a read of {len} bytes at {offset} finds other bytes");
        }
    }
}

/// Checks every byte, and that what is said to be holes is zeroes.
pub(crate) fn compare(disk: &Disk, oracle: &[u8], when: &str) {
    assert_eq!(disk.size(), oracle.len() as u64, "{when}: the size is another");
    let found = contents(disk);
    // Equal slices are compared much faster than single bytes.
    if found != oracle {
        let at = found.iter().zip(oracle).position(|(a, b)| a != b).unwrap_or_default();
        panic!("{when}: byte {at} is {} and not {}", found[at], oracle[at]);
    }
    let mut at = 0;
    while at < disk.size() {
        let data = disk.next_data(at).expect("holes");
        let (start, end) = data.map_or((disk.size(), disk.size()), |data| (data.start, data.end));
        let hole = &oracle[at as usize..start as usize];
        assert!(crate::import::is_zero(hole), "{when}: the hole at {at} is none");
        at = end;
    }
}

fn zeroes(disk: &Disk, when: &str) {
    assert!(contents(disk).iter().all(|byte| *byte == 0), "a disk is not all zeroes {when}");
}

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0).expect("a read of everything");
    bytes
}

/// A generator of numbers that are the same in every run (SplitMix64).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `limit`, which is not zero.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % limit
    }
}
