//! Frames as a guest writes them byte by byte.
#![allow(dead_code, reason = "each test program uses a part")]

use std::net::Ipv4Addr;

use instance_core::net::MacAddress;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, TcpPacket, TcpSeqNumber, UdpPacket};

/// The subnets' router.
pub(crate) const ROUTER: MacAddress = MacAddress([0x0a, 0, 0, 0, 0, 1]);

/// From where to where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    pub(crate) macs: [MacAddress; 2],
    pub(crate) addresses: [Ipv4Addr; 2],
}

/// A frame with a whole packet.
fn packet(way: Way, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let [from, to] = way.macs;
    let mut frame = [&to.0[..], &from.0, &[8, 0], &[0; 20], payload].concat();
    let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_version(4);
    ip.set_header_len(20);
    ip.set_total_len((20 + payload.len()) as u16);
    ip.set_hop_limit(64);
    ip.set_next_header(protocol);
    ip.set_src_addr(way.addresses[0]);
    ip.set_dst_addr(way.addresses[1]);
    ip.fill_checksum();
    frame
}

/// The question which hardware address another has.
pub(crate) fn who_has(mac: MacAddress, own: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
    let kind = [0, 1, 8, 0, 6, 4, 0, 1];
    [&[0xff; 6][..], &mac.0, &[8, 6], &kind, &mac.0, &own.octets(), &[0; 6], &wanted.octets()].concat()
}

/// A datagram of UDP.
pub(crate) fn datagram(way: Way, ports: [u16; 2], text: &[u8]) -> Vec<u8> {
    let mut datagram = [&[0; 8], text].concat();
    let mut udp = UdpPacket::new_unchecked(&mut datagram[..]);
    udp.set_src_port(ports[0]);
    udp.set_dst_port(ports[1]);
    udp.set_len((8 + text.len()) as u16);
    udp.fill_checksum(&way.addresses[0].into(), &way.addresses[1].into());
    packet(way, IpProtocol::Udp, &datagram)
}

/// A segment of TCP in the midst of a conversation, which acknowledges this.
pub(crate) fn segment(way: Way, ports: [u16; 2], acknowledged: i32) -> Vec<u8> {
    let mut segment = [0; 20];
    let mut tcp = TcpPacket::new_unchecked(&mut segment[..]);
    tcp.set_src_port(ports[0]);
    tcp.set_dst_port(ports[1]);
    tcp.set_header_len(20);
    tcp.set_ack(true);
    tcp.set_ack_number(TcpSeqNumber(acknowledged));
    tcp.set_window_len(1000);
    tcp.fill_checksum(&way.addresses[0].into(), &way.addresses[1].into());
    packet(way, IpProtocol::Tcp, &segment)
}

/// Whether a frame says to a port from another that there is no such conversation. None of other frames.
pub(crate) fn is_reset(frame: &[u8], ports: [u16; 2]) -> Option<bool> {
    let ip =
        Ipv4Packet::new_checked(frame.get(14..)?).ok().filter(|ip| ip.next_header() == IpProtocol::Tcp)?;
    let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
    ([tcp.dst_port(), tcp.src_port()] == ports).then(|| tcp.rst())
}

/// A ping.
pub(crate) fn ping(way: Way, ident: u16, seq_no: u16, data: &[u8]) -> Vec<u8> {
    let request = Icmpv4Repr::EchoRequest { ident, seq_no, data };
    let mut message = vec![0; request.buffer_len()];
    request.emit(&mut Icmpv4Packet::new_unchecked(&mut message), &ChecksumCapabilities::default());
    packet(way, IpProtocol::Icmp, &message)
}

/// The answer to a ping, if the frame is one: from where, its number, which it is, and what comes back.
pub(crate) fn pong(frame: &[u8]) -> Option<(Ipv4Addr, u16, u16, Vec<u8>)> {
    let ip = Ipv4Packet::new_checked(frame.get(14..)?).ok().filter(|ip| ip.verify_checksum())?;
    let message = Icmpv4Packet::new_checked(ip.payload()).ok()?;
    match Icmpv4Repr::parse(&message, &ChecksumCapabilities::default()).ok()? {
        Icmpv4Repr::EchoReply { ident, seq_no, data } if ip.next_header() == IpProtocol::Icmp => {
            Some((ip.src_addr(), ident, seq_no, data.to_vec()))
        }
        _ => None,
    }
}
