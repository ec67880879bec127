//! Images whose root device is instance store, and their instances: what they keep, how they end, and what they refuse.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ami_core::{Ami, BlockDeviceMapping, DescribeImages, Digest, Filter, RootDeviceType, X86_64};
use common::{TestRegion, ask, check, disk, open, soon};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    BlockDeviceMappingRequest, CopyImage, DescribeInstances, DescribeVolumes, DirectBoot, ErrorKind,
    ImageSource, Instance, InstanceState, InstanceStore, InstanceType, LaunchSpec, RegionOptions,
    ShutdownBehavior, VolumeSpec,
};
use storage_block::keys::LocalKey;
use storage_block::{Disk, MemoryDisk, RawFile};

/// A type with a disk of a GB.
fn hardware(nvme: bool) -> InstanceType {
    InstanceType::custom("lab.store", 1.try_into().unwrap(), 256.try_into().unwrap())
        .with_instance_store(InstanceStore { disks: 1, disk_size_gb: 1, nvme })
}

fn spec() -> LaunchSpec {
    LaunchSpec::new(hardware(false))
}

fn source(root: &Disk) -> ImageSource<'_> {
    let boot = DirectBoot::new(tiny_elf(), None, "");
    ImageSource::new(root).boot(boot).root_device_type(RootDeviceType::InstanceStore)
}

/// An image with a root device of instance store, a disk of it and a volume that outlives its instances.
fn register(region: &TestRegion, name: &str) -> Ami<X86_64> {
    let scratch = BlockDeviceMapping::ephemeral("/dev/sdb", "ephemeral0");
    let data = BlockDeviceMapping::blank("/dev/sdf", 1).delete_on_termination(false);
    let builder = Ami::<X86_64>::builder(name).block_devices([scratch, data]);
    region.register_image(builder, source(&disk(2, 7))).unwrap()
}

/// The same without more disks.
fn register_bare(region: &TestRegion) -> Ami<X86_64> {
    region.register_image(Ami::<X86_64>::builder("bare"), source(&disk(2, 7))).unwrap()
}

/// Tells the guest a line after which it is gone.
fn tell(instance: &Instance, line: &str) {
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
}

fn left_of_instances(dir: &Path) -> usize {
    fs::read_dir(dir.join("instances")).unwrap().count()
}

#[test]
fn what_is_on_it_outlasts_a_reboot_and_goes_with_the_instance() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "base");
    let manifest = ami.manifest();
    assert_eq!((manifest.root_device_type(), manifest.root_volume()), (RootDeviceType::InstanceStore, None));
    for (value, found) in [("instance-store", 1), ("ebs", 0)] {
        let filter = Filter::new("root-device-type", [value]).unwrap();
        let images = region.describe_images(&DescribeImages::new().filter(filter)).unwrap().items;
        assert_eq!(images.len(), found, "{value}");
    }
    let instance = region.launch(&ami, spec()).unwrap();
    let described = instance.describe();
    assert_eq!(described.root_device_type, RootDeviceType::InstanceStore);
    assert_eq!((described.root_device_name.as_str(), described.attachments.len()), ("/dev/xvda", 1));
    assert_eq!(described.shutdown_behavior, ShutdownBehavior::Terminate);
    for (value, found) in [("instance-store", 1), ("ebs", 0)] {
        let request = DescribeInstances::new().filter("root-device-type", [value]);
        assert_eq!(region.describe_instances(&request).unwrap().items.len(), found, "{value}");
    }
    assert_eq!(region.describe_volumes(&DescribeVolumes::new()).unwrap().items.len(), 1);

    // It is the first of its disks, with the content and the size that the image says.
    assert_eq!(ask(&instance, "disks", "disks"), "3");
    assert_eq!(
        (ask(&instance, "serial 0", "serial"), ask(&instance, "size 0", "size")),
        ("root".into(), "1073741824".into())
    );
    assert_eq!(ask(&instance, "serial 2", "serial"), "ephemeral0");
    // The image may go meanwhile: what was not read before is there.
    region.deregister_image(ami.id()).unwrap();
    let other = disk(1, 99);
    region.register_image(Ami::<X86_64>::builder("other"), source(&other)).unwrap();
    let content = |instance: &Instance| ask(instance, "read 0 2048", "data");
    let first = content(&instance);
    let write =
        || [0, 1, 2].iter().for_each(|disk| drop(ask(&instance, &format!("write {disk} 9 word"), "wrote")));
    let read = || [0, 1, 2].map(|disk| ask(&instance, &format!("read {disk} 9"), "data"));
    write();
    instance.reboot().unwrap();
    assert_eq!((read(), content(&instance)), (["word", "word", "word"].map(String::from), first));
    let mut console = instance.console().reader_from_now();
    tell(&instance, "reboot");
    console.wait_for("GUEST READY", soon()).unwrap();
    assert_eq!(read(), ["word", "word", "word"]);

    instance.terminate().unwrap();
    assert_eq!(left_of_instances(dir.path()), 0);
    let kept = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    assert_eq!(kept.len(), 1);
}

