//! Snapshots of volumes that go on being written: of one instant, of several volumes, cancelled.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::full_disk::Small;
use super::store::{Stop, files};
use super::{image, memory};
use crate::testing::{Random, compare};
use crate::{Disk, ErrorKind, Progress, Result, Store, Volume};

/// A part of a disk that one thread alone writes, with everything it has done there.
struct Part {
    start: u64,
    len: u64,
    begin: Vec<u8>,
    deeds: Mutex<Vec<Deed>>,
    /// How many of them have been begun, and have returned.
    begun: AtomicUsize,
    done: AtomicUsize,
    /// What the part was after so many, of which no snapshot to come has fewer.
    past: Mutex<(usize, Vec<u8>)>,
}

/// A range of the part, and what it is filled with; zeroes are discarded.
#[derive(Clone, Copy)]
struct Deed {
    at: usize,
    len: usize,
    fill: u8,
}

impl Deed {
    fn replay(&self, part: &mut [u8]) {
        part[self.at..self.at + self.len].fill(self.fill);
    }
}

impl Part {
    fn new(start: u64, len: u64, content: &[u8]) -> Self {
        let begin = content[start as usize..(start + len) as usize].to_vec();
        let (begun, done) = Default::default();
        let past = Mutex::new((0, begin.clone()));
        Self { start, len, begin, deeds: Mutex::default(), begun, done, past }
    }

    /// Writes, discards and reads until it is told to stop.
    fn work(&self, disk: &Disk, random: &mut Random, stop: &AtomicBool) {
        let mut now = self.begin.clone();
        while !stop.load(Ordering::Relaxed) {
            let align = [1, 4096][random.below(2) as usize];
            let at = random.below(self.len / align) * align;
            let limit = [600, 9000, 80_000][random.below(3) as usize];
            let len = (random.below(limit) + 1).next_multiple_of(align).min(self.len - at);
            let fill = if random.below(3) == 0 { 0 } else { random.below(255) as u8 + 1 };
            let range = at as usize..(at + len) as usize;
            if random.below(3) == 0 {
                let mut found = vec![0xee; len as usize];
                disk.read_at(&mut found, self.start + at).unwrap();
                assert!(found == now[range], "{len} bytes at {at} of the part at {}", self.start);
                continue;
            }
            self.deeds.lock().unwrap().push(Deed { at: at as usize, len: len as usize, fill });
            self.begun.fetch_add(1, Ordering::SeqCst);
            match fill {
                0 => disk.discard(self.start + at, len).unwrap(),
                _ => disk.write_at(&vec![fill; len as usize], self.start + at).unwrap(),
            }
            self.done.fetch_add(1, Ordering::SeqCst);
            now[range].fill(fill);
        }
    }

    /// Checks that the part of a snapshot is what it was after so many deeds, of which one may have been
    /// under way.
    fn check(&self, snapshot: &Disk, from: usize, to: usize, when: &str) {
        let mut found = vec![0xee; self.len as usize];
        snapshot.read_at(&mut found, self.start).unwrap();
        let mut past = self.past.lock().unwrap();
        let (number, content) = &mut *past;
        let deeds = self.deeds.lock().unwrap();
        deeds[*number..from].iter().for_each(|deed| deed.replay(content));
        *number = from;
        let mut content = content.clone();
        for deed in &deeds[from..to] {
            if content == found {
                return;
            }
            deed.replay(&mut content);
        }
        assert!(content == found, "{when}: the part at {} was never so from {from} to {to}", self.start);
    }
}

/// Writers that share chunks and blocks, readers, and snapshots one after the other: every read finds what was
/// written, and every snapshot is what each writer's part was between two of its writes.
#[test]
fn reads_and_snapshots_are_right_while_there_are_snapshots() {
    for seed in 1..=3 {
        let dir = tempfile::tempdir().unwrap();
        let [store, other] = ["store", "other"].map(|name| Store::open(dir.path().join(name)).unwrap());
        let mut content = image(12, 512, seed);
        let (base, _) = store.import(&memory(&content), &mut |_| ()).unwrap();
        content.resize(16 << 16, 0);
        let volume = Volume::create(&dir.path().join("volume"), Some(&base), content.len() as u64).unwrap();
        // No part spans a megabyte, which is written in one go.
        let parts: Vec<Part> = (0..4).map(|part| Part::new(part * 262_000 + 77, 262_000, &content)).collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (part, seed) in parts.iter().zip(seed * 100..) {
                let (disk, stop) = (volume.disk(), &stop);
                scope.spawn(move || part.work(&disk, &mut Random(seed), stop));
            }
            let _stop = Stop(&stop);
            for round in 0..30 {
                let target = if round % 4 == 3 { &other } else { &store };
                let counts = |count: fn(&Part) -> &AtomicUsize| {
                    parts.iter().map(|part| count(part).load(Ordering::SeqCst)).collect::<Vec<_>>()
                };
                let done = counts(|part| &part.done);
                let frozen = Volume::freeze([&volume], target);
                let begun = counts(|part| &part.begun);
                if round % 2 == 0 {
                    // Writers get so far that they have to wait.
                    let more = begun[0] + 3;
                    let waits = || parts[0].begun.load(Ordering::SeqCst) < more;
                    (0..1000).take_while(|_| waits()).for_each(|_| std::thread::yield_now());
                }
                let (snapshot, _) = frozen.store(&mut |_| ()).unwrap().swap_remove(0);
                for ((part, from), to) in parts.iter().zip(done).zip(begun) {
                    part.check(&snapshot.disk(), from, to, &format!("seed {seed}, round {round}"));
                }
            }
        });
        let mut last = content.clone();
        for part in &parts {
            let range = part.start as usize..(part.start + part.len) as usize;
            part.deeds.lock().unwrap().iter().for_each(|deed| deed.replay(&mut last[range.clone()]));
        }
        compare(&volume.disk(), &last, "the volume in the end");
        let (snapshot, _) = volume.snapshot(&store).unwrap();
        compare(&snapshot.disk(), &last, "a snapshot of it in the end");
    }
}

