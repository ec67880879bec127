//! Encrypted volumes, snapshots and images: what is on the disk, and what is without the keys.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use ami_core::{Ami, BlockDeviceMapping, X86_64};
use common::{TestRegion, ask, check, disk, open, register};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    BlockDeviceMappingRequest, CopyImage, DescribeSnapshots, DescribeVolumes, DirectBoot, ErrorKind,
    ImageSource, InstanceState, LaunchSpec, RegionOptions, VolumeSpec,
};
use storage_block::keys::{KeyProvider as _, LocalKey};
use storage_block::{MemoryDisk, RawFile};

const WORD: &str = "nobody-reads-this";

fn with_keys(dir: &Path, keys: &Arc<LocalKey>) -> TestRegion {
    RegionOptions::new().keys(keys.clone()).open(dir, FakeHypervisor::new()).unwrap()
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

/// Whether the word stands in a file, outside of its holes.
fn has(path: &Path) -> bool {
    let found = |bytes: &[u8]| bytes.windows(WORD.len()).any(|part| part == WORD.as_bytes());
    if fs::metadata(path).unwrap().len() % 4096 != 0 {
        return found(&fs::read(path).unwrap());
    }
    let disk = RawFile::open(path, true).unwrap().into_disk();
    let mut at = 0;
    while let Some(data) = disk.next_data(at).unwrap() {
        let mut part = vec![0; (data.end - data.start) as usize];
        disk.read_at(&mut part, data.start).unwrap();
        if found(&part) {
            return true;
        }
        at = data.end;
    }
    false
}

/// Whether the word stands in any file below `dir`.
fn is_told(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => is_told(&path),
            false => has(&path),
        }
    })
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => assert!(
                Command::new("cp")
                    .arg("--sparse=always")
                    .args([&entry.path(), &to])
                    .status()
                    .unwrap()
                    .success()
            ),
        }
    }
}

#[test]
fn what_an_encrypted_instance_writes_is_on_no_disk_and_goes_on_in_its_images() {
    let dir = tempfile::tempdir().unwrap();
    let (path, keys) = (dir.path().join("region"), Arc::new(LocalKey::generate().unwrap()));
    let region = with_keys(&path, &keys);
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let encrypted = |device: &str| BlockDeviceMappingRequest::new(device).size_gib(1).encrypted(true);
    let secret = spec().block_device(encrypted("/dev/xvda")).block_device(encrypted("/dev/sdf"));
    let first = region.launch(&ami, secret).unwrap();
    // Its root volume has the image's content all the same.
    ask(&first, "read 0 8", "data");
    ask(&first, &format!("write 0 0 {WORD}"), "wrote");
    ask(&first, &format!("write 1 0 {WORD}"), "wrote");
    let volumes =
        region.describe_volumes(&DescribeVolumes::new().filter("encrypted", ["true"])).unwrap().items;
    assert_eq!(volumes.len(), 2);
    assert!(volumes.iter().all(|v| v.kms_key_id.as_deref() == Some(keys.default_key_id())));

    let made = first.create_image("secret").unwrap().ami;
    let said = made.manifest().block_device_mappings().iter().map(|m| m.as_ebs().unwrap().encrypted());
    assert_eq!(said.collect::<Vec<_>>(), [true, true]);
    let child = region.launch(&made.typed::<X86_64>().unwrap(), spec()).unwrap();
    ask(&child, "read 0 0", WORD);
    ask(&child, "read 1 0", WORD);
    let volume = child.describe().attachments[1].volume_id;
    let backup = region.create_snapshot(volume, "secret").unwrap();
    assert_eq!(backup.kms_key_id.as_deref(), Some(keys.default_key_id()));
    let filter = DescribeSnapshots::new().filter("encrypted", ["true"]);
    assert_eq!(region.describe_snapshots(&filter).unwrap().items, std::slice::from_ref(&backup));
    let again = region.create_volume(VolumeSpec::of_snapshot(backup.id)).unwrap();
    assert_eq!(again.kms_key_id, backup.kms_key_id, "a volume of it is encrypted without being asked to");
    [&first, &child].iter().for_each(|instance| instance.stop(Duration::ZERO).unwrap());
    assert!(!is_told(&path));

    // The same in plain is found, so that the search is one.
    let plain = region.launch(&ami, spec()).unwrap();
    ask(&plain, &format!("write 0 0 {WORD}"), "wrote");
    plain.terminate().unwrap();
    let kept = region.launch(&ami, spec()).unwrap();
    ask(&kept, &format!("write 0 0 {WORD}"), "wrote");
    kept.stop(Duration::ZERO).unwrap();
    assert!(is_told(&path));
}

