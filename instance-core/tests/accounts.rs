//! Several accounts in one region: who sees, launches, copies and changes what.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Duration;

use ami_core::testing::catalog_conformance;
use ami_core::{
    Ami, BlockDeviceMapping, Boot, Catalog, CatalogExt, DescribeImages, Digest, Grantee, Image, ImageState,
    ModifyImageAttribute, Timestamp, X86_64,
};
use common::{TestRegion, check, disk, open};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DescribeInstances, DirectBoot, ErrorKind, ImageSource, InstanceState, LaunchSpec, Region,
};

const FRIEND: &str = "222222222222";

fn friend(region: &TestRegion) -> TestRegion {
    region.as_account(FRIEND.parse().unwrap())
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

fn register(region: &TestRegion, name: &str) -> Ami<X86_64> {
    let disk = disk(1, 7);
    let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    region.register_image(Ami::<X86_64>::builder(name), source).unwrap()
}

fn share(region: &TestRegion, ami: &Ami<X86_64>, grantee: Grantee) {
    let change = ModifyImageAttribute::new().add_launch_permission(grantee);
    region.modify_image_attribute(ami.id(), &change).unwrap();
}

#[test]
fn a_region_keeps_the_contract_of_a_catalog() {
    let dir = tempfile::tempdir().unwrap();
    let number = std::cell::Cell::new(0);
    catalog_conformance(|| {
        number.set(number.get() + 1);
        let region = Region::open(dir.path().join(number.get().to_string()), FakeHypervisor::new());
        region.unwrap().catalog()
    });
}

#[test]
fn what_is_an_accounts_own_is_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let friend = friend(&region);
    let ami = register(&region, "base");
    let mine = region.launch(&ami, spec()).unwrap();

    assert!(friend.images().unwrap().is_empty() && friend.instances().is_empty());
    let nothing = friend.describe_instances(&DescribeInstances::new()).unwrap();
    assert!(nothing.items.is_empty());
    let table = [
        (friend.image(ami.id()).err(), ErrorKind::ImageNotFound, "InvalidAMIID.NotFound"),
        (friend.launch(&ami, spec()).err(), ErrorKind::AuthFailure, "AuthFailure"),
        (friend.copy_image(ami.id(), "copy").err(), ErrorKind::AuthFailure, "AuthFailure"),
        (friend.deregister_image(ami.id()).err(), ErrorKind::ImageNotFound, "InvalidAMIID.NotFound"),
        (friend.disable_image(ami.id()).err(), ErrorKind::ImageNotFound, "InvalidAMIID.NotFound"),
        (friend.instance(mine.id()).err(), ErrorKind::InstanceNotFound, "InvalidInstanceID.NotFound"),
        (
            friend.launch(&ami, spec().dry_run(true)).err(),
            ErrorKind::UnauthorizedOperation,
            "UnauthorizedOperation",
        ),
        (region.launch(&ami, spec().dry_run(true)).err(), ErrorKind::DryRunOperation, "DryRunOperation"),
    ];
    for (row, (refused, kind, code)) in table.into_iter().enumerate() {
        check(&refused.unwrap_or_else(|| panic!("row {row} was done")), kind, code, &[]);
    }
    assert_eq!((region.instances().len(), friend.instances().len()), (1, 0), "a dry run launches nothing");
    // A name belongs to one account.
    register(&friend, "base");
}

#[test]
fn a_shared_image_is_launched_and_copied_by_whom_it_is_shared_with_and_changed_by_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let friend = friend(&region);
    let ami = register(&region, "base");
    share(&region, &ami, Grantee::Account(FRIEND.parse().unwrap()));

    let theirs = friend.launch(&ami, spec()).unwrap();
    let copy = friend.copy_image(ami.id(), "mine-now").unwrap();
    assert_eq!((copy.digest(), *copy.owner()), (ami.digest(), *friend.account()));
    let taken = friend.copy_image(ami.id(), "mine-now").unwrap_err();
    check(&taken, ErrorKind::ImageNameDuplicate, "InvalidAMIName.Duplicate", &[]);
    let change = ModifyImageAttribute::new().description("mine");
    let refused = friend.modify_image_attribute(ami.id(), &change).unwrap_err();
    check(&refused, ErrorKind::AuthFailure, "AuthFailure", &[]);
    let refused = friend.create_tags(&[ami.id().into()], &[("mine", "")]).unwrap_err();
    check(&refused, ErrorKind::AuthFailure, "AuthFailure", &[]);

    // Its owner takes it away, which hurts neither the instance nor the copy.
    region.deregister_image(ami.id()).unwrap();
    theirs.stop(Duration::ZERO).unwrap();
    theirs.start().unwrap();
    let child = theirs.create_image("child").unwrap().ami;
    assert_eq!((child.manifest().parent(), *child.owner()), (Some(&ami.digest()), *friend.account()));
    for image in [&copy, &child] {
        friend.launch(image, spec()).unwrap();
    }
    let names: Vec<_> = friend.images().unwrap().iter().map(|i| i.ami().name().to_owned()).collect();
    assert!(names.len() == 2 && names.contains(&"child".to_owned()), "{names:?}");
}

