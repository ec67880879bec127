//! A region with a snapshot that could not be made, as version 4 of the format has it since, must open for ever, too.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/records.rs"]
mod records;

use std::path::{Path, PathBuf};

use ami_core::ResourceId;
use common::{TestRegion, disk, soon};
use instance_core::testing::FakeHypervisor;
use instance_core::{
    DescribeSnapshots, ErrorKind, RegionOptions, SnapshotDescription, SnapshotState, VolumeSpec,
};
use records::{fields, make_small, old_region, records};

const TABLE: &str = "unfinished-snapshots";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v4-snapshots")
}

fn open(dir: &Path) -> TestRegion {
    let options = RegionOptions::new().name("eu-central-1".parse().unwrap());
    options.open(dir, FakeHypervisor::new()).unwrap()
}

fn snapshots(region: &TestRegion) -> Vec<SnapshotDescription> {
    region.describe_snapshots(&DescribeSnapshots::new()).unwrap().items
}

/// Closes a region while a snapshot is pending, before it is stored.
fn make(dir: &Path) {
    for seed in 1..50 {
        let region = open(dir);
        let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
        let mut bytes = vec![0; 8 << 20];
        disk(8, seed).read_at(&mut bytes, 0).unwrap();
        region.volume_disk(volume).unwrap().write_at(&bytes, 0).unwrap();
        let pending = region.begin_create_snapshot(volume, "cut off").unwrap().id();
        drop(region);
        let region = open(dir);
        region.delete_volume(volume).unwrap();
        if snapshots(&region)[0].state == SnapshotState::Error {
            region.create_tags(&[ResourceId::from(pending)], &[("stage", "test")]).unwrap();
            return;
        }
        region.delete_snapshot(pending).unwrap();
    }
    panic!("every snapshot is stored before the region is closed");
}

/// Not a test: writes the golden region, once.
#[test]
#[ignore = "writes the golden region of snapshots that could not be made"]
fn write() {
    assert!(!golden().exists(), "what was written once stays as it is");
    make(&golden());
    make_small(&golden());
}

#[test]
fn what_was_added_is_there() {
    let (_dir, path) = old_region(&golden());
    let region = open(&path);
    let [left] = &snapshots(&region)[..] else { panic!("{:?}", snapshots(&region)) };
    assert_eq!((left.state, left.digest, &*left.description), (SnapshotState::Error, None, "cut off"));
    assert_eq!(left.state_reason.clone().unwrap().code, "Server.InternalError");
    assert_eq!(left.tags.iter().collect::<Vec<_>>(), [("stage", "test")]);
    let refused = region.wait_for_snapshot(left.id, soon()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Internal);
    region.delete_snapshot(left.id).unwrap();
}

#[test]
fn a_new_region_has_the_same_records_as_the_golden_one() {
    let (_dir, old) = old_region(&golden());
    let new = old.with_file_name("new");
    make(&new);
    let of_table = |dir: &Path| {
        let mut all = records(dir);
        all.retain(|table, _| table == TABLE);
        all
    };
    let (old, new) = (of_table(&old), of_table(&new));
    assert_eq!((fields(&new), new[TABLE].len()), (fields(&old), 1));
    assert!(fields(&new).contains("unfinished-snapshots.failed.code"), "{new:?}");
}
