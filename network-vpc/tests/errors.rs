//! Every code of EC2's that the calls of a network can answer with, each raised once by a call that earns it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::fmt::Debug;

use network_vpc::{Direction, ErrorKind, Network, NetworkOptions, Peer, Ports, Result, Rule};

/// The codes that have been raised.
#[derive(Default)]
struct Raised(BTreeSet<&'static str>);

impl Raised {
    #[track_caller]
    fn by<T: Debug>(&mut self, kind: ErrorKind, code: &'static str, result: Result<T>) {
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.code()), (kind, code), "{error}");
        self.0.insert(code);
    }
}

fn network() -> Network {
    NetworkOptions::new()
        .resolver(None)
        .elastic_pool("127.10.0.0/30".parse().unwrap())
        .in_memory(&"eu-west-1".parse().unwrap())
        .unwrap()
}

/// An id of that kind which nothing has.
fn gone<T: std::str::FromStr>(prefix: &str) -> T
where
    T::Err: Debug,
{
    format!("{prefix}-0123456789abcdef0").parse().unwrap()
}

fn delete_default_vpc(raised: &mut Raised, network: &Network) {
    let vpc = network.default_vpc().unwrap();
    network.interfaces().iter().for_each(|there| network.delete_interface(there.id).unwrap());
    network.subnets().iter().for_each(|there| network.delete_subnet(there.id).unwrap());
    raised.by(ErrorKind::SubnetNotSpecified, "MissingInput", network.interface_spec());
    network
        .internet_gateways()
        .iter()
        .for_each(|there| network.detach_internet_gateway(there.id, vpc).unwrap());
    network.delete_vpc(vpc).unwrap();
}

fn of_vpcs_and_subnets(raised: &mut Raised) {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    let subnet = |cidr: &str| network.create_subnet(vpc, cidr.parse().unwrap());
    raised.by(ErrorKind::VpcNotFound, "InvalidVpcID.NotFound", network.delete_vpc(gone("vpc")));
    let too_large = network.create_vpc("10.0.0.0/15".parse().unwrap());
    raised.by(ErrorKind::InvalidVpcRange, "InvalidVpc.Range", too_large);
    raised.by(ErrorKind::SubnetNotFound, "InvalidSubnetID.NotFound", network.delete_subnet(gone("subnet")));
    raised.by(ErrorKind::InvalidSubnetRange, "InvalidSubnet.Range", subnet("10.0.0.0/24"));
    raised.by(ErrorKind::InvalidSubnetRange, "InvalidSubnet.Range", subnet("172.31.200.0/29"));
    raised.by(ErrorKind::SubnetConflict, "InvalidSubnet.Conflict", subnet("172.31.0.0/28"));

    network.create_interface(network.interface_spec().unwrap()).unwrap();
    raised.by(ErrorKind::DependencyViolation, "DependencyViolation", network.delete_vpc(vpc));

    let there = network.create_default_vpc();
    raised.by(ErrorKind::DefaultVpcAlreadyExists, "DefaultVpcAlreadyExists", there);
    let kind = ErrorKind::DefaultSubnetAlreadyExists;
    let there = network.create_default_subnet("eu-west-1a");
    raised.by(kind, "DefaultSubnetAlreadyExistsInAvailabilityZone", there);
    let nowhere = network.create_default_subnet("eu-west-1b");
    raised.by(ErrorKind::InvalidParameter, "InvalidParameterValue", nowhere);
    delete_default_vpc(raised, &network);
    raised.by(ErrorKind::VpcNotSpecified, "VPCIdNotSpecified", network.interface_spec());
    let in_none = network.create_default_subnet("eu-west-1a");
    raised.by(ErrorKind::DefaultVpcDoesNotExist, "DefaultVpcDoesNotExist", in_none);
}

