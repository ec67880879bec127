//! A region with what has been added to images and tasks of version 4 of the format must open for ever, too.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/records.rs"]
mod records;

use std::path::{Path, PathBuf};
use std::time::Duration;

use ami_core::{Ami, Image, ImageState, ImdsSupport, X86_64};
use common::{TestRegion, soon};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, RegionOptions};
use records::{counts, fields, make_small, old_region, records};
use storage_block::{Disk, MemoryDisk};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v4-images")
}

fn open(dir: &Path) -> TestRegion {
    let options = RegionOptions::new().name("eu-central-1".parse().unwrap());
    options.open(dir, FakeHypervisor::new()).unwrap()
}

fn disk(word: &str) -> Disk {
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    disk.write_at(word.as_bytes(), 0).unwrap();
    disk
}

/// Makes an image that is made for the second version of the metadata service, one of an instance of it, one whose content is
/// damaged, which is put right again, and tasks that have made an image and have not.
fn make(dir: &Path) {
    let region = open(dir);
    let boot = || DirectBoot::new(tiny_elf(), None, "console=ttyS0");
    let register = |name: &str| {
        let root = disk(name);
        let source = ImageSource::new(&root).boot(boot()).imds_support(ImdsSupport::V2_0);
        region.register_image(Ami::<X86_64>::builder(name), source).unwrap()
    };
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap());
    let server = region.launch(&register("web"), spec()).unwrap();
    server.stop(Duration::ZERO).unwrap();
    server.begin_create_image("web-2").unwrap().wait(soon()).unwrap();
    region
        .import_image(Ami::<X86_64>::builder("refused"), disk("refused"), None)
        .unwrap()
        .wait(soon())
        .unwrap_err();

    let damaged = register("damaged");
    let digest = damaged.manifest().root_volume().unwrap().snapshot().unwrap().to_hex();
    let snapshots = std::fs::read_dir(dir.join("blocks/snapshots")).unwrap();
    let path = snapshots.map(|entry| entry.unwrap().path());
    let path = path.into_iter().find(|path| path.to_string_lossy().contains(&digest)).unwrap();
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, b"short").unwrap();
    assert_eq!(region.launch(&damaged, spec()).unwrap_err().kind(), ErrorKind::Corrupt);
    std::fs::write(&path, whole).unwrap();
}

/// Not a test: writes the golden region, once.
#[test]
#[ignore = "writes the golden region of what was added to version 4"]
fn write() {
    assert!(!golden().exists(), "what was written once stays as it is");
    make(&golden());
    make_small(&golden());
}

#[test]
fn what_was_added_is_there() {
    let (_dir, path) = old_region(&golden());
    let region = open(&path);
    let image = |name: &str| -> Image {
        region.images().unwrap().into_iter().find(|image| image.ami().name() == name).unwrap()
    };
    let (web, made, damaged) = (image("web"), image("web-2"), image("damaged"));
    assert_eq!(web.imds_support(), Some(ImdsSupport::V2_0));
    assert_eq!(made.imds_support(), Some(ImdsSupport::V2_0));
    let server = region.instances().remove(0);
    assert_eq!((made.source_image().unwrap().id, made.source_instance()), (web.id(), Some(server.id())));
    assert_eq!(damaged.state(), ImageState::Invalid);
    assert_eq!(damaged.state_reason().unwrap().code, "Server.InternalError");
    server.start().unwrap();
}

#[test]
fn a_new_region_has_the_same_records_as_the_golden_one() {
    let (_dir, old) = old_region(&golden());
    let new = old.with_file_name("new");
    make(&new);
    let (old, new) = (records(&old), records(&new));
    assert_eq!(fields(&new), fields(&old));
    assert_eq!(counts(&new), counts(&old));
    assert!(fields(&old).contains("images.state_reason.code"), "what an earlier reader passes over");
}
