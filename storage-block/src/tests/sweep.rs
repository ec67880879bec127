//! What a sweep forgets, in which order it deletes, and who must not wait for it.

use std::collections::HashSet;
use std::sync::mpsc;
use std::time::Duration;

use ami_core::Digest;

use super::tape::{Op, Tape};
use super::{image, memory};
use crate::places::VISITED;
use crate::session::{Session, prepare};
use crate::store::read;
use crate::testing::Random;
use crate::{ErrorKind, Snapshot, Store, Volume};

/// Every object that is known is to be found where it is known to be.
fn check_index(store: &Store, what: &str) {
    let index = read(&store.0.index);
    for (id, place) in index.places.iter() {
        assert!(index.find(id).is_some(), "{what}: {place:?} is nowhere");
    }
    for (id, copies) in &index.copies {
        assert!(index.places.contains_key(id), "{what}: copies of nothing");
        let is_there = |pack: &u32| index.packs.contains_key(pack);
        assert!(copies.iter().all(|copy| is_there(&copy.pack)), "{what}: {copies:?}");
    }
}

/// Fills so many packs with two images each, and says which the smaller ones are: a quarter of each pack is theirs.
fn half_alive(store: &Store, packs: usize) -> HashSet<Digest> {
    let kept = (0..packs as u64).map(|number| {
        let kept = store.import(&memory(&image(1, 0, 100 + number)), &mut |_| ()).unwrap().0.digest();
        store.import(&memory(&image(6, 0, 500 + number)), &mut |_| ()).unwrap();
        kept
    });
    kept.collect()
}

/// A sweep looks at all there is so many times, and not so many times for each pack that it rewrites.
#[test]
fn rewriting_a_pack_costs_what_is_in_it() {
    let mut per_object = Vec::new();
    for packs in [2, 16] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::with_pack_slots(dir.path().to_owned(), 7).unwrap();
        let keep = half_alive(&store, packs);
        let objects = read(&store.0.index).places.len();
        VISITED.set(0);
        let swept = store.sweep().remove_unreferenced(&keep).unwrap();
        let visited = VISITED.get();
        assert!(swept.packs >= packs as u64, "{swept:?}");
        check_index(&store, "after a sweep");
        per_object.push(visited as f64 / objects as f64);
        keep.iter().for_each(|digest| store.snapshot(digest).unwrap().verify().unwrap());
    }
    assert!(per_object[1] <= per_object[0] + 1.0, "{per_object:?} looks at each object");
}

/// However many packs are rewritten, only so many objects of theirs are listed at one time, and all come out the same.
#[test]
fn packs_are_rewritten_some_at_a_time() {
    let mut found = Vec::new();
    for listed in [1, 25, usize::MAX] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::with_pack_slots(dir.path().to_owned(), 7).unwrap();
        let keep = half_alive(&store, 8);
        let objects = read(&store.0.index).places.len();
        let mut sweep = store.sweep();
        sweep.listed = listed;
        VISITED.set(0);
        let swept = sweep.remove_unreferenced(&keep).unwrap();
        check_index(&store, "after a sweep");
        keep.iter().for_each(|digest| store.snapshot(digest).unwrap().verify().unwrap());
        found.push((VISITED.get() / objects, swept, store.snapshots().unwrap()));
    }
    assert!(found.iter().all(|(_, swept, left)| (swept, left) == (&found[2].1, &found[2].2)), "{found:?}");
    assert!(found[0].0 > found[1].0 && found[1].0 > found[2].0, "{found:?} looks at all there is");
}

/// Has chunks stored in two places: who imports them does so while another has stored them, and nobody knows.
fn side_by_side(store: &Store, bytes: &[u8], import: impl FnOnce() -> Snapshot) -> Snapshot {
    let mut session = Session::begin(&store.0);
    for chunk in bytes.chunks(1 << 16) {
        session.put(&prepare(&store.0, chunk, None, None), chunk).unwrap();
    }
    let imported = import();
    session.finish(|_| Ok(())).unwrap();
    imported
}

/// What is forgotten is what goes, with what differs from it, whichever packs these lie in and whatever else is in several places.
#[test]
fn what_a_sweep_has_forgotten_is_stored_again() {
    for (seed, twice) in (0..20).flat_map(|seed| [(seed, false), (seed, true)]) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::with_pack_slots(dir.path().join("store"), 4).unwrap();
        let mut random = Random(seed);
        let mut made: Vec<(Digest, Vec<u8>)> = Vec::new();
        for number in 0..6u64 {
            let mut bytes = image(3, 0, seed * 10 + number);
            let import = || store.import(&memory(&bytes), &mut |_| ()).unwrap().0;
            let base = if twice && number % 3 == 0 { side_by_side(&store, &bytes, import) } else { import() };
            made.push((base.digest(), bytes.clone()));
            // And one that differs little, which may come to lie in another pack.
            let path = dir.path().join(format!("volume-{number}"));
            let volume = Volume::create(&path, Some(&base), base.size()).unwrap();
            let at = random.below(3) << 16;
            volume.disk().write_at(&[9; 4096], at).unwrap();
            bytes[at as usize..][..4096].fill(9);
            made.push((volume.snapshot(&store).unwrap().0.digest(), bytes));
        }
        let keep: HashSet<Digest> =
            made.iter().filter(|_| random.below(3) == 0).map(|(digest, _)| *digest).collect();
        let what = format!("seed {seed}, some twice: {twice}");
        store.sweep().remove_unreferenced(&keep).unwrap();
        check_index(&store, &what);
        keep.iter().for_each(|digest| store.snapshot(digest).unwrap().verify().unwrap());
        for (digest, bytes) in &made {
            let (snapshot, _) = store.import(&memory(bytes), &mut |_| ()).unwrap();
            assert_eq!(snapshot.digest(), *digest, "{what}");
            snapshot.verify().unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }
}

