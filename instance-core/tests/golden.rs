//! A region that an earlier version made must open for ever: `docs/region-format.md` says what is in it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/records.rs"]
mod records;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ami_core::{
    Ami, BlockDeviceMapping, Digest, Grantee, ModifyImageAttribute, OperatingSystem, Software, VolumeType,
    X86_64,
};
use common::{TestRegion, ask, everything, files, open};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    BlockDeviceMappingRequest, DescribeSnapshots, DescribeVolumes, DirectBoot, ErrorKind, ImageSource,
    Instance, InstanceState, LaunchSpec, RegionOptions, ShutdownBehavior, VolumeSpec, VolumeState,
};
use records::{counts, fields, fields_of_4, make_small, records, without_sources};
use redb::TableDefinition;
use serde_json::Value;
use storage_block::MemoryDisk;

const OTHER: &str = "210987654321";
const COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda1";

/// The versions of the format that there have been.
const VERSIONS: [u32; 4] = [1, 2, 3, 4];

/// The region that a version wrote.
fn golden(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

fn newest() -> u32 {
    VERSIONS[VERSIONS.len() - 1]
}

fn spec(name: &str) -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
        .user_data("#!/bin/sh")
        .key_name("laptop")
        .client_token(name)
        .termination_protection(name == "object")
        .volume_tag("Name", name)
        .tag("Name", name)
        .shutdown_behavior(ShutdownBehavior::Terminate)
}

/// Makes a region with a record of every kind: images of a disk, of a snapshot and of an instance, one that was
/// deregistered, instances that are stopped, their volumes, and those and the snapshot of another account.
fn make(dir: &Path) {
    let options =
        RegionOptions::new().name("eu-central-1".parse().unwrap()).account("123456789012".parse().unwrap());
    let region = options.open(dir, FakeHypervisor::new()).unwrap();
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    disk.write_at(b"class", 0).unwrap();
    let register = |name: &str| {
        let boot = DirectBoot::new(tiny_elf(), Some(b"initrd".to_vec()), COMMAND_LINE);
        let builder = Ami::<X86_64>::builder(name)
            .operating_system(OperatingSystem::linux("debian", "12"))
            .software(Software::new("nginx", "1.22.1-9"))
            .block_device(BlockDeviceMapping::blank("/dev/sdf", 1).delete_on_termination(false));
        region.register_image(builder, ImageSource::new(&disk).boot(boot)).unwrap()
    };
    let launch = |ami: &Ami<X86_64>, name: &str| region.launch(ami, spec(name)).unwrap();
    let (web, former) = (register("web"), register("former"));
    let instance = launch(&web, "object");
    ask(&instance, "write 0 0 object", "wrote");
    ask(&instance, "write 1 0 data", "wrote");
    instance.stop(Duration::ZERO).unwrap();
    instance.create_image("web-2").unwrap();
    launch(&former, "orphan").stop(Duration::ZERO).unwrap();
    region.deregister_image(former.id()).unwrap();

    let other = region.as_account(OTHER.parse().unwrap());
    let volume = other.create_volume(VolumeSpec::new(1)).unwrap();
    let snapshot = other.create_snapshot(volume.id, "of a volume").unwrap();
    other.create_tags(&[snapshot.id.into()], &[("stage", "golden")]).unwrap();
    other.create_volume(VolumeSpec::of_snapshot(snapshot.id).volume_type(VolumeType::Gp2)).unwrap();
    let source = ImageSource::of_snapshot(snapshot.id).boot(DirectBoot::new(tiny_elf(), None, COMMAND_LINE));
    let ami = other.register_image(Ami::<X86_64>::builder("of-a-snapshot"), source).unwrap();
    let public = ModifyImageAttribute::new().add_launch_permission(Grantee::All);
    other.modify_image_attribute(ami.id(), &public).unwrap();
}

/// A copy of the golden region.
fn old_region(version: u32) -> (tempfile::TempDir, PathBuf) {
    records::old_region(&golden(version))
}

/// Not a test: writes the golden region, once for each version of the format.
#[test]
#[ignore = "writes the golden region of a new version of the format"]
fn write() {
    let golden = golden(newest());
    assert!(!golden.exists(), "what was written once stays as it is");
    make(&golden);
    make_small(&golden);
}

fn by_name(region: &TestRegion, name: &str) -> Instance {
    region.instances().into_iter().find(|i| i.describe().tags.get("Name").is_some_and(|n| n == name)).unwrap()
}

#[test]
fn a_region_of_every_version_opens_and_its_instances_start() {
    VERSIONS.into_iter().for_each(opens_and_starts);
}

