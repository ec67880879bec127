//! Damaged files: each is found, and the message says which it is.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::{copy_dir, image, memory};
use crate::log::Log;
use crate::{ErrorKind, Result, Store, Volume};

/// What is done to a file.
enum Damage {
    Flip(u64),
    Cut(u64),
    Remove,
}

fn damage(path: &Path, damage: &Damage) {
    let mut bytes = std::fs::read(path).unwrap();
    match damage {
        Damage::Flip(at) => bytes[*at as usize] ^= 1,
        Damage::Cut(len) => bytes.truncate(*len as usize),
        Damage::Remove => return std::fs::remove_file(path).unwrap(),
    }
    std::fs::write(path, bytes).unwrap();
}

/// Opens everything and reads it through.
fn read_all(dir: &Path) -> Result<()> {
    let store = Store::open(dir.join("store"))?;
    for digest in store.snapshots()? {
        store.snapshot(&digest)?.verify()?;
    }
    Volume::open(&dir.join("volume"), &store)?;
    Ok(())
}

#[test]
fn damage_is_found_and_named() {
    use Damage::{Cut, Flip, Remove};
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    std::fs::create_dir(&whole).unwrap();
    let root = {
        let store = Store::open(whole.join("store")).unwrap();
        let (snapshot, _) = store.import(&memory(&image(2, 0, 1)), &mut |_| ()).unwrap();
        let volume = Volume::create(&whole.join("volume"), Some(&snapshot), 1 << 20).unwrap();
        for block in [200, 3, 5] {
            volume.disk().write_at(&[1; 4096], block * 4096).unwrap();
            volume.disk().flush().unwrap();
        }
        PathBuf::from("store/snapshots").join(snapshot.digest().to_hex())
    };
    read_all(&whole).unwrap();

    let [pack, index, overlay] =
        ["store/packs/00000000.pack", "store/packs/00000000.index", "volume/overlay"].map(PathBuf::from);
    let log = Log::find(&whole.join("volume")).unwrap();
    let log = log.strip_prefix(&whole).unwrap().to_owned();
    // The pack has two chunks and a leaf.
    let leaf = 4096 + 2 * 65536;
    for (file, done, expected) in [
        (&root, Flip(0), "does not have the digest"),
        (&root, Flip(70), "does not have the digest"),
        (&root, Cut(40), "does not have the digest"),
        (&root, Cut(0), "does not have the digest"),
        (&pack, Flip(0), "magic"),
        (&pack, Flip(8), "version"),
        (&pack, Flip(16), "checksum"),
        (&pack, Flip(4096), "does not hold the chunk"),
        (&pack, Flip(4096 + 65536 + 9), "does not hold the chunk"),
        (&pack, Flip(leaf), "does not hold the manifest leaf"),
        (&pack, Cut(leaf + 100), "ends before the end of slot 32"),
        (&pack, Cut(4096), "ends before the end of slot 32"),
        (&index, Flip(0), "magic"),
        (&index, Flip(8), "version"),
        (&index, Flip(16), "checksum"),
        (&index, Cut(10), "header ends"),
        (&index, Remove, "missing"),
        (&log, Flip(0), "magic"),
        (&log, Flip(8), "version"),
        (&log, Flip(20), "checksum"),
        (&log, Cut(0), "cut to 0 bytes"),
        (&log, Cut(100), "header ends"),
        (&log, Cut(8192), "cut to 8192 bytes"),
        (&log, Flip(4096), "batch 0 is damaged"),
        (&log, Flip(4096 + 512 + 40), "batch 1 is damaged"),
        (&overlay, Cut(200 * 4096), "cut to 819200 bytes"),
    ] {
        let copy = dir.path().join("copy");
        copy_dir(&whole, &copy);
        damage(&copy.join(file), &done);
        let error = read_all(&copy).expect_err(expected);
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{text}");
        assert!(text.contains(expected), "{text:?} does not say {expected:?}");
        assert!(text.contains(file.to_str().unwrap()), "{text:?} does not name {}", file.display());
        std::fs::remove_dir_all(&copy).unwrap();
    }

    // What a record of an index said is not to be had elsewhere, so the chunk is named instead.
    for record in 0..3 {
        let copy = dir.path().join("copy");
        copy_dir(&whole, &copy);
        damage(&copy.join(&index), &Flip(64 + record * 84));
        let error = read_all(&copy).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().starts_with("no pack holds the"), "{error}");
        // Nothing is appended to such a pack, and importing the image again mends it.
        let store = Store::open(copy.join("store")).unwrap();
        store.import(&memory(&image(2, 0, 1)), &mut |_| ()).unwrap();
        drop(store);
        read_all(&copy).unwrap();
        std::fs::remove_dir_all(&copy).unwrap();
    }
}

