//! A region with a record of every kind that has been added since its version of the format began must open for ever,
//! too: what is beside `golden.rs`, whose region knows nothing of them.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/records.rs"]
mod records;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ami_core::{Ami, VolumeType, X86_64};
use common::{TestRegion, ask, files, soon};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    BlockDeviceMappingRequest, DescribeExportImageTasks, DescribeImportImageTasks, DescribeSnapshots,
    DescribeVolumes, DirectBoot, ImageSource, InstanceState, InstanceStore, InstanceType, LaunchSpec,
    LaunchTemplateVersionSpec, ModifyVolume, RegionOptions, VolumeSpec,
};
use records::{counts, fields, fields_of_4, make_small, old_region, records};
use storage_block::keys::LocalKey;
use storage_block::{Disk, MemoryDisk};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2-additions")
}

fn disk(word: &str) -> Disk {
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    disk.write_at(word.as_bytes(), 0).unwrap();
    disk
}

/// Opens it with the keys of what is encrypted in it.
fn open(dir: &Path) -> TestRegion {
    let key = LocalKey::from_bytes([7; 32]);
    let options = RegionOptions::new().name("eu-central-1".parse().unwrap()).keys(Arc::new(key));
    options.open(dir, FakeHypervisor::new()).unwrap()
}

/// A type with disks of the host's that have to be mapped.
fn hardware() -> InstanceType {
    InstanceType::custom("lab.store", 1.try_into().unwrap(), 256.try_into().unwrap())
        .with_instance_store(InstanceStore { disks: 1, disk_size_gb: 1, nvme: false })
}

/// Makes a launch template with two versions, an image that is a copy of another, a volume that was modified, an encrypted
/// one and a snapshot of it, an instance that hibernates and has instance store, and tasks.
fn make(dir: &Path) {
    let region = open(dir);
    let root = disk("class");
    let boot = || DirectBoot::new(tiny_elf(), None, "console=ttyS0");
    let source = ImageSource::new(&root).boot(boot());
    let web = region.register_image(Ami::<X86_64>::builder("web"), source).unwrap();
    region.copy_image(web.id(), "copy").unwrap();

    let nano = || LaunchSpec::new("t2.nano".parse().unwrap());
    let first = LaunchTemplateVersionSpec::from(nano().image_id(web.id()).hibernation(true));
    let template = region.create_launch_template("web", first).unwrap();
    let second = nano().image_id(web.id()).user_data("#!/bin/sh").stop_protection(true);
    region.create_launch_template_version(template.id, second).unwrap();

    let volume = region.create_volume(VolumeSpec::new(1)).unwrap();
    let larger = ModifyVolume::new().size_gib(2).volume_type(VolumeType::Gp2);
    region.modify_volume(volume.id, larger).unwrap();
    let secret = region.create_volume(VolumeSpec::new(1).encrypted(true)).unwrap();
    region.create_snapshot(secret.id, "secret").unwrap();

    let scratch = BlockDeviceMappingRequest::ephemeral("/dev/sdb", "ephemeral0");
    let spec = LaunchSpec::new(hardware()).hibernation(true).block_device(scratch);
    let asleep = region.launch(&web, spec).unwrap();
    ask(&asleep, "write 0 0 object", "wrote");
    asleep.hibernate(Duration::ZERO).unwrap();

    let import =
        region.import_image(Ami::<X86_64>::builder("imported"), disk("import"), Some(boot())).unwrap();
    import.wait(soon()).unwrap();
    let refused =
        region.import_image(Ami::<X86_64>::builder("imported"), disk("refused"), Some(boot())).unwrap();
    refused.wait(soon()).unwrap_err();
    let export = region.export_image(web.id(), "/dev/xvda", |_, _| Ok(())).unwrap();
    export.wait(soon()).unwrap();
}

/// Not a test: writes the golden region, once.
#[test]
#[ignore = "writes the golden region of what was added to a version of the format"]
fn write() {
    assert!(!golden().exists(), "what was written once stays as it is");
    make(&golden());
    make_small(&golden());
}

#[test]
fn what_was_added_is_there() {
    let (_dir, path) = old_region(&golden());
    let region = open(&path);
    let image =
        |name: &str| region.images().unwrap().into_iter().find(|image| image.ami().name() == name).unwrap();
    assert_eq!(image("copy").source_image().unwrap().id, image("web").ami().id());
    image("imported");

    let template = region.launch_template("web").unwrap();
    assert_eq!((template.default_version, template.latest_version), (1, 2));
    let from = |version: u64| region.launch_from_template("web", version, LaunchSpec::default()).unwrap();
    let first = from(1).instances.remove(0);
    assert!(first.describe().hibernation);
    ask(&first, "ping x", "pong x");
    let second = from(2).instances.remove(0);
    assert!(second.describe().stop_protection && second.user_data().is_some());

    let volumes = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    let modified = volumes.iter().find(|v| v.size_gib == 2).unwrap();
    let modification = region
        .describe_volumes_modifications(&DescribeVolumes::new().id(modified.id))
        .unwrap()
        .items
        .remove(0);
    assert_eq!((modification.original_size_gib, modification.target_size_gib), (1, 2));
    assert_eq!(volumes.iter().filter(|v| v.kms_key_id.is_some()).count(), 1);
    let snapshot = region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items.remove(0);
    assert!(snapshot.kms_key_id.is_some());
    region.create_volume(VolumeSpec::of_snapshot(snapshot.id)).unwrap();

    let asleep = region.instances().into_iter().find(|i| i.state() == InstanceState::Stopped).unwrap();
    let described = asleep.describe();
    assert_eq!(described.state_reason.unwrap().code, "Client.UserInitiatedHibernate");
    assert_eq!(described.instance_type, hardware());
    asleep.start().unwrap();
    ask(&asleep, "disks", "disks 2");
    ask(&asleep, "read 0 0", "data object");
}

/// Those of the golden region ended long ago, and are told of no more.
#[test]
fn its_tasks_are_read_and_forgotten() {
    let (_dir, path) = old_region(&golden());
    let before = records(&path);
    assert_eq!((before["import-image-tasks"].len(), before["export-image-tasks"].len()), (2, 1));
    let region = open(&path);
    let imports = region.describe_import_image_tasks(&DescribeImportImageTasks::new()).unwrap().items;
    let exports = region.describe_export_image_tasks(&DescribeExportImageTasks::new()).unwrap().items;
    let remembered = imports.len() + exports.len();
    drop(region);
    let after = records(&path);
    let left =
        ["import-image-tasks", "export-image-tasks"].map(|table| after.get(table).map_or(0, |t| t.len()));
    assert_eq!(left.iter().sum::<usize>(), remembered);
}

#[test]
fn a_new_region_has_the_same_records_as_the_golden_one() {
    let (_dir, old) = old_region(&golden());
    let new = old.with_file_name("new");
    make(&new);
    let (of_old, mut of_new) = (records(&old), records(&new));
    // The version after it has one.
    of_new.remove("journal").unwrap();
    let mut known = fields_of_4(&of_new);
    assert!(known.remove("instances.description.state_transition_reason"), "version 4 has it");
    assert_eq!(known, fields(&of_old));
    assert_eq!(counts(&of_new), counts(&of_old));
    let saved = |dir: &Path| files(dir).into_keys().filter(|name| name.starts_with("hibernated/")).count();
    assert_eq!((saved(&old), saved(&new)), (1, 1));
}
