//! Instances of a region that has a network.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use ami_core::SecurityGroupId;
use common::region::{image, spec};
use instance_core::testing::FakeHypervisor;
use instance_core::{DescribeInstances, ErrorKind, Region};
use network_vpc::Network;

fn open(dir: &std::path::Path) -> (Region<FakeHypervisor>, Network) {
    common::region::open(dir, FakeHypervisor::new())
}

#[test]
fn an_instance_has_a_place_for_as_long_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let ami = image(&region);
    network.create_key_pair("mine").unwrap();
    let server = region.launch(&ami, spec().key_name("mine")).unwrap();
    let place = server.describe().network.unwrap();
    assert_eq!(place.private_ip.to_string(), "172.31.0.4");
    assert_eq!(place.private_dns_name, "ip-172-31-0-4.eu-west-1.compute.internal");
    assert_eq!(network.interface(place.interface_id).unwrap().instance_id, Some(server.id()));
    let in_use = network.delete_interface(place.interface_id).unwrap_err();
    assert_eq!(in_use.code(), "InvalidNetworkInterface.InUse", "its machine is plugged in");

    let by_address = DescribeInstances::new().filter("private-ip-address", ["172.31.0.4"]);
    assert_eq!(region.describe_instances(&by_address).unwrap().items.len(), 1);

    server.reboot().unwrap();
    server.stop(std::time::Duration::ZERO).unwrap();
    network.plug(place.interface_id).expect("a stopped instance is plugged in nowhere");
    let in_use = network.delete_interface(place.interface_id).unwrap_err();
    assert_eq!(in_use.code(), "InvalidNetworkInterface.InUse", "a stopped instance has it still");
    server.start().unwrap();
    assert_eq!(server.describe().network.as_ref(), Some(&place));
    server.terminate().unwrap();
    assert!(network.interfaces().is_empty());
}

#[test]
fn a_stopped_instance_is_plugged_in_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let server = region.launch(&image(&region), spec()).unwrap();
    let id = server.describe().network.unwrap().interface_id;
    let forward = |port| network.forward(id, port, "127.77.2.1:0".parse().unwrap()).unwrap();
    let forwards: Vec<_> = (1..=8).map(forward).collect();
    forwards.iter().for_each(|at| drop(TcpStream::connect(at).expect("it is listened at")));
    server.stop(Duration::ZERO).unwrap();
    let refused = network.set_metadata(id, None).unwrap_err();
    assert_eq!(refused.kind(), network_vpc::ErrorKind::InterfaceNotFound, "it is not plugged in");
    let is_closed = |at: &SocketAddr| TcpListener::bind(at).is_ok();
    assert!(forwards.iter().all(is_closed), "{forwards:?}");
    assert!(is_closed(&forward(9)), "nobody is there who would answer");
    server.start().unwrap();
    TcpStream::connect(network.interface(id).unwrap().forwards[&9]).expect("it is listened at");
}

#[test]
fn an_instance_is_told_to_be_in_the_groups_that_its_interface_is_in() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let ami = image(&region);
    let vpc = network.default_vpc().unwrap();
    let [one, other] = ["one", "other"].map(|name| network.create_security_group(vpc, name, "").unwrap().id);
    let own = network.create_interface(network.interface_spec().unwrap().groups([one])).unwrap();
    let server = region.launch(&ami, spec().network_interface(own.id)).unwrap();
    let still = region.launch(&ami, spec().security_group(one)).unwrap();
    let groups = |server: &instance_core::Instance| server.describe().network.unwrap().security_groups;
    let found = |region: &Region<FakeHypervisor>, group: SecurityGroupId| {
        let request = DescribeInstances::new().filter("instance.group-id", [group.to_string()]);
        let found = region.describe_instances(&request).unwrap().items;
        assert!(found.iter().all(|d| d.network.as_ref().unwrap().security_groups == [group]));
        found.into_iter().map(|d| d.id).collect::<BTreeSet<_>>()
    };
    let ids = |servers: &[&instance_core::Instance]| servers.iter().map(|s| s.id()).collect::<BTreeSet<_>>();
    assert_eq!(found(&region, one), ids(&[&server, &still]));
    network.modify_groups(own.id, &[other]).unwrap();
    assert_eq!((groups(&server), groups(&still)), (vec![other], vec![one]));
    assert_eq!((found(&region, one), found(&region, other)), (ids(&[&still]), ids(&[&server])));
    let all = region.describe_instances(&DescribeInstances::new()).unwrap().items;
    let told = all.iter().find(|d| d.id == server.id()).unwrap().network.clone();
    assert_eq!(told.unwrap().security_groups, [other]);
    assert_eq!(region.instances().iter().map(groups).collect::<BTreeSet<_>>().len(), 2);

    // One that is gone has nothing to do with what becomes of an interface that stays.
    server.terminate().unwrap();
    let next = region.launch(&ami, spec().network_interface(own.id)).unwrap();
    network.modify_groups(own.id, &[one]).unwrap();
    assert!(found(&region, one).is_superset(&ids(&[&next, &still])));
    assert_eq!(found(&region, other), BTreeSet::new());
    drop((region, server, next, still, network));
    let (region, network) = open(dir.path());
    network.modify_groups(own.id, &[other]).unwrap();
    assert_eq!(found(&region, other).len(), 1);
}

