//! Conversations that are over: what is left of them holds nothing up.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::packets::{ROUTER, Way, is_reset, segment};
use common::setup::{anywhere, boot, connect, is_turned_away, opened, options, own_address};
use common::{Guest, PATIENCE};
use instance_core::net::Frame;
use network_vpc::{Metadata, Rule};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

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

/// Whether the other end of a connection was reset; it may also have ended in order.
fn is_reset_of(mut connection: TcpStream) -> bool {
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    match connection.read(&mut [0]) {
        Ok(0) => false,
        Err(e) if e.kind() == ErrorKind::ConnectionReset => true,
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_is_cut_off_hears_that_it_is_no_orderly_end() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let (interface, mut guest) = boot(&network, "web", &[Rule::tcp(80, anywhere())]);
    let at = network.forward(interface.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();
    let host = TcpListener::bind((own, 0)).unwrap();
    let port = host.local_addr().unwrap().port();

    // The guest breaks it off.
    let socket = guest.connect(PATIENCE, own, port).unwrap();
    let of_host = host.accept().unwrap().0;
    guest.tcp(socket).abort();
    guest.work();
    assert!(is_reset_of(of_host), "a host");
    let socket = guest.listen(80);
    let client = TcpStream::connect(at).unwrap();
    becomes(&mut guest, socket, tcp::State::Established);
    guest.tcp(socket).abort();
    guest.work();
    assert!(is_reset_of(client), "a client");
    guest.sockets.remove(socket);

    // It takes nobody in.
    let (client, begun) = (TcpStream::connect(at).unwrap(), Instant::now());
    while network.open_sockets() == 0 {
        assert!(begun.elapsed() < PATIENCE);
        thread::yield_now();
    }
    guest.until(|_| (network.open_sockets() == 0).then_some(())).expect("it is refused");
    assert!(is_reset_of(client), "a client who is refused");

    // It had said that it says no more.
    let socket = guest.connect(PATIENCE, own, port).unwrap();
    let mut of_host = host.accept().unwrap().0;
    guest.say(socket, b"hello");
    guest.tcp(socket).close();
    becomes(&mut guest, socket, tcp::State::FinWait2);
    guest.tcp(socket).abort();
    guest.work();
    guest.until(|_| (network.open_sockets() == 0).then_some(())).expect("it is over");
    of_host.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut heard = Vec::new();
    of_host.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"hello");

    // It is gone.
    guest.connect(PATIENCE, own, port).unwrap();
    let of_host = host.accept().unwrap().0;
    network.unplug(interface.id);
    assert!(is_reset_of(of_host), "a host of a guest that is gone");
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

/// A request to a server that ends the connection. Gives whether somebody was there at once.
fn request(guest: &mut Guest) -> bool {
    let begun = Instant::now();
    let socket = guest.connect(PATIENCE, METADATA, 80).expect("somebody is there");
    // Who is not answered says so again after a second.
    let is_at_once = begun.elapsed() < Duration::from_millis(700);
    guest.say(socket, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
    let heard = guest.hear(socket, usize::MAX);
    guest.tcp(socket).close();
    becomes(guest, socket, tcp::State::Closed);
    guest.sockets.remove(socket);
    assert_eq!(&heard[9..12], b"401");
    is_at_once
}

#[test]
fn a_guest_may_ask_for_its_metadata_again_and_again() {
    let network = opened(options());
    let (interface, mut guest) = boot(&network, "a", &[]);
    network.set_metadata(interface.id, Some(Metadata::new("i-0123456789abcdef0".parse().unwrap()))).unwrap();
    // More than an interface has at once.
    let late = (0..1100).filter(|_| !request(&mut guest)).count();
    // And from the same port.
    let again = (0..5).map(|_| {
        guest.next_port = 50_000;
        request(&mut guest)
    });
    let late_again = again.filter(|at_once| !at_once).count();
    // A host may stand still once in a while.
    assert!(late < 10 && late_again < 3, "{late} and {late_again} had to say it twice");
}

/// A guest that only looks on while many clients come, and asks what is left of conversations.
struct Witness {
    guest: Guest,
    frames: Receiver<Frame>,
}

impl Witness {
    fn new(guest: Guest) -> Self {
        let (frame, frames) = channel();
        let port = guest.port.clone();
        guest.port.set_waker(Some(Arc::new(move || {
            std::iter::from_fn(|| port.recv()).for_each(|came| _ = frame.send(came));
        })));
        Self { guest, frames }
    }

    /// Says something in a conversation that is over, which is remembered for a while from then on if it was.
    fn speak(&self, to: Ipv4Addr, ports: [u16; 2]) {
        let way = Way { macs: [self.guest.mac, ROUTER], addresses: [self.guest.address, to] };
        for acknowledged in [0, i32::MIN] {
            self.guest.port.send(Frame::new(segment(way, ports, acknowledged))).unwrap();
        }
    }

    fn is_remembered(&self, to: Ipv4Addr, ports: [u16; 2]) -> bool {
        while self.frames.try_recv().is_ok() {}
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            // Nobody is answered twice in a second.
            self.speak(to, ports);
            while let Ok(frame) = self.frames.recv_timeout(Duration::from_millis(300)) {
                if let Some(reset) = is_reset(&frame.data, ports) {
                    return !reset;
                }
            }
        }
        panic!("nothing is answered to {ports:?}");
    }
}

#[test]
fn clients_who_do_not_get_in_end_nothing() {
    // As many as an interface has at once.
    const CLIENTS: usize = 768;
    let Some(own) = own_address() else { return };
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).unwrap();
    let network = opened(options().reach_host(true).sockets(4096));
    let (server, mut guest) = boot(&network, "web", &[Rule::tcp(80, "127.0.0.1/32".parse().unwrap())]);
    let at = network.forward(server.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();

    let host = TcpListener::bind((own, 0)).unwrap();
    let socket = guest.connect(PATIENCE, own, host.local_addr().unwrap().port()).unwrap();
    let of_host = (own, [guest.next_port, host.local_addr().unwrap().port()]);
    drop(host.accept().unwrap());
    becomes(&mut guest, socket, tcp::State::CloseWait);
    guest.tcp(socket).close();
    becomes(&mut guest, socket, tcp::State::Closed);
    let mut port = 0;
    comes_and_goes(&mut guest, || {
        // A port that was asked for is not given to one of the many before it is forgotten: who has it begins anew.
        let client = connect("127.0.0.1:0".parse().unwrap(), at);
        port = client.local_addr().unwrap().port();
        client
    });
    let of_client = (Ipv4Addr::new(169, 254, 0, 1), [80, port]);

    let witness = Witness::new(guest);
    let mut clients = Vec::new();
    for n in 1..CLIENTS {
        clients.push(TcpStream::connect(at).unwrap());
        // Before the ten seconds are over that they are remembered.
        if n % 10 == 0 {
            [of_host, of_client].iter().for_each(|(to, ports)| witness.speak(*to, *ports));
        }
    }
    let is_remembered = |(to, ports)| witness.is_remembered(to, ports);
    assert!(is_remembered(of_host) && is_remembered(of_client));
    assert!(is_turned_away(connect("127.0.0.2:0".parse().unwrap(), at)));
    assert!(is_remembered(of_client), "the rules keep the other out");
    // One has the place of who has gone.
    clients.push(TcpStream::connect(at).unwrap());
    assert!(is_turned_away(TcpStream::connect(at).unwrap()));
    assert_eq!(network.open_sockets(), CLIENTS);
    assert!(!is_remembered(of_client));
    assert!(is_remembered(of_host), "which makes no room for more clients");
}
