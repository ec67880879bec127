//! What guests and strangers can reach, as functions of bytes: the bodies of fuzz targets in `fuzz/`, and of tests.
//! Each checks more than that nothing panics. Not part of the public interface.

mod conntrack;
mod firewall;
mod known;

use std::net::Ipv4Addr;
use std::sync::Arc;

use hickory_proto::op::Message;
use instance_core::HttpTokens;
use instance_core::console::Console;
use instance_core::net::{Checksum, Frame, MacAddress, Offloads, Protocol, Segmentation};

use smoltcp::wire::{EthernetProtocol, Ipv4Packet};

pub use self::conntrack::conntrack;
pub use self::firewall::firewall;
use crate::firewall::{Conntrack, Members, Peer, Policy, Rule};
use crate::fragments::{self, Fragments};
use crate::metadata::{Metadata, Secret, Session, Told};
use crate::packet::{ETHERNET_LEN, Flow, TcpFlags, Transport};
use crate::routing::{Hop, Routes};
use crate::switch::{self, Giver, ROUTER_MAC, Verdict, View};
use crate::{answer, dns};

const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 12);
const MAC: MacAddress = MacAddress([6, 0, 0, 0, 0, 9]);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 7);
const PEER_MAC: MacAddress = MacAddress([6, 0, 0, 0, 0, 7]);

/// An interface that may send everything. None only where a constant is none.
pub(crate) fn view() -> Option<View> {
    let everything = Rule::all(Peer::Cidr(ipnet::Ipv4Net::default()));
    let none = std::iter::empty();
    Some(View {
        interface: "eni-0123456789abcdef0".parse().ok()?,
        vpc: "vpc-0123456789abcdef0".parse().ok()?,
        vpc_cidr: "10.0.0.0/16".parse().ok()?,
        subnet_id: "subnet-0123456789abcdef0".parse().ok()?,
        subnet: "10.0.0.0/24".parse().ok()?,
        mac: MAC,
        address: OWN,
        secondary: Vec::new(),
        public: Vec::new(),
        routes: Routes::new([(ipnet::Ipv4Net::default(), Some(Hop::Out))]),
        dhcp: crate::DhcpSettings::default(),
        source_dest_check: true,
        mtu: 1500,
        host_name: dns::host_name(OWN),
        domain: "ec2.internal".to_owned(),
        region: "us-east-1".to_owned(),
        zone: "us-east-1a".to_owned(),
        groups: vec![("sg-0123456789abcdef0".parse().ok()?, "web".to_owned())],
        policy: Policy::new(none, [&everything], |_| Members::default()),
    })
}

/// A guest that sends a frame of its own making. What leaves its interface is from its own addresses, and what
/// is answered is a sound answer to it.
pub fn switch(bytes: &[u8]) {
    let (Some(view), Some((marks, data))) = (view(), bytes.split_first_chunk::<8>()) else { return };
    let mut frame = Frame::new(data.to_vec());
    let [how, start, offset, size, header, ..] = *marks;
    if how & 1 != 0 {
        frame.checksum = Checksum::Partial { start: start.into(), offset: offset.into() };
    }
    if how & 2 != 0 {
        let (size, header_len) = (size.into(), header.into());
        frame.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size, header_len });
    }
    for frame in frame.clone().finish(Offloads::NONE) {
        assert!(frame.is_sound() && frame.is_taken_by(Offloads::NONE));
        assert!(frame.data.len() <= data.len(), "a segment is longer than the whole");
    }
    if !frame.is_sound() || frame.data.len() < ETHERNET_LEN {
        return;
    }
    let peers = |address| (address == PEER).then_some(PEER_MAC);
    let mut table = Conntrack::new(100);
    let decided = Flow::parse(&frame.data[ETHERNET_LEN..]);
    match switch::decide(&view, &peers, &mut table, frame, 0) {
        Verdict::Drop => {}
        Verdict::Reply(answer) => {
            assert_eq!(answer[..6], MAC.0, "an answer is the sender's");
            assert!(answer.len() <= 1514 || answer.len() <= data.len());
        }
        Verdict::Local(to, frame) => {
            assert!(to == PEER && frame.data[..6] == PEER_MAC.0 && frame.data[6..12] == ROUTER_MAC.0);
            let flow = Flow::parse(&frame.data[ETHERNET_LEN..]);
            assert!(flow.is_some_and(|flow| flow.source == OWN && flow.destination == PEER));
            for frame in frame.clone().finish(Offloads::NONE) {
                let arrives = Flow::parse(&frame.data[ETHERNET_LEN..]);
                assert_eq!(arrives.map(ports), decided.map(ports), "what arrives is what was decided about");
            }
            let _ = switch::admit(&view, Giver::Peer(&view), &mut table, &frame.data, 0);
        }
        Verdict::Edge(frame) => {
            let flow = Flow::parse(&frame.data[ETHERNET_LEN..]);
            let leaves = |flow: Flow| {
                let to = flow.destination;
                flow.source == OWN && (view.is_resolver(to) || !view.vpc_cidr.contains(&to))
            };
            assert!(flow.is_some_and(leaves));
        }
    }
    let _ = switch::admit(&view, Giver::Edge, &mut table, data, 0);
}