#[test]
fn without_its_keys_a_region_keeps_what_it_cannot_read() {
    let dir = tempfile::tempdir().unwrap();
    let (path, keys) = (dir.path().join("region"), Arc::new(LocalKey::generate().unwrap()));
    let region = with_keys(&path, &keys);
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let secret = spec().block_device(BlockDeviceMappingRequest::new("/dev/xvda").size_gib(1).encrypted(true));
    let server = region.launch(&ami, secret).unwrap();
    ask(&server, &format!("write 0 0 {WORD}"), "wrote");
    let id = server.id();
    // As it is after a crash: the launch has not been noted as whole yet.
    let crashed = dir.path().join("crashed");
    copy(&path, &crashed);
    server.stop(Duration::ZERO).unwrap();
    let backup = region.create_snapshot(server.describe().attachments[0].volume_id, "root").unwrap();
    drop((server, region));

    for path in [&path, &crashed] {
        let region = open(path);
        let server = region.instance(id).unwrap();
        check(
            &server.start().unwrap_err(),
            ErrorKind::KeyUnavailable,
            "InvalidKMSKey.InvalidState",
            &["no keys"],
        );
        assert_eq!(server.state(), InstanceState::Stopped);
        let other = Arc::new(LocalKey::generate().unwrap());
        drop((server, region));
        let region = with_keys(path, &other);
        let refused = region.instance(id).unwrap().start().unwrap_err();
        check(&refused, ErrorKind::KeyUnavailable, "InvalidKMSKey.InvalidState", &[]);
        drop(region);
    }
    let region = open(&path);
    let refused = region.create_volume(VolumeSpec::of_snapshot(backup.id)).unwrap_err();
    check(&refused, ErrorKind::KeyUnavailable, "InvalidKMSKey.InvalidState", &[]);
    drop(region);

    let region = with_keys(&path, &keys);
    let server = region.instance(id).unwrap();
    server.start().unwrap();
    ask(&server, "read 0 0", WORD);
    let region = with_keys(&crashed, &keys);
    region.instance(id).unwrap().start().unwrap();
}

#[test]
fn images_are_encrypted_where_they_are_registered() {
    let dir = tempfile::tempdir().unwrap();
    let (path, keys) = (dir.path().join("region"), Arc::new(LocalKey::generate().unwrap()));
    let region = with_keys(&path, &keys);
    let content = MemoryDisk::new(1 << 20).unwrap().into_disk();
    content.write_at(WORD.as_bytes(), 0).unwrap();
    let boot = || DirectBoot::new(tiny_elf(), None, "");
    let source = ImageSource::new(&content).boot(boot()).encrypted(true);
    let ami = region.register_image(Ami::<X86_64>::builder("secret"), source).unwrap();
    assert!(ami.manifest().block_device_mappings()[0].as_ebs().unwrap().encrypted());
    assert!(!is_told(&path));
    let server = region.launch(&ami, spec()).unwrap();
    ask(&server, "read 0 0", WORD);

    let volume = server.describe().attachments[0].volume_id;
    let backup = region.create_snapshot(volume, "root").unwrap();
    let source = ImageSource::of_snapshot(backup.id).boot(boot());
    let of_snapshot = region.register_image(Ami::<X86_64>::builder("of-snapshot"), source).unwrap();
    assert!(of_snapshot.manifest().block_device_mappings()[0].as_ebs().unwrap().encrypted());
    ask(&region.launch(&of_snapshot, spec()).unwrap(), "read 0 0", WORD);

    // What is encrypted is said to be.
    let hidden = BlockDeviceMapping::ebs("/dev/sdf", backup.digest.unwrap(), 1);
    let source = ImageSource::new(&content).boot(boot());
    let hiding =
        region.register_image(Ami::<X86_64>::builder("hiding").block_device(hidden), source).unwrap_err();
    check(&hiding, ErrorKind::InvalidBlockDeviceMapping, "InvalidBlockDeviceMapping", &["encrypted"]);
    let other = open(&dir.path().join("other"));
    let unavailable = (ErrorKind::KeyUnavailable, "InvalidKMSKey.InvalidState");
    let missing = region.create_volume(VolumeSpec::new(1).kms_key_id("none")).unwrap_err();
    check(&missing, unavailable.0, unavailable.1, &[]);
    let source = ImageSource::new(&content).boot(boot()).encrypted(true);
    let keyless = other.register_image(Ami::<X86_64>::builder("secret"), source).unwrap_err();
    check(&keyless, unavailable.0, unavailable.1, &["no keys"]);
    let plain = register(&other, "plain", &content).unwrap();
    let device = BlockDeviceMappingRequest::new("/dev/sdg").size_gib(1).encrypted(true);
    let keyless = other.launch(&plain, spec().block_device(device)).unwrap_err();
    check(&keyless, unavailable.0, unavailable.1, &["no keys"]);
    assert!(other.describe_volumes(&DescribeVolumes::new()).unwrap().items.is_empty());
}