/// A writer that writes a number to one volume and then to another: no pair of snapshots has more in the
/// second, nor the first further ahead than by one.
#[test]
fn volumes_are_frozen_at_one_instant() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let [first, second] =
        ["a", "b"].map(|name| Volume::create(&dir.path().join(name), None, 1 << 20).unwrap());
    let number = |disk: Disk| {
        let mut bytes = [0; 8];
        disk.read_at(&mut bytes, 4090).unwrap();
        u64::from_le_bytes(bytes)
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in (1..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                for volume in [&first, &second] {
                    volume.disk().write_at(&u64::to_le_bytes(round), 4090).unwrap();
                }
            }
        });
        // Somebody who names them the other way round is in nobody's way.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(Volume::freeze([&second, &first, &second], &store));
            }
        });
        let _stop = Stop(&stop);
        for _ in 0..60 {
            let frozen = Volume::freeze([&first, &second, &first], &store);
            let made = frozen.store(&mut |_| ()).unwrap();
            let [a, b, again] = [0, 1, 2].map(|at| number(made[at].0.disk()));
            assert!(a == b || a == b + 1, "{a} in the first and {b} in the second");
            assert_eq!((a, made[0].0.digest()), (again, made[2].0.digest()));
            assert_eq!(made[0].1.paused, made[1].1.paused);
        }
    });
}

/// Cancels what `run` does at its first report, then at its second, until it is too late; each time everything
/// in `dir` is as before.
fn cancel_everywhere<T>(dir: &Path, mut run: impl FnMut(&mut dyn FnMut(Progress)) -> Result<T>) -> T {
    let before = files(dir);
    for at in 0.. {
        let mut seen: Vec<(u64, u64)> = Vec::new();
        let made = run(&mut |progress| {
            if seen.len() == at {
                progress.cancel();
            }
            seen.push((progress.done, progress.total));
        });
        assert!(seen.is_sorted() && seen.iter().all(|(done, total)| done <= total), "{seen:?}");
        match made {
            Ok(made) => {
                assert!(at > 2 && seen.last().is_some_and(|(done, total)| done == total), "{seen:?}");
                return made;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "report {at}: {error}"),
        }
        assert_eq!(files(dir), before, "report {at}");
    }
    unreachable!()
}

#[test]
fn what_is_cancelled_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store_dir = dir.path().join("store");
    let store = Store::open(&store_dir).unwrap();
    let [mut bytes, other, third] = [1, 2, 3].map(|seed| image(40, 0, seed));
    let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let make = |name| Volume::create(&dir.path().join(name), Some(&base), 40 << 16).unwrap();
    let volumes = ["a", "b"].map(make);
    for (volume, from) in volumes.iter().zip([0, 20]) {
        volume.disk().write_at(&other[from << 16..(from + 20) << 16], 0).unwrap();
    }
    bytes[..20 << 16].copy_from_slice(&other[..20 << 16]);

    let made = cancel_everywhere(&store_dir, |progress| Volume::freeze(&volumes, &store).store(progress));
    compare(&made[0].0.disk(), &bytes, "a snapshot after some that were cancelled");
    compare(&volumes[0].disk(), &bytes, "a volume after snapshots that were cancelled");
    let (made, _) = cancel_everywhere(&store_dir, |progress| store.import(&memory(&third), progress));
    compare(&made.disk(), &third, "an import after some that were cancelled");
}

/// A chunk that cannot be read is the snapshot's trouble, and no writer's.
#[test]
fn writers_do_not_fail_for_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store_dir = dir.path().join("store");
    let store = Store::open(&store_dir).unwrap();
    let (base, _) = store.import(&memory(&image(3, 0, 1)), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), 3 << 16).unwrap();
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    let pack = std::fs::File::options().write(true).open(store_dir.join("packs/00000000.pack")).unwrap();
    let mut buf = [0; 4096];
    volume.disk().read_at(&mut buf, 1 << 16).unwrap();
    pack.set_len(4096).unwrap();

    let frozen = Volume::freeze([&volume], &store);
    volume.disk().write_at(&[2; 4096], 4096).unwrap();
    volume.disk().write_at(&[2; 4096], 0).unwrap();
    let error = frozen.store(&mut |_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    volume.disk().read_at(&mut buf, 0).unwrap();
    assert_eq!((buf, store.snapshots().unwrap().len()), ([2; 4096], 1));
}

/// Snapshots of volumes frozen together are all there or none is, wherever a full disk ends it.
#[test]
fn volumes_are_stored_together_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = ["a", "b", "c"].map(|name| Volume::create(&dir.path().join(name), None, 1 << 20).unwrap());
    for (volume, seed) in volumes.iter().zip(1..) {
        volume.disk().write_at(&image(1, 0, seed), 0).unwrap();
    }
    let mut failed = 0;
    // From no room for a pack to room for everything.
    for kib in (8..).step_by(4) {
        let Some(small) = Small::mount(kib) else { return };
        let store = Store::open(small.0.join("store")).unwrap();
        let before = files(store.dir());
        match Volume::freeze(&volumes, &store).store(&mut |_| ()) {
            Ok(made) => {
                assert_eq!((made.len(), store.snapshots().unwrap().len()), (3, 3));
                break;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{kib} KiB: {error}"),
        }
        assert_eq!(files(store.dir()), before, "{kib} KiB");
        failed += 1;
    }
    assert!(failed > 10, "it failed {failed} times");
}
