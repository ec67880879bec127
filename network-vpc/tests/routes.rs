//! Routes to interfaces, whose instances pass on what is for others.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use common::PATIENCE;
use common::packets::{ROUTER, Way, datagram};
use common::setup::{anywhere, open_interface, opened, options, own_address};
use instance_core::net::{Frame, MacAddress, NetPort};
use network_vpc::{
    Direction, ErrorKind, InterfaceSpec, Network, NetworkInterface, Peer, RouteState, RouteTable, Rule,
};
use smoltcp::wire::Ipv4Packet;

const WORLD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// Two who let everything in: one that passes on what is for others, in the default subnet, and one in another, whose routes
/// lead everything to it.
fn behind_another(network: &Network) -> (NetworkInterface, NetworkInterface, RouteTable) {
    let open = open_interface(network);
    let spec = network.interface_spec().unwrap().groups(open.groups.clone()).source_dest_check(false);
    let passes_on = network.create_interface(spec).unwrap();
    let vpc = network.default_vpc().unwrap();
    let subnet = network.create_subnet(vpc, "172.31.64.0/24".parse().unwrap()).unwrap().id;
    let table = network.create_route_table(vpc).unwrap();
    network.create_route(table.id, anywhere(), passes_on.id).unwrap();
    network.set_route_table(subnet, Some(table.id)).unwrap();
    let behind = network.create_interface(InterfaceSpec::new(subnet).groups(open.groups)).unwrap();
    (passes_on, behind, network.route_tables().into_iter().find(|there| there.id == table.id).unwrap())
}

fn send(port: &NetPort, mac: MacAddress, addresses: [Ipv4Addr; 2], ports: [u16; 2]) {
    let way = Way { macs: [mac, ROUTER], addresses };
    port.send(Frame::new(datagram(way, ports, b"hello"))).unwrap();
}

/// What has come to a port by now: from and to which hardware addresses, from and to where, and with how many hops left.
fn came(port: &NetPort) -> Option<([MacAddress; 2], [Ipv4Addr; 2], u8)> {
    let frame = port.recv()?.data;
    let mac = |at: usize| MacAddress(frame[at..at + 6].try_into().unwrap());
    let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
    assert!(ip.verify_checksum());
    Some(([mac(6), mac(0)], [ip.src_addr(), ip.dst_addr()], ip.hop_limit()))
}

#[test]
fn what_a_route_leads_to_an_interface_comes_to_it() {
    let network = opened(options());
    let (passes_on, behind, table) = behind_another(&network);
    let [of_router, of_behind] = [&passes_on, &behind].map(|there| network.plug(there.id).unwrap().port);
    let to_world = || {
        send(&of_behind, behind.mac, [behind.private_ip, WORLD], [4000, 9]);
        came(&of_router)
    };
    let arrives = Some(([ROUTER, passes_on.mac], [behind.private_ip, WORLD], 63));
    assert_eq!(to_world(), arrives);
    // And what it passes on of the answer, from an address that it has not.
    send(&of_router, passes_on.mac, [WORLD, behind.private_ip], [9, 4000]);
    assert_eq!(came(&of_behind), Some(([ROUTER, behind.mac], [WORLD, behind.private_ip], 63)));

    // Both halves of the check: it gets nothing that is for others, and sends nothing that is from others.
    network.set_source_dest_check(passes_on.id, true).unwrap();
    assert_eq!(to_world(), None);
    send(&of_router, passes_on.mac, [WORLD, behind.private_ip], [9, 4000]);
    assert_eq!(came(&of_behind), None);
    network.set_source_dest_check(passes_on.id, false).unwrap();
    assert_eq!(to_world(), arrives);

    // Its groups decide.
    let shut = network.create_security_group(table.vpc_id, "shut", "").unwrap().id;
    network.modify_groups(passes_on.id, &[shut]).unwrap();
    send(&of_behind, behind.mac, [behind.private_ip, WORLD], [4001, 9]);
    assert_eq!(came(&of_router), None);
    let rule = Rule::udp(9..=9, anywhere()).with_peer(Peer::Group(behind.groups[0]));
    network.authorize(shut, Direction::Ingress, rule).unwrap();
    send(&of_behind, behind.mac, [behind.private_ip, WORLD], [4001, 9]);
    assert!(came(&of_router).is_some(), "of one who is itself in the group");

    // What is special leads nowhere.
    for to in [Ipv4Addr::new(169, 254, 7, 7), Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(224, 0, 0, 1)] {
        send(&of_behind, behind.mac, [behind.private_ip, to], [4000, 9]);
        assert_eq!(came(&of_router), None, "{to}");
    }

    // An interface that is gone is a black hole.
    let state = || network.routes(table.id).unwrap()[0].state;
    assert_eq!(state(), RouteState::Active);
    drop(of_router);
    assert_eq!(state(), RouteState::Blackhole, "nothing is at it");
    let again = network.plug(passes_on.id).unwrap();
    assert_eq!(state(), RouteState::Active);
    drop(again);
    network.delete_interface(passes_on.id).unwrap();
    assert_eq!(state(), RouteState::Blackhole);
    send(&of_behind, behind.mac, [behind.private_ip, WORLD], [4000, 9]);
    let gateway = network.internet_gateways()[0].id;
    network.replace_route(table.id, anywhere(), gateway).unwrap();
    let now = network.routes(table.id).unwrap()[0];
    assert_eq!((now.target, now.state), (gateway.into(), RouteState::Active));
}

