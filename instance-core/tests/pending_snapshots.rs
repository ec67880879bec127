//! Snapshots that are stored while their volumes go on: what is told of them, and what is left of those that come to nothing.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/crashes.rs"]
mod crashes;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use ami_core::{Ami, ResourceId, SnapshotId, VolumeId, X86_64};
use common::{TestRegion, check, disk, files, open, soon, told};
use crashes::{Shared, crash};
use instance_core::state_store::{Change, Durability, MemoryStateStore, StateStore};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DescribeSnapshots, DescribeTags, DirectBoot, Error, ErrorKind, ImageSource, PendingSnapshot,
    RegionOptions, SnapshotDescription, SnapshotState, VolumeSpec,
};

/// Writes to so many places what no store has that storing it takes a while.
fn fill(region: &TestRegion, volume: VolumeId, seed: u64) {
    let to = region.volume_disk(volume).unwrap();
    for place in 0..1500_u64 {
        let block = [seed.to_le_bytes(), place.to_le_bytes()].concat().repeat(256);
        to.write_at(&block, place << 16).unwrap();
    }
    to.flush().unwrap();
}

/// Begins to make a snapshot, and keeps it from being stored until what is given is dropped.
fn begin_slowly(region: &TestRegion, volume: VolumeId) -> (PendingSnapshot, mpsc::Sender<()>) {
    for seed in 1..20 {
        fill(region, volume, seed);
        let snapshot = region.begin_create_snapshot(volume, "slow").unwrap();
        let (go, wait) = mpsc::channel::<()>();
        let (stands, is_standing) = mpsc::channel();
        let wait = Mutex::new(wait);
        snapshot.watch().subscribe(move |now| {
            let _ = stands.send(now.state);
            let _ = wait.lock().unwrap().recv();
        });
        // It may have been faster than this thread, even with a hook that nobody tells anything.
        let standing = is_standing.recv_timeout(Duration::from_secs(5));
        if standing == Ok(SnapshotState::Pending) {
            return (snapshot, go);
        }
        drop(go);
        region.delete_snapshot(snapshot.wait(soon()).unwrap().id).unwrap();
    }
    panic!("every snapshot is stored before anybody can look");
}

fn volume(region: &TestRegion) -> VolumeId {
    region.create_volume(VolumeSpec::new(1)).unwrap().id
}

fn described(region: &TestRegion) -> Vec<SnapshotDescription> {
    region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items
}

/// What is stored of snapshots.
fn contents(dir: &Path) -> Vec<String> {
    files(&dir.join("blocks/snapshots")).into_keys().collect()
}

/// That nothing can be made of a snapshot, for its state.
fn check_of_no_use(region: &TestRegion, id: SnapshotId, says: &str) {
    let register = || {
        let source = ImageSource::of_snapshot(id).boot(DirectBoot::new(tiny_elf(), None, ""));
        region.register_image(Ami::<X86_64>::builder("of-it"), source).map(drop)
    };
    let refused = |made: Result<(), Error>| {
        check(&made.unwrap_err(), ErrorKind::IncorrectState, "IncorrectState", &[says])
    };
    refused(region.create_volume(VolumeSpec::of_snapshot(id)).map(drop));
    refused(register());
    refused(region.snapshot_disk(id).map(drop));
}

