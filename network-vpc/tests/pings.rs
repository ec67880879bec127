//! Pings: of the router, of neighbours, and of the world outside.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::net::Ipv4Addr;
use std::time::Instant;

use common::packets::{ROUTER, Way, ping, pong};
use common::setup::{anywhere, boot, interface, network, opened, options, own_address};
use common::{PATIENCE, SILENCE, together};
use instance_core::net::{Frame, NetPort};
use network_vpc::{NetworkInterface, Rule};
use smoltcp::wire::Ipv4Packet;
use socket2::{Domain, Protocol, Socket, Type};

/// The answers that come to a port until there are so many, or for a while if there are to be none.
fn pongs(port: &NetPort, count: usize) -> Vec<(Ipv4Addr, u16, u16, Vec<u8>)> {
    let deadline = Instant::now() + if count == 0 { SILENCE } else { PATIENCE };
    let mut heard = Vec::new();
    while Instant::now() < deadline && (count == 0 || heard.len() < count) {
        match port.recv() {
            Some(frame) => heard.extend(pong(&frame.data)),
            // Nothing tells a test that holds the port itself.
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
    heard
}

fn send(port: &NetPort, from: &NetworkInterface, to: Ipv4Addr, (id, seq): (u16, u16), data: &[u8]) {
    let way = Way { macs: [from.mac, ROUTER], addresses: [from.private_ip, to] };
    port.send(Frame::new(ping(way, id, seq, data))).unwrap();
}

#[test]
fn the_router_answers() {
    let network = network();
    let here = interface(&network, "a", &[]);
    let port = network.plug(here.id).unwrap().port;
    let router = Ipv4Addr::new(172, 31, 0, 1);
    send(&port, &here, router, (7, 3), b"are you there?");
    assert_eq!(pongs(&port, 1), [(router, 7, 3, b"are you there?".to_vec())]);
}

/// A frame of the guest's may be longer than the packets that it takes: what leaves cutting to others.
#[test]
fn the_router_answers_long_pings_in_fragments() {
    let network = network();
    let here = interface(&network, "a", &[]);
    let port = network.plug(here.id).unwrap().port;
    let data: Vec<u8> = (0..4000).map(|n| (n / 7) as u8).collect();
    send(&port, &here, Ipv4Addr::new(172, 31, 0, 1), (7, 3), &data);
    let mut whole = vec![0; 8 + data.len()];
    let mut count = 0;
    while let Some(frame) = port.recv() {
        assert!(frame.data.len() <= 1514, "longer than the guest takes");
        let ip = Ipv4Packet::new_checked(&frame.data[14..]).unwrap();
        let at = usize::from(ip.frag_offset());
        assert!(ip.verify_checksum() && ip.more_frags() == (at + ip.payload().len() < whole.len()));
        whole[at..at + ip.payload().len()].copy_from_slice(ip.payload());
        count += 1;
    }
    assert!(count == 3 && whole[8..] == data, "{count} fragments");
}

#[test]
fn a_neighbour_is_asked_whose_groups_allow_it() {
    let network = network();
    let (here, guest) = boot(&network, "a", &[]);
    let (open, mut answers) = boot(&network, "open", &[Rule::ping(anywhere())]);
    let (shut, mut hears) = boot(&network, "shut", &[Rule::tcp(80, anywhere())]);
    for (there, neighbour, expect) in [(&open, &mut answers, true), (&shut, &mut hears, false)] {
        // The first answer is lost where its sender has yet to ask who has the address.
        let patience = if expect { PATIENCE } else { SILENCE };
        let answered = together(patience, &mut [neighbour], |_| {
            send(&guest.port, &here, there.private_ip, (9, 1), b"hello");
            let answer = guest.port.recv().and_then(|frame| pong(&frame.data))?;
            (answer.0 == there.private_ip).then_some(answer)
        });
        assert_eq!(answered.map(|pong| pong.0), expect.then_some(there.private_ip));
    }
}

/// By sockets of the host's, each with the guest's own number whatever number the host's kernel gives it.
#[test]
fn the_world_outside_answers() {
    let Some(own) = own_address() else { return };
    if let Err(error) = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)) {
        // A setting of the host's, not something to be installed; `.ci/run` opens it where it may.
        let setting = "net.ipv4.ping_group_range";
        return eprintln!("SKIPPED: this host lets the test send no pings ({setting}): {error}");
    }
    let network = opened(options().reach_host(true));
    let [here, other] = ["a", "b"].map(|name| interface(&network, name, &[]));
    let [port, of_other] = [&here, &other].map(|i| network.plug(i.id).unwrap().port);
    // Of two guests, and two numbers of one guest, all under way together.
    let long = vec![7; 1400];
    send(&port, &here, own, (100, 1), b"first");
    send(&port, &here, own, (100, 2), &long);
    send(&port, &here, own, (200, 1), b"another");
    send(&of_other, &other, own, (100, 1), b"of another guest");
    let mut heard = pongs(&port, 3);
    heard.sort();
    let expect = [(100, 1, b"first".to_vec()), (100, 2, long), (200, 1, b"another".to_vec())];
    assert_eq!(heard, expect.map(|(id, seq, data)| (own, id, seq, data)));
    assert_eq!(pongs(&of_other, 1), [(own, 100, 1, b"of another guest".to_vec())]);
    assert_eq!(network.open_sockets(), 3);

    // The host is no part of the world outside unless that is allowed, nor is what no packet goes to.
    for to in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(169, 254, 1, 1), Ipv4Addr::BROADCAST] {
        send(&port, &here, to, (300, 1), b"");
    }
    assert_eq!(pongs(&port, 0), []);
    let shut = common::setup::network();
    let there = interface(&shut, "a", &[]);
    let port = shut.plug(there.id).unwrap().port;
    send(&port, &there, own, (1, 1), b"");
    assert_eq!(pongs(&port, 0), []);
    assert_eq!(shut.open_sockets(), 0);
}
