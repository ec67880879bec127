//! The addresses by which instances are reached: Elastic IP addresses, secondary ones, forwarded ports, and addresses
//! that had another owner before.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::setup::{anywhere, boot, interface, network, open_interface, opened, options};
use common::{Guest, PATIENCE, SILENCE, together};
use network_vpc::{Direction, InterfaceSpec, Metadata, Rule};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::Ipv4Cidr;

/// A guest that listens for so long, and a thread that connects from the host and says what it hears.
fn greets(guest: &mut Guest, inside: u16, at: SocketAddr, patience: Duration) -> Option<String> {
    let server = guest.listen(inside);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect_timeout(&at, PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut heard = String::new();
        stream.read_to_string(&mut heard).ok()?;
        Some(heard)
    });
    let to = guest.within(patience, |guest| guest.tcp(server).may_send().then_some(()));
    if to.is_some() {
        let own = guest.tcp(server).local_endpoint().unwrap();
        guest.say(server, format!("I am {}", own.addr).as_bytes());
        guest.tcp(server).close();
        guest.until(|guest| (!guest.tcp(server).is_open()).then_some(()));
    }
    guest.sockets.remove(server);
    client.join().unwrap().filter(|heard| !heard.is_empty())
}

#[test]
fn an_elastic_address_leads_where_it_is_associated() {
    let network = network();
    let [one, other] = [0, 1].map(|_| open_interface(&network));
    let mut guests = [&one, &other].map(|interface| Guest::boot(network.plug(interface.id).unwrap()));
    let address = network.allocate_address().unwrap();
    assert!(address.public_ip.is_loopback() && address.association.is_none());
    let at = SocketAddr::from((address.public_ip, 8642));
    network.associate_address(address.allocation_id, one.id, None).unwrap();
    assert_eq!(greets(&mut guests[0], 8642, at, SILENCE), None, "no rule names the port");
    for interface in [&one, &other] {
        let rule = Rule::tcp(8642, anywhere());
        network.authorize(interface.groups[0], Direction::Ingress, rule).unwrap();
    }
    assert_eq!(greets(&mut guests[0], 8642, at, PATIENCE), Some(format!("I am {}", one.private_ip)));

    // It leads to one place at a time, and says so to the guest.
    network.set_metadata(other.id, Some(Metadata::new("i-0123456789abcdef0".parse().unwrap()))).unwrap();
    let association = network.associate_address(address.allocation_id, other.id, None).unwrap();
    assert_eq!(greets(&mut guests[1], 8642, at, PATIENCE), Some(format!("I am {}", other.private_ip)));
    assert_eq!(
        read_metadata(&mut guests[1], "public-ipv4").as_deref(),
        Some(&*address.public_ip.to_string())
    );
    assert_eq!(network.release_address(address.allocation_id).unwrap_err().code(), "InvalidIPAddress.InUse");
    let gateway = network.internet_gateways()[0].clone();
    let needed = network.detach_internet_gateway(gateway.id, gateway.vpc_id.unwrap()).unwrap_err();
    assert_eq!(needed.code(), "DependencyViolation");
    network.disassociate_address(association).unwrap();
    assert!(TcpStream::connect(at).is_err(), "nobody listens any more");
    assert_eq!(read_metadata(&mut guests[1], "public-ipv4"), None);
    assert_eq!(
        network.disassociate_address(association).unwrap_err().code(),
        "InvalidAssociationID.NotFound"
    );

    // With its interface goes the association and not the address.
    network.associate_address(address.allocation_id, one.id, None).unwrap();
    network.unplug(one.id);
    network.delete_interface(one.id).unwrap();
    assert_eq!(network.addresses()[0].association, None);
    network.release_address(address.allocation_id).unwrap();
    assert_eq!(
        network.release_address(address.allocation_id).unwrap_err().code(),
        "InvalidAllocationID.NotFound"
    );
}

