//! Conversations over TCP with the world outside, where much is said and frames are lost or taken slowly.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use common::packets::{Way, datagram, ping};
use common::setup::{by_stream, open_interface, opened, options, own_address};
use common::{Guest, PATIENCE, ROOM, SILENCE, assert_reaches};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use instance_core::net::{self, Frame, FrameStream, MacAddress, NetPort, Offloads};
use network_vpc::{ErrorKind, NetworkInterface};
use smoltcp::wire::{IpProtocol, Ipv4Packet, TcpPacket};

/// The router's address, as guests see it.
const ROUTER: [u8; 6] = [0x0a, 0, 0, 0, 0, 1];

/// What a server says to whoever connects, and then hears, again and again. Gives its port.
fn says(own: Ipv4Addr, text: Vec<u8>) -> u16 {
    let server = TcpListener::bind((own, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((mut client, _)) = server.accept() {
            let text = text.clone();
            thread::spawn(move || {
                let mut heard = vec![0; text.len()];
                client.write_all(&text)?;
                client.read_exact(&mut heard)?;
                client.write_all(if heard == text { b"." } else { b"!" })
            });
        }
    });
    port
}

/// A segment by which a guest begins a conversation.
fn syn((mac, from): (MacAddress, Ipv4Addr), to: Ipv4Addr, source: u16, destination: u16) -> Frame {
    let mut frame = vec![0; 54];
    frame[..6].copy_from_slice(&ROUTER);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..14].copy_from_slice(&[8, 0]);
    let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_version(4);
    ip.set_header_len(20);
    ip.set_total_len(40);
    ip.set_hop_limit(64);
    ip.set_next_header(IpProtocol::Tcp);
    ip.set_src_addr(from);
    ip.set_dst_addr(to);
    ip.fill_checksum();
    let mut tcp = TcpPacket::new_unchecked(ip.payload_mut());
    tcp.set_src_port(source);
    tcp.set_dst_port(destination);
    tcp.set_header_len(20);
    tcp.set_syn(true);
    tcp.set_window_len(1000);
    tcp.fill_checksum(&from.into(), &to.into());
    Frame::new(frame)
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 3 + n / 251) as u8).collect()
}

#[test]
fn a_guest_whose_word_of_room_is_lost_is_asked_again() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let interface = open_interface(&network);
    let mut guest = Guest::boot(network.plug(interface.id).unwrap());
    let text = text(400_000);
    let port = says(own, text.clone());
    let connection = guest.connect(PATIENCE, own, port).unwrap();
    // It hears nothing until it has no room, and what it says of having some again is lost.
    guest.until(|guest| (guest.tcp(connection).recv_queue() == ROOM).then_some(())).unwrap();
    guest.within(SILENCE, |_| None::<()>);
    guest.cut_off(true);
    let mut heard = Vec::new();
    guest.tcp(connection).recv(|bytes| (bytes.len(), heard.extend(&*bytes))).unwrap();
    guest.work();
    guest.cut_off(false);
    heard.extend(guest.hear(connection, text.len() - heard.len()));
    assert!(heard == text);
}

/// Many conversations at once, each way as much as the cable holds, with a guest that takes its frames in bites: queues
/// fill and empty all the time, and nothing may be waited for that has been told already.
fn much_is_said(takes: Offloads, bite: usize, is_by_stream: bool) -> Option<usize> {
    const CONVERSATIONS: usize = 60;
    let own = own_address()?;
    let network = opened(options().reach_host(true));
    let mut spec = network.plug(open_interface(&network).id).unwrap();
    let mut streams = None;
    if is_by_stream {
        let (there, plugged) = by_stream(spec);
        (spec, streams) = (there, Some(plugged));
    }
    let mut guest = Guest::taking(takes, spec);
    guest.ask_for_address();
    guest.bite = bite;
    let text = text(120_000);
    let port = says(own, text.clone());
    let connections: Vec<_> =
        (0..CONVERSATIONS).map(|_| guest.connect(PATIENCE, own, port).unwrap()).collect();
    let mut progress = vec![(0, Vec::<u8>::new()); CONVERSATIONS];
    let done = guest.until(|guest| {
        for (connection, (said, heard)) in connections.iter().zip(&mut progress) {
            let socket = guest.tcp(*connection);
            *said += socket.send_slice(&text[*said..]).unwrap();
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), heard.extend(&*bytes))).unwrap();
            }
        }
        progress.iter().all(|(_, heard)| heard.len() > text.len()).then_some(())
    });
    let lengths: Vec<_> = progress.iter().map(|(said, heard)| (*said, heard.len())).collect();
    assert!(done.is_some(), "it stands still at {lengths:?}");
    assert!(progress.iter().all(|(_, heard)| heard[..text.len()] == text && heard[text.len()..] == *b"."));
    drop(streams);
    Some(guest.long_frames)
}