fn opens_and_starts(version: u32) {
    let (_dir, path) = old_region(version);
    let region = open(&path);
    assert_eq!(
        (region.name().as_str(), region.account().to_string()),
        ("eu-central-1", "123456789012".into())
    );
    let mut images = region.images().unwrap();
    images.retain(|image| image.ami().owner() == region.account());
    let mut names: Vec<&str> = images.iter().map(|image| image.ami().name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["web", "web-2"]);
    let image = |name: &str| images.iter().find(|image| image.ami().name() == name).unwrap().ami();
    assert_eq!(image("web-2").manifest().parent(), Some(&image("web").digest()));

    let instance = by_name(&region, "object");
    let described = instance.describe();
    assert_eq!((described.state, described.image_id), (InstanceState::Stopped, image("web").id()));
    assert_eq!(described.instance_type.name(), "t2.nano");
    assert_eq!(described.shutdown_behavior, ShutdownBehavior::Terminate);
    assert_eq!(described.state_reason.unwrap().code, "Client.UserInitiatedShutdown");
    let devices: Vec<(&str, bool)> =
        described.attachments.iter().map(|a| (a.device_name.as_str(), a.delete_on_termination)).collect();
    assert_eq!(devices, [("/dev/xvda", true), ("/dev/sdf", false)]);
    instance.start().unwrap();
    ask(&instance, "read 0 0", "data object");
    ask(&instance, "read 1 0", "data data");
    assert_eq!((described.owner, described.root_device_name.as_str()), (*region.account(), "/dev/xvda"));
    assert_eq!(described.instance_type, "t2.nano".parse().unwrap());
    let volumes = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    assert!(volumes.len() == 4 && volumes.iter().all(|v| v.state == VolumeState::InUse), "{volumes:?}");
    if version > 1 {
        knows_what_version_2_knows(&region, &instance);
    }

    // Its image has the bytes that it had, and the one that is gone is known for what it was.
    for (name, bytes) in [("web", "data class"), ("web-2", "data object")] {
        let new = region.launch(image(name), LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
        ask(&new, "read 0 0", bytes);
        new.terminate().unwrap();
    }
    let orphan = by_name(&region, "orphan");
    orphan.start().unwrap();
    let made = orphan.create_image("orphan").unwrap();
    assert_eq!(made.ami.manifest().software().len(), 1);
}

fn knows_what_version_2_knows(region: &TestRegion, instance: &Instance) {
    let described = instance.describe();
    assert_eq!(
        (described.key_name.as_deref(), described.client_token.as_deref()),
        (Some("laptop"), Some("object"))
    );
    assert_eq!(instance.user_data().as_deref(), Some(&b"#!/bin/sh"[..]));
    // What its launch was asked for with is known by its digest, in this version too.
    let ami = region.image(described.image_id).unwrap().ami().typed::<X86_64>().unwrap();
    assert_eq!(region.launch(&ami, spec("object")).unwrap().id(), instance.id());
    assert_eq!(instance.terminate().unwrap_err().code(), "OperationNotPermitted");
    let other = region.as_account(OTHER.parse().unwrap());
    let [snapshot] = &other.describe_snapshots(&DescribeSnapshots::new()).unwrap().items[..] else {
        panic!()
    };
    assert_eq!((snapshot.description.as_str(), snapshot.tags.get("stage")), ("of a volume", Some("golden")));
    assert_eq!(other.delete_snapshot(snapshot.id).unwrap_err().code(), "InvalidSnapshot.InUse");
    let mut types: Vec<_> = (other.describe_volumes(&DescribeVolumes::new()).unwrap().items.iter())
        .map(|v| (v.snapshot_id, v.volume_type))
        .collect();
    types.sort();
    assert_eq!(types, [(None, VolumeType::Gp3), (Some(snapshot.id), VolumeType::Gp2)]);
    let public = region.images().unwrap();
    let public = public.iter().find(|image| image.ami().name() == "of-a-snapshot").unwrap();
    region.launch(public.ami(), LaunchSpec::new("t2.nano".parse().unwrap())).unwrap().terminate().unwrap();
}

/// What a launch was asked for with is known by a digest alone: this version has to come to the same one.
#[test]
fn a_launch_that_an_earlier_version_made_is_not_made_again() {
    let (_dir, path) = old_region(2);
    for _ in 0..2 {
        let region = open(&path);
        let known = region.instances().len();
        let web = by_name(&region, "object").describe().image_id;
        let web = region.image(web).unwrap().ami().typed::<X86_64>().unwrap();
        let object = by_name(&region, "object");
        let again = region.run_instances(&web, spec("object")).unwrap();
        assert_eq!(again.instances.iter().map(Instance::id).collect::<Vec<_>>(), [object.id()]);
        assert_eq!(again.id, object.describe().reservation_id);
        assert_eq!(object.state(), InstanceState::Stopped, "it is not started for that");
        // Each of what it was asked for with counts.
        for other in [
            spec("object").instance_type("t2.micro".parse().unwrap()),
            spec("object").count(1, 2),
            spec("object").user_data("#!/bin/true"),
            spec("object").key_name("desktop"),
            spec("object").tag("stage", "test"),
            spec("object").volume_tag("stage", "test"),
            spec("object").block_device(BlockDeviceMappingRequest::new("/dev/sdg").size_gib(1)),
            spec("object").shutdown_behavior(ShutdownBehavior::Stop),
            spec("object").termination_protection(false),
            spec("object").stop_protection(true),
            spec("object").hibernation(true),
            spec("orphan"),
        ] {
            let other = other.client_token("object");
            let refused = region.run_instances(&web, other).unwrap_err();
            let code = "IdempotentParameterMismatch";
            common::check(&refused, ErrorKind::IdempotentParameterMismatch, code, &[]);
        }
        // So does the image.
        let refused = region.run_instances(&web, spec("orphan")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::IdempotentParameterMismatch);
        assert_eq!(region.instances().len(), known);
    }
    // Version 1 knew no tokens: what comes with one is new there, once.
    let (_dir, path) = old_region(1);
    let launch = |region: &TestRegion| {
        let image = by_name(region, "object").describe().image_id;
        let image = region.image(image).unwrap().ami().typed::<X86_64>().unwrap();
        region.launch(&image, spec("new").client_token("object")).unwrap().id()
    };
    let (first, known) = {
        let region = open(&path);
        (launch(&region), region.instances().len())
    };
    let region = open(&path);
    assert_eq!((launch(&region), region.instances().len()), (first, known));
}

#[test]
fn opening_a_region_of_this_version_changes_nothing() {
    let (_dir, path) = old_region(newest());
    let before = records(&path);
    let kept: BTreeMap<_, _> =
        files(&path).into_iter().filter(|(name, _)| name.starts_with("boot/")).collect();
    assert_eq!(kept.len(), 2, "a kernel and an initial RAM disk");
    for name in kept.keys() {
        let content = fs::read(path.join(name)).unwrap();
        assert_eq!(name.strip_prefix("boot/").unwrap(), Digest::of(&content).to_hex());
    }
    let first = everything(&open(&path), &path);
    assert_eq!(everything(&open(&path), &path), first);
    assert!(kept.keys().all(|name| first.contains_key(name)));
    assert_eq!(records(&path), before);
}

/// Whether all that `old` says is in `new`, but for the version.
fn says_as_much(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => old.iter().all(|(name, value)| {
            name == "format" || new.get(name).is_some_and(|other| says_as_much(value, other))
        }),
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| says_as_much(old, new))
        }
        (old, new) => old == new,
    }
}

