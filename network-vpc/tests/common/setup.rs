//! Networks and what is in them, as most tests need them.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;

use instance_core::machine::NetSpec;
use instance_core::net::{self, FrameStream};
use ipnet::Ipv4Net;
use network_vpc::{Direction, Network, NetworkInterface, NetworkOptions, Peer, Rule};

use socket2::{Domain, Socket, Type};

use super::{Guest, PATIENCE};

/// Nobody is asked for names.
pub(crate) fn options() -> NetworkOptions {
    NetworkOptions::new().resolver(None)
}

pub(crate) fn opened(options: NetworkOptions) -> Network {
    options.in_memory(&"eu-west-1".parse().unwrap()).unwrap()
}

pub(crate) fn network() -> Network {
    opened(options())
}

pub(crate) fn anywhere() -> Ipv4Net {
    Ipv4Net::default()
}

/// An interface of the default subnet, in a group of its own, which lets these rules in.
pub(crate) fn interface(network: &Network, name: &str, rules: &[Rule]) -> NetworkInterface {
    let group = network.create_security_group(network.default_vpc().unwrap(), name, "").unwrap();
    for rule in rules {
        network.authorize(group.id, Direction::Ingress, rule.clone()).unwrap();
    }
    network.create_interface(network.interface_spec().unwrap().groups([group.id])).unwrap()
}

/// The same of one that lets everything in.
pub(crate) fn open_interface(network: &Network) -> NetworkInterface {
    let name = format!("group {}", network.security_groups().len());
    interface(network, &name, &[Rule::all(Peer::Cidr(anywhere()))])
}

/// An interface with a guest at it.
pub(crate) fn boot(network: &Network, name: &str, rules: &[Rule]) -> (NetworkInterface, Guest) {
    let interface = interface(network, name, rules);
    let guest = Guest::boot(network.plug(interface.id).unwrap());
    (interface, guest)
}

/// The same port for a machine behind a stream socket, as QEMU is, and what it is plugged in by at both ends of the socket.
pub(crate) fn by_stream(spec: NetSpec) -> (NetSpec, [FrameStream; 2]) {
    let (port, machine) = net::link();
    let (theirs, ours) = UnixStream::pair().unwrap();
    let mut there = NetSpec::new(machine, spec.mac);
    there.mtu = spec.mtu;
    let plugged =
        [(ours, &spec), (theirs, &there)].map(|(socket, spec)| FrameStream::plug(socket, spec, "stream"));
    (NetSpec::new(port, spec.mac), plugged.map(Result::unwrap))
}

/// A connection to the host's address from another of its own.
pub(crate) fn connect(from: SocketAddr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&from.into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// Whether the other side ends the connection without a word.
pub(crate) fn is_turned_away(mut client: TcpStream) -> bool {
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.read(&mut [0]).map_or_else(|e| e.kind() == ErrorKind::ConnectionReset, |len| len == 0)
}

/// An address of this host's that is not a loopback one; says so if there is none.
pub(crate) fn own_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = socket.connect("203.0.113.1:9").and_then(|()| socket.local_addr());
    match own {
        Ok(SocketAddr::V4(address)) if !address.ip().is_unspecified() => Some(*address.ip()),
        _ => {
            skip("this host has no address but the loopback one");
            None
        }
    }
}

/// Says why a test does nothing. Where everything has to be tested there is no reason to.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("SKIPPED: {why}");
}
