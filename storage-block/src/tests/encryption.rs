//! Snapshots and volumes that are encrypted.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{contents, copy_dir, image, memory};
use crate::keys::{DataKey, EncryptionKey, KeyContext, KeyProvider, LocalKey};
use crate::testing::{Random, compare, random_operation};
use crate::{Compression, ErrorKind, Snapshot, Store, StoreOptions, Volume, VolumeOptions};

const LEAF: u64 = 32 << 10;

fn options() -> StoreOptions {
    StoreOptions::new().keys(Arc::new(LocalKey::from_bytes([1; 32])))
}

fn open(dir: &Path) -> Store {
    Store::open_with(dir.join("store"), &options()).unwrap()
}

fn import(store: &Store, bytes: &[u8], key: &EncryptionKey) -> (Snapshot, u64) {
    let (snapshot, stats) = store.import_encrypted(&memory(bytes), key, &mut |_| ()).unwrap();
    (snapshot, stats.stored_bytes)
}

/// An image of a text that is in no file by chance, of which some chunks can be compressed and some are nearly empty.
fn telling(chunks: usize) -> Vec<u8> {
    let mut bytes = image(chunks, 0, 3);
    for chunk in bytes.chunks_mut(1 << 16).step_by(2) {
        for part in chunk[4096..].chunks_mut(SECRET.len()) {
            part.copy_from_slice(&SECRET[..part.len()]);
        }
    }
    if let Some(last) = bytes.chunks_mut(1 << 16).last() {
        last.fill(0);
        last[8192..][..SECRET.len()].copy_from_slice(SECRET);
    }
    bytes
}

const SECRET: &[u8] = b"a text that is in no file by chance\n";

/// Whether any file under `dir` has the text, or 16 bytes at the beginning of a block of it.
fn tells(dir: &Path, bytes: &[u8]) -> bool {
    let blocks = bytes.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0));
    let mut parts: HashSet<&[u8]> =
        blocks.map(|block| &block[..16]).filter(|part| *part != [0; 16]).collect();
    parts.extend([&SECRET[..16], &SECRET[16..32]]);
    contents(dir).iter().any(|(_, found)| found.windows(16).any(|window| parts.contains(window)))
}

#[test]
fn nothing_that_is_encrypted_stands_in_a_file() {
    for compression in [Compression::None, Compression::WherePays { percent: 10 }] {
        let dir = tempfile::tempdir().unwrap();
        let options = options().compression(compression);
        let store = Store::open_with(dir.path().join("store"), &options).unwrap();
        let mut bytes = telling(6);
        let key = store.new_key(None).unwrap();
        let (snapshot, _) = import(&store, &bytes, &key);
        let size = 16 << 16;
        let volume = Volume::create(&dir.path().join("volume"), Some(&snapshot), size).unwrap();
        bytes.resize(size as usize, 0);
        // Whole blocks, parts of blocks of the snapshot's and of its own, and into a hole.
        for at in [0, 4096 + 100, 4096 + 200, 5 * 65536 - 7, 10 << 16, (10 << 16) + 5000] {
            volume.disk().write_at(SECRET, at as u64).unwrap();
            bytes[at..at + SECRET.len()].copy_from_slice(SECRET);
        }
        volume.disk().write_at(&SECRET.repeat(1000), 8192).unwrap();
        bytes[8192..8192 + 1000 * SECRET.len()].copy_from_slice(&SECRET.repeat(1000));
        volume.disk().flush().unwrap();
        compare(&volume.disk(), &bytes, "an encrypted volume");
        let (next, _) = volume.snapshot(&store).unwrap();
        compare(&next.disk(), &bytes, "a snapshot of an encrypted volume");
        assert!(!tells(dir.path(), &bytes), "{compression:?}");

        // All of it opens again, and the test would see it.
        let (volume_dir, digest) = (volume.dir().to_owned(), next.digest());
        drop((snapshot, volume, next, key, store));
        let store = Store::open_with(dir.path().join("store"), &options).unwrap();
        let volume = Volume::open(&volume_dir, &store).unwrap();
        compare(&volume.disk(), &bytes, "an encrypted volume that was opened");
        let next = store.snapshot(&digest).unwrap();
        next.verify().unwrap();
        compare(&next.disk(), &bytes, "an encrypted snapshot that was opened");
        store.import(&next.disk(), &mut |_| ()).unwrap();
        assert!(tells(dir.path(), &bytes));
    }
}

