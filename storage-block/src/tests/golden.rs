//! Files written by earlier versions, which load for ever.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ami_core::Digest;

use super::{copy_dir, image, memory};
use crate::format::{self, BLOCK, Closing, LOG_HEADER};
use crate::keys::LocalKey;
use crate::testing::compare;
use crate::{Compression, Store, StoreOptions, Volume};

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

const CHUNK: usize = 64 << 10;
const DIGEST: &str = "sha256:c25b21c1008314eb78142cd9f4131008a50a6b95a105b1986983ac4c48b4b438";

/// The encrypted snapshot of version 2, in whose name its data key has a part.
const ENCRYPTED_2: &str = "sha256:5eac8acbe470b74db05e428ff00e3da24ee7b723f809b456c2aa00893cbfcf83";

/// That of version 3.
const ENCRYPTED_3: &str = "sha256:2c19f4e65ad909cbc792a6752669e8f39490afed6ee0fc7c8067a3837956f0ce";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn open(dir: &Path) -> Store {
    let options = StoreOptions::new()
        .keys(Arc::new(LocalKey::from_bytes([1; 32])))
        .compression(Compression::WherePays { percent: 20 });
    Store::open_with(dir.join("store"), &options).unwrap()
}

/// The second snapshot of version 2: chunks that are stored as they are, compressed, nearly empty, and as what differs
/// from the first.
fn second_bytes() -> Vec<u8> {
    let mut bytes = image(3, 0, 1);
    bytes[1 << 16..2 << 16].fill(b'c');
    bytes[2 << 16..].fill(0);
    bytes[(2 << 16) + 8192..][..6].copy_from_slice(b"lonely");
    bytes[4096..8192].fill(b'd');
    bytes
}

/// Writes what [`files_of_version_3_load`] reads.
fn write(dir: &Path) {
    let store = open(dir);
    let (snapshot, _) = store.import(&memory(&snapshot_bytes()), &mut |_| ()).unwrap();
    let mut before = second_bytes();
    before[4096..8192].copy_from_slice(&image(1, 0, 1)[4096..8192]);
    let (base, _) = store.import(&memory(&before), &mut |_| ()).unwrap();
    let changed = Volume::create(&dir.join("changed"), Some(&base), base.size()).unwrap();
    changed.disk().write_at(&[b'd'; 4096], 4096).unwrap();
    changed.snapshot(&store).unwrap();
    changed.delete().unwrap();

    let key = store.new_key(None).unwrap();
    let (encrypted, _) = store.import_encrypted(&snapshot.disk(), &key, &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.join("volume"), Some(&encrypted), 64 << 12).unwrap();
    let disk = volume.disk();
    disk.write_at(&[b'v'; 4096], 4096).unwrap();
    disk.write_at(&[b'w'; 4096], 60 << 12).unwrap();
    disk.flush().unwrap();
    disk.discard(2 << 16, 4096).unwrap();
    disk.discard(60 << 12, 4096).unwrap();
    disk.flush().unwrap();
    eprintln!("written: {}", encrypted.digest());
}

fn check(dir: &Path, store: &Store, digest: Digest) {
    let snapshot = store.snapshot(&digest).unwrap();
    snapshot.verify().unwrap();
    compare(&snapshot.disk(), &snapshot_bytes(), "the golden snapshot");
    let volume = Volume::open(&dir.join("volume"), store).unwrap();
    compare(&volume.disk(), &volume_bytes(), "the golden volume");
}

#[test]
fn files_of_version_1_load() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&golden().join("v1"), dir.path());
    let store = Store::open(dir.path().join("store")).unwrap();
    let digest = DIGEST.parse().unwrap();
    assert_eq!(store.snapshots().unwrap(), [digest]);
    check(dir.path(), &store, digest);
    // The same bytes have the same name today, and need nothing stored.
    let (again, stats) = store.import(&memory(&snapshot_bytes()), &mut |_| ()).unwrap();
    assert_eq!((again.digest(), stats.stored_bytes), (digest, 0));
}