#[test]
fn nothing_stands_still_where_frames_are_taken_in_bites() {
    for (bite, is_by_stream) in [(1, false), (7, false), (300, false), (7, true), (300, true)] {
        let long_frames = much_is_said(Offloads::NONE, bite, is_by_stream);
        assert_eq!(long_frames.unwrap_or(0), 0, "longer than its packets");
    }
}

#[test]
fn machines_behind_streams_reach_each_other_and_what_has_no_stream() {
    let network = opened(options());
    let interfaces = [0, 1, 2].map(|_| open_interface(&network));
    let [one, other, without] = interfaces.clone().map(|interface| network.plug(interface.id).unwrap());
    let ((one, plugged_one), (other, plugged_other)) = (by_stream(one), by_stream(other));
    let mut guests = [one, other, without].map(Guest::boot);
    let [one, other, without] = &mut guests;
    assert_reaches(one, other, 80);
    assert_reaches(other, one, 80);
    assert_reaches(one, without, 80);
    assert_reaches(without, one, 80);
    // One of them is unplugged by itself, the other by the network.
    let [ours, theirs] = plugged_one;
    assert_eq!(network.plug(interfaces[0].id).map_err(|e| e.kind()).err(), Some(ErrorKind::InterfaceInUse));
    drop(ours);
    assert!(network.plug(interfaces[0].id).is_ok());
    network.unplug(interfaces[1].id);
    for guest in &mut guests[..2] {
        guest.until(|guest| (!guest.port.is_connected()).then_some(())).unwrap();
    }
    drop((theirs, plugged_other));
}

#[test]
fn a_machine_that_sends_what_is_no_frame_loses_its_port() {
    let network = opened(options());
    let interface = open_interface(&network);
    for says in [&[0xff; 4][..], &[0, 0, 0, 60, 1]] {
        let spec = network.plug(interface.id).unwrap();
        let (mut machine, socket) = UnixStream::pair().unwrap();
        let _stream = FrameStream::plug(socket, &spec, "stream").unwrap();
        drop(spec);
        machine.write_all(says).unwrap();
        machine.shutdown(Shutdown::Write).unwrap();
        assert_eq!(machine.read(&mut [0; 1]).unwrap_or(0), 0);
        let begun = Instant::now();
        // The last to be told is who plugs in again.
        while let Err(error) = network.plug(interface.id) {
            assert!(error.kind() == ErrorKind::InterfaceInUse && begun.elapsed() < PATIENCE);
        }
        network.unplug(interface.id);
    }
}

#[test]
fn a_guest_that_takes_long_frames_gets_them_whole() {
    if let Some(long_frames) = much_is_said(Offloads::ALL, 20, false) {
        assert!(long_frames > 60, "{long_frames} were long");
    }
}

