//! Volumes, snapshots and tags as resources of their own.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Duration;

use ami_core::{ResourceId, SnapshotId, VolumeId, VolumeType};
use common::{TestRegion, ask, disk, open, refused, register, world};
use instance_core::{
    DescribeSnapshots, DescribeTags, DescribeVolumes, ErrorKind, LaunchSpec, Result, VolumeSpec, VolumeState,
};

const FRIEND: &str = "222222222222";

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

const VOLUME_GONE: (ErrorKind, &str) = (ErrorKind::VolumeNotFound, "InvalidVolume.NotFound");
const SNAPSHOT_GONE: (ErrorKind, &str) = (ErrorKind::SnapshotNotFound, "InvalidSnapshot.NotFound");

/// Whoever has the disk of a volume has it alone.
#[test]
fn the_disk_of_a_volume_is_one_holders() {
    let (_dir, region, ami) = world();
    let server = region.launch(&ami, spec()).unwrap();
    let in_use = |result: Result<()>| refused(result, ErrorKind::VolumeInUse, "VolumeInUse");
    let id = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let friend = region.as_account(FRIEND.parse().unwrap());
    refused(friend.volume_disk(id), VOLUME_GONE.0, VOLUME_GONE.1);
    in_use(region.volume_disk(server.describe().attachments[0].volume_id).map(drop));

    let disk = region.volume_disk(id).unwrap();
    disk.write_at(b"hello", 0).unwrap();
    let also = disk.clone();
    drop(disk);
    let none_can = || {
        in_use(region.volume_disk(id).map(drop));
        in_use(region.attach_volume(id, server.id(), "/dev/sdh"));
        in_use(region.create_snapshot(id, "").map(drop));
        in_use(region.grow_volume(id, 2).map(drop));
        in_use(region.delete_volume(id));
    };
    none_can();
    server.stop(Duration::ZERO).unwrap();
    none_can();
    also.flush().unwrap();
    drop(also);
    region.attach_volume(id, server.id(), "/dev/sdh").unwrap();
    in_use(region.volume_disk(id).map(drop));
    server.start().unwrap();
    ask(&server, "read 2 0", "data hello");
    server.terminate().unwrap();
    region.delete_volume(id).unwrap();
}

#[test]
fn a_volume_that_was_kept_goes_on_to_another_instance() {
    let (_dir, region, ami) = world();
    let first = region.launch(&ami, spec()).unwrap();
    ask(&first, "write 1 0 kept", "wrote");
    let volume = first.describe().attachments[1].volume_id;
    refused(region.delete_volume(volume), ErrorKind::VolumeInUse, "VolumeInUse");
    let root = first.describe().attachments[0].volume_id;
    refused(region.detach_volume(root), ErrorKind::OperationNotPermitted, "OperationNotPermitted");
    first.terminate().unwrap();
    refused(region.detach_volume(volume), ErrorKind::IncorrectState, "IncorrectState");
    refused(region.delete_volume(root), VOLUME_GONE.0, VOLUME_GONE.1);
    let kept = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    assert_eq!(kept.iter().map(|v| (v.id, v.state)).collect::<Vec<_>>(), [(volume, VolumeState::Available)]);

    let second = region.launch(&ami, spec()).unwrap();
    second.stop(Duration::ZERO).unwrap();
    for device in ["/dev/sdf", "/dev/xvdf", "/dev/hda"] {
        let taken = region.attach_volume(volume, second.id(), device);
        refused(taken, ErrorKind::InvalidParameter, "InvalidParameterValue");
    }
    let own = second.describe().attachments[1].volume_id;
    region.detach_volume(own).unwrap();
    region.attach_volume(volume, second.id(), "/dev/sdf").unwrap();
    refused(region.attach_volume(volume, second.id(), "/dev/sdh"), ErrorKind::VolumeInUse, "VolumeInUse");
    second.start().unwrap();
    ask(&second, "read 1 0", "data kept");
    let told = region.describe_volumes(&DescribeVolumes::new().id(volume)).unwrap().items;
    let attachment = told[0].attachment.as_ref().unwrap();
    assert_eq!((attachment.instance_id, attachment.device_name.as_str()), (second.id(), "/dev/sdf"));
    region.delete_volume(own).unwrap();

    // An image of it has the disks that it has now.
    let child = second.create_image("child").unwrap().ami;
    second.terminate().unwrap();
    region.delete_volume(volume).unwrap();
    let third = region.launch(&child, spec()).unwrap();
    ask(&third, "read 1 0", "data kept");
}

