//! Images of instances: what can be asked for, how consistent they are, and that nobody waits for them to be stored.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;

use std::sync::mpsc;
use std::time::Duration;

use ami_core::{AnyAmi, BlockDeviceKind, ImageState, VolumeType, X86_64};
use common::{PATIENCE, TestRegion, ask, files, open, register, soon, spec};
use instance_core::{
    BlockDeviceMappingRequest, CreateImage, CreateImageTask, DescribeCreateImageTasks, ErrorKind,
    ImageConsistency, Instance, InstanceState, ShutdownBehavior, TaskStatus, VolumeSpec,
};

/// As many chunks as take a while to store.
const CHUNKS: u32 = 600;

/// Has the guest write to many places of the disk of its own.
fn write_much(instance: &Instance, word: &str) {
    let mut reader = instance.console().reader_from_now();
    for place in 0..CHUNKS {
        let line = format!("write 1 {} {word}-{place}\n", place * 128);
        instance.console().write_all(line.as_bytes(), soon()).unwrap();
        reader.wait_for("wrote", soon()).unwrap();
    }
}

/// A server with a disk beside its root.
fn server(region: &TestRegion) -> Instance {
    let data = BlockDeviceMappingRequest::new("/dev/sdf").size_gib(1).delete_on_termination(true);
    region.launch(&register(region), spec().block_device(data)).unwrap()
}

/// Begins to make an image, and keeps it from being stored until what is given is dropped.
fn begin_slowly(instance: &Instance, name: &str) -> (CreateImageTask, mpsc::Sender<()>) {
    let task = instance.begin_create_image(name).unwrap();
    let (go, wait) = mpsc::channel::<()>();
    let (stands, is_standing) = mpsc::channel();
    let wait = std::sync::Mutex::new(wait);
    task.watch().subscribe(move |_| {
        let _ = stands.send(());
        let _ = wait.lock().unwrap().recv();
    });
    is_standing.recv_timeout(PATIENCE).unwrap();
    (task, go)
}

fn launched(region: &TestRegion, image: &AnyAmi) -> Instance {
    region.launch(&image.typed::<X86_64>().unwrap(), spec()).unwrap()
}

/// All of this is done while the image is being stored.
#[test]
fn an_instance_goes_its_way_while_its_image_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = server(&region);
    write_much(&instance, "before");
    let (task, go) = begin_slowly(&instance, "moment");
    ask(&instance, "write 1 0 after", "wrote");
    std::thread::scope(|scope| {
        // Who wants another image waits for the first, and nobody waits for who waits.
        let second = scope.spawn(|| instance.create_image("second"));
        // Its guest ends: that is seen at once.
        instance.console().write_all(b"poweroff\n", soon()).unwrap();
        instance.wait_for(InstanceState::Stopped, soon()).unwrap();
        instance.start().unwrap();
        ask(&instance, "read 1 0", "data after");
        // Its guest reboots: it comes back.
        let mut reader = instance.console().reader_from_now();
        instance.console().write_all(b"reboot\n", soon()).unwrap();
        reader.wait_for("GUEST READY", soon()).unwrap();
        region.create_tags(&[instance.id().into()], &[("stage", "stored")]).unwrap();
        // What it has goes with it, and stays for the image.
        let data = instance.describe().attachments[1].volume_id;
        region.detach_volume(data).unwrap();
        region.attach_volume(data, instance.id(), "/dev/sdg").unwrap();
        ask(&instance, "read 1 128", "data before-1");
        region.detach_volume(data).unwrap();
        region.delete_volume(data).unwrap();
        instance.terminate().unwrap();
        assert_eq!(task.describe().status, TaskStatus::Active, "it is still being stored");
        drop(go);
        let refused = second.join().unwrap().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::IncorrectInstanceState, "{refused:?}");
    });
    let made = task.wait(soon()).unwrap();
    let image = region.image(made.image_id.unwrap()).unwrap();
    let twin = launched(&region, image.ami());
    ask(&twin, "read 1 0", "data before-0");
    ask(&twin, &format!("read 1 {}", (CHUNKS - 1) * 128), &format!("data before-{}", CHUNKS - 1));
    twin.terminate().unwrap();
    region.deregister_image(image.id()).unwrap();
    assert_eq!(files(&dir.path().join("volumes")), [""; 0]);
}