/// What is stored in a store of version 1 goes into packs of version 2 beside its own, and sweeps carry it over.
#[test]
fn stores_of_version_1_go_on() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&golden().join("v1"), dir.path());
    let digest: Digest = DIGEST.parse().unwrap();
    let mut bytes = snapshot_bytes();
    bytes.resize(64 << 12, 0);
    let second = {
        let store = Store::open(dir.path().join("store")).unwrap();
        let base = store.snapshot(&digest).unwrap();
        let volume = Volume::create(&dir.path().join("other"), Some(&base), 64 << 12).unwrap();
        volume.disk().write_at(&[b'n'; 4096], 2 << 16).unwrap();
        bytes[2 << 16..][..4096].fill(b'n');
        for chunk in [0, 3] {
            volume.disk().discard(chunk << 16, 1 << 16).unwrap();
            bytes[chunk as usize * CHUNK..][..CHUNK].fill(0);
        }
        let (second, stats) = volume.snapshot(&store).unwrap();
        assert_eq!(stats.stored_bytes, 4096 + (32 << 10), "it differs from a chunk in a pack of version 1");
        let packs = super::contents(&dir.path().join("store/packs"));
        let versions: Vec<u8> = packs.iter().map(|(_, bytes)| bytes[8]).collect();
        assert_eq!(versions, [1, 1, 2, 2]);
        second.digest()
    };
    let store = Store::open(dir.path().join("store")).unwrap();
    assert!(store.scrub(&mut |_| ()).unwrap().damages.is_empty());
    compare(&store.snapshot(&second).unwrap().disk(), &bytes, "packs of both versions");
    // Of the old pack one chunk is alive as what another differs from, of four objects.
    store.sweep().remove_unreferenced(&HashSet::from([second])).unwrap();
    let snapshot = store.snapshot(&second).unwrap();
    snapshot.verify().unwrap();
    compare(&snapshot.disk(), &bytes, "after a sweep");
    assert!(super::contents(&dir.path().join("store/packs")).iter().all(|(_, bytes)| bytes[8] == 2));
}

#[test]
fn files_of_version_2_load() {
    files_load("v2", ENCRYPTED_2);
}

/// Version 3 has wrapped keys that are bound to what they are stored with.
#[test]
fn files_of_version_3_load() {
    let v3 = golden().join("v3");
    if std::env::var_os("STORAGE_BLOCK_WRITE_GOLDEN").is_some() && !v3.exists() {
        std::fs::create_dir_all(&v3).unwrap();
        write(&v3);
    }
    files_load("v3", ENCRYPTED_3);
}

fn files_load(version: &str, encrypted: &str) {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&golden().join(version), dir.path());
    let number = version.as_bytes()[1] - b'0';
    let root = dir.path().join("store/snapshots").join(&encrypted["sha256:".len()..]);
    for file in [root, dir.path().join("volume/log")] {
        assert_eq!(std::fs::read(&file).unwrap()[8], number, "{}", file.display());
    }
    let store = open(dir.path());
    check(dir.path(), &store, encrypted.parse().unwrap());
    // A log that is written anew is of the version that it was.
    let volume = Volume::open(&dir.path().join("volume"), &store).unwrap();
    volume.grow(volume.size() + 4096).unwrap();
    drop(volume);
    assert_eq!(std::fs::read(dir.path().join("volume/log")).unwrap()[8], number);
    Volume::open(&dir.path().join("volume"), &store).unwrap();
    let plain = store.snapshot(&DIGEST.parse().unwrap()).unwrap();
    compare(&plain.disk(), &snapshot_bytes(), "the golden snapshot that is not encrypted");
    let (second, stats) = store.import(&memory(&second_bytes()), &mut |_| ()).unwrap();
    assert_eq!(stats.stored_bytes, 0, "it is there already");
    compare(&second.disk(), &second_bytes(), "the second golden snapshot");
    let report = store.scrub(&mut |_| ()).unwrap();
    assert!(report.damages.is_empty() && report.without_key == 0, "{report:?}");
    assert_eq!(report.snapshots, 4);
    // Each way of storing a chunk is among them.
    let index = crate::store::read(&store.0.index);
    let encodings: BTreeSet<u8> = index.places.iter().map(|(_, place)| place.slot.encoding.0).collect();
    assert_eq!(encodings, BTreeSet::from([0, 1, 3, 4, 6]));
}

/// Has golden files written if they are to be and are not there, and returns a copy of them.
fn copy_of(name: &str, write: impl FnOnce(&Path)) -> tempfile::TempDir {
    let there = golden().join(name);
    if std::env::var_os("STORAGE_BLOCK_WRITE_GOLDEN").is_some() && !there.exists() {
        std::fs::create_dir_all(&there).unwrap();
        write(&there);
    }
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&there, dir.path());
    dir
}

/// The last snapshot that was made of the volume that was closed.
const LAST: &str = "sha256:4a4ff8da048593ec1ae49fa8edf998c69e34b10db7bea4c26196a8aea62afb0c";

/// A volume that a snapshot was made of, after which two blocks were written and one was zeroed, and that was then closed.
fn write_closed(dir: &Path) {
    let store = open(dir);
    let (base, _) = store.import(&memory(&snapshot_bytes()), &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.join("volume"), Some(&base), 64 << 12).unwrap();
    let disk = volume.disk();
    disk.write_at(&[b'v'; 3 * 4096], 4096).unwrap();
    let (last, _) = volume.snapshot(&store).unwrap();
    disk.write_at(&[b'w'; 8192], (1 << 16) + 4096).unwrap();
    disk.discard((3 << 16) - 4096, 4096).unwrap();
    disk.flush().unwrap();
    eprintln!("written: {}", last.digest());
}