#[test]
fn what_an_owner_has_decided_outlives_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (public, disabled, old) =
        (register(&region, "public"), register(&region, "disabled"), register(&region, "old"));
    share(&region, &public, Grantee::All);
    share(&region, &old, Grantee::All);
    region.disable_image(disabled.id()).unwrap();
    region.enable_image_deprecation(old.id(), None).unwrap();
    let mine = friend(&region).launch(&public, spec()).unwrap().id();
    drop(region);

    let region = open(dir.path());
    let friend = friend(&region);
    let found = |request: DescribeImages| -> Vec<String> {
        let page = friend.describe_images(&request).unwrap();
        page.items.iter().map(|i| i.ami().name().to_owned()).collect()
    };
    assert_eq!(found(DescribeImages::new()), ["public"]);
    assert_eq!(found(DescribeImages::new().include_deprecated(true)).len(), 2);
    friend.launch(&old, spec()).unwrap();
    let refused = region.launch(&disabled, spec()).unwrap_err();
    check(&refused, ErrorKind::ImageUnavailable, "InvalidAMIID.Unavailable", &["disabled"]);
    check(
        &region.disable_image(disabled.id()).unwrap_err(),
        ErrorKind::IncorrectState,
        "IncorrectState",
        &[],
    );
    assert_eq!(region.enable_image(disabled.id()).unwrap().state(), ImageState::Available);
    let past = region.enable_image_deprecation(old.id(), Some(Timestamp::MIN)).unwrap_err();
    check(&past, ErrorKind::InvalidParameter, "InvalidParameterValue", &["has passed"]);
    assert_eq!(friend.instance(mine).unwrap().state(), InstanceState::Stopped);
    assert!(region.instance(mine).is_err());
}

/// A record that was put into the catalogue is launched if its content is there, and says what is missing.
#[test]
fn a_record_alone_is_launched_with_the_content_that_the_region_has() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "base");
    let manifest = ami.manifest();
    let content = *manifest.block_device_mappings()[0].as_ebs().unwrap().snapshot().unwrap();
    let put = |name: &str, content: Digest, boot: Boot| {
        let ami = Ami::<X86_64>::builder(name)
            .root_device("/dev/xvda")
            .block_device(BlockDeviceMapping::ebs("/dev/xvda", content, 1))
            .boot(boot)
            .build(region.name(), region.account())
            .unwrap();
        region.catalog().put(Image::new(ami.clone())).unwrap();
        region.launch(&ami, spec())
    };
    put("whole", content, manifest.boot().clone()).unwrap();
    let kernel = put("no-kernel", content, Boot::direct(Digest::of(b"gone"), None, "")).unwrap_err();
    check(&kernel, ErrorKind::NotBootable, "ImportFailed.UnsupportedDisk", &["kernel"]);
    let bytes = put("no-content", Digest::of(b"gone"), manifest.boot().clone()).unwrap_err();
    check(&bytes, ErrorKind::SnapshotNotFound, "InvalidSnapshot.NotFound", &[]);
    let nothing = put("not-bootable", content, Boot::root_volume()).unwrap_err();
    check(&nothing, ErrorKind::NotBootable, "ImportFailed.UnsupportedDisk", &[]);
    // The catalogue asks for no permission; an account in it does.
    let catalog = region.catalog();
    let theirs = catalog.as_account(FRIEND.parse().unwrap());
    assert!(theirs.get(&ami.id()).is_err() && catalog.get(&ami.id()).is_ok());
    assert_eq!(region.instances().len(), 1);
}
