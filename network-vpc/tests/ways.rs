//! Ways out of a network: gateways and routes; what DHCP and the resolver say; long datagrams.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use common::setup::{anywhere, network, open_interface, opened, options, own_address};
use common::{Guest, PATIENCE, SILENCE};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use instance_core::machine::NetSpec;
use instance_core::net::{Frame, NetPort};
use network_vpc::{
    DhcpSettings, Direction, InterfaceSpec, NetworkInterface, NetworkOptions, RouteState, Rule,
};
use smoltcp::wire::{Ipv4Packet, UdpPacket};

const ROUTER: [u8; 6] = [0x0a, 0, 0, 0, 0, 1];

#[test]
fn a_vpc_has_the_ways_out_that_its_routes_say() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let server = TcpListener::bind((own, 0)).unwrap();
    let at = server.local_addr().unwrap().port();
    let vpc = network.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap();
    let subnet = network.create_subnet(vpc.id, "10.0.1.0/24".parse().unwrap()).unwrap();
    let interface = network.create_interface(InterfaceSpec::new(subnet.id)).unwrap();
    let mut guest = Guest::boot(network.plug(interface.id).unwrap());
    let mut reaches = |expect: bool, what: &str| {
        let patience = if expect { PATIENCE } else { SILENCE };
        assert_eq!(guest.connect(patience, own, at).is_some(), expect, "{what}");
    };
    reaches(false, "without a gateway");
    let (gateway, main) =
        (network.create_internet_gateway().unwrap(), network.main_route_table(vpc.id).unwrap());
    let everywhere = anywhere();
    let refused = network.create_route(main.id, everywhere, gateway.id).unwrap_err();
    assert_eq!(refused.code(), "InvalidParameterValue", "it is not attached");
    network.attach_internet_gateway(gateway.id, vpc.id).unwrap();
    reaches(false, "without a route");
    network.create_route(main.id, everywhere, gateway.id).unwrap();
    reaches(true, "with a route");

    // A table of the subnet's own.
    let table = network.create_route_table(vpc.id).unwrap();
    network.set_route_table(subnet.id, Some(table.id)).unwrap();
    reaches(false, "by a table without routes");
    network.create_route(table.id, ipnet::Ipv4Net::from(own), gateway.id).unwrap();
    reaches(true, "by a table with a route to this one");
    assert_eq!(network.delete_route_table(table.id).unwrap_err().code(), "DependencyViolation");
    network.set_route_table(subnet.id, None).unwrap();
    network.delete_route_table(table.id).unwrap();

    network.detach_internet_gateway(gateway.id, vpc.id).unwrap();
    assert_eq!(network.routes(main.id).unwrap()[0].state, RouteState::Blackhole);
    reaches(false, "into a black hole");
    network.attach_internet_gateway(gateway.id, vpc.id).unwrap();
    reaches(true, "when the gateway is back");

    // Another gateway in its place.
    network.detach_internet_gateway(gateway.id, vpc.id).unwrap();
    let other = network.create_internet_gateway().unwrap();
    network.attach_internet_gateway(other.id, vpc.id).unwrap();
    reaches(false, "by a route to the one before");
    network.replace_route(main.id, everywhere, other.id).unwrap();
    reaches(true, "by a route to the other");
}

