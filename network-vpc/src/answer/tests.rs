//! What the network answers by itself.

use super::*;
use crate::switch::{LOCAL_CLIENT, METADATA, RESOLVER};

const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);
const PEER_MAC: MacAddress = MacAddress([6, 0, 0, 0, 0, 7]);

fn view() -> View {
    crate::fuzzing::view().unwrap()
}

/// Whose hardware address a guest is told that asks for an address.
fn who_has(view: &View, address: Ipv4Addr) -> Option<MacAddress> {
    let request = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(view.mac.0),
        source_protocol_addr: view.address,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: address,
    };
    let mut frame = ethernet(view.mac, MacAddress([0xff; 6]), EthernetProtocol::Arp, request.buffer_len());
    request.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_LEN..]));
    // One is in the subnet, and one is in another.
    let peers = |at| (at == PEER || at == Ipv4Addr::new(10, 0, 1, 7)).then_some(PEER_MAC);
    let answer = arp(view, &peers, &frame)?;
    let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, .. } =
        ArpRepr::parse(&ArpPacket::new_checked(&answer[ETHERNET_LEN..]).unwrap()).unwrap()
    else {
        return None;
    };
    assert_eq!((operation, source_protocol_addr), (ArpOperation::Reply, address));
    assert_eq!((&answer[..6], &answer[6..12]), (&view.mac.0[..], &source_hardware_addr.0[..]));
    Some(MacAddress(source_hardware_addr.0))
}

/// A guest may have a route to link-local addresses that leads to no router.
#[test]
fn who_asks_for_an_address_is_told_where_its_packets_go() {
    let view = view();
    for (address, expect) in [
        (view.router(), Some(ROUTER_MAC)),
        (view.resolver(), Some(ROUTER_MAC)),
        (RESOLVER, Some(ROUTER_MAC)),
        (METADATA, Some(ROUTER_MAC)),
        (LOCAL_CLIENT, Some(ROUTER_MAC)),
        (PEER, Some(PEER_MAC)),
        (Ipv4Addr::new(10, 0, 0, 8), None),
        (Ipv4Addr::new(10, 0, 1, 7), None),
        (Ipv4Addr::new(169, 254, 1, 1), None),
        (view.address, None),
    ] {
        assert_eq!(who_has(&view, address), expect, "{address}");
    }
}

/// The answer to a DHCP client.
fn asked(view: &View, asked: DhcpRepr<'_>) -> Option<(DhcpMessageType, Ipv4Addr, Option<u32>)> {
    let mut bytes = vec![0; asked.buffer_len()];
    asked.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).unwrap();
    let frame = udp_frame(view, (Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67), &bytes);
    let answer = dhcp(view, &frame[ETHERNET_LEN..])?;
    let answer = DhcpPacket::new_checked(&answer[ETHERNET_LEN + 28..]).unwrap();
    let answer = DhcpRepr::parse(&answer).unwrap();
    assert_eq!((answer.transaction_id, answer.server_identifier), (7, Some(view.router())));
    Some((answer.message_type, answer.your_ip, answer.lease_duration))
}

/// RFC 2131, section 4.3.
#[test]
fn a_dhcp_client_is_given_its_address_and_refused_another() {
    use DhcpMessageType::{Ack, Discover, Inform, Nak, Offer, Release, Request};
    let view = view();
    let (own, other, none) = (view.address, Ipv4Addr::new(10, 0, 0, 99), Ipv4Addr::UNSPECIFIED);
    let (here, elsewhere) = (view.router(), Ipv4Addr::new(10, 0, 0, 2));
    let given = |kind| Some((kind, own, Some(LEASE)));
    let refused = Some((Nak, none, None));
    for (kind, wanted, has, server, expect) in [
        (Discover, None, none, None, given(Offer)),
        (Discover, Some(other), none, None, given(Offer)),
        (Request, Some(own), none, Some(here), given(Ack)),
        (Request, Some(other), none, Some(here), refused),
        // It begins again with what it had, or asks for it once more.
        (Request, Some(own), none, None, given(Ack)),
        (Request, Some(other), none, None, refused),
        (Request, None, own, None, given(Ack)),
        (Request, None, other, None, refused),
        // It has taken what another offered.
        (Request, Some(own), none, Some(elsewhere), None),
        (Request, Some(other), none, Some(elsewhere), None),
        // It has its address from elsewhere, and asks for the rest.
        (Inform, None, own, None, Some((Ack, none, None))),
        (Release, None, own, Some(here), None),
    ] {
        let request = DhcpRepr {
            message_type: kind,
            transaction_id: 7,
            secs: 0,
            client_hardware_address: EthernetAddress(view.mac.0),
            client_ip: has,
            your_ip: none,
            server_ip: none,
            router: None,
            subnet_mask: None,
            relay_agent_ip: none,
            broadcast: false,
            requested_ip: wanted,
            client_identifier: None,
            server_identifier: server,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        assert_eq!(asked(&view, request.clone()), expect, "{kind:?} {wanted:?} {has} {server:?}");
        let another = DhcpRepr { client_hardware_address: EthernetAddress(PEER_MAC.0), ..request };
        assert_eq!(asked(&view, another), None, "another's hardware address");
    }
}
