//! A region directory that was damaged, or that another process has: the error says which file and
//! what to do, nothing is lost to it, and nothing panics.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ami_core::{Ami, ImageState, X86_64};
use common::{ask, check, disk, everything, files, launch, open, register, told, try_open};
use instance_core::{Error, ErrorKind};

/// A region with an image and a stopped instance, closed.
fn region() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("region");
    let region = open(&path);
    let instance = launch(&region, &register(&region, "base-image", &disk(1, 1)).unwrap()).unwrap();
    // Its volumes are durable, and there is nothing to make again.
    ask(&instance, "write 0 0 word", "wrote");
    instance.stop(std::time::Duration::ZERO).unwrap();
    (dir, path)
}

/// The first error that a region gives when it is opened and looked at.
fn first_error(dir: &Path) -> Option<Error> {
    match try_open(dir) {
        Err(e) => Some(e),
        Ok(region) => region.images().err(),
    }
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) -> usize {
    let places: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
    for at in &places {
        bytes[*at..at + to.len()].copy_from_slice(to);
    }
    places.len()
}

#[test]
fn a_record_that_was_altered_is_named() {
    let (_dir, path) = region();
    let database = path.join("region.db");
    let whole = std::fs::read(&database).unwrap();
    let before = files(&path);
    for (from, to) in [
        ("base-image", "lies-image"),
        ("\"architecture\":\"x86_64\"", "\"architecture\":\"arm64\" "),
        ("\"volumeSizeGib\":1,", "\"volumeSizeGib\":9,"),
        ("\"state\":\"stopped\"", "\"state\":\"running\""),
        ("\"launched\":true", "\"launched\":fals"),
        ("\"size\":1073741824", "\"size\":9073741824"),
        ("\"format\":1", "\"format\":2"),
    ] {
        let mut altered = whole.clone();
        assert!(replace(&mut altered, from.as_bytes(), to.as_bytes()) > 0, "{from} is nowhere");
        std::fs::write(&database, &altered).unwrap();
        let error = first_error(&path).unwrap_or_else(|| panic!("{from} was believed"));
        check(&error, ErrorKind::Corrupt, "InternalError", &["is damaged", "put back a copy"]);
        assert_eq!(files(&path), before, "{from}");
    }
    std::fs::write(&database, whole).unwrap();
    assert_eq!(open(&path).images().unwrap().len(), 1);
}

/// Bytes of the state store are changed, or it is cut. Whatever redb makes of it, it is an error or
/// what was there.
#[test]
fn a_state_store_that_was_cut_or_changed_is_an_error() {
    let (_dir, path) = region();
    let database = path.join("region.db");
    let whole = std::fs::read(&database).unwrap();
    let before = everything(&open(&path), &path);
    let damaged = |bytes: &[u8], what: &str| {
        std::fs::write(&database, bytes).unwrap();
        let Some(error) = first_error(&path) else {
            assert_eq!(everything(&open(&path), &path), before, "{what}");
            return false;
        };
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {}", told(&error));
        assert!(told(&error).contains("put back a copy"), "{what}: {}", told(&error));
        true
    };
    let mut refused = 0;
    for len in [0, 1, 9, 64, 320, 511, 512, 4095, 4096, 8192, whole.len() / 2, whole.len() - 4096] {
        refused += usize::from(damaged(&whole[..len], &format!("cut to {len}")));
    }
    assert!(refused > 6, "of 12 cut files {refused} were refused");
    // The header, and the beginning of every page that has one.
    let pages = (4096..whole.len()).step_by(4096).filter(|at| whole[*at] != 0).take(24);
    for at in (0..320).step_by(5).chain(pages) {
        for change in [0x01, 0xff] {
            let mut altered = whole.clone();
            altered[at] ^= change;
            damaged(&altered, &format!("byte {at} changed by {change:#x}"));
        }
    }
    std::fs::write(&database, &whole).unwrap();
    assert_eq!(everything(&open(&path), &path), before);
}

