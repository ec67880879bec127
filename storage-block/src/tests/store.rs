//! What a store does with images, one case at a time.

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ami_core::Digest;

use super::{copy_dir, image, memory};
use crate::format::{self, Kind, unit_offset};
use crate::testing::compare;
use crate::{ErrorKind, MemoryDisk, RawFile, Store, StoreOptions, Volume};

const CHUNK: u64 = 64 << 10;
const LEAF: u64 = 32 << 10;

#[test]
fn images_come_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    // Chunks, bytes beyond them, and the blocks that are stored: those of all chunks but every fourth.
    for (chunks, tail, stored) in
        [(0, 0, 0), (0, 512, 1), (1, 0, 16), (4, 512, 49), (5, 65024, 80), (1030, 0, 773 * 16)]
    {
        let bytes = image(chunks, tail, chunks as u64 + tail as u64);
        let mut steps = Vec::new();
        let (snapshot, stats) = store.import(&memory(&bytes), &mut |progress| steps.push(progress)).unwrap();
        compare(&snapshot.disk(), &bytes, "an imported image");
        snapshot.verify().unwrap();
        let leaves = (chunks as u64 * CHUNK + tail as u64).div_ceil(64 << 20);
        assert_eq!(stats.stored_bytes, stored * 4096 + leaves * LEAF, "{chunks} chunks and {tail} bytes");
        assert_eq!(stats.size, bytes.len() as u64);
        assert!(steps.is_sorted_by_key(|progress| progress.done));
        assert_eq!(steps.last().map(|last| (last.done, last.total)), Some((stats.size, stats.size)));

        let (again, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        assert_eq!((again.digest(), stats.stored_bytes), (snapshot.digest(), 0));
    }
}

#[test]
fn digests_do_not_depend_on_the_store() {
    let bytes = image(5, 512, 1);
    let digests = [1, 2].map(|seed| {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.import(&memory(&image(3, 0, seed)), &mut |_| ()).unwrap();
        store.import(&memory(&bytes), &mut |_| ()).unwrap().0.digest()
    });
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn large_sparse_images_take_no_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let size = 256 << 30;
    let disk = RawFile::create(dir.path().join("raw"), size).unwrap().into_disk();
    for at in [0, 100 << 30, size - 4096] {
        disk.write_at(&[7; 4096], at).unwrap();
    }
    let start = Instant::now();
    let (snapshot, stats) = store.import(&disk, &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&snapshot), size).unwrap();
    volume.disk().write_at(&[8; 4096], size / 2).unwrap();
    volume.disk().discard(0, size / 4).unwrap();
    let (second, _) = volume.snapshot(&store).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // The first chunk and the 100th gibibyte's are equal, the last one ends otherwise.
    assert_eq!(stats.stored_bytes, 2 * 4096 + 2 * LEAF);
    let mut buf = [1; 4096];
    for (disk, at, expected) in [
        (snapshot.disk(), 100 << 30, 7),
        (snapshot.disk(), size - 4096, 7),
        (snapshot.disk(), size / 2, 0),
        (second.disk(), 0, 0),
        (second.disk(), size / 2, 8),
        (second.disk(), 100 << 30, 7),
    ] {
        disk.read_at(&mut buf, at).unwrap();
        assert!(buf.iter().all(|byte| *byte == expected), "at {at}");
    }
}

/// What is stored of a step of an import is less than is written at once, and more is waiting than that.
#[test]
fn what_waits_to_be_written_lies_where_the_index_says() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut bytes = image(40 * 16, 0, 1);
    for step in bytes.chunks_mut(16 << 16) {
        step[7 << 16..].fill(0);
    }
    let (snapshot, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    snapshot.verify().unwrap();
    let mut read = vec![0; bytes.len()];
    snapshot.disk().read_at(&mut read, 0).unwrap();
    assert!(read == bytes);
}

#[test]
fn one_owner_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (store_dir, volume_dir) = (dir.path().join("store"), dir.path().join("volume"));
    let kind = |dir| Store::open(dir).map(|_| ()).map_err(|error| error.kind());
    let store = Store::open(&store_dir).unwrap();
    assert_eq!(kind(&store_dir), Err(ErrorKind::InUse));
    let volume = Volume::create(&volume_dir, None, 1 << 20).unwrap();
    let disk = volume.disk();
    let open = |store: &Store| Volume::open(&volume_dir, store).map(|_| ()).map_err(|error| error.kind());
    assert_eq!(open(&store), Err(ErrorKind::InUse));
    drop(volume);
    assert_eq!(open(&store), Err(ErrorKind::InUse), "a disk is the volume too");
    assert_eq!(Volume::remove(&volume_dir).map_err(|error| error.kind()), Err(ErrorKind::InUse));
    drop(disk);
    assert_eq!(open(&store), Ok(()));
    Volume::remove(&volume_dir).unwrap();
    assert_eq!(open(&store), Err(ErrorKind::NotFound));
    Volume::remove(&volume_dir).unwrap();
    let snapshot = store.import(&memory(&image(1, 0, 1)), &mut |_| ()).unwrap().0;
    drop(store);
    assert_eq!(kind(&store_dir), Err(ErrorKind::InUse), "a snapshot keeps its store open");
    drop(snapshot);
    assert_eq!(kind(&store_dir), Ok(()));
}

