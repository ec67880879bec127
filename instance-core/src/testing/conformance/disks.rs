//! Disks that guests read and write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use storage_block::{BlockBackend, Disk, Error, ErrorKind, Result as BlockResult};

use super::{TestBed, disk, sector_of, word_at};
use crate::machine::DiskSpec;

pub(super) fn reads_and_writes_disks(bed: &TestBed<'_>) {
    let (first, second) = (disk(2048), disk(2048));
    for sector in [0, 1, 2047] {
        first.write_at(&sector_of(&format!("host{sector}")), sector * 512).expect("written");
    }
    let mut guest =
        bed.up(vec![DiskSpec::new(first.clone(), "first"), DiskSpec::new(second.clone(), "second")]);
    for sector in [0, 1, 2047] {
        guest.expect_answer(&format!("read 0 {sector}"), &format!("data host{sector}"));
        guest.expect_answer(&format!("read 1 {sector}"), "data");
        guest.expect_answer(&format!("write 1 {sector} guest{sector}"), "wrote");
        guest.expect_answer(&format!("read 1 {sector}"), &format!("data guest{sector}"));
        assert_eq!(word_at(&second, sector), format!("guest{sector}"));
        assert_eq!(word_at(&first, sector), format!("host{sector}"), "the other disk is untouched");
    }
    assert_eq!(word_at(&second, 2), "", "the neighbouring sector is untouched");
}

/// A disk that counts flushes, fails when told to, and can be read-only.
#[derive(Debug)]
pub(super) struct Probe {
    inner: Disk,
    read_only: bool,
    log: Arc<ProbeLog>,
}

#[derive(Debug, Default)]
pub(super) struct ProbeLog {
    pub(super) flushes: AtomicU64,
    fail: AtomicBool,
}

impl Probe {
    pub(super) fn disk(read_only: bool) -> (DiskSpec, Arc<ProbeLog>, Disk) {
        let (inner, log) = (disk(2048), Arc::<ProbeLog>::default());
        let probe = Probe { inner: inner.clone(), read_only, log: log.clone() };
        (DiskSpec::new(Disk::new(probe).expect("a whole number of sectors"), "probe"), log, inner)
    }

    pub(super) fn check(&self) -> BlockResult<()> {
        match self.log.fail.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Io, "the probe was told to fail")),
            false => Ok(()),
        }
    }
}

impl BlockBackend for Probe {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.check()?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        self.check()?;
        self.inner.write_at(buf, offset)
    }

    fn flush(&self) -> BlockResult<()> {
        self.log.flushes.fetch_add(1, Ordering::SeqCst);
        self.check()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BlockResult<()> {
        self.check()?;
        self.inner.write_zeroes(offset, len)
    }
}

pub(super) fn flushes_when_the_guest_does(bed: &TestBed<'_>) {
    let (spec, log, _) = Probe::disk(false);
    let mut guest = bed.up(vec![spec]);
    guest.expect_answer("write 0 7 durable", "wrote");
    let before = log.flushes.load(Ordering::SeqCst);
    guest.expect_answer("flush 0", "flushed");
    assert!(log.flushes.load(Ordering::SeqCst) > before, "the guest's flush did not reach the disk");
}

pub(super) fn tells_the_guest_of_a_disk_that_fails(bed: &TestBed<'_>) {
    let (spec, log, _) = Probe::disk(false);
    let mut guest = bed.up(vec![spec]);
    log.fail.store(true, Ordering::SeqCst);
    guest.expect_answer("read 0 100", "error");
    guest.expect_answer("write 0 100 x", "error");
    log.fail.store(false, Ordering::SeqCst);
    guest.expect_answer("write 0 100 again", "wrote");
    guest.expect_answer("read 0 100", "data again");
}

pub(super) fn refuses_writes_to_a_read_only_disk(bed: &TestBed<'_>) {
    let (spec, _, inner) = Probe::disk(true);
    inner.write_at(&sector_of("kept"), 0).expect("written");
    let mut guest = bed.up(vec![spec]);
    guest.expect_answer("read 0 0", "data kept");
    guest.expect_answer("write 0 0 gone", "error");
    guest.expect_answer("read 0 0", "data kept");
    assert_eq!(word_at(&inner, 0), "kept");
}
