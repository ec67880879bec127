//! Disks that come, go and grow while the machine runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use storage_block::{BlockBackend, Disk, MemoryDisk, Result as BlockResult};

use super::{Guest, Probe, TestBed, disk, sector_of, word_at};
use crate::console::Console;
use crate::machine::{Detach, DiskSpec, MachineError, MachineErrorKind};

/// The disk that no machine gives up.
const ROOT: &str = "vol-root";
const HOT: &str = "vol-hot";

impl Guest {
    /// Where the guest has the disk with this serial number.
    fn find(&mut self, serial: &str) -> Option<usize> {
        let disks: usize = self.ask("disks", "disks").parse().expect("a number");
        // One that goes while the guest is asked for it is an error, not a serial number.
        (0..disks).find(|n| self.ask_any(&format!("serial {n}"), &["serial", "error"]) == serial)
    }

    /// Asks until it has the disk, and where.
    fn until_it_has(&mut self, serial: &str) -> usize {
        let deadline = self.deadline();
        loop {
            if let Some(n) = self.find(serial) {
                return n;
            }
            assert!(Instant::now() < deadline, "the guest does not see disk {serial}");
        }
    }

    fn until_it_has_only(&mut self, disks: usize) {
        let deadline = self.deadline();
        while self.ask("disks", "disks") != disks.to_string() {
            assert!(Instant::now() < deadline, "the guest sees a disk that it has no more");
        }
    }

    fn ask_to_let_go(&self, serial: &str) -> Result<(), MachineError> {
        self.machine.detach_disk(serial, Detach::Ask { until: self.deadline() })
    }
}

#[track_caller]
pub(super) fn refused(done: Result<(), MachineError>, kind: MachineErrorKind) {
    let refused = done.expect_err("it is not possible");
    assert_eq!(refused.kind(), kind, "{refused}");
}

fn root() -> DiskSpec {
    DiskSpec::new(disk(2048), ROOT)
}

pub(super) fn attaches_and_detaches(bed: &TestBed<'_>) {
    let soon = Detach::Ask { until: Instant::now() + bed.patience };
    let console = Console::new();
    let early = bed.hypervisor.create(bed.spec(&console, vec![root()], &std::env::temp_dir())).expect("made");
    if !bed.hypervisor.capabilities().hot_plug {
        refused(early.attach_disk(DiskSpec::new(disk(1), HOT)), MachineErrorKind::Unsupported);
        refused(early.detach_disk(ROOT, soon), MachineErrorKind::Unsupported);
        return println!("disks cannot come and go: not checked");
    }
    refused(early.attach_disk(DiskSpec::new(disk(1), HOT)), MachineErrorKind::WrongState);
    refused(early.detach_disk(ROOT, soon), MachineErrorKind::WrongState);
    drop(early);

    let cold = DiskSpec::new(disk(2048), "vol-cold");
    let mut guest = bed.up(vec![root(), cold]);
    refused(guest.machine.attach_disk(DiskSpec::new(disk(1), ROOT)), MachineErrorKind::DiskExists);
    let long = DiskSpec::new(disk(1), "longer than 20 bytes.");
    refused(guest.machine.attach_disk(long), MachineErrorKind::Unsupported);
    refused(guest.machine.detach_disk(ROOT, soon), MachineErrorKind::Unsupported);
    refused(guest.machine.detach_disk(HOT, soon), MachineErrorKind::NoSuchDisk);

    for round in 0..3 {
        let (mut spec, log, inner) = Probe::disk(false);
        spec.serial = HOT.to_owned();
        inner.write_at(&sector_of(&format!("host{round}")), 512).expect("written");
        guest.machine.attach_disk(spec).expect("attached");
        let n = guest.until_it_has(HOT);
        guest.expect_answer(&format!("size {n}"), "size 1048576");
        guest.expect_answer(&format!("read {n} 1"), &format!("data host{round}"));
        guest.expect_answer(&format!("write {n} 2047 guest{round}"), "wrote");
        guest.expect_answer(&format!("flush {n}"), "flushed");
        assert!(log.flushes.load(Ordering::SeqCst) > 0, "the guest's flush did not reach the disk");
        assert_eq!(word_at(&inner, 2047), format!("guest{round}"));
        guest.ask_to_let_go(HOT).expect("detached");
        assert_eq!(Arc::strong_count(&log), 1, "the machine still holds the disk");
        guest.until_it_has_only(2);
        refused(guest.machine.detach_disk(HOT, soon), MachineErrorKind::NoSuchDisk);
    }
    // One that was there from the start goes as well, if it is not the first.
    guest.ask_to_let_go("vol-cold").expect("detached");
    guest.until_it_has_only(1);

    // As many as there may be.
    let most = bed.hypervisor.capabilities().max_disks;
    let one_more = |n: usize| DiskSpec::new(disk(8), format!("vol-{n}"));
    (1..most).for_each(|n| guest.machine.attach_disk(one_more(n)).expect("there is room"));
    refused(guest.machine.attach_disk(one_more(most)), MachineErrorKind::Unsupported);
    guest.until_it_has(&format!("vol-{}", most - 1));
    guest.machine.kill();
    refused(guest.machine.attach_disk(one_more(most)), MachineErrorKind::WrongState);
    refused(guest.machine.detach_disk("vol-1", soon), MachineErrorKind::WrongState);
}