#[test]
fn volumes_have_sizes_that_fit() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let (snapshot, _) = store.import(&memory(&image(2, 512, 1)), &mut |_| ()).unwrap();
    let volume = dir.path().join("volume");
    for (size, base, expected) in [
        (4095, None, Err(ErrorKind::InvalidSize)),
        (512, None, Err(ErrorKind::InvalidSize)),
        (u64::MAX - 4095, None, Err(ErrorKind::InvalidSize)),
        (2 << 16, Some(&snapshot), Err(ErrorKind::InvalidSize)),
        ((2 << 16) + 512, Some(&snapshot), Err(ErrorKind::InvalidSize)),
        ((2 << 16) + 4096, Some(&snapshot), Ok(())),
        (0, None, Ok(())),
    ] {
        let made = Volume::create(&volume, base, size).map_err(|error| error.kind());
        assert_eq!(made.as_ref().map(|_| ()).map_err(|kind| *kind), expected, "{size}");
        assert_eq!(volume.exists(), expected.is_ok(), "{size}");
        if let Ok(made) = made {
            let again = Volume::create(&volume, base, size).map(|_| ());
            assert_eq!(again.map_err(|error| error.kind()), Err(ErrorKind::AlreadyExists));
            made.delete().unwrap();
        }
        assert!(!volume.exists());
    }
}

#[test]
fn failed_imports_leave_nothing() {
    #[derive(Debug)]
    struct Failing(MemoryDisk);
    impl crate::BlockBackend for Failing {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> crate::Result<()> {
            if offset >= 2 << 20 {
                return Err(crate::Error::new(ErrorKind::Io, "a bad sector"));
            }
            self.0.read_at(buf, offset)
        }
        fn write_at(&self, _: &[u8], _: u64) -> crate::Result<()> {
            Ok(())
        }
        fn flush(&self) -> crate::Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64) -> crate::Result<()> {
            Ok(())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let failing = || crate::Disk::new(Failing(MemoryDisk::from_vec(image(48, 0, 9)).unwrap())).unwrap();
    // Into no pack at all, and into one that is there already.
    for seed in [1, 2] {
        let before = files(dir.path());
        let error = store.import(&failing(), &mut |_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(files(dir.path()), before);
        let bytes = image(5, 0, seed);
        let (snapshot, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        assert_eq!(stats.stored_bytes, 4 * CHUNK + LEAF);
        compare(&snapshot.disk(), &bytes, "what came after a failure");
    }
}

/// The names and lengths of all files.
pub(super) fn files(dir: &std::path::Path) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        match entry.metadata().unwrap() {
            metadata if metadata.is_dir() => found.extend(files(&entry.path())),
            metadata => found.push((entry.path().display().to_string(), metadata.len())),
        }
    }
    found.sort();
    found
}

#[test]
fn the_sweep_frees_what_nobody_names() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let images = [image(40, 0, 1), image(8, 0, 2), image(4, 0, 3)];
    let digests: Vec<Digest> =
        images.iter().map(|bytes| store.import(&memory(bytes), &mut |_| ()).unwrap().0.digest()).collect();
    let open = store.snapshot(&digests[2]).unwrap();
    let before = pack_bytes(&store);

    // The first goes, and the pack that all share is written anew.
    let keep = HashSet::from([digests[1]]);
    let reclaimed = store.sweep().remove_unreferenced(&keep).unwrap();
    assert_eq!((reclaimed.snapshots, reclaimed.packs), (1, 1));
    assert!(reclaimed.bytes >= 30 * CHUNK && before - pack_bytes(&store) >= 30 * CHUNK, "{reclaimed:?}");
    compare(&open.disk(), &images[2], "an open snapshot");
    compare(&store.snapshot(&digests[1]).unwrap().disk(), &images[1], "a kept snapshot");
    assert_eq!(store.snapshot(&digests[0]).unwrap_err().kind(), ErrorKind::NotFound);

    // A second time there is nothing to do, and what was dropped can come again.
    assert_eq!(store.sweep().remove_unreferenced(&keep).unwrap().snapshots, 0);
    let (again, _) = store.import(&memory(&images[0]), &mut |_| ()).unwrap();
    assert_eq!(again.digest(), digests[0]);
    compare(&again.disk(), &images[0], "an image that came again");
    drop((open, again));

    let reclaimed = store.sweep().remove_unreferenced(&HashSet::new()).unwrap();
    assert_eq!((reclaimed.snapshots, pack_bytes(&store)), (3, 0));
}