#[test]
fn a_snapshot_is_pending_until_it_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let id = volume(&region);
    let (pending, go) = begin_slowly(&region, id);
    let now = pending.describe();
    assert_eq!((now.state, now.digest, now.volume_id), (SnapshotState::Pending, None, id));
    assert!(now.progress < 100 && now.description == "slow", "{now:?}");
    let [shown] = &described(&region)[..] else { panic!("{:?}", described(&region)) };
    assert_eq!((shown.id, shown.state, shown.digest), (pending.id(), SnapshotState::Pending, None));
    let count = |name: &str, value: &str| {
        let request = DescribeSnapshots::new().filter(name, [value]);
        region.describe_snapshots(&request).unwrap().items.len()
    };
    assert_eq!(
        (count("status", "pending"), count("status", "completed"), count("progress", "100%")),
        (1, 0, 0)
    );
    check_of_no_use(&region, pending.id(), "pending");
    let refused = region.wait_for_snapshot(pending.id(), Instant::now()).unwrap_err();
    check(&refused, ErrorKind::IncorrectState, "IncorrectState", &["pending at the deadline"]);
    let refused = pending.wait(Instant::now()).unwrap_err();
    check(&refused, ErrorKind::IncorrectState, "IncorrectState", &["pending at the deadline"]);
    let stranger = region.as_account("222222222222".parse().unwrap());
    assert_eq!(stranger.watch_snapshot(pending.id()).unwrap_err().kind(), ErrorKind::SnapshotNotFound);
    assert_eq!(stranger.delete_snapshot(pending.id()).unwrap_err().kind(), ErrorKind::SnapshotNotFound);
    region.create_tags(&[ResourceId::from(pending.id())], &[("stage", "test")]).unwrap();
    assert_eq!(region.describe_tags(&DescribeTags::new()).unwrap().items.len(), 1);

    let progress = Arc::new(Mutex::new(Vec::new()));
    let sink = progress.clone();
    region
        .watch_snapshot(pending.id())
        .unwrap()
        .subscribe(move |now| sink.lock().unwrap().push((now.progress, now.state)));
    drop(go);
    let made = region.wait_for_snapshot(pending.id(), soon()).unwrap();
    assert_eq!((made.state, made.progress, made.start_time), (SnapshotState::Completed, 100, now.start_time));
    assert_eq!((described(&region), pending.wait(soon()).unwrap()), (vec![made.clone()], made.clone()));
    assert_eq!(made.tags.iter().collect::<Vec<_>>(), [("stage", "test")]);
    let progress = progress.lock().unwrap();
    assert!(progress.is_sorted_by_key(|(percent, _)| *percent) && progress.len() > 3, "{progress:?}");
    assert!(
        progress.iter().all(|(percent, state)| (*percent == 100) == (*state == SnapshotState::Completed))
    );
    assert_eq!((count("status", "pending"), count("progress", "100%")), (0, 1));
    assert_eq!(region.watch_snapshot(made.id).unwrap().get(), made);
    check(&pending.cancel().unwrap_err(), ErrorKind::IncorrectState, "IncorrectState", &["completed"]);
    assert_eq!(region.create_volume(VolumeSpec::of_snapshot(made.id)).unwrap().snapshot_id, Some(made.id));
    assert_eq!(region.create_snapshot(id, "at once").unwrap().digest, made.digest);
}

#[test]
fn what_is_written_after_a_snapshot_has_begun_is_not_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let id = volume(&region);
    let server = common::launch(&region, &common::register(&region, "base", &disk(1, 7)).unwrap()).unwrap();
    fill(&region, id, 1);
    region.attach_volume(id, server.id(), "/dev/sdm").unwrap();
    let disk_of_guest = "2";
    assert_eq!(common::ask(&server, &format!("write {disk_of_guest} 0 before"), "wrote"), "");
    let pending = region.begin_create_snapshot(id, "").unwrap();
    common::ask(&server, &format!("write {disk_of_guest} 0 after"), "wrote");
    let made = pending.wait(soon()).unwrap();
    let mut found = [0; 6];
    region.snapshot_disk(made.id).unwrap().read_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"before");
}