#[test]
fn a_copy_of_an_encrypted_image_is_encrypted_anew_under_the_keys_of_its_region() {
    let dir = tempfile::tempdir().unwrap();
    let [from_path, to_path, bare_path] = ["from", "to", "bare"].map(|name| dir.path().join(name));
    let keys = [(); 2].map(|()| Arc::new(LocalKey::generate().unwrap()));
    let (from, to) = (with_keys(&from_path, &keys[0]), with_keys(&to_path, &keys[1]));
    let content = MemoryDisk::new(1 << 20).unwrap().into_disk();
    content.write_at(WORD.as_bytes(), 0).unwrap();
    let boot = || DirectBoot::new(tiny_elf(), None, "");
    let source = ImageSource::new(&content).boot(boot()).encrypted(true);
    let secret = from.register_image(Ami::<X86_64>::builder("secret"), source).unwrap();
    let plain = register(&from, "plain", &content).unwrap();

    // One that is not encrypted may become so; and the one that is, in its own region under another key.
    for (id, copy) in [
        (secret.id(), CopyImage::new("secret")),
        (plain.id(), CopyImage::new("once plain").encrypted(true)),
        (plain.id(), CopyImage::new("by name").kms_key_id(keys[1].default_key_id())),
    ] {
        let name = format!("{copy:?}");
        let ami = to.copy_image_from(&from, id, copy).unwrap();
        assert_ne!(ami.digest(), from.image(id).unwrap().ami().digest(), "{name}");
        let root = ami.manifest().root_volume().unwrap();
        assert!(root.encrypted() && root.snapshot().is_some(), "{name}");
        assert_eq!(to.image(ami.id()).unwrap().source_image().unwrap().id, id);
        let server = to.launch(&ami.typed::<X86_64>().unwrap(), spec()).unwrap();
        ask(&server, "read 0 0", WORD);
    }
    assert!(!is_told(&to_path));
    let again = from.copy_image_from(&from, secret.id(), CopyImage::new("again")).unwrap();
    assert_ne!(again.digest(), secret.digest());

    // Without keys, there or here, nothing is copied, and nothing is left.
    let bare = open(&bare_path);
    let refused = bare.copy_image_from(&from, secret.id(), CopyImage::new("secret")).unwrap_err();
    check(&refused, ErrorKind::KeyUnavailable, "InvalidKMSKey.InvalidState", &["no keys"]);
    let nobody = CopyImage::new("nobody").kms_key_id("none");
    let refused = to.copy_image_from(&from, secret.id(), nobody).unwrap_err();
    check(&refused, ErrorKind::KeyUnavailable, "InvalidKMSKey.InvalidState", &[]);
    drop(from);
    let from = open(&from_path);
    let refused = to.copy_image_from(&from, secret.id(), CopyImage::new("late")).unwrap_err();
    check(&refused, ErrorKind::KeyUnavailable, "InvalidKMSKey.InvalidState", &[]);
    assert_eq!((to.images().unwrap().len(), bare.images().unwrap().len()), (3, 0));
    assert_eq!(fs::read_dir(bare_path.join("blocks/snapshots")).unwrap().count(), 0);
}