fn pack_bytes(store: &Store) -> u64 {
    files(&store.dir().join("packs")).iter().map(|(_, len)| len).sum()
}

#[test]
fn a_crash_in_an_import_leaves_what_was_before() {
    let dir = tempfile::tempdir().unwrap();
    let store_dir = dir.path().join("store");
    let store = Store::open(&store_dir).unwrap();
    let old = image(20, 0, 1);
    let (first, _) = store.import(&memory(&old), &mut |_| ()).unwrap();
    let new = image(64, 512, 2);
    let mut copies = 0;
    store
        .import(&memory(&new), &mut |_| {
            copies += 1;
            copy_dir(&store_dir, &dir.path().join(format!("copy-{copies}")));
        })
        .unwrap();
    assert!(copies > 3);
    for copy in 1..copies {
        let store = Store::open(dir.path().join(format!("copy-{copy}"))).unwrap();
        assert_eq!(store.snapshots().unwrap(), [first.digest()]);
        let snapshot = store.snapshot(&first.digest()).unwrap();
        snapshot.verify().unwrap();
        let (again, _) = store.import(&memory(&new), &mut |_| ()).unwrap();
        again.verify().unwrap();
        compare(&again.disk(), &new, "an import after a crash");
        compare(&snapshot.disk(), &old, "a snapshot after a crash");
    }
}

/// A crash between the steps of a commit, and between those of the sweep's deletion.
#[test]
fn half_named_packs_are_cleared_away() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(6, 0, 1);
    {
        let store = Store::open(dir.path().join("whole")).unwrap();
        store.import(&memory(&bytes), &mut |_| ()).unwrap();
    }
    let names = ["00000000.pack", "00000000.index"];
    for (case, temporary) in [[true, true], [true, false]].into_iter().enumerate() {
        let copy = dir.path().join(format!("copy-{case}"));
        copy_dir(&dir.path().join("whole"), &copy);
        let packs = copy.join("packs");
        for (name, _) in names.iter().zip(temporary).filter(|(_, temporary)| *temporary) {
            std::fs::rename(packs.join(name), packs.join(format!("{name}.tmp"))).unwrap();
        }
        for entry in std::fs::read_dir(copy.join("snapshots")).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let store = Store::open(&copy).unwrap();
        assert_eq!(std::fs::read_dir(&packs).unwrap().count(), 0, "case {case}");
        let (snapshot, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        compare(&snapshot.disk(), &bytes, "after a crash in a commit");
    }
}

#[test]
fn a_volume_can_be_snapshotted_into_another_store() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|name| Store::open(dir.path().join(name)).unwrap());
    let mut bytes = image(6, 0, 1);
    let (base, _) = first.import(&memory(&bytes), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), bytes.len() as u64).unwrap();
    volume.disk().write_at(&[1; 100], 70_000).unwrap();
    bytes[70_000..70_100].fill(1);
    let (here, stats) = volume.snapshot(&first).unwrap();
    assert_eq!((stats.changed_bytes, stats.stored_bytes), (4096, 4096 + LEAF));
    let (there, _) = volume.snapshot(&second).unwrap();
    assert_eq!(here.digest(), there.digest());
    compare(&there.disk(), &bytes, "a snapshot in another store");
}

/// Snapshots of a volume that is being written are each of one instant: a writer that changes places far
/// apart in turn is never found further in one than in an earlier one.
#[test]
fn snapshots_are_of_one_instant() {
    const STEP: u64 = 100_000;
    const PLACES: u64 = 80;
    /// What a place holds after a round: in some it is discarded, in some it is part of a block.
    fn value(place: u64, round: u64) -> u64 {
        if place % 3 == 1 && round % 2 == 0 { 0 } else { round }
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let base = image(200, 0, 1);
    let (base, _) = store.import(&memory(&base), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), 200 << 16).unwrap();
    let write = |round: u64| {
        for place in 0..PLACES {
            let (offset, value) = (place * STEP, value(place, round));
            match (place % 3, value) {
                (1, 0) => volume.disk().discard(offset / 4096 * 4096, 8192).unwrap(),
                (2, _) => volume.disk().write_at(&value.to_le_bytes(), offset).unwrap(),
                _ => volume.disk().write_at(&value.to_le_bytes().repeat(1024), offset).unwrap(),
            }
        }
    };
    write(1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| (2..).take_while(|_| !stop.load(Ordering::Relaxed)).for_each(write));
        // The writer ends also when an assertion fails.
        let _stop = Stop(&stop);
        for _ in 0..30 {
            let (snapshot, _) = volume.snapshot(&store).unwrap();
            let found: Vec<u64> = (0..PLACES)
                .map(|place| {
                    let mut bytes = [0; 8];
                    snapshot.disk().read_at(&mut bytes, place * STEP).unwrap();
                    u64::from_le_bytes(bytes)
                })
                .collect();
            // Up to some place this round, from there on the one before.
            let round = found[0];
            let at = |until| {
                (0..PLACES).map(move |place| value(place, if place < until { round } else { round - 1 }))
            };
            assert!((1..=PLACES).any(|until| at(until).eq(found.iter().copied())), "{found:?}");
        }
    });
}

