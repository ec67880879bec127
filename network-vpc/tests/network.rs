//! Guests in a network: among themselves, with the network's services, and with the world outside.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use common::packets::{ROUTER, who_has};
use common::setup::{anywhere, boot, interface, is_turned_away, network, own_address};
use common::{Guest, PATIENCE, SILENCE, assert_reaches, reaches, together};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use instance_core::net::Frame;
use network_vpc::{Direction, ErrorKind, InterfaceSpec, Metadata, Network, NetworkOptions, Peer, Rule};
use smoltcp::socket::tcp;

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// That it does not.
fn assert_cut_off(from: &mut Guest, to: &mut Guest, port: u16) {
    assert!(!reaches(from, to, port, SILENCE), "{} reaches {}", from.address, to.address);
}

#[test]
fn dhcp_gives_the_interface_its_address() {
    let network = network();
    let (interface, guest) = boot(&network, "a", &[]);
    assert_eq!(guest.address, interface.private_ip);
    assert_eq!(guest.router.to_string(), "172.31.0.1");
    assert_eq!(guest.resolvers, [Ipv4Addr::new(172, 31, 0, 2)]);
}

#[test]
fn security_groups_decide_who_gets_in() {
    let network = network();
    let (_, mut a) = boot(&network, "a", &[]);
    let (b_interface, mut b) = boot(&network, "b", &[Rule::tcp(80, anywhere())]);
    assert_reaches(&mut a, &mut b, 80);
    assert_cut_off(&mut a, &mut b, 81);
    assert_cut_off(&mut b, &mut a, 80);

    // A rule for a group is one for who is in it, at once.
    let group_of_a = network.security_groups().into_iter().find(|group| group.name == "a").unwrap();
    let to_b = b_interface.groups[0];
    let rule = Rule::tcp(81, anywhere()).with_peer(Peer::Group(group_of_a.id));
    network.authorize(to_b, Direction::Ingress, rule).unwrap();
    assert_reaches(&mut a, &mut b, 81);

    // What is open to some stays so when its rule goes; nothing new begins.
    let ssh = Rule::tcp(22, "172.31.0.0/16".parse().unwrap());
    let ssh = network.authorize(to_b, Direction::Ingress, ssh).unwrap();
    let listener = b.listen(22);
    let connection = a.begin_connecting(b_interface.private_ip, 22);
    let established = |guests: &mut [&mut Guest]| {
        (guests[1].tcp(listener).state() == tcp::State::Established).then_some(())
    };
    together(PATIENCE, &mut [&mut a, &mut b], established).unwrap();
    network.revoke(to_b, ssh).unwrap();
    assert_cut_off(&mut a, &mut b, 22);
    a.tcp(connection).send_slice(b"still here").unwrap();
    let heard = together(PATIENCE, &mut [&mut a, &mut b], |guests| {
        let socket = guests[1].tcp(listener);
        socket.can_recv().then(|| socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap())
    });
    assert_eq!(heard.as_deref(), Some(&b"still here"[..]));
}

#[test]
fn subnets_are_routed_and_vpcs_are_apart() {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    // Which everybody may reach who can.
    let (_, mut a) = boot(&network, "a", &[Rule::all(Peer::Cidr(anywhere()))]);
    let group = network.create_security_group(vpc, "b", "").unwrap().id;
    network.authorize(group, Direction::Ingress, Rule::tcp(80, anywhere())).unwrap();
    let other = network.create_subnet(vpc, "172.31.64.0/24".parse().unwrap()).unwrap();
    let there = network.create_interface(InterfaceSpec::new(other.id).groups([group])).unwrap();
    let mut b = Guest::boot(network.plug(there.id).unwrap());
    assert_eq!(b.router.to_string(), "172.31.64.1");
    assert_reaches(&mut a, &mut b, 80);

    let elsewhere = network.create_vpc("172.31.0.0/16".parse().unwrap()).unwrap();
    let subnet = network.create_subnet(elsewhere.id, "172.31.64.0/24".parse().unwrap()).unwrap();
    let stranger = network.create_interface(InterfaceSpec::new(subnet.id)).unwrap();
    let mut c = Guest::boot(network.plug(stranger.id).unwrap());
    assert_eq!(c.address, b.address);
    assert_reaches(&mut b, &mut a, 80);
    assert_cut_off(&mut c, &mut a, 80);
    // Nor one whose address is nobody else's, so that an answer would find its way.
    let alone = InterfaceSpec::new(subnet.id).private_ip("172.31.64.77".parse().unwrap());
    let alone = network.create_interface(alone).unwrap();
    assert_cut_off(&mut Guest::boot(network.plug(alone.id).unwrap()), &mut a, 80);
}

