//! Public addresses that instances have while they run.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use common::region::{Idle, image, open, spec};
use common::setup::anywhere;
use instance_core::testing::FakeHypervisor;
use instance_core::{ErrorKind, InstanceState, Region, RegionOptions};
use network_vpc::{
    Direction, ElasticAddress, InterfaceSpec, Network, NetworkOptions, Peer, Protocol, PublicPort, Rule,
};

/// A port that needs no privilege to be listened at.
const PORT: u16 = 8643;

#[test]
fn an_instance_has_a_public_address_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Idle::new();
    let (region, network) = open(dir.path(), machines.clone());
    let ami = image(&region);
    let subnet = network.subnets()[0].id;
    let group = network.create_security_group(network.default_vpc().unwrap(), "web", "").unwrap().id;
    network.authorize(group, Direction::Ingress, Rule::tcp(PORT, anywhere())).unwrap();
    let launch = || spec().security_group(group);
    assert_eq!(region.launch(&ami, launch()).unwrap().public_ip(), None, "unless it is asked for");
    let asked = region.launch(&ami, launch().associate_public_ip_address(true)).unwrap();
    assert!(asked.public_ip().is_some());
    network.set_map_public_ip_on_launch(subnet, true).unwrap();
    let without = region.launch(&ami, launch().associate_public_ip_address(false)).unwrap();
    assert_eq!(without.public_ip(), None);
    let server = region.launch(&ami, launch()).unwrap();
    let public = server.public_ip().unwrap();
    assert_ne!(asked.public_ip(), Some(public));
    let interface = server.describe().network.unwrap().interface_id;
    assert_eq!(network.interface(interface).unwrap().public_ip, Some(public));
    let is_listened_at = |public: Ipv4Addr| TcpStream::connect((public, PORT)).is_ok();
    let (mut guest, _) = machines.guest();
    assert!(is_listened_at(public));
    assert_eq!(told(&mut guest), Some(public.to_string()));

    // What is plugged in is a machine's and this test's.
    drop(guest);
    let let_go = || drop(machines.guest());
    server.reboot().unwrap();
    assert_eq!(server.public_ip(), Some(public), "a reboot changes nothing");
    assert!(is_listened_at(public));
    let_go();
    server.stop(Duration::ZERO).unwrap();
    assert_eq!(server.public_ip(), None);
    TcpListener::bind((public, PORT)).expect("nobody listens any more");
    server.start().unwrap();
    let next = server.public_ip().unwrap();
    assert!(is_listened_at(next));

    // One that stays takes its place, and another comes when that goes.
    let address = network.allocate_address().unwrap();
    let association = network.associate_address(address.allocation_id, interface, None).unwrap();
    assert_eq!(server.public_ip(), Some(address.public_ip));
    assert!(is_listened_at(address.public_ip) && !is_listened_at(next));
    let_go();
    server.stop(Duration::ZERO).unwrap();
    server.start().unwrap();
    assert_eq!(server.public_ip(), Some(address.public_ip));
    network.disassociate_address(association).unwrap();
    let another = server.public_ip().unwrap();
    assert_ne!(another, address.public_ip);
    let (mut guest, _) = machines.guest();
    assert!(is_listened_at(another) && !is_listened_at(address.public_ip));
    assert_eq!(told(&mut guest), Some(another.to_string()));
    drop(guest);
    server.terminate().unwrap();
    assert_eq!(server.public_ip(), None);
}

/// Elastic IP addresses come and go, and whoever is to have a public address has one as long as one is free.
#[test]
fn an_instance_goes_on_with_another_public_address_or_without() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = of_few(dir.path(), "127.65.12.0/29");
    let ami = image(&region);
    let launch = |public| region.launch(&ami, spec().associate_public_ip_address(public)).unwrap();
    let [one, other, private] = [true, true, false].map(launch);
    let [at_one, at_other, at_private] =
        [&one, &other, &private].map(|server| server.describe().network.unwrap().interface_id);
    let lead = |address: &ElasticAddress, to| {
        network.associate_address(address.allocation_id, to, None).unwrap();
    };
    let first = network.allocate_address().unwrap();
    lead(&first, at_one);
    lead(&first, at_other);
    assert_eq!(other.public_ip(), Some(first.public_ip));
    assert!(one.public_ip().is_some_and(|public| public != first.public_ip), "it was given another at once");
    let second = network.assign_any_private_ips(at_other, 1).unwrap()[0];
    network.associate_address(first.allocation_id, at_other, Some(second)).unwrap();
    assert!(other.public_ip().is_some_and(|public| public != first.public_ip));
    lead(&first, at_private);
    lead(&first, at_one);
    assert_eq!(private.public_ip(), None, "it is to have none");

    // One that is stopped is given none.
    other.stop(Duration::ZERO).unwrap();
    lead(&first, at_other);
    assert!(one.public_ip().is_some());
    lead(&first, at_one);
    assert_eq!(other.public_ip(), None);

    // Where none is left it goes on without, also when it is reset, but is not started so.
    let left: Vec<_> = std::iter::from_fn(|| network.allocate_address().ok()).collect();
    assert_eq!(left.len(), 5);
    lead(&first, at_private);
    assert_eq!(one.public_ip(), None);
    one.reboot().unwrap();
    assert_eq!((one.state(), one.public_ip()), (InstanceState::Running, None));
    one.stop(Duration::ZERO).unwrap();
    assert_eq!(one.start().unwrap_err().kind(), ErrorKind::InsufficientAddressCapacity);
    network.release_address(left[0].allocation_id).unwrap();
    one.start().unwrap();
    assert_eq!(one.public_ip(), Some(left[0].public_ip));
}