/// More waits for it than its queues hold; it takes all of that at once, and says nothing.
#[test]
fn what_waits_for_a_guest_comes_when_it_has_room() {
    const CONVERSATIONS: usize = 40;
    const MUCH: usize = 60_000;
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let mut guest = Guest::boot(network.plug(open_interface(&network).id).unwrap());
    let server = TcpListener::bind((own, 0)).unwrap();
    let mut hosts = Vec::new();
    for _ in 0..CONVERSATIONS {
        guest.connect(PATIENCE, own, server.local_addr().unwrap().port()).unwrap();
        hosts.push(server.accept().unwrap().0);
    }
    guest.work();
    let (wake, woken) = channel();
    guest.port.set_waker(Some(Arc::new(move || _ = wake.send(()))));
    hosts.iter_mut().for_each(|host| host.write_all(&text(MUCH)).unwrap());
    // As many as the cable holds.
    let begun = Instant::now();
    while guest.port.waiting() < net::FRAMES_KEPT {
        assert!(begun.elapsed() < PATIENCE, "{} wait", guest.port.waiting());
        thread::yield_now();
    }
    let mut heard = 0;
    while heard < CONVERSATIONS * MUCH {
        match guest.port.recv() {
            Some(frame) => heard += frame.data.len().saturating_sub(14 + 40),
            None => woken.recv_timeout(SILENCE * 2).unwrap_or_else(|_| panic!("only {heard} bytes came")),
        }
    }
}

#[test]
fn guests_share_the_sockets_of_the_host() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true).sockets(12));
    let [mut greedy, mut other] =
        [0, 1].map(|_| Guest::boot(network.plug(open_interface(&network).id).unwrap()));
    let port = says(own, text(1));
    let connected = |guest: &mut Guest, count: usize| {
        (0..count).filter_map(|_| guest.connect(PATIENCE, own, port)).collect::<Vec<_>>()
    };
    let first = connected(&mut greedy, 8);
    assert_eq!((first.len(), network.open_sockets()), (6, 6), "more are refused");
    let socket = UdpSocket::bind((own, 0)).unwrap();
    let at = socket.local_addr().unwrap().port();
    let echo = thread::spawn(move || {
        let mut bytes = [0; 100];
        while let Ok((len, from)) = socket.recv_from(&mut bytes) {
            socket.send_to(&bytes[..len], from)?;
        }
        std::io::Result::Ok(())
    });
    // A datagram's conversation takes one as well, and makes room for the next.
    for _ in 0..5 {
        assert_eq!(other.ask(own, at, b"hello").as_deref(), Some(&b"hello"[..]));
    }
    assert_eq!(network.open_sockets(), 9);
    assert!(!echo.is_finished());
    for connection in first {
        greedy.tcp(connection).abort();
    }
    greedy.until(|_| (network.open_sockets() == 3).then_some(())).unwrap();
    assert_eq!(connected(&mut greedy, 1).len(), 1, "what was given back is there again");
    network.unplug(network.interfaces()[0].id);
    network.unplug(network.interfaces()[1].id);
    assert_eq!(network.open_sockets(), 0);
}

#[test]
fn a_guest_that_floods_takes_no_neighbours_share_of_the_edge() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let [flooding, quiet] = [0, 1].map(|_| open_interface(&network));
    let flood = network.plug(flooding.id).unwrap();
    let mut guest = Guest::boot(network.plug(quiet.id).unwrap());
    let port = says(own, text(1));
    let (over, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let sender = {
        let (over, sent, from) = (over.clone(), sent.clone(), (flooding.mac, flooding.private_ip));
        thread::spawn(move || {
            // Beginnings of conversations with services and with the world, each another.
            while !over.load(Ordering::Relaxed) {
                let n = sent.fetch_add(1, Ordering::Relaxed);
                let to = [Ipv4Addr::new(169, 254, 169, 254), own][(n % 2) as usize];
                let _ = flood.port.send(syn(from, to, (n % 60_000) as u16 + 1, port));
                while flood.port.recv().is_some() {}
            }
        })
    };
    let mut connections = 0;
    while connections < 20 || sent.load(Ordering::Relaxed) < 20_000 {
        let connection = guest.connect(PATIENCE, own, port).unwrap();
        assert_eq!(guest.hear(connection, 1), text(1));
        guest.tcp(connection).abort();
        guest.work();
        connections += 1;
    }
    over.store(true, Ordering::Relaxed);
    sender.join().unwrap();
}

