//! What can be seen only from inside.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Volume;
use crate::format::{BLOCK, Run, State};
use crate::store::{lock, read};
use crate::testing::compare;
use crate::tests::scratch;
use crate::{ErrorKind, MemoryDisk, Store};

/// Half of them are no longer.
fn median(all: &mut [Duration]) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

/// A terabyte with four million changed chunks is frozen as fast as one with none.
#[test]
fn the_pause_is_that_of_an_instant() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), None, 1 << 40).unwrap();
    let pause = || {
        // The machine may have other things to do than some of them.
        let mut paused: Vec<Duration> = (0..15).map(|_| Volume::freeze([&volume], &store).paused()).collect();
        median(&mut paused)
    };
    let empty = pause();
    const CHUNKS: u64 = 4 << 20;
    for chunk in 0..CHUNKS {
        volume.0.map.set(Run { first: chunk * 64, count: 1, state: State::Zero });
    }
    let full = pause();
    eprintln!("paused for {empty:?} with no chunk changed, for {full:?} with {CHUNKS}");
    assert!(full < Duration::from_millis(5), "{full:?}");

    // What takes long comes afterwards, and can be cancelled.
    let mut total = 0;
    let frozen = Volume::freeze([&volume], &store);
    let begun = Instant::now();
    let ended = frozen.store(&mut |progress| {
        total = progress.total;
        progress.cancel();
    });
    eprintln!("counting them took {:?}", begun.elapsed());
    assert_eq!((ended.unwrap_err().kind(), total), (ErrorKind::Cancelled, CHUNKS << 16));
}

/// A snapshot that is to begin comes in between the parts of what one call writes or zeroes, and waits for none but the
/// part under way: it is counted how many come while one call lasts, and how far that was when they did.
#[test]
fn the_pause_is_no_longer_than_a_part_of_a_write() {
    let dir = scratch();
    let store = Store::open(dir.path().join("store")).unwrap();
    const SIZE: u64 = 128 << 20;
    let volume = Volume::create(&dir.path().join("volume"), None, SIZE).unwrap();
    let (disk, bytes) = (volume.disk(), vec![7; SIZE as usize]);
    // How much of the volume is in a state from its beginning on: that of a call goes on.
    let done = |state: State| {
        let mut end = 0;
        while end < SIZE / BLOCK {
            let (found, blocks) = volume.0.map.run(end, SIZE / BLOCK - end);
            if found != state {
                break;
            }
            end += blocks;
        }
        end * BLOCK
    };
    let in_one_call = |state: State, call: &(dyn Fn() + Sync)| {
        let mut paused = Vec::new();
        std::thread::scope(|scope| {
            let call = scope.spawn(call);
            while !call.is_finished() {
                let frozen = Volume::freeze([&volume], &store);
                let so_far = done(state);
                if (1..SIZE).contains(&so_far) {
                    paused.push(frozen.paused());
                }
                drop(frozen);
                // One freeze after the other would leave the call no moment to go on.
                while done(state) == so_far && !call.is_finished() {
                    std::thread::yield_now();
                }
            }
            call.join().unwrap();
        });
        assert_eq!(done(state), SIZE);
        paused
    };
    let (mut writing, mut zeroing) = (Vec::new(), Vec::new());
    // Where the machine has other things to do, the whole call may have run before anybody came.
    for _ in 0..20 {
        writing.extend(in_one_call(State::Overlay, &|| disk.write_at(&bytes, 0).unwrap()));
        zeroing.extend(in_one_call(State::Zero, &|| disk.discard(0, SIZE).unwrap()));
        if writing.len() >= 60 && zeroing.len() >= 12 {
            break;
        }
    }
    for (what, mut paused, calls) in [("writes", writing, 60), ("zeroes", zeroing, 12)] {
        assert!(paused.len() >= calls, "a freeze waits for all that one call {what}");
        let middle = median(&mut paused);
        eprintln!("while one call {what}: {} freezes, {middle:?} in the middle", paused.len());
        assert!(middle < Duration::from_millis(5), "{what}: {middle:?}");
    }
}