#[test]
fn only_what_is_plugged_in_has_a_public_address_for_a_while() {
    let dir = tempfile::tempdir().unwrap();
    let name = "eu-west-1".parse().unwrap();
    let network = Network::open(dir.path(), &name).unwrap();
    let public = network.interface_spec().unwrap().associate_public_ip_address(true);
    let id = network.create_interface(public).unwrap().id;
    let has = |network: &Network| network.interface(id).unwrap().public_ip.is_some();
    assert!(!has(&network));
    let port = network.plug(id).unwrap();
    assert!(has(&network));
    assert_eq!(network.plug(id).unwrap_err().code(), "InvalidNetworkInterface.InUse");
    assert!(has(&network), "it is plugged in as before");
    network.unplug(id);
    assert!(!has(&network));
    drop(port);

    // Where no other test listens.
    let taken = TcpListener::bind("127.77.3.1:0").unwrap();
    let at = taken.local_addr().unwrap();
    drop(taken);
    network.forward(id, 80, at).unwrap();
    let taken = TcpListener::bind(at).unwrap();
    assert_eq!(network.plug(id).unwrap_err().code(), "InternalError");
    assert!(!has(&network), "it could not be plugged in");
    drop(taken);

    let port = network.plug(id).unwrap();
    assert!(has(&network));
    // Its process ends.
    drop((network, port));
    assert!(!has(&Network::open(dir.path(), &name).unwrap()));
}

#[test]
fn an_instance_that_is_gone_has_no_public_address_although_its_interface_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path(), FakeHypervisor::new());
    let own = network.create_interface(network.interface_spec().unwrap()).unwrap();
    let address = network.allocate_address().unwrap();
    network.associate_address(address.allocation_id, own.id, None).unwrap();
    let ami = image(&region);
    let server = region.launch(&ami, spec().network_interface(own.id)).unwrap();
    assert_eq!(server.public_ip(), Some(address.public_ip));
    server.terminate().unwrap();
    assert_eq!(server.public_ip(), None);
    let next = region.launch(&ami, spec().network_interface(own.id)).unwrap();
    assert_eq!((next.public_ip(), server.public_ip()), (Some(address.public_ip), None));
}

/// An address is of no use where the host does not let anybody come to it.
#[test]
fn a_public_address_says_where_it_is_listened_and_where_not() {
    let network = common::setup::network();
    let every = Rule::all(Peer::Cidr(anywhere()));
    let rules = [Rule::tcp(PORT, anywhere()), Rule::tcp(PORT + 1, anywhere()), every];
    let interface = common::setup::interface(&network, "web", &rules);
    let udp = Rule::udp(PORT..=PORT, anywhere());
    network.authorize(interface.groups[0], Direction::Ingress, udp).unwrap();
    assert_eq!(network.public_ports(interface.id).unwrap(), [], "it has none");
    let address = network.allocate_address().unwrap();
    network.associate_address(address.allocation_id, interface.id, None).unwrap();
    let ports = || {
        let [there] = network.public_ports(interface.id).unwrap().try_into().unwrap();
        assert_eq!((there.public_ip, there.private_ip), (address.public_ip, interface.private_ip));
        assert!(there.has_gateway);
        let flat = |ports: &[PublicPort]| ports.iter().map(|p| (p.protocol, p.port)).collect::<Vec<_>>();
        let (refused, why): (Vec<_>, Vec<_>) = there.refused.iter().cloned().unzip();
        (flat(&there.listened), flat(&refused), why.concat(), there.not_offered)
    };
    let group = network.security_group(interface.groups[0]).unwrap();
    let wide = group.ingress.iter().find(|(_, rule)| rule.protocol == Protocol::Any).map(|(id, _)| *id);
    let wide = vec![wide.unwrap()];
    assert_eq!(ports(), (vec![], vec![], String::new(), wide.clone()), "nothing is plugged in");

    let taken = TcpListener::bind((address.public_ip, PORT + 1)).unwrap();
    let machine = network.plug(interface.id).unwrap();
    let both = vec![(Protocol::Tcp, PORT), (Protocol::Udp, PORT)];
    let (listened, refused, why, not_offered) = ports();
    assert_eq!((&listened, refused, not_offered), (&both, vec![(Protocol::Tcp, PORT + 1)], wide));
    assert!(why.contains("in use"), "{why}");
    assert!(TcpStream::connect((address.public_ip, PORT)).is_ok());

    // It is tried again when something changes.
    drop(taken);
    network.revoke(interface.groups[0], ports().3[0]).unwrap();
    let all = vec![(Protocol::Tcp, PORT), (Protocol::Tcp, PORT + 1), (Protocol::Udp, PORT)];
    assert_eq!(ports(), (all, vec![], String::new(), vec![]));
    drop(machine);
    assert_eq!(ports().0, [], "nobody is there who would answer");
}