fn of_groups(raised: &mut Raised) {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    let web = network.create_security_group(vpc, "web", "").unwrap().id;
    let allow = |rule| network.authorize(web, Direction::Ingress, rule);
    let anyone = "0.0.0.0/0".parse().unwrap();
    let nobody = network.security_group(gone("sg"));
    raised.by(ErrorKind::GroupNotFound, "InvalidGroup.NotFound", nobody);
    let elsewhere = network.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap();
    let other = network.create_security_group(elsewhere.id, "web", "").unwrap().id;
    let of_another_vpc = allow(Rule::all(Peer::Group(other)));
    raised.by(ErrorKind::GroupNotFound, "InvalidGroup.NotFound", of_another_vpc);
    let twice = network.create_security_group(vpc, "web", "");
    raised.by(ErrorKind::GroupDuplicate, "InvalidGroup.Duplicate", twice);

    let mut tcp_by_icmp_type = Rule::tcp(1, anyone);
    tcp_by_icmp_type.ports = Ports::Icmp(8, None);
    raised.by(ErrorKind::InvalidPermission, "InvalidParameterValue", allow(tcp_by_icmp_type));
    allow(Rule::tcp(1, anyone)).unwrap();
    let same = allow(Rule::tcp(1, anyone).described("the same for another reason"));
    raised.by(ErrorKind::PermissionDuplicate, "InvalidPermission.Duplicate", same);
    let revoked = network.revoke(web, gone("sgr"));
    raised.by(ErrorKind::PermissionNotFound, "InvalidSecurityGroupRuleId.NotFound", revoked);
    // EC2's quota: 60 rules each way.
    for port in 2..=60 {
        allow(Rule::tcp(port, anyone)).unwrap();
    }
    raised.by(ErrorKind::RulesLimit, "RulesPerSecurityGroupLimitExceeded", allow(Rule::tcp(61, anyone)));
}

fn of_interfaces(raised: &mut Raised) {
    let network = network();
    let spec = || network.interface_spec().unwrap();
    raised.by(
        ErrorKind::InterfaceNotFound,
        "InvalidNetworkInterfaceID.NotFound",
        network.interface(gone("eni")),
    );
    let routers = network.create_interface(spec().private_ip([172, 31, 0, 1].into()));
    raised.by(ErrorKind::InvalidAddress, "InvalidParameterValue", routers);
    let first = network.create_interface(spec().private_ip([172, 31, 0, 9].into())).unwrap();
    let taken = network.create_interface(spec().private_ip([172, 31, 0, 9].into()));
    raised.by(ErrorKind::AddressInUse, "InvalidIPAddress.InUse", taken);
    // With the primary one, EC2's most of the largest types.
    let too_many = network.assign_any_private_ips(first.id, 50);
    raised.by(ErrorKind::PrivateAddressLimit, "PrivateIpAddressLimitExceeded", too_many);

    let by_ipv6 = ["[::]:0", "[::1]:0", "[::ffff:127.0.0.1]:0"].map(|at| at.parse().unwrap());
    for at in by_ipv6 {
        let tcp = network.forward(first.id, 22, at);
        raised.by(ErrorKind::InvalidParameter, "InvalidParameterValue", tcp);
        let udp = network.forward_udp(first.id, 53, at);
        raised.by(ErrorKind::InvalidParameter, "InvalidParameterValue", udp);
    }

    let machine = network.plug(first.id).unwrap();
    raised.by(ErrorKind::InterfaceInUse, "InvalidNetworkInterface.InUse", network.plug(first.id));
    raised.by(ErrorKind::InterfaceInUse, "InvalidNetworkInterface.InUse", network.delete_interface(first.id));
    drop(machine);

    // A /28 has sixteen addresses, of which EC2 keeps five.
    let small = network.create_subnet(first.vpc_id, "172.31.200.0/28".parse().unwrap()).unwrap();
    let fill = || network.create_interface(network_vpc::InterfaceSpec::new(small.id));
    for _ in 0..11 {
        fill().unwrap();
    }
    raised.by(ErrorKind::SubnetFull, "InsufficientFreeAddressesInSubnet", fill());
}

fn of_ways_out(raised: &mut Raised) {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    let gateway = network.internet_gateways()[0].id;
    let table = network.main_route_table(vpc).unwrap().id;
    let to = |cidr: &str| cidr.parse().unwrap();
    let unknown = network.delete_internet_gateway(gone("igw"));
    raised.by(ErrorKind::InternetGatewayNotFound, "InvalidInternetGatewayID.NotFound", unknown);
    let again = network.attach_internet_gateway(gateway, vpc);
    raised.by(ErrorKind::AlreadyAssociated, "Resource.AlreadyAssociated", again);
    let unattached = network.create_internet_gateway().unwrap().id;
    let detached = network.detach_internet_gateway(unattached, vpc);
    raised.by(ErrorKind::GatewayNotAttached, "Gateway.NotAttached", detached);

    raised.by(ErrorKind::RouteTableNotFound, "InvalidRouteTableID.NotFound", network.routes(gone("rtb")));
    let nowhere = network.delete_route(table, to("10.9.0.0/16"));
    raised.by(ErrorKind::RouteNotFound, "InvalidRoute.NotFound", nowhere);
    let default_again = network.create_route(table, to("0.0.0.0/0"), gateway);
    raised.by(ErrorKind::RouteAlreadyExists, "RouteAlreadyExists", default_again);
    // The most that EC2 raises the quota of a table to; the table has one to its own VPC and one out of it.
    let mut routes = (0..=u16::MAX).map(|n| {
        let [high, low] = n.to_be_bytes();
        network.create_route(table, to(&format!("10.{high}.{low}.0/24")), gateway)
    });
    let refused = routes.find(Result::is_err).unwrap();
    raised.by(ErrorKind::RoutesLimit, "RouteLimitExceeded", refused);
}