/// What a discard has zeroed before it failed is logged by the next flush.
#[test]
fn a_discard_that_fails_half_way_is_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let digest = {
        let store = Store::open(dir.path().join("store")).unwrap();
        let image = MemoryDisk::from_vec(vec![7; 2 << 16]).unwrap().into_disk();
        store.import(&image, &mut |_| ()).unwrap().0.digest()
    };
    // Its manifest's leaf, behind one chunk, as both are alike.
    let pack =
        std::fs::File::options().write(true).open(dir.path().join("store/packs/00000000.pack")).unwrap();
    pack.write_all_at(&[0xff; 32], 4096 + (64 << 10)).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let base = store.snapshot(&digest).unwrap();
    let path = dir.path().join("volume");
    let volume = Volume::create(&path, Some(&base), base.size()).unwrap();
    volume.disk().write_at(&[1; BLOCK as usize], 0).unwrap();
    volume.disk().flush().unwrap();
    let failed = volume.disk().discard(0, 2 << 16);
    assert_eq!(failed.map_err(|e| e.kind()), Err(ErrorKind::Corrupt));
    volume.disk().flush().unwrap();
    drop(volume);
    let volume = Volume::open(&path, &store).unwrap();
    assert_eq!(volume.0.map.get(0), State::Zero);
}

/// No volume is frozen, and let go on, before all stand still.
#[test]
fn none_is_frozen_before_all_stand_still() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut volumes = ["a", "b"].map(|name| Volume::create(&dir.path().join(name), None, 1 << 20).unwrap());
    volumes.sort_by_key(|volume| std::sync::Arc::as_ptr(&volume.0));
    let [first, second] = &volumes;
    std::thread::scope(|scope| {
        let writing = read(&second.0.gate);
        let freezing = scope.spawn(|| Volume::freeze(&volumes, &store));
        let begun = Instant::now();
        while first.0.gate.try_read().is_ok() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the first volume does not stand still");
            std::thread::yield_now();
        }
        assert!(first.0.freeze.lets(0..=0), "the first volume is frozen before the second stands still");
        drop(writing);
        let frozen = freezing.join().unwrap();
        assert!(volumes.iter().all(|volume| !volume.0.freeze.lets(0..=0)));
        drop(frozen);
        assert!(volumes.iter().all(|volume| volume.0.freeze.lets(0..=0)));
    });
}

/// After a flush that failed nobody knows what is in the overlay, and there is no snapshot of it.
#[test]
fn no_snapshot_after_a_failed_flush() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), None, 1 << 20).unwrap();
    volume.disk().write_at(&[7; 4096], 0).unwrap();
    let failed = &volume.0.failed;
    let during = volume.snapshot_with(&store, &mut |_| failed.store(true, Ordering::Release));
    assert_eq!(during.unwrap_err().kind(), ErrorKind::Io, "a flush that fails meanwhile");
    assert_eq!(volume.snapshot(&store).unwrap_err().kind(), ErrorKind::Io, "one that has failed before");
    assert!(store.snapshots().unwrap().is_empty());
}

/// A guest that never flushes cannot have the list of what is to be logged grow without end, and what was on it is
/// durable with its next flush all the same.
#[test]
fn the_list_of_what_to_log_ends() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let path = dir.path().join("volume");
    let volume = Volume::create(&path, None, 1 << 20).unwrap();
    let disk = volume.disk();
    disk.write_at(&[1; 8192], 64 << 10).unwrap();
    disk.flush().unwrap();
    for round in 0..40_000u32 {
        disk.write_at(&[round as u8; 4096], 8192).unwrap();
        disk.write_zeroes(8192, 4096).unwrap();
    }
    let held = lock(&volume.0.pending).runs.len();
    assert!(held <= 1 << 16, "{held} runs");
    disk.write_zeroes(64 << 10, 4096).unwrap();
    disk.write_at(&[2; 4096], 16384).unwrap();
    disk.flush().unwrap();
    // Nothing is left of it: the next flush has its own changes to log, and logs them.
    disk.write_at(&[3; 4096], 32768).unwrap();
    disk.flush().unwrap();
    drop((volume, disk));

    let mut expected = vec![0; 1 << 20];
    expected[(64 << 10) + 4096..][..4096].fill(1);
    expected[16384..][..4096].fill(2);
    expected[32768..][..4096].fill(3);
    compare(&Volume::open(&path, &store).unwrap().disk(), &expected, "opened again");
}