#[test]
fn a_snapshot_keeps_nobody_from_the_volume_while_an_image_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = server(&region);
    write_much(&instance, "before");
    let (task, go) = begin_slowly(&instance, "moment");
    let data = instance.describe().attachments[1].volume_id;
    std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| region.create_snapshot(data, ""));
        instance.stop(Duration::ZERO).unwrap();
        region.detach_volume(data).unwrap();
        drop(go);
        let snapshot = snapshot.join().unwrap().unwrap();
        let copy = region.create_volume(VolumeSpec::of_snapshot(snapshot.id)).unwrap();
        assert_eq!(copy.size_gib, 1);
    });
    task.wait(soon()).unwrap();
    region.create_snapshot(data, "of what is attached to nothing").unwrap();
}

#[test]
fn an_image_says_how_consistent_it_is() {
    use ImageConsistency::{CrashConsistent, FileSystemConsistent};
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = region.launch(&register(&region), spec()).unwrap();
    let consistency = |instance: &Instance, name: &str| instance.create_image(name).unwrap().consistency;
    assert_eq!(consistency(&instance, "running"), CrashConsistent);
    instance.stop(Duration::ZERO).unwrap();
    assert_eq!(consistency(&instance, "ended"), CrashConsistent);
    instance.start().unwrap();
    instance.stop(Duration::from_secs(20)).unwrap();
    assert_eq!(consistency(&instance, "shut-down"), FileSystemConsistent);
    let id = instance.id();
    drop((region, instance));
    let region = open(dir.path());
    let instance = region.instance(id).unwrap();
    assert_eq!(consistency(&instance, "opened-again"), FileSystemConsistent);
    instance.start().unwrap();
    drop((region, instance));
    let region = open(dir.path());
    assert_eq!(consistency(&region.instance(id).unwrap(), "lost"), CrashConsistent);
}

#[test]
fn with_a_reboot_the_guest_shuts_down_and_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    // Its own end would be that of the instance.
    let ending = spec().shutdown_behavior(ShutdownBehavior::Terminate);
    let instance = region.launch(&register(&region), ending).unwrap();
    ask(&instance, "write 0 3 before", "wrote");
    ask(&instance, "remember me", "remembered");
    let events = region.state_changes();
    let mut reader = instance.console().reader_from_now();
    let made = instance.create_image(CreateImage::new("rebooted").no_reboot(false)).unwrap();
    assert_eq!(made.consistency, ImageConsistency::FileSystemConsistent);
    reader.wait_for("GUEST READY", soon()).unwrap();
    assert_eq!(instance.state(), InstanceState::Running);
    let mut reader = instance.console().reader_from_now();
    instance.console().write_all(b"recall\n", soon()).unwrap();
    let line = reader.wait_for("\n", soon()).unwrap();
    assert!(!String::from_utf8(line).unwrap().contains("me"), "it has booted");
    assert_eq!(events.try_iter().count(), 0, "it was running all the time");
    ask(&launched(&region, &made.ami), "read 0 3", "data before");
    // It ends as it did before.
    instance.console().write_all(b"poweroff\n", soon()).unwrap();
    instance.wait_for(InstanceState::Terminated, soon()).unwrap();
}

