//! Launches into a network that has places for few.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use ami_core::{Ami, InstanceId, NetworkInterfaceId, X86_64};
use common::{TestRegion, check, disk, files, register};
use instance_core::machine::NetSpec;
use instance_core::net::{self, MacAddress, NetPort};
use instance_core::network::{Guest, Network, NetworkPlacement, PlacementRequest};
use instance_core::testing::FakeHypervisor;
use instance_core::{
    BlockDeviceMappingRequest, Capacity, Error, ErrorKind, InstanceStore, InstanceType, LaunchSpec,
    RegionOptions, Result,
};

/// A network of so many places, each an address of its own.
#[derive(Debug, Clone)]
struct Narrow {
    most: u8,
    full: ErrorKind,
    taken: Arc<Mutex<HashSet<NetworkInterfaceId>>>,
    ends: Arc<Mutex<Vec<NetPort>>>,
}

impl Narrow {
    fn new(most: u8, full: ErrorKind) -> Self {
        let (taken, ends) = Default::default();
        Self { most, full, taken, ends }
    }

    fn taken(&self) -> usize {
        self.taken.lock().unwrap().len()
    }
}

impl Network for Narrow {
    fn public_key(&self, _: &str) -> Result<String> {
        Ok("ssh-ed25519 AAAA".to_owned())
    }

    fn place(&self, _: InstanceId, _: &PlacementRequest) -> Result<NetworkPlacement> {
        let mut taken = self.taken.lock().unwrap();
        let id = |place| NetworkInterfaceId::from_bytes([place; 16]);
        let free = (1..=self.most).find(|place| !taken.contains(&id(*place)));
        let place = free.ok_or_else(|| Error::new(self.full, "there is no place left"))?;
        taken.insert(id(place));
        let of = ("vpc-0123456789abcdef0".parse()?, "subnet-0123456789abcdef0".parse()?);
        let mac = MacAddress([2, 0, 0, 0, 0, place]);
        Ok(NetworkPlacement::new(id(place), of, Ipv4Addr::new(10, 0, 0, place), mac))
    }

    fn plug(&self, guest: Guest<'_>) -> Result<NetSpec> {
        let (machine, network) = net::link();
        self.ends.lock().unwrap().push(network);
        Ok(NetSpec::new(machine, guest.placement.mac))
    }

    fn update(&self, _: Guest<'_>) {}

    fn release(&self, placement: &NetworkPlacement) -> Result<()> {
        self.taken.lock().unwrap().remove(&placement.interface_id);
        Ok(())
    }

    fn keep_only(&self, _: &HashSet<NetworkInterfaceId>) -> Result<()> {
        Ok(())
    }
}

fn world(network: &Narrow) -> (tempfile::TempDir, TestRegion, Ami<X86_64>) {
    let dir = tempfile::tempdir().unwrap();
    let options = RegionOptions::new().network(network.clone()).capacity(Capacity::new(128, 1 << 20));
    let region = options.open(dir.path(), FakeHypervisor::new()).unwrap();
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    (dir, region, ami)
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

#[test]
fn as_many_are_launched_as_have_places_and_none_below_the_minimum() {
    for (full, code) in [
        (ErrorKind::SubnetFull, "InsufficientFreeAddressesInSubnet"),
        (ErrorKind::InsufficientAddressCapacity, "InsufficientAddressCapacity"),
    ] {
        let network = Narrow::new(3, full);
        let (dir, region, ami) = world(&network);
        let run = |min, max| region.run_instances(&ami, spec().count(min, max)).map(|r| r.instances);
        let before = files(dir.path());
        check(&run(4, 9).unwrap_err(), full, code, &[]);
        assert_eq!((network.taken(), region.used_capacity().0, files(dir.path())), (0, 0, before));
        assert!(region.instances().is_empty());

        let two = run(2, 2).unwrap();
        let more = run(1, 9).unwrap();
        assert_eq!((two.len(), more.len(), region.instances().len()), (2, 1, 3));
        assert_eq!((network.taken(), region.used_capacity().0), (3, 3), "what has no place takes nothing");
        check(&run(1, 1).unwrap_err(), full, code, &[]);
    }
}

#[test]
fn what_else_the_network_refuses_fails_the_launch() {
    let network = Narrow::new(3, ErrorKind::Internal);
    let (_dir, region, ami) = world(&network);
    let refused = region.run_instances(&ami, spec().count(1, 4)).unwrap_err();
    assert_eq!((refused.kind(), network.taken()), (ErrorKind::Internal, 0));
}

#[test]
fn a_dry_run_says_what_the_launch_would_and_leaves_all_as_it_is() {
    let network = Narrow::new(2, ErrorKind::SubnetFull);
    let (dir, region, ami) = world(&network);
    let before = files(dir.path());
    let disk =
        |n: u8| BlockDeviceMappingRequest::new(format!("/dev/xvdb{}", char::from(b'a' + n))).size_gib(1);
    let disks = (0..26).map(disk).chain([BlockDeviceMappingRequest::ephemeral("/dev/sdb", "ephemeral0")]);
    let many = disks.fold(spec(), LaunchSpec::block_device);
    let named = |letter: char| BlockDeviceMappingRequest::new(format!("/dev/xvdc{letter}")).size_gib(1);
    let too_many = ('a'..='z').map(named).fold(many.clone(), LaunchSpec::block_device);
    let vast = InstanceType::custom("vast", 65.try_into().unwrap(), 1.try_into().unwrap());
    let store = InstanceStore { disks: 25, disk_size_gb: 1, nvme: true };
    let store = InstanceType::custom("store", 1.try_into().unwrap(), 1.try_into().unwrap())
        .with_instance_store(store);
    let table = [
        (spec().count(2, 9), ErrorKind::DryRunOperation, "DryRunOperation", ""),
        (spec().count(3, 9), ErrorKind::SubnetFull, "InsufficientFreeAddressesInSubnet", "no place left"),
        (many, ErrorKind::DryRunOperation, "DryRunOperation", ""),
        (too_many, ErrorKind::Unsupported, "UnsupportedOperation", "these disks"),
        (LaunchSpec::new(vast), ErrorKind::Unsupported, "UnsupportedOperation", "vast"),
        (LaunchSpec::new(store), ErrorKind::InvalidParameter, "InvalidParameterValue", "25 disks"),
    ];
    for (spec, kind, code, says) in table {
        let refused = region.run_instances(&ami, spec.clone().dry_run(true)).unwrap_err();
        check(&refused, kind, code, &[says]);
        if kind != ErrorKind::DryRunOperation {
            check(&region.run_instances(&ami, spec).unwrap_err(), kind, code, &[says]);
        }
        assert_eq!((network.taken(), region.used_capacity(), files(dir.path())), (0, (0, 0), before.clone()));
    }
    assert!(region.instances().is_empty());
}