#[test]
fn a_pending_snapshot_that_is_deleted_or_cancelled_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let id = volume(&region);
    for delete in [true, false] {
        let (pending, go) = begin_slowly(&region, id);
        match delete {
            true => {
                region.delete_snapshot(pending.id()).unwrap();
                assert_eq!(described(&region), []);
                assert_eq!(
                    region.delete_snapshot(pending.id()).unwrap_err().kind(),
                    ErrorKind::SnapshotNotFound
                );
            }
            false => pending.cancel().unwrap(),
        }
        drop(go);
        check(&pending.wait(soon()).unwrap_err(), ErrorKind::Cancelled, "InternalError", &[]);
        let end = pending.describe();
        assert_eq!(end.state, SnapshotState::Error);
        assert_eq!(end.state_reason.unwrap().code, "Client.UserInitiatedCancel");
        pending.cancel().unwrap();
        assert_eq!((described(&region), contents(dir.path())), (vec![], vec![]));
        let gone = region.wait_for_snapshot(pending.id(), soon()).unwrap_err();
        check(&gone, ErrorKind::SnapshotNotFound, "InvalidSnapshot.NotFound", &[]);
        region.create_snapshot(id, "the volume is as good as before").unwrap();
        region.delete_snapshot(described(&region)[0].id).unwrap();
    }
    drop(region);
    assert_eq!(described(&open(dir.path())), []);
}

#[test]
fn what_cannot_begin_says_so_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let id = volume(&region);
    let gone = "vol-0123456789abcdef0".parse().unwrap();
    let refused = region.begin_create_snapshot(gone, "").unwrap_err();
    check(&refused, ErrorKind::VolumeNotFound, "InvalidVolume.NotFound", &[]);
    let refused = region.begin_create_snapshot(id, &"x".repeat(256)).unwrap_err();
    check(&refused, ErrorKind::InvalidParameter, "InvalidParameterValue", &["255"]);
    let held = region.volume_disk(id).unwrap();
    let refused = region.begin_create_snapshot(id, "").unwrap_err();
    check(&refused, ErrorKind::VolumeInUse, "VolumeInUse", &[]);
    drop(held);
    assert_eq!((described(&region), contents(dir.path())), (vec![], vec![]));
}

/// What a region finds that a process has left while it made a snapshot.
fn check_left(region: &TestRegion, id: SnapshotId, says: &str) {
    let [left] = &described(region)[..] else { panic!("{:?}", described(region)) };
    assert_eq!((left.id, left.state, left.digest), (id, SnapshotState::Error, None));
    let why = left.state_reason.clone().unwrap();
    assert!(why.code == "Server.InternalError" && why.message.contains(says), "{why:?}");
    check_of_no_use(region, id, says);
    let refused = region.wait_for_snapshot(id, soon()).unwrap_err();
    check(&refused, ErrorKind::Internal, "InternalError", &[says]);
    assert_eq!(region.watch_snapshot(id).unwrap().get(), *left);
}

#[test]
fn a_crash_leaves_a_snapshot_that_could_not_be_made() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Shared::default());
    let region = crashes::open(dir.path(), store.clone());
    let id = volume(&region);
    let (pending, go) = begin_slowly(&region, id);
    let (_after, copy, kept) = crash(dir.path(), &store, "", &[]);
    drop(go);
    pending.wait(soon()).unwrap();
    for _ in 0..2 {
        let region = crashes::open(&copy, kept.clone());
        check_left(&region, pending.id(), "the process that owned the region ended");
        drop(region);
        assert_eq!(contents(&copy), [""; 0]);
    }
    let region = crashes::open(&copy, kept);
    region.create_tags(&[ResourceId::from(pending.id())], &[("stage", "gone")]).unwrap();
    region.delete_snapshot(pending.id()).unwrap();
    assert_eq!(described(&region), []);
    region.create_snapshot(id, "").unwrap();
}

/// The last handle goes in the thread that makes it, which does not wait for itself.
#[test]
fn a_region_that_is_closed_cuts_its_snapshots_off() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let id = volume(&region);
    let (pending, go) = begin_slowly(&region, id);
    let last = Mutex::new(Some(region));
    pending.watch().subscribe(move |_| drop(last.lock().unwrap().take()));
    drop(go);
    let refused = pending.wait(soon()).unwrap_err();
    check(&refused, ErrorKind::Internal, "InternalError", &["the region was closed"]);
    // The thread may still hold it for a moment.
    let region = loop {
        match common::try_open(dir.path()) {
            Err(e) if e.kind() == ErrorKind::RegionInUse => std::thread::yield_now(),
            opened => break opened.unwrap_or_else(|e| panic!("{}", told(&e))),
        }
    };
    check_left(&region, pending.id(), "the region was closed");
    assert_eq!(contents(dir.path()), [""; 0]);
}

