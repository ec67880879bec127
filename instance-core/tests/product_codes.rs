//! Product codes go with content, and content stays with whom it belongs to.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::{
    Ami, AnyAmi, BlockDeviceMapping, Digest, Filter, Grantee, ModifyImageAttribute, ProductCode,
    ProductCodeKind, X86_64,
};
use common::{TestRegion, disk, open, refused};
use instance_core::testing::tiny_elf;
use instance_core::{
    BlockDeviceMappingRequest, DescribeInstances, DirectBoot, ErrorKind, ImageSource, Instance, LaunchSpec,
    Result, VolumeSpec,
};

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

fn boot() -> DirectBoot {
    DirectBoot::new(tiny_elf(), None, "")
}

fn register(region: &TestRegion, name: &str, seed: u64) -> Ami<X86_64> {
    let disk = disk(1, seed);
    region.register_image(Ami::<X86_64>::builder(name), ImageSource::new(&disk).boot(boot())).unwrap()
}

fn root_of(ami: &Ami<X86_64>) -> Digest {
    *ami.manifest().root_device().unwrap().content().unwrap()
}

/// Registers an image that has a second disk with this content.
fn with_second_disk(region: &TestRegion, name: &str, content: Digest) -> Result<Ami<X86_64>> {
    let disk = disk(1, 99);
    let second = BlockDeviceMapping::ebs("/dev/sdf", content, 8);
    let builder = Ami::<X86_64>::builder(name).block_device(second);
    region.register_image(builder, ImageSource::new(&disk).boot(boot()))
}

fn change(region: &TestRegion, ami: &Ami<X86_64>, change: ModifyImageAttribute) {
    region.modify_image_attribute(ami.id(), &change).unwrap();
}

fn code() -> ProductCode {
    ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace }
}

/// A region with an image of its account's that is offered to everybody, and a buyer.
fn market() -> (tempfile::TempDir, TestRegion, TestRegion, Ami<X86_64>) {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let buyer = region.as_account("222222222222".parse().unwrap());
    let ami = register(&region, "product", 7);
    let offer = ModifyImageAttribute::new().add_product_code(code()).add_launch_permission(Grantee::All);
    change(&region, &ami, offer);
    (dir, region, buyer, ami)
}

fn codes_of(region: &TestRegion, image: &AnyAmi) -> Vec<ProductCode> {
    region.image(image.id()).unwrap().product_codes().cloned().collect()
}

#[test]
fn nobody_names_content_that_is_anothers() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let friend = region.as_account("222222222222".parse().unwrap());
    let ami = register(&region, "secret", 7);
    let content = root_of(&ami);
    let not_theirs = |what: &str| {
        refused(
            with_second_disk(&friend, what, content),
            ErrorKind::SnapshotNotFound,
            "InvalidSnapshot.NotFound",
        );
        let device =
            spec().block_device(BlockDeviceMappingRequest::new("/dev/sdf").snapshot(content).size_gib(8));
        let theirs = register(&friend, what, 5);
        refused(friend.launch(&theirs, device), ErrorKind::SnapshotNotFound, "InvalidSnapshot.NotFound");
    };
    not_theirs("before");
    let share = Grantee::Account(*friend.account());
    change(&region, &ami, ModifyImageAttribute::new().add_launch_permission(share));
    // Who may copy it has its bytes anyhow.
    with_second_disk(&friend, "shared", content).unwrap();
    change(&region, &ami, ModifyImageAttribute::new().remove_launch_permission(share));
    for image in friend.images().unwrap() {
        if image.ami().owner() == friend.account() {
            friend.deregister_image(image.id()).unwrap();
        }
    }
    not_theirs("after");
    region.disable_image(ami.id()).unwrap();
    not_theirs("disabled");
    region.enable_image(ami.id()).unwrap();
    // It is the owner's own all the time.
    let mine = with_second_disk(&region, "mine", content).unwrap();
    region.image_disk(mine.id(), "/dev/sdf").unwrap();
}