#[test]
fn names_are_addresses_and_back() {
    let network = network();
    let (interface, mut a) = boot(&network, "a", &[]);
    let resolver = a.resolvers[0];
    let mut ask = |name: &str, kind| {
        let mut question = Message::new();
        question
            .set_id(7)
            .set_recursion_desired(true)
            .add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let answer = a.ask(resolver, 53, &question.to_vec().unwrap())?;
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(answer.id(), 7);
        let data = answer.answers().first().map(|record| record.data().to_string());
        Some((answer.response_code(), data))
    };
    let name = format!("{}.eu-west-1.compute.internal.", interface.private_host_name());
    let address = Some((ResponseCode::NoError, Some(interface.private_ip.to_string())));
    assert_eq!(ask(&name, RecordType::A), address);
    assert_eq!(ask(&name.to_ascii_uppercase(), RecordType::A), address);
    assert_eq!(
        ask("4.0.31.172.in-addr.arpa.", RecordType::PTR),
        Some((ResponseCode::NoError, Some(name.clone())))
    );
    assert_eq!(ask(&name, RecordType::AAAA), Some((ResponseCode::NoError, None)));
    let nowhere = Some((ResponseCode::NXDomain, None));
    assert_eq!(ask("ip-10-0-0-1.eu-west-1.compute.internal.", RecordType::A), nowhere);
    assert_eq!(ask("web.eu-west-1.compute.internal.", RecordType::A), nowhere);
}

#[test]
fn a_guest_reads_its_own_metadata() {
    let network = network();
    let (first, mut a) = boot(&network, "a", &[]);
    let (second, mut b) = boot(&network, "b", &[]);
    for (interface, id) in [(&first, "i-0000000000000000a"), (&second, "i-0000000000000000b")] {
        let mut metadata = Metadata::new(id.parse().unwrap());
        metadata.user_data = Some(id.as_bytes().to_vec());
        network.set_metadata(interface.id, Some(metadata)).unwrap();
    }
    let token = |guest: &mut Guest| {
        let request = "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
        let (status, token) = guest.http(METADATA, request);
        assert_eq!(status, 200);
        token
    };
    let get = |guest: &mut Guest, token: &str| {
        let header = format!("X-aws-ec2-metadata-token: {token}\r\n");
        guest.http(METADATA, &format!("GET /latest/meta-data/instance-id HTTP/1.1\r\n{header}"))
    };
    let (of_a, of_b) = (token(&mut a), token(&mut b));
    assert_eq!(get(&mut a, &of_a), (200, "i-0000000000000000a".to_owned()));
    assert_eq!(get(&mut b, &of_b), (200, "i-0000000000000000b".to_owned()));
    assert_eq!(get(&mut a, &of_b).0, 401, "another's token");
    assert_eq!(a.http(METADATA, "GET /latest/user-data HTTP/1.1\r\n").0, 401);
    network.set_metadata(first.id, None).unwrap();
    assert_eq!(get(&mut a, &of_a).0, 404);
}

#[test]
fn the_world_outside_is_reached_over_the_hosts_sockets() {
    let Some(own) = own_address() else { return };
    let server = TcpListener::bind((own, 0)).unwrap();
    let at = server.local_addr().unwrap().port();
    let echo = thread::spawn(move || {
        let (mut client, _) = server.accept().unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        client.write_all(&all).unwrap();
    });
    let region = "eu-west-1".parse().unwrap();
    let open = NetworkOptions::new().reach_host(true).in_memory(&region).unwrap();
    let (_, mut guest) = boot(&open, "a", &[]);
    let connection = guest.connect(PATIENCE, own, at).unwrap();
    let text: Vec<u8> = (0..300_000u32).flat_map(|n| (n as u16).to_be_bytes()).collect();
    guest.say(connection, &text);
    guest.tcp(connection).close();
    assert!(guest.hear(connection, usize::MAX) == text, "what comes back is what was sent");
    echo.join().unwrap();

    // Nobody listens there; and the host itself is out of reach unless allowed.
    let closed = TcpListener::bind((own, 0)).unwrap().local_addr().unwrap().port();
    assert!(guest.connect(PATIENCE, own, closed).is_none());
    let server = TcpListener::bind((own, 0)).unwrap();
    let at = server.local_addr().unwrap().port();
    let network = network();
    let (_, mut shut_in) = boot(&network, "a", &[]);
    assert!(shut_in.connect(PATIENCE, own, at).is_none());
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(169, 254, 1, 1), Ipv4Addr::new(0, 0, 0, 1)] {
        assert!(guest.connect(SILENCE, address, at).is_none(), "{address}");
    }

    let socket = UdpSocket::bind((own, 0)).unwrap();
    let at = socket.local_addr().unwrap().port();
    let echo = thread::spawn(move || {
        let mut bytes = [0; 100];
        let (len, from) = socket.recv_from(&mut bytes).unwrap();
        socket.send_to(&bytes[..len], from).unwrap();
    });
    assert_eq!(guest.ask(own, at, b"hello").as_deref(), Some(&b"hello"[..]));
    echo.join().unwrap();
}

