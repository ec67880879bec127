//! A scrub finds every damage there is, and no other.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use ami_core::Digest;

use super::fault::Bad;
use super::{image, memory};
use crate::keys::LocalKey;
use crate::session::{Session, prepare};
use crate::store::lock;
use crate::testing::compare;
use crate::{Compression, ErrorKind, ScrubReport, Store, StoreOptions, Volume};

fn options() -> StoreOptions {
    let compression = Compression::WherePays { percent: 20 };
    StoreOptions::new().keys(Arc::new(LocalKey::from_bytes([1; 32]))).compression(compression)
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn scrub(dir: &Path, options: &StoreOptions) -> ScrubReport {
    Store::open_with(dir, options).unwrap().scrub(&mut |_| ()).unwrap()
}

/// Two snapshots, of which the second has a chunk that differs little from one of the first's, and an encrypted one.
fn make(dir: &Path) -> [Digest; 3] {
    let store = Store::open_with(dir.join("store"), &options()).unwrap();
    let mut bytes = image(3, 0, 1);
    bytes[1 << 16..2 << 16].fill(7);
    let (first, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.join("volume"), Some(&first), first.size()).unwrap();
    volume.disk().write_at(&image(1, 0, 5)[..4096], 0).unwrap();
    let (second, _) = volume.snapshot(&store).unwrap();
    let key = store.new_key(None).unwrap();
    let (third, _) = store.import_encrypted(&memory(&image(2, 0, 8)), &key, &mut |_| ()).unwrap();
    [first, second, third].map(|snapshot| snapshot.digest())
}

#[test]
fn every_damage_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second, third] = make(dir.path());
    let store = dir.path().join("store");
    let pack = store.join("packs/00000000.pack");
    let report = scrub(&store, &options());
    assert!(report.damages.is_empty() && report.damaged_snapshots.is_empty(), "{report:?}");
    // Three chunks and a leaf; one of each for the second; two chunks and a leaf.
    assert_eq!((report.snapshots, report.objects, report.without_key), (3, 9, 0));
    let report = scrub(&store, &StoreOptions::new());
    assert!(report.damages.is_empty(), "{report:?}");
    assert_eq!((report.snapshots, report.objects, report.without_key), (3, 9, 2));

    // Units: raw 0, compressed 16, raw 17, leaf 33, what differs 34, leaf 35, encrypted 36 and 52, leaf 68.
    let unit = |unit: usize| 4096 * (unit + 1) + 9;
    for (case, damages, slots, snapshots) in [
        ("a chunk, and what differs from it", &[unit(1)][..], &[0, 0][..], &[first, second][..]),
        ("the block that it differs in", &[unit(0)], &[0], &[first]),
        ("a compressed chunk", &[unit(16)], &[16], &[first, second]),
        ("what differs", &[unit(34)], &[34], &[second]),
        ("a leaf", &[unit(33)], &[33], &[first]),
        ("encrypted chunks", &[unit(36), unit(60)], &[36, 52], &[third]),
        ("all of it", &[unit(17), unit(35), unit(68)], &[17, 35, 68], &[first, second, third]),
    ] {
        damages.iter().for_each(|at| flip(&pack, *at));
        // Without the key, too: there are checksums.
        for options in [options(), StoreOptions::new()] {
            let report = scrub(&store, &options);
            let texts: Vec<String> = report.damages.iter().map(ToString::to_string).collect();
            assert!(report.damages.iter().all(|error| error.kind() == ErrorKind::Corrupt));
            assert_eq!(texts.len(), slots.len(), "{case}: {texts:?}");
            for (text, slot) in texts.iter().zip(slots) {
                assert!(text.contains(&format!("00000000.pack: slot {slot} ")), "{case}: {text}");
            }
            let found: HashSet<Digest> = report.damaged_snapshots.iter().copied().collect();
            assert_eq!(found, snapshots.iter().copied().collect(), "{case}");
        }
        damages.iter().for_each(|at| flip(&pack, *at));
    }

    // A root, and the record of a chunk that two have.
    flip(&store.join("snapshots").join(third.to_hex()), 100);
    flip(&store.join("packs/00000000.index"), 64 + 2 * 84);
    let report = scrub(&store, &options());
    let texts: Vec<String> = report.damages.iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 2, "{texts:?}");
    assert!(texts[0].contains(&third.to_hex()) && texts[1].contains("no pack holds the chunk"), "{texts:?}");
    assert_eq!(report.damaged_snapshots.len(), 3);
}

