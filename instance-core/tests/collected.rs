//! What nothing names is removed, at the latest when what kept it has gone.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;

use common::world;
use instance_core::{ErrorKind, VolumeSpec};

#[test]
fn what_could_not_be_collected_goes_when_the_next_thing_is_removed() {
    let (dir, region, ami) = world();
    let stored = fs::read_dir(dir.path().join("blocks/snapshots")).unwrap();
    let stored: Vec<_> = stored.map(|entry| entry.unwrap().path()).collect();
    let [content] = &stored[..] else { panic!("{stored:?}") };
    // In its place is what cannot be removed as it is.
    let aside = dir.path().join("aside");
    fs::rename(content, &aside).unwrap();
    fs::create_dir_all(content.join("in the way")).unwrap();
    let refused = region.deregister_image(ami.id()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Internal, "{refused}");
    assert!(region.images().unwrap().is_empty(), "the image has gone all the same");
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap();
    assert!(content.exists(), "it is still in the way, of nobody who makes something else");
    fs::remove_dir_all(content).unwrap();
    fs::rename(&aside, content).unwrap();
    let snapshot = region.create_snapshot(volume.id, "").unwrap();
    assert!(content.exists(), "who makes something does not look for it all the time");
    region.delete_snapshot(snapshot.id).unwrap();
    assert!(!content.exists(), "it is tried again");
}
