//! What the network answers by itself: ARP (RFC 826), DHCP (RFC 2131) and pings to the router.

use std::net::Ipv4Addr;

use instance_core::net::MacAddress;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress,
    EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet,
    Ipv4Repr, UdpPacket, UdpRepr,
};

use crate::packet::ETHERNET_LEN;
use crate::switch::{LOCAL_CLIENT, METADATA, Peers, ROUTER_MAC, View};

#[cfg(test)]
mod tests;

/// For how long an address is lent, in seconds. It stays the same; the client only asks again.
const LEASE: u32 = 3600;

/// DHCP's options that `smoltcp` has no field for (RFC 2132).
const DNS_SERVERS: u8 = 6;
const HOST_NAME: u8 = 12;
const DOMAIN: u8 = 15;
const MTU: u8 = 26;
const NTP_SERVERS: u8 = 42;
const NETBIOS_SERVERS: u8 = 44;
const NETBIOS_NODE_TYPE: u8 = 46;

/// The answer to a request for the hardware address of the router, of a peer in the subnet, or of what the network has at an
/// address itself: a guest may have a route to link-local addresses that leads to no router.
pub(crate) fn arp(view: &View, peers: Peers<'_>, frame: &[u8]) -> Option<Vec<u8>> {
    let ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = ArpRepr::parse(&ArpPacket::new_checked(&frame[ETHERNET_LEN..]).ok()?).ok()?
    else {
        return None;
    };
    let honest = source_hardware_addr.0 == view.mac.0
        && (view.has(source_protocol_addr) || source_protocol_addr.is_unspecified());
    // Who asks for its own address looks whether another has it.
    if operation != ArpOperation::Request || !honest || view.has(target_protocol_addr) {
        return None;
    }
    let wanted = match target_protocol_addr {
        METADATA | LOCAL_CLIENT => ROUTER_MAC,
        to if to == view.router() || view.is_resolver(to) => ROUTER_MAC,
        to => peers(to).filter(|_| view.subnet.contains(&to))?,
    };
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(wanted.0),
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    let mut answer = ethernet(wanted, view.mac, EthernetProtocol::Arp, reply.buffer_len());
    reply.emit(&mut ArpPacket::new_unchecked(&mut answer[ETHERNET_LEN..]));
    Some(answer)
}

/// The answer to a DHCP client: the address that the interface has.
pub(crate) fn dhcp(view: &View, packet: &[u8]) -> Option<Vec<u8>> {
    let ip = Ipv4Packet::new_checked(packet).ok()?;
    let udp = UdpPacket::new_checked(ip.payload()).ok()?;
    let request = DhcpPacket::new_checked(udp.payload()).ok()?;
    let asked = DhcpRepr::parse(&request).ok()?;
    if asked.client_hardware_address.0 != view.mac.0 {
        return None;
    }
    let theirs = asked.requested_ip.or((!asked.client_ip.is_unspecified()).then_some(asked.client_ip));
    let other_server = asked.server_identifier.is_some_and(|server| server != view.router());
    let kind = match asked.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if other_server => return None,
        DhcpMessageType::Request if theirs.is_none_or(|address| address == view.address) => {
            DhcpMessageType::Ack
        }
        DhcpMessageType::Request => DhcpMessageType::Nak,
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let refused = kind == DhcpMessageType::Nak;
    let informs = asked.message_type == DhcpMessageType::Inform;
    let mtu = view.mtu.to_be_bytes();
    let addresses = |all: &[Ipv4Addr]| all.iter().flat_map(Ipv4Addr::octets).collect::<Vec<u8>>();
    let [time, netbios] = [view.dhcp.time_servers(), view.dhcp.netbios_servers()].map(addresses);
    let node_type = view.dhcp.node_type().map(|kind| [kind]);
    let names = match view.dhcp.name_servers() {
        [] => addresses(&[view.resolver()]),
        servers => addresses(servers),
    };
    let mut options = vec![
        DhcpOption { kind: HOST_NAME, data: view.host_name.as_bytes() },
        DhcpOption { kind: DOMAIN, data: view.dhcp.domain().unwrap_or(&view.domain).as_bytes() },
        DhcpOption { kind: MTU, data: &mtu },
        DhcpOption { kind: DNS_SERVERS, data: &names },
    ];
    if !time.is_empty() {
        options.push(DhcpOption { kind: NTP_SERVERS, data: &time });
    }
    if !netbios.is_empty() {
        options.push(DhcpOption { kind: NETBIOS_SERVERS, data: &netbios });
    }
    if let Some(kind) = &node_type {
        options.push(DhcpOption { kind: NETBIOS_NODE_TYPE, data: kind });
    }
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: asked.transaction_id,
        secs: 0,
        client_hardware_address: asked.client_hardware_address,
        client_ip: asked.client_ip,
        your_ip: if refused || informs { Ipv4Addr::UNSPECIFIED } else { view.address },
        server_ip: view.router(),
        router: (!refused).then(|| view.router()),
        subnet_mask: (!refused).then(|| view.subnet.netmask()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: asked.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(view.router()),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: (!refused && !informs).then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if refused { &[] } else { &options },
    };
    let to = if asked.client_ip.is_unspecified() { Ipv4Addr::BROADCAST } else { asked.client_ip };
    let mut bytes = vec![0; reply.buffer_len()];
    reply.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).ok()?;
    Some(udp_frame(view, (view.router(), 67), (to, 68), &bytes))
}