#[test]
fn datagrams_come_in_at_an_elastic_address_and_are_answered_from_it() {
    let network = network();
    let rules = [
        Rule::udp(5300..=5301, "127.0.0.0/8".parse().unwrap()),
        Rule::udp(5302..=5302, "10.0.0.0/8".parse().unwrap()),
    ];
    let (interface, mut guest) = boot(&network, "names", &rules);
    let address = network.allocate_address().unwrap();
    let association = network.associate_address(address.allocation_id, interface.id, None).unwrap();
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    for (port, is_let_in) in [(5300, true), (5301, true), (5302, false)] {
        let mut server = udp::Socket::new(buffer(), buffer());
        server.bind(port).unwrap();
        let server = guest.sockets.add(server);
        // Who they are is told by where they came from.
        let clients = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        for (n, client) in clients.iter().enumerate() {
            client.connect((address.public_ip, port)).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.send(&[n as u8; 3]).unwrap();
        }
        let mut came = 0;
        let patience = if is_let_in { PATIENCE } else { SILENCE };
        let done = guest.within(patience, |guest| {
            let socket = guest.sockets.get_mut::<udp::Socket<'_>>(server);
            while let Ok((bytes, from)) = socket.recv().map(|(bytes, from)| (bytes.to_vec(), from)) {
                assert_eq!(from.endpoint.addr.to_string(), "169.254.0.1");
                socket.send_slice(&[bytes, b"!".to_vec()].concat(), from.endpoint).unwrap();
                came += 1;
            }
            (came == clients.len() && socket.send_queue() == 0).then_some(())
        });
        assert_eq!(done.is_some(), is_let_in, "{port}");
        for (n, client) in clients.iter().enumerate().filter(|_| is_let_in) {
            let mut heard = [0; 10];
            let len = client.recv(&mut heard).unwrap();
            assert_eq!(heard[..len], [n as u8, n as u8, n as u8, b'!']);
        }
        guest.sockets.remove(server);
    }
    network.disassociate_address(association).unwrap();
    UdpSocket::bind((address.public_ip, 5300)).expect("nobody listens any more");
}

#[test]
fn datagrams_come_in_at_forwarded_ports_if_the_groups_let_them() {
    let dir = tempfile::tempdir().unwrap();
    let region = "eu-west-1".parse().unwrap();
    let network = options().open(dir.path(), &region).unwrap();
    let made = interface(&network, "names", &[Rule::udp(53..=53, "127.0.0.0/8".parse().unwrap())]);
    // Before its machine is there, and after.
    let [free, other] = ["127.0.0.1:0"; 2].map(|at| at.parse().unwrap());
    network.forward_udp(made.id, 53, free).unwrap();
    network.forward(made.id, 53, free).unwrap();
    let mut guest = Guest::boot(network.plug(made.id).unwrap());
    let time = network.forward_udp(made.id, 123, other).unwrap();
    // Somebody else may have had a port meanwhile that nobody asked for.
    let now = network.interface(made.id).unwrap();
    let (names, streams) = (now.udp_forwards[&53], now.forwards[&53]);
    assert_eq!(now.udp_forwards, [(53, names), (123, time)].into());
    let shown = Some("from 169.254.0.1".to_owned());
    assert_eq!(answers(&mut guest, 53, names, PATIENCE), shown);
    assert_eq!(answers(&mut guest, 123, time, SILENCE), None, "no rule names the port");

    // TCP's is another, and so is another port's.
    for rule in [Rule::tcp(53, anywhere()), Rule::udp(123..=123, anywhere())] {
        network.authorize(made.groups[0], Direction::Ingress, rule).unwrap();
    }
    assert_eq!(greets(&mut guest, 53, streams, PATIENCE), Some(format!("I am {}", made.private_ip)));
    network.stop_forwarding(made.id, 53).unwrap();
    assert_eq!(greets(&mut guest, 53, streams, SILENCE), None);
    assert_eq!(answers(&mut guest, 53, names, PATIENCE), shown);
    assert_eq!(answers(&mut guest, 123, time, PATIENCE), shown);
    network.stop_forwarding_udp(made.id, 123).unwrap();
    assert_eq!(answers(&mut guest, 123, time, SILENCE), None);

    // They are there again, but for one that is taken and nobody asked for.
    drop((guest, network));
    let network = options().open(dir.path(), &region).unwrap();
    let _thief = UdpSocket::bind(names);
    let mut guest = Guest::boot(network.plug(made.id).unwrap());
    let now = network.interface(made.id).unwrap().udp_forwards[&53];
    assert_ne!(now, names);
    assert_eq!(answers(&mut guest, 53, now, PATIENCE), shown);
}

/// What a client hears that asks a guest by UDP, which says who has asked.
fn answers(guest: &mut Guest, inside: u16, at: SocketAddr, patience: Duration) -> Option<String> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let mut server = udp::Socket::new(buffer(), buffer());
    server.bind(inside).unwrap();
    let server = guest.sockets.add(server);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_nonblocking(true).unwrap();
    client.send_to(b"who am I?", at).unwrap();
    let heard = guest.within(patience, |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(server);
        if let Ok((_, from)) = socket.recv() {
            socket.send_slice(format!("from {}", from.endpoint.addr).as_bytes(), from.endpoint).unwrap();
        }
        let mut heard = [0; 100];
        let (len, from) = client.recv_from(&mut heard).ok()?;
        assert_eq!(from, at);
        Some(String::from_utf8_lossy(&heard[..len]).into_owned())
    });
    guest.sockets.remove(server);
    heard
}

