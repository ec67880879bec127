//! Volumes that are made when they are written.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Volume;
use crate::keys::LocalKey;
use crate::testing::compare;
use crate::tests::tape::{Op, Tape};
use crate::tests::{Small, scratch};
use crate::{ErrorKind, MemoryDisk, Snapshot, Store, StoreOptions, VolumeOptions};

const SIZE: u64 = 1 << 20;

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
    base: Snapshot,
    told: Arc<AtomicUsize>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let keys = Arc::new(LocalKey::from_bytes([1; 32]));
        let store = Store::open_with(dir.path().join("store"), &StoreOptions::new().keys(keys)).unwrap();
        let image = MemoryDisk::from_vec(vec![7; SIZE as usize]).unwrap().into_disk();
        let (base, _) = store.import(&image, &mut |_| ()).unwrap();
        Self { dir, store, base, told: Arc::default() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vol")
    }

    fn make_in(&self, path: &Path, base: Option<&Snapshot>) -> Volume {
        let told = self.told.clone();
        let made = move || {
            told.fetch_add(1, Ordering::SeqCst);
        };
        VolumeOptions::new().create_on_write(path, base, 2 * SIZE, made).unwrap()
    }

    fn make(&self) -> Volume {
        self.make_in(&self.path(), Some(&self.base))
    }

    fn told(&self) -> usize {
        self.told.load(Ordering::SeqCst)
    }

    /// As it is when it is new.
    fn new_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![7; SIZE as usize];
        bytes.resize(2 * SIZE as usize, 0);
        bytes
    }

    fn reopen(&self, volume: Volume) -> Volume {
        drop(volume);
        Volume::open(&self.path(), &self.store).unwrap()
    }
}

#[test]
fn nothing_is_made_for_one_that_is_not_written() {
    let fixture = Fixture::new();
    let volume = fixture.make();
    let disk = volume.disk();
    compare(&disk, &fixture.new_bytes(), "a new one");
    // Zeroes over zeroes change nothing, nor does a snapshot, which is of what it began as.
    disk.discard(SIZE, SIZE).unwrap();
    disk.write_zeroes(SIZE + 4096, 8192).unwrap();
    let (snapshot, stats) = volume.snapshot(&fixture.store).unwrap();
    compare(&snapshot.disk(), &fixture.new_bytes(), "a snapshot");
    assert_eq!(stats.changed_bytes, 0);
    assert!(!volume.has_files() && !fixture.path().exists());
    drop((disk, volume));
    assert!(!fixture.path().exists());
    // One that is deleted needs no disk for it.
    fixture.make().delete().unwrap();
    assert_eq!((fixture.told(), fixture.path().exists()), (0, false));
}

#[test]
fn whatever_has_to_be_on_the_disk_makes_it() {
    let written = |at: usize, byte: u8| move |bytes: &mut Vec<u8>| bytes[at..at + 4096].fill(byte);
    type Act = fn(&Volume) -> crate::Result<()>;
    type Change = Box<dyn Fn(&mut Vec<u8>)>;
    let acts: [(&str, Act, Change); 6] = [
        ("a write", |v| v.disk().write_at(&[1; 4096], 8192), Box::new(written(8192, 1))),
        ("zeroes over the snapshot", |v| v.disk().write_zeroes(0, 4096), Box::new(written(0, 0))),
        ("a discard within a block", |v| v.disk().discard(512, 512), Box::new(|b| b[512..1024].fill(0))),
        ("a flush", |v| v.disk().flush(), Box::new(|_| ())),
        ("making it durable", Volume::sync_created, Box::new(|_| ())),
        ("growth", |v| v.grow(3 * SIZE), Box::new(|b| b.resize(3 * SIZE as usize, 0))),
    ];
    for (what, act, change) in acts {
        let fixture = Fixture::new();
        let volume = fixture.make();
        let mut expected = fixture.new_bytes();
        act(&volume).unwrap();
        change(&mut expected);
        assert_eq!((volume.has_files(), fixture.told()), (true, 1), "{what}");
        compare(&volume.disk(), &expected, what);
        volume.disk().flush().unwrap();
        let volume = fixture.reopen(volume);
        compare(&volume.disk(), &expected, what);
        assert_eq!(fixture.told(), 1);
    }
}

