//! Conversations that are over: what is left of them holds nothing up.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use common::Guest;
use common::setup::{anywhere, boot, opened, options};
use network_vpc::{Metadata, Rule};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use socket2::{Domain, Socket, Type};

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A connection to the host's address from another of its own.
fn connect(from: SocketAddr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&from.into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// A guest's socket comes into a state.
#[track_caller]
fn becomes(guest: &mut Guest, socket: SocketHandle, state: tcp::State) {
    let there = guest.until(|guest| (guest.tcp(socket).state() == state).then_some(()));
    assert!(there.is_some(), "{:?} and not {state:?}", guest.tcp(socket).state());
}

/// A client comes in and goes, and after it the guest.
fn comes_and_goes(guest: &mut Guest, client: impl FnOnce() -> TcpStream) {
    let socket = guest.listen(80);
    let client = client();
    becomes(guest, socket, tcp::State::Established);
    drop(client);
    becomes(guest, socket, tcp::State::CloseWait);
    guest.tcp(socket).close();
    becomes(guest, socket, tcp::State::Closed);
    guest.sockets.remove(socket);
}

#[test]
fn clients_that_go_first_leave_room_for_others() {
    // Of which four are an interface's that is alone.
    let network = opened(options().sockets(8));
    let (server, mut guest) = boot(&network, "web", &[Rule::tcp(80, anywhere())]);
    let at = network.forward(server.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();
    for _ in 0..20 {
        comes_and_goes(&mut guest, || TcpStream::connect(at).unwrap());
    }
    assert_eq!(network.open_sockets(), 0);
}

/// The guest sees them all as one, so that the second has the first one's place.
#[test]
fn a_client_may_have_the_port_of_one_that_has_gone() {
    let network = opened(options());
    let (server, mut guest) = boot(&network, "web", &[Rule::tcp(80, anywhere())]);
    let at = network.forward(server.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();
    let mut port = 0;
    for from in [[127, 0, 0, 2], [127, 0, 0, 3], [127, 0, 0, 4]] {
        comes_and_goes(&mut guest, || {
            let client = connect((from, port).into(), at);
            port = client.local_addr().unwrap().port();
            client
        });
    }
}

/// A request to a server that ends the connection, and the status that it answers. None if nobody is there at once.
fn request(guest: &mut Guest) -> Option<Vec<u8>> {
    // Who is not answered says so again after a second.
    let socket = guest.connect(Duration::from_millis(700), METADATA, 80)?;
    guest.say(socket, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
    let heard = guest.hear(socket, usize::MAX);
    guest.tcp(socket).close();
    becomes(guest, socket, tcp::State::Closed);
    guest.sockets.remove(socket);
    Some(heard[9..12].to_vec())
}

#[test]
fn a_guest_may_ask_for_its_metadata_again_and_again() {
    let network = opened(options());
    let (interface, mut guest) = boot(&network, "a", &[]);
    network.set_metadata(interface.id, Some(Metadata::new("i-0123456789abcdef0".parse().unwrap()))).unwrap();
    // More than an interface has at once.
    for n in 0..1100 {
        assert_eq!(request(&mut guest).as_deref(), Some(&b"401"[..]), "at the {n}th time");
    }
    // And from the same port.
    for _ in 0..5 {
        guest.next_port = 50_000;
        assert_eq!(request(&mut guest).as_deref(), Some(&b"401"[..]));
    }
}
