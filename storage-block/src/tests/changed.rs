//! Lists of blocks against what the bytes themselves say.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use crate::format::{CHUNK, LEAF_SPAN};
use crate::keys::LocalKey;
use crate::testing::Random;
use crate::{ErrorKind, MemoryDisk, Result, Snapshot, Store, StoreOptions, Volume, VolumeOptions};

/// What a disk holds where it is not zero: a byte here and there.
type Bytes = BTreeMap<u64, u8>;

/// The blocks that two disks differ in, and whether either has anything there.
fn plain(before: &Bytes, after: &Bytes, block: u64) -> Vec<(u64, bool, bool)> {
    let differ = |at: &&u64| before.get(at) != after.get(at);
    let blocks: BTreeSet<u64> =
        before.keys().chain(after.keys()).filter(differ).map(|at| at / block).collect();
    let any = |bytes: &Bytes, at: u64| bytes.range(at * block..(at + 1) * block).next().is_some();
    blocks.into_iter().map(|at| (at, any(before, at), any(after, at))).collect()
}

fn changed(before: &Snapshot, after: &Snapshot, block: u64) -> Vec<(u64, bool, bool)> {
    let blocks = after.changed_blocks(before, block).unwrap();
    blocks.map(|block| block.map(|block| (block.index, block.before, block.after)).unwrap()).collect()
}

#[test]
fn lists_agree_with_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let stores = ["a", "b"].map(|name| Store::open(dir.path().join(name)).unwrap());
    let mut random = Random(7);
    // Some end within a leaf, one within a chunk, and the third is the first with a few changes.
    let sizes = [LEAF_SPAN * 2, (3 << 16) + 512, LEAF_SPAN * 2, LEAF_SPAN + (5 << 16), 0];
    let mut disks: Vec<Bytes> = Vec::new();
    let mut snapshots: Vec<Snapshot> = Vec::new();
    for (number, size) in sizes.into_iter().enumerate() {
        let mut bytes = if number == 2 { disks[0].clone() } else { Bytes::new() };
        let places = (0..size.min(8)).map(|_| random.below(size)).collect::<Vec<_>>();
        for at in places.into_iter().chain(size.checked_sub(1)) {
            bytes.insert(at, random.below(255) as u8 + 1);
        }
        let disk = MemoryDisk::new(size).unwrap().into_disk();
        bytes.iter().for_each(|(at, byte)| disk.write_at(&[*byte], *at).unwrap());
        snapshots.push(stores[number % 2].import(&disk, &mut |_| ()).unwrap().0);
        disks.push(bytes);
    }
    // One chunk, as EBS has it, three that no leaf is a multiple of, a leaf, and more than one.
    for chunks in [1, 8, 3, 1024, 1500] {
        let block = chunks * CHUNK;
        for (a, first) in disks.iter().zip(&snapshots) {
            let blocks: Vec<u64> = first.blocks(block).unwrap().collect::<Result<_>>().unwrap();
            let held: Vec<u64> = plain(&Bytes::new(), a, block).iter().map(|(at, ..)| *at).collect();
            assert_eq!(blocks, held, "blocks of {chunks} chunks");
            for (b, second) in disks.iter().zip(&snapshots) {
                let expected = plain(a, b, block);
                let sizes = (first.size(), second.size());
                assert_eq!(changed(first, second, block), expected, "{sizes:?}, {chunks} chunks");
                let Some((middle, ..)) = expected.get(expected.len() / 2) else { continue };
                let rest = second.changed_blocks(first, block).unwrap().starting_at(*middle);
                assert_eq!(rest.count(), expected.len() - expected.len() / 2);
            }
        }
    }
    let first = &snapshots[0];
    for block in [0, 4096, CHUNK + 4096, u64::MAX] {
        let kind = first.blocks(block).map(drop).map_err(|error| error.kind());
        assert_eq!(kind, Err(ErrorKind::InvalidSize), "{block}");
    }
    assert_eq!(first.blocks(u64::MAX / CHUNK * CHUNK).unwrap().count(), 1);
    assert_eq!(first.blocks(CHUNK).unwrap().starting_at(u64::MAX).count(), 0);
}

/// Leaves that both have are not even read: here one of them cannot be.
#[test]
fn what_is_shared_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let path = dir.path().join("volume");
    let volume = Volume::create(&path, None, 1 << 40).unwrap();
    for at in [CHUNK, 1 << 39, (1 << 40) - 4096] {
        volume.disk().write_at(&[1; 4096], at).unwrap();
    }
    let (first, _) = volume.snapshot(&store).unwrap();
    volume.disk().write_at(&[2; 4096], 1 << 39).unwrap();
    let (second, _) = volume.snapshot(&store).unwrap();
    // A block of the first chunk, and then the leaf of the beginning.
    let pack =
        std::fs::File::options().write(true).open(dir.path().join("store/packs/00000000.pack")).unwrap();
    pack.write_all_at(b"damage", 4096 + 4096).unwrap();
    assert_eq!(changed(&first, &second, 512 << 10), [((1 << 39) / (512 << 10), true, true)]);
    let mut blocks = second.blocks(512 << 10).unwrap();
    let error = blocks.next().unwrap().unwrap_err();
    assert_eq!((error.kind(), blocks.next().is_none()), (ErrorKind::Corrupt, true));
}

/// Equal chunks have other names under another key: they are compared, and what differs is all that is listed.
#[test]
fn other_keys_are_no_change() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions::new().keys(Arc::new(LocalKey::from_bytes([1; 32])));
    let store = Store::open_with(dir.path().join("store"), &options).unwrap();
    let bytes = super::image(20, 512, 1);
    let (plain, _) = store.import(&super::memory(&bytes), &mut |_| ()).unwrap();
    let keys = [store.new_key(None).unwrap(), store.new_key(None).unwrap()];
    let (other, _) = store.import_encrypted(&super::memory(&bytes), &keys[0], &mut |_| ()).unwrap();
    let (same, _) = store.import_encrypted(&super::memory(&bytes), &keys[0], &mut |_| ()).unwrap();
    assert_eq!(changed(&plain, &other, CHUNK), []);
    assert_eq!(changed(&other, &same, CHUNK), []);
    for (number, base) in [&plain, &other].into_iter().enumerate() {
        let path = dir.path().join(number.to_string());
        let volume = VolumeOptions::new().encrypt(&keys[1]).create(&path, Some(base), 2 << 20).unwrap();
        let (untouched, _) = volume.snapshot(&store).unwrap();
        for (before, after) in [(base, &untouched), (&untouched, base)] {
            assert_eq!(changed(before, after, CHUNK), [], "nothing was written");
        }
        // A byte of a chunk, one in a hole, and all of a chunk.
        volume.disk().write_at(&[bytes[70_000] ^ 1], 70_000).unwrap();
        volume.disk().write_at(&[1], 3 * CHUNK + 9).unwrap();
        volume.disk().discard(5 * CHUNK, CHUNK).unwrap();
        let (written, _) = volume.snapshot(&store).unwrap();
        let expected = [(1, true, true), (3, false, true), (5, true, false)];
        assert_eq!(changed(base, &written, CHUNK), expected);
        assert_eq!(changed(&untouched, &written, CHUNK), expected);
    }
}