/// A store that refuses to have snapshots completed, or to have anything noted of one.
#[derive(Debug, Clone, Default)]
struct Refusing(Arc<MemoryStateStore>, Arc<AtomicBool>, Arc<AtomicBool>);

impl StateStore for Refusing {
    fn get(&self, table: &str, key: &str) -> instance_core::Result<Option<Vec<u8>>> {
        self.0.get(table, key)
    }

    fn scan(&self, table: &str) -> instance_core::Result<Vec<(String, Vec<u8>)>> {
        self.0.scan(table)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> instance_core::Result<()> {
        let completes = |change: &Change| change.table == "snapshots" && change.value.is_some();
        let notes = |change: &Change| change.table.ends_with("snapshots");
        let refuses = changes.iter().any(completes) && self.1.load(SeqCst)
            || changes.iter().any(notes) && self.2.load(SeqCst);
        match refuses {
            true => Err(Error::new(ErrorKind::InsufficientVolumeCapacity, "the store is full")),
            false => self.0.apply(changes, durability),
        }
    }
}

#[test]
fn a_snapshot_that_cannot_be_written_down_could_not_be_made() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Refusing::default());
    let open =
        || RegionOptions::new().state_store(store.clone()).open(dir.path(), FakeHypervisor::new()).unwrap();
    let region = open();
    let id = volume(&region);
    fill(&region, id, 1);
    store.1.store(true, SeqCst);
    let refused = region.create_snapshot(id, "").unwrap_err();
    check(&refused, ErrorKind::InsufficientVolumeCapacity, "InsufficientVolumeCapacity", &["full"]);
    assert_eq!((described(&region), contents(dir.path())), (vec![], vec![]));
    let pending = region.begin_create_snapshot(id, "").unwrap();
    let refused = pending.wait(soon()).unwrap_err();
    check(&refused, ErrorKind::InsufficientVolumeCapacity, "InsufficientVolumeCapacity", &["full"]);
    let [left] = &described(&region)[..] else { panic!("{:?}", described(&region)) };
    assert_eq!((left.id, left.state), (pending.id(), SnapshotState::Error));
    assert_eq!(left.state_reason.clone().unwrap().code, "Server.InsufficientVolumeCapacity");
    check(
        &pending.cancel().unwrap_err(),
        ErrorKind::IncorrectState,
        "IncorrectState",
        &["could not be made"],
    );
    assert_eq!(contents(dir.path()), [""; 0]);
    store.1.store(false, SeqCst);
    drop(region);
    let region = open();
    assert_eq!(described(&region).len(), 1);
    region.delete_snapshot(pending.id()).unwrap();
    region.begin_create_snapshot(id, "").unwrap().wait(soon()).unwrap();
}

#[test]
fn nobody_waits_for_a_snapshot_whose_end_cannot_be_written_down() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Refusing::default());
    let options = RegionOptions::new().state_store(store.clone());
    let region = options.open(dir.path(), FakeHypervisor::new()).unwrap();
    let id = volume(&region);
    let (pending, go) = begin_slowly(&region, id);
    store.2.store(true, SeqCst);
    drop(go);
    let refused = pending.wait(soon()).unwrap_err();
    check(&refused, ErrorKind::InsufficientVolumeCapacity, "InsufficientVolumeCapacity", &["full"]);
    check_left(&region, pending.id(), "could not be written down");
    store.2.store(false, SeqCst);
    region.delete_snapshot(pending.id()).unwrap();
    assert_eq!(described(&region), []);
}
