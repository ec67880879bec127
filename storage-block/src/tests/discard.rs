//! What is discarded gives its space back.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{image, memory};
use crate::log::Log;
use crate::testing::compare;
use crate::{Store, Volume};

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Blocks of the overlay are given back to the file system, whatever part of a range is whole blocks.
#[test]
fn the_overlay_gets_smaller() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    let volume = Volume::create(&path, None, 64 << 20).unwrap();
    let (disk, overlay) = (volume.disk(), path.join("overlay"));
    let mut bytes = vec![0; 64 << 20];
    disk.write_at(&[1; 8 << 20], 4 << 20).unwrap();
    bytes[4 << 20..12 << 20].fill(1);
    disk.flush().unwrap();
    // Metadata of the file system may be counted too.
    let slack = 64 << 10;
    let full = allocated(&overlay);
    assert!(full >= 8 << 20, "{full}");
    // From, to, and what of it is whole blocks.
    let mut expected = full;
    for (from, to, whole) in [
        (4 << 20, 5 << 20, 1 << 20),
        ((5 << 20) + 1, (6 << 20) - 1, (1 << 20) - 8192),
        ((6 << 20) + 4095, (6 << 20) + 4097, 0),
        ((7 << 20) + 100, (7 << 20) + 200, 0),
        (0, 4 << 20, 0),
    ] {
        if from % 2 == 0 { disk.discard(from, to - from) } else { disk.write_zeroes(from, to - from) }
            .unwrap();
        bytes[from as usize..to as usize].fill(0);
        expected -= whole;
        let now = allocated(&overlay);
        assert!(now <= expected + slack && now + slack >= expected, "{from}..{to}: {now}, not {expected}");
    }
    compare(&disk, &bytes, "after discards");
    disk.discard(0, disk.size()).unwrap();
    disk.flush().unwrap();
    let now = allocated(&overlay);
    assert!(now <= slack, "{now} bytes are left of a disk of zeroes");
}

/// Blocks of the snapshot cost a record of the log, and nothing in the next snapshot.
#[test]
fn what_was_in_the_snapshot_is_not_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut bytes = image(200, 0, 1);
    let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let path = dir.path().join("volume");
    let volume = Volume::create(&path, Some(&base), bytes.len() as u64).unwrap();
    let disk = volume.disk();
    // All but the first ten chunks, from the middle of a block to the middle of another; the last chunk is a hole.
    let (from, to) = ((10 << 16) + 2048, (199 << 16) - 2048);
    disk.discard(from as u64, (to - from) as u64).unwrap();
    bytes[from..to].fill(0);
    disk.flush().unwrap();
    // The two blocks at its ends are in the overlay now.
    assert!(allocated(&path.join("overlay")) <= 64 << 10);
    assert_eq!(std::fs::metadata(Log::find(&path).unwrap()).unwrap().len(), 32 << 10, "as short as can be");
    let (snapshot, stats) = volume.snapshot(&store).unwrap();
    compare(&snapshot.disk(), &bytes, "a snapshot of what was discarded");
    assert_eq!(stats.stored_bytes, 2 * 4096 + (32 << 10), "{stats:?}");
    drop(disk);

    // Without an edge nothing is left to store but a leaf.
    let path = dir.path().join("second");
    let volume = Volume::create(&path, Some(&base), bytes.len() as u64).unwrap();
    volume.disk().discard(10 << 16, volume.size() - (10 << 16)).unwrap();
    let (_, stats) = volume.snapshot(&store).unwrap();
    assert_eq!((stats.stored_bytes, allocated(&path.join("overlay"))), (32 << 10, 0));
    volume.disk().discard(0, volume.size()).unwrap();
    assert_eq!(volume.snapshot(&store).unwrap().1.stored_bytes, 0);
}