/// A client from this host is let in as who it is, whoever the guest takes it for, also when it is known already and its
/// conversation is tracked no more.
#[test]
fn a_client_who_is_known_begins_anew_by_its_own_address() {
    // Few conversations are tracked at a time.
    let network = opened(options().tracked_conversations(16));
    let rule = Rule::udp(5300..=5300, "127.0.0.0/8".parse().unwrap());
    let (interface, mut guest) = boot(&network, "names", &[rule]);
    let address = network.allocate_address().unwrap();
    network.associate_address(address.allocation_id, interface.id, None).unwrap();
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let mut server = udp::Socket::new(buffer(), buffer());
    server.bind(5300).unwrap();
    let server = guest.sockets.add(server);
    let clients = [(); 40].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    for n in (0..clients.len()).chain([0]) {
        clients[n].send_to(b"hello", (address.public_ip, 5300)).unwrap();
        let came = guest.within(PATIENCE, |guest| {
            guest.sockets.get_mut::<udp::Socket<'_>>(server).recv().is_ok().then_some(())
        });
        assert!(came.is_some(), "of client {n}");
    }
    assert!(network.tracked_conversations(interface.id) < clients.len() - 1);
}

#[test]
fn elastic_addresses_are_refused_as_in_ec2() {
    let network = opened(options().elastic_pool("127.65.4.0/30".parse().unwrap()));
    let [one, other] = [0, 1].map(|_| network.allocate_address().unwrap());
    assert_ne!(one.public_ip, other.public_ip);
    assert_eq!(network.allocate_address().unwrap_err().code(), "AddressLimitExceeded");
    let vpc = network.create_vpc("10.0.0.0/16".parse().unwrap()).unwrap();
    let subnet = network.create_subnet(vpc.id, "10.0.1.0/24".parse().unwrap()).unwrap();
    let inside = network.create_interface(InterfaceSpec::new(subnet.id)).unwrap();
    let reached = open_interface(&network);
    let nobody = "eipalloc-0123456789abcdef0".parse().unwrap();
    for (code, refused) in [
        ("Gateway.NotAttached", network.associate_address(one.allocation_id, inside.id, None)),
        ("InvalidAllocationID.NotFound", network.associate_address(nobody, reached.id, None)),
        (
            "InvalidParameterValue",
            network.associate_address(one.allocation_id, reached.id, Some(inside.private_ip)),
        ),
        (
            "InvalidNetworkInterfaceID.NotFound",
            network.associate_address(one.allocation_id, "eni-0123456789abcdef0".parse().unwrap(), None),
        ),
    ] {
        assert_eq!(refused.unwrap_err().code(), code);
    }
}

fn read_metadata(guest: &mut Guest, path: &str) -> Option<String> {
    let service = Ipv4Addr::new(169, 254, 169, 254);
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    let (_, token) = guest.http(service, &format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}"));
    let header = format!("X-aws-ec2-metadata-token: {token}\r\n");
    let (status, body) = guest.http(service, &format!("GET /latest/meta-data/{path} HTTP/1.1\r\n{header}"));
    (status == 200).then_some(body)
}

#[test]
fn an_interface_has_secondary_addresses() {
    let network = network();
    let (here, there) = (open_interface(&network), open_interface(&network));
    let mut asks = Guest::boot(network.plug(here.id).unwrap());
    let mut serves = Guest::boot(network.plug(there.id).unwrap());
    let second = network.assign_any_private_ips(there.id, 1).unwrap()[0];
    let third: Ipv4Addr = "172.31.7.7".parse().unwrap();
    network.assign_private_ips(there.id, &[third]).unwrap();
    assert_eq!(network.interface(there.id).unwrap().secondary_private_ips, [second, third]);
    for (code, addresses) in [
        ("InvalidIPAddress.InUse", vec!["172.31.7.8".parse().unwrap(), third]),
        ("InvalidIPAddress.InUse", vec![here.private_ip]),
        ("InvalidParameterValue", vec!["10.0.0.9".parse().unwrap()]),
    ] {
        assert_eq!(network.assign_private_ips(there.id, &addresses).unwrap_err().code(), code);
    }
    assert_eq!(network.interface(there.id).unwrap().secondary_private_ips.len(), 2, "all or nothing");
    let limit = network.assign_any_private_ips(there.id, 48).unwrap_err();
    assert_eq!(limit.code(), "PrivateIpAddressLimitExceeded");

    network.set_metadata(there.id, Some(Metadata::new("i-0123456789abcdef0".parse().unwrap()))).unwrap();
    let mac = format!("network/interfaces/macs/{}/local-ipv4s", there.mac);
    let all = format!("{}\n{second}\n{third}", there.private_ip);
    assert_eq!(read_metadata(&mut serves, &mac), Some(all));

    serves.set_address(Ipv4Cidr::new(third, 20), serves.router);
    let mut reaches = |patience| {
        let (server, connection) = (serves.listen(80), asks.begin_connecting(third, 80));
        let connected = together(patience, &mut [&mut asks, &mut serves], |guests| {
            (guests[0].tcp(connection).state() == tcp::State::Established).then_some(())
        });
        asks.sockets.remove(connection);
        serves.sockets.remove(server);
        connected.is_some()
    };
    assert!(reaches(PATIENCE));
    network.unassign_private_ips(there.id, &[third]).unwrap();
    assert!(!reaches(SILENCE), "it is nobody's any more");
    for not_secondary in [third, there.private_ip] {
        let refused = network.unassign_private_ips(there.id, &[not_secondary]).unwrap_err();
        assert_eq!(refused.code(), "InvalidParameterValue");
    }
}

