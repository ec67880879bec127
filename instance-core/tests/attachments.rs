//! Which volumes an instance can have.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Duration;

use ami_core::{VolumeId, VolumeType, X86_64};
use common::cable::Cable;
use common::{TestRegion, ask, disk, open, refused, register, world};
use instance_core::machine::{Capabilities, Execution, Hypervisor, Machine, MachineError, MachineSpec, Runs};
use instance_core::testing::FakeHypervisor;
use instance_core::{
    DescribeInstances, DescribeVolumes, ErrorKind, InstanceStore, InstanceType, LaunchSpec, ModifyVolume,
    NoCloudSeed, Region, RegionOptions, VolumeSpec,
};

/// Makes machines of few disks, or of few disks and ports together.
#[derive(Debug, Clone, Copy)]
struct Small {
    disks: usize,
    devices: usize,
}

impl Hypervisor for Small {
    fn capabilities(&self) -> Capabilities {
        let mut can = FakeHypervisor::new().capabilities();
        (can.max_disks, can.max_devices) = (self.disks, self.devices);
        can
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        FakeHypervisor::new().execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.capabilities().check(&spec)?;
        FakeHypervisor::new().create(spec)
    }
}

impl Runs<X86_64> for Small {}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

fn volume(region: &Region<Small>) -> VolumeId {
    region.create_volume(VolumeSpec::new(1)).unwrap().id
}

/// An instance has as many disks as its machine can have, whether it has one just now or not.
#[test]
fn more_volumes_than_a_machine_can_have_are_not_attached() {
    let store = InstanceType::custom("store", 1.try_into().unwrap(), 64.try_into().unwrap())
        .with_instance_store(InstanceStore { disks: 1, disk_size_gb: 1, nvme: true });
    let seed = spec().nocloud_seed(NoCloudSeed::new());
    let most = |disks, devices| Small { disks, devices };
    for (can, network, spec) in [
        (most(3, usize::MAX), false, spec()),
        (most(4, usize::MAX), false, seed),
        (most(4, usize::MAX), false, LaunchSpec::new(store)),
        (most(9, 4), true, spec()),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let ami = register(&open(dir.path()), "base", &disk(1, 7)).unwrap();
        let options = match network {
            true => RegionOptions::new().network(Cable::default()),
            false => RegionOptions::new(),
        };
        let region = options.open(dir.path(), can).unwrap();
        let server = region.launch(&ami, spec).unwrap();
        let [last, over] = [(); 2].map(|()| volume(&region));
        let full = || {
            let attached = region.attach_volume(over, server.id(), "/dev/sdh");
            refused(attached, ErrorKind::AttachmentLimitExceeded, "AttachmentLimitExceeded");
            assert_eq!(server.describe().attachments.len(), 3);
        };
        region.attach_volume(last, server.id(), "/dev/sdg").unwrap();
        full();
        server.stop(Duration::ZERO).unwrap();
        full();
        server.start().unwrap();
        full();
        region.detach_volume(last).unwrap();
        region.attach_volume(over, server.id(), "/dev/sdh").unwrap();
        ask(&server, "ping again", "pong again");
    }
}

#[test]
fn a_root_volume_is_of_a_type_that_instances_boot_from() {
    let (_dir, region, ami) = world();
    let server = region.launch(&ami, spec()).unwrap();
    let [root, data] = [0, 1].map(|n| server.describe().attachments[n].volume_id);
    let to = |volume_type| ModifyVolume::new().size_gib(125).volume_type(volume_type);
    let unbootable = |result: instance_core::Result<()>| {
        refused(result, ErrorKind::BootForVolumeTypeUnsupported, "BootForVolumeTypeUnsupported");
    };
    for slow in [VolumeType::St1, VolumeType::Sc1] {
        unbootable(region.modify_volume(root, to(slow)).map(drop));
        region.modify_volume(data, to(slow)).unwrap();
    }
    let same = region.describe_volumes(&DescribeVolumes::new().id(root)).unwrap().items.remove(0);
    assert_eq!((same.volume_type, same.size_gib), (VolumeType::Gp3, 1));

    server.stop(Duration::ZERO).unwrap();
    unbootable(region.modify_volume(root, to(VolumeType::St1)).map(drop));
    for volume in [root, data] {
        region.detach_volume(volume).unwrap();
    }
    // By any name that the root device has.
    for device in ["/dev/sda1", "/dev/xvda"] {
        unbootable(region.attach_volume(data, server.id(), device));
    }
    region.modify_volume(root, to(VolumeType::Sc1)).unwrap();
    unbootable(region.attach_volume(root, server.id(), "/dev/sda1"));
    region.modify_volume(root, to(VolumeType::Gp2)).unwrap();
    region.attach_volume(root, server.id(), "/dev/sda1").unwrap();
    region.attach_volume(data, server.id(), "/dev/sdf").unwrap();
    server.start().unwrap();
}

/// Its kept volume may be another's by then, also once the region is opened again.
#[test]
fn an_instance_that_is_terminated_has_no_volumes() {
    let (dir, region, ami) = world();
    let first = region.launch(&ami, spec()).unwrap();
    let kept = first.describe().attachments[1].volume_id;
    first.terminate().unwrap();
    let second = region.launch(&ami, spec()).unwrap();
    region.attach_volume(kept, second.id(), "/dev/sdg").unwrap();
    let ids = [&first, &second].map(instance_core::Instance::id);
    let check = |region: &TestRegion| {
        let with = |filter: &str, value: String| {
            let found = region.describe_instances(&DescribeInstances::new().filter(filter, [value])).unwrap();
            found.items.iter().map(|d| d.id).collect::<Vec<_>>()
        };
        assert_eq!(with("block-device-mapping.volume-id", kept.to_string()), ids[1..]);
        assert_eq!(with("block-device-mapping.device-name", "/dev/sd?".to_owned()), ids[1..]);
        assert_eq!(with("instance-state-name", "terminated".to_owned()), ids[..1]);
        assert_eq!(region.instance(ids[0]).unwrap().describe().attachments, []);
    };
    assert_eq!(first.watch().get().attachments, []);
    check(&region);
    drop((first, second, region));
    check(&open(dir.path()));
}