/// What was written since a snapshot of it when there was nothing of it yet.
#[test]
fn a_snapshot_before_the_first_write_is_told_from_one_after() {
    let fixture = Fixture::new();
    let volume = fixture.make();
    volume.snapshot(&fixture.store).unwrap();
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    volume.disk().flush().unwrap();
    let volume = fixture.reopen(volume);
    let (after, stats) = volume.snapshot(&fixture.store).unwrap();
    let mut expected = fixture.new_bytes();
    expected[..4096].fill(1);
    compare(&after.disk(), &expected, "after");
    assert_eq!(stats.changed_bytes, 4096);
}

#[test]
fn of_many_who_write_first_one_makes_it() {
    for _ in 0..20 {
        let fixture = Fixture::new();
        let volume = fixture.make();
        let barrier = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for n in 0..8_u8 {
                let (disk, barrier) = (volume.disk(), &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    // Some are alone in a block, and some bring the rest of one along.
                    disk.write_at(&[n + 1; 512], u64::from(n) * 2048).unwrap();
                });
            }
        });
        let mut expected = fixture.new_bytes();
        (0..8).for_each(|n| expected[n * 2048..][..512].fill(n as u8 + 1));
        compare(&volume.disk(), &expected, "written by eight");
        volume.disk().flush().unwrap();
        compare(&fixture.reopen(volume).disk(), &expected, "opened again");
        assert_eq!(fixture.told(), 1);
    }
}

/// A disk without room is an error of what needed it, which is done when it is tried again and there is room.
#[test]
fn one_that_cannot_be_made_is_made_later() {
    let Some(small) = Small::mount(64) else { return };
    let fixture = Fixture::new();
    let filler = small.0.join("filler");
    let path = small.0.join("vol");
    let volume = fixture.make_in(&path, Some(&fixture.base));
    let disk = volume.disk();
    std::fs::write(&filler, vec![1; 60 << 10]).unwrap();
    for _ in 0..2 {
        for failed in
            [disk.write_at(&[1; 4096], 0), disk.write_zeroes(0, 512), disk.flush(), volume.grow(4 * SIZE)]
        {
            assert_eq!(failed.map_err(|e| e.kind()), Err(ErrorKind::NoSpace));
        }
        assert!(!volume.has_files() && !path.exists());
        compare(&disk, &fixture.new_bytes(), "on a full disk");
    }
    assert_eq!((volume.size(), fixture.told()), (2 * SIZE, 0));
    let deleted = fixture.make_in(&small.0.join("deleted"), Some(&fixture.base));
    let held = deleted.disk();
    deleted.delete().unwrap();
    compare(&held, &fixture.new_bytes(), "one that was deleted on a full disk");
    std::fs::write(&filler, []).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.flush().unwrap();
    drop((disk, volume));
    let mut expected = fixture.new_bytes();
    expected[..4096].fill(1);
    compare(&Volume::open(&path, &fixture.store).unwrap().disk(), &expected, "when there was room");
    assert_eq!(fixture.told(), 1);
}

#[test]
fn one_that_is_deleted_keeps_what_is_held_of_it() {
    let fixture = Fixture::new();
    let volume = fixture.make();
    let (held, again) = (volume.disk(), volume.clone());
    volume.delete().unwrap();
    assert!(!fixture.path().exists());
    let other = fixture.make();
    other.disk().write_at(&[2; 4096], 0).unwrap();
    assert_eq!(fixture.told(), 1);
    held.write_at(&[1; 4096], 0).unwrap();
    held.flush().unwrap();
    let mut expected = fixture.new_bytes();
    expected[..4096].fill(1);
    compare(&held, &expected, "what is held");
    again.delete().unwrap();
    assert!(fixture.path().exists(), "what stands there is not what was deleted");
    expected[..4096].fill(2);
    compare(&other.disk(), &expected, "another that has its place by now");
    assert_eq!(fixture.told(), 1, "what has no name is nobody's volume");
    other.delete().unwrap();
    let left: Vec<_> =
        std::fs::read_dir(fixture.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["store"]);
}

