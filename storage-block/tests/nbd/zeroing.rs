//! Zeroes and discards, of which one request may be 4 GiB.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use storage_block::{BlockBackend, Disk, IoLimits, Limiter, MemoryDisk, Rate, RawFile, Result, nbd};

use crate::wire::*;

const TRIM: u16 = 4;
const ZEROES: u16 = 6;
const NO_HOLE: u16 = 1 << 1;

/// However many parts a request is done in it is one operation, and its bytes are those that are written.
#[test]
fn zeroing_counts_once_against_the_limits() {
    let dir = tempfile::tempdir().unwrap();
    let raw = RawFile::create(dir.path().join("disk"), 64 << 20).unwrap().into_disk();
    let memory = MemoryDisk::new(64 << 20).unwrap().into_disk();
    let len = 40 << 20;
    for (number, (what, disk, kind, flags, bytes)) in [
        ("zeroes that are written", &raw, ZEROES, NO_HOLE, len),
        ("zeroes", &raw, ZEROES, 0, 0),
        ("a discard", &raw, TRIM, 0, 0),
        ("zeroes in memory", &memory, ZEROES, 0, len),
        ("a discard in memory", &memory, TRIM, 0, len),
    ]
    .into_iter()
    .enumerate()
    {
        // What is left of so much that no second more or less of it matters.
        const MUCH: u64 = 1 << 40;
        let of = |per_second| Some(Rate { per_second, burst: MUCH });
        let ops = Limiter::new(IoLimits { ops: of(1), ..IoLimits::NONE });
        let counted = Limiter::new(IoLimits { bytes: of(1), ..IoLimits::NONE });
        let server =
            nbd::Server::bind(dir.path().join(number.to_string()), disk.limited(&ops).limited(&counted));
        let server = server.unwrap();
        let (mut client, begun) = (connect(&server), Instant::now());
        client.write_all(&request(flags, kind, 4096, len)).unwrap();
        assert_eq!(reply(&mut client), 0, "{what}");
        // Each second gives one back.
        let used = |limiter: &Limiter, charge: fn(&Limiter, u64)| {
            charge(limiter, MUCH);
            let owed = limiter.delay().map_or(0, |delay| delay.as_secs());
            owed..=owed + begun.elapsed().as_secs() + 2
        };
        let operations = used(&ops, |limiter, much| limiter.charge(much, 0));
        assert!(operations.contains(&1) && *operations.start() < 100, "{what}: {operations:?} operations");
        let written = used(&counted, |limiter, much| limiter.charge(0, much));
        assert!(written.contains(&u64::from(bytes)), "{what}: {written:?} bytes");
    }
}

/// A disk that takes its time to write zeroes, and counts them.
#[derive(Debug)]
struct Slow(Arc<AtomicU64>);

impl BlockBackend for Slow {
    fn size(&self) -> u64 {
        1 << 32
    }

    fn read_at(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_zeroes(offset, buf.len() as u64)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, len: u64) -> Result<()> {
        self.0.fetch_add(len, Ordering::AcqRel);
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }
}

#[test]
fn dropping_the_server_ends_zeroing_under_way() {
    for (kind, flags) in [(ZEROES, NO_HOLE), (ZEROES, 0), (TRIM, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let zeroed = Arc::new(AtomicU64::new(0));
        let disk = Disk::new(Slow(Arc::clone(&zeroed))).unwrap();
        let server = nbd::Server::bind(dir.path().join("s"), disk).unwrap();
        let mut client = connect(&server);
        client.write_all(&request(flags, kind, 512, u32::MAX - 512)).unwrap();
        let begun = Instant::now();
        while zeroed.load(Ordering::Acquire) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{kind} with {flags} does not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(server);
        let zeroed = zeroed.load(Ordering::Acquire);
        assert!(zeroed < 1 << 31, "{kind} with {flags}: {zeroed} bytes were waited for");
        // It may be told why it ends.
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        assert!(rest.is_empty() || rest[4..8] == 108u32.to_be_bytes(), "{rest:x?}");
    }
}
