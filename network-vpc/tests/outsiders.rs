//! Clients from outside whose addresses mean something else inside.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::setup::{anywhere, opened, options, own_address};
use common::{Guest, PATIENCE, SILENCE};
use instance_core::net::NetPort;
use ipnet::Ipv4Net;
use network_vpc::{Direction, InterfaceSpec, Network, NetworkInterface, Peer, Rule};
use smoltcp::socket::tcp;
use smoltcp::wire::{IpAddress, IpProtocol, Ipv4Packet};
use socket2::{Domain, Socket, Type};

/// As whom a guest sees those.
const LOCAL_CLIENT: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);

/// An interface in a VPC of these addresses, in a group that lets a peer in. Every way leads out.
fn within(network: &Network, cidr: Ipv4Net, subnet: Ipv4Net, peer: Option<Peer>) -> NetworkInterface {
    let vpc = network.create_vpc(cidr).unwrap().id;
    let gateway = network.create_internet_gateway().unwrap().id;
    network.attach_internet_gateway(gateway, vpc).unwrap();
    network.create_route(network.main_route_table(vpc).unwrap().id, anywhere(), gateway).unwrap();
    let subnet = network.create_subnet(vpc, subnet).unwrap().id;
    let group = network.create_security_group(vpc, "served", "").unwrap().id;
    let rule = Rule::all(peer.unwrap_or(Peer::Group(group)));
    network.authorize(group, Direction::Ingress, rule).unwrap();
    network.create_interface(InterfaceSpec::new(subnet).groups([group])).unwrap()
}

#[test]
fn a_client_whose_address_is_one_of_the_vpcs_is_answered() {
    let Some(own) = own_address() else { return };
    let network = opened(options());
    let cidr = Ipv4Net::new(own, 16).unwrap().trunc();
    // Another part of it than the host is in.
    let [a, b, c, _] = own.octets();
    let subnet = Ipv4Net::new([a, b, c ^ 1, 0].into(), 24).unwrap();
    let server = within(&network, cidr, subnet, Some(Peer::Cidr(anywhere())));
    let at = network.forward(server.id, 80, (own, 0).into()).unwrap();
    let mut guest = Guest::boot(network.plug(server.id).unwrap());
    let socket = guest.listen(80);
    let _client = TcpStream::connect(at).unwrap();
    let seen = guest.until(|guest| {
        let socket = guest.tcp(socket);
        (socket.state() == tcp::State::Established).then(|| socket.remote_endpoint().unwrap().addr)
    });
    assert_eq!(seen, Some(IpAddress::Ipv4(LOCAL_CLIENT)));
}

/// Without a gateway, and where the way to it leads through another instance.
#[test]
fn a_client_to_whom_no_route_leads_is_answered() {
    let Some(own) = own_address() else { return };
    let network = opened(options());
    for is_led_elsewhere in [false, true] {
        let vpc = network.create_vpc("10.9.0.0/16".parse().unwrap()).unwrap().id;
        let subnet = network.create_subnet(vpc, "10.9.1.0/24".parse().unwrap()).unwrap().id;
        let group = network.create_security_group(vpc, "served", "").unwrap().id;
        // By its own address.
        let client = Rule::all(Peer::Cidr(Ipv4Net::from(own)));
        network.authorize(group, Direction::Ingress, client).unwrap();
        let spec = InterfaceSpec::new(subnet).groups([group]);
        let server = network.create_interface(spec.clone()).unwrap();
        if is_led_elsewhere {
            let other = network.create_interface(spec).unwrap().id;
            network.create_route(network.main_route_table(vpc).unwrap().id, anywhere(), other).unwrap();
        }
        let at = network.forward(server.id, 80, (own, 0).into()).unwrap();
        let names = network.forward_udp(server.id, 53, (own, 0).into()).unwrap();
        let mut guest = Guest::boot(network.plug(server.id).unwrap());
        let socket = guest.listen(80);
        let mut client = TcpStream::connect(at).unwrap();
        let is_there =
            |guest: &mut Guest| (guest.tcp(socket).state() == tcp::State::Established).then_some(());
        guest.until(is_there).expect("it comes in");
        guest.say(socket, b"x");
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(client.read(&mut [0; 2]).unwrap(), 1);
        let remote = guest.tcp(socket).remote_endpoint().unwrap().addr;
        assert_eq!(remote, IpAddress::Ipv4(LOCAL_CLIENT));

        let client = UdpSocket::bind((own, 0)).unwrap();
        client.send_to(b"hello", names).unwrap();
        let begun = Instant::now();
        let from = sender(&guest.port, IpProtocol::Udp, || begun.elapsed() > PATIENCE);
        assert_eq!(from, Some(LOCAL_CLIENT));
    }
}

/// From whom a packet of a protocol comes to a port, before `is_over`.
fn sender(port: &NetPort, protocol: IpProtocol, mut is_over: impl FnMut() -> bool) -> Option<Ipv4Addr> {
    loop {
        let over = is_over();
        match port.recv() {
            Some(frame) => {
                let packet = Ipv4Packet::new_checked(&frame.data[14..]).unwrap();
                if packet.next_header() == protocol {
                    return Some(packet.src_addr());
                }
            }
            None if over => return None,
            // Nothing tells a test that holds the port itself.
            None => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// A group stands for its members, and not for whoever has the address of one somewhere else.
#[test]
fn nobody_outside_is_a_member_of_a_group() {
    let network = opened(options());
    let net = |text: &str| text.parse::<Ipv4Net>().unwrap();
    for (peer, is_let_in) in [(None, false), (Some(Peer::Cidr(net("127.9.0.0/16"))), true)] {
        let server = within(&network, net("127.9.0.0/16"), net("127.9.1.0/24"), peer);
        let member = server.private_ip;
        let expect = is_let_in.then_some(LOCAL_CLIENT);
        let port = network.plug(server.id).unwrap().port;

        let at = network.forward(server.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((member, 0)).into()).unwrap();
        socket.connect(&at.into()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut client = TcpStream::from(socket);
        let has_ended = || !matches!(client.read(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
        assert_eq!(sender(&port, IpProtocol::Tcp, has_ended), expect, "{member} by TCP");

        let at = network.forward_udp(server.id, 53, "127.0.0.1:0".parse().unwrap()).unwrap();
        let client = UdpSocket::bind((member, 0)).unwrap();
        client.send_to(b"hello", at).unwrap();
        let begun = Instant::now();
        let patience = if is_let_in { PATIENCE } else { SILENCE };
        let is_over = || begun.elapsed() > patience;
        assert_eq!(sender(&port, IpProtocol::Udp, is_over), expect, "{member} by UDP");
    }
}