/// A new volume's log is empty, too. What tells the two apart is no half of a log that a crash has left.
#[test]
fn an_empty_log_is_a_new_one_only_where_nothing_was_logged() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let path = dir.path().join("volume");
    drop(Volume::create(&path, None, 1 << 20).unwrap());
    let volume = Volume::open(&path, &store).unwrap();
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    volume.disk().flush().unwrap();
    drop(volume);
    std::fs::write(path.join("log.tmp"), [1; 100]).unwrap();
    drop(Volume::open(&path, &store).unwrap());
    damage(&Log::find(&path).unwrap(), &Damage::Cut(0));
    let error = Volume::open(&path, &store).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("cut to 0 bytes"), "{error}");
}

/// One bad chunk does not hide its neighbours.
#[test]
fn other_chunks_stay_readable() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(3, 0, 1);
    let digest = {
        let store = Store::open(dir.path()).unwrap();
        store.import(&memory(&bytes), &mut |_| ()).unwrap().0.digest()
    };
    damage(&dir.path().join("packs/00000000.index"), &Damage::Flip(64 + 84));
    let disk = Store::open(dir.path()).unwrap().snapshot(&digest).unwrap().disk();
    let mut buf = vec![0; 65536];
    for (chunk, ok) in [(0, true), (1, false), (2, true)] {
        let read = disk.read_at(&mut buf, chunk << 16).map_err(|error| error.kind());
        assert_eq!(read, if ok { Ok(()) } else { Err(ErrorKind::Corrupt) });
        assert!(!ok || buf == bytes[(chunk as usize) << 16..][..65536]);
    }
}

/// What is lost is no reason for a sweep to fail, and all else that is to be kept stays.
#[test]
fn a_sweep_goes_on_where_a_chunk_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(3, 0, 1);
    let digest = {
        let store = Store::open(dir.path()).unwrap();
        store.import(&memory(&bytes), &mut |_| ()).unwrap().0.digest()
    };
    damage(&dir.path().join("packs/00000000.index"), &Damage::Flip(64 + 84 + 5));
    let store = Store::open(dir.path()).unwrap();
    store.sweep().remove_unreferenced(&HashSet::from([digest])).unwrap();
    let snapshot = store.snapshot(&digest).unwrap();
    let mut first = vec![0; 1 << 16];
    snapshot.disk().read_at(&mut first, 0).unwrap();
    assert!(first == bytes[..1 << 16]);
    assert!(snapshot.verify().unwrap_err().to_string().starts_with("no pack holds the chunk"));
}

/// A root that is longer than any can be is refused for that, and not read into memory.
#[test]
fn a_root_is_read_no_further_than_one_can_go() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(1, 0, 1);
    let store = Store::open(dir.path()).unwrap();
    let digest = store.import(&memory(&bytes), &mut |_| ()).unwrap().0.digest();
    let path = dir.path().join("snapshots").join(digest.to_hex());
    let root = std::fs::read(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for (len, expected) in [
        (crate::format::ROOT_MAX as u64, "does not have the digest"),
        (crate::format::ROOT_MAX as u64 + 1, "longer than the root of any snapshot"),
        // More than any memory.
        (1 << 42, "longer than the root of any snapshot"),
    ] {
        file.set_len(len).unwrap();
        let error = store.snapshot(&digest).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!store.0.has_root(&digest, &root));
    }
    // Whoever has it once more mends it.
    store.import(&memory(&bytes), &mut |_| ()).unwrap().0.verify().unwrap();
    assert!(store.0.has_root(&digest, &root));
}
