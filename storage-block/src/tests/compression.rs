//! Chunks that are stored compressed.

use std::collections::HashSet;

use super::{image, memory};
use crate::testing::compare;
use crate::{Compression, Store, StoreOptions};

const CHUNK: usize = 64 << 10;
const LEAF: u64 = 32 << 10;

fn options(percent: u8) -> StoreOptions {
    StoreOptions::new().compression(Compression::WherePays { percent })
}

/// Chunks of so many random blocks of 4 KiB each, repeated until the chunk is full.
fn repetitive(random_blocks: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, blocks) in random_blocks.iter().enumerate() {
        let random = image(1, 0, number as u64 + 1);
        bytes.extend(random[..blocks * 4096].iter().copied().cycle().take(CHUNK));
    }
    bytes
}

#[test]
fn a_chunk_is_compressed_where_that_saves_enough() {
    let dir = tempfile::tempdir().unwrap();
    // LZ4 reaches 64 KiB back, so that a chunk takes its random blocks and one more.
    let bytes = repetitive(&[1, 7, 12, 16]);
    let whole = 4 * CHUNK as u64 + LEAF;
    let digest = {
        let plain = Store::open(dir.path().join("plain")).unwrap();
        let (snapshot, stats) = plain.import(&memory(&bytes), &mut |_| ()).unwrap();
        assert_eq!(stats.stored_bytes, whole);
        snapshot.digest()
    };
    for (percent, chunks) in
        [(0, 2 + 8 + 13 + 16), (18, 2 + 8 + 13 + 16), (50, 2 + 8 + 16 + 16), (80, 2 + 16 * 3), (100, 64)]
    {
        let path = dir.path().join(percent.to_string());
        let store = Store::open_with(&path, &options(percent)).unwrap();
        let (snapshot, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        assert_eq!(snapshot.digest(), digest, "a name is one of the bytes, however they are stored");
        // The leaf has four ids and takes one unit, unless not even that is wanted.
        let leaf = if percent < 88 { 4096 } else { LEAF };
        assert_eq!(stats.stored_bytes, chunks * 4096 + leaf, "{percent} %");
        compare(&snapshot.disk(), &bytes, "what is compressed");
        compare(&snapshot.disk(), &bytes, "what is compressed, again");
        snapshot.verify().unwrap();
        drop((snapshot, store));
        // Whoever does not want compression reads it all the same.
        let store = Store::open(&path).unwrap();
        compare(&store.snapshot(&digest).unwrap().disk(), &bytes, "what was compressed");
    }
}

#[test]
fn a_sweep_carries_what_is_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = repetitive(&[1, 3, 5, 16, 2]);
    let (kept, before) = {
        let store = Store::open_with(dir.path(), &options(20)).unwrap();
        let (kept, stats) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        store.import(&memory(&image(32, 0, 99)), &mut |_| ()).unwrap();
        (kept.digest(), stats.stored_bytes)
    };
    let store = Store::open(dir.path()).unwrap();
    let gone = store.sweep().remove_unreferenced(&HashSet::from([kept])).unwrap();
    assert_eq!((gone.snapshots, gone.packs), (1, 1));
    let packs = dir.path().join("packs");
    let len: u64 = super::contents(&packs).iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert!(len <= before + 3 * 4096, "{len} bytes, of which {before} are objects");
    let snapshot = store.snapshot(&kept).unwrap();
    compare(&snapshot.disk(), &bytes, "what was carried");
    snapshot.verify().unwrap();
}
