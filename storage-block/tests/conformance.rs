//! All disks of this crate behave alike.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::cell::Cell;

use storage_block::{MemoryDisk, RawFile, Store, Volume, testing};

#[test]
fn memory() {
    testing::conformance(|size| MemoryDisk::new(size).unwrap().into_disk());
}

#[test]
fn raw_file() {
    let dir = tempfile::tempdir().unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        RawFile::create(dir.path().join(made.get().to_string()), size).unwrap().into_disk()
    });
}

#[test]
fn empty_volume() {
    let dir = tempfile::tempdir().unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        Volume::create(&dir.path().join(made.get().to_string()), None, size).unwrap().disk()
    });
}

/// A volume whose snapshot holds bytes everywhere, all of which have been zeroed.
#[test]
fn zeroed_clone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let made = Cell::new(0);
    testing::conformance(|size| {
        made.set(made.get() + 1);
        let image = MemoryDisk::from_vec(vec![0xaa; size as usize - 512]).unwrap().into_disk();
        let (snapshot, _) = store.import(&image, &mut |_| ()).unwrap();
        let volume = Volume::create(&dir.path().join(made.get().to_string()), Some(&snapshot), size).unwrap();
        volume.disk().discard(0, size).unwrap();
        volume.disk()
    });
}
