//! Packets that are routed.

use super::*;
use crate::answer::udp_frame;

/// The same subnet's and another's.
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 7);
const PEER_MAC: MacAddress = MacAddress([6, 0, 0, 0, 0, 7]);

/// The hops that are left to a packet when it arrives.
#[test]
fn a_packet_is_a_hop_older_behind_the_router_and_goes_no_further_than_it_may() {
    let view = crate::fuzzing::view().unwrap();
    for (to, hops, expect) in [
        (NEAR, 64, Some(64)),
        (NEAR, 1, Some(1)),
        (FAR, 64, Some(63)),
        (FAR, 2, Some(1)),
        (FAR, 1, None),
        (FAR, 0, None),
    ] {
        let mut frame = udp_frame(&view, (view.address, 4000), (to, 9), b"hello");
        frame[..6].copy_from_slice(&ROUTER_MAC.0);
        frame[6..12].copy_from_slice(&view.mac.0);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_LEN..]);
        ip.set_hop_limit(hops);
        ip.fill_checksum();
        let peers = |at| (at == NEAR || at == FAR).then_some(PEER_MAC);
        let left = match decide(&view, &peers, &mut Conntrack::new(100), Frame::new(frame), 0) {
            Verdict::Local(at, frame) => {
                let ip = Ipv4Packet::new_unchecked(&frame.data[ETHERNET_LEN..]);
                assert!(at == to && frame.data[..6] == PEER_MAC.0 && ip.verify_checksum());
                Some(ip.hop_limit())
            }
            Verdict::Drop => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(left, expect, "{to} in {hops} hops");
    }
}