/// The answer to a ping of the router.
pub(crate) fn echo(view: &View, packet: &[u8]) -> Option<Vec<u8>> {
    let ip = Ipv4Packet::new_checked(packet).ok()?;
    if ip.next_header() != IpProtocol::Icmp {
        return None;
    }
    let capabilities = ChecksumCapabilities::default();
    let Icmpv4Repr::EchoRequest { ident, seq_no, data } =
        Icmpv4Repr::parse(&Icmpv4Packet::new_checked(ip.payload()).ok()?, &capabilities).ok()?
    else {
        return None;
    };
    let reply = Icmpv4Repr::EchoReply { ident, seq_no, data };
    let mut frame = ipv4(view, ip.dst_addr(), ip.src_addr(), IpProtocol::Icmp, reply.buffer_len());
    reply.emit(&mut Icmpv4Packet::new_unchecked(&mut frame[ETHERNET_LEN + 20..]), &capabilities);
    Some(frame)
}

/// A datagram to the interface.
pub(crate) fn udp_frame(view: &View, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let udp = UdpRepr { src_port: from.1, dst_port: to.1 };
    let len = udp.header_len() + payload.len();
    let mut frame = ipv4(view, from.0, to.0, IpProtocol::Udp, len);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut frame[ETHERNET_LEN + 20..]),
        &from.0.into(),
        &to.0.into(),
        payload.len(),
        |to| to.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    frame
}

/// A frame to the interface with an IPv4 header, and room behind it.
pub(crate) fn ipv4(view: &View, from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, len: usize) -> Vec<u8> {
    let ip =
        Ipv4Repr { src_addr: from, dst_addr: to, next_header: protocol, payload_len: len, hop_limit: 64 };
    let mut frame = ethernet(ROUTER_MAC, view.mac, EthernetProtocol::Ipv4, ip.buffer_len() + len);
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[ETHERNET_LEN..]), &ChecksumCapabilities::default());
    frame
}

/// A frame with an Ethernet header, and room behind it.
pub(crate) fn ethernet(from: MacAddress, to: MacAddress, ethertype: EthernetProtocol, len: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_LEN + len];
    write_ethernet(from, to, ethertype, &mut frame);
    frame
}

/// Writes the Ethernet header that a frame has room for.
pub(crate) fn write_ethernet(
    from: MacAddress,
    to: MacAddress,
    ethertype: EthernetProtocol,
    frame: &mut [u8],
) {
    let header =
        EthernetRepr { src_addr: EthernetAddress(from.0), dst_addr: EthernetAddress(to.0), ethertype };
    header.emit(&mut EthernetFrame::new_unchecked(frame));
}