pub(super) fn takes_a_disk_that_is_held(bed: &TestBed<'_>) {
    if !bed.hypervisor.capabilities().hot_plug {
        return println!("disks cannot come and go: not checked");
    }
    let mut guest = bed.up(vec![root()]);
    let hot = |word: &str| {
        let (mut spec, log, inner) = Probe::disk(false);
        spec.serial = HOT.to_owned();
        inner.write_at(&sector_of(word), 0).expect("written");
        (spec, log)
    };
    // A guest that stands still neither takes a disk up nor lets it go.
    guest.machine.pause().expect("pauses");
    let (spec, log) = hot("first");
    guest.machine.attach_disk(spec).expect("attached");
    guest.machine.resume().expect("resumes");
    let n = guest.until_it_has(HOT);
    guest.expect_answer(&format!("read {n} 0"), "data first");
    guest.machine.pause().expect("pauses");
    let a_moment = Detach::Ask { until: Instant::now() + Duration::from_millis(200) };
    refused(guest.machine.detach_disk(HOT, a_moment), MachineErrorKind::Held);
    assert_eq!(Arc::strong_count(&log), 2, "a guest that holds a disk has it");
    refused(guest.machine.attach_disk(hot("second").0), MachineErrorKind::DiskExists);
    guest.machine.detach_disk(HOT, Detach::Force).expect("by force");
    assert_eq!(Arc::strong_count(&log), 1, "the machine still holds the disk");
    guest.machine.resume().expect("resumes");
    guest.until_it_has_only(1);
    let (spec, log) = hot("third");
    guest.machine.attach_disk(spec).expect("attached");
    let n = guest.until_it_has(HOT);
    guest.expect_answer(&format!("read {n} 0"), "data third");
    guest.machine.detach_disk(HOT, Detach::Force).expect("by force");
    assert_eq!(Arc::strong_count(&log), 1, "the machine still holds the disk");
    guest.until_it_has_only(1);
    guest.expect_answer("write 0 1 on", "wrote");
}

/// A disk of which a part is shown, which grows.
#[derive(Debug)]
struct Growing {
    inner: Disk,
    size: Arc<AtomicU64>,
}

impl BlockBackend for Growing {
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        self.inner.write_at(buf, offset)
    }

    fn flush(&self) -> BlockResult<()> {
        self.inner.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BlockResult<()> {
        self.inner.write_zeroes(offset, len)
    }
}

pub(super) fn grows(bed: &TestBed<'_>) {
    let size = Arc::new(AtomicU64::new(1 << 20));
    let inner = MemoryDisk::new(4 << 20).expect("a whole number of sectors").into_disk();
    let growing = Growing { inner: inner.clone(), size: size.clone() };
    let mut guest = bed.up(vec![DiskSpec::new(Disk::new(growing).expect("a whole number of sectors"), ROOT)]);
    if !bed.hypervisor.capabilities().live_growth {
        return refused(guest.machine.disk_grown(ROOT), MachineErrorKind::Unsupported);
    }
    refused(guest.machine.disk_grown(HOT), MachineErrorKind::NoSuchDisk);
    guest.expect_answer("write 0 2047 old", "wrote");
    for mib in [2, 4] {
        size.store(mib << 20, Ordering::SeqCst);
        guest.machine.disk_grown(ROOT).expect("told");
        let (deadline, now) = (guest.deadline(), (mib << 20).to_string());
        while guest.ask("size 0", "size") != now {
            assert!(Instant::now() < deadline, "the guest does not see that the disk has grown");
        }
        let last = mib * 2048 - 1;
        guest.expect_answer("read 0 2047", "data old");
        guest.expect_answer(&format!("write 0 {last} new"), "wrote");
        assert_eq!(word_at(&inner, last), "new");
    }
    guest.machine.kill();
    refused(guest.machine.disk_grown(ROOT), MachineErrorKind::WrongState);
}