#[test]
fn an_image_is_what_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = server(&region);
    let image = CreateImage::new("full")
        .description("all of it")
        .tag("stage", "test")
        .block_device(BlockDeviceMappingRequest::no_device("/dev/sdf"))
        .block_device(BlockDeviceMappingRequest::new("/dev/sdg").size_gib(2))
        .block_device(BlockDeviceMappingRequest::ephemeral("/dev/sdh", "ephemeral0"))
        .block_device(BlockDeviceMappingRequest::new("/dev/xvda").size_gib(4).volume_type(VolumeType::Gp2));
    let made = instance.create_image(image).unwrap();
    let kept = region.image(made.ami.id()).unwrap();
    assert_eq!((kept.description(), kept.tags().get("stage")), ("all of it", Some("test")));
    assert_eq!(kept.state(), ImageState::Available);
    let mappings = made.ami.manifest().block_device_mappings();
    let shown: Vec<(&str, Option<u32>, bool)> = (mappings.iter())
        .filter(|m| *m.kind() != BlockDeviceKind::NoDevice)
        .map(|m| (m.device_name(), m.as_ebs().map(|e| e.volume_size_gib()), m.content().is_some()))
        .collect();
    let expected = [("/dev/sdg", Some(2), false), ("/dev/sdh", None, false), ("/dev/xvda", Some(4), true)];
    assert!(expected.iter().all(|one| shown.contains(one)) && shown.len() == 3, "{shown:?}");
    assert_eq!(launched(&region, &made.ami).describe().attachments.len(), 2);
    assert_eq!(instance.describe().attachments.len(), 2, "the instance has kept its own");

    let before = files(&dir.path().join("blocks"));
    let content = *mappings.iter().find_map(|m| m.content()).unwrap();
    let named = |device: &str| BlockDeviceMappingRequest::new(device).snapshot(content).size_gib(8);
    let unknown =
        BlockDeviceMappingRequest::new("/dev/sdi").snapshot(ami_core::Digest::of(b"unknown")).size_gib(8);
    let image = || CreateImage::new("refused");
    let table = [
        (CreateImage::new("full"), ErrorKind::ImageNameDuplicate, "InvalidAMIName.Duplicate"),
        (CreateImage::new("x"), ErrorKind::MalformedImageName, "InvalidAMIName.Malformed"),
        (image().description("x".repeat(256)), ErrorKind::InvalidParameter, "InvalidParameterValue"),
        (image().tag("aws:x", ""), ErrorKind::MalformedTagKey, "InvalidTagKey.Malformed"),
        (
            image().block_device(BlockDeviceMappingRequest::no_device("/dev/xvda")),
            ErrorKind::InvalidBlockDeviceMapping,
            "InvalidBlockDeviceMapping",
        ),
        (
            image().block_device(named("/dev/sdf")),
            ErrorKind::InvalidBlockDeviceMapping,
            "InvalidBlockDeviceMapping",
        ),
        (image().block_device(unknown), ErrorKind::SnapshotNotFound, "InvalidSnapshot.NotFound"),
    ];
    for (image, kind, code) in table {
        let error = instance.create_image(image.clone().no_reboot(false)).unwrap_err();
        assert_eq!((error.kind(), error.code()), (kind, code), "{image:?}: {error}");
    }
    assert_eq!(files(&dir.path().join("blocks")), before);
}

/// Device names are names of disks: `/dev/xvdb` is `/dev/sdb`, of which an image has one.
#[test]
fn a_volume_in_the_place_of_instance_store_is_in_the_image_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let store = BlockDeviceMappingRequest::ephemeral("/dev/sdb", "ephemeral0");
    let other = BlockDeviceMappingRequest::ephemeral("/dev/sdc", "ephemeral1");
    let parent =
        server(&region).create_image(CreateImage::new("parent").block_device(store).block_device(other));
    // Its type has no instance store, whose places are free.
    let instance = launched(&region, &parent.unwrap().ami);
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap();
    region.attach_volume(volume.id, instance.id(), "/dev/xvdb").unwrap();
    let made = instance.create_image("child").unwrap().ami;
    let disks = made.manifest().block_device_mappings().iter();
    let mut disks: Vec<_> = disks.map(|m| (m.device_name(), m.content().is_some())).collect();
    disks.sort_unstable();
    assert_eq!(disks, [("/dev/sdc", false), ("/dev/sdf", true), ("/dev/xvda", true), ("/dev/xvdb", true)]);
}

#[test]
fn a_task_makes_an_image_and_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = server(&region);
    write_much(&instance, "word");
    let (task, go) = begin_slowly(&instance, "ended");
    assert!(task.id().to_string().starts_with("create-ami-"));
    task.cancel().unwrap();
    drop(go);
    assert_eq!(task.wait(soon()).unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(region.images().unwrap().len(), 1, "nothing is left of it");
    ask(&instance, "ping on", "pong on");

    let task = instance.begin_create_image("whole").unwrap();
    // What is written from here on is not in it.
    ask(&instance, "write 1 0 later", "wrote");
    let made = task.wait(soon()).unwrap();
    assert_eq!((made.progress, made.status_message.as_str()), (100, "crash-consistent"));
    let image = region.image(made.image_id.unwrap()).unwrap();
    ask(&launched(&region, image.ami()), "read 1 0", "data word-0");
    let taken = instance.begin_create_image("whole").unwrap().wait(soon()).unwrap_err();
    assert_eq!(taken.code(), "InvalidAMIName.Duplicate");

    let told = region.describe_create_image_tasks(&DescribeCreateImageTasks::new()).unwrap().items;
    assert_eq!(told.len(), 3);
    let other = region.as_account("222222222222".parse().unwrap());
    assert_eq!(other.create_image_task(task.id()).unwrap_err().kind(), ErrorKind::TaskNotFound);
    drop((region, other, instance));
    let region = open(dir.path());
    let known = region.create_image_task(task.id()).unwrap().describe();
    assert_eq!((known.status, known.status_message.as_str()), (TaskStatus::Completed, "crash-consistent"));
}