#[test]
fn equal_chunks_are_stored_once_for_each_key() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes = telling(6);
    let keys = [store.new_key(None).unwrap(), store.new_key(None).unwrap()];
    let plain_store = Store::open(dir.path().join("plain")).unwrap();
    let (plain, stats) = plain_store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let (first, stored) = import(&store, &bytes, &keys[0]);
    assert_eq!(stored, stats.stored_bytes, "it takes no more than what is not encrypted");
    let (second, again) = import(&store, &bytes, &keys[1]);
    assert_eq!(again, stored, "nothing is shared between keys");
    let (again, stored) = import(&store, &bytes, &keys[0]);
    assert_eq!((again.digest(), stored), (first.digest(), 0));
    assert_eq!(HashSet::from([plain.digest(), first.digest(), second.digest()]).len(), 3);
    assert_eq!((first.key_id(), plain.key_id()), (Some(keys[0].key_id()), None));

    // Nor is a byte of it the same: no unit stands twice in the packs.
    let pack = std::fs::read(dir.path().join("store/packs/00000000.pack")).unwrap();
    let units: Vec<&[u8]> =
        pack[4096..].chunks(4096).filter(|unit| unit.iter().any(|byte| *byte != 0)).collect();
    let distinct: HashSet<&[u8]> = units.iter().copied().collect();
    assert!(distinct.len() + 1 >= units.len(), "{} of {} units are others", distinct.len(), units.len());
}

/// Two volumes of one key that hold the same have different overlays.
#[test]
fn overlays_have_nothing_in_common() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let key = store.new_key(None).unwrap();
    let overlays = ["a", "b"].map(|name| {
        let path = dir.path().join(name);
        let volume = VolumeOptions::new().encrypt(&key).create(&path, None, 1 << 20).unwrap();
        volume.disk().write_at(&SECRET.repeat(3000), 0).unwrap();
        let (snapshot, _) = volume.snapshot(&store).unwrap();
        (snapshot.digest(), std::fs::read(path.join("overlay")).unwrap())
    });
    assert_eq!(overlays[0].0, overlays[1].0, "their snapshots are one");
    let blocks = |at: usize| overlays[at].1.chunks(16).take(6000).collect::<HashSet<_>>();
    assert!(blocks(0).is_disjoint(&blocks(1)));
    assert_eq!(blocks(0).len(), 6000, "nor does one have a block twice");
}

#[test]
fn wrong_and_missing_keys_are_told_from_damage() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = telling(4);
    let digest = {
        let store = open(dir.path());
        let key = store.new_key(None).unwrap();
        let (snapshot, _) = import(&store, &bytes, &key);
        let volume = Volume::create(&dir.path().join("volume"), Some(&snapshot), 1 << 20).unwrap();
        volume.disk().write_at(SECRET, 0).unwrap();
        volume.disk().flush().unwrap();
        VolumeOptions::new().encrypt(&key).create(&dir.path().join("empty"), None, 1 << 20).unwrap();
        snapshot.digest()
    };
    /// A provider that gives out another key than it was given.
    struct Mistaken(LocalKey);
    impl KeyProvider for Mistaken {
        fn default_key_id(&self) -> &str {
            self.0.default_key_id()
        }
        fn wrap(&self, key_id: &str, key: &DataKey, context: &KeyContext) -> crate::Result<Vec<u8>> {
            self.0.wrap(key_id, key, context)
        }
        fn unwrap(&self, _: &str, _: &[u8], _: Option<&KeyContext>) -> crate::Result<DataKey> {
            DataKey::generate()
        }
    }
    let mistaken = Mistaken(LocalKey::from_bytes([1; 32]));
    for (case, options) in [
        ("no keys", StoreOptions::new()),
        ("another key", StoreOptions::new().keys(Arc::new(LocalKey::from_bytes([2; 32])))),
        ("a wrong data key", StoreOptions::new().keys(Arc::new(mistaken))),
    ] {
        let before = contents(dir.path());
        {
            let store = Store::open_with(dir.path().join("store"), &options).unwrap();
            for error in [
                store.snapshot(&digest).unwrap_err(),
                Volume::open(&dir.path().join("volume"), &store).unwrap_err(),
                Volume::open(&dir.path().join("empty"), &store).unwrap_err(),
            ] {
                assert_eq!(error.kind(), ErrorKind::KeyUnavailable, "{case}: {error}");
            }
            assert_eq!(store.snapshots().unwrap(), [digest], "it is there for all that");
            // Nobody needs the key to know what is alive.
            store.sweep().remove_unreferenced(&HashSet::from([digest])).unwrap();
        }
        assert!(contents(dir.path()) == before, "{case}");
    }
    let store = open(dir.path());
    compare(&store.snapshot(&digest).unwrap().disk(), &bytes, "with the right key");
    Volume::open(&dir.path().join("volume"), &store).unwrap();
    assert_eq!(
        Store::open(dir.path().join("other")).unwrap().new_key(None).unwrap_err().kind(),
        ErrorKind::KeyUnavailable
    );
    assert_eq!(store.new_key(Some("absent")).unwrap_err().kind(), ErrorKind::KeyUnavailable);
}