#[test]
fn one_where_something_stands_is_refused() {
    let fixture = Fixture::new();
    let options = VolumeOptions::new();
    let made = |size| options.create_on_write(&fixture.path(), Some(&fixture.base), size, || ());
    for size in [SIZE - 4096, 1] {
        assert_eq!(made(size).map(drop).map_err(|e| e.kind()), Err(ErrorKind::InvalidSize), "{size}");
    }
    // By its first write, which leaves what is there.
    let late = fixture.make();
    let refuses = |volume: &Volume| {
        let refused = volume.disk().write_at(&[1; 512], 0);
        assert_eq!(refused.map_err(|e| e.kind()), Err(ErrorKind::AlreadyExists));
    };
    let names = || {
        let entries = std::fs::read_dir(fixture.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    std::fs::create_dir(fixture.path()).unwrap();
    refuses(&late);
    assert!(names().is_empty() && !late.has_files());
    for name in ["log", "log.tmp", "log-of-another"] {
        std::fs::write(fixture.path().join(name), "another's").unwrap();
    }
    refuses(&late);
    assert_eq!(names(), ["log", "log-of-another", "log.tmp"]);
    // One that may take over a directory removes no more than it has made there.
    let failed = Volume::create(&fixture.path(), None, SIZE);
    assert_eq!(failed.map(drop).map_err(|e| e.kind()), Err(ErrorKind::AlreadyExists));
    assert_eq!(names(), ["log", "log-of-another", "log.tmp"]);
    std::fs::remove_dir_all(fixture.path()).unwrap();
    let there = Volume::create(&fixture.path(), None, SIZE).unwrap();
    refuses(&late);
    drop(late);
    there.disk().write_at(&[1; 512], 0).unwrap();
    assert_eq!(fixture.told(), 0);
}

/// A directory that has anything in it that a volume would call its own is none for a new one.
#[test]
fn nothing_is_made_that_could_not_be_opened_again() {
    let fixture = Fixture::new();
    let key = fixture.store.new_key(None).unwrap();
    let path = fixture.path();
    for name in ["log", "log.tmp", "log-2-100000-", "overlay"] {
        for options in [VolumeOptions::new(), VolumeOptions::new().encrypt(&key)] {
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join(name), "").unwrap();
            let refused = options.create(&path, None, SIZE).map(drop).map_err(|e| e.kind());
            assert_eq!(refused, Err(ErrorKind::AlreadyExists), "{name}");
            assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1, "{name}");
            std::fs::remove_dir_all(&path).unwrap();
        }
    }
    // What is others' is in nobody's way.
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("notes"), "").unwrap();
    let volume = Volume::create(&path, None, SIZE).unwrap();
    volume.disk().write_at(&[1; 512], 0).unwrap();
    volume.disk().flush().unwrap();
    let mut expected = vec![0; SIZE as usize];
    expected[..512].fill(1);
    compare(&fixture.reopen(volume).disk(), &expected, "in a directory with a file of somebody's");
}

