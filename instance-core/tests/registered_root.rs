//! The root device of an image that is registered: what its builder says of it, and what is declared.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::{
    Ami, AmiBuilder, BlockDeviceMapping, DeclaredAmi, Digest, RootDeviceType, VolumeType, X86_64,
};
use common::{ask, disk, launch, open, refused};
use instance_core::testing::tiny_elf;
use instance_core::{DescribeVolumes, DirectBoot, ErrorKind, ImageSource};

const WEB: DeclaredAmi<X86_64> = DeclaredAmi::new("web").root_device("/dev/sda1");

fn boot() -> DirectBoot {
    DirectBoot::new(tiny_elf(), None, "")
}

#[test]
fn a_builder_says_what_the_root_volume_is() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let content = disk(2, 7);
    let source = || ImageSource::new(&content).boot(boot());
    let root = |name: &str| {
        BlockDeviceMapping::blank(name, 20).volume_type(VolumeType::Gp2).delete_on_termination(false)
    };
    let builder = |name: &str| Ami::<X86_64>::builder(name);
    let ami = region.register_image(builder("kept").block_device(root("/dev/sda1")), source()).unwrap();
    let mapping = ami.manifest().root_device().unwrap();
    let ebs = mapping.as_ebs().unwrap();
    assert_eq!((mapping.device_name(), ebs.volume_size_gib()), ("/dev/xvda", 20));
    assert_eq!((ebs.volume_type(), ebs.delete_on_termination()), (VolumeType::Gp2, false));
    let server = launch(&region, &ami).unwrap();
    assert_eq!(ask(&server, "size 0", "size"), (20_u64 << 30).to_string());
    let root_volume = server.describe().attachments[0].volume_id;
    server.terminate().unwrap();
    let kept = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    assert_eq!(
        kept.iter().map(|v| (v.id, v.volume_type)).collect::<Vec<_>>(),
        [(root_volume, VolumeType::Gp2)]
    );

    // What the image has otherwise.
    let plain = region.register_image(builder("plain"), source()).unwrap();
    let ebs = plain.manifest().root_volume().unwrap();
    assert_eq!((ebs.volume_size_gib(), ebs.volume_type()), (1, VolumeType::Gp3));
    assert!(ebs.delete_on_termination());

    let large = disk(2, 7);
    let cannot = |builder: AmiBuilder<X86_64>, source: ImageSource<'_>| {
        let refusal = region.register_image(builder, source);
        refused(refusal, ErrorKind::InvalidBlockDeviceMapping, "InvalidBlockDeviceMapping");
    };
    let hdd = BlockDeviceMapping::blank("/dev/xvda", 500).volume_type(VolumeType::St1);
    cannot(builder("hdd").block_device(hdd), source());
    let other = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"other"), 20);
    cannot(builder("other").block_device(other), source());
    cannot(builder("twice").block_device(root("/dev/xvda")).block_device(root("/dev/sda")), source());
    let store = ImageSource::new(&large).boot(boot()).root_device_type(RootDeviceType::InstanceStore);
    cannot(builder("store").block_device(root("/dev/xvda")), store);
    let vast = storage_block::MemoryDisk::new(3 << 30).unwrap().into_disk();
    let small = BlockDeviceMapping::blank("/dev/xvda", 2);
    cannot(builder("small").block_device(small), ImageSource::new(&vast).boot(boot()));
}

#[test]
fn what_is_registered_as_declared_is_as_declared() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let content = disk(2, 7);
    let source = || ImageSource::new(&content).boot(boot());
    let ami = region.register_image(WEB.builder(), source()).unwrap();
    assert_eq!(WEB.check(&ami).unwrap(), ami);
    const LARGE: DeclaredAmi<X86_64> = DeclaredAmi::new("large").root_size_gib(12);
    let ami = region.register_image(LARGE.builder(), source()).unwrap();
    assert_eq!(LARGE.check(&ami).unwrap(), ami);
    // Who names the device when registering has the last word, and is told by the check.
    const OTHER: DeclaredAmi<X86_64> = DeclaredAmi::new("other").root_device("/dev/sda1");
    let ami = region.register_image(OTHER.builder(), source().root_device("/dev/xvdb")).unwrap();
    assert_eq!(OTHER.check(&ami).unwrap_err().differences()[0].field, "root-device-name");
    // A disk that is larger than declared is no such image.
    const SMALL: DeclaredAmi<X86_64> = DeclaredAmi::new("small").root_size_gib(2);
    let vast = storage_block::MemoryDisk::new(3 << 30).unwrap().into_disk();
    let refusal = region.register_image(SMALL.builder(), ImageSource::new(&vast).boot(boot()));
    refused(refusal, ErrorKind::InvalidBlockDeviceMapping, "InvalidBlockDeviceMapping");
    let store = ImageSource::new(&content).boot(boot()).root_device_type(RootDeviceType::InstanceStore);
    const STORE: DeclaredAmi<X86_64> = DeclaredAmi::new("store").root_size_gib(5);
    let ami = region.register_image(STORE.builder(), store).unwrap();
    assert_eq!(ami.manifest().root_device_type(), RootDeviceType::InstanceStore);
    assert_eq!(STORE.check(&ami).unwrap(), ami);
}