/// A wrapped key is of use only where it was put: not in another volume, nor in a snapshot's place.
#[test]
fn a_wrapped_key_cannot_be_moved() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let key = store.new_key(None).unwrap();
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    for path in &paths {
        VolumeOptions::new().encrypt(&key).create(path, None, 1 << 20).unwrap();
    }
    let header = |path: &Path| std::fs::read(path.join("log")).unwrap();
    let [mine, theirs] = paths.each_ref().map(|path| crate::format::parse_volume(&header(path)).unwrap());
    let (mine, theirs) = (mine.key.unwrap(), theirs.key.unwrap());
    assert_ne!(mine.wrapped, theirs.wrapped);
    let (snapshot, _) = import(&store, &telling(2), &key);
    let of_snapshot = snapshot.root.wrapped().unwrap().clone();

    for wrapped in [theirs.wrapped, of_snapshot] {
        let mut bytes = header(&paths[0]);
        let mut moved = crate::format::parse_volume(&bytes).unwrap();
        moved.key = Some(crate::format::VolumeKey { wrapped, salt: mine.salt });
        bytes[..4096].copy_from_slice(&crate::format::encode_volume(&moved));
        let copy = dir.path().join("copy");
        copy_dir(&paths[0], &copy);
        std::fs::write(copy.join("log"), bytes).unwrap();
        assert_eq!(Volume::open(&copy, &store).unwrap_err().kind(), ErrorKind::KeyUnavailable);
        std::fs::remove_dir_all(&copy).unwrap();
    }
    let volume = Volume::open(&paths[0], &store).unwrap();
    assert!(EncryptionKey::are_same(volume.key(), Some(&key)));
}

#[test]
fn keys_stand_in_no_message() {
    let provider = LocalKey::from_bytes([0x41; 32]);
    let store_dir = tempfile::tempdir().unwrap();
    let options = StoreOptions::new().keys(Arc::new(LocalKey::from_bytes([0x41; 32])));
    let store = Store::open_with(store_dir.path(), &options).unwrap();
    let key = store.new_key(None).unwrap();
    let context = KeyContext::volume(&[7; 32]);
    let wrapped = key.wrap(&context).unwrap().wrapped;
    let data = provider.unwrap(key.key_id(), &wrapped, Some(&context)).unwrap();
    let snapshot = import(&store, &telling(1), &key).0;
    let error = provider.unwrap("absent", &[], None).unwrap_err();
    for text in [
        format!("{provider:?} {options:?} {store:?} {key:?} {data:?} {snapshot:?} {error:?} {error}"),
        format!("{provider:#?} {options:#?} {store:#?} {key:#?} {data:#?} {snapshot:#?} {error:#?}"),
    ] {
        let list = |bytes: &[u8]| format!("{}, {}", bytes[0], bytes[1]);
        for secret in [[0x41; 32], *data.as_bytes()] {
            assert!(!text.contains(&hex::encode(&secret[..4])) && !text.contains(&list(&secret)), "{text}");
        }
        assert!(text.contains(key.key_id()), "{text}");
    }
}

/// A volume that is encrypted and whose snapshot is not, or is under another key.
#[test]
fn a_volume_may_have_another_key_than_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut bytes = telling(5);
    let keys = [store.new_key(None).unwrap(), store.new_key(None).unwrap()];
    let (plain, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let (other, _) = import(&store, &bytes, &keys[0]);
    for (number, base) in [plain, other].iter().enumerate() {
        let path = dir.path().join(format!("volume-{number}"));
        let volume = VolumeOptions::new().encrypt(&keys[1]).create(&path, Some(base), base.size()).unwrap();
        volume.disk().write_at(&[number as u8 + 1; 512], 70_000).unwrap();
        bytes[70_000..70_512].fill(number as u8 + 1);
        compare(&volume.disk(), &bytes, "a volume with a key of its own");
        let (snapshot, _) = volume.snapshot(&store).unwrap();
        assert_eq!(snapshot.key_id(), Some(keys[1].key_id()));
        compare(&snapshot.disk(), &bytes, "its snapshot");
        snapshot.verify().unwrap();
        // It is the snapshot that an import would have made, and so is all of it under its key.
        let (again, stored) = import(&store, &bytes, &keys[1]);
        assert_eq!((again.digest(), stored), (snapshot.digest(), 0));
        let alone = dir.path().join(format!("alone-{number}"));
        let copy = Store::open_with(&alone, &options()).unwrap();
        let (there, _) = volume.snapshot(&copy).unwrap();
        assert_eq!(there.digest(), snapshot.digest());
        drop((volume, there, copy));
        assert!(!tells(&alone, &bytes));
        // A clone of that snapshot stores what differs, and no more.
        let path = dir.path().join(format!("clone-{number}"));
        let clone = Volume::create(&path, Some(&snapshot), snapshot.size()).unwrap();
        clone.disk().write_at(&[number as u8 + 9; 4096], 0).unwrap();
        assert_eq!(clone.snapshot(&store).unwrap().1.stored_bytes, 4096 + LEAF);
    }
}

