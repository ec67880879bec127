//! Snapshots of the volumes of an instance, all of one instant.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use ami_core::VolumeId;
use common::{TestRegion, ask, open, register, soon, spec};
use instance_core::{
    BlockDeviceMappingRequest, CreateSnapshots, DescribeSnapshots, ErrorKind, Instance, Result,
    SnapshotDescription, SnapshotState,
};

/// A server with two disks beside its root.
fn server(region: &TestRegion) -> (Instance, Vec<VolumeId>) {
    let data = |name: &str| BlockDeviceMappingRequest::new(name).size_gib(1);
    let spec =
        spec().volume_tag("of", "server").block_device(data("/dev/sdf")).block_device(data("/dev/sdg"));
    let server = region.launch(&register(region), spec).unwrap();
    let volumes = server.describe().attachments.iter().map(|a| a.volume_id).collect();
    (server, volumes)
}

/// The number that the guest has written to a volume, as a snapshot of it has it.
fn number(region: &TestRegion, snapshot: &SnapshotDescription) -> u32 {
    let mut bytes = [0; 8];
    region.snapshot_disk(snapshot.id).unwrap().read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').parse().unwrap()
}

#[test]
fn all_volumes_of_an_instance_are_of_one_instant() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (server, volumes) = server(&region);
    let count = |number: u32| {
        for disk in 0..3 {
            ask(&server, &format!("write {disk} 0 {number}"), "wrote");
        }
    };
    count(1);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| (2..).take_while(|_| !done.load(SeqCst)).for_each(count));
        for begin in [false, true].repeat(5) {
            let request = CreateSnapshots::new(server.id());
            let made = match begin {
                false => region.create_snapshots(&request).unwrap(),
                true => {
                    let begun = region.begin_create_snapshots(&request).unwrap();
                    begun.iter().map(|pending| pending.wait(soon()).unwrap()).collect()
                }
            };
            assert!(made.iter().map(|s| s.volume_id).eq(volumes.iter().copied()), "{made:?}");
            let found: Vec<u32> = made.iter().map(|snapshot| number(&region, snapshot)).collect();
            // The guest writes to them in turn.
            assert!(found.is_sorted_by(|a, b| a >= b) && found[0] - found[2] <= 1, "{found:?}");
        }
        done.store(true, SeqCst);
    });
}

#[test]
fn what_is_wanted_of_them_is_what_comes() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (server, volumes) = server(&region);
    let all = || CreateSnapshots::new(server.id());
    let of = |made: Result<Vec<SnapshotDescription>>| -> Vec<VolumeId> {
        made.unwrap().iter().map(|snapshot| snapshot.volume_id).collect()
    };
    assert_eq!(of(region.create_snapshots(&all().exclude_boot_volume(true))), volumes[1..]);
    assert_eq!(of(region.create_snapshots(&all().exclude_data_volume(volumes[1]))), [volumes[0], volumes[2]]);
    let described = all().description("nightly").tag("kind", "backup").copy_tags_from_volumes(true);
    for made in region.create_snapshots(&described).unwrap() {
        assert_eq!((made.state, &*made.description), (SnapshotState::Completed, "nightly"));
        assert_eq!(made.tags.iter().collect::<Vec<_>>(), [("kind", "backup"), ("of", "server")]);
    }
    assert!(region.create_snapshots(&all()).unwrap().iter().all(|made| made.tags.is_empty()));
    let before = region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items.len();

    let none =
        all().exclude_boot_volume(true).exclude_data_volume(volumes[1]).exclude_data_volume(volumes[2]);
    let gone = CreateSnapshots::new("i-0123456789abcdef0".parse().unwrap());
    for (request, kind, code) in [
        (none, ErrorKind::InvalidParameterCombination, "InvalidParameterCombination"),
        (all().exclude_data_volume(volumes[0]), ErrorKind::InvalidParameter, "InvalidParameterValue"),
        (all().description("x".repeat(256)), ErrorKind::InvalidParameter, "InvalidParameterValue"),
        (all().tag("", "no key"), ErrorKind::MalformedTagKey, "InvalidTagKey.Malformed"),
        (gone, ErrorKind::InstanceNotFound, "InvalidInstanceID.NotFound"),
    ] {
        let refused = region.create_snapshots(&request).unwrap_err();
        assert_eq!((refused.kind(), refused.code()), (kind, code), "{request:?}");
        let refused = region.begin_create_snapshots(&request).unwrap_err();
        assert_eq!((refused.kind(), refused.code()), (kind, code), "{request:?}");
    }
    let many = (0..51).fold(all(), |request, n| request.tag(format!("key-{n}"), ""));
    assert_eq!(region.create_snapshots(&many).unwrap_err().code(), "TagLimitExceeded");
    let stranger = region.as_account("222222222222".parse().unwrap());
    assert_eq!(stranger.create_snapshots(&all()).unwrap_err().kind(), ErrorKind::InstanceNotFound);

    // One that has never been written is stopped, and then gone.
    server.stop(std::time::Duration::ZERO).unwrap();
    assert_eq!(of(region.create_snapshots(&all())), volumes);
    server.terminate().unwrap();
    let refused = region.create_snapshots(&all()).unwrap_err();
    assert_eq!(
        (refused.kind(), refused.code()),
        (ErrorKind::IncorrectInstanceState, "IncorrectInstanceState")
    );
    assert_eq!(region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items.len(), before + 3);
}

/// Until the others have come to be, nobody knows that one of them is not wanted.
#[test]
fn one_of_several_that_is_deleted_keeps_the_others_from_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (server, _) = server(&region);
    for disk in 0..3 {
        ask(&server, &format!("write {disk} 0 {disk}"), "wrote");
    }
    let begun = region.begin_create_snapshots(&CreateSnapshots::new(server.id())).unwrap();
    region.delete_snapshot(begun[1].id()).unwrap();
    assert_eq!(number(&region, &begun[0].wait(soon()).unwrap()), 0);
    assert_eq!(number(&region, &begun[2].wait(soon()).unwrap()), 2);
    // It may have been completed before, and is gone in any case.
    let _ = begun[1].wait(soon());
    let left = region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items;
    assert!(left.len() == 2 && left.iter().all(|snapshot| snapshot.id != begun[1].id()), "{left:?}");
    left.iter().for_each(|snapshot| region.delete_snapshot(snapshot.id).unwrap());
}
