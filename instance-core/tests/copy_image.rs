//! Copies of images in another region: what is the same, what is not, and what is read and stored for it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::{AmiId, DescribeImages, Filter, Grantee, ModifyImageAttribute, X86_64};
use common::{TestRegion, ask, check, disk, everything, launch, open, register};
use instance_core::{CopyImage, ErrorKind};
use storage_block::{Disk, MemoryDisk, Progress};

/// Two regions in a directory.
fn world() -> (tempfile::TempDir, TestRegion, TestRegion) {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (open(&dir.path().join("from")), open(&dir.path().join("to")));
    (dir, from, to)
}

fn bytes(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Copies, and gives what there was to store for each disk.
fn copy(to: &TestRegion, from: &TestRegion, id: AmiId, name: &str) -> (AmiId, Vec<u64>) {
    let mut totals = Vec::new();
    let mut progress = |p: Progress| {
        if p.done == p.total {
            totals.push(p.total);
        }
    };
    let copy = to.copy_image_from_with(from, id, CopyImage::new(name), &mut progress).unwrap();
    totals.dedup();
    assert_eq!(copy.digest(), from.image(id).unwrap().ami().digest());
    (copy.id(), totals)
}

#[test]
fn a_copy_is_the_same_class_of_another_region_and_says_of_what() {
    let (dir, from, to) = world();
    let ami = register(&from, "base", &disk(4, 7)).unwrap();
    from.modify_image_attribute(ami.id(), &ModifyImageAttribute::new().description("first")).unwrap();
    let (id, _) = copy(&to, &from, ami.id(), "copy");
    assert_ne!(id, ami.id());
    let source = from.name().to_string();
    drop(from); // it stands alone
    drop(to);
    std::fs::remove_dir_all(dir.path().join("from")).unwrap();
    let to = open(&dir.path().join("to"));
    let image = to.image(id).unwrap();
    let said = image.source_image().unwrap();
    assert_eq!((said.id, said.region.as_str()), (ami.id(), source.as_str()));
    assert_eq!((image.ami().name(), image.description()), ("copy", "first"));
    assert_eq!(bytes(&to.image_disk(id, "/dev/xvda").unwrap()), bytes(&disk(4, 7)));
    let server = launch(&to, &image.ami().typed::<X86_64>().unwrap()).unwrap();
    assert_eq!(server.create_image("child").unwrap().ami.manifest().parent(), Some(&ami.digest()));
    for (name, value, found) in [
        ("source-image-id", ami.id().to_string(), 1),
        ("source-image-region", source, 1),
        ("source-image-id", id.to_string(), 1), // that of its instance
    ] {
        let request = DescribeImages::new().filter(Filter::new(name, [value]).unwrap());
        assert_eq!(to.describe_images(&request).unwrap().items.len(), found, "{name}");
    }
    // Within a region it is said as well.
    let again = to.copy_image(id, "again").unwrap();
    assert_eq!(to.image(again.id()).unwrap().source_image().unwrap().id, id);
}

#[test]
fn what_is_there_is_not_copied_and_of_what_is_alike_only_the_difference() {
    const MIB: u64 = 1 << 20;
    let (_dir, from, to) = world();
    // Nothing is like it, though there are others.
    register(&to, "stranger", &disk(4, 99)).unwrap();
    let parent = disk(4, 7);
    let first = register(&from, "first", &parent).unwrap();
    assert_eq!(copy(&to, &from, first.id(), "first").1, [4 * MIB]);
    assert_eq!(copy(&to, &from, first.id(), "once more").1, [0; 0], "all of it is there");

    // What a server has written, and what it has given back.
    let server = launch(&from, &first).unwrap();
    ask(&server, "write 0 5 changed", "wrote");
    let second = server.create_image("second").unwrap().ami;
    let (id, totals) = copy(&to, &from, second.id(), "second");
    assert_eq!(
        totals,
        [1 << 30, 64 << 10],
        "all of the second disk, which is empty, and a chunk of the root"
    );
    let ami = to.image(id).unwrap().ami().typed::<X86_64>().unwrap();
    ask(&launch(&to, &ami).unwrap(), "read 0 5", "data changed");
    let root = |region: &TestRegion, id: AmiId| bytes(&region.image_disk(id, "/dev/xvda").unwrap());
    assert!(root(&to, id) == root(&from, second.id()));

    // Longer than what it is like, with a hole where that has bytes, and an end that fills no chunk.
    let third = MemoryDisk::new(6 * MIB + 4096).unwrap().into_disk();
    let mut all = bytes(&parent);
    all[MIB as usize..2 * MIB as usize].fill(0);
    third.write_at(&all, 0).unwrap();
    third.write_at(b"end", 6 * MIB + 512).unwrap();
    let third_ami = register(&from, "third", &third).unwrap();
    let (id, totals) = copy(&to, &from, third_ami.id(), "third");
    assert!(totals.iter().all(|total| *total <= MIB + (64 << 10)), "{totals:?}");
    assert_eq!(bytes(&to.image_disk(id, "/dev/xvda").unwrap()), bytes(&third));
    // Shorter than all that is like it.
    let short = MemoryDisk::from_vec(bytes(&parent)[..MIB as usize].to_vec()).unwrap().into_disk();
    let fourth = register(&from, "fourth", &short).unwrap();
    let (id, totals) = copy(&to, &from, fourth.id(), "fourth");
    assert_eq!(totals, [MIB]);
    assert_eq!(bytes(&to.image_disk(id, "/dev/xvda").unwrap()), bytes(&short));
}

#[test]
fn what_cannot_be_copied_leaves_nothing() {
    let (dir, from, to) = world();
    let ami = register(&from, "base", &disk(8, 7)).unwrap();
    register(&to, "taken", &disk(1, 1)).unwrap();
    let path = dir.path().join("to");
    let before = everything(&to, &path);
    let copy =
        |region: &TestRegion, id: AmiId, name: &str| region.copy_image_from(&from, id, CopyImage::new(name));
    let named = copy(&to, ami.id(), "taken").unwrap_err();
    check(&named, ErrorKind::ImageNameDuplicate, "InvalidAMIName.Duplicate", &[]);
    let named = copy(&to, ami.id(), "x").unwrap_err();
    check(&named, ErrorKind::MalformedImageName, "InvalidAMIName.Malformed", &[]);
    let gone = copy(&to, "ami-0123456789abcdef0".parse().unwrap(), "new").unwrap_err();
    check(&gone, ErrorKind::ImageNotFound, "InvalidAMIID.NotFound", &[]);
    let long = "x".repeat(256);
    let long = to.copy_image_from(&from, ami.id(), CopyImage::new("new").description(long)).unwrap_err();
    check(&long, ErrorKind::InvalidParameter, "InvalidParameterValue", &[]);
    let friend = to.as_account("222222222222".parse().unwrap());
    let denied = copy(&friend, ami.id(), "new").unwrap_err();
    check(&denied, ErrorKind::AuthFailure, "AuthFailure", &[]);
    let mut end = |progress: Progress| progress.cancel();
    let ended = to.copy_image_from_with(&from, ami.id(), CopyImage::new("new"), &mut end).unwrap_err();
    check(&ended, ErrorKind::Cancelled, "InternalError", &["cannot copy the content"]);
    from.disable_image(ami.id()).unwrap();
    let disabled = copy(&to, ami.id(), "new").unwrap_err();
    check(&disabled, ErrorKind::ImageUnavailable, "InvalidAMIID.Unavailable", &[]);
    from.enable_image(ami.id()).unwrap();
    let strip = |all: std::collections::BTreeMap<String, String>| -> Vec<_> {
        // A pack that nothing is left in may be there.
        all.into_iter().filter(|(name, _)| !name.contains("/packs/")).collect()
    };
    assert_eq!(strip(everything(&to, &path)), strip(before));

    // A friend may copy what is shared.
    let share = ModifyImageAttribute::new().add_launch_permission(Grantee::Account(*friend.account()));
    from.modify_image_attribute(ami.id(), &share).unwrap();
    let copied = copy(&friend, ami.id(), "new").unwrap();
    assert_eq!(copied.owner(), friend.account());
    assert!(!friend.image(copied.id()).unwrap().launch_permissions().allows(from.account()));
}

/// Two regions may copy from each other at once, while both collect what nothing names.
#[test]
fn regions_copy_from_each_other_at_once() {
    let (_dir, one, two) = world();
    let images =
        [(&one, 1), (&two, 2)].map(|(region, seed)| register(region, "base", &disk(1, seed)).unwrap());
    let there = |to: &TestRegion, from: &TestRegion, id: AmiId| {
        for n in 0..20 {
            let name = format!("copy-{n}");
            let copy = to.copy_image_from(from, id, CopyImage::new(name)).unwrap();
            to.deregister_image(copy.id()).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| there(&one, &two, images[1].id()));
        scope.spawn(|| there(&two, &one, images[0].id()));
    });
}
