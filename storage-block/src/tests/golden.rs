//! Files written by earlier versions, which load for ever.

use std::path::Path;

use super::{copy_dir, memory};
use crate::testing::compare;
use crate::{Store, Volume};

/// What the golden snapshot has: three chunks, the second a hole, and a sector.
fn snapshot_bytes() -> Vec<u8> {
    let mut bytes = vec![0; (3 << 16) + 512];
    bytes[..1 << 16].fill(b'a');
    bytes[2 << 16..].fill(b'c');
    bytes
}

/// What the golden volume has: a block written, a block zeroed, a block written and zeroed, and some growth.
fn volume_bytes() -> Vec<u8> {
    let mut bytes = snapshot_bytes();
    bytes.resize(64 << 12, 0);
    bytes[4096..8192].fill(b'v');
    bytes[2 << 16..(2 << 16) + 4096].fill(0);
    bytes
}

const DIGEST: &str = "sha256:c25b21c1008314eb78142cd9f4131008a50a6b95a105b1986983ac4c48b4b438";

fn write(dir: &Path) {
    let store = Store::open(dir.join("v1/store")).unwrap();
    let (snapshot, _) = store.import(&memory(&snapshot_bytes()), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.join("v1/volume"), Some(&snapshot), 64 << 12).unwrap();
    let disk = volume.disk();
    disk.write_at(&[b'v'; 4096], 4096).unwrap();
    disk.write_at(&[b'w'; 4096], 60 << 12).unwrap();
    disk.flush().unwrap();
    disk.discard(2 << 16, 4096).unwrap();
    disk.discard(60 << 12, 4096).unwrap();
    disk.flush().unwrap();
    eprintln!("written: {}", snapshot.digest());
}

#[test]
fn files_of_version_1_load() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    if std::env::var_os("STORAGE_BLOCK_WRITE_GOLDEN").is_some() && !golden.join("v1").exists() {
        std::fs::create_dir_all(golden.join("v1")).unwrap();
        write(&golden);
    }
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&golden.join("v1"), dir.path());
    let store = Store::open(dir.path().join("store")).unwrap();
    let digest = DIGEST.parse().unwrap();
    assert_eq!(store.snapshots().unwrap(), [digest]);
    let snapshot = store.snapshot(&digest).unwrap();
    snapshot.verify().unwrap();
    compare(&snapshot.disk(), &snapshot_bytes(), "the golden snapshot");
    let volume = Volume::open(&dir.path().join("volume"), &store).unwrap();
    compare(&volume.disk(), &volume_bytes(), "the golden volume");
    // The same bytes have the same name today, and need nothing stored.
    let (again, stats) = store.import(&memory(&snapshot_bytes()), &mut |_| ()).unwrap();
    assert_eq!((again.digest(), stats.stored_bytes), (digest, 0));
}