#[test]
fn volumes_come_and_go_and_its_own_place_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = region.launch(&register_bare(&region), spec()).unwrap();
    ask(&instance, "write 0 0 object", "wrote");
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    for device in ["/dev/xvda", "/dev/sda", "xvda"] {
        let taken = region.attach_volume(volume, instance.id(), device).unwrap_err();
        check(&taken, ErrorKind::InvalidParameter, "InvalidParameterValue", &[]);
    }
    region.attach_volume(volume, instance.id(), "/dev/sdf").unwrap();
    ask(&instance, "write 1 0 data", "wrote");
    instance.reboot().unwrap();
    assert_eq!(
        (ask(&instance, "read 0 0", "data"), ask(&instance, "read 1 0", "data")),
        ("object".into(), "data".into())
    );
    region.detach_volume(volume).unwrap();
    assert_eq!(ask(&instance, "read 0 0", "data"), "object");
    instance.terminate().unwrap();
    region.delete_volume(volume).unwrap();
}

#[test]
fn its_end_is_the_end_of_its_instance() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = FakeHypervisor::new();
    let region = RegionOptions::new().open(dir.path(), hypervisor.clone()).unwrap();
    let ami = register(&region, "base");
    let ended = |instance: &Instance, code: &str| {
        instance.wait_for(InstanceState::Terminated, soon()).unwrap();
        assert_eq!(instance.describe().state_reason.unwrap().code, code);
        assert_eq!(left_of_instances(dir.path()), 0, "{code}");
        check(&instance.start().unwrap_err(), ErrorKind::Unsupported, "UnsupportedOperation", &[]);
    };
    for (line, code) in [
        ("poweroff", "Client.InstanceInitiatedShutdown"),
        ("crash", "Client.InternalError"),
        ("panic", "Client.InternalError"),
    ] {
        let spec = spec().shutdown_behavior(ShutdownBehavior::Stop);
        let instance = region.launch(&ami, spec).unwrap();
        tell(&instance, line);
        ended(&instance, code);
    }
    let instance = region.launch(&ami, spec()).unwrap();
    hypervisor.fail_next_create();
    instance.reboot().unwrap_err();
    ended(&instance, "Server.InternalError");
    drop(instance);
    // One that could not be launched leaves nothing either.
    hypervisor.fail_next_create();
    region.launch(&ami, spec()).unwrap_err();
    assert_eq!(left_of_instances(dir.path()), 0);

    // Nor does one whose region is closed, but for the volumes that are to stay.
    let instance = region.launch(&ami, spec()).unwrap();
    let (id, volume) = (instance.id(), instance.describe().attachments[0].volume_id);
    ask(&instance, "write 1 0 kept", "wrote");
    drop((instance, region));
    assert!(!dir.path().join(format!("instances/{id}.root")).exists());
    let region = open(dir.path());
    ended(&region.instance(id).unwrap(), "Server.InternalError");
    assert_eq!(left_of_instances(dir.path()), 0);
    let heir = region.launch(&register_bare(&region), spec()).unwrap();
    region.attach_volume(volume, heir.id(), "/dev/sdf").unwrap();
    assert_eq!(ask(&heir, "read 1 0", "data"), "kept");
}

#[test]
fn it_is_not_stopped_started_hibernated_changed_or_imaged() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = region.launch(&register(&region, "base"), spec()).unwrap();
    let before = instance.describe();
    let refused = [
        ("stopped", instance.stop(Duration::ZERO)),
        ("stopped", instance.stop(Duration::from_secs(60))),
        ("started", instance.start()),
        ("hibernated", instance.hibernate(Duration::ZERO)),
        ("instance type", instance.set_instance_type(hardware(true))),
        ("stopped by its guest", instance.set_shutdown_behavior(ShutdownBehavior::Stop)),
        ("made an image of", instance.create_image("image").map(drop)),
    ];
    for (what, refused) in refused {
        let says = ["is instance-store, not ebs", what];
        check(&refused.unwrap_err(), ErrorKind::Unsupported, "UnsupportedOperation", &says);
    }
    assert_eq!(instance.describe(), before);
    ask(&instance, "ping x", "pong x");
}