/// It takes nothing while another floods it, and then all that has waited.
#[test]
fn a_guest_that_is_flooded_has_its_answers_of_the_network() {
    let Some(own) = own_address() else { return };
    let network = opened(options().reach_host(true));
    let [flooding, flooded] = [0, 1].map(|_| open_interface(&network));
    let [flood, port] = [&flooding, &flooded].map(|interface| network.plug(interface.id).unwrap().port);
    let resolver = Ipv4Addr::new(172, 31, 0, 2);
    let router = Ipv4Addr::new(172, 31, 0, 1);
    let way = |to| Way { macs: [flooded.mac, MacAddress(ROUTER)], addresses: [flooded.private_ip, to] };
    let much = |count: usize| {
        let way =
            Way { macs: [flooding.mac, flooded.mac], addresses: [flooding.private_ip, flooded.private_ip] };
        (0..count).for_each(|_| _ = flood.send(Frame::new(datagram(way, [4000, 9], b"flood"))));
    };
    much(10_000);
    // A question of which the network knows the answer, pings of the router, and the beginning of a conversation with a service.
    let mut question = Message::new();
    let name = format!("{}.eu-west-1.compute.internal.", flooded.private_host_name());
    question.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    port.send(Frame::new(datagram(way(resolver), [5000, 53], &question.to_vec().unwrap()))).unwrap();
    port.send(Frame::new(ping(way(router), 7, 3, b"there?"))).unwrap();
    port.send(syn((flooded.mac, flooded.private_ip), Ipv4Addr::new(169, 254, 169, 254), 6000, 80)).unwrap();
    // The edge has done all that when it sends what comes behind it.
    let host = UdpSocket::bind((own, 0)).unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    let at = host.local_addr().unwrap().port();
    port.send(Frame::new(datagram(way(own), [7000, at], b"hello"))).unwrap();
    let (_, guest) = host.recv_from(&mut [0; 10]).unwrap();
    host.send_to(b"welcome", guest).unwrap();
    much(1000);
    let (mut heard, begun) = (BTreeSet::new(), Instant::now());
    while !heard.contains(&(own, 17)) && begun.elapsed() < PATIENCE {
        while let Some(frame) = port.recv() {
            let ip = Ipv4Packet::new_checked(&frame.data[14..]).unwrap();
            if ip.src_addr() != flooding.private_ip {
                heard.insert((ip.src_addr(), u8::from(ip.next_header())));
            }
        }
        std::thread::yield_now();
    }
    let metadata = Ipv4Addr::new(169, 254, 169, 254);
    assert_eq!(heard, BTreeSet::from([(resolver, 17), (router, 1), (metadata, 6), (own, 17)]));
}

/// The receiver takes nothing while two send to it, and then all that has waited.
#[test]
fn a_guest_that_floods_another_takes_no_neighbours_share_of_it() {
    let network = opened(options());
    let [flooding, quiet, receiving] = [0, 1, 2].map(|_| open_interface(&network));
    let [flood, other, receiver] =
        [&flooding, &quiet, &receiving].map(|interface| network.plug(interface.id).unwrap().port);
    let send = |port: &NetPort, from: &NetworkInterface, text: &[u8]| {
        let way = Way { macs: [from.mac, receiving.mac], addresses: [from.private_ip, receiving.private_ip] };
        // What it has no room for is lost, as on any network.
        let _ = port.send(Frame::new(datagram(way, [4000, 9], text)));
    };
    const MANY: usize = 10_000;
    (0..MANY).for_each(|_| send(&flood, &flooding, b"flood"));
    (0..3).for_each(|n| send(&other, &quiet, &[n]));
    (0..MANY).for_each(|_| send(&flood, &flooding, b"flood"));
    let come: Vec<_> =
        std::iter::from_fn(|| receiver.recv()).map(|frame| frame.data[42..].to_vec()).collect();
    let heard: Vec<_> = come.iter().filter(|text| text.len() == 1).map(|text| text[0]).collect();
    assert_eq!(heard, [0, 1, 2], "of {}", come.len());
    assert!(come.len() < MANY, "the flood was more than there is room for");
}
