//! Lists of blocks against what the bytes themselves say.

use std::os::unix::fs::FileExt as _;

use super::memory;
use crate::format::{CHUNK, LEAF_SPAN};
use crate::testing::Random;
use crate::{ErrorKind, Result, Snapshot, Store, Volume};

/// The blocks that two lists of bytes differ in, and whether either has anything there.
fn plain(before: &[u8], after: &[u8], block: usize) -> Vec<(u64, bool, bool)> {
    let blocks = before.len().max(after.len()).div_ceil(block);
    let part = |bytes: &[u8], at: usize| {
        let mut part = bytes.get(at * block..bytes.len().min((at + 1) * block)).unwrap_or(&[]).to_vec();
        part.resize(block, 0);
        part
    };
    let any = |bytes: &[u8]| bytes.iter().any(|byte| *byte != 0);
    let both = (0..blocks).map(|at| (at as u64, part(before, at), part(after, at)));
    both.filter(|(_, a, b)| a != b).map(|(at, a, b)| (at, any(&a), any(&b))).collect()
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
    let sizes =
        [LEAF_SPAN as usize * 2, (3 << 16) + 512, LEAF_SPAN as usize * 2, LEAF_SPAN as usize + (5 << 16), 0];
    let mut disks: Vec<Vec<u8>> = Vec::new();
    for (number, size) in sizes.into_iter().enumerate() {
        let mut bytes = if number == 2 { disks[0].clone() } else { vec![0; size] };
        for _ in 0..size.min(8) {
            let at = random.below(size as u64) as usize;
            bytes[at] ^= random.below(255) as u8 + 1;
        }
        if size > 0 {
            bytes[size - 1] = 9;
        }
        disks.push(bytes);
    }
    let snapshots: Vec<Snapshot> = (disks.iter().zip(stores.iter().cycle()))
        .map(|(bytes, store)| store.import(&memory(bytes), &mut |_| ()).unwrap().0)
        .collect();
    // One chunk, as EBS has it, three that no leaf is a multiple of, a leaf, and more than one.
    for chunks in [1, 8, 3, 1024, 1500] {
        let block = chunks * CHUNK;
        for (a, first) in disks.iter().zip(&snapshots) {
            let blocks: Vec<u64> = first.blocks(block).unwrap().collect::<Result<_>>().unwrap();
            let held: Vec<u64> = plain(&[], a, block as usize).iter().map(|(at, ..)| *at).collect();
            assert_eq!(blocks, held, "blocks of {chunks} chunks");
            for (b, second) in disks.iter().zip(&snapshots) {
                let expected = plain(a, b, block as usize);
                assert_eq!(changed(first, second, block), expected, "{} and {}, {chunks}", a.len(), b.len());
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
    // The chunk, which is the same three times, and then the leaves: of the beginning, the middle and the end.
    let pack =
        std::fs::File::options().write(true).open(dir.path().join("store/packs/00000000.pack")).unwrap();
    pack.write_all_at(b"damage", 4096 + CHUNK).unwrap();
    assert_eq!(changed(&first, &second, 512 << 10), [((1 << 39) / (512 << 10), true, true)]);
    let mut blocks = second.blocks(512 << 10).unwrap();
    let error = blocks.next().unwrap().unwrap_err();
    assert_eq!((error.kind(), blocks.next().is_none()), (ErrorKind::Corrupt, true));
}
