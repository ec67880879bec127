//! File systems that are full: nothing half-made stays, and nothing that was there goes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;

use super::history::History;
use super::tape::Tape;
use super::{image, memory, scratch};
use crate::format::{Run, State};
use crate::log::Log;
use crate::testing::compare;
use crate::{ErrorKind, Store, Volume, nbd};

/// A file system of a fixed size, unmounted at the end.
pub(crate) struct Small(
    pub(crate) PathBuf,
    #[expect(dead_code, reason = "removes the directory")] tempfile::TempDir,
);

impl Small {
    pub(crate) fn mount(kib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let option = format!("size={kib}k");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(dir.path()).status();
        if mount.is_ok_and(|status| status.success()) {
            return Some(Self(dir.path().to_owned(), dir));
        }
        skip(&format!("a file system of {kib} KiB cannot be mounted; full disks are not tested"))
    }

    /// One that has a disk, past whose page cache can be written. Not all machines have devices for it.
    fn on_disk(kib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let mounted = dir.path().join("mounted");
        std::fs::File::create_new(&image).unwrap().set_len(kib << 10).unwrap();
        std::fs::create_dir(&mounted).unwrap();
        let succeeds = |command: &mut Command| command.status().is_ok_and(|status| status.success());
        let made = succeeds(Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(&image));
        if made && succeeds(Command::new("mount").args(["-o", "loop"]).args([&image, &mounted])) {
            return Some(Self(mounted, dir));
        }
        skip("no image can be mounted; full disks are not tested past the page cache")
    }
}

