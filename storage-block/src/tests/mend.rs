//! What is damaged is mended by whoever comes with it once more, and spoils nothing else meanwhile.

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ami_core::Digest;

use super::{contents, image, memory};
use crate::format::{INDEX_HEADER, Kind, PACK_VERSION, record_len};
use crate::keys::LocalKey;
use crate::session::Session;
use crate::testing::compare;
use crate::{ErrorKind, Store, StoreOptions, Volume};

const CHUNK: usize = 64 << 10;
const LEAF: u64 = 32 << 10;

fn flip(path: &Path, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// How somebody comes to know of a damage.
#[derive(Debug, Clone, Copy)]
enum Found {
    Read,
    Scrub,
    Verify,
}

#[test]
fn what_is_damaged_is_stored_again() {
    // A chunk, the leaf behind three of them, and both.
    for (damages, stored) in [
        (&[4096 + CHUNK as u64 + 9][..], CHUNK as u64),
        (&[4096 + 3 * CHUNK as u64 + 9], LEAF),
        (&[4096 + 9, 4096 + 3 * CHUNK as u64], CHUNK as u64 + LEAF),
    ] {
        for found in [Found::Read, Found::Scrub, Found::Verify] {
            let dir = tempfile::tempdir().unwrap();
            let bytes = image(3, 0, 1);
            let digest = {
                let store = Store::open(dir.path()).unwrap();
                store.import(&memory(&bytes), &mut |_| ()).unwrap().0.digest()
            };
            damages.iter().for_each(|at| flip(&dir.path().join("packs/00000000.pack"), *at));
            let store = Store::open(dir.path()).unwrap();
            let snapshot = store.snapshot(&digest).unwrap();
            let read = || {
                // Each chunk, so that each damage is met.
                let mut buf = vec![0; CHUNK];
                (0..3).map(|at| snapshot.disk().read_at(&mut buf, at << 16)).filter_map(Result::err).count()
            };
            let leaf_too = || store.scrub(&mut |_| ()).unwrap().damages.len();
            match found {
                Found::Read => assert!(read() > 0),
                Found::Scrub => assert_eq!(leaf_too(), damages.len()),
                Found::Verify => assert_eq!(snapshot.verify().unwrap_err().kind(), ErrorKind::Corrupt),
            }
            let (_, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
            // Where the leaf is damaged nobody has looked behind it yet.
            let behind = !matches!(found, Found::Scrub) && damages.len() > 1;
            assert_eq!(stats.stored_bytes, if behind { LEAF } else { stored }, "{damages:?}, {found:?}");
            if behind {
                assert!(read() > 0, "the chunk is met now");
                store.import(&memory(&bytes), &mut |_| ()).unwrap();
            }
            // For who had it open before, too, and after the store was opened again.
            compare(&snapshot.disk(), &bytes, "a snapshot that was open");
            snapshot.verify().unwrap();
            drop((snapshot, store));
            let store = Store::open(dir.path()).unwrap();
            let snapshot = store.snapshot(&digest).unwrap();
            compare(&snapshot.disk(), &bytes, "a snapshot that was opened again");
            snapshot.verify().unwrap();
            // Once is enough.
            assert_eq!(store.import(&memory(&bytes), &mut |_| ()).unwrap().1.stored_bytes, 0);
            drop(snapshot);
            // And what is alive is carried from where it is whole.
            store.sweep().remove_unreferenced(&HashSet::from([digest])).unwrap();
            store.snapshot(&digest).unwrap().verify().unwrap();
        }
    }
}

/// What was mended lies in two places, and which of them is damaged is not known any more once the store was closed: the
/// sweep finds out before it takes one for what nobody needs.
#[test]
fn a_sweep_keeps_what_was_mended() {
    for encrypted in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions::new().keys(Arc::new(LocalKey::from_bytes([1; 32])));
        let open = || Store::open_with(dir.path(), &options).unwrap();
        let bytes = image(2, 0, 1);
        let key = open().new_key(None).unwrap();
        let import = |store: &Store| match encrypted {
            true => store.import_encrypted(&memory(&bytes), &key, &mut |_| ()).unwrap(),
            false => store.import(&memory(&bytes), &mut |_| ()).unwrap(),
        };
        let digest = {
            let store = open();
            // While one appends to the first pack, the other needs a second; and what the first one stored nobody names.
            let mut session = Session::begin(&store.0);
            session.put_leaf(&[[7; 32]; 1024]).unwrap();
            let (snapshot, _) = import(&store);
            session.finish(|_| Ok(())).unwrap();
            snapshot.digest()
        };
        flip(&dir.path().join("packs/00000001.pack"), 4096 + 9);
        {
            let store = open();
            assert!(store.snapshot(&digest).unwrap().verify().is_err());
            assert_eq!(import(&store).1.stored_bytes, CHUNK as u64);
        }
        let swept = open().sweep().remove_unreferenced(&HashSet::from([digest])).unwrap();
        assert_eq!(swept.unreadable, 0);
        open().snapshot(&digest).unwrap().verify().unwrap();
    }
}

/// A chunk that others are stored as what differs from: it is stored as a whole again.
#[test]
fn what_others_differ_from_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = image(1, 0, 1);
    let (base, patched) = {
        let store = Store::open(dir.path().join("store")).unwrap();
        let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        let volume = Volume::create(&dir.path().join("volume"), Some(&base), base.size()).unwrap();
        volume.disk().write_at(&[9; 4096], 0).unwrap();
        let (patched, stats) = volume.snapshot(&store).unwrap();
        assert_eq!(stats.stored_bytes, 4096 + LEAF);
        (base.digest(), patched.digest())
    };
    flip(&dir.path().join("store/packs/00000000.pack"), 4096 + 50_000);
    let store = Store::open(dir.path().join("store")).unwrap();
    let snapshot = store.snapshot(&patched).unwrap();
    let error = snapshot.disk().read_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("slot 0 "), "{error}");
    let (again, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    assert_eq!((again.digest(), stats.stored_bytes), (base, CHUNK as u64));
    bytes[..4096].fill(9);
    compare(&snapshot.disk(), &bytes, "what differs from what was mended");
    drop((again, snapshot, store));
    let store = Store::open(dir.path().join("store")).unwrap();
    compare(&store.snapshot(&patched).unwrap().disk(), &bytes, "the same after it was opened again");
    let report = store.scrub(&mut |_| ()).unwrap();
    assert!(report.damaged_snapshots.is_empty(), "{report:?}");
}

