//! Chunks that are stored as what differs from others.

use std::collections::HashSet;
use std::path::Path;

use super::{image, memory};
use crate::testing::{Random, compare};
use crate::{Compression, Snapshot, Store, StoreOptions, Volume};

const LEAF: u64 = 32 << 10;

/// A clone with blocks written to, and its snapshot: its bytes, and what was stored.
fn change(
    store: &Store,
    dir: &Path,
    base: &Snapshot,
    bytes: &mut [u8],
    blocks: &[usize],
    byte: u8,
) -> (Snapshot, u64) {
    let volume = Volume::create(dir, Some(base), base.size()).unwrap();
    for block in blocks {
        volume.disk().write_at(&[byte; 4096], *block as u64 * 4096).unwrap();
        bytes[block * 4096..][..4096].fill(byte);
    }
    let (snapshot, stats) = volume.snapshot(store).unwrap();
    compare(&snapshot.disk(), bytes, "a snapshot of patches");
    snapshot.verify().unwrap();
    volume.delete().unwrap();
    (snapshot, stats.stored_bytes)
}

#[test]
fn small_changes_are_stored_small() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut bytes = image(8, 0, 1);
    let (mut snapshot, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let first: Vec<usize> = (16..24).collect();
    // Blocks, the blocks of chunks that have to be stored then: one, one more of the same chunk, too many, in another
    // chunk from its beginning and to its end, and a hole.
    for (round, (blocks, stored)) in [
        (&[3][..], 1),
        (&[4], 2),
        (&[5, 6, 7, 8, 9, 10, 11], 16),
        (&[0], 1),
        (&first, 8),
        (&[47, 32, 40, 41], 4),
        (&[48, 63], 2),
        (&[49], 3),
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("volume-{round}"));
        let (next, found) = change(&store, &path, &snapshot, &mut bytes, blocks, round as u8 + 1);
        assert_eq!(found, stored * 4096 + LEAF, "round {round}");
        snapshot = next;
    }
    // The same bytes have the same name when they come in whole.
    let other = Store::open(dir.path().join("other")).unwrap();
    let (whole, _) = other.import(&memory(&bytes), &mut |_| ()).unwrap();
    assert_eq!(whole.digest(), snapshot.digest());
    // And after everything was opened anew.
    let digest = snapshot.digest();
    drop((snapshot, store));
    let store = Store::open(dir.path().join("store")).unwrap();
    compare(&store.snapshot(&digest).unwrap().disk(), &bytes, "patches of a store that was opened");
}

/// What others differ from is not dropped before they are, by whichever pack it is in.
#[test]
fn bases_live_as_long_as_what_differs_from_them() {
    let dir = tempfile::tempdir().unwrap();
    for options in
        [StoreOptions::new(), StoreOptions::new().compression(Compression::WherePays { percent: 5 })]
    {
        let _ = std::fs::remove_dir_all(dir.path().join("store"));
        let options = StoreOptions { pack_units: 5 * 16, ..options };
        let store = Store::open_with(dir.path().join("store"), &options).unwrap();
        let mut bytes = image(20, 0, 1);
        // Every other chunk can be compressed, so that there are compressed bases, too.
        for chunk in bytes.chunks_mut(1 << 17) {
            chunk[100..60_000].fill(9);
        }
        let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        let blocks: Vec<usize> = (0..bytes.len() / 4096).step_by(13).collect();
        let path = dir.path().join("volume");
        let (snapshot, _) = change(&store, &path, &base, &mut bytes, &blocks, 7);
        let (old, digest) = (base.digest(), snapshot.digest());
        drop((base, snapshot));
        for round in 0..2 {
            store.remove_unreferenced(&HashSet::from([digest])).unwrap();
            let snapshot = store.snapshot(&digest).unwrap();
            compare(&snapshot.disk(), &bytes, "patches after a sweep");
            snapshot.verify().unwrap();
            assert!(store.snapshot(&old).is_err(), "round {round}");
        }
        drop(store);
        let store = Store::open_with(dir.path().join("store"), &options).unwrap();
        store.snapshot(&digest).unwrap().verify().unwrap();
        store.remove_unreferenced(&HashSet::new()).unwrap();
        assert!(super::contents(&dir.path().join("store/packs")).is_empty());
    }
}

/// Where the record of what others differ from is damaged, these are lost too, and come again.
#[test]
fn what_has_lost_its_base_is_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = image(2, 0, 1);
    let digest = {
        let store = Store::open(dir.path().join("store")).unwrap();
        let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        change(&store, &dir.path().join("volume"), &base, &mut bytes, &[3], 7).0.digest()
    };
    let index = dir.path().join("store/packs/00000000.index");
    let mut records = std::fs::read(&index).unwrap();
    records[64] ^= 1;
    std::fs::write(&index, records).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let error = store.snapshot(&digest).unwrap().verify().unwrap_err();
    assert!(error.to_string().starts_with("no pack holds the chunk"), "{error}");
    let (again, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    assert_eq!(again.digest(), digest);
    again.verify().unwrap();
}

/// Reads of any range of a chunk that is in pieces.
#[test]
fn any_part_of_a_patch_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut bytes = image(3, 0, 1);
    let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let blocks = [0, 2, 3, 7, 15, 17, 30];
    let (snapshot, _) = change(&store, &dir.path().join("volume"), &base, &mut bytes, &blocks, 7);
    let mut random = Random(5);
    for _ in 0..2000 {
        let at = random.below(bytes.len() as u64 / 512) as usize * 512;
        let len = (random.below(40) as usize + 1) * 512;
        let len = len.min(bytes.len() - at);
        let mut found = vec![0; len];
        snapshot.disk().read_at(&mut found, at as u64).unwrap();
        assert!(found == bytes[at..at + len], "{len} bytes at {at}");
    }
}
