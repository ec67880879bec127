//! What a volume's next snapshot costs, and that it holds what it has to.

use std::collections::HashSet;

use super::{image, memory};
use crate::testing::{Random, compare, random_operation};
use crate::{ErrorKind, Store, Volume};

const CHUNK: u64 = 64 << 10;
const LEAF: u64 = 32 << 10;

/// The bytes that a snapshot says it has to look at.
fn looked_at(volume: &Volume, store: &Store) -> u64 {
    let mut total = 0;
    volume.snapshot_with(store, &mut |progress| total = progress.total).unwrap();
    total
}

#[test]
fn a_snapshot_costs_what_changed_since_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let (base, _) = store.import(&memory(&image(20, 0, 1)), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), base.size()).unwrap();
    volume.disk().write_at(&image(10, 0, 2), 0).unwrap();
    assert_eq!(looked_at(&volume, &store), 10 * CHUNK);
    assert_eq!(looked_at(&volume, &store), 0, "nothing has changed");

    volume.disk().write_at(&[1; 512], 5 * CHUNK).unwrap();
    volume.disk().write_at(&[1; 4096], 15 * CHUNK).unwrap();
    volume.disk().discard(9 * CHUNK, 4096).unwrap();
    let (snapshot, stats) = volume.snapshot(&store).unwrap();
    assert_eq!(stats.changed_bytes, 3 * 4096);
    // Each differs in one block from the chunk that the last snapshot has; of one it is a block of zeroes.
    assert_eq!(stats.stored_bytes, 3 * 4096 + LEAF);
    let mut bytes = vec![0; 20 << 16];
    volume.disk().read_at(&mut bytes, 0).unwrap();
    compare(&snapshot.disk(), &bytes, "the third snapshot");

    // One that was cancelled is as if it had not been begun, whatever is written meanwhile.
    volume.disk().write_at(&[2; 4096], 0).unwrap();
    let cancelled = volume.snapshot_with(&store, &mut |progress| {
        volume.disk().write_at(&[3; 4096], 3 * CHUNK).unwrap();
        progress.cancel();
    });
    assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(volume.snapshot(&store).unwrap().1.changed_bytes, 2 * 4096);

    // Where the last one is gone, everything since the beginning counts.
    let last = volume.snapshot(&store).unwrap().0.digest();
    store.sweep().remove_unreferenced(&HashSet::new()).unwrap();
    assert_eq!(
        store.snapshot(&last).unwrap_err().kind(),
        ErrorKind::NotFound,
        "a volume keeps its base alone"
    );
    volume.disk().write_at(&[4; 4096], 0).unwrap();
    assert_eq!(looked_at(&volume, &store), 11 * CHUNK);
    volume.disk().write_at(&[5; 4096], 0).unwrap();
    assert_eq!(looked_at(&volume, &store), CHUNK);
}

/// What has changed since the last snapshot is known to who opens the volume again, if it was closed in order.
#[test]
fn a_volume_that_was_closed_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let (base, _) = store.import(&memory(&image(20, 0, 1)), &mut |_| ()).unwrap();
    let (path, crashed) = (dir.path().join("volume"), dir.path().join("crashed"));
    let volume = Volume::create(&path, Some(&base), base.size()).unwrap();
    volume.disk().write_at(&image(10, 0, 2), 0).unwrap();
    let (last, _) = volume.snapshot(&store).unwrap();
    volume.disk().write_at(&[1; 8192], 3 * CHUNK - 4096).unwrap();
    volume.disk().flush().unwrap();
    drop(volume);

    // Twice, as who opens it need not write.
    for _ in 0..2 {
        drop(Volume::open(&path, &store).unwrap());
    }
    let volume = Volume::open(&path, &store).unwrap();
    // Nothing is appended to the log for it.
    volume.disk().write_at(&[1; 4096], 5 * CHUNK).unwrap();
    volume.disk().flush().unwrap();
    super::copy_dir(&path, &crashed);
    let (snapshot, stats) = volume.snapshot(&store).unwrap();
    assert_eq!(stats.changed_bytes, 3 * 4096);
    let mut bytes = vec![0; 20 << 16];
    volume.disk().read_at(&mut bytes, 0).unwrap();
    compare(&snapshot.disk(), &bytes, "a snapshot of a volume that was opened again");
    drop(volume);

    // Who did not live to close it leaves nothing of what he found, nor does who closes it with something unflushed.
    let volume = Volume::open(&crashed, &store).unwrap();
    assert_eq!(looked_at(&volume, &store), 10 * CHUNK);
    volume.disk().write_at(&[2; 4096], 0).unwrap();
    drop(volume);
    assert_eq!(looked_at(&Volume::open(&crashed, &store).unwrap(), &store), 10 * CHUNK);

    // A last snapshot that is gone is of no use.
    drop((last, snapshot));
    store.sweep().remove_unreferenced(&HashSet::from([base.digest()])).unwrap();
    assert_eq!(looked_at(&Volume::open(&path, &store).unwrap(), &store), 10 * CHUNK);
}

/// The same in a store that is not the one of the volume's base: the first stores all of it.
#[test]
fn snapshots_in_another_store_follow_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let [here, there] = ["a", "b"].map(|name| Store::open(dir.path().join(name)).unwrap());
    let (base, _) = here.import(&memory(&image(20, 0, 1)), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), base.size()).unwrap();
    assert_eq!(looked_at(&volume, &there), 15 * CHUNK, "every fourth is zero");
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    assert_eq!(looked_at(&volume, &there), CHUNK);
    assert_eq!(looked_at(&volume, &here), CHUNK, "all that has changed since the base");
}

