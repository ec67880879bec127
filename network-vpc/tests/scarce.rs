//! What there is not enough of for all: sockets of the host's, and places of conversations.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc::channel;
use std::thread;

use common::packets::{ROUTER, Way, datagram};
use common::setup::{anywhere, boot, open_interface, opened, options, own_address};
use common::{Guest, PATIENCE};
use instance_core::net::Frame;
use network_vpc::{Metadata, Rule};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A host that gives every datagram back, and where.
fn echo(at: Ipv4Addr) -> SocketAddr {
    answers(at, |bytes| bytes.to_vec())
}

/// A host that answers every datagram, and where.
fn answers(at: Ipv4Addr, answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind((at, 0)).unwrap();
    let at = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut bytes) {
            socket.send_to(&answer(&bytes[..len]), from)?;
        }
        std::io::Result::Ok(())
    });
    at
}

/// A question that is the resolver's to answer.
const QUESTION: &[u8] = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x07example\x03com\0\0\x01\0\x01";

/// An answer to one, without what was asked for.
fn answer(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer[2] |= 0x80;
    answer
}

#[test]
fn looking_names_up_takes_no_sockets_from_what_comes_then() {
    let Some(own) = own_address() else { return };
    // Of which six are an interface's that is alone.
    let resolver = answers(Ipv4Addr::LOCALHOST, answer);
    let network = opened(options().reach_host(true).sockets(12).resolver(Some(resolver)));
    let mut guest = Guest::boot(network.plug(open_interface(&network).id).unwrap());
    let at = guest.resolvers[0];
    for _ in 0..6 {
        assert_eq!(guest.ask(at, 53, QUESTION), Some(answer(QUESTION)));
    }
    // It is given its answer first.
    guest.until(|_| (network.open_sockets() == 0).then_some(())).expect("what was answered is over");

    // Other conversations of datagrams may go on, but give their place to a connection.
    let other = echo(own).port();
    for _ in 0..6 {
        assert_eq!(guest.ask(own, other, b"hello").as_deref(), Some(&b"hello"[..]));
    }
    assert_eq!(network.open_sockets(), 6);
    let server = TcpListener::bind((own, 0)).unwrap();
    let at = server.local_addr().unwrap().port();
    for _ in 0..6 {
        guest.connect(PATIENCE, own, at).expect("there is a socket for it");
    }
    assert!(guest.connect(PATIENCE, own, at).is_none(), "there are no more");
}

/// Asks at the network's resolver, which is the socket, from one port, and is answered when all is asked, each answer only when the
/// one before has come. Of a question there are these answers.
fn asks_and_is_answered(questions: &[Vec<u8>], answers: impl Fn(&[u8]) -> Vec<Vec<u8>>) {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    resolver.set_read_timeout(Some(PATIENCE)).unwrap();
    let network = opened(options().resolver(resolver.local_addr().ok()));
    let interface = open_interface(&network);
    let port = network.plug(interface.id).unwrap().port;
    let (wake, woken) = channel();
    port.set_waker(Some(std::sync::Arc::new(move || _ = wake.send(()))));
    let to = Ipv4Addr::new(172, 31, 0, 2);
    let way = Way { macs: [interface.mac, ROUTER], addresses: [interface.private_ip, to] };
    let mut bytes = [0; 512];
    let mut asked = Vec::new();
    for question in questions {
        port.send(Frame::new(datagram(way, [4000, 53], question))).unwrap();
        let (len, from) = resolver.recv_from(&mut bytes).unwrap();
        assert_eq!(bytes[..len], *question);
        asked.push((question, from));
    }
    let all =
        asked.iter().flat_map(|(question, from)| answers(question).into_iter().map(move |one| (one, from)));
    for (answer, to) in all {
        resolver.send_to(&answer, to).unwrap();
        let frame = loop {
            match port.recv() {
                Some(frame) => break frame,
                None => woken.recv_timeout(PATIENCE).expect("an answer comes"),
            }
        };
        assert_eq!(frame.data[42..], answer);
    }
}

/// As resolvers ask for both kinds of addresses at once.
#[test]
fn two_questions_from_one_port_have_two_answers() {
    let question = |id| [&[0, id], &QUESTION[2..]].concat();
    asks_and_is_answered(&[question(1), question(2)], |question| vec![answer(question)]);
}

/// What else is sent to the port of names has no end that anybody could know; nor has what comes but an answer to a question.
#[test]
fn what_is_no_question_may_have_many_answers() {
    asks_and_is_answered(&[b"hello".to_vec()], |_| vec![b"welcome".to_vec(); 3]);
    asks_and_is_answered(&[QUESTION.to_vec(), b"hello".to_vec()], |question| vec![question.to_vec(); 2]);
    let of_others =
        |question: &[u8]| vec![question.to_vec(), [&[9], &answer(question)[1..]].concat(), answer(question)];
    asks_and_is_answered(&[QUESTION.to_vec()], of_others);
}