/// What others have in a volume's directory stays when the volume goes, and so does the directory; the volume's names are
/// gone for good.
#[test]
fn a_volume_goes_from_among_the_files_of_others() {
    let dir = scratch();
    let root = dir.path().join("root");
    let path = root.join("volume");
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("notes"), "another's").unwrap();
    let left = |what: &str| {
        let names: Vec<_> =
            std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["notes"], "{what}");
    };
    let tape = Tape::record(&root);
    let synced_since = |at: usize| {
        let steps = tape.steps().split_off(at);
        let removed = steps.iter().rposition(|step| matches!(step.op, Op::Remove { .. }));
        let synced = steps.iter().rposition(|step| step.op == Op::SyncDir { path: "volume".into() });
        assert!(removed < synced, "the directory is not synchronised: {steps:?}");
    };

    let volume = Volume::create(&path, None, SIZE).unwrap();
    let held = volume.disk();
    held.write_at(&[1; 512], 0).unwrap();
    let at = tape.position();
    volume.delete().unwrap();
    left("deleted");
    synced_since(at);
    // Nobody names a file any more.
    held.write_at(&[2; 4096], 4096).unwrap();
    held.flush().unwrap();
    left("flushed since");
    drop(held);

    drop(Volume::create(&path, None, SIZE).unwrap());
    let at = tape.position();
    Volume::remove(&path).unwrap();
    left("removed");
    synced_since(at);
    // There is none, nor is it an error.
    Volume::remove(&path).unwrap();
    left("removed again");
    Volume::remove(&root.join("nothing")).unwrap();
    Volume::remove(&root.join("nothing/at/all")).unwrap();
    std::fs::remove_file(path.join("notes")).unwrap();
    Volume::remove(&path).unwrap();
    assert!(!path.exists(), "an empty directory goes");
}

/// The key of one that is encrypted is in its files alone.
#[test]
fn one_that_is_encrypted_is_made_at_once() {
    let fixture = Fixture::new();
    let key = fixture.store.new_key(None).unwrap();
    let options = VolumeOptions::new().encrypt(&key);
    let volume = options.create_on_write(&fixture.path(), None, SIZE, || ()).unwrap();
    assert!(volume.has_files() && volume.encrypted());
    let (encrypted, _) = volume.snapshot(&fixture.store).unwrap();
    let clone = fixture.make_in(&fixture.dir.path().join("clone"), Some(&encrypted));
    assert!(clone.has_files() && clone.encrypted());
}

/// Whoever has files beside a volume, or in a directory that somebody takes for one's, keeps them.
#[test]
fn files_of_others_are_no_volumes() {
    let fixture = Fixture::new();
    let path = fixture.path();
    let strays = ["log-2026-11-30.txt", "log-rotate", "log-1-1000-none-5a4ce2d2"];
    let others: &[(&str, &[u8])] = &[("log", b"Nov 30 it rained"), ("log.tmp", b"Nov 29"), (strays[0], b"")];
    std::fs::create_dir(&path).unwrap();
    for (name, content) in others {
        std::fs::write(path.join(name), content).unwrap();
    }
    Volume::remove(&path).unwrap();
    for (name, content) in others {
        assert_eq!(std::fs::read(path.join(name)).unwrap(), *content, "{name}");
        std::fs::remove_file(path.join(name)).unwrap();
    }
    // What begins alike is no second log.
    let key = fixture.store.new_key(None).unwrap();
    for (key, flushed) in [(None, false), (None, true), (Some(&key), true)] {
        let options = key.map_or_else(VolumeOptions::new, |key| VolumeOptions::new().encrypt(key));
        strays.iter().for_each(|name| std::fs::write(path.join(name), b"x").unwrap());
        let volume = options.create(&path, None, SIZE).unwrap();
        if flushed {
            volume.disk().write_at(&[1; 4096], 0).unwrap();
            volume.disk().flush().unwrap();
        }
        drop(volume);
        let volume = Volume::open(&path, &fixture.store).unwrap();
        volume.disk().write_at(&[2; 4096], 4096).unwrap();
        volume.disk().flush().unwrap();
        drop(volume);
        Volume::remove(&path).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        let mut expected = strays.map(std::ffi::OsString::from);
        expected.sort();
        assert_eq!(left, expected);
    }
    strays.iter().for_each(|name| std::fs::remove_file(path.join(name)).unwrap());
    // And a log that a crash has left alone is one, with something in it or without.
    for (name, content) in
        [("log", &b"BLKVOLM\0"[..]), ("log", b""), ("log.tmp", b""), ("log.tmp", &[0; 600])]
    {
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join(name), content).unwrap();
        Volume::remove(&path).unwrap();
        assert!(!path.exists(), "{name} of {} bytes", content.len());
    }
}