/// A pack of what differs from chunks that are missing: a sweep keeps it, also where next to nothing else is alive in it, as it
/// is whole again when these are stored again, and then it can be read at once.
#[test]
fn what_differs_from_what_is_missing_waits_for_it() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("an index is missing", |packs| std::fs::remove_file(packs.join("00000000.index")).unwrap()),
        ("an index is not known", |packs| flip(&packs.join("00000000.index"), 3)),
        ("a pack is cut", |packs| {
            let file = std::fs::File::options().write(true).open(packs.join("00000000.pack")).unwrap();
            file.set_len(4096 + 100).unwrap();
        }),
        ("records have rotted", |packs| {
            let index = packs.join("00000000.index");
            for record in [0, 1] {
                flip(&index, (INDEX_HEADER + record * record_len(PACK_VERSION) + 9) as u64);
            }
        }),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let open = || Store::with_pack_slots(dir.path().join("store"), 3).unwrap();
        // With its manifest as much as a pack takes.
        let original = image(2, 0, 1);
        let base = open().import(&memory(&original), &mut |_| ()).unwrap().0.digest();
        let patched = {
            let store = open();
            let snapshot = store.snapshot(&base).unwrap();
            let volume =
                Volume::create(&dir.path().join("volume"), Some(&snapshot), snapshot.size()).unwrap();
            volume.disk().write_at(&[9; 4096], 0).unwrap();
            let (patched, stats) = volume.snapshot(&store).unwrap();
            assert_eq!(stats.stored_bytes, 4096 + LEAF);
            patched.digest()
        };
        // Of what lies in the second pack, more will be dead than alive.
        open().import(&memory(&image(1, 0, 2)), &mut |_| ()).unwrap();
        let mut bytes = original.clone();
        bytes[..4096].fill(9);
        let packs = dir.path().join("store/packs");
        damage(&packs);
        let (keep, store) = (HashSet::from([base, patched]), open());
        for _ in 0..2 {
            let swept = store.sweep().remove_unreferenced(&keep).unwrap();
            assert!(swept.missing + swept.unreadable > 0, "{what}: {swept:?}");
            assert!(
                packs.join("00000000.pack").exists(),
                "{what}: a damage that may be undone is made good on"
            );
        }
        store.import(&memory(&original), &mut |_| ()).unwrap();
        let read = |store: &Store| {
            compare(&store.snapshot(&patched).unwrap().disk(), &bytes, what);
            store.snapshot(&patched).unwrap().verify().unwrap();
        };
        read(&store);
        let swept = store.sweep().remove_unreferenced(&keep).unwrap();
        assert_eq!((swept.missing, swept.unreadable), (0, 0), "{what}");
        read(&store);
        drop(store);
        read(&open());
    }
}

