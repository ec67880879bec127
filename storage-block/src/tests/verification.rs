//! Chunks are compared with their names when they are first read, and not again.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{image, memory};
use crate::testing::compare;
use crate::{Compression, Disk, ErrorKind, Store, StoreOptions, Volume};

const CHUNK: u64 = 64 << 10;

/// Changes a byte of a file in place.
fn flip(path: &Path, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn kind(disk: &Disk, at: u64, len: usize) -> Result<(), ErrorKind> {
    disk.read_at(&mut vec![0; len], at).map_err(|error| error.kind())
}

#[test]
fn damage_is_found_by_the_first_read_of_any_part() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(3, 0, 1);
    let digest = {
        let store = Store::open(dir.path()).unwrap();
        store.import(&memory(&bytes), &mut |_| ()).unwrap().0.digest()
    };
    let pack = dir.path().join("packs/00000000.pack");
    // In the second chunk, far from what is read.
    flip(&pack, 4096 + CHUNK + 60_000);
    for (at, len) in [(CHUNK, 4096), (CHUNK + 512, 512), (0, 3 * CHUNK as usize)] {
        let store = Store::open(dir.path()).unwrap();
        let disk = store.snapshot(&digest).unwrap().disk();
        for _ in 0..2 {
            let error = disk.read_at(&mut vec![0; len], at).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let text = error.to_string();
            assert!(text.contains("00000000.pack: slot 16 does not hold the chunk"), "{text}");
            // Its neighbours can be read.
            for other in [0, 2] {
                let mut found = vec![0; CHUNK as usize];
                disk.read_at(&mut found, other * CHUNK).unwrap();
                assert!(found == bytes[(other * CHUNK) as usize..][..CHUNK as usize]);
            }
        }
    }
    // Who does not want to know is not told.
    let store = Store::open_with(dir.path(), &StoreOptions::new().verify(false)).unwrap();
    let snapshot = store.snapshot(&digest).unwrap();
    assert_eq!(kind(&snapshot.disk(), CHUNK, 4096), Ok(()));
    assert_eq!(snapshot.verify().unwrap_err().kind(), ErrorKind::Corrupt);
}

/// A chunk that was read is read from the file alone from then on, through whichever snapshot: damage that comes later is
/// not seen.
#[test]
fn a_chunk_is_verified_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let bytes = image(3, 0, 1);
    let (snapshot, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.path().join("volume"), Some(&snapshot), 1 << 20).unwrap();
    volume.disk().write_at(&[1; 4096], 2 * CHUNK).unwrap();
    let (second, _) = volume.snapshot(&store).unwrap();
    assert_eq!(kind(&snapshot.disk(), 4096, 512), Ok(()));
    let pack = dir.path().join("store/packs/00000000.pack");
    flip(&pack, 4096 + 60_000);
    flip(&pack, 4096 + CHUNK + 60_000);
    for disk in [snapshot.disk(), second.disk(), volume.disk()] {
        assert_eq!(kind(&disk, 0, 65536), Ok(()));
        assert_eq!(kind(&disk, CHUNK, 512), Err(ErrorKind::Corrupt));
        assert_eq!(kind(&disk, 2 * CHUNK, 512), Ok(()));
    }
}

/// The same for what is in pieces, or compressed: the message names where the damage is.
#[test]
fn damage_behind_an_encoding_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store_dir = dir.path().join("store");
    let mut bytes = image(2, 0, 1);
    bytes[64 << 10..].fill(5);
    let digest = {
        let options = StoreOptions::new().compression(Compression::WherePays { percent: 10 });
        let store = Store::open_with(&store_dir, &options).unwrap();
        let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
        let volume = Volume::create(&dir.path().join("volume"), Some(&base), base.size()).unwrap();
        volume.disk().write_at(&image(1, 0, 7)[..4096], 8192).unwrap();
        bytes[8192..12288].copy_from_slice(&image(1, 0, 7)[..4096]);
        let (snapshot, _) = volume.snapshot(&store).unwrap();
        compare(&snapshot.disk(), &bytes, "a snapshot");
        snapshot.digest()
    };
    // The first chunk, the second, which is compressed, and what differs from the first: where it is damaged, what is
    // read, and the slot that has to be named.
    let pack = store_dir.join("packs/00000000.pack");
    for (unit, at, slot) in [
        (0, 0, Some(0)),
        (0, CHUNK, None),
        (3, 0, Some(0)),
        (2, 0, None), // the block that the other has of its own
        (16, CHUNK, Some(16)),
        (16, 0, None),
        (18, 0, Some(18)),
        (18, CHUNK, None),
    ] {
        flip(&pack, 4096 * (unit + 1) + 20);
        let store = Store::open(&store_dir).unwrap();
        let found = store.snapshot(&digest).unwrap().disk().read_at(&mut [0; 512], at);
        let found = found.map_err(|error| (error.kind(), error.to_string()));
        match slot {
            None => assert_eq!(found, Ok(()), "unit {unit}"),
            Some(slot) => {
                let (kind, text) = found.expect_err("it is damaged");
                assert_eq!(kind, ErrorKind::Corrupt, "{text}");
                assert!(text.contains(&format!("00000000.pack: slot {slot} ")), "unit {unit}: {text}");
            }
        }
        flip(&pack, 4096 * (unit + 1) + 20);
    }
}