#[test]
fn what_is_sold_is_launched_by_who_accepts_its_terms_and_carried_away_by_nobody() {
    let (_dir, region, buyer, ami) = market();
    refused(buyer.launch(&ami, spec()), ErrorKind::OptInRequired, "OptInRequired");
    let dry = spec().dry_run(true);
    refused(buyer.launch(&ami, dry), ErrorKind::OptInRequired, "OptInRequired");
    region.launch(&ami, spec()).unwrap(); // the seller's own
    buyer.accept_terms("8vk2x").unwrap();
    buyer.accept_terms("8vk2x").unwrap();
    assert_eq!(buyer.accepted_terms().unwrap(), ["8vk2x"]);
    assert!(region.accepted_terms().unwrap().is_empty(), "they are the buyer's alone");
    refused(buyer.accept_terms(""), ErrorKind::InvalidParameter, "InvalidParameterValue");

    let server = buyer.launch(&ami, spec()).unwrap();
    assert!(server.describe().product_codes.iter().eq([&code()]));
    let by_code = DescribeInstances::new().filter("product-code", ["8vk2x"]);
    assert_eq!(buyer.describe_instances(&by_code).unwrap().items.len(), 1);
    let refuse = |result: Result<()>| refused(result, ErrorKind::AuthFailure, "AuthFailure");
    refuse(buyer.image_disk(ami.id(), "/dev/xvda").map(drop));
    refuse(region.image_disk(ami.id(), "/dev/xvda").map(drop));
    refuse(buyer.copy_image(ami.id(), "copy").map(drop));
    refused(
        with_second_disk(&buyer, "named", root_of(&ami)),
        ErrorKind::SnapshotNotFound,
        "InvalidSnapshot.NotFound",
    );

    // By an image of the instance.
    let image = server.create_image("changed").unwrap().ami;
    assert_eq!(codes_of(&buyer, &image), [code()]);
    refuse(buyer.image_disk(image.id(), "/dev/xvda").map(drop));
    refuse(buyer.export_image(image.id(), "/dev/xvda", |_, _| Ok(())).map(drop));
    let copy = buyer.copy_image(image.id(), "copy").unwrap();
    assert_eq!(codes_of(&buyer, &copy), [code()], "within the region it is the buyer's to copy");

    // By a snapshot of its volume, and what is made of that.
    let root = server.describe().attachments[0].volume_id;
    let snapshot = buyer.create_snapshot(root, "").unwrap();
    assert!(snapshot.product_codes.iter().eq([&code()]));
    refuse(buyer.snapshot_disk(snapshot.id).map(drop));
    let of_snapshot = ImageSource::of_snapshot(snapshot.id).boot(boot());
    let again = buyer.register_image(Ami::<X86_64>::builder("again"), of_snapshot).unwrap();
    assert_eq!(codes_of(&buyer, &again.into_any()), [code()]);
    let named = with_second_disk(&buyer, "by-digest", snapshot.digest.unwrap()).unwrap();
    assert_eq!(codes_of(&buyer, &named.into_any()), [code()]);
    let volume = buyer.create_volume(VolumeSpec::of_snapshot(snapshot.id)).unwrap();
    assert!(volume.product_codes.iter().eq([&code()]));
    let of_volume = buyer.create_snapshot(volume.id, "").unwrap();
    refuse(buyer.snapshot_disk(of_volume.id).map(drop));
    attaching(&buyer, volume.id);
}

/// A volume with a product code takes that to the instance, as in EC2 to one that is stopped.
fn attaching(buyer: &TestRegion, volume: ami_core::VolumeId) {
    let server: Instance = buyer.launch(&register(buyer, "own", 3), spec()).unwrap();
    let attach = || buyer.attach_volume(volume, server.id(), "/dev/sdf");
    refused(attach(), ErrorKind::IncorrectInstanceState, "IncorrectInstanceState");
    server.stop(std::time::Duration::ZERO).unwrap();
    attach().unwrap();
    assert!(server.describe().product_codes.iter().eq([&code()]));
    let image = server.create_image("with-it").unwrap().ami;
    assert_eq!(codes_of(buyer, &image), [code()]);
}

#[test]
fn terms_and_codes_outlive_the_process() {
    let (dir, region, buyer, ami) = market();
    buyer.accept_terms("8vk2x").unwrap();
    let server = buyer.launch(&ami, spec()).unwrap().id();
    let account = *buyer.account();
    drop((region, buyer));
    let buyer = open(dir.path()).as_account(account);
    assert!(buyer.instance(server).unwrap().describe().product_codes.iter().eq([&code()]));
    buyer.launch(&ami, spec()).unwrap();
    let product = ami_core::DescribeImages::new().filter(Filter::new("product-code", ["8vk2x"]).unwrap());
    assert_eq!(buyer.describe_images(&product).unwrap().items.len(), 1);
}