/// A region without its state store would be taken for a new one, in which nothing names the volumes.
#[test]
fn a_region_that_lost_its_state_store_loses_nothing_more() {
    let (_dir, path) = region();
    let kept = path.join("../region.db");
    std::fs::rename(path.join("region.db"), &kept).unwrap();
    let before = files(&path);
    let error = first_error(&path).unwrap();
    check(
        &error,
        ErrorKind::Corrupt,
        "InternalError",
        &["lost its state store", "put back a copy of region.db"],
    );
    assert_eq!(files(&path), before);
    std::fs::rename(&kept, path.join("region.db")).unwrap();
    open(&path).instances()[0].start().unwrap();
}

/// Files of volumes and snapshots that are gone or not what they were.
#[test]
fn a_volume_or_snapshot_that_was_damaged_is_named() {
    type Damage = fn(&Path);
    let cut: Damage = |path| std::fs::write(path, b"short").unwrap();
    let gone: Damage = |path| std::fs::remove_file(path).unwrap();
    let table: [(&str, Damage, &str); 5] = [
        ("log", cut, "header ends"),
        ("log", gone, "No such file"),
        ("overlay", gone, "No such file"),
        ("boot", gone, "cannot open the boot file"),
        ("snapshot", cut, "does not have the digest"),
    ];
    for (what, damage, says) in table {
        let (_dir, path) = region();
        let held = open(&path);
        let instance = held.instances().remove(0);
        let root = path.join("volumes").join(instance.describe().attachments[0].volume_id.to_string());
        let only = |dir: &str| std::fs::read_dir(path.join(dir)).unwrap().next().unwrap().unwrap().path();
        damage(&match what {
            "boot" => only("boot"),
            "snapshot" => only("blocks/snapshots"),
            "overlay" => root.join("overlay"),
            // Its name goes on with what the volume began as.
            _ => {
                let files = std::fs::read_dir(&root).unwrap().map(|file| file.unwrap().path());
                let log = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("log");
                files.into_iter().find(log).unwrap()
            }
        });
        let before = files(&path);
        let error = instance.start().unwrap_err();
        let text = told(&error);
        assert!(text.contains(says), "{what}: {text}");
        assert_eq!(instance.state(), instance_core::InstanceState::Stopped, "{what}");
        assert!(instance.describe().state_reason.unwrap().message.contains("cannot"), "{what}");
        assert_eq!(files(&path), before, "{what}");
        instance.terminate().unwrap();
    }
}

/// An image whose content is damaged closes nothing but itself: the region opens, with others all goes on, and registering
/// the same bytes once more mends it.
#[test]
fn a_damaged_image_is_alone_in_it() {
    for damaged in ["root", "leaf", "pack"] {
        let (_dir, path) = region();
        let region = open(&path);
        let (base, bytes) = (region.images().unwrap().remove(0).ami().typed::<X86_64>().unwrap(), disk(1, 1));
        let [kept, gone] =
            [2, 3].map(|seed| register(&region, &format!("image-{seed}"), &disk(1, seed)).unwrap());
        let content = |ami: &Ami<X86_64>| {
            let mappings = ami.manifest().block_device_mappings();
            *mappings.iter().find_map(|mapping| mapping.content()).unwrap()
        };
        let root = |ami: &Ami<X86_64>| path.join("blocks/snapshots").join(content(ami).to_hex());
        let (base_root, gone_root) = (root(&base), root(&gone));
        drop(region);
        let (file, at) = match damaged {
            "root" => (base_root.clone(), 70),
            // Behind sixteen chunks.
            "leaf" => (path.join("blocks/packs/00000000.pack"), 4096 + (1 << 20) + 9),
            _ => (path.join("blocks/packs/00000000.pack"), 3),
        };
        let mut altered = std::fs::read(&file).unwrap();
        altered[at] ^= 1;
        std::fs::write(&file, altered).unwrap();

        let region = open(&path);
        if damaged != "pack" {
            ask(&launch(&region, &kept).unwrap(), "read 0 0", "data");
        }
        let concerned = |region: &common::TestRegion| {
            let found = region.scrub(&mut |_| ()).unwrap();
            let mut images = found.damaged_images;
            images.retain(|id| *id != gone.id());
            (
                images.into_iter().collect::<BTreeSet<_>>(),
                found.damaged_volumes.len(),
                found.content.damages.len(),
            )
        };
        let (images, volumes, damages) = concerned(&region);
        let with_it = (damaged == "pack").then_some(kept.id());
        assert_eq!(images, [base.id()].into_iter().chain(with_it).collect());
        assert!(volumes > 0 && damages > 0, "{damaged}: {volumes} volumes, {damages} damages");
        region.deregister_image(gone.id()).unwrap();
        assert!(!gone_root.exists() && base_root.exists(), "{damaged}");
        match launch(&region, &base) {
            Err(error) => check(&error, ErrorKind::Corrupt, "InternalError", &[&content(&base).to_hex()]),
            Ok(instance) => {
                assert_ne!(damaged, "root");
                ask(&instance, "read 0 0", "error");
                let root = region.image_disk(base.id(), "/dev/xvda").unwrap();
                let error = root.read_at(&mut [0; 512], 0).unwrap_err();
                assert_eq!(error.kind(), storage_block::ErrorKind::Corrupt, "{damaged}");
            }
        }

        // What is registered now is whole, with all that has its bytes; an image whose damage its launch met stays invalid.
        let again = register(&region, "the same again", &bytes).unwrap();
        let invalid = region.image(base.id()).unwrap().state() == ImageState::Invalid;
        assert_eq!(invalid, damaged == "root");
        let base = if invalid { again } else { base };
        ask(&launch(&region, &base).unwrap(), "read 0 0", "data");
        assert_eq!(concerned(&region).0, with_it.into_iter().collect());
        drop(region);
        ask(&launch(&open(&path), &base).unwrap(), "read 0 0", "data");
    }
}

