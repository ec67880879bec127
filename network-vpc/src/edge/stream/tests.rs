use std::io::{ErrorKind, Read as _};
use std::net::{Shutdown, TcpListener as Server, TcpStream as Host};
use std::sync::Arc;

use instance_core::net::{self, NetPort};
use mio::{Events, Poll, Waker};
use smoltcp::wire::{Ipv4Packet, TcpPacket, TcpSeqNumber};
use socket2::SockRef;

use super::super::budget::Budget;
use super::super::datagram::TURN;
use super::super::fuzzing::{FIN, RST, SYN, Segment};
use super::super::{Entrance, WAKE};
use super::*;
use crate::fabric::Fabric;
use crate::firewall::{Members, Peer, Policy, Rule};
use crate::port::Port;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// That a segment acknowledges something.
const ACK: u8 = 16;

/// The conversations of an interface that lets everything in, and the end of its cable.
struct Interface {
    poll: Poll,
    port: Arc<Port>,
    machine: NetPort,
    sockets: Datagrams,
    streams: Streams,
}

impl Interface {
    fn new() -> Self {
        let mut view = crate::fuzzing::view().unwrap();
        let everything = Rule::all(Peer::Cidr(ipnet::Ipv4Net::default()));
        view.policy = Policy::new([&everything], [&everything], |_| Members::default());
        let reach = Reach { host: true, resolver: None };
        let (poll, streams) = (Poll::new().unwrap(), Streams::new(&view, reach.clone()));
        let (machine, cable) = net::link();
        let waker = Waker::new(poll.registry(), WAKE).unwrap();
        let port = Port::new(view, cable, &Arc::new(Fabric::default()), waker, 64).unwrap();
        let sockets = Datagrams::new(reach, Budget::new(64).share());
        Self { poll, port, machine, sockets, streams }
    }

    fn says(&mut self, segment: Vec<u8>) {
        let flow = Flow::parse(&segment[ETHERNET_LEN..]).unwrap();
        let view = self.port.view();
        self.streams.take(self.poll.registry(), &mut self.sockets, &view, &flow, segment);
    }

    fn turn(&mut self) {
        let mut events = Events::with_capacity(16);
        self.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        events.iter().for_each(|event| self.streams.notice(event));
        self.streams.work(self.poll.registry(), &mut self.sockets, &self.port);
    }

    fn accepts(&mut self) -> bool {
        self.streams.accept(self.poll.registry(), &mut self.sockets, &self.port)
    }

    /// Where what it is answered begins: it is waited for, and accepts the conversation.
    fn is_answered(&mut self, key: Key) -> TcpSeqNumber {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            self.turn();
            while let Some(frame) = self.machine.recv() {
                let ip = Ipv4Packet::new_checked(&frame.data[ETHERNET_LEN..]).unwrap();
                let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
                let answered = (ip.dst_addr(), tcp.dst_port()) == key.0 && tcp.syn();
                if answered && (ip.src_addr(), tcp.src_port()) == key.1 {
                    return tcp.seq_number();
                }
            }
        }
        panic!("nothing is answered to {key:?}");
    }

    fn socket(&self, key: Key) -> Option<SocketHandle> {
        match self.streams.conversations.get(&key)? {
            Conversation::Open { socket, .. } => Some(*socket),
            _ => None,
        }
    }
}

/// What the guest says of itself, from this place on, having heard what comes before `acknowledged`.
fn segment(key: Key, flags: u8, [begin, acknowledged]: [i32; 2], behind_header: &[u8]) -> Vec<u8> {
    let is_beginning = flags & SYN != 0;
    let (options, payload) = if is_beginning { (behind_header, &[][..]) } else { (&[][..], behind_header) };
    let acknowledged = (flags & ACK != 0).then_some(TcpSeqNumber(acknowledged));
    let begin = TcpSeqNumber(begin);
    Segment { key, begin, acknowledged, window: 1000, flags, options, payload: payload.to_vec() }.frame()
}

/// A server at a loopback address, which the edge itself does not look at. It waits for nobody for ever, and has little room.
fn server() -> (Server, (Ipv4Addr, u16)) {
    let server = Server::bind("127.0.0.1:0").unwrap();
    SockRef::from(&server).set_read_timeout(Some(PATIENCE)).unwrap();
    SockRef::from(&server).set_recv_buffer_size(4096).unwrap();
    let port = server.local_addr().unwrap().port();
    (server, (Ipv4Addr::LOCALHOST, port))
}

fn accepted(server: &Server) -> Host {
    let host = server.accept().unwrap().0;
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    host
}

/// The conversation that comes next at the same place is one of its own, from the same port and from another.
#[test]
fn a_beginning_that_the_guest_takes_back_is_over() {
    let own = crate::fuzzing::view().unwrap().address;
    for port in [4000, 4001] {
        let mut guest = Interface::new();
        let (server, there) = server();
        let (one, other) = (((own, 4000), there), ((own, port), there));
        guest.says(segment(one, SYN, [99, 0], &[]));
        guest.is_answered(one);
        let mut first = accepted(&server);
        // Both in one turn.
        guest.says(segment(one, RST, [100, 0], &[]));
        guest.says(segment(other, SYN, [999, 0], &[]));
        let begin = guest.is_answered(other);
        let mut second = accepted(&server);
        assert_eq!(guest.streams.conversations.keys(), [other], "from port {port}");
        assert_eq!(guest.streams.stack.sockets.iter().count(), 1);
        guest.says(segment(other, ACK, [1000, begin.0.wrapping_add(1)], b"hello"));
        guest.turn();
        let mut heard = [0; 5];
        second.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        assert!(matches!(first.read(&mut heard), Ok(0) | Err(_)));
    }
}