/// Clients that come in and say nothing, and those of them whom the guest has.
fn idle_clients(
    guest: &mut Guest,
    (at, port): (SocketAddr, u16),
    count: usize,
    expect: usize,
) -> (Vec<TcpStream>, Vec<SocketHandle>) {
    let sockets: Vec<_> = (0..count).map(|_| guest.listen(port)).collect();
    let clients: Vec<_> = (0..count).map(|_| TcpStream::connect(at).unwrap()).collect();
    let there = |guest: &mut Guest| {
        let of = |socket: &&SocketHandle| guest.tcp(**socket).state() == tcp::State::Established;
        sockets.iter().filter(of).copied().collect::<Vec<_>>()
    };
    let come = guest.until(|guest| Some(there(guest)).filter(|come| come.len() == expect));
    let come = come.unwrap_or_else(|| panic!("{} and not {expect} came", there(guest).len()));
    (clients, come)
}

#[test]
fn clients_leave_the_guest_a_quarter_of_its_sockets() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true).sockets(16));
    let (interface, mut guest) = boot(&network, "web", &[Rule::tcp(80, anywhere())]);
    network.set_metadata(interface.id, Some(Metadata::new("i-0123456789abcdef0".parse().unwrap()))).unwrap();
    let at = network.forward(interface.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();
    // Of eight that it has alone.
    let (clients, _) = idle_clients(&mut guest, (at, 80), 12, 6);
    let server = TcpListener::bind((own, 0)).unwrap();
    for _ in 0..2 {
        let there = guest.connect(PATIENCE, own, server.local_addr().unwrap().port());
        assert!(there.is_some(), "the guest has sockets left");
    }
    let request = "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    assert_eq!(guest.http(METADATA, request).0, 200, "and services need none");
    drop(clients);
}

/// What is remembered of those who wait is bounded, and none of them may come in as whom the guest sees.
#[test]
fn clients_whom_a_slow_guest_has_not_answered_yet_are_not_forgotten() {
    const MANY: usize = 12;
    // Of which a sixteenth is for those who wait.
    let network = opened(options().tracked_conversations(64));
    let (interface, mut guest) = boot(&network, "ssh", &[Rule::tcp(22, "127.0.0.1/32".parse().unwrap())]);
    let at = network.forward(interface.id, 22, "127.0.0.1:0".parse().unwrap()).unwrap();
    let sockets: Vec<_> = (0..MANY).map(|_| guest.listen(22)).collect();
    let clients: Vec<_> = (0..MANY).map(|_| TcpStream::connect(at).unwrap()).collect();
    guest.port.set_waker(None);
    while guest.port.waiting() < MANY {
        thread::yield_now();
    }
    // Only now it looks at what has come.
    let all_are_there = |guest: &mut Guest| {
        let is_there = |socket: &SocketHandle| guest.tcp(*socket).state() == tcp::State::Established;
        sockets.iter().all(is_there).then_some(())
    };
    guest.until(all_are_there).expect("all of them come in");

    // They are known by then, whatever becomes of the rule.
    let rule = *network.security_group(interface.groups[0]).unwrap().ingress.keys().next().unwrap();
    network.revoke(interface.groups[0], rule).unwrap();
    for (mut client, socket) in clients.into_iter().zip(&sockets) {
        guest.say(*socket, b"x");
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(client.read(&mut [0; 2]).unwrap(), 1);
    }
}

/// The timer of a connection of this process's: what it waits for, and for how many hundredths of a second (proc_net_tcp(5)).
fn timer(local: SocketAddr, remote: SocketAddr) -> (u8, u64) {
    let name = |at: SocketAddr| match at {
        SocketAddr::V4(at) => format!("{:08X}:{:04X}", u32::from(*at.ip()).swap_bytes(), at.port()),
        SocketAddr::V6(at) => panic!("{at}"),
    };
    let (local, remote) = (name(local), name(remote));
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let line = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = line.into_iter().find(|words| words[1..3] == [&local, &remote]).expect("it is there");
    let (what, when) = line[5].split_once(':').unwrap();
    (what.parse().unwrap(), u64::from_str_radix(when, 16).unwrap())
}

#[test]
fn others_that_are_silent_are_asked_whether_they_are_there() {
    const KEEP_ALIVE: u8 = 2;
    const SOON: u64 = 15_000;
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let (interface, mut guest) = boot(&network, "web", &[Rule::tcp(80, anywhere())]);
    let server = TcpListener::bind((own, 0)).unwrap();
    let at = server.local_addr().unwrap();
    guest.connect(PATIENCE, own, at.port()).unwrap();
    let (_host, from) = server.accept().unwrap();
    let is_asked = |local, remote| {
        let (what, when) = timer(local, remote);
        (what == KEEP_ALIVE && when <= SOON).then_some(())
    };
    guest.until(|_| is_asked(from, at)).expect("a host outside");

    let at = network.forward(interface.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();
    let (clients, _) = idle_clients(&mut guest, (at, 80), 1, 1);
    let from = clients[0].local_addr().unwrap();
    guest.until(|_| is_asked(at, from)).expect("a client");
}
