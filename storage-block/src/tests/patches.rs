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
            store.sweep().remove_unreferenced(&HashSet::from([digest])).unwrap();
            let snapshot = store.snapshot(&digest).unwrap();
            compare(&snapshot.disk(), &bytes, "patches after a sweep");
            snapshot.verify().unwrap();
            assert!(store.snapshot(&old).is_err(), "round {round}");
        }
        drop(store);
        let store = Store::open_with(dir.path().join("store"), &options).unwrap();
        store.snapshot(&digest).unwrap().verify().unwrap();
        store.sweep().remove_unreferenced(&HashSet::new()).unwrap();
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

/// Two sessions that store the same chunk, one as a patch and one as a whole, from which others then differ.
#[test]
fn a_base_stays_whole_when_it_is_stored_as_a_patch_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::open(&path).unwrap();
    let first = image(1, 0, 1);
    let mut base = first.clone();
    base[..4096].fill(7);
    let mut last = base.clone();
    let (first, _) = store.import(&memory(&first), &mut |_| ()).unwrap();
    let long = Volume::create(&dir.path().join("long"), Some(&first), 16 << 20).unwrap();
    long.disk().write_at(&base[..4096], 0).unwrap();
    long.disk().write_at(&image(128, 0, 2), 1 << 20).unwrap();
    let mut made = None;
    let (patched, _) = long
        .snapshot_with(&store, &mut |progress| {
            // The chunk is a patch of this session's by now, and nobody knows of it yet.
            if progress.done >= 2 << 20 && made.is_none() {
                let (whole, _) = store.import(&memory(&base), &mut |_| ()).unwrap();
                made = Some(change(&store, &dir.path().join("volume"), &whole, &mut last, &[1], 9).0);
            }
        })
        .unwrap();
    let made = made.unwrap();
    let check = |store: &Store, what| {
        let snapshot = store.snapshot(&made.digest()).unwrap();
        compare(&snapshot.disk(), &last, what);
        snapshot.verify().unwrap();
    };
    let digest = made.digest();
    check(&store, "what differs from a base that came as a patch again");
    patched.verify().unwrap();
    let copy = dir.path().join("copy");
    super::copy_dir(&path, &copy);
    check(&Store::open(&copy).unwrap(), "the same in a store that was opened");
    drop((patched, long, first));
    store.sweep().remove_unreferenced(&HashSet::from([digest])).unwrap();
    check(&store, "the same after a sweep");
    super::copy_dir(&path, &dir.path().join("swept"));
    check(
        &Store::open(dir.path().join("swept")).unwrap(),
        "the same in a store that was opened after a sweep",
    );
}

/// Two sessions that store the same chunk as different patches, of which one loses what it differs from.
#[test]
fn of_two_patches_the_one_whose_base_is_there_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    // So small that no two snapshots share one.
    let open = |path: &Path| Store::with_pack_slots(path.to_owned(), 2).unwrap();
    let store = open(&path);
    let (mut one, mut other) = (image(1, 0, 1), image(1, 0, 1));
    one[..4096].fill(1);
    other[4096..8192].fill(2);
    let mut both = one.clone();
    both[4096..8192].fill(2);
    let (one, _) = store.import(&memory(&one), &mut |_| ()).unwrap();
    let (other, _) = store.import(&memory(&other), &mut |_| ()).unwrap();
    let long = Volume::create(&dir.path().join("long"), Some(&other), 16 << 20).unwrap();
    long.disk().write_at(&both[..4096], 0).unwrap();
    long.disk().write_at(&image(128, 0, 2), 1 << 20).unwrap();
    let mut made = None;
    let mut bytes = both.clone();
    let (long_snapshot, _) = long
        .snapshot_with(&store, &mut |progress| {
            if progress.done >= 2 << 20 && made.is_none() {
                made = Some(change(&store, &dir.path().join("volume"), &one, &mut bytes, &[1], 2).0.digest());
            }
        })
        .unwrap();
    let (made, long_digest) = (made.unwrap(), long_snapshot.digest());
    let others = [one.digest(), other.digest()];
    drop((one, other, long_snapshot));
    long.delete().unwrap();
    drop(store);
    // Whichever of the two it is, one of the bases is not needed.
    for (round, dropped) in others.iter().enumerate() {
        let copy = dir.path().join(format!("copy-{round}"));
        super::copy_dir(&path, &copy);
        let store = open(&copy);
        let kept = others.iter().filter(|digest| *digest != dropped);
        store.sweep().remove_unreferenced(&kept.copied().chain([made, long_digest]).collect()).unwrap();
        drop(store);
        let store = open(&copy);
        for digest in [made, long_digest] {
            store.snapshot(&digest).unwrap().verify().unwrap();
        }
        compare(&store.snapshot(&made).unwrap().disk(), &both, "a chunk with two patches");
    }
}

/// What is stored as a difference is nothing without what it differs from, which a sweep may have dropped where nobody
/// needs either: it is stored again when it comes again.
#[test]
fn a_difference_from_what_is_gone_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::with_pack_slots(dir.path().join("store"), 2).unwrap();
    let mut bytes = image(1, 0, 1);
    // The first pack has a chunk and a leaf; the second what differs, its leaf, and another image's chunk.
    let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let (patched, stored) = change(&store, &dir.path().join("volume"), &base, &mut bytes, &[3], 9);
    assert_eq!(stored, 4096 + LEAF);
    let other = store.import(&memory(&image(1, 0, 2)), &mut |_| ()).unwrap().0.digest();
    drop((base, patched));
    let swept = store.sweep().remove_unreferenced(&HashSet::from([other])).unwrap();
    assert_eq!((swept.snapshots, swept.packs), (2, 1), "what differs is still in its pack");
    let (again, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    compare(&again.disk(), &bytes, "what came again");
    again.verify().unwrap();
    assert!(stats.stored_bytes >= 65536, "{stats:?}");
}