/// Says so, and that no machine that has to test everything may.
fn skip(what: &str) -> Option<Small> {
    assert!(std::env::var_os("CI").is_none(), "{what}, and CI needs it");
    eprintln!("SKIPPED: {what}");
    None
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn free(dir: &Path) -> u64 {
    let stat = rustix::fs::statvfs(dir).unwrap();
    stat.f_bavail * stat.f_frsize
}

fn used(dir: &Path) -> u64 {
    let stat = rustix::fs::statvfs(dir).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

#[test]
fn imports_into_full_stores_leave_nothing() {
    // From room for a part of one chunk to nearly enough.
    for kib in [330, 340, 400, 420, 700, 1500, 2160] {
        let Some(small) = Small::mount(kib) else { return };
        check_import(&small, 40, &format!("{kib} KiB"));
    }
}

#[test]
fn imports_onto_full_disks_leave_nothing() {
    for chunks in [64, 300] {
        let Some(small) = Small::on_disk(2 << 10) else { return };
        check_import(&small, chunks, &format!("{chunks} chunks"));
    }
}

/// Imports so many chunks, for which there is no room.
fn check_import(small: &Small, chunks: usize, what: &str) {
    let (old, new) = (image(4, 0, 1), image(chunks, 0, 2));
    let store = Store::open(small.0.join("store")).unwrap();
    let (first, _) = store.import(&memory(&old), &mut |_| ()).unwrap();
    let before = used(&small.0);
    let error = store.import(&memory(&new), &mut |_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
    assert_eq!(store.snapshots().unwrap(), [first.digest()], "{what}");
    assert!(used(&small.0) <= before + 8192, "{what}: {} bytes are used, not {before}", used(&small.0));
    first.verify().unwrap();
    compare(&first.disk(), &old, "what was there");
    drop((first, store));
    let store = Store::open(small.0.join("store")).unwrap();
    assert_eq!(store.snapshots().unwrap().len(), 1, "{what}");
}

/// What has nothing alive goes first, and what cannot be rewritten yet stays as good as it is.
#[test]
fn a_sweep_of_a_full_disk_gives_back_what_it_can() {
    /// Images of so many chunks, whose packs have 32 chunks at most; the ones that stay, and the room that there is for a sweep.
    /// Of a pack's 31 chunks and a half, 32 with its header and index, that is what has to be carried, or not quite.
    struct Case {
        images: &'static [(usize, bool)],
        room_kib: u64,
        packs: u64,
        left: u64,
    }
    const TWO: &[(usize, bool)] = &[(20, false), (20, true)];
    let cases = [
        Case { images: TWO, room_kib: 0, packs: 0, left: 1 },
        Case { images: TWO, room_kib: 15 << 6, packs: 0, left: 1 },
        Case { images: TWO, room_kib: 17 << 6, packs: 1, left: 0 },
        // Another pack that has nothing alive, and less than it takes.
        Case { images: &[(20, false), (20, true), (4, false)], room_kib: 0, packs: 1, left: 1 },
        // What the one gives back the other needs.
        Case { images: &[(20, false), (20, true), (20, false), (20, false)], room_kib: 0, packs: 2, left: 0 },
        // And the one that takes less comes first.
        Case {
            images: &[(20, false), (20, true), (4, true), (36, false)],
            room_kib: 5 << 6,
            packs: 2,
            left: 0,
        },
    ];
    for (number, Case { images, room_kib, packs, left }) in cases.into_iter().enumerate() {
        let Some(small) = Small::mount(16 << 10) else { return };
        let store = Store::with_pack_slots(small.0.join("store"), 31).unwrap();
        let bytes: Vec<_> =
            images.iter().zip(1..).map(|((chunks, _), seed)| image(*chunks, 0, seed)).collect();
        let digests: Vec<_> =
            bytes.iter().map(|b| store.import(&memory(b), &mut |_| ()).unwrap().0.digest()).collect();
        let kept = || images.iter().zip(digests.iter().zip(&bytes)).filter(|((_, kept), _)| *kept);
        let keep = kept().map(|(_, (digest, _))| *digest).collect();
        let gone = images.iter().filter(|(_, kept)| !kept).count() as u64;

        let filler = small.0.join("filler");
        std::fs::write(&filler, vec![1; (free(&small.0) - (room_kib << 10)) as usize]).unwrap();
        let swept = store.sweep().remove_unreferenced(&keep).unwrap();
        assert_eq!((swept.snapshots, swept.packs, swept.packs_left), (gone, packs, left), "case {number}");
        assert_eq!(swept.bytes > 0, packs > 0, "case {number}");
        // The thread that wrote a pack may hold the file for a moment longer than who waited for it.
        let soon = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while free(&small.0) < swept.bytes {
            assert!(std::time::Instant::now() < soon, "case {number}: {swept:?}");
            std::thread::yield_now();
        }
        let check = |store: &Store, what: &str| {
            for (_, (digest, bytes)) in kept() {
                let snapshot = store.snapshot(digest).unwrap();
                snapshot.verify().unwrap();
                compare(&snapshot.disk(), bytes, &format!("case {number}, {what}"));
            }
        };
        check(&store, "swept");
        std::fs::remove_file(&filler).unwrap();
        let again = store.sweep().remove_unreferenced(&keep).unwrap();
        assert_eq!((again.snapshots, again.packs, again.packs_left), (0, left, 0), "case {number}");
        check(&store, "swept with room");
        drop(store);
        check(&Store::open(small.0.join("store")).unwrap(), "opened again");
    }
}

/// A pack for which there was no room is appended to all the same.
#[test]
fn what_could_not_be_rewritten_is_appended_to() {
    let Some(small) = Small::mount(4 << 10) else { return };
    let store = Store::open(small.0.join("store")).unwrap();
    let import = |seed| store.import(&memory(&image(20, 0, seed)), &mut |_| ()).unwrap().0.digest();
    let (_, kept) = (import(1), import(2));
    let filler = small.0.join("filler");
    std::fs::write(&filler, vec![1; free(&small.0) as usize]).unwrap();
    let swept = store.sweep().remove_unreferenced(&HashSet::from([kept])).unwrap();
    assert_eq!((swept.packs, swept.packs_left), (0, 1));
    std::fs::remove_file(&filler).unwrap();
    let next = import(3);
    let packs = std::fs::read_dir(small.0.join("store/packs")).unwrap().count();
    assert_eq!(packs, 2, "one pack and its index");
    [kept, next].iter().for_each(|digest| store.snapshot(digest).unwrap().verify().unwrap());
}

#[test]
fn volumes_on_full_disks_keep_what_they_have() {
    for kib in [20, 40, 44, 100, 300] {
        let Some(small) = Small::mount(kib) else { return };
        let stores = tempfile::tempdir().unwrap();
        let store = Store::open(stores.path()).unwrap();
        let path = small.0.join("volume");
        let volume = match Volume::create(&path, None, 1 << 30) {
            Ok(volume) => volume,
            Err(error) => {
                assert_eq!((error.kind(), kib < 40), (ErrorKind::NoSpace, true), "{kib} KiB: {error}");
                assert!(!path.exists(), "{kib} KiB");
                continue;
            }
        };
        let disk = volume.disk();
        let mut written = Vec::new();
        let error = loop {
            let block = written.len() as u64;
            match disk.write_at(&[block as u8 + 1; 4096], block * 8192) {
                Ok(()) => written.push(block),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        disk.flush().unwrap();
        drop((disk, volume));
        let volume = Volume::open(&path, &store).unwrap();
        let mut buf = [0; 4096];
        for block in written {
            volume.disk().read_at(&mut buf, block * 8192).unwrap();
            assert_eq!(buf, [block as u8 + 1; 4096], "{kib} KiB, block {block}");
        }
        // Room given back is room to write in.
        volume.disk().discard(0, 1 << 20).unwrap();
        volume.disk().flush().unwrap();
    }
}

/// Who writes over NBD is told what is wrong, and may go on when it is not any more.
#[test]
fn a_full_disk_is_one_over_nbd() {
    let Some(small) = Small::mount(2 << 10) else { return };
    let store = Store::open(small.0.join("store")).unwrap();
    let volume = Volume::create(&small.0.join("volume"), None, 1 << 30).unwrap();
    let server = nbd::Server::bind(small.0.join("socket"), volume.disk()).unwrap();
    let client = nbd::Client::connect(server.address().clone(), "").unwrap().into_disk();
    client.write_at(&[1; 4096], 0).unwrap();
    client.flush().unwrap();
    let filler = small.0.join("filler");
    std::fs::write(&filler, vec![1; free(&small.0) as usize]).unwrap();
    let full = client.write_at(&[2; 1 << 20], 1 << 20).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::NoSpace, "{full}");
    let mut found = [0; 4096];
    client.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [1; 4096]);
    std::fs::remove_file(&filler).unwrap();
    client.write_at(&[2; 1 << 20], 1 << 20).unwrap();
    client.flush().unwrap();
    drop((client, server, volume));
    let volume = Volume::open(&small.0.join("volume"), &store).unwrap();
    volume.disk().read_at(&mut found, (2 << 20) - 4096).unwrap();
    assert_eq!(found, [2; 4096]);
}

/// A log that cannot be rewritten stays as it is, and leaves no half of another.
#[test]
fn logs_that_cannot_be_rewritten_go_on() {
    let Some(small) = Small::mount(2300) else { return };
    let mut log = Log::create(&small.0, 1 << 30, None, None).unwrap();
    let mut rounds = 0;
    // Runs that never join, so that a new log would be as long.
    for round in 0..8 {
        let runs: Vec<Run> = (0..10_000)
            .map(|n| Run { first: 2 * (round * 10_000 + n), count: 1, state: State::Overlay })
            .collect();
        if log.append(&runs).is_err() {
            break;
        }
        rounds += 1;
        assert!(!small.0.join("log.tmp").exists(), "round {round}");
    }
    let len = std::fs::metadata(Log::find(&small.0).unwrap()).unwrap().len();
    assert!(len > 1 << 20, "it has {len} bytes and was never to be rewritten");
    drop(log);
    let (_, map) = Log::open(&small.0).unwrap();
    assert_eq!(
        map.runs(0, 1 << 18).iter().filter(|run| run.state == State::Overlay).count(),
        rounds * 10_000
    );
}

/// Every operation on a file fails once, for want of space or of a disk that works: the call says so, nothing of it is
/// left and nothing else is lost, and then it goes well.
#[test]
fn any_operation_may_fail() {
    let errors = [(Errno::NOSPC, ErrorKind::NoSpace), (Errno::IO, ErrorKind::Io)];
    for ((error, kind), seed) in errors.into_iter().zip(1..) {
        for operations in 0.. {
            let dir = scratch();
            let root = dir.path().join("root");
            std::fs::create_dir(&root).unwrap();
            let tape = Tape::record(&root);
            let mut history = History::new(&root, tape, seed);
            history.prepare();
            history.fail_after(operations, error);
            history.one_of_each(
                |_| (),
                |history, error| {
                    assert_eq!(error.kind(), kind, "operation {operations}: {error}");
                    history.recover();
                },
            );
            let what = format!("operation {operations} failed: {error}");
            history.check_closed().unwrap_or_else(|why| panic!("{what}, and {why}"));
            if history.is_unharmed() {
                assert!(operations > 50, "only {operations} operations");
                break;
            }
        }
    }
}

/// The same with a file system that is full, with so much room left before each call.
#[test]
fn nothing_is_lost_for_want_of_space() {
    let mut failures = 0;
    for kib in (0..400).step_by(4) {
        let Some(small) = Small::mount(3 << 10) else { return };
        let (root, filler) = (small.0.join("root"), small.0.join("filler"));
        std::fs::create_dir(&root).unwrap();
        let tape = Tape::record(&root);
        let mut history = History::new(&root, tape, kib + 1);
        history.prepare();
        let fill = |_: &History| {
            std::fs::write(&filler, []).unwrap();
            let len = free(&small.0).saturating_sub(kib << 10);
            std::fs::write(&filler, vec![1; len as usize]).unwrap();
        };
        history.one_of_each(fill, |history, error| {
            failures += 1;
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{kib} KiB: {error}");
            // Emptied and not removed: a child that another test is starting may hold it open still.
            std::fs::write(&filler, []).unwrap();
            history.recover();
        });
        std::fs::write(&filler, []).unwrap();
        history.check_closed().unwrap_or_else(|why| panic!("with {kib} KiB: {why}"));
    }
    println!("{failures} calls failed for want of space");
    assert!(failures > 100);
}