/// What others differ from is stored as a whole when it comes back, also where it could be stored as what differs itself.
#[test]
fn what_others_wait_for_is_stored_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    // With its manifest as much as a pack takes.
    let open = || Store::with_pack_slots(dir.path().join("store"), 2).unwrap();
    let volume = |name: &str, store: &Store, base: Digest| {
        let base = store.snapshot(&base).unwrap();
        Volume::create(&dir.path().join(name), Some(&base), base.size()).unwrap()
    };
    let first = image(1, 0, 1);
    let mut second = first.clone();
    second[..4096].fill(8);
    let [first, second] =
        [first, second].map(|image| open().import(&memory(&image), &mut |_| ()).unwrap().0.digest());
    let patched = {
        let (store, mut found) = (open(), vec![0; CHUNK]);
        let volume = volume("patched", &store, second);
        volume.disk().write_at(&[9; 4096], 4096).unwrap();
        volume.disk().read_at(&mut found, 0).unwrap();
        let (patched, stats) = volume.snapshot(&store).unwrap();
        assert_eq!(stats.stored_bytes, 4096 + LEAF);
        (patched.digest(), found)
    };
    std::fs::remove_file(dir.path().join("store/packs/00000001.index")).unwrap();
    let store = open();
    let again = volume("again", &store, first);
    again.disk().write_at(&[8; 4096], 0).unwrap();
    let (snapshot, _) = again.snapshot(&store).unwrap();
    assert_eq!(snapshot.digest(), second);
    compare(&store.snapshot(&patched.0).unwrap().disk(), &patched.1, "what waited for it");
}

/// The same where it is there as what differs, too, as whoever mended it stored it once more.
#[test]
fn what_others_wait_for_is_stored_as_a_whole_beside_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Store::with_pack_slots(dir.path().join("store"), 2).unwrap();
    let change = |name: &str, base: Digest, at: u64, byte: u8| {
        let (store, mut found) = (open(), vec![0; CHUNK]);
        let base = store.snapshot(&base).unwrap();
        let volume = Volume::create(&dir.path().join(name), Some(&base), base.size()).unwrap();
        volume.disk().write_at(&[byte; 4096], at).unwrap();
        volume.disk().read_at(&mut found, 0).unwrap();
        let (snapshot, stats) = volume.snapshot(&store).unwrap();
        assert_eq!(stats.stored_bytes, 4096 + LEAF, "{name} differs");
        (snapshot.digest(), found)
    };
    let first = open().import(&memory(&image(1, 0, 1)), &mut |_| ()).unwrap().0.digest();
    let (second, bytes) = change("second", first, 0, 8);
    // So that the one lies in another pack than the other.
    open().import(&memory(&image(1, 0, 5)), &mut |_| ()).unwrap();
    let packs = dir.path().join("store/packs");
    flip(&packs.join("00000001.pack"), 4096 + 9);
    let number = {
        let store = open();
        store.snapshot(&second).unwrap().verify().unwrap_err();
        assert_eq!(store.import(&memory(&bytes), &mut |_| ()).unwrap().1.stored_bytes, CHUNK as u64);
        store.0.find_open(Kind::Chunk, ami_core::Digest::of(&bytes).as_bytes()).unwrap().pack.number
    };
    assert_ne!(number, 1);
    let (third, expected) = change("third", second, 4096, 9);
    std::fs::remove_file(packs.join(format!("{number:08x}.index"))).unwrap();
    let store = open();
    store.import(&memory(&bytes), &mut |_| ()).unwrap();
    compare(&store.snapshot(&third).unwrap().disk(), &expected, "what waited for it");
}

#[test]
fn a_damaged_root_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let bytes = image(2, 0, 1);
    let digest = store.import(&memory(&bytes), &mut |_| ()).unwrap().0.digest();
    flip(&dir.path().join("snapshots").join(digest.to_hex()), 70);
    assert_eq!(store.snapshot(&digest).unwrap_err().kind(), ErrorKind::Corrupt);
    let (again, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    assert_eq!((again.digest(), stats.stored_bytes), (digest, 0));
    drop((again, store));
    let store = Store::open(dir.path()).unwrap();
    compare(&store.snapshot(&digest).unwrap().disk(), &bytes, "a snapshot whose root was damaged");
}

