//! What a new volume's mark is good for, and what it must not do.

use std::path::{Path, PathBuf};

use super::Volume;
use crate::testing::compare;
use crate::{ErrorKind, MemoryDisk, Snapshot, Store};

const SIZE: u64 = 1 << 20;

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
    base: Snapshot,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let image = MemoryDisk::from_vec(vec![7; SIZE as usize]).unwrap().into_disk();
        let (base, _) = store.import(&image, &mut |_| ()).unwrap();
        Self { dir, store, base }
    }

    fn volume(&self) -> PathBuf {
        self.dir.path().join("vol")
    }

    fn mark(&self) -> PathBuf {
        self.dir.path().join(".vol.new")
    }

    fn is_marked(&self) -> bool {
        self.mark().symlink_metadata().is_ok()
    }

    fn create(&self) -> Volume {
        Volume::create(&self.volume(), Some(&self.base), 2 * SIZE).unwrap()
    }

    /// Opens it and sees that it is as it was made.
    fn open_new(&self, what: &str) -> Volume {
        let volume = Volume::open(&self.volume(), &self.store).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut expected = vec![7; SIZE as usize];
        expected.resize(2 * SIZE as usize, 0);
        compare(&volume.disk(), &expected, what);
        volume
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn whatever_a_crash_takes_of_a_new_volume_is_made_again() {
    let fixture = Fixture::new();
    for taken in 0..8 {
        drop(fixture.create());
        assert!(fixture.is_marked());
        let files = files(&fixture.volume());
        assert_eq!(files.len(), 3);
        for (_, file) in files.iter().enumerate().filter(|(number, _)| taken >> number & 1 == 1) {
            std::fs::remove_file(file).unwrap();
        }
        // Nobody else takes the directory, although it may be empty.
        let again = Volume::create(&fixture.volume(), None, SIZE).map(drop);
        assert_eq!(again.map_err(|e| e.kind()), Err(ErrorKind::AlreadyExists), "without {taken:03b}");
        let volume = fixture.open_new(&format!("without {taken:03b}"));
        assert!(!fixture.is_marked(), "its names are durable");
        volume.disk().write_at(&[9; 4096], 4096).unwrap();
        volume.disk().flush().unwrap();
        drop(volume);
        Volume::open(&fixture.volume(), &fixture.store).unwrap().delete().unwrap();
        assert!(!fixture.volume().exists());
    }
}

#[test]
fn the_first_flush_takes_the_mark_away() {
    let fixture = Fixture::new();
    let volume = fixture.create();
    volume.disk().write_at(&[9; 4096], 4096).unwrap();
    assert!(fixture.is_marked());
    volume.disk().flush().unwrap();
    assert!(!fixture.is_marked());
}

/// A mark that a crash has brought back says nothing, whatever it says.
#[test]
fn a_log_that_says_something_counts_and_not_the_mark() {
    let fixture = Fixture::new();
    let volume = fixture.create();
    let said = std::fs::read_link(fixture.mark()).unwrap();
    let disk = volume.disk();
    disk.write_at(&[9; 4096], 4096).unwrap();
    disk.flush().unwrap();
    drop((volume, disk));
    for target in [&said, Path::new("log-1-1000-none-5a4ce2d1"), Path::new("nonsense")] {
        std::os::unix::fs::symlink(target, fixture.mark()).unwrap();
        let volume = Volume::open(&fixture.volume(), &fixture.store).unwrap();
        let mut found = [0; 4096];
        volume.disk().read_at(&mut found, 4096).unwrap();
        assert_eq!((volume.size(), found), (2 * SIZE, [9; 4096]));
        assert!(!fixture.is_marked());
    }
    std::os::unix::fs::symlink(&said, fixture.mark()).unwrap();
    Volume::remove(&fixture.volume()).unwrap();
    assert!(!fixture.is_marked() && !fixture.volume().exists());
}

#[test]
fn what_is_held_of_a_deleted_volume_does_no_harm_to_the_next() {
    let fixture = Fixture::new();
    let first = fixture.create();
    let held = first.disk();
    held.write_at(&[1; 4096], 0).unwrap();
    first.delete().unwrap();
    let second = fixture.create();
    held.flush().unwrap();
    held.write_at(&[2; 4096], 0).unwrap();
    held.flush().unwrap();
    assert!(fixture.is_marked(), "nobody has flushed the one that is there");
    let mut found = [0; 4096];
    held.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [2; 4096]);
    drop(held);

    let disk = second.disk();
    disk.write_at(&[3; 4096], 0).unwrap();
    disk.flush().unwrap();
    drop((second, disk));
    let opened = Volume::open(&fixture.volume(), &fixture.store).unwrap();
    opened.disk().read_at(&mut found, 0).unwrap();
    assert_eq!(found, [3; 4096]);
}