/// A pack of which nobody knows what is in it goes when nothing is missed any more, and not before.
#[test]
fn a_broken_pack_goes_when_nothing_is_missing() {
    type Damage = fn(&std::path::Path);
    let damages: [(&str, Damage); 2] = [
        ("it is missing", |index| std::fs::remove_file(index).unwrap()),
        ("it is no index", |index| std::fs::write(index, [1; 100]).unwrap()),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let tape = Tape::record(dir.path());
        let open = || Store::with_pack_slots(dir.path().to_owned(), 4).unwrap();
        let images = [image(3, 0, 1), image(3, 0, 2)];
        let import = |store: &Store, number: usize| {
            store.import(&memory(&images[number]), &mut |_| ()).unwrap().0.digest()
        };
        let keep = HashSet::from([0, 1].map(|number| import(&open(), number)));
        let packs = dir.path().join("packs");
        damage(&packs.join("00000000.index"));
        let pack = packs.join("00000000.pack");
        let store = open();
        let swept = |store: &Store| store.sweep().remove_unreferenced(&keep).unwrap();
        assert_eq!(swept(&store).unreadable, 1, "{what}");
        assert!(pack.exists(), "{what}");
        // What was in it is there again, and something else is damaged that may have been in it, too.
        import(&store, 0);
        let mut bytes = std::fs::read(packs.join("00000001.pack")).unwrap();
        bytes[4096 + 9] ^= 1;
        std::fs::write(packs.join("00000001.pack"), bytes).unwrap();
        assert_eq!(store.scrub(&mut |_| ()).unwrap().damages.len(), 2, "{what}");
        assert_eq!(swept(&store).missing, 0, "{what}");
        assert!(pack.exists(), "{what}: it goes while something is damaged");
        import(&store, 1);

        let (at, len) = (tape.position(), std::fs::metadata(&pack).unwrap().len());
        let swept = swept(&store);
        assert!(swept.packs > 0 && swept.bytes >= len, "{what}: {swept:?}");
        let packs_dir = std::path::PathBuf::from("packs");
        let steps = tape.steps().split_off(at);
        let done = |op: &Op| steps.iter().position(|step| step.op == *op);
        let removed = done(&Op::Remove { path: packs_dir.join("00000000.pack") }).unwrap();
        let synced = done(&Op::SyncDir { path: packs_dir.clone() }).unwrap();
        assert!(removed < synced, "{what}");
        // A crash in between leaves a lone index, which opening clears away.
        if let Some(index) = done(&Op::Remove { path: packs_dir.join("00000000.index") }) {
            assert!(synced < index, "{what}");
        }
        assert!(!pack.exists() && !packs.join("00000000.index").exists(), "{what}");
        let is_clean = |store: &Store| {
            let report = store.scrub(&mut |_| ()).unwrap();
            assert!(report.damaged_snapshots.is_empty(), "{what}: {report:?}");
            assert!(report.damages.iter().all(|error| !error.to_string().contains("index")), "{report:?}");
        };
        is_clean(&store);
        drop(store);
        is_clean(&open());
    }
}

/// Who holds a sweep would wait for itself.
#[test]
fn who_holds_a_sweep_is_told_that_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), None, 1 << 20).unwrap();
    let (tell, told) = mpsc::channel();
    let holder = {
        let (store, volume) = (store.clone(), volume.clone());
        std::thread::spawn(move || {
            let import = || store.import(&memory(&image(1, 0, 1)), &mut |_| ()).map(drop);
            let sweep = store.sweep();
            tell.send((import(), volume.snapshot(&store).map(drop))).unwrap();
            // In the hands of another, who has done with it, it is in nobody's way.
            let other = std::thread::spawn(move || sweep.remove_unreferenced(&HashSet::new()));
            other.join().unwrap().unwrap();
            tell.send((import(), volume.snapshot(&store).map(drop))).unwrap();
        })
    };
    let next = || {
        let (import, snapshot) = told.recv_timeout(Duration::from_secs(20)).expect("it waits for itself");
        [import, snapshot].map(|result| result.map_err(|error| (error.kind(), error.to_string())))
    };
    let in_use: Result<(), _> = Err((ErrorKind::InUse, "this thread holds a sweep of the store".to_owned()));
    assert_eq!(next(), [in_use.clone(), in_use]);
    assert_eq!(next(), [Ok(()), Ok(())]);
    holder.join().unwrap();
}

/// Others wait until it is over, whoever has it by then.
#[test]
fn others_wait_for_a_sweep() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let sweep = store.sweep();
    std::thread::scope(|scope| {
        let import = scope.spawn(|| store.import(&memory(&image(1, 0, 1)), &mut |_| ()).map(drop));
        let swept = scope.spawn(|| sweep.remove_unreferenced(&HashSet::new()));
        assert_eq!(swept.join().unwrap().unwrap().snapshots, 0);
        import.join().unwrap().unwrap();
    });
}