#[test]
fn a_taken_port_that_nobody_asked_for_becomes_another() {
    let network = network();
    let made = open_interface(&network);
    // Where no other test listens.
    let before = network.forward(made.id, 22, "127.77.2.1:0".parse().unwrap()).unwrap();
    let _thief = TcpListener::bind(before).unwrap();
    let mut guest = Guest::boot(network.plug(made.id).unwrap());
    let now = network.interface(made.id).unwrap().forwards[&22];
    assert_ne!(now, before);
    assert_eq!(greets(&mut guest, 22, now, PATIENCE), Some(format!("I am {}", made.private_ip)));

    // One that was asked for is not given up.
    network.unplug(made.id);
    let free = TcpListener::bind("127.77.2.1:0").unwrap().local_addr().unwrap();
    let asked = network.forward(made.id, 80, free).unwrap();
    let _thief = TcpListener::bind(asked).unwrap();
    let refused = network.plug(made.id).unwrap_err();
    assert_eq!(refused.code(), "InternalError");
    network.stop_forwarding(made.id, 80).unwrap();
    network.plug(made.id).unwrap();
}

/// A machine may be gone of which nobody has pulled the cable.
#[test]
fn nobody_is_waited_for_who_is_gone() {
    let network = network();
    let id = open_interface(&network).id;
    let forward = |port| network.forward(id, port, "127.77.1.1:0".parse().unwrap()).unwrap();
    let is_closed = |at: &SocketAddr| TcpListener::bind(at).is_ok();
    let forwards: Vec<_> = (1..=8).map(forward).collect();
    let machine = network.plug(id).unwrap();
    assert!(!forwards.iter().any(is_closed));
    drop(machine);
    let begun = Instant::now();
    while !forwards.iter().all(is_closed) {
        assert!(begun.elapsed() < PATIENCE, "its thread ends with it");
        thread::sleep(Duration::from_millis(1));
    }
    let begun = Instant::now();
    (1..=8).for_each(|port| network.stop_forwarding(id, port).unwrap());
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert!(is_closed(&forward(9)), "nobody is there who would answer");
    let _machine = network.plug(id).unwrap();
    TcpStream::connect(network.interface(id).unwrap().forwards[&9]).expect("it is listened at");
}

#[test]
fn who_gets_an_address_next_goes_on_with_nothing() {
    let network = network();
    let vpc = network.default_vpc().unwrap();
    let group = network.create_security_group(vpc, "ssh", "").unwrap();
    let rule = Rule::tcp(22, "172.31.0.0/16".parse().unwrap());
    let rule = network.authorize(group.id, Direction::Ingress, rule).unwrap();
    let server = network.create_interface(network.interface_spec().unwrap().groups([group.id])).unwrap();
    let mut serves = Guest::boot(network.plug(server.id).unwrap());
    let first = open_interface(&network);
    let mut asks = Guest::boot(network.plug(first.id).unwrap());
    let (listener, connection) = (serves.listen(22), asks.begin_connecting(server.private_ip, 22));
    together(PATIENCE, &mut [&mut asks, &mut serves], |guests| {
        (guests[1].tcp(listener).state() == tcp::State::Established).then_some(())
    })
    .unwrap();
    network.revoke(group.id, rule).unwrap();
    let remembered = network.tracked_conversations(server.id);
    assert!(remembered > 0);
    asks.tcp(connection).abort();
    network.unplug(first.id);
    network.delete_interface(first.id).unwrap();
    assert_eq!(network.tracked_conversations(server.id), 0);
}