fn of_elastic_addresses(raised: &mut Raised) {
    let network = network();
    let interface = network.create_interface(network.interface_spec().unwrap()).unwrap();
    let address = network.allocate_address().unwrap().allocation_id;
    raised.by(
        ErrorKind::AllocationNotFound,
        "InvalidAllocationID.NotFound",
        network.release_address(gone("eipalloc")),
    );
    raised.by(
        ErrorKind::AssociationNotFound,
        "InvalidAssociationID.NotFound",
        network.disassociate_address(gone("eipassoc")),
    );
    let not_its_own = network.associate_address(address, interface.id, Some([172, 31, 0, 200].into()));
    raised.by(ErrorKind::InvalidAddress, "InvalidParameterValue", not_its_own);
    network.associate_address(address, interface.id, None).unwrap();
    raised.by(ErrorKind::AddressInUse, "InvalidIPAddress.InUse", network.release_address(address));
    let none_left = (0..=4).map(|_| network.allocate_address()).find(Result::is_err).unwrap();
    raised.by(ErrorKind::AddressLimit, "AddressLimitExceeded", none_left);
    let public = network.interface_spec().unwrap().associate_public_ip_address(true);
    let public = network.create_interface(public).unwrap();
    let none_left = network.plug(public.id);
    raised.by(ErrorKind::InsufficientAddressCapacity, "InsufficientAddressCapacity", none_left);
}

fn of_options_and_keys(raised: &mut Raised) {
    let network = network();
    let unknown = network.delete_dhcp_options(gone("dopt"));
    raised.by(ErrorKind::DhcpOptionsNotFound, "InvalidDhcpOptionID.NotFound", unknown);
    raised.by(ErrorKind::KeyPairNotFound, "InvalidKeyPair.NotFound", network.key_pair("me"));
    network.create_key_pair("me").unwrap();
    raised.by(ErrorKind::KeyPairDuplicate, "InvalidKeyPair.Duplicate", network.create_key_pair("me"));
    let malformed = network.import_key_pair("other", "ssh-ed25519 AAAA");
    raised.by(ErrorKind::InvalidKeyFormat, "InvalidKey.Format", malformed);
    raised.by(ErrorKind::InvalidParameter, "InvalidParameterValue", network.create_key_pair(""));
}

fn of_the_host(raised: &mut Raised) {
    let dir = tempfile::tempdir().unwrap();
    let region = "eu-west-1".parse().unwrap();
    let first = Network::open(dir.path(), &region).unwrap();
    raised.by(ErrorKind::NetworkInUse, "ResourceInUse", Network::open(dir.path(), &region));
    drop(first);
    std::fs::write(dir.path().join("network.json"), "{").unwrap();
    raised.by(ErrorKind::Corrupt, "InternalError", Network::open(dir.path(), &region));
    let in_a_file = Network::open(&dir.path().join("network.json"), &region);
    raised.by(ErrorKind::Host, "InternalError", in_a_file);
}

#[test]
fn every_code_is_raised_by_a_call_that_earns_it() {
    let mut raised = Raised::default();
    of_vpcs_and_subnets(&mut raised);
    of_groups(&mut raised);
    of_interfaces(&mut raised);
    of_ways_out(&mut raised);
    of_elastic_addresses(&mut raised);
    of_options_and_keys(&mut raised);
    of_the_host(&mut raised);

    let missed: Vec<&str> = codes().into_iter().filter(|code| !raised.0.contains(code)).collect();
    assert_eq!(missed, [""; 0]);
}

/// All codes that this crate's source gives to errors, so that none is added without being raised here.
fn codes() -> BTreeSet<&'static str> {
    let source = include_str!("../src/error.rs");
    let (_, body) = source.split_once("pub fn code(").unwrap();
    let (body, _) = body.split_once("\n    }\n").unwrap();
    let all: BTreeSet<&str> = body.split('"').skip(1).step_by(2).collect();
    assert!(all.len() > 25, "{all:?}");
    all
}