#[test]
fn gateways_and_routes_are_refused_as_in_ec2() {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    let (main, there) = (network.main_route_table(vpc).unwrap(), network.internet_gateways()[0].id);
    let everywhere: ipnet::Ipv4Net = anywhere();
    let other = network.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap();
    let foreign = network.create_route_table(other.id).unwrap();
    let subnet = network.subnets()[0].id;
    let new = network.create_internet_gateway().unwrap().id;
    for (code, refused) in [
        ("Resource.AlreadyAssociated", network.attach_internet_gateway(there, other.id)),
        ("InvalidParameterValue", network.attach_internet_gateway(new, vpc)),
        ("Gateway.NotAttached", network.detach_internet_gateway(new, vpc)),
        ("DependencyViolation", network.delete_internet_gateway(there)),
        (
            "InvalidInternetGatewayID.NotFound",
            network.delete_internet_gateway("igw-0123456789abcdef0".parse().unwrap()),
        ),
        ("RouteAlreadyExists", network.create_route(main.id, everywhere, there)),
        ("InvalidParameterValue", network.create_route(main.id, "172.31.4.0/24".parse().unwrap(), there)),
        ("InvalidParameterValue", network.create_route(foreign.id, everywhere, there)),
        ("InvalidRoute.NotFound", network.replace_route(main.id, "192.0.2.0/24".parse().unwrap(), there)),
        ("InvalidRoute.NotFound", network.delete_route(main.id, "192.0.2.0/24".parse().unwrap())),
        (
            "InvalidRouteTableID.NotFound",
            network.delete_route("rtb-0123456789abcdef0".parse().unwrap(), everywhere),
        ),
        ("DependencyViolation", network.delete_route_table(main.id)),
        ("InvalidParameterValue", network.set_route_table(subnet, Some(foreign.id))),
        ("DependencyViolation", network.delete_vpc(other.id)),
    ] {
        assert_eq!(refused.unwrap_err().code(), code);
    }
    network.delete_route_table(foreign.id).unwrap();
    network.delete_vpc(other.id).unwrap();
}

#[test]
fn dhcp_says_what_the_vpcs_options_say() {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    let servers = [Ipv4Addr::new(10, 0, 0, 53), Ipv4Addr::new(10, 0, 0, 54)];
    let of_time = [Ipv4Addr::new(169, 254, 169, 123)];
    let settings = DhcpSettings::default()
        .domain_name("corp.example.com")
        .domain_name_servers(servers)
        .ntp_servers(of_time)
        .netbios_name_servers(servers)
        .netbios_node_type(2);
    let made = network.create_dhcp_options(settings).unwrap();
    network.associate_dhcp_options(vpc, Some(made.id)).unwrap();
    assert_eq!(network.delete_dhcp_options(made.id).unwrap_err().code(), "DependencyViolation");
    // The numbers are IANA's, "BOOTP Vendor Extensions and DHCP Options".
    let check = |interface: &NetworkInterface, guest: &Guest, expect: &[(u8, &[u8])]| {
        let name = interface.private_host_name();
        let always: [(u8, &[u8]); 6] = [
            (1, &[255, 255, 240, 0]),
            (3, &[172, 31, 0, 1]),
            (12, name.as_bytes()),
            (26, &1500u16.to_be_bytes()),
            (51, &3600u32.to_be_bytes()),
            (54, &[172, 31, 0, 1]),
        ];
        for (number, expect) in always.iter().chain(expect) {
            assert_eq!(guest.told.get(number).map(Vec::as_slice), Some(*expect), "option {number}");
        }
    };
    let interface = open_interface(&network);
    let guest = Guest::boot(network.plug(interface.id).unwrap());
    assert_eq!(guest.resolvers, servers);
    let names = [10, 0, 0, 53, 10, 0, 0, 54];
    let said: [(u8, &[u8]); 5] =
        [(6, &names), (15, b"corp.example.com"), (42, &[169, 254, 169, 123]), (44, &names), (46, &[2])];
    check(&interface, &guest, &said);
    network.associate_dhcp_options(vpc, None).unwrap();
    network.delete_dhcp_options(made.id).unwrap();
    assert_eq!(network.delete_dhcp_options(made.id).unwrap_err().code(), "InvalidDhcpOptionID.NotFound");
    let interface = open_interface(&network);
    let guest = Guest::boot(network.plug(interface.id).unwrap());
    assert_eq!(guest.resolvers, [Ipv4Addr::new(172, 31, 0, 2)]);
    check(&interface, &guest, &[(6, &[172, 31, 0, 2]), (15, b"eu-west-1.compute.internal")]);
    for number in [42, 44, 46] {
        assert_eq!(guest.told.get(&number), None, "nobody is named whom to ask: option {number}");
    }
    let none = DhcpSettings::default;
    let five = [servers[0]; 5];
    for refused in [none().ntp_servers(five), none().netbios_name_servers(five), none().netbios_node_type(3)]
    {
        assert_eq!(network.create_dhcp_options(refused).unwrap_err().code(), "InvalidParameterValue");
    }
}