#[test]
fn what_cannot_have_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let key = LocalKey::from_bytes([7; 32]);
    let region = RegionOptions::new()
        .keys(Arc::new(key))
        .open(dir.path().join("region"), FakeHypervisor::new())
        .unwrap();
    let ami = register(&region, "base");
    let mapping = "InvalidBlockDeviceMapping";
    let combination = "InvalidParameterCombination";
    let root =
        |size| BlockDeviceMappingRequest::new("/dev/xvda").snapshot(Digest::of(b"other")).size_gib(size);
    for (spec, kind, code, says) in [
        // Types without instance store, or with disks that nothing boots from.
        (
            LaunchSpec::new("t2.nano".parse().unwrap()),
            ErrorKind::InvalidParameterCombination,
            combination,
            "t2.nano",
        ),
        (LaunchSpec::new(hardware(true)), ErrorKind::InvalidParameterCombination, combination, "lab.store"),
        (
            spec().hibernation(true),
            ErrorKind::UnsupportedHibernation,
            "UnsupportedHibernationConfiguration",
            "does not hibernate",
        ),
        (spec().block_device(root(8)), ErrorKind::InvalidBlockDeviceMapping, mapping, "is instance store"),
        (
            spec().block_device(BlockDeviceMappingRequest::new("/dev/sda").size_gib(8)),
            ErrorKind::InvalidBlockDeviceMapping,
            mapping,
            "is instance store",
        ),
        (
            spec().block_device(BlockDeviceMappingRequest::ephemeral("/dev/xvda", "ephemeral0")),
            ErrorKind::InvalidBlockDeviceMapping,
            mapping,
            "is instance store",
        ),
        (
            spec().block_device(BlockDeviceMappingRequest::no_device("/dev/xvda")),
            ErrorKind::InvalidBlockDeviceMapping,
            mapping,
            "cannot be left out",
        ),
    ] {
        check(&region.launch(&ami, spec).unwrap_err(), kind, code, &[says]);
    }
    assert!(region.instances().is_empty());

    let try_register =
        |source: ImageSource<'_>| region.register_image(Ami::<X86_64>::builder("new"), source).unwrap_err();
    let small = disk(1, 1);
    check(
        &try_register(source(&small).encrypted(true)),
        ErrorKind::InvalidParameterCombination,
        combination,
        &[],
    );
    let large = tempfile::tempfile().unwrap();
    large.set_len((10 << 30) + 4096).unwrap();
    let large = RawFile::from_file(large, true).unwrap().into_disk();
    check(
        &try_register(source(&large)),
        ErrorKind::InvalidBlockDeviceMapping,
        mapping,
        &["have 1 to 10 GiB"],
    );
    let secret = region.create_volume(VolumeSpec::new(1).encrypted(true)).unwrap();
    let secret = region.create_snapshot(secret.id, "secret").unwrap();
    let of_secret = ImageSource::of_snapshot(secret.id)
        .boot(DirectBoot::new(tiny_elf(), None, ""))
        .root_device_type(RootDeviceType::InstanceStore);
    check(&try_register(of_secret), ErrorKind::InvalidBlockDeviceMapping, mapping, &["encrypted"]);

    // Copied it is as it was, and not encrypted.
    let to = open(&dir.path().join("to"));
    let copy = to.copy_image_from(&region, ami.id(), CopyImage::new("copy")).unwrap();
    assert_eq!(copy.digest(), ami.digest());
    let copied = to.launch(&copy.typed::<X86_64>().unwrap(), spec()).unwrap();
    ask(&copied, "read 0 0", "data");
    let encrypted =
        to.copy_image_from(&region, ami.id(), CopyImage::new("secret").encrypted(true)).unwrap_err();
    check(&encrypted, ErrorKind::InvalidParameterCombination, combination, &["cannot be encrypted"]);
}

#[test]
fn it_boots_what_is_on_it_then() {
    let Some(bytes) = common::ext4(&[("boot/vmlinuz-1", &tiny_elf()), ("boot/initrd.img-1", b"initrd")])
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let root = MemoryDisk::from_vec(bytes).unwrap().into_disk();
    let source = ImageSource::new(&root).root_device_type(RootDeviceType::InstanceStore);
    let ami = region.register_image(Ami::<X86_64>::builder("base"), source).unwrap();
    let instance = region.launch(&ami, spec()).unwrap();
    instance.reboot().unwrap();
    // What it boots is read at each boot, of the disk that it has written.
    (0..64).for_each(|sector| drop(ask(&instance, &format!("write 0 {sector} gone"), "wrote")));
    let refused = instance.reboot().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotBootable, "{refused}");
    assert_eq!(instance.state(), InstanceState::Terminated);
}