/// A /28 has sixteen addresses, of which EC2 keeps five.
#[test]
fn as_many_are_launched_as_the_subnet_has_addresses_for() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let ami = image(&region);
    let vpc = network.default_vpc().unwrap();
    let small = network.create_subnet(vpc, "172.31.200.0/28".parse().unwrap()).unwrap().id;
    let run = |min, max| region.run_instances(&ami, spec().subnet(small).count(min, max));
    let full = run(12, 13).unwrap_err();
    assert_eq!((full.kind(), full.code()), (ErrorKind::SubnetFull, "InsufficientFreeAddressesInSubnet"));
    assert!(network.interfaces().is_empty() && region.instances().is_empty());
    assert_eq!(run(9, 9).unwrap().instances.len(), 9);
    assert_eq!(run(1, 9).unwrap().instances.len(), 2);
    assert_eq!(run(1, 1).unwrap_err().kind(), ErrorKind::SubnetFull);
    assert_eq!(network.interfaces().len(), 11);
}

#[test]
fn a_dry_run_finds_what_the_network_has_not_got_and_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let ami = image(&region);
    let vpc = network.default_vpc().unwrap();
    let small = network.create_subnet(vpc, "172.31.200.0/28".parse().unwrap()).unwrap().id;
    let free = network.create_interface(network.interface_spec().unwrap()).unwrap().id;
    let used = network.create_interface(network.interface_spec().unwrap()).unwrap().id;
    let server = region.launch(&ami, spec().network_interface(used)).unwrap();
    let taken = server.describe().network.unwrap().private_ip;
    let missing = "0123456789abcdef0";
    let group = || format!("sg-{missing}").parse().unwrap();
    let (fine, file) = (ErrorKind::DryRunOperation, dir.path().join("network/network.json"));
    let (before, interfaces) = (std::fs::read(&file).unwrap(), network.interfaces());
    for (spec, kind) in [
        (spec(), fine),
        (spec().subnet(small).count(11, 99), fine),
        (spec().subnet(small).count(12, 99), ErrorKind::SubnetFull),
        (spec().subnet(format!("subnet-{missing}").parse().unwrap()), ErrorKind::SubnetNotFound),
        (spec().security_group(group()), ErrorKind::SecurityGroupNotFound),
        (spec().private_ip(taken), ErrorKind::AddressInUse),
        (spec().network_interface(free), fine),
        (spec().network_interface(used), ErrorKind::NetworkInterfaceInUse),
        (
            spec().network_interface(format!("eni-{missing}").parse().unwrap()),
            ErrorKind::NetworkInterfaceNotFound,
        ),
    ] {
        let what = format!("{spec:?}");
        let said = region.run_instances(&ami, spec.dry_run(true)).unwrap_err();
        assert_eq!(said.kind(), kind, "{what}: {said}");
        assert!(network.interfaces() == interfaces && std::fs::read(&file).unwrap() == before, "{what}");
    }
}

#[test]
fn an_interface_that_was_there_outlives_its_instances() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let ami = image(&region);
    let own = network.create_interface(network.interface_spec().unwrap()).unwrap();
    let server = region.launch(&ami, spec().network_interface(own.id)).unwrap();
    let place = server.describe().network.unwrap();
    assert_eq!((place.interface_id, place.private_ip, place.mac), (own.id, own.private_ip, own.mac));
    let taken = network.interface(own.id).unwrap();
    assert_eq!(taken.instance_id, Some(server.id()));
    let launch = |spec| region.run_instances(&ami, spec).unwrap_err().code();
    for (spec, code) in [
        (spec().network_interface(own.id), "InvalidNetworkInterface.InUse"),
        (
            spec().network_interface("eni-0123456789abcdef0".parse().unwrap()),
            "InvalidNetworkInterfaceID.NotFound",
        ),
        (spec().network_interface(own.id).subnet(own.subnet_id), "InvalidParameterCombination"),
        (spec().network_interface(own.id).security_group(own.groups[0]), "InvalidParameterCombination"),
        (spec().network_interface(own.id).count(1, 2), "InvalidParameterCombination"),
        (spec().network_interface(own.id).network_interface(own.id), "AttachmentLimitExceeded"),
    ] {
        assert_eq!(launch(spec), code);
    }
    assert_eq!(network.interfaces(), [taken], "and it is its instance's still");
    server.stop(std::time::Duration::ZERO).unwrap();
    server.start().unwrap();
    server.terminate().unwrap();
    assert_eq!(network.interfaces(), std::slice::from_ref(&own), "as it was");
    let next = region.launch(&ami, spec().network_interface(own.id)).unwrap();
    assert_eq!(next.describe().network.unwrap().private_ip, own.private_ip);
    drop((region, next));
    // What a crash leaves of one whose instance never came to be.
    use instance_core::network::Network as _;
    network.keep_only(&Default::default()).unwrap();
    assert_eq!(network.interfaces(), [own]);
}

