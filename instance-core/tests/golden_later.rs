//! A region with what has been added to version 3 of the format must open for ever, too.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/records.rs"]
mod records;

use std::path::{Path, PathBuf};
use std::time::Duration;

use ami_core::{Ami, Grantee, ModifyImageAttribute, ProductCode, ProductCodeKind, X86_64};
use common::{TestRegion, ask, soon};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DescribeCreateImageTasks, DescribeSnapshots, DescribeVolumes, DirectBoot, ImageConsistency, ImageSource,
    LaunchSpec, RegionOptions,
};
use records::{counts, fields, fields_of_4, make_small, old_region, records, without_sources};
use storage_block::MemoryDisk;

const BUYER: &str = "210987654321";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v3-additions")
}

fn open(dir: &Path) -> TestRegion {
    let options = RegionOptions::new().name("eu-central-1".parse().unwrap());
    options.open(dir, FakeHypervisor::new()).unwrap()
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

fn register(region: &TestRegion) -> Ami<X86_64> {
    let root = MemoryDisk::new(1 << 20).unwrap().into_disk();
    root.write_at(b"class", 0).unwrap();
    let source = ImageSource::new(&root).boot(DirectBoot::new(tiny_elf(), None, "console=ttyS0"));
    region.register_image(Ami::<X86_64>::builder("product"), source).unwrap()
}

/// Makes an image that was there before, is sold, and was launched by who has accepted its terms; a snapshot of that
/// instance, whose guest has shut itself down; and an image of it by a task.
fn make(dir: &Path) {
    let region = open(dir);
    region.deregister_image(register(&region).id()).unwrap();
    let ami = register(&region);
    let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
    let offer = ModifyImageAttribute::new().add_product_code(code).add_launch_permission(Grantee::All);
    region.modify_image_attribute(ami.id(), &offer).unwrap();
    let buyer = region.as_account(BUYER.parse().unwrap());
    buyer.accept_terms("8vk2x").unwrap();
    let server = buyer.launch(&ami, spec()).unwrap();
    ask(&server, "write 0 0 object", "wrote");
    server.stop(Duration::from_secs(20)).unwrap();
    buyer.create_snapshot(server.describe().attachments[0].volume_id, "").unwrap();
    let task = server.begin_create_image("changed").unwrap();
    task.wait(soon()).unwrap();
}

/// Not a test: writes the golden region, once.
#[test]
#[ignore = "writes the golden region of what was added to version 3"]
fn write() {
    assert!(!golden().exists(), "what was written once stays as it is");
    make(&golden());
    make_small(&golden());
}

#[test]
fn what_was_added_is_there() {
    let (_dir, path) = old_region(&golden());
    let region = open(&path);
    let image = |region: &TestRegion, name: &str| {
        region.images().unwrap().into_iter().find(|image| image.ami().name() == name).unwrap()
    };
    let product = image(&region, "product");
    assert_eq!((product.ami().incarnation(), product.product_codes().len()), (1, 1));
    let buyer = region.as_account(BUYER.parse().unwrap());
    assert_eq!(buyer.accepted_terms().unwrap(), ["8vk2x"]);
    buyer.launch(&product.ami().typed::<X86_64>().unwrap(), spec()).unwrap();
    assert_eq!(image(&buyer, "changed").product_codes().len(), 1);
    let changed = buyer.launch(&image(&buyer, "changed").ami().typed::<X86_64>().unwrap(), spec()).unwrap();
    assert_eq!(ask(&changed, "read 0 0", "data"), "object");

    let server = buyer.instances().into_iter().find(|i| i.describe().state_reason.is_some()).unwrap();
    assert_eq!(server.describe().product_codes.len(), 1);
    let made = server.create_image("again").unwrap();
    assert_eq!(made.consistency, ImageConsistency::FileSystemConsistent);
    let snapshots = buyer.describe_snapshots(&DescribeSnapshots::new()).unwrap().items;
    let volumes = buyer.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    assert_eq!((snapshots[0].product_codes.len(), volumes.len()), (1, 3));
    assert!(volumes.iter().all(|volume| volume.product_codes.len() == 1));

    region.deregister_image(product.id()).unwrap();
    assert_eq!(register(&region).incarnation(), 2);
    // It ended long ago, and is told of no more.
    let told = buyer.describe_create_image_tasks(&DescribeCreateImageTasks::new()).unwrap().items.len();
    drop((region, buyer, server, changed));
    assert_eq!(records(&path).get("create-image-tasks").map_or(0, |all| all.len()), told);
}

#[test]
fn a_new_region_has_the_same_records_as_the_golden_one() {
    let (_dir, old) = old_region(&golden());
    let new = old.with_file_name("new");
    make(&new);
    let (old, new) = (records(&old), records(&new));
    let mut known = without_sources(fields_of_4(&new));
    assert!(known.remove("instances.description.state_transition_reason"), "version 4 has it");
    assert_eq!(known, fields(&old));
    assert_eq!(counts(&new), counts(&old));
}