/// What of a packet rules decide by; of a segment also whether a conversation begins with it.
fn ports(flow: Flow) -> (Ipv4Addr, Ipv4Addr, Transport) {
    let transport = match flow.transport {
        Transport::Tcp { source, destination, flags } => {
            let flags = TcpFlags { syn: flags.syn, ack: flags.ack, rst: flags.rst, ..TcpFlags::default() };
            Transport::Tcp { source, destination, flags }
        }
        other => other,
    };
    (flow.source, flow.destination, transport)
}

/// A guest that speaks TCP with the world outside. What is heard of it is what it said.
pub fn segments(bytes: &[u8]) {
    let Some(view) = view() else { return };
    crate::edge::fuzzing::segments(&view, bytes);
}

/// A guest that asks the DHCP server. It gets its own address or a refusal.
pub fn dhcp(bytes: &[u8]) {
    let Some(view) = view() else { return };
    // As the payload of a datagram, which is how it comes.
    let asked = answer::udp_frame(&view, (Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67), bytes);
    if let Some(answer) = answer::dhcp(&view, &asked[ETHERNET_LEN..]) {
        const YOUR_ADDRESS: usize = ETHERNET_LEN + 20 + 8 + 16;
        let given = &answer[YOUR_ADDRESS..YOUR_ADDRESS + 4];
        assert!(given == OWN.octets() || given == [0; 4], "another's address is given: {given:?}");
        assert_eq!(answer[..6], MAC.0);
    }
}

/// A guest that asks the resolver. What it answers by itself is an answer to the question.
pub fn dns(bytes: &[u8]) {
    let Some(view) = view() else { return };
    if let Some(answer) = dns::answer(&view, bytes) {
        let answer = Message::from_vec(&answer);
        assert!(answer.is_ok_and(|answer| answer.id().to_be_bytes() == bytes[..2]));
    }
}

/// A guest that asks the resolver over TCP.
pub fn dns_stream(bytes: &[u8]) {
    let Some(view) = view() else { return };
    crate::edge::fuzzing::names(&view, bytes);
}

/// A guest that talks to the metadata service and has no token: it is told nothing of the instance.
pub fn metadata(bytes: &[u8]) {
    const SECRET: &[u8] = b"nobody is told this";
    let (Some(view), Ok(id), Ok(secret)) = (view(), "i-0123456789abcdef0".parse(), Secret::random()) else {
        return;
    };
    let mut metadata = Metadata::new(id);
    metadata.options.http_tokens = HttpTokens::Required;
    metadata.user_data = Some(SECRET.to_vec());
    let told = Told { view: Arc::new(view), metadata: Some(Arc::new(metadata)), secret, now: 0 };
    let mut session = Session::default();
    let (cut, bytes) = bytes.split_first().map_or((1, bytes), |(cut, rest)| (usize::from(*cut) + 1, rest));
    for piece in bytes.chunks(cut) {
        session.hear(piece, || told.clone());
        let answer = session.answer();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "));
        assert!(!answer.windows(SECRET.len()).any(|window| window == SECRET), "without a token");
        session.said(answer.len());
    }
}

