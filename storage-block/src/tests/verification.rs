//! Chunks are compared with their checksums or names when they are first read, and not again.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{image, memory};
use crate::testing::compare;
use crate::{Compression, Disk, ErrorKind, Store, StoreOptions, Verify, Volume};

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
    let parts = [(CHUNK, 4096), (CHUNK + 512, 512), (0, 3 * CHUNK as usize)];
    for (verify, (at, len)) in
        [Verify::Checksum, Verify::Digest].map(|verify| parts.map(|part| (verify, part))).concat()
    {
        let store = Store::open_with(dir.path(), &StoreOptions::new().verify(verify)).unwrap();
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
    let store = Store::open_with(dir.path(), &StoreOptions::new().verify(Verify::Never)).unwrap();
    let snapshot = store.snapshot(&digest).unwrap();
    assert_eq!(kind(&snapshot.disk(), CHUNK, 4096), Ok(()));
    assert_eq!(snapshot.verify().unwrap_err().kind(), ErrorKind::Corrupt);
}

/// Somebody changes a chunk and its checksum with it: who compares with checksums does not see it, and names tell.
#[test]
fn digests_alone_find_what_was_changed_on_purpose() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, other) = (image(1, 0, 1), image(1, 0, 2));
    let [digest, forged] = [&bytes, &other].map(|bytes| {
        let store = Store::open(dir.path()).unwrap();
        store.import(&memory(bytes), &mut |_| ()).unwrap().0.digest()
    });
    // The first record gets the other chunk's checksum, and its own is made right.
    let (pack, index) = (dir.path().join("packs/00000000.pack"), dir.path().join("packs/00000000.index"));
    let file = std::fs::File::options().write(true).open(&pack).unwrap();
    file.write_all_at(&other, 4096).unwrap();
    let mut records = std::fs::read(&index).unwrap();
    let record = &mut records[64..64 + 84];
    record[40..44].copy_from_slice(&crc32c::crc32c(&other).to_le_bytes());
    let mut sealed = [0; 8].to_vec();
    sealed.extend_from_slice(&record[..80]);
    record[80..].copy_from_slice(&crc32c::crc32c(&sealed).to_le_bytes());
    std::fs::write(&index, &records).unwrap();
    for (verify, expected) in [(Verify::Checksum, Ok(())), (Verify::Digest, Err(ErrorKind::Corrupt))] {
        let store = Store::open_with(dir.path(), &StoreOptions::new().verify(verify)).unwrap();
        let snapshot = store.snapshot(&digest).unwrap();
        assert_eq!(kind(&snapshot.disk(), 0, 512), expected, "{verify:?}");
        assert_eq!(snapshot.verify().unwrap_err().kind(), ErrorKind::Corrupt);
        store.snapshot(&forged).unwrap().verify().unwrap();
    }
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
