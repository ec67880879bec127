//! Disks of the host's, which live as long as an instance runs.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::time::Duration;

use ami_core::{Ami, BlockDeviceMapping, X86_64};
use common::cable::Cable;
use common::{TestRegion, ask, check, disk, open, soon};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    BlockDeviceMappingRequest, DirectBoot, ErrorKind, ImageSource, Instance, InstanceStore, InstanceType,
    LaunchSpec, RegionOptions, VolumeSpec,
};

/// A type with two disks of a GB.
fn hardware(nvme: bool) -> InstanceType {
    let store = InstanceStore { disks: 2, disk_size_gb: 1, nvme };
    InstanceType::custom("lab.store", 1.try_into().unwrap(), 256.try_into().unwrap())
        .with_instance_store(store)
}

fn register(region: &TestRegion, mappings: &[BlockDeviceMapping]) -> Ami<X86_64> {
    let root = disk(1, 7);
    let source = ImageSource::new(&root).boot(DirectBoot::new(tiny_elf(), None, ""));
    let builder = Ami::<X86_64>::builder("base").block_devices(mappings.iter().cloned());
    region.register_image(builder, source).unwrap()
}

#[test]
fn what_is_on_it_outlasts_a_reboot_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, &[]);
    let instance = region.launch(&ami, LaunchSpec::new(hardware(true)).hibernation(true)).unwrap();
    assert_eq!(ask(&instance, "disks", "disks"), "3");
    assert_eq!(ask(&instance, "serial 2", "serial"), "ephemeral1");
    assert_eq!(ask(&instance, "size 2", "size"), "1000000000");
    assert_eq!(instance.describe().attachments.len(), 1, "they are no volumes");
    let write = |instance: &Instance| {
        for disk in [0, 1, 2] {
            ask(instance, &format!("write {disk} 9 word"), "wrote");
        }
    };
    let read = |instance: &Instance| [0, 1, 2].map(|disk| ask(instance, &format!("read {disk} 9"), "data"));
    write(&instance);
    instance.reboot().unwrap();
    assert_eq!(read(&instance), ["word", "word", "word"]);
    let mut console = instance.console().reader_from_now();
    instance.console().write_all(b"reboot\n", soon()).unwrap();
    console.wait_for("GUEST READY", soon()).unwrap();
    assert_eq!(read(&instance), ["word", "word", "word"]);

    instance.stop(Duration::ZERO).unwrap();
    instance.start().unwrap();
    assert_eq!(read(&instance), ["word", "", ""]);
    write(&instance);
    ask(&instance, "remember thought", "remembered");
    // Its machine has this one after the others.
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    region.attach_volume(volume, instance.id(), "/dev/sdg").unwrap();
    ask(&instance, "write 3 9 attached", "wrote");
    instance.hibernate(Duration::ZERO).unwrap();
    instance.start().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "thought");
    assert_eq!(read(&instance), ["word", "", ""]);
    assert_eq!(ask(&instance, "read 3 9", "data"), "attached");
    region.detach_volume(volume).unwrap();

    // Another type has what it has, and a region that is closed keeps nothing of it.
    write(&instance);
    instance.terminate().unwrap();
    assert_eq!(fs::read_dir(dir.path().join("instances")).unwrap().count(), 0);
}

#[test]
fn nothing_of_it_has_a_name_in_the_region() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = region.launch(&register(&region, &[]), LaunchSpec::new(hardware(true))).unwrap();
    ask(&instance, "write 1 0 scratch", "wrote");
    let id = instance.id();
    assert_eq!(fs::read_dir(dir.path().join("instances")).unwrap().count(), 0);
    drop((instance, region));
    let region = open(dir.path());
    let instance = region.instance(id).unwrap();
    instance.set_instance_type("t2.nano".parse().unwrap()).unwrap();
    instance.start().unwrap();
    assert_eq!(ask(&instance, "disks", "disks"), "1");
    instance.stop(Duration::ZERO).unwrap();
    instance.set_instance_type(hardware(true)).unwrap();
    instance.start().unwrap();
    assert_eq!(
        (ask(&instance, "disks", "disks"), ask(&instance, "read 1 0", "data")),
        ("3".into(), "".into())
    );
}