#[test]
fn volumes_come_grow_and_go_while_an_instance_runs() {
    let (dir, region, ami) = world();
    let server = region.launch(&ami, spec()).unwrap();
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let taken = region.attach_volume(volume, server.id(), "/dev/xvdf");
    refused(taken, ErrorKind::InvalidParameter, "InvalidParameterValue");
    region.attach_volume(volume, server.id(), "/dev/sdg").unwrap();
    ask(&server, "disks", "disks 3");
    ask(&server, "write 2 0 hot", "wrote");
    refused(region.delete_volume(volume), ErrorKind::VolumeInUse, "VolumeInUse");

    for size in [0, 65_537] {
        refused(region.grow_volume(volume, size), ErrorKind::InvalidParameter, "InvalidParameterValue");
    }
    assert_eq!(region.grow_volume(volume, 2).unwrap().size_gib, 2);
    ask(&server, "size 2", "size 2147483648");

    // An image of it has all three.
    let child = region.launch(&server.create_image("child").unwrap().ami, spec()).unwrap();
    ask(&child, "read 2 0", "data hot");

    region.detach_volume(volume).unwrap();
    ask(&server, "disks", "disks 2");
    assert_eq!(server.describe().attachments.len(), 2);
    region.attach_volume(volume, child.id(), "/dev/sdh").unwrap();
    ask(&child, "read 3 0", "data hot");
    region.force_detach_volume(volume).unwrap();
    let data = child.describe().attachments[1].volume_id;
    region.detach_volume(data).unwrap();
    // What is in the place of one that is gone is found there when it is started again.
    child.reboot().unwrap();
    ask(&child, "read 1 0", "data hot");
    region.attach_volume(volume, server.id(), "/dev/sdg").unwrap();
    let id = server.id();
    drop((server, child, region));
    let region = open(dir.path());
    let server = region.instance(id).unwrap();
    assert_eq!(server.describe().attachments[2].volume_id, volume);
    assert_eq!(region.grow_volume(volume, 3).unwrap().size_gib, 3, "of a stopped one");
    server.start().unwrap();
    ask(&server, "size 2", "size 3221225472");
    ask(&server, "read 2 0", "data hot");
}

#[test]
fn a_root_volume_can_be_taken_out_and_put_back() {
    let (dir, region, ami) = world();
    let instance = region.launch(&ami, spec()).unwrap();
    ask(&instance, "write 0 0 root", "wrote");
    instance.stop(Duration::ZERO).unwrap();
    let (id, root) = (instance.id(), instance.describe().attachments[0].volume_id);
    region.detach_volume(root).unwrap();
    drop(instance);
    drop(region);
    let region = open(dir.path());
    let instance = region.instance(id).unwrap();
    region.attach_volume(root, id, "/dev/xvda").unwrap();
    let devices: Vec<_> = instance.describe().attachments.into_iter().map(|a| a.device_name).collect();
    assert_eq!(devices, ["/dev/xvda", "/dev/sdf"], "the root volume is the first");
    instance.start().unwrap();
    ask(&instance, "read 0 0", "data root");
}

#[test]
fn a_snapshot_is_the_volume_at_that_moment_and_outlives_it() {
    let (dir, region, ami) = world();
    let instance = region.launch(&ami, spec()).unwrap();
    let volume = instance.describe().attachments[1].volume_id;
    ask(&instance, "write 1 0 before", "wrote");
    let snapshot = region.create_snapshot(volume, "before").unwrap();
    ask(&instance, "write 1 0 after", "wrote");
    assert_eq!((snapshot.volume_size_gib, snapshot.description.as_str()), (1, "before"));
    instance.terminate().unwrap();
    let later = region.create_snapshot(volume, "of a volume that nothing has").unwrap();
    region.delete_volume(volume).unwrap();
    region.deregister_image(ami.id()).unwrap();
    drop(instance);
    drop(region);

    let region = open(dir.path());
    let ami = register(&region, "again", &disk(1, 8)).unwrap();
    for (snapshot, word) in [(snapshot.id, "before"), (later.id, "after")] {
        let volume = region.create_volume(VolumeSpec::of_snapshot(snapshot).size_gib(2)).unwrap();
        assert_eq!((volume.size_gib, volume.snapshot_id), (2, Some(snapshot)));
        region.delete_snapshot(snapshot).unwrap();
        let instance = region.launch(&ami, spec()).unwrap();
        instance.stop(Duration::ZERO).unwrap();
        region.attach_volume(volume.id, instance.id(), "/dev/sdg").unwrap();
        instance.start().unwrap();
        ask(&instance, "read 2 0", &format!("data {word}"));
        instance.terminate().unwrap();
        region.delete_volume(volume.id).unwrap();
    }
    assert!(region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items.is_empty());
}

