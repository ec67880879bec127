//! A guest that speaks TCP with the stack as it likes: the body of a fuzz target and of tests.

use std::net::Ipv4Addr;

use smoltcp::socket::tcp;
use smoltcp::wire::{IpProtocol, Ipv4Packet, TcpPacket, TcpSeqNumber};

use super::stack::Stack;
use super::wire::Key;
use crate::packet::ETHERNET_LEN;
use crate::switch::View;

const KEY: Key = ((Ipv4Addr::new(10, 0, 0, 12), 4000), (Ipv4Addr::new(198, 51, 100, 7), 80));
/// The first byte that the guest says is behind it.
const BEGIN: TcpSeqNumber = TcpSeqNumber(i32::MAX - 1000);

/// What the guest says, by where it is in the conversation.
fn byte_at(at: usize) -> u8 {
    (at % 251) as u8
}

/// The flags of a segment (RFC 9293, 3.1), but for that it acknowledges something.
pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
const PSH: u8 = 8;

/// A segment of the guest's.
pub(super) struct Segment<'a> {
    pub(super) key: Key,
    pub(super) begin: TcpSeqNumber,
    pub(super) acknowledged: Option<TcpSeqNumber>,
    pub(super) window: u16,
    pub(super) flags: u8,
    pub(super) options: &'a [u8],
    pub(super) payload: Vec<u8>,
}

impl Segment<'_> {
    pub(super) fn frame(&self) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let mut frame = vec![0; ETHERNET_LEN + 20 + header_len + self.payload.len()];
        let total_len = (frame.len() - ETHERNET_LEN) as u16;
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_LEN..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len(total_len);
        ip.set_hop_limit(64);
        ip.set_next_header(IpProtocol::Tcp);
        ip.set_src_addr(self.key.0.0);
        ip.set_dst_addr(self.key.1.0);
        let mut tcp = TcpPacket::new_unchecked(ip.payload_mut());
        tcp.set_src_port(self.key.0.1);
        tcp.set_dst_port(self.key.1.1);
        tcp.set_header_len(header_len as u8);
        tcp.set_seq_number(self.begin);
        tcp.set_ack_number(self.acknowledged.unwrap_or_default());
        tcp.set_ack(self.acknowledged.is_some());
        tcp.set_fin(self.flags & FIN != 0);
        tcp.set_syn(self.flags & SYN != 0);
        tcp.set_rst(self.flags & RST != 0);
        tcp.set_psh(self.flags & PSH != 0);
        tcp.set_window_len(self.window);
        tcp.options_mut().copy_from_slice(self.options);
        tcp.payload_mut().copy_from_slice(&self.payload);
        frame
    }
}

pub(crate) use super::names::heard as names;

/// Whatever the guest sends, what is heard of it is what it said, without a hole and in order.
pub(crate) fn segments(view: &View, bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let options: &[u8] = [&[][..], &[2, 4, 5, 180], &[2, 4, 5, 180, 3, 3, 7, 0]][usize::from(first % 3)];
    let mut stack = Stack::new(view);
    let Some(handle) = stack.expect(KEY) else { return };
    let of_guest = |begin, acknowledged, window, flags, options, payload| {
        Segment { key: KEY, begin, acknowledged, window, flags, options, payload }.frame()
    };
    stack.take_syn(KEY, of_guest(BEGIN - 1, None, 1000, SYN, options, vec![]));
    stack.work();
    // Of what the stack says: what it has sent, and what it waits for.
    let (mut said, mut wanted) = (None, BEGIN);
    let (mut heard, mut has_ended) = (0, false);
    for step in rest.chunks_exact(6) {
        while let Some(packet) = stack.next() {
            let ip = Ipv4Packet::new_unchecked(&packet[ETHERNET_LEN..]);
            if let Ok(tcp) = TcpPacket::new_checked(ip.payload()) {
                said = Some(tcp.seq_number() + tcp.segment_len());
                if tcp.ack() {
                    wanted = tcp.ack_number();
                }
            }
        }
        let [what, flags, a, b, c, d] = [0, 1, 2, 3, 4, 5].map(|n| step[n]);
        let (x, y) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let socket = stack.get(handle);
        match what % 4 {
            0 => {
                let mut len = 0;
                let take = |room: &mut [u8]| {
                    len = room.len().min(usize::from(x) + 1);
                    (len, room[..len].iter().enumerate().all(|(n, byte)| *byte == byte_at(heard + n)))
                };
                if let Ok(right) = socket.recv(take) {
                    assert!(right, "what is heard is not what was said");
                    heard += len;
                }
            }
            1 => _ = socket.send_slice(&vec![1; usize::from(x)]),
            _ => {
                // Mostly where the stack waits, and a little off.
                let off = if flags & 0x40 != 0 { usize::from(y % 64) } else { 0 };
                let begin = if flags & 0x80 != 0 { wanted - off } else { wanted + off };
                let at = (begin.0.wrapping_sub(BEGIN.0)) as usize & 0xffff_ffff;
                // Beginnings and ends of conversations are rare. They have numbers, too, and nothing follows an end.
                let flags = if what < 240 { flags & PSH } else { flags };
                let says = begin >= BEGIN && flags & SYN == 0 && !has_ended;
                let len = if says { usize::from(x).min(65_000) } else { 0 };
                let payload = (at..at + len).map(byte_at).collect();
                has_ended |= flags & FIN != 0;
                stack.take(of_guest(begin, said, y, flags, &[], payload));
            }
        }
        stack.work();
        stack.ask_for_room(handle);
        if stack.get(handle).state() == tcp::State::Closed {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_that_a_guest_takes_is_said_at_once() {
        const MUCH: usize = 200_000;
        let mut stack = Stack::new(&crate::fuzzing::view().unwrap());
        let handle = stack.expect(KEY).unwrap();
        let of_guest = |begin, acknowledged, window, flags, options| {
            Segment { key: KEY, begin, acknowledged, window, flags, options, payload: vec![] }.frame()
        };
        // Its window is so many times 128 bytes.
        let options: &[u8] = &[2, 4, 5, 180, 3, 3, 7, 0];
        stack.take_syn(KEY, of_guest(BEGIN - 1, None, 4000, SYN, options));
        stack.work();
        let answer = stack.next().unwrap();
        let begun = TcpPacket::new_unchecked(&answer[ETHERNET_LEN + 20..]).seq_number() + 1;
        stack.take(of_guest(BEGIN, Some(begun), 4000, 0, &[]));
        stack.work();
        assert_eq!(stack.get(handle).send_slice(&[1; MUCH]), Ok(MUCH));
        stack.work();
        let said = std::iter::from_fn(|| stack.next()).map(|packet| packet.len() - ETHERNET_LEN - 40);
        assert_eq!(said.sum::<usize>(), MUCH);
    }

    proptest! {
        #[test]
        fn what_is_heard_is_what_was_said(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            crate::fuzzing::segments(&bytes);
        }
    }

    /// A window whose end goes back as it is rounded, and a guest that has filled it before.
    #[test]
    fn a_guest_may_fill_a_window_that_is_rounded() {
        let say = |len: u16| [[2, 0], len.to_le_bytes(), [0xff, 0xff]].concat();
        let hear = |len: u16| [[0, 0], len.to_le_bytes(), [0, 0]].concat();
        let mut bytes = vec![2];
        for _ in 0..40 {
            bytes.extend([say(65_000), say(65_000), say(65_000), say(65_000), say(65_000)].concat());
            bytes.extend([hear(3), say(1), say(9), hear(30_001), say(65_000), hear(65_000)].concat());
        }
        crate::fuzzing::segments(&bytes);
    }
}