#[test]
fn a_launch_into_nothing_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let ami = image(&region);
    let taken = network.create_interface(network.interface_spec().unwrap()).unwrap();
    let (subnet, group) =
        ("subnet-0123456789abcdef0".parse().unwrap(), "sg-0123456789abcdef0".parse().unwrap());
    for (launch, kind, code) in [
        (spec().key_name("mine"), ErrorKind::KeyPairNotFound, "InvalidKeyPair.NotFound"),
        (spec().subnet(subnet), ErrorKind::SubnetNotFound, "InvalidSubnetID.NotFound"),
        (spec().security_group(group), ErrorKind::SecurityGroupNotFound, "InvalidGroup.NotFound"),
        (spec().private_ip(taken.private_ip), ErrorKind::AddressInUse, "InvalidIPAddress.InUse"),
        (
            spec().private_ip("10.0.0.1".parse().unwrap()),
            ErrorKind::InvalidParameter,
            "InvalidParameterValue",
        ),
        (
            spec().private_ip("172.31.0.9".parse().unwrap()).count(2, 2),
            ErrorKind::InvalidParameterCombination,
            "InvalidParameterCombination",
        ),
    ] {
        let refused = region.run_instances(&ami, launch).unwrap_err();
        assert_eq!((refused.kind(), refused.code()), (kind, code), "{refused}");
    }
    assert_eq!(network.interfaces(), [taken]);

    // Of a subnet with room for eleven, a launch of twelve takes none.
    let vpc = network.default_vpc().unwrap();
    let small = network.create_subnet(vpc, "172.31.255.0/28".parse().unwrap()).unwrap();
    let refused = region.run_instances(&ami, spec().subnet(small.id).count(12, 12)).unwrap_err();
    assert_eq!(refused.code(), "InsufficientFreeAddressesInSubnet");
    assert_eq!(network.interfaces().len(), 1);
    assert!(region.instances().is_empty());
}

#[test]
fn places_of_instances_that_never_came_to_be_are_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let ami = image(&region);
    let server = region.launch(&ami, spec()).unwrap();
    let place = server.describe().network.unwrap();
    drop((region, server));
    // What a crash leaves between the place and the record of an instance.
    use instance_core::network::{Network as _, PlacementRequest};
    let lost = network.place("i-0123456789abcdef0".parse().unwrap(), &PlacementRequest::default()).unwrap();
    let own = network.create_interface(network.interface_spec().unwrap()).unwrap();
    drop(network);
    let (region, network) = open(dir.path());
    let mut left: Vec<_> = network.interfaces().iter().map(|interface| interface.id).collect();
    left.sort();
    let mut expect = vec![place.interface_id, own.id];
    expect.sort();
    assert_eq!(left, expect);
    assert!(!left.contains(&lost.interface_id));
    region.instances()[0].start().unwrap();
    assert_eq!(region.instances()[0].describe().network, Some(place));
}

#[test]
fn a_region_without_a_network_has_no_places() {
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
    let ami = image(&region);
    let refused =
        region.launch(&ami, spec().subnet("subnet-0123456789abcdef0".parse().unwrap())).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert_eq!(region.launch(&ami, spec().key_name("any")).unwrap().describe().network, None);
}

/// Its machine takes its port up again, whose address the guest keeps in mind.
#[test]
fn an_instance_that_hibernates_goes_on_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path());
    let server = region.launch(&image(&region), spec().hibernation(true)).unwrap();
    let (id, place) = (server.id(), server.describe().network.unwrap());
    let ask = |server: &instance_core::Instance, line: &str, answer: &str| {
        let soon = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let mut reader = server.console().reader_from_now();
        server.console().write_all(format!("{line}\n").as_bytes(), soon).unwrap();
        reader.wait_for(answer, soon).unwrap_or_else(|e| panic!("{line}: {e}"));
    };
    ask(&server, "remember thought", "remembered");
    server.hibernate(std::time::Duration::ZERO).unwrap();
    network.plug(place.interface_id).expect("one that hibernates is plugged in nowhere");
    drop((server, region, network));
    let (region, network) = open(dir.path());
    let server = region.instance(id).unwrap();
    server.start().unwrap();
    assert_eq!(server.describe().network.as_ref(), Some(&place));
    assert_eq!(network.interface(place.interface_id).unwrap().instance_id, Some(id));
    ask(&server, "recall", "recalled thought");
}