#[test]
fn what_is_no_volume_or_snapshot_of_the_account_is_refused() {
    let (_dir, region, ami) = world();
    let volume = region.create_volume(VolumeSpec::new(4)).unwrap().id;
    let snapshot = region.create_snapshot(volume, "").unwrap().id;
    let instance = region.launch(&ami, spec()).unwrap();
    let friend = region.as_account(FRIEND.parse().unwrap());
    for region in [&friend, &region] {
        let mine = std::ptr::eq(region, &friend);
        let (volume, snapshot) = match mine {
            true => (volume, snapshot),
            false => ("vol-00000000000000000".parse().unwrap(), "snap-00000000000000000".parse().unwrap()),
        };
        refused(region.delete_volume(volume), VOLUME_GONE.0, VOLUME_GONE.1);
        refused(region.detach_volume(volume), VOLUME_GONE.0, VOLUME_GONE.1);
        refused(region.create_snapshot(volume, ""), VOLUME_GONE.0, VOLUME_GONE.1);
        refused(region.describe_volumes(&DescribeVolumes::new().id(volume)), VOLUME_GONE.0, VOLUME_GONE.1);
        refused(region.delete_snapshot(snapshot), SNAPSHOT_GONE.0, SNAPSHOT_GONE.1);
        refused(region.create_volume(VolumeSpec::of_snapshot(snapshot)), SNAPSHOT_GONE.0, SNAPSHOT_GONE.1);
        let described = region.describe_snapshots(&DescribeSnapshots::new().id(snapshot));
        refused(described, SNAPSHOT_GONE.0, SNAPSHOT_GONE.1);
    }
    let theirs = friend.create_volume(VolumeSpec::new(1)).unwrap().id;
    let attached = friend.attach_volume(theirs, instance.id(), "/dev/sdg");
    refused(attached, ErrorKind::InstanceNotFound, "InvalidInstanceID.NotFound");

    let (parameter, invalid) = (ErrorKind::InvalidParameter, "InvalidParameterValue");
    for spec in [
        VolumeSpec::new(0),
        VolumeSpec::new(16_385).volume_type(VolumeType::Gp2),
        VolumeSpec::new(1).volume_type(VolumeType::St1),
        VolumeSpec::of_snapshot(snapshot).size_gib(3),
        VolumeSpec::new(1).tag("k", "v".repeat(257)),
    ] {
        refused(region.create_volume(spec), parameter, invalid);
    }
    let reserved = region.create_volume(VolumeSpec::new(1).tag("aws:k", ""));
    refused(reserved, ErrorKind::MalformedTagKey, "InvalidTagKey.Malformed");
    refused(region.create_snapshot(volume, &"x".repeat(256)), parameter, invalid);
    assert_eq!(region.describe_volumes(&DescribeVolumes::new()).unwrap().items.len(), 3);
    // A text that is no id has its own kind and code.
    let parsed = |text: &str| -> Result<VolumeId> { Ok(text.parse::<VolumeId>()?) };
    refused(parsed("vol-1"), ErrorKind::MalformedVolumeId, "InvalidVolumeID.Malformed");
    let parsed = |text: &str| -> Result<ami_core::AmiId> { Ok(text.parse::<ami_core::AmiId>()?) };
    refused(parsed("ami-x"), ErrorKind::MalformedImageId, "InvalidAMIID.Malformed");
    let parsed = |text: &str| -> Result<ResourceId> { Ok(text.parse::<ResourceId>()?) };
    refused(parsed("x-1"), ErrorKind::InvalidResourceId, "InvalidID");
}