pub(super) struct Stop<'s>(pub(super) &'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Neighbours on the disk that are the last slot of one pack and the first of the next.
#[test]
fn one_read_spans_full_packs() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path()).unwrap());
    let bytes = image(3, 0, 1);
    let (last, id) = (format::PACK_SLOTS - 1, *Digest::of(&bytes[..1 << 16]).as_bytes());
    let mut index = format::index_header(1, 0);
    for slot in 0..last {
        let other = *Digest::of(&slot.to_le_bytes()).as_bytes();
        index.extend(format::index_record_1(0, slot, &other, Kind::Chunk));
    }
    index.extend(format::index_record_1(0, last, &id, Kind::Chunk));
    std::fs::write(dir.path().join("packs/00000000.index"), index).unwrap();
    let pack = std::fs::File::create(dir.path().join("packs/00000000.pack")).unwrap();
    pack.write_all_at(&format::pack_header(1, 0), 0).unwrap();
    pack.write_all_at(&bytes[..1 << 16], unit_offset(last * format::SLOT_UNITS)).unwrap();

    let store = Store::open(dir.path()).unwrap();
    let (snapshot, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    assert_eq!(stats.stored_bytes, 2 * CHUNK + LEAF);
    compare(&snapshot.disk(), &bytes, "an image in two packs");
}

/// A sweep that waits for an import keeps nobody from opening what there is.
#[test]
fn a_sweep_that_waits_holds_up_no_reader() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let (first, _) = store.import(&memory(&image(1, 0, 1)), &mut |_| ()).unwrap();
    let digest = first.digest();
    let path = dir.path().join("volume");
    Volume::create(&path, Some(&first), first.size()).unwrap();
    drop(first);
    std::thread::scope(|scope| {
        let mut sweep = None;
        let mut opened = None;
        let imported = store.import(&memory(&image(32, 0, 2)), &mut |progress| {
            // The first time it has not begun yet.
            if progress.done == 0 || sweep.is_some() {
                return;
            }
            sweep = Some(scope.spawn(|| store.sweep().remove_unreferenced(&HashSet::new()).unwrap()));
            // Whoever asks for the lock in vain asks behind the sweep.
            while !store.0.turns.sweep_waits() {
                std::thread::yield_now();
            }
            let (send, done) = std::sync::mpsc::channel();
            let (store, path) = (store.clone(), path.clone());
            std::thread::spawn(move || {
                let snapshot = store.snapshot(&digest).unwrap();
                let volume = Volume::open(&path, &store).unwrap();
                let frozen = Volume::freeze([&volume], &store);
                store.scrub(&mut |_| ()).unwrap();
                drop(frozen);
                send.send((snapshot, volume)).unwrap();
            });
            opened = Some(done.recv_timeout(std::time::Duration::from_secs(20)));
        });
        // Also when it fails: the sweep waits for it.
        let (imported, _) = imported.unwrap();
        let (snapshot, _volume) = opened.unwrap().expect("a sweep that waits holds up a reader");
        assert_eq!(sweep.unwrap().join().unwrap().snapshots, 0, "what is open stays");
        snapshot.verify().unwrap();
        imported.verify().unwrap();
    });
}

#[test]
fn a_store_is_made_where_it_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let open = |create| {
        let options = StoreOptions::new().create(create);
        Store::open_with(&path, &options).map(drop).map_err(|error| (error.kind(), error.to_string()))
    };
    let none = Err((ErrorKind::NotFound, format!("there is no store in {}", path.display())));
    assert_eq!(open(false), none);
    assert!(!path.exists());
    // Nor is a directory of something else one.
    std::fs::create_dir(&path).unwrap();
    assert_eq!(open(false), none);
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
    assert_eq!(open(true), Ok(()));
    assert_eq!(open(false), Ok(()));
}
