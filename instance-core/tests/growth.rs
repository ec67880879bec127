//! Volumes that are made larger, where the store fails meanwhile: the record and the disk have one size.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Duration;

use common::failing::{Failing, How};
use common::{TestRegion, ask, disk, register};
use instance_core::testing::FakeHypervisor;
use instance_core::{
    DescribeVolumes, ErrorKind, LaunchSpec, RegionOptions, VolumeModificationState, VolumeSpec,
};

fn size_of(region: &TestRegion, id: ami_core::VolumeId) -> u64 {
    region.describe_volumes(&DescribeVolumes::new().id(id)).unwrap().items[0].size_gib
}

#[test]
fn a_growth_that_cannot_be_committed_has_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let store = Failing::new();
    let open =
        || RegionOptions::new().state_store(store.clone()).open(dir.path(), FakeHypervisor::new()).unwrap();
    let mut region = open();
    let id = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let mut size = 1;
    for how in [How::Fails, How::FailsLate] {
        for closed in [false, true] {
            store.set(how);
            assert_eq!(region.grow_volume(id, 20).unwrap_err().kind(), ErrorKind::Internal);
            store.set(How::Works);
            if closed {
                drop(region);
                region = open();
            }
            assert_eq!(size_of(&region, id), size);
            assert_eq!(region.volume_disk(id).unwrap().size(), size << 30);
            // It can still grow to less than that, and what is made of it is as large.
            size += 1;
            region.grow_volume(id, size as u32).unwrap();
            assert_eq!(region.volume_disk(id).unwrap().size(), size << 30);
            let snapshot = region.create_snapshot(id, "").unwrap();
            assert_eq!(snapshot.volume_size_gib, size);
            let of_it = region.create_volume(VolumeSpec::of_snapshot(snapshot.id)).unwrap();
            assert_eq!(of_it.size_gib, size);
        }
    }
    let told = region.describe_volumes_modifications(&DescribeVolumes::new().id(id)).unwrap().items;
    assert_eq!((told[0].original_size_gib, told[0].target_size_gib), (size - 1, size));
    assert_eq!(told[0].state, VolumeModificationState::Completed);
}

#[test]
fn a_guest_sees_the_size_that_its_volume_is_said_to_have() {
    let dir = tempfile::tempdir().unwrap();
    let store = Failing::new();
    let region =
        RegionOptions::new().state_store(store.clone()).open(dir.path(), FakeHypervisor::new()).unwrap();
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
    let data = server.describe().attachments[1].volume_id;
    region.grow_volume(data, 2).unwrap();
    store.set(How::Fails);
    region.grow_volume(data, 20).unwrap_err();
    store.set(How::Works);
    let seen = |size: u64| {
        assert_eq!(ask(&server, "size 1", "size"), (size << 30).to_string());
        assert_eq!(size_of(&region, data), size);
    };
    seen(2);
    region.grow_volume(data, 3).unwrap();
    seen(3);
    server.stop(Duration::ZERO).unwrap();
    server.start().unwrap();
    seen(3);
}