#[test]
fn a_beginning_that_is_taken_back_from_a_service_is_over() {
    let own = crate::fuzzing::view().unwrap().address;
    let mut guest = Interface::new();
    let [one, other] = [4000, 4001].map(|port| ((own, port), (METADATA, 80)));
    guest.says(segment(one, SYN, [99, 0], &[]));
    guest.is_answered(one);
    guest.says(segment(one, RST, [100, 0], &[]));
    guest.says(segment(other, SYN, [999, 0], &[]));
    guest.is_answered(other);
    assert_eq!(guest.streams.conversations.keys(), [other]);
    let socket = guest.socket(other).unwrap();
    assert_eq!(guest.streams.stack.get(socket).remote_endpoint().map(|there| there.port), Some(4001));
    // The last one, after which nothing begins.
    guest.says(segment(other, RST, [1000, 0], &[]));
    guest.turn();
    assert!(guest.streams.conversations.keys().is_empty());
}

#[test]
fn what_the_stack_takes_for_no_beginning_leaves_nothing() {
    let own = crate::fuzzing::view().unwrap().address;
    let mut guest = Interface::new();
    let (server, there) = server();
    let beginnings: [(u8, &[u8]); 2] = [(SYN | FIN, &[]), (SYN, &[2, 3, 5, 0])];
    for (port, (flags, options)) in (4000..).zip(beginnings) {
        for to in [there, (METADATA, 80)] {
            let key = ((own, port), to);
            guest.says(segment(key, flags, [99, 0], options));
            let begun = Instant::now();
            while guest.streams.conversations.get(&key).is_some() && begun.elapsed() < PATIENCE {
                guest.turn();
            }
            assert!(guest.streams.conversations.keys().is_empty(), "{flags} {options:?} to {to:?}");
            assert_eq!(guest.streams.stack.sockets.iter().count(), 0);
        }
        // It had been asked before.
        drop(accepted(&server));
        // Nor does it have the next one's place in the same turn.
        let [no_beginning, other] = [5000, 5001].map(|port| ((own, port), (METADATA, 80)));
        guest.says(segment(no_beginning, flags, [99, 0], options));
        guest.says(segment(other, SYN, [999, 0], &[]));
        guest.is_answered(other);
        assert_eq!(guest.streams.conversations.keys(), [other], "{flags} {options:?}");
        guest.says(segment(other, RST, [1000, 0], &[]));
        guest.turn();
    }
}

/// Long after it is over for the guest.
#[test]
fn a_host_that_reads_late_hears_all_that_a_guest_has_said() {
    let own = crate::fuzzing::view().unwrap().address;
    let mut guest = Interface::new();
    let (server, there) = server();
    let key = ((own, 4000), there);
    guest.says(segment(key, SYN, [99, 0], &[]));
    let acknowledged = guest.is_answered(key).0.wrapping_add(1);
    let mut host = accepted(&server);
    let socket = guest.socket(key).unwrap();
    let mut said = Vec::new();
    // Until the host's kernel has no more room.
    while guest.streams.stack.get(socket).recv_queue() == 0 {
        let piece = vec![(said.len() / 50_000) as u8; 50_000];
        guest.says(segment(key, ACK, [100 + said.len() as i32, acknowledged], &piece));
        said.extend(piece);
        guest.turn();
    }
    let end = 100 + said.len() as i32;
    guest.says(segment(key, ACK | FIN, [end, acknowledged], &[]));
    guest.turn();
    host.shutdown(Shutdown::Write).unwrap();
    let begun = Instant::now();
    while guest.streams.stack.get(socket).state() != tcp::State::LastAck && begun.elapsed() < PATIENCE {
        guest.turn();
    }
    guest.says(segment(key, ACK, [end + 1, acknowledged.wrapping_add(1)], &[]));
    guest.turn();
    host.set_nonblocking(true).unwrap();
    let (mut heard, mut bytes) = (Vec::<u8>::new(), [0; 65_536]);
    while begun.elapsed() < PATIENCE {
        match host.read(&mut bytes) {
            Ok(0) => break,
            Ok(len) => heard.extend(&bytes[..len]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => guest.turn(),
            Err(e) => panic!("{e} behind {} of {} bytes", heard.len(), said.len()),
        }
    }
    assert!(heard == said, "{} of {} bytes", heard.len(), said.len());
    guest.turn();
    assert!(guest.streams.conversations.keys().is_empty() && guest.streams.owners.is_empty());
}

/// More of them wait than are looked at in a turn, and nobody is told again of those that do.
#[test]
fn clients_who_come_in_crowds_leave_others_their_turn() {
    let mut guest = Interface::new();
    let (server, _) = server();
    let at = server.local_addr().unwrap();
    let clients: Vec<_> = (0..TURN + 2).map(|_| Host::connect(at).unwrap()).collect();
    let entrance = Entrance { at, port: 80, to: None };
    guest.streams.listen(guest.poll.registry(), server, entrance).unwrap();
    assert!(guest.accepts(), "of {} there are more", clients.len());
    assert!(guest.streams.listeners[0].socket.accept().is_ok(), "they wait");
    assert!(!guest.accepts());
    assert!(guest.streams.listeners[0].socket.accept().is_err(), "it has looked at all");
}