/// Snapshots after snapshots, some of which fail, of a volume that is written and grown meanwhile.
#[test]
fn random_lines_of_snapshots_agree_with_memory() {
    for seed in 1..=6 {
        let dir = tempfile::tempdir().unwrap();
        let stores = ["a", "b"].map(|name| Store::open(dir.path().join(name)).unwrap());
        let mut random = Random(seed);
        let mut oracle = image(6, 0, seed);
        let (base, _) = stores[0].import(&memory(&oracle), &mut |_| ()).unwrap();
        let mut volume = Volume::create(&dir.path().join("volume"), Some(&base), base.size()).unwrap();
        for _ in 0..60 {
            for _ in 0..random.below(6) {
                random_operation(&volume.disk(), &mut oracle, &mut random);
            }
            let store = &stores[usize::from(random.below(4) == 0)];
            match random.below(12) {
                0 => {
                    oracle.resize(oracle.len() + 5 * 4096, 0);
                    volume.grow(oracle.len() as u64).unwrap();
                }
                1 => drop(store.sweep().remove_unreferenced(&HashSet::new()).unwrap()),
                2 => {
                    let ended = volume.snapshot_with(store, &mut |progress| progress.cancel());
                    assert_eq!(ended.unwrap_err().kind(), ErrorKind::Cancelled);
                }
                3 => {
                    let frozen = Volume::freeze([&volume], store);
                    let before = oracle.clone();
                    random_operation(&volume.disk(), &mut oracle, &mut random);
                    if random.below(2) == 0 {
                        let (snapshot, _) = frozen.store(&mut |_| ()).unwrap().swap_remove(0);
                        compare(&snapshot.disk(), &before, "what was frozen");
                    }
                }
                4 => {
                    let path = volume.dir().to_owned();
                    volume.disk().flush().unwrap();
                    drop(volume);
                    volume = Volume::open(&path, &stores[0]).unwrap();
                }
                _ => {
                    let (snapshot, _) = volume.snapshot(store).unwrap();
                    compare(&snapshot.disk(), &oracle, "a snapshot in a line");
                    snapshot.verify().unwrap();
                }
            }
        }
    }
}

/// A sweep that comes between a freeze and its storing keeps nobody waiting whose writes are set aside.
#[test]
fn a_sweep_waits_for_what_is_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), None, 1 << 20).unwrap();
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    let frozen = Volume::freeze([&volume], &store);
    let (made, swept) = std::thread::scope(|scope| {
        let sweep = scope.spawn(|| store.sweep().remove_unreferenced(&HashSet::new()).unwrap());
        while !store.0.turns.sweep_waits() {
            std::thread::yield_now();
        }
        let made = frozen.store(&mut |_| ()).unwrap().swap_remove(0).0;
        (made, sweep.join().unwrap())
    });
    assert_eq!(swept.snapshots, 0, "it is open");
    made.verify().unwrap();
}

/// Who is told of an import's progress may import as well, though a sweep waits for the first.
#[test]
fn an_import_within_an_import_waits_for_no_sweep() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    std::thread::scope(|scope| {
        let mut sweep = None;
        let (outer, _) = store
            .import(&memory(&image(40, 0, 1)), &mut |progress| {
                if progress.done == 0 || sweep.is_some() {
                    return;
                }
                sweep = Some(scope.spawn(|| store.sweep().remove_unreferenced(&HashSet::new()).unwrap()));
                while !store.0.turns.sweep_waits() {
                    std::thread::yield_now();
                }
                store.import(&memory(&image(3, 0, 2)), &mut |_| ()).unwrap().0.verify().unwrap();
            })
            .unwrap();
        assert_eq!(sweep.unwrap().join().unwrap().snapshots, 1, "nobody holds the inner one");
        outer.verify().unwrap();
    });
    drop(store.sweep());
}

/// The same where volumes were frozen on one thread and are stored on another.
#[test]
fn who_stores_may_import_wherever_it_was_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), None, 1 << 20).unwrap();
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    let frozen = Volume::freeze([&volume], &store);
    std::thread::scope(|scope| {
        let sweep = scope.spawn(|| store.sweep().remove_unreferenced(&HashSet::new()).unwrap());
        while !store.0.turns.sweep_waits() {
            std::thread::yield_now();
        }
        let storing = scope.spawn(|| {
            let mut imported = None;
            let import = || store.import(&memory(&image(1, 0, 2)), &mut |_| ()).unwrap().0;
            let made = frozen.store(&mut |_| drop(imported.get_or_insert_with(import).clone())).unwrap();
            (made, imported)
        });
        let (made, imported) = storing.join().unwrap();
        assert_eq!(sweep.join().unwrap().snapshots, 0, "they are open");
        made[0].0.verify().unwrap();
        imported.unwrap().verify().unwrap();
    });
}

/// What to keep is decided when nobody stores any more, so that no snapshot is lost that came to be meanwhile.
#[test]
fn nothing_is_stored_between_the_decision_and_the_sweep() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    std::thread::scope(|scope| {
        let importing = scope.spawn(|| {
            for seed in 0..60 {
                let digest = store.import(&memory(&image(1, 0, seed)), &mut |_| ()).unwrap().0.digest();
                store.snapshot(&digest).unwrap().verify().unwrap();
            }
        });
        while !importing.is_finished() {
            let sweep = store.sweep();
            let keep: HashSet<_> = store.snapshots().unwrap().into_iter().collect();
            assert_eq!(sweep.remove_unreferenced(&keep).unwrap().snapshots, 0);
        }
        importing.join().unwrap();
    });
    assert_eq!(store.snapshots().unwrap().len(), 60);
}