#[test]
fn what_stands_behind_the_log_of_a_closed_volume_is_read() {
    let dir = copy_of("closed", write_closed);
    // A log keeps the name of its volume's first one.
    let bytes = std::fs::read(dir.path().join("volume").join(NEW)).unwrap();
    let header = format::parse_volume(&bytes).unwrap();
    let (mut end, mut batches) = (LOG_HEADER as usize, 0);
    while let Some((_, _, len)) = format::parse_batch(header.log, header.size / BLOCK, &bytes[end..]) {
        (end, batches) = (end + len, batches + 1);
    }
    let said = Closing { last: LAST.parse().unwrap(), changed: vec![(1, 0b110), (2, 0x8000)] };
    assert_eq!(format::parse_closing(header.log, batches, header.size, &bytes[end..]), Some(said.clone()));
    // It is written the same way today, for those who read it then.
    let written = format::encode_closing(header.log, batches, &said).unwrap();
    assert_eq!(bytes[end..][..written.len()], written);

    let store = open(dir.path());
    let volume = Volume::open(&dir.path().join("volume"), &store).unwrap();
    let mut expected = snapshot_bytes();
    expected.resize(64 << 12, 0);
    expected[4096..][..3 * 4096].fill(b'v');
    expected[(1 << 16) + 4096..][..8192].fill(b'w');
    expected[(3 << 16) - 4096..3 << 16].fill(0);
    compare(&volume.disk(), &expected, "the golden volume that was closed");
    let (snapshot, stats) = volume.snapshot(&store).unwrap();
    assert_eq!(stats.changed_bytes, 3 * 4096, "what was written before the last snapshot is not looked at");
    compare(&snapshot.disk(), &expected, "a snapshot of it");
}

/// The name of the log of a volume of this size and snapshot, which was not encrypted, and what the mark of a new one says.
const NEW: &str = "log-1-40000-c25b21c1008314eb78142cd9f4131008a50a6b95a105b1986983ac4c48b4b438-fcc67664";

/// Where the mark is of the volume that is as it was made.
fn mark(dir: &Path) -> PathBuf {
    dir.join(".volume.new")
}

/// The mark is kept as a file that says where it leads, since archives do not keep links that lead nowhere.
fn write_new(dir: &Path) {
    let store = open(dir);
    let (base, _) = store.import(&memory(&snapshot_bytes()), &mut |_| ()).unwrap();
    drop(Volume::create(&dir.join("volume"), Some(&base), 64 << 12).unwrap());
    let target = std::fs::read_link(mark(dir)).unwrap();
    std::fs::remove_file(mark(dir)).unwrap();
    std::fs::write(dir.join("mark"), target.to_str().unwrap()).unwrap();
}

fn names(dir: &Path) -> BTreeSet<String> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_volume_that_nothing_was_written_to_is_read() {
    let mut expected = snapshot_bytes();
    expected.resize(64 << 12, 0);
    // All that was written, what a crash leaves of a volume whose mark is durable, and one that was made unsynced.
    for (files, marked) in [(true, true), (false, true), (true, false)] {
        let dir = copy_of("new", write_new);
        let path = dir.path().join("volume");
        assert_eq!(std::fs::read_to_string(dir.path().join("mark")).unwrap(), NEW);
        assert_eq!(names(&path), ["log.tmp", "overlay", NEW].map(str::to_owned).into());
        assert!([NEW, "log.tmp"].iter().all(|name| path.join(name).metadata().unwrap().len() == 0));
        if marked {
            std::os::unix::fs::symlink(NEW, mark(dir.path())).unwrap();
        }
        if !files {
            std::fs::remove_dir_all(&path).unwrap();
            std::fs::create_dir(&path).unwrap();
        }
        let store = open(dir.path());
        let volume = Volume::open(&path, &store).unwrap();
        compare(&volume.disk(), &expected, "the golden volume that is new");
        assert_eq!(volume.base(), Some(DIGEST.parse().unwrap()));
        drop(volume);
        // One that is made today is called the same, and leaves the same.
        Volume::remove(&path).unwrap();
        let base = store.snapshot(&DIGEST.parse().unwrap()).unwrap();
        drop(Volume::create(&path, Some(&base), 64 << 12).unwrap());
        assert_eq!(std::fs::read_link(mark(dir.path())).unwrap(), Path::new(NEW));
        assert_eq!(names(&path), ["log.tmp", "overlay", NEW].map(str::to_owned).into());
    }
}