#[test]
fn tags_are_set_on_all_resources_or_on_none_and_are_kept() {
    let (dir, region, ami) = world();
    let instance = region.launch(&ami, spec().tag("Name", "web")).unwrap();
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let snapshot = region.create_snapshot(volume, "").unwrap().id;
    let all: [ResourceId; 4] = [ami.id().into(), instance.id().into(), volume.into(), snapshot.into()];
    region.create_tags(&all, &[("stage", "test"), ("owner", "me")]).unwrap();
    let count = |region: &TestRegion| region.describe_tags(&DescribeTags::new()).unwrap().items.len();
    assert_eq!(count(&region), 9);

    // One that cannot have it keeps all from having it.
    let many: Vec<(String, String)> = (0..48).map(|n| (n.to_string(), String::new())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let missing: SnapshotId = "snap-00000000000000000".parse().unwrap();
    refused(region.create_tags(&all, &many), ErrorKind::TagLimitExceeded, "TagLimitExceeded");
    refused(
        region.create_tags(&all, &[("aws:a", "")]),
        ErrorKind::MalformedTagKey,
        "InvalidTagKey.Malformed",
    );
    let some = [volume.into(), missing.into()];
    refused(region.create_tags(&some, &[("new", "")]), SNAPSHOT_GONE.0, SNAPSHOT_GONE.1);
    refused(region.create_tags(&all, &[]), ErrorKind::MissingParameter, "MissingParameter");
    refused(region.create_tags(&[], &[("new", "")]), ErrorKind::MissingParameter, "MissingParameter");
    let friend = region.as_account(FRIEND.parse().unwrap());
    for (resource, code) in all.iter().zip([
        "InvalidAMIID.NotFound",
        "InvalidInstanceID.NotFound",
        "InvalidVolume.NotFound",
        "InvalidSnapshot.NotFound",
    ]) {
        assert_eq!(friend.create_tags(&[*resource], &[("new", "")]).unwrap_err().code(), code);
    }
    assert_eq!((count(&region), count(&friend)), (9, 0));

    region.delete_tags(&all, &[("owner", None), ("stage", Some("other")), ("absent", None)]).unwrap();
    let stopped = instance.id();
    drop((instance, friend));
    drop(region);
    let region = open(dir.path());
    let tags = region.describe_tags(&DescribeTags::new().filter("key", ["s*"])).unwrap().items;
    assert!(tags.len() == 4 && tags.iter().all(|t| t.value == "test"), "{tags:?}");
    assert_eq!(region.instance(stopped).unwrap().describe().tags["Name"], "web");
    assert_eq!(region.image(ami.id()).unwrap().tags().get("stage"), Some("test"));
    let of = |filter: &str, value: &str| {
        region.describe_tags(&DescribeTags::new().filter(filter, [value])).unwrap().items.len()
    };
    assert_eq!((of("resource-type", "volume"), of("resource-id", &stopped.to_string())), (1, 2));
    assert_eq!((of("value", "web"), of("value", "?est")), (1, 4));
}

#[test]
fn volumes_are_modified_and_tell_what_was_last_changed() {
    use instance_core::ModifyVolume;
    let (dir, region, ami) = world();
    let server = region.launch(&ami, spec()).unwrap();
    let (attached, alone) =
        (server.describe().attachments[1].volume_id, region.create_volume(VolumeSpec::new(1)).unwrap().id);
    let all = |region: &TestRegion, request: DescribeVolumes| {
        region.describe_volumes_modifications(&request).unwrap().items
    };
    assert_eq!(all(&region, DescribeVolumes::new()), []);
    let none = (ErrorKind::VolumeModificationNotFound, "InvalidVolumeModification.NotFound");
    refused(region.describe_volumes_modifications(&DescribeVolumes::new().id(alone)), none.0, none.1);
    let gone = "vol-0123456789abcdef0".parse().unwrap();
    refused(
        region.describe_volumes_modifications(&DescribeVolumes::new().id(gone)),
        VOLUME_GONE.0,
        VOLUME_GONE.1,
    );

    let larger = region.modify_volume(attached, ModifyVolume::new().size_gib(3)).unwrap();
    ask(&server, "size 1", "size 3221225472");
    assert_eq!((larger.original_size_gib, larger.target_size_gib, larger.progress), (1, 3, 100));
    assert!(larger.start_time <= larger.end_time);
    let other = region.modify_volume(alone, ModifyVolume::new().volume_type(VolumeType::Gp2)).unwrap();
    assert_eq!((other.original_type, other.target_type), (VolumeType::Gp3, VolumeType::Gp2));
    assert_eq!((other.original_size_gib, other.target_size_gib), (1, 1));
    let told = region.describe_volumes(&DescribeVolumes::new().id(alone)).unwrap().items;
    assert_eq!((told[0].volume_type, told[0].size_gib), (VolumeType::Gp2, 1));

    // A type with another least size, and what cannot be.
    let value = (ErrorKind::InvalidParameter, "InvalidParameterValue");
    let st1 = ModifyVolume::new().volume_type(VolumeType::St1);
    refused(region.modify_volume(alone, st1), value.0, value.1);
    for (volume, change) in
        [(attached, ModifyVolume::new().size_gib(2)), (alone, ModifyVolume::new().size_gib(65_537))]
    {
        refused(region.modify_volume(volume, change), value.0, value.1);
    }
    refused(
        region.modify_volume(alone, ModifyVolume::new()),
        ErrorKind::MissingParameter,
        "MissingParameter",
    );
    let large = region.modify_volume(alone, st1.size_gib(125)).unwrap();
    assert_eq!(
        (large.original_type, large.target_type, large.target_size_gib),
        (VolumeType::Gp2, VolumeType::St1, 125)
    );
    drop((server, region));
    let region = open(dir.path());
    for (name, value, found) in [
        ("modification-state", "completed", 2),
        ("original-size", "1", 2),
        ("target-size", "125", 1),
        ("original-volume-type", "gp2", 1),
        ("target-volume-type", "gp3", 1),
        ("volume-id", &*alone.to_string(), 1),
    ] {
        assert_eq!(all(&region, DescribeVolumes::new().filter(name, [value])).len(), found, "{name}");
    }
    assert_eq!(all(&region, DescribeVolumes::new().id(alone)), [large]);
}
