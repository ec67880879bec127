//! What a region gives the machines that it asks for: limits for their disks, and streams.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ami_core::{Ami, BlockDeviceMapping, X86_64};
use common::{check, disk, soon};
use instance_core::machine::{Capabilities, Execution, Hypervisor, Machine, MachineError, MachineSpec, Runs};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DirectBoot, EbsBandwidth, ErrorKind, ImageSource, InstanceType, LaunchSpec, Region, RegionOptions,
};

/// Keeps what it was asked for, and may have streams.
#[derive(Debug, Clone, Default)]
struct Noting {
    fake: FakeHypervisor,
    vsock: bool,
    asked: Arc<Mutex<Vec<MachineSpec>>>,
}

impl Hypervisor for Noting {
    fn capabilities(&self) -> Capabilities {
        let mut can = self.fake.capabilities();
        can.vsock = self.vsock;
        can
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.fake.execution()
    }

    fn create(&self, mut spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.capabilities().check(&spec)?;
        self.asked.lock().unwrap().push(spec.clone());
        spec.vsock = None;
        self.fake.create(spec)
    }
}

impl Runs<X86_64> for Noting {}

fn open(dir: &Path, options: RegionOptions, host: &Noting) -> (Region<Noting>, Ami<X86_64>) {
    let region = options.open(dir, host.clone()).unwrap();
    let root = disk(1, 7);
    let source = ImageSource::new(&root).boot(DirectBoot::new(tiny_elf(), None, ""));
    let data = BlockDeviceMapping::blank("/dev/sdf", 1);
    let ami = region.register_image(Ami::<X86_64>::builder("base").block_device(data), source).unwrap();
    (region, ami)
}

#[test]
fn the_volumes_of_an_instance_are_held_to_the_bandwidth_of_its_type_together() {
    // A megabyte in a second, of which one is saved up.
    let bandwidth = EbsBandwidth { baseline_mbps: 8, maximum_mbps: 8 };
    let hardware = InstanceType::custom("lab.slow", 1.try_into().unwrap(), 256.try_into().unwrap())
        .with_ebs_bandwidth(bandwidth);
    let took = |options: RegionOptions| {
        let (dir, host) = (tempfile::tempdir().unwrap(), Noting::default());
        let (region, ami) = open(dir.path(), options, &host);
        let _instance = region.launch(&ami, LaunchSpec::new(hardware.clone())).unwrap();
        let disks = host.asked.lock().unwrap()[0].disks.clone();
        assert_eq!(disks.len(), 2);
        let begun = Instant::now();
        for _ in 0..2 {
            disks.iter().for_each(|disk| disk.disk.write_at(&[1; 512 << 10], 0).unwrap());
        }
        begun.elapsed()
    };
    let (limited, free) = (took(RegionOptions::new()), took(RegionOptions::new().ebs_limits(false)));
    assert!(limited >= Duration::from_millis(400), "{limited:?}, and {free:?} without limits");
    assert!(free < limited, "{limited:?}, and {free:?} without limits");
}

#[test]
fn machines_have_the_threads_of_their_type() {
    let (dir, host) = (tempfile::tempdir().unwrap(), Noting::default());
    let (region, ami) = open(dir.path(), RegionOptions::new(), &host);
    for (hardware, threads) in [("t3.micro", 2), ("t2.medium", 1)] {
        let _instance = region.launch(&ami, LaunchSpec::new(hardware.parse().unwrap())).unwrap();
        let told = host.asked.lock().unwrap().last().map(|spec| spec.threads_per_core.get());
        assert_eq!(told, Some(threads), "{hardware}");
    }
}

/// By which cloud-init and others know that they are on EC2, and which instance they are.
#[test]
fn machines_have_the_identity_that_instances_of_ec2_have() {
    let (dir, host) = (tempfile::tempdir().unwrap(), Noting::default());
    let (region, ami) = open(dir.path(), RegionOptions::new(), &host);
    let mut seen = Vec::new();
    for _ in 0..2 {
        let instance = region.launch(&ami, LaunchSpec::new("t3.micro".parse().unwrap())).unwrap();
        let identity = host.asked.lock().unwrap().last().unwrap().identity.clone().unwrap();
        assert!(identity.serial.starts_with("ec2"), "{identity:?}");
        assert_eq!(identity.serial, identity.uuid_text());
        assert_eq!((&*identity.vendor, &*identity.product), ("Amazon EC2", "t3.micro"));
        assert_eq!(identity.asset_tag, instance.id().to_string());
        seen.push(identity.serial);
    }
    assert_ne!(seen[0], seen[1]);
}

#[test]
fn machines_have_streams_where_the_region_was_opened_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let nano = || LaunchSpec::new("t2.nano".parse().unwrap());
    let host = Noting { vsock: true, ..Noting::default() };
    let (region, ami) = open(&dir.path().join("with"), RegionOptions::new().vsock(true), &host);
    let instance = region.launch(&ami, nano()).unwrap();
    assert!(instance.vsock().is_ok() && host.asked.lock().unwrap()[0].vsock.is_some());
    let first = instance.vsock().unwrap().listen(5000).unwrap();
    // What was asked for holds the machine's volumes and its end of the streams.
    host.asked.lock().unwrap().clear();
    instance.reboot().unwrap();
    assert!(first.accept(soon()).is_err(), "its machine is gone");
    instance.vsock().unwrap().listen(5000).unwrap();
    host.asked.lock().unwrap().clear();
    instance.stop(Duration::ZERO).unwrap();
    let refused = instance.vsock().unwrap_err();
    check(&refused, ErrorKind::IncorrectInstanceState, "IncorrectInstanceState", &["stopped"]);

    let (region, ami) = open(&dir.path().join("without"), RegionOptions::new(), &host);
    let refused = region.launch(&ami, nano()).unwrap().vsock().unwrap_err();
    check(&refused, ErrorKind::Unsupported, "UnsupportedOperation", &["opened without"]);
    assert!(host.asked.lock().unwrap().last().unwrap().vsock.is_none());

    let host = Noting::default();
    let (region, ami) = open(&dir.path().join("cannot"), RegionOptions::new().vsock(true), &host);
    let refused = region.launch(&ami, nano()).unwrap_err();
    check(&refused, ErrorKind::Unsupported, "UnsupportedOperation", &["no streams"]);
    assert!(region.instances().is_empty());
}
