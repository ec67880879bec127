//! Which pair of queues a frame for the guest belongs to: that by which the guest sent the last one of the same flow
//! (virtio 1.2, 5.1.5.1.1, "automatic receive steering").

use instance_core::net::Frame;

/// How many flows are told apart; others share.
const FLOWS: usize = 256;

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Where the guest sends each flow.
#[derive(Debug)]
pub(super) struct Steering([u8; FLOWS]);

impl Steering {
    /// Nothing was sent yet.
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|flow| flow as u8))
    }

    /// Which of so many pairs a frame for the guest belongs to.
    pub(super) fn pair_for(&self, frame: &Frame, pairs: usize) -> usize {
        if pairs == 1 { 0 } else { usize::from(self.0[flow(&frame.data)]) % pairs }
    }

    /// The guest sends a frame by this pair.
    pub(super) fn learn(&mut self, frame: &Frame, pair: usize) {
        self.0[flow(&frame.data)] = pair as u8;
    }
}

/// The flow of a frame, which is the same in both directions. What is of no flow is of the first.
fn flow(frame: &[u8]) -> usize {
    let both = match frame.get(12..14) {
        Some(kind) if kind == IPV4 => ipv4(&frame[14..]),
        Some(kind) if kind == IPV6 => ipv6(&frame[14..]),
        _ => None,
    };
    both.map_or(0, |[one, other]| (hash(one).wrapping_add(hash(other)) >> 24) as usize % FLOWS)
}

/// An end of a flow: an address and a port.
type End = (u128, u16);

fn ipv4(packet: &[u8]) -> Option<[End; 2]> {
    const FRAGMENT: u16 = 0x3fff;
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    let address = |at: usize| Some(u32::from_be_bytes(*packet.get(at..)?.first_chunk()?).into());
    let whole = u16::from_be_bytes(*packet.get(6..)?.first_chunk()?) & FRAGMENT == 0;
    let [from, to] = if whole { ports(*packet.get(9)?, packet.get(header_len..)?) } else { [0; 2] };
    Some([(address(12)?, from), (address(16)?, to)])
}

fn ipv6(packet: &[u8]) -> Option<[End; 2]> {
    const HEADER_LEN: usize = 40;
    let address = |at: usize| Some(u128::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    let [from, to] = ports(*packet.get(6)?, packet.get(HEADER_LEN..)?);
    Some([(address(8)?, from), (address(24)?, to)])
}

/// The ports of a datagram that has some.
fn ports(protocol: u8, datagram: &[u8]) -> [u16; 2] {
    match (protocol, datagram) {
        (TCP | UDP, &[a, b, c, d, ..]) => [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])],
        _ => [0; 2],
    }
}

/// Spreads ends that differ in a few bits.
fn hash((address, port): End) -> u32 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let folded = (address as u64) ^ (address >> 64) as u64;
    (folded.wrapping_add(u64::from(port) << 40 | u64::from(port)).wrapping_mul(ODD) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP or TCP frame between two ends of 10.0.0.0/24.
    fn frame(protocol: u8, from: (u8, u16), to: (u8, u16)) -> Frame {
        let mut bytes = vec![0; 60];
        bytes[12..14].copy_from_slice(&IPV4);
        (bytes[14], bytes[23]) = (0x45, protocol);
        bytes[26..30].copy_from_slice(&[10, 0, 0, from.0]);
        bytes[30..34].copy_from_slice(&[10, 0, 0, to.0]);
        bytes[34..36].copy_from_slice(&from.1.to_be_bytes());
        bytes[36..38].copy_from_slice(&to.1.to_be_bytes());
        Frame::new(bytes)
    }

    fn frame6(from: (u8, u16), to: (u8, u16)) -> Frame {
        let mut bytes = vec![0; 80];
        bytes[12..14].copy_from_slice(&IPV6);
        (bytes[14], bytes[20], bytes[37], bytes[53]) = (0x60, TCP, from.0, to.0);
        bytes[54..56].copy_from_slice(&from.1.to_be_bytes());
        bytes[56..58].copy_from_slice(&to.1.to_be_bytes());
        Frame::new(bytes)
    }

    #[test]
    fn answers_come_where_the_flow_was_sent() {
        let mut steering = Steering::new();
        for pairs in [2, 3, 8] {
            for port in 1000..1100 {
                let pair = usize::from(port) % pairs;
                steering.learn(&frame(TCP, (12, port), (1, 443)), pair);
                assert_eq!(steering.pair_for(&frame(TCP, (1, 443), (12, port)), pairs), pair);
                steering.learn(&frame6((12, port), (1, 443)), pair);
                assert_eq!(steering.pair_for(&frame6((1, 443), (12, port)), pairs), pair);
            }
        }
        // By fewer pairs than before.
        steering.learn(&frame(UDP, (12, 7), (1, 53)), 7);
        assert_eq!(steering.pair_for(&frame(UDP, (1, 53), (12, 7)), 1), 0);
        assert!(steering.pair_for(&frame(UDP, (1, 53), (12, 7)), 2) < 2);
    }

    #[test]
    fn flows_that_the_guest_has_not_sent_are_spread() {
        let steering = Steering::new();
        for of in [
            |n| frame(TCP, (1, n), (12, 80)),
            |n| frame(UDP, (n as u8, 9), (12, 9)),
            |n| frame6((1, n), (12, 80)),
        ] {
            let mut seen = [0; 4];
            (5000..5200).for_each(|n| seen[steering.pair_for(&of(n), 4)] += 1);
            assert!(seen.iter().all(|count| *count >= 20), "{seen:?}");
        }
    }

    #[test]
    fn what_is_cut_short_or_of_no_flow_has_a_pair_too() {
        let steering = Steering::new();
        for whole in [frame(TCP, (1, 2), (3, 4)).data, frame6((1, 2), (3, 4)).data] {
            for len in 0..whole.len() {
                assert!(steering.pair_for(&Frame::new(whole[..len].to_vec()), 8) < 8);
            }
        }
        assert_eq!(steering.pair_for(&Frame::new(vec![0xff; 60]), 8), 0);
        // Fragments have no ports behind the first: all go one way.
        let mut first = frame(UDP, (1, 2), (3, 4)).data;
        first[20] = 0x20;
        let mut later = frame(UDP, (1, 9999), (3, 1)).data;
        later[21] = 1;
        assert_eq!(steering.pair_for(&Frame::new(first), 8), steering.pair_for(&Frame::new(later), 8));
    }
}