#[test]
fn a_mark_that_was_left_makes_no_volume() {
    let fixture = Fixture::new();
    // As whoever removed the directory by other means has left it.
    std::os::unix::fs::symlink("log-1-1000-none-5a4ce2d1", fixture.mark()).unwrap();
    let opened = Volume::open(&fixture.volume(), &fixture.store).map(drop);
    assert_eq!(opened.map_err(|e| e.kind()), Err(ErrorKind::NotFound));
    let volume = Volume::create_unsynced(&fixture.volume(), Some(&fixture.base), 2 * SIZE).unwrap();
    assert!(!fixture.is_marked(), "it would be taken for this one's");
    volume.delete().unwrap();
    std::os::unix::fs::symlink("log-1-1000-none-5a4ce2d1", fixture.mark()).unwrap();
    drop(fixture.create());
    std::fs::remove_dir_all(fixture.volume()).unwrap();
    std::fs::create_dir(fixture.volume()).unwrap();
    drop(fixture.open_new("by the mark of the later one"));
}

/// The mark's format, for ever.
#[test]
fn a_mark_alone_is_a_volume() {
    let fixture = Fixture::new();
    for (target, expected) in [
        ("log-1-1000-none-5a4ce2d1", Ok(4096)),
        ("log-1-1000-none-5a4ce2d2", Err(ErrorKind::Corrupt)),
        ("log-2-1000-none-5a4ce2d1", Err(ErrorKind::Corrupt)),
        ("log", Err(ErrorKind::Corrupt)),
        ("../store/lock", Err(ErrorKind::Corrupt)),
    ] {
        std::fs::create_dir(fixture.volume()).unwrap();
        std::os::unix::fs::symlink(target, fixture.mark()).unwrap();
        let opened = Volume::open(&fixture.volume(), &fixture.store);
        assert_eq!(opened.map(|volume| volume.size()).map_err(|e| e.kind()), expected, "{target}");
        Volume::remove(&fixture.volume()).unwrap();
        assert!(!fixture.is_marked() && !fixture.volume().exists(), "{target}");
    }
}

/// What was in a directory before might come back in a crash, so that all names in it are made durable.
#[test]
fn a_directory_of_others_has_no_mark() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.volume()).unwrap();
    drop(fixture.create());
    assert!(!fixture.is_marked());
    // Nor has one whose name leaves no room for it.
    let long = fixture.dir.path().join("v".repeat(255));
    drop(Volume::create(&long, None, SIZE).unwrap());
    Volume::open(&long, &fixture.store).unwrap().delete().unwrap();
}

/// Of many who make a volume in one place one does, while others remove it; and it is whole or not there.
#[test]
fn one_of_many_makes_it() {
    let fixture = Fixture::new();
    for _ in 0..20 {
        let made: usize = std::thread::scope(|scope| {
            let make = || Volume::create(&fixture.volume(), Some(&fixture.base), 2 * SIZE);
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(make)).collect();
            let made: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            let in_use = Volume::remove(&fixture.volume()).map_err(|e| e.kind());
            assert_eq!(in_use, Err(ErrorKind::InUse));
            made.iter().filter(|made| made.is_ok()).count()
        });
        assert_eq!(made, 1);
        fixture.open_new("it was made").delete().unwrap();
        assert!(!fixture.is_marked() && !fixture.volume().exists());
    }
}
