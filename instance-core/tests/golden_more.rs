//! A region with what came after `golden_additions.rs` had its region written: it must open for ever, too.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/records.rs"]
mod records;

use std::path::{Path, PathBuf};

use ami_core::{Ami, RootDeviceType, X86_64};
use common::{TestRegion, ask, soon};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    CopyImage, DescribeCopyImageTasks, DirectBoot, ImageSource, InstanceState, LaunchSpec, RegionOptions,
};
use records::{counts, fields, fields_of_4, make_small, old_region, records};
use storage_block::MemoryDisk;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2-more")
}

fn open(dir: &Path) -> TestRegion {
    let options = RegionOptions::new().name("eu-central-1".parse().unwrap());
    options.open(dir, FakeHypervisor::new()).unwrap()
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("m3.medium".parse().unwrap())
}

/// Makes an image whose root device is instance store, an instance of it that was running when the region was closed, and
/// a copy of the image by a task.
fn make(dir: &Path) {
    let region = open(dir);
    let root = MemoryDisk::new(1 << 20).unwrap().into_disk();
    root.write_at(b"class", 0).unwrap();
    let source = ImageSource::new(&root)
        .boot(DirectBoot::new(tiny_elf(), None, "console=ttyS0"))
        .root_device_type(RootDeviceType::InstanceStore);
    let ami = region.register_image(Ami::<X86_64>::builder("worker"), source).unwrap();
    region.launch(&ami, spec()).unwrap();
    let task = region.begin_copy_image_from(&region, ami.id(), CopyImage::new("copy")).unwrap();
    task.wait(soon()).unwrap();
}

/// Not a test: writes the golden region, once.
#[test]
#[ignore = "writes the golden region of what was added later"]
fn write() {
    assert!(!golden().exists(), "what was written once stays as it is");
    make(&golden());
    std::fs::remove_dir_all(golden().join("instances")).unwrap();
    make_small(&golden());
}

#[test]
fn what_was_added_is_there() {
    let (_dir, path) = old_region(&golden());
    let before = records(&path);
    assert_eq!((before["instances"].len(), before["copy-image-tasks"].len()), (1, 1));
    let region = open(&path);
    let states: Vec<_> = region.instances().iter().map(|i| i.state()).collect();
    assert_eq!(states, [InstanceState::Terminated], "its root device is gone");
    let images = region.images().unwrap();
    assert_eq!(images.len(), 2);
    for image in &images {
        assert_eq!(image.ami().manifest().root_device_type(), RootDeviceType::InstanceStore);
        let instance = region.launch(&image.ami().typed::<X86_64>().unwrap(), spec()).unwrap();
        assert_eq!(ask(&instance, "read 0 0", "data"), "class");
    }
    // It ended long ago, and is told of no more.
    let told = region.describe_copy_image_tasks(&DescribeCopyImageTasks::new()).unwrap().items.len();
    drop(region);
    assert_eq!(records(&path).get("copy-image-tasks").map_or(0, |all| all.len()), told);
}

#[test]
fn a_new_region_has_the_same_records_as_the_golden_one() {
    let (_dir, old) = old_region(&golden());
    let new = old.with_file_name("new");
    make(&new);
    let (old, mut new) = (records(&old), records(&new));
    // The version after it has one.
    new.remove("journal").unwrap();
    assert_eq!(fields_of_4(&new), fields(&old));
    assert_eq!(counts(&new), counts(&old));
}