/// Damage in what is encrypted is found, and a sweep carries neither damage nor what it has no key for in vain.
#[test]
fn tampering_is_found_and_sweeps_need_no_key() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = telling(9);
    let digest = {
        let store = open(dir.path());
        let key = store.new_key(None).unwrap();
        store.import(&memory(&image(40, 0, 77)), &mut |_| ()).unwrap();
        import(&store, &bytes, &key).0.digest()
    };
    let damaged = dir.path().join("damaged");
    copy_dir(&dir.path().join("store"), &damaged.join("store"));
    {
        let store = Store::open(dir.path().join("store")).unwrap();
        let gone = store.sweep().remove_unreferenced(&HashSet::from([digest])).unwrap();
        assert_eq!((gone.snapshots, gone.packs), (1, 1));
    }
    let store = open(dir.path());
    let snapshot = store.snapshot(&digest).unwrap();
    snapshot.verify().unwrap();
    compare(&snapshot.disk(), &bytes, "what was carried without its key");

    let pack = damaged.join("store/packs/00000000.pack");
    let mut found = std::fs::read(&pack).unwrap();
    let last = found.len() - LEAF as usize - 4096 - 1;
    found[last] ^= 1;
    std::fs::write(&pack, found).unwrap();
    let store = open(&damaged);
    let snapshot = store.snapshot(&digest).unwrap();
    assert_eq!(snapshot.verify().unwrap_err().kind(), ErrorKind::Corrupt);
    let gone = store.sweep().remove_unreferenced(&HashSet::new()).unwrap();
    assert_eq!(gone.packs, 0, "a damaged pack is kept");
}

/// Encrypted volumes agree with memory, written in pieces of any size, and opened anew now and then.
#[test]
fn random_histories_of_encrypted_volumes_agree_with_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(11);
    let mut oracle = telling(5);
    let mut volume = {
        let store = open(dir.path());
        let key = store.new_key(None).unwrap();
        let (snapshot, _) = import(&store, &oracle, &key);
        Volume::create(&dir.path().join("volume"), Some(&snapshot), oracle.len() as u64).unwrap()
    };
    for round in 0..12 {
        for _ in 0..60 {
            random_operation(&volume.disk(), &mut oracle, &mut random);
        }
        compare(&volume.disk(), &oracle, "an encrypted volume");
        volume.disk().flush().unwrap();
        drop(volume);
        let store = open(dir.path());
        volume = Volume::open(&dir.path().join("volume"), &store).unwrap();
        compare(&volume.disk(), &oracle, "an encrypted volume that was opened");
        if round % 3 == 0 {
            let (snapshot, _) = volume.snapshot(&store).unwrap();
            compare(&snapshot.disk(), &oracle, "its snapshot");
        }
    }
}

/// Who writes parts of one block at once loses none of them, and who reads meanwhile finds each as it was or as it is.
#[test]
fn parts_of_one_block_are_written_one_at_a_time() {
    const THREADS: usize = 4;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let key = store.new_key(None).unwrap();
    let path = dir.path().join("volume");
    let volume = VolumeOptions::new().encrypt(&key).create(&path, None, 1 << 20).unwrap();
    let stop = AtomicBool::new(false);
    // Each thread has 8 bytes in every sector of some blocks, all the same at any time.
    let round = |thread: usize, round: u64| {
        let mut bytes = [0; 8];
        for sector in 0..24 {
            let at = 40_960 + sector * 512 + thread as u64 * 8;
            let before = volume.disk().read_at(&mut bytes, at).map(|()| u64::from_le_bytes(bytes)).unwrap();
            assert_eq!(before, round - 1, "thread {thread}, sector {sector}");
            volume.disk().write_at(&round.to_le_bytes(), at).unwrap();
        }
    };
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut block, mut last) = ([0; 4096], [0; THREADS]);
            while !stop.load(Ordering::Relaxed) {
                volume.disk().read_at(&mut block, 40_960).unwrap();
                for (thread, last) in last.iter_mut().enumerate() {
                    let found = u64::from_le_bytes(block[thread * 8..][..8].try_into().unwrap());
                    assert!((*last..=*last + 2000).contains(&found), "{found} after {last}");
                    *last = found;
                }
            }
        });
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || (1..=60).for_each(|at| round(thread, at))))
            .collect();
        let done: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
        done.into_iter().for_each(|done| done.unwrap());
    });
}