#[test]
fn an_old_region_becomes_one_of_this_version_and_loses_nothing() {
    let (_dir, path) = old_region(1);
    let before = records(&path);
    drop(open(&path));
    let after = records(&path);
    assert_eq!(after["region"]["region"]["format"], newest());
    for (table, all) in &before {
        assert_eq!(all.keys().collect::<Vec<_>>(), after[table].keys().collect::<Vec<_>>(), "{table}");
        for (key, record) in all {
            assert!(says_as_much(record, &after[table][key]), "{table} {key}: {record}");
        }
    }
    drop(open(&path));
    assert_eq!(records(&path), after, "once is enough");
    // Every field of this version is there.
    let (_dir, newest) = old_region(newest());
    let newest = records(&newest);
    let of_both = |name: &String| before.keys().any(|table| name.split('.').next() == Some(table));
    let optional = |name: &String| {
        [".ebs_bandwidth", "launch_permissions", ".state_transition_reason"]
            .iter()
            .any(|part| name.contains(part))
    };
    let missing: Vec<_> = (fields(&newest).difference(&fields(&after)))
        .filter(|name| of_both(name) && !optional(name))
        .cloned()
        .collect();
    assert_eq!(missing, Vec::<String>::new());
}

#[test]
fn a_region_of_a_later_version_is_refused() {
    let (_dir, path) = old_region(newest());
    let mut region = records(&path)["region"]["region"].clone();
    region["format"] = (newest() + 1).into();
    let json = serde_json::to_vec(&region).unwrap();
    let covered = [b"region\0region\0", &json[..]].concat();
    let value = [Digest::of(&covered).as_bytes(), &json[..]].concat();
    let database = redb::Database::open(path.join("region.db")).unwrap();
    let transaction = database.begin_write().unwrap();
    let table = TableDefinition::<&str, &[u8]>::new("region");
    transaction.open_table(table).unwrap().insert("region", &value[..]).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let refused = common::try_open(&path).unwrap_err();
    common::check(&refused, ErrorKind::Corrupt, "InternalError", &["has format 5"]);
}

/// A field that is renamed or added is a change of the format: to be described, with a golden region of its own.
#[test]
fn a_new_region_has_the_same_records_as_the_newest_golden_one() {
    let (_dir, old) = old_region(newest());
    let new = old.with_file_name("new");
    make(&new);
    let (old, mut new) = (records(&old), records(&new));
    // Added since: `golden_later.rs` has it.
    assert_eq!(new.remove("used-image-ids").map(|ids| ids.len()), Some(1));
    assert_eq!(without_sources(fields_of_4(&new)), fields(&old));
    assert_eq!(new["region"], old["region"]);
    let tables = [
        ("former-images", 1),
        ("images", 3),
        ("instances", 2),
        ("journal", 1),
        ("region", 1),
        ("snapshots", 1),
        ("volumes", 6),
    ];
    assert_eq!(counts(&old), tables.map(|(table, n)| (table.to_owned(), n)));
    assert_eq!(counts(&new), counts(&old));
}
