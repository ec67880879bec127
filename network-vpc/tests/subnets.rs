//! Subnets, the default one among them, and networks of old.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::path::Path;

use ami_core::SubnetId;
use common::region::{image, open, spec};
use instance_core::ErrorKind as RegionErrorKind;
use instance_core::testing::FakeHypervisor;
use network_vpc::{ErrorKind, InterfaceSpec, Network, RouteState, RouteTarget};

/// What a launch takes that names no subnet.
fn default_subnet(network: &Network) -> Option<SubnetId> {
    let spec = network.interface_spec().ok()?;
    Some(network.create_interface(spec).unwrap().subnet_id)
}

/// Ids are random, so that of many subnets some would come before it.
#[test]
fn a_launch_that_names_no_subnet_is_in_the_default_one() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path(), FakeHypervisor::new());
    let vpc = network.default_vpc().unwrap();
    let default = network.subnets()[0].clone();
    assert!(default.default_for_az);
    for n in 32..64 {
        let made = network.create_subnet(vpc, format!("172.31.{n}.0/24").parse().unwrap()).unwrap();
        assert!(!made.default_for_az);
    }
    assert_eq!(default_subnet(&network), Some(default.id));
    let ami = image(&region);
    let server = region.launch(&ami, spec()).unwrap();
    assert_eq!(server.describe().network.unwrap().subnet_id, default.id);
    drop((region, server, network));
    let (region, network) = open(dir.path(), FakeHypervisor::new());
    assert_eq!(default_subnet(&network), Some(default.id), "when it is opened again");

    // No other takes its place.
    region.instances()[0].terminate().unwrap();
    for interface in network.interfaces() {
        network.delete_interface(interface.id).unwrap();
    }
    network.delete_subnet(default.id).unwrap();
    let refused = region.run_instances(&ami, spec()).unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (RegionErrorKind::SubnetNotSpecified, "MissingInput"));
    assert_eq!(network.interface_spec().unwrap_err().kind(), ErrorKind::SubnetNotSpecified);
    drop((region, network));
    let (region, network) = open(dir.path(), FakeHypervisor::new());
    assert_eq!(network.interface_spec().unwrap_err().kind(), ErrorKind::SubnetNotSpecified);
    // Nor that of the VPC.
    let vpc = network.default_vpc().unwrap();
    network.subnets().iter().for_each(|left| network.delete_subnet(left.id).unwrap());
    network.detach_internet_gateway(network.internet_gateways()[0].id, vpc).unwrap();
    network.delete_vpc(vpc).unwrap();
    let refused = region.run_instances(&ami, spec()).unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (RegionErrorKind::VpcNotSpecified, "VPCIdNotSpecified"));
    assert_eq!(network.default_vpc().unwrap_err().kind(), ErrorKind::VpcNotSpecified);
}

/// With all that the first one had.
#[test]
fn a_default_vpc_and_its_subnet_are_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let name = "eu-west-1".parse().unwrap();
    let network = Network::open(dir.path(), &name).unwrap();
    let (vpc, first) = (network.vpcs()[0].clone(), network.subnets()[0].clone());
    network.delete_subnet(first.id).unwrap();
    let conflicting = network.create_subnet(vpc.id, "172.31.4.0/24".parse().unwrap()).unwrap();
    let made = network.create_default_subnet("eu-west-1a").unwrap();
    assert_eq!((made.cidr.to_string().as_str(), made.default_for_az), ("172.31.16.0/20", true));
    assert_eq!(network.interface_spec().unwrap(), InterfaceSpec::new(made.id));
    for subnet in [conflicting.id, made.id] {
        network.delete_subnet(subnet).unwrap();
    }
    let made = network.create_default_subnet("eu-west-1a").unwrap();
    let mut expect = first.clone();
    expect.id = made.id;
    assert_eq!(made, expect, "as it was");

    network.delete_subnet(made.id).unwrap();
    network.detach_internet_gateway(network.internet_gateways()[0].id, vpc.id).unwrap();
    network.delete_vpc(vpc.id).unwrap();
    let again = network.create_default_vpc().unwrap();
    assert_eq!((again.cidr, again.is_default, again.id == vpc.id), (vpc.cidr, true, false));
    drop(network);
    let network = Network::open(dir.path(), &name).unwrap();
    assert_eq!(network.default_vpc().unwrap(), again.id);
    (expect.id, expect.vpc_id) = (network.subnets()[0].id, again.id);
    assert_eq!(network.subnets(), [expect]);
    let main = network.main_route_table(again.id).unwrap();
    assert_eq!(network.routes(main.id).unwrap()[0].state, RouteState::Active);
    assert!(network.create_interface(network.interface_spec().unwrap()).is_ok());
}

fn of_old(dir: &Path, text: &str) -> Network {
    std::fs::write(dir.join("network.json"), text).unwrap();
    Network::open(dir, &"eu-west-1".parse().unwrap()).unwrap()
}

#[test]
fn a_network_of_format_1_has_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let network = of_old(dir.path(), include_str!("golden/network-1.json"));
    let vpc = network.default_vpc().unwrap();
    let main = network.main_route_table(vpc).unwrap();
    assert_eq!(network.routes(main.id).unwrap()[0].state, RouteState::Active);
    assert_eq!(network.interfaces().len(), 1);
    let made = network.create_key_pair("new").unwrap().key_pair;
    drop(network);
    let network = Network::open(dir.path(), &"eu-west-1".parse().unwrap()).unwrap();
    assert_eq!(network.main_route_table(vpc).unwrap(), main);
    assert_eq!(network.key_pair("new").unwrap(), made);
}

#[test]
fn a_network_of_old_has_the_default_subnet_that_it_was_made_with() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = [include_str!("golden/network-1.json"), include_str!("golden/network-2.json")];
    let default = "subnet-d8e0875d851bcb2b1".parse().ok();
    for old in [first, second] {
        assert_eq!(default_subnet(&of_old(dir.path(), old)), default);
    }
    // Where that one is gone, another of the default VPC's has its place, as it had then.
    let moved = second.replace("172.31.0.0/20", "172.31.16.0/20").replace("172.31.0.4", "172.31.16.4");
    assert_eq!(default_subnet(&of_old(dir.path(), &moved)), "subnet-08e0875d851bcb2b0".parse().ok());
}

/// What is kept, whatever it was that kept it, is kept as it was.
#[test]
fn a_network_of_today_and_one_of_before_keep_all_that_they_have() {
    for (text, routes) in
        [(include_str!("golden/network-3.json"), 1), (include_str!("golden/network-4.json"), 2)]
    {
        let dir = tempfile::tempdir().unwrap();
        let network = of_old(dir.path(), text);
        let private = network.route_tables().into_iter().find(|table| !table.is_main).unwrap();
        let there = network.routes(private.id).unwrap();
        assert_eq!(there.len(), routes);
        for route in there {
            // The instance is gone whose interface is led to.
            let leads_out = matches!(route.target, RouteTarget::InternetGateway(_));
            assert_eq!(route.state == RouteState::Active, leads_out, "{route:?}");
        }
        // It is written again with each change.
        network.create_key_pair("new").unwrap();
        network.delete_key_pair("new").unwrap();
        let written = std::fs::read_to_string(dir.path().join("network.json")).unwrap();
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(json(&written), json(&text.replace("\"format\": 3", "\"format\": 4")));
    }
    let unknown = include_str!("golden/network-4.json").replace("\"format\": 4", "\"format\": 5");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("network.json"), unknown).unwrap();
    let refused = Network::open(dir.path(), &"eu-west-1".parse().unwrap()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
}
