//! Zeroes and discards, of which one request may be 4 GiB.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
        // All that is saved up is used when it is this much, and not before.
        for (extra, used_up) in [(0, true), (1, false)] {
            let slow = |burst| Some(Rate { per_second: 1, burst });
            let ops = Limiter::new(IoLimits { ops: slow(1 + extra), ..IoLimits::NONE });
            let counted =
                Limiter::new(IoLimits { bytes: slow(u64::from(bytes) + extra * 4096), ..IoLimits::NONE });
            let socket = dir.path().join(format!("{number}-{extra}"));
            let server = nbd::Server::bind(socket, disk.limited(&ops).limited(&counted)).unwrap();
            let mut client = connect(&server);
            client.write_all(&request(flags, kind, 4096, len)).unwrap();
            assert_eq!(reply(&mut client), 0, "{what}");
            assert_eq!(ops.delay().is_some(), used_up, "{what}: operations, and {extra} more");
            assert_eq!(counted.delay().is_some(), used_up && bytes > 0, "{what}: bytes, and {extra} more");
        }
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
        while zeroed.load(Ordering::Acquire) == 0 {
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