#[test]
fn a_public_address_says_that_no_way_leads_in() {
    let network = common::setup::network();
    let vpc = network.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap().id;
    let subnet = network.create_subnet(vpc, "10.0.0.0/24".parse().unwrap()).unwrap().id;
    let group = network.create_security_group(vpc, "web", "").unwrap().id;
    network.authorize(group, Direction::Ingress, Rule::tcp(PORT, anywhere())).unwrap();
    let spec = InterfaceSpec::new(subnet).groups([group]).associate_public_ip_address(true);
    let id = network.create_interface(spec).unwrap().id;
    let _machine = network.plug(id).unwrap();
    let ports = || {
        let [there] = network.public_ports(id).unwrap().try_into().unwrap();
        assert_eq!((there.refused, there.not_offered), (vec![], vec![]));
        (there.has_gateway, there.listened.len())
    };
    assert_eq!(ports(), (false, 0));
    let gateway = network.create_internet_gateway().unwrap().id;
    network.attach_internet_gateway(gateway, vpc).unwrap();
    assert_eq!(ports(), (true, 1));
}

/// A region whose network has so many public addresses.
fn of_few(dir: &Path, pool: &str) -> (Region<FakeHypervisor>, Network) {
    let name = "eu-west-1".parse().unwrap();
    let options = NetworkOptions::new().resolver(None).elastic_pool(pool.parse().unwrap());
    let network = options.in_memory(&name).unwrap();
    let options = RegionOptions::new().name(name).network(network.clone());
    (options.open(dir, FakeHypervisor::new()).unwrap(), network)
}

/// What a guest is told of its public address.
fn told(guest: &mut common::Guest) -> Option<String> {
    let service = Ipv4Addr::new(169, 254, 169, 254);
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    let (_, token) = guest.http(service, &format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}"));
    let header = format!("X-aws-ec2-metadata-token: {token}\r\n");
    let (status, body) =
        guest.http(service, &format!("GET /latest/meta-data/public-ipv4 HTTP/1.1\r\n{header}"));
    (status == 200).then_some(body)
}

#[test]
fn nothing_is_left_of_a_public_address_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = open(dir.path(), FakeHypervisor::new());
    let server = region.launch(&image(&region), spec().associate_public_ip_address(true)).unwrap();
    let id = server.id();
    assert!(server.public_ip().is_some());
    // What runs when its region goes is found stopped.
    drop((server, region, network));
    let (region, network) = open(dir.path(), FakeHypervisor::new());
    let server = region.instance(id).unwrap();
    assert_eq!(server.public_ip(), None);
    assert_eq!(network.interfaces()[0].public_ip, None);
    server.start().unwrap();
    assert!(server.public_ip().is_some());
}

#[test]
fn what_cannot_have_a_public_address_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (region, network) = of_few(dir.path(), "127.65.8.0/30");
    let ami = image(&region);
    let own = network.create_interface(network.interface_spec().unwrap()).unwrap();
    let public = || spec().associate_public_ip_address(true);
    let refused = region.launch(&ami, public().network_interface(own.id)).unwrap_err();
    assert_eq!(refused.code(), "InvalidParameterCombination");
    let refused = network.set_map_public_ip_on_launch("subnet-0123456789abcdef0".parse().unwrap(), true);
    assert_eq!(refused.unwrap_err().code(), "InvalidSubnetID.NotFound");

    // Two addresses are there, for whatever has a public one.
    let address = network.allocate_address().unwrap();
    let refused = region.run_instances(&ami, public().count(2, 2)).unwrap_err();
    assert_eq!(refused.code(), "InsufficientAddressCapacity");
    assert!(region.instances().is_empty() && network.interfaces() == [own]);
    let server = region.launch(&ami, public()).unwrap();
    assert_ne!(server.public_ip(), Some(address.public_ip));
    assert_eq!(network.allocate_address().unwrap_err().code(), "AddressLimitExceeded");
    let gateway = network.internet_gateways()[0].clone();
    let needed = network.detach_internet_gateway(gateway.id, gateway.vpc_id.unwrap()).unwrap_err();
    assert_eq!(needed.code(), "DependencyViolation");

    // Another takes the address while the instance is stopped.
    server.stop(Duration::ZERO).unwrap();
    let taken = network.allocate_address().unwrap();
    assert_eq!(server.start().unwrap_err().code(), "InsufficientAddressCapacity");
    network.release_address(taken.allocation_id).unwrap();
    server.start().unwrap();
    server.terminate().unwrap();
    network.detach_internet_gateway(gateway.id, gateway.vpc_id.unwrap()).unwrap();
}