/// What two have stored side by side lies in two places, and damage in either is found and costs nobody anything.
#[test]
fn damage_is_found_in_every_place() {
    let bytes = image(2, 0, 1);
    for encrypted in [false, true] {
        // The packs of the one and of the other, of which one is that which is read.
        for damaged in [&[0][..], &[1], &[0, 1]] {
            let dir = tempfile::tempdir().unwrap();
            let digest = {
                let store = Store::open_with(dir.path(), &options()).unwrap();
                let key = encrypted.then(|| store.new_key(None).unwrap());
                let import = || match &key {
                    Some(key) => store.import_encrypted(&memory(&bytes), key, &mut |_| ()).unwrap().0,
                    None => store.import(&memory(&bytes), &mut |_| ()).unwrap().0,
                };
                // The other imports when all is stored and nobody knows of it yet.
                let mut session = Session::begin(&store.0);
                let prepared: Vec<_> = bytes
                    .chunks(1 << 16)
                    .map(|chunk| (prepare(&store.0, chunk, key.as_ref(), None), chunk))
                    .collect();
                prepared.iter().for_each(|(prepared, chunk)| session.put(prepared, chunk).unwrap());
                let digest = import().digest();
                session.finish(|_| Ok(())).unwrap();
                digest
            };
            for pack in damaged {
                flip(&dir.path().join(format!("packs/{pack:08}.pack")), 4096 + 9);
            }
            for options in [options(), StoreOptions::new()] {
                let store = Store::open_with(dir.path(), &options).unwrap();
                let report = store.scrub(&mut |_| ()).unwrap();
                let what = format!("{damaged:?}, encrypted {encrypted}: {report:?}");
                assert_eq!(report.objects, 5, "{what}");
                let packs: Vec<bool> = (0..2)
                    .map(|pack| {
                        let named = format!("{pack:08}.pack: slot 0 ");
                        report.damages.iter().any(|error| error.to_string().contains(&named))
                    })
                    .collect();
                assert_eq!(packs, [0, 1].map(|pack| damaged.contains(&pack)), "{what}");
                assert_eq!(report.damages.len(), damaged.len(), "{what}");
                let lost = if damaged.len() == 2 { vec![digest] } else { vec![] };
                assert_eq!(report.damaged_snapshots, lost, "{what}");
                if let (1, Ok(snapshot)) = (damaged.len(), store.snapshot(&digest)) {
                    compare(&snapshot.disk(), &bytes, &what);
                }
            }
        }
    }
}

#[test]
fn a_scrub_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.import(&memory(&image(64, 0, 1)), &mut |_| ()).unwrap();
    let mut seen = Vec::new();
    let report = store.scrub(&mut |progress| seen.push((progress.done, progress.total))).unwrap();
    assert_eq!(report.objects, 49);
    assert!(seen.len() > 2 && seen.is_sorted() && seen.last().is_some_and(|(done, total)| done == total));
    let ended = store.scrub(&mut |progress| progress.cancel());
    assert_eq!(ended.err().map(|error| error.kind()), Some(ErrorKind::Cancelled));
}

/// Imports, snapshots and sweeps go on while a scrub runs, and it finds nothing wrong with what comes and goes.
#[test]
fn everything_goes_on_during_a_scrub() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::with_pack_slots(dir.path().join("store"), 20).unwrap();
    let bytes = image(60, 0, 1);
    let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&base), base.size()).unwrap();
    let churn = || {
        for round in 1..=12u64 {
            volume.disk().write_at(&round.to_le_bytes().repeat(512), round % 60 * 65536).unwrap();
            volume.snapshot(&store).unwrap();
            store.import(&memory(&image(10, 0, round + 2)), &mut |_| ()).unwrap();
            store.sweep().remove_unreferenced(&HashSet::from([base.digest()])).unwrap();
        }
    };
    std::thread::scope(|scope| {
        let churn = scope.spawn(churn);
        while !churn.is_finished() {
            let report = store.scrub(&mut |_| ()).unwrap();
            assert!(report.damages.is_empty() && report.damaged_snapshots.is_empty(), "{report:?}");
        }
        churn.join().unwrap();
    });
}

/// A sweep may delete a pack at any moment in which nobody looks at the index, and what cannot be opened then is no damage.
#[test]
fn packs_are_opened_while_they_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(2, 0, 1);
    {
        let store = Store::open(dir.path()).unwrap();
        let mut session = Session::begin(&store.0);
        for chunk in bytes.chunks(1 << 16) {
            session.put(&prepare(&store.0, chunk, None, None), chunk).unwrap();
        }
        store.import(&memory(&bytes), &mut |_| ()).unwrap();
        session.finish(|_| Ok(())).unwrap();
    }
    let store = Store::open(dir.path()).unwrap();
    let held = Arc::new(Mutex::new(Vec::new()));
    let watched: Vec<Bad> = (0..2)
        .map(|pack| {
            let (store, held) = (store.clone(), Arc::clone(&held));
            Bad::act(&dir.path().join(format!("packs/{pack:08}.pack")), 0..8, move || {
                lock(&held).push((pack, store.0.index.try_write().is_err()));
                Ok(())
            })
        })
        .collect();
    store.scrub(&mut |_| ()).unwrap();
    assert_eq!(*lock(&held), [(0, true), (1, true)]);
    drop(watched);
}