/// A record whose content is not there, as one is that was put into the catalogue alone.
#[test]
fn what_is_lost_is_named_as_what_is_damaged() {
    let (_dir, path) = region();
    let region = open(&path);
    let cancelled = region.scrub(&mut |progress| progress.cancel()).unwrap_err();
    assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
    let image = region.images().unwrap().remove(0);
    let volume = region.instances()[0].describe().attachments[0].volume_id;
    let snapshot = region.create_snapshot(volume, "").unwrap();
    let whole = region.scrub(&mut |_| ()).unwrap();
    assert!(whole.damaged_images.is_empty() && whole.damaged_snapshots.is_empty(), "{whole:?}");
    assert!(whole.content.objects > 16 && whole.damaged_volumes.is_empty(), "{whole:?}");
    for root in std::fs::read_dir(path.join("blocks/snapshots")).unwrap() {
        std::fs::remove_file(root.unwrap().path()).unwrap();
    }
    let found = region.scrub(&mut |_| ()).unwrap();
    assert_eq!((found.damaged_images, found.damaged_snapshots), (vec![image.id()], vec![snapshot.id]));
    assert_eq!(found.damaged_volumes, [volume]);
}

/// Not a test of its own: another process that has a region open until it is told to go.
#[test]
#[ignore = "run by `a_region_that_another_process_has_is_refused`"]
fn owner() {
    let Ok(dir) = std::env::var("REGION_OWNER") else { return };
    let _region = open(Path::new(&dir));
    println!("\nopen");
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn a_region_that_another_process_has_is_refused() {
    let (_dir, path) = region();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner", "--ignored", "--nocapture", "--test-threads=1"])
        .env("REGION_OWNER", &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "open"));
    let before = files(&path);
    let error = try_open(&path).unwrap_err();
    let says = ["in use by another process", "close that one first", path.to_str().unwrap()];
    check(&error, ErrorKind::RegionInUse, "ResourceInUse", &says);
    assert_eq!(files(&path), before);
    // The lock goes with its process, however that ends.
    owner.kill().unwrap();
    owner.wait().unwrap();
    open(&path);
}

#[test]
fn a_directory_that_cannot_be_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, b"precious").unwrap();
    for path in [file.clone(), file.join("below")] {
        let error = try_open(&path).unwrap_err();
        check(&error, ErrorKind::Internal, "InternalError", &["cannot make the region directory"]);
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}