/// A pack that cannot be used closes nothing but itself: it is named by who reads from it, and by a scrub, and is neither
/// appended to nor removed.
#[test]
fn a_damaged_pack_is_alone_in_it() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage, &str); 4] = [
        ("00000000.pack", |path| std::fs::write(path, b"").unwrap(), "00000000.pack"),
        ("00000000.pack", |path| flip(path, 3), "00000000.pack"),
        ("00000000.index", |path| flip(path, 3), "00000000.index"),
        ("00000000.index", |path| std::fs::remove_file(path).unwrap(), "00000000.index"),
    ];
    for (file, damage, named) in cases {
        let dir = tempfile::tempdir().unwrap();
        let images = [image(2, 0, 1), image(2, 0, 2)];
        let open = || Store::with_pack_slots(dir.path().to_owned(), 3).unwrap();
        let digests = images.each_ref().map(|bytes| {
            // So that each has a pack of its own.
            open().import(&memory(bytes), &mut |_| ()).unwrap().0.digest()
        });
        let path = dir.path().join("packs").join(file);
        damage(&path);
        let left = std::fs::read(&path).ok();

        let store = open();
        compare(&store.snapshot(&digests[1]).unwrap().disk(), &images[1], "what is in another pack");
        let error = store.snapshot(&digests[0]).unwrap().disk().read_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(named), "{error} does not name {named}");
        let report = store.scrub(&mut |_| ()).unwrap();
        assert_eq!(report.damaged_snapshots, [digests[0]]);
        assert!(report.damages.iter().any(|damage| damage.to_string().contains(named)), "{report:?}");
        // A sweep that has to keep what nobody can read removes no more than what nobody names.
        let swept = store.sweep().remove_unreferenced(&HashSet::from([digests[0]])).unwrap();
        assert_eq!((swept.snapshots, swept.packs, swept.unreadable), (1, 0, 1), "{file}");
        assert_eq!(store.snapshots().unwrap(), [digests[0]]);
        assert_eq!(store.import(&memory(&images[1]), &mut |_| ()).unwrap().1.stored_bytes, 0);

        // Whoever has what was in it makes good for it.
        let (again, stats) = store.import(&memory(&images[0]), &mut |_| ()).unwrap();
        assert_eq!((again.digest(), stats.stored_bytes), (digests[0], 2 * CHUNK as u64 + LEAF), "{file}");
        drop((again, store));
        assert_eq!(std::fs::read(&path).ok(), left, "it is left as it is");
        let store = open();
        for (digest, bytes) in digests.iter().zip(&images) {
            compare(&store.snapshot(digest).unwrap().disk(), bytes, "what was stored again");
        }
        store.sweep().remove_unreferenced(&digests.into()).unwrap();
        store.snapshot(&digests[0]).unwrap().verify().unwrap();
    }
}

/// Of what nobody can say whose it is nothing is removed: who undoes the damage finds all there, and so does who stores it
/// again. Who does not need it any more gives it up.
#[test]
fn what_a_damaged_manifest_may_need_is_kept() {
    let root_of = |digest: Digest| PathBuf::from("snapshots").join(digest.to_hex());
    // Two that have one leaf, as the second goes on with zeroes, and one that nobody names.
    let kept = image(2, 0, 1);
    let longer = [&kept[..], &[0; CHUNK]].concat();
    for damage in ["root", "leaf"] {
        let dir = tempfile::tempdir().unwrap();
        let open = || Store::with_pack_slots(dir.path().to_owned(), 3).unwrap();
        let import = |bytes: &[u8]| open().import(&memory(bytes), &mut |_| ()).unwrap().0.digest();
        let (keep, _) = (HashSet::from([import(&kept), import(&longer)]), import(&image(2, 0, 2)));
        let (path, at, unreadable) = match damage {
            "root" => (root_of(import(&kept)), 70, 1),
            _ => ("packs/00000000.pack".into(), 4096 + 2 * CHUNK as u64 + 9, 2),
        };
        flip(&dir.path().join(&path), at);
        for _ in 0..2 {
            let store = open();
            let before = contents(&dir.path().join("packs"));
            let first = store.snapshots().unwrap().len() as u64 - 2;
            let swept = store.sweep().remove_unreferenced(&keep).unwrap();
            assert_eq!((swept.snapshots, swept.packs, swept.unreadable), (first, 0, unreadable), "{damage}");
            assert!(contents(&dir.path().join("packs")) == before, "{damage}: a pack has changed");
        }

        flip(&dir.path().join(&path), at);
        keep.iter().for_each(|digest| open().snapshot(digest).unwrap().verify().unwrap());
        flip(&dir.path().join(&path), at);

        let store = open();
        // Which finds it.
        store.sweep().remove_unreferenced(&keep).unwrap();
        store.import(&memory(&kept), &mut |_| ()).unwrap();
        let swept = store.sweep().remove_unreferenced(&keep).unwrap();
        assert_eq!((swept.packs > 0, swept.unreadable), (true, 0), "{damage}");
        keep.iter().for_each(|digest| store.snapshot(digest).unwrap().verify().unwrap());
        drop(store);

        flip(&dir.path().join(&path), at);
        let swept = open().sweep().remove_unreferenced(&HashSet::new()).unwrap();
        assert_eq!((swept.snapshots, swept.unreadable), (2, 0), "{damage}");
        assert!(contents(&dir.path().join("packs")).is_empty(), "{damage}");
    }
}