/// A guest that sends fragments: of three packets whose every byte tells where it belongs, and of its own making. What
/// is put together is right to the last byte, and what waits is bounded.
pub fn fragments(bytes: &[u8]) {
    let byte_at = |at: usize| (at * 7) as u8;
    let mut waiting = Fragments::default();
    for mark in bytes.chunks_exact(4) {
        let [id, begin, len, last] = [mark[0] % 3, mark[1], mark[2], mark[3] & 1].map(usize::from);
        let begin = begin * 8;
        let payload: Vec<u8> = (begin..begin + len).map(byte_at).collect();
        let mut frame = answer::ethernet(PEER_MAC, MAC, EthernetProtocol::Ipv4, 20 + len);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_LEN..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len((20 + len) as u16);
        ip.set_ident(id as u16);
        ip.set_more_frags(last == 0);
        ip.set_frag_offset(begin as u16);
        ip.payload_mut().copy_from_slice(&payload);
        if let Some(whole) = waiting.take(&Frame::new(frame), 0) {
            assert!(!fragments::is_fragment(&whole.data));
            let packet = Ipv4Packet::new_checked(&whole.data[ETHERNET_LEN..]).ok();
            let right = packet.is_some_and(|packet| {
                packet.verify_checksum()
                    && packet.payload().iter().enumerate().all(|(at, byte)| *byte == byte_at(at))
            });
            assert!(right, "what was put together is wrong");
            let pieces = fragments::cut(whole.clone(), 576);
            let mut again = Fragments::default();
            let back = pieces.iter().rev().filter_map(|piece| again.take(piece, 0)).next();
            assert!(pieces == [whole.clone()] || back == Some(whole));
        }
        waiting.check();
    }
    let frame = Frame::new(bytes.to_vec());
    if frame.is_sound() && fragments::is_fragment(&frame.data) {
        let _ = waiting.take(&frame, 1);
        waiting.check();
    }
}

/// A guest that writes to its console. What is taken for its host keys are keys, one a line and few, and the same however
/// it comes.
pub fn host_keys(bytes: &[u8]) {
    let heard = |size| {
        let console = Console::new();
        bytes.chunks(size).for_each(|piece| console.port().write_output(piece));
        console.host_keys()
    };
    let keys = heard(bytes.len().max(1));
    assert!(keys.len() <= 16);
    assert!(keys == heard(1) && keys == heard(7), "{keys:?}");
    for key in keys {
        assert!(!key.contains(['\n', '\r']) && ssh_key::PublicKey::from_openssh(&key).is_ok(), "{key:?}");
    }
}

#[cfg(test)]
mod tests {
    /// Every seed and what is left of it when it is cut short, through every body.
    #[test]
    fn the_bodies_hold_on_the_seeds() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds");
        for target in [
            "vpc_conntrack",
            "vpc_firewall",
            "vpc_switch",
            "vpc_dhcp",
            "vpc_dns",
            "vpc_dns_stream",
            "vpc_metadata",
            "vpc_fragments",
            "vpc_host_keys",
            "vpc_segments",
        ] {
            let mut count = 0;
            for seed in std::fs::read_dir(format!("{seeds}/{target}")).unwrap() {
                let bytes = std::fs::read(seed.unwrap().path()).unwrap();
                for len in (0..=bytes.len()).step_by(8).chain([bytes.len()]) {
                    super::conntrack(&bytes[..len]);
                    super::firewall(&bytes[..len]);
                    super::switch(&bytes[..len]);
                    super::dhcp(&bytes[..len]);
                    super::dns(&bytes[..len]);
                    super::dns_stream(&bytes[..len]);
                    super::metadata(&bytes[..len]);
                    super::fragments(&bytes[..len]);
                    super::host_keys(&bytes[..len]);
                    super::segments(&bytes[..len]);
                }
                count += 1;
            }
            assert!(count >= 3, "{count} seeds of {target}");
        }
    }
}