fn question(name: &str, id: u16) -> Vec<u8> {
    let mut question = Message::new();
    question.set_id(id).add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let bytes = question.to_vec().unwrap();
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat()
}

#[test]
fn names_are_told_over_tcp_too() {
    // A resolver of the host's that gives every question back, as an answer and with much behind it.
    let resolver = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = resolver.local_addr().unwrap();
    thread::spawn(move || {
        let (mut client, _) = resolver.accept().unwrap();
        let mut len = [0; 2];
        while client.read_exact(&mut len).is_ok() {
            let mut message = vec![0; u16::from_be_bytes(len).into()];
            client.read_exact(&mut message).unwrap();
            message[2] |= 0x80;
            message.resize(20_000, 7);
            client.write_all(&20_000u16.to_be_bytes()).unwrap();
            client.write_all(&message).unwrap();
        }
    });
    let network = NetworkOptions::new().resolver(Some(at)).in_memory(&"eu-west-1".parse().unwrap()).unwrap();
    let interface = open_interface(&network);
    let mut guest = Guest::boot(network.plug(interface.id).unwrap());
    let connection = guest.connect(PATIENCE, guest.resolvers[0], 53).unwrap();
    let own = format!("{}.eu-west-1.compute.internal.", interface.private_host_name());
    // All at once, and cut where no message ends.
    let asked = [question(&own, 1), question("example.com.", 2), question(&own, 3)].concat();
    guest.say(connection, &asked[..30]);
    guest.say(connection, &asked[30..]);
    let mut heard = Vec::new();
    let mut answers = BTreeMap::new();
    while answers.len() < 3 {
        heard.extend(guest.hear(connection, 1));
        while heard.len() > 2 && heard.len() >= 2 + usize::from(u16::from_be_bytes([heard[0], heard[1]])) {
            let message: Vec<u8> =
                heard.drain(..2 + usize::from(u16::from_be_bytes([heard[0], heard[1]]))).collect();
            answers.insert(u16::from_be_bytes([message[2], message[3]]), message[2..].to_vec());
        }
    }
    for id in [1, 3] {
        let answer = Message::from_vec(&answers[&id]).unwrap();
        assert_eq!(answer.answers()[0].data().to_string(), interface.private_ip.to_string());
    }
    assert_eq!(answers[&2].len(), 20_000);
}

#[test]
fn names_that_the_vpc_does_not_know_are_asked_of_the_hosts_resolver() {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = resolver.local_addr().unwrap();
    // It gives every question back, with a word of its own.
    thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((len, client)) = resolver.recv_from(&mut bytes) {
            resolver.send_to(&[&bytes[..len], b"heard"].concat(), client).unwrap();
        }
    });
    let network = NetworkOptions::new().resolver(Some(at)).in_memory(&"eu-west-1".parse().unwrap()).unwrap();
    let interface = open_interface(&network);
    let mut guest = Guest::boot(network.plug(interface.id).unwrap());
    let own = format!("{}.eu-west-1.compute.internal.", interface.private_host_name());
    let (own, foreign) = (question(&own, 1).split_off(2), question("example.com.", 2).split_off(2));
    for resolver in [guest.resolvers[0], Ipv4Addr::new(169, 254, 169, 253)] {
        let answer = Message::from_vec(&guest.ask(resolver, 53, &own).unwrap()).unwrap();
        assert_eq!(answer.answers()[0].data().to_string(), interface.private_ip.to_string());
        let heard = guest.ask(resolver, 53, &foreign);
        assert_eq!(heard, Some([&foreign[..], b"heard"].concat()), "of {resolver}");
    }
}

