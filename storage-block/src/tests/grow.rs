//! Volumes that grow while they are in use.

use super::full_disk::Small;
use super::tape::{Op, Tape};
use super::{image, memory};
use crate::format::LEAF_SPAN;
use crate::testing::compare;
use crate::{ErrorKind, Store, Volume};

#[test]
fn volumes_grow_and_never_shrink() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut bytes = image(3, 512, 1);
    let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    let path = dir.path().join("volume");
    let mut size = (3 << 16) + 4096;
    let mut volume = Volume::create(&path, Some(&base), size).unwrap();
    volume.disk().write_at(&[1; 5000], 100).unwrap();
    bytes.resize(size as usize, 0);
    bytes[100..5100].fill(1);

    // Within a chunk, into the next leaf of the map, not at all, and not as far as that.
    let leaf = LEAF_SPAN + (3 << 16);
    for (to, expected) in [
        (size + 8192, Ok(())),
        (leaf, Ok(())),
        (leaf, Ok(())),
        (leaf - 4096, Err(ErrorKind::InvalidSize)),
        (leaf + 512, Err(ErrorKind::InvalidSize)),
        ((64 << 40) + 4096, Err(ErrorKind::InvalidSize)),
        (u64::MAX - 4095, Err(ErrorKind::InvalidSize)),
    ] {
        let disk = volume.disk();
        let before = volume.size();
        assert_eq!(volume.grow(to).map_err(|error| error.kind()), expected, "from {before} to {to}");
        size = if expected.is_ok() { to } else { before };
        bytes.resize(size as usize, 0);
        assert_eq!((disk.size(), volume.size()), (size, size));
        if before < size {
            disk.write_at(&[2; 700], before - 300).unwrap();
            bytes[before as usize - 300..][..700].fill(2);
            disk.write_at(&[3; 512], size - 512).unwrap();
            bytes[size as usize - 512..].fill(3);
        }
        assert_eq!(disk.write_at(&[4], size).map_err(|error| error.kind()), Err(ErrorKind::OutOfBounds));
        let (snapshot, _) = volume.snapshot(&store).unwrap();
        compare(&snapshot.disk(), &bytes, "a snapshot of a volume that grew");
        disk.flush().unwrap();
        drop((disk, volume));
        volume = Volume::open(&path, &store).unwrap();
        compare(&volume.disk(), &bytes, "a volume that grew and was opened again");
    }
}

/// A snapshot has the size that the volume had at its instant, and nothing of what came behind that.
#[test]
fn a_snapshot_keeps_its_size_while_the_volume_grows() {
    let dir = tempfile::tempdir().unwrap();
    let [store, other] = ["store", "other"].map(|name| Store::open(dir.path().join(name)).unwrap());
    let mut bytes = image(1, 0, 1);
    let (base, _) = store.import(&memory(&bytes), &mut |_| ()).unwrap();
    bytes.resize((1 << 16) + 8192, 0);
    for (target, name) in [(&store, "a"), (&other, "b")] {
        let mut bytes = bytes.clone();
        let volume = Volume::create(&dir.path().join(name), Some(&base), bytes.len() as u64).unwrap();
        volume.disk().write_at(&[1; 4096], 1 << 16).unwrap();
        bytes[1 << 16..][..4096].fill(1);
        let frozen = Volume::freeze([&volume], target);
        volume.grow(4 << 16).unwrap();
        volume.disk().write_at(&[2; 3 << 16], 1 << 16).unwrap();
        let (snapshot, _) = frozen.store(&mut |_| ()).unwrap().swap_remove(0);
        compare(&snapshot.disk(), &bytes, name);
        let (imported, _) = target.import(&memory(&bytes), &mut |_| ()).unwrap();
        assert_eq!(snapshot.digest(), imported.digest());
    }
}

/// The new size is that of a log which is durable before it has the name, and the name before anybody hears of it.
#[test]
fn the_new_size_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let tape = Tape::record(dir.path());
    let volume = Volume::create(&dir.path().join("volume"), None, 1 << 20).unwrap();
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    volume.disk().flush().unwrap();
    let before = tape.steps().len();
    volume.grow(2 << 20).unwrap();
    let steps = &tape.steps()[before..];
    let made = steps.iter().find(|step| matches!(&step.op, Op::Create { .. })).unwrap();
    let place = |what: &dyn Fn(&Op) -> bool| steps.iter().rposition(|step| what(&step.op)).unwrap();
    let synced = steps.iter().rposition(|step| step.file == made.file && step.op == Op::Sync).unwrap();
    let written =
        steps.iter().rposition(|step| step.file == made.file && matches!(step.op, Op::Write { .. })).unwrap();
    let named = place(&|op| matches!(op, Op::Rename { to, .. } if to.starts_with("volume")));
    let durable = place(&|op| matches!(op, Op::SyncDir { path } if path.ends_with("volume")));
    assert!(written < synced && synced < named && named < durable, "{steps:?}");
    assert_eq!(durable, steps.len() - 1);
}

/// What a crash in the middle leaves: a longer overlay, a new log without its name.
#[test]
fn half_grown_volumes_open_in_their_old_size() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let path = dir.path().join("volume");
    let volume = Volume::create(&path, None, 1 << 20).unwrap();
    volume.disk().write_at(&[1; 4096], 0).unwrap();
    volume.disk().flush().unwrap();
    drop(volume);
    std::fs::File::options().write(true).open(path.join("overlay")).unwrap().set_len(2 << 20).unwrap();
    std::fs::write(path.join("log.tmp"), b"half a log").unwrap();
    let volume = Volume::open(&path, &store).unwrap();
    let mut bytes = vec![0; 1 << 20];
    bytes[..4096].fill(1);
    compare(&volume.disk(), &bytes, "a volume that a crash kept from growing");
    volume.grow(2 << 20).unwrap();
    bytes.resize(2 << 20, 0);
    compare(&volume.disk(), &bytes, "the same, grown");
    assert!(!path.join("log.tmp").exists());
}

/// Where there is no room for a log of the new size, the volume keeps the old one and goes on.
#[test]
fn volumes_that_cannot_grow_stay_as_they_are() {
    let Some(small) = Small::mount(100) else { return };
    let stores = tempfile::tempdir().unwrap();
    let store = Store::open(stores.path()).unwrap();
    let path = small.0.join("volume");
    let volume = Volume::create(&path, None, 1 << 20).unwrap();
    let disk = volume.disk();
    let mut bytes = vec![0; 1 << 20];
    disk.write_at(&[1; 4096], 0).unwrap();
    bytes[..4096].fill(1);
    disk.flush().unwrap();
    for at in (0..1 << 20).step_by(4096) {
        match disk.write_at(&[1; 4096], at) {
            Ok(()) => bytes[at as usize..][..4096].fill(1),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                break;
            }
        }
    }
    assert_eq!(volume.grow(2 << 20).map_err(|error| error.kind()), Err(ErrorKind::NoSpace));
    assert!(!path.join("log.tmp").exists());
    compare(&disk, &bytes, "a volume that could not grow");
    disk.discard(0, 64 << 10).unwrap();
    bytes[..64 << 10].fill(0);
    disk.flush().unwrap();
    volume.grow(2 << 20).unwrap();
    bytes.resize(2 << 20, 0);
    drop((disk, volume));
    compare(&Volume::open(&path, &store).unwrap().disk(), &bytes, "it, when there was room again");
}
