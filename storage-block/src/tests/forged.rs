//! Who can write to a store's files does not read what is encrypted by having it read by others.

use std::sync::Arc;

use super::memory;
use crate::codec::NO_KEY;
use crate::format::{self, Run, State};
use crate::keys::LocalKey;
use crate::log::Log;
use crate::{Compression, Digest, ErrorKind, Snapshot, Store, StoreOptions, Volume, VolumeOptions};

/// A snapshot without a key that names the chunks of another.
fn without_key(dir: &std::path::Path, store: &Store, of: &Snapshot) -> Snapshot {
    let root = format::encode_root(of.size(), &of.root.leaves, None);
    let digest = Digest::of(&root);
    std::fs::write(dir.join("snapshots").join(digest.to_hex()), root).unwrap();
    store.snapshot(&digest).unwrap()
}

/// A chunk that was decompressed lately is in memory, decrypted, and is there for who has its key alone.
#[test]
fn what_is_in_memory_needs_its_key_too() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions::new()
        .keys(Arc::new(LocalKey::from_bytes([1; 32])))
        .compression(Compression::WherePays { percent: 10 });
    let store = Store::open_with(dir.path(), &options).unwrap();
    let bytes: Vec<u8> = (0..2u32 << 16).map(|at| (at / 300) as u8 | 1).collect();
    let key = store.new_key(None).unwrap();
    let (snapshot, _) = store.import_encrypted(&memory(&bytes), &key, &mut |_| ()).unwrap();
    let mut buf = [0; 512];
    for _ in 0..2 {
        snapshot.disk().read_at(&mut buf, 4096).unwrap();
        assert!(buf == bytes[4096..][..512]);
    }
    let id = snapshot.chunk_id(0).unwrap();
    let found = store.0.find_open(format::Kind::Chunk, &id).unwrap();
    assert!(found.slot.encoding.compressed() && found.slot.encoding.encrypted(), "{:?}", found.slot);
    let object = found.object(&id);
    object.read(Some(&key), &store.0.cache, 4096, &mut buf).unwrap();
    let other = store.new_key(None).unwrap();
    buf.fill(0);
    let refused = object.read(None, &store.0.cache, 4096, &mut buf).unwrap_err();
    assert!(refused.to_string().contains(NO_KEY), "{refused}");
    // Another key makes noise of it, or nothing.
    let _ = object.read(Some(&other), &store.0.cache, 4096, &mut buf);
    assert!(buf != bytes[4096..][..512], "it is read with another key");

    let forged = without_key(dir.path(), &store, &snapshot);
    assert!(!forged.encrypted());
    for len in [512, 1 << 16] {
        let mut buf = vec![0; len];
        let refused = forged.disk().read_at(&mut buf, 0).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
        assert!(refused.to_string().contains(NO_KEY), "{refused}");
        assert!(buf.iter().all(|byte| *byte == 0));
    }
}

/// A volume of an encrypted snapshot whose log somebody has replaced by one without a key, which nothing would be encrypted
/// by any more.
#[test]
fn a_volume_stays_encrypted_whatever_its_log_says() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions::new().keys(Arc::new(LocalKey::from_bytes([1; 32])));
    let store = Store::open_with(dir.path().join("store"), &options).unwrap();
    let key = store.new_key(None).unwrap();
    let (base, _) = store.import_encrypted(&memory(&[7; 1 << 16]), &key, &mut |_| ()).unwrap();
    let path = dir.path().join("volume");
    // A log whose name says all, as a new volume's does, and one that has a header.
    for flushed in [false, true] {
        drop(Volume::create(&path, Some(&base), base.size()).unwrap());
        std::fs::remove_file(path.join("log")).unwrap();
        let mut log = Log::create(&path, base.size(), Some(base.digest()), None).unwrap();
        if flushed {
            let run = Run { first: 0, count: 1, state: State::Overlay };
            assert!(log.append(&[run]).is_ok());
        }
        drop(log);
        let error = Volume::open(&path, &store).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("its log has no key"), "{error}");
        Volume::remove(&path).unwrap();
    }
    // A volume that is encrypted under a key of its own may begin as anything, and the other way round there is none.
    let (plain, _) = store.import(&memory(&[8; 1 << 16]), &mut |_| ()).unwrap();
    drop(VolumeOptions::new().encrypt(&key).create(&path, Some(&plain), plain.size()).unwrap());
    assert!(Volume::open(&path, &store).unwrap().encrypted());
}