/// Fragments of a datagram as a guest sends them.
fn fragments(from: &NetworkInterface, to: Ipv4Addr, at: u16, text: &[u8], order: &[usize]) -> Vec<Frame> {
    let mut datagram = vec![0; 8];
    datagram.extend(text);
    let mut udp = UdpPacket::new_unchecked(&mut datagram[..]);
    udp.set_src_port(4000);
    udp.set_dst_port(at);
    udp.set_len((8 + text.len()) as u16);
    udp.fill_checksum(&from.private_ip.into(), &to.into());
    let count = datagram.len().div_ceil(1480);
    let piece = |n: usize| {
        let payload = &datagram[n * 1480..datagram.len().min((n + 1) * 1480)];
        let mut frame = [&ROUTER[..], &from.mac.0, &[8, 0], &[0; 20], payload].concat();
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len((20 + payload.len()) as u16);
        ip.set_ident(99);
        ip.set_more_frags(n + 1 < count);
        ip.set_frag_offset((n * 1480) as u16);
        ip.set_hop_limit(64);
        ip.set_next_header(smoltcp::wire::IpProtocol::Udp);
        ip.set_src_addr(from.private_ip);
        ip.set_dst_addr(to);
        ip.fill_checksum();
        Frame::new(frame)
    };
    order.iter().map(|n| piece(*n)).collect()
}

/// The payload of the datagram whose fragments come to a port.
fn received(port: &NetPort) -> Vec<u8> {
    let mut pieces = BTreeMap::new();
    for _ in 0..500 {
        while let Some(frame) = port.recv() {
            assert!(frame.data.len() <= 1514, "longer than the guest takes");
            let ip = Ipv4Packet::new_checked(&frame.data[14..]).unwrap();
            assert!(ip.verify_checksum());
            pieces.insert(ip.frag_offset(), (ip.payload().to_vec(), ip.more_frags()));
        }
        if pieces.last_key_value().is_some_and(|(_, (_, more))| !more) && pieces.contains_key(&0) {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let whole: Vec<u8> = pieces.into_values().flat_map(|(piece, _)| piece).collect();
    whole.get(8..).map(<[u8]>::to_vec).unwrap_or_default()
}

#[test]
fn long_datagrams_come_in_fragments_and_are_decided_upon_as_a_whole() {
    let network = opened(options().reach_host(true));
    let from = open_interface(&network);
    let group = network.create_security_group(network.default_vpc().unwrap(), "few", "").unwrap();
    network.authorize(group.id, Direction::Ingress, Rule::udp(53..=53, anywhere())).unwrap();
    let to = network.create_interface(network.interface_spec().unwrap().groups([group.id])).unwrap();
    let [NetSpec { port: sender, .. }, NetSpec { port: receiver, .. }] =
        [&from, &to].map(|interface| network.plug(interface.id).unwrap());
    let text: Vec<u8> = (0..4000).map(|n| (n / 9) as u8).collect();
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        fragments(&from, to.private_ip, 53, &text, &order).into_iter().for_each(|f| sender.send(f).unwrap());
        assert!(received(&receiver) == text, "{order:?}");
        fragments(&from, to.private_ip, 54, &text, &order).into_iter().for_each(|f| sender.send(f).unwrap());
        assert!(receiver.recv().is_none(), "no rule allows it");
    }

    let Some(own) = own_address() else { return };
    let echo = UdpSocket::bind((own, 0)).unwrap();
    let at = echo.local_addr().unwrap().port();
    fragments(&from, own, at, &text, &[1, 0, 2]).into_iter().for_each(|f| sender.send(f).unwrap());
    let mut heard = [0; 8192];
    echo.set_read_timeout(Some(PATIENCE)).unwrap();
    let (len, back) = echo.recv_from(&mut heard).unwrap();
    assert!(heard[..len] == text);
    echo.send_to(&heard[..len], back).unwrap();
    assert!(received(&sender) == text, "and back");
}