#[test]
fn mappings_decide_which_disks_an_instance_has_unless_they_are_nvme() {
    let dir = tempfile::tempdir().unwrap();
    let network = Cable::default();
    let options = RegionOptions::new().network(network.clone());
    let region = options.open(dir.path(), FakeHypervisor::new()).unwrap();
    let name = |number: u32| format!("/dev/sd{}", char::from(b'f' + u8::try_from(number).unwrap()));
    let ephemeral = |number| BlockDeviceMapping::ephemeral(name(number), format!("ephemeral{number}"));
    // Of the third the type knows nothing.
    let ami = register(&region, &[ephemeral(1), ephemeral(2)]);
    let another = BlockDeviceMappingRequest::ephemeral(name(0), "ephemeral0");
    let none = || BlockDeviceMappingRequest::no_device("/dev/sdg");
    for (nvme, changes, serials) in [
        (false, vec![], vec!["ephemeral1"]),
        (false, vec![another], vec!["ephemeral0", "ephemeral1"]),
        (false, vec![none()], vec![]),
        (false, vec![BlockDeviceMappingRequest::new("/dev/sdg").size_gib(1)], vec!["vol"]),
        (true, vec![], vec!["ephemeral0", "ephemeral1"]),
        (true, vec![none()], vec!["ephemeral0", "ephemeral1"]),
    ] {
        let spec = LaunchSpec::new(hardware(nvme));
        let spec = changes.iter().cloned().fold(spec, LaunchSpec::block_device);
        let instance = region.launch(&ami, spec).unwrap();
        let disks: usize = ask(&instance, "disks", "disks").parse().unwrap();
        let found: Vec<String> =
            (1..disks).map(|disk| ask(&instance, &format!("serial {disk}"), "serial")).collect();
        let same = found.iter().zip(&serials).all(|(found, serial)| found.starts_with(serial));
        assert!(found.len() == serials.len() && same, "{nvme} {changes:?}: {found:?}");
        // The guest is told of the disks that it has by their mappings, and of no others, whatever changes.
        let told: Vec<BlockDeviceMapping> = (0..2)
            .filter(|number| !nvme && found.contains(&format!("ephemeral{number}")))
            .map(ephemeral)
            .collect();
        assert_eq!(network.told(), told, "{changes:?}");
        instance.set_stop_protection(false).unwrap();
        assert_eq!(network.told(), told, "{changes:?}");
        instance.terminate().unwrap();
    }
    let root = BlockDeviceMappingRequest::ephemeral("/dev/xvda", "ephemeral0");
    let refused = region.launch(&ami, LaunchSpec::new(hardware(false)).block_device(root)).unwrap_err();
    let code = "InvalidBlockDeviceMapping";
    check(&refused, ErrorKind::InvalidBlockDeviceMapping, code, &["the root device, is an EBS volume"]);
}

#[test]
fn a_volume_is_not_attached_where_instance_store_is() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let scratch = BlockDeviceMapping::ephemeral("/dev/sdb", "ephemeral0");
    let none = BlockDeviceMapping::ephemeral("/dev/sdf", "ephemeral9");
    let instance =
        region.launch(&register(&region, &[scratch, none]), LaunchSpec::new(hardware(false))).unwrap();
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    for taken in ["/dev/sdb", "/dev/xvdb"] {
        let refused = region.attach_volume(volume, instance.id(), taken).unwrap_err();
        check(&refused, ErrorKind::InvalidParameter, "InvalidParameterValue", &["instance store", "already"]);
    }
    // Of this the type has none.
    region.attach_volume(volume, instance.id(), "/dev/sdf").unwrap();
}

/// A type may come from anywhere, as a part of what somebody asks for.
#[test]
fn more_disks_than_there_are_names_for_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, &[]);
    let vast = InstanceStore { disks: u32::MAX, disk_size_gb: 1, nvme: true };
    let refused = region.launch(&ami, LaunchSpec::new(hardware(true).with_instance_store(vast))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidParameter);
    assert!(region.instances().is_empty());
}