#[test]
fn clients_come_in_at_forwarded_ports_if_the_groups_let_them() {
    let network = network();
    let loopback = "127.0.0.1/32".parse().unwrap();
    let (interface, mut guest) = boot(&network, "a", &[Rule::tcp(22, loopback)]);
    let ssh = network.forward(interface.id, 22, "127.0.0.1:0".parse().unwrap()).unwrap();
    let web = network.forward(interface.id, 80, "127.0.0.1:0".parse().unwrap()).unwrap();
    let server = guest.listen(22);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(ssh).unwrap();
        stream.write_all(b"hello").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    });
    guest.until(|guest| guest.tcp(server).can_recv().then_some(())).unwrap();
    assert_eq!(guest.hear(server, 5), b"hello");
    let seen = guest.tcp(server).remote_endpoint().unwrap().addr;
    assert_eq!(seen.to_string(), "169.254.0.1");
    guest.say(server, b"welcome");
    guest.tcp(server).close();
    guest.until(|guest| (!guest.tcp(server).is_open()).then_some(()));
    assert_eq!(client.join().unwrap(), b"welcome");

    // No rule for port 80: whoever connects is turned away.
    guest.listen(80);
    assert!(is_turned_away(TcpStream::connect(web).unwrap()));
    network.stop_forwarding(interface.id, 80).unwrap();
    guest.until(|_| TcpStream::connect(web).is_err().then_some(())).unwrap();
}

#[test]
fn a_network_is_there_again_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let region = "eu-west-1".parse().unwrap();
    let first = Network::open(dir.path(), &region).unwrap();
    let made = interface(&first, "a", &[Rule::tcp(22, anywhere())]);
    let at = first.forward(made.id, 22, "127.0.0.1:0".parse().unwrap()).unwrap();
    first.create_key_pair("mine").unwrap();
    let before =
        (first.vpcs(), first.subnets(), first.security_groups(), first.interfaces(), first.key_pairs());
    drop(first);
    let second = Network::open(dir.path(), &region).unwrap();
    let after =
        (second.vpcs(), second.subnets(), second.security_groups(), second.interfaces(), second.key_pairs());
    assert_eq!(before, after);
    let mut guest = Guest::boot(second.plug(made.id).unwrap());
    let server = guest.listen(22);
    let client = TcpStream::connect(at).unwrap();
    guest.until(|guest| (guest.tcp(server).state() == tcp::State::Established).then_some(())).unwrap();
    drop(client);
}

#[test]
fn a_network_has_one_owner_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let region = "eu-west-1".parse().unwrap();
    let open = || Network::open(&dir.path().join("network"), &region);
    let first = open().unwrap();
    let refused = open().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NetworkInUse);
    let other = first.clone();
    let made = first.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap();
    drop(first);
    assert_eq!(open().unwrap_err().kind(), ErrorKind::NetworkInUse, "a clone is the same");
    drop(other);
    assert!(open().unwrap().vpcs().contains(&made));
    // Who cannot open it leaves it to others.
    std::fs::write(dir.path().join("network/network.json"), "{").unwrap();
    for _ in 0..2 {
        assert_eq!(open().unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn an_interface_has_one_machine_and_lets_it_go() {
    let network = network();
    let made = interface(&network, "a", &[]);
    let port = network.plug(made.id).unwrap();
    assert_eq!(network.plug(made.id).unwrap_err().code(), "InvalidNetworkInterface.InUse");
    assert_eq!(network.delete_interface(made.id).unwrap_err().code(), "InvalidNetworkInterface.InUse");
    drop(port);
    let port = network.plug(made.id).unwrap().port;
    drop(network);
    assert!(!port.is_connected());
}

#[test]
fn a_machine_that_takes_and_answers_its_frames_at_once_gets_all_of_them() {
    const FRAMES: usize = 5000;
    const ARP: [u8; 2] = [8, 6];
    let network = network();
    let (_, mut a) = boot(&network, "a", &[]);
    let b = interface(&network, "b", &[Rule::all(Peer::Cidr(anywhere()))]);
    let spec = network.plug(b.id).unwrap();
    // In whatever thread they come, also the one that brings them.
    let (frame, frame_came) = channel();
    let (port, question) = (spec.port.clone(), who_has(b.mac, b.private_ip, a.router));
    spec.port.set_waker(Some(Arc::new(move || {
        while let Some(came) = port.recv() {
            if came.data[12..14] != ARP {
                // The network answers it, to who is being given a frame.
                port.send(Frame::new(question.clone())).unwrap();
            }
            let _ = frame.send(came);
        }
    })));
    let (done, is_done) = channel();
    let sender = thread::spawn(move || {
        for _ in 0..FRAMES {
            a.tell(b.private_ip, 9, b"hello");
            a.work();
        }
        done.send(()).unwrap();
    });
    is_done.recv_timeout(PATIENCE).expect("who sends goes on");
    sender.join().unwrap();
    spec.port.set_waker(None);
    let (answers, frames): (Vec<_>, Vec<_>) =
        frame_came.iter().partition(|frame: &Frame| frame.data[12..14] == ARP);
    // The first asks for the hardware address, and its socket is gone when that is known.
    assert_eq!((frames.len(), answers.len()), (FRAMES - 1, FRAMES - 1));
    assert!(answers.iter().all(|answer| answer.data[6..12] == ROUTER.0));
}