/// The next frame that comes to a port.
fn next(port: &NetPort, woken: &Receiver<()>) -> Vec<u8> {
    loop {
        match port.recv() {
            Some(frame) => return frame.data,
            None => woken.recv_timeout(PATIENCE).expect("a frame comes"),
        }
    }
}

#[test]
fn the_world_is_reached_through_an_instance_that_passes_on() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let (passes_on, behind, _) = behind_another(&network);
    let [(of_router, routed), (of_behind, answered)] = [&passes_on, &behind].map(|there| {
        let port = network.plug(there.id).unwrap().port;
        let (wake, woken) = channel();
        port.set_waker(Some(Arc::new(move || _ = wake.send(()))));
        (port, woken)
    });
    let host = UdpSocket::bind((own, 0)).unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    let at = host.local_addr().unwrap().port();
    send(&of_behind, behind.mac, [behind.private_ip, own], [4000, at]);
    // It sends the packets on as they are.
    let pass_on = |mut frame: Vec<u8>| {
        frame[..6].copy_from_slice(&ROUTER.0);
        frame[6..12].copy_from_slice(&passes_on.mac.0);
        of_router.send(Frame::new(frame)).unwrap();
    };
    pass_on(next(&of_router, &routed));
    let (_, from) = host.recv_from(&mut [0; 10]).unwrap();
    host.send_to(b"welcome", from).unwrap();
    pass_on(next(&of_router, &routed));
    let frame = next(&of_behind, &answered);
    let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
    assert_eq!((ip.src_addr(), ip.dst_addr(), &ip.payload()[8..]), (own, behind.private_ip, &b"welcome"[..]));
}

#[test]
fn routes_to_interfaces_are_refused_as_in_ec2() {
    let network = opened(options());
    let (passes_on, _, table) = behind_another(&network);
    let net = "198.51.100.0/24".parse().unwrap();
    let refused = |table: &RouteTable, target| network.create_route(table.id, net, target).unwrap_err();
    let nowhere = "eni-0123456789abcdef0".parse::<ami_core::NetworkInterfaceId>().unwrap();
    assert_eq!(refused(&table, nowhere).kind(), ErrorKind::InterfaceNotFound);
    let elsewhere = network.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap().id;
    let main = network.main_route_table(elsewhere).unwrap();
    assert_eq!(refused(&main, passes_on.id).code(), "InvalidParameterValue");
    assert_eq!(
        network.create_route(table.id, anywhere(), passes_on.id).unwrap_err().code(),
        "RouteAlreadyExists"
    );
    assert_eq!(
        network.replace_route(table.id, net, passes_on.id).unwrap_err().code(),
        "InvalidRoute.NotFound"
    );
}
