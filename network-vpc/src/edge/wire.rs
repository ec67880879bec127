//! What is between the stack and the guest: packets that wait, and what has to be done to them so that each side takes
//! the other's.
//!
//! The stack makes segments of any length, so that nobody cuts them where the guest takes them whole. And it gets no byte
//! beyond the window that it has announced: it would end this thread.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{Ipv4Packet, TcpPacket, TcpSeqNumber};

use crate::packet::{ETHERNET_LEN, Flow, Transport};

/// Packets, and their bytes, that are made while the machine takes none.
const OUTBOX: usize = 128;
const OUTBOX_BYTES: usize = 1 << 20;

/// The longest packet there is, and the payload of a segment that is one.
const LONGEST: usize = 65_535;
const LONGEST_SEGMENT: u16 = (LONGEST - 40) as u16;

/// Options of TCP (RFC 9293, 3.2, and RFC 7323).
const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
const SEGMENT_SIZE: u8 = 2;
const WINDOW_SCALE: u8 = 3;

/// Who speaks with whom: the guest's address and port, and the other's.
pub(super) type Key = ((Ipv4Addr, u16), (Ipv4Addr, u16));

/// See the [module](self).
#[derive(Default)]
pub(super) struct Wire {
    inbox: VecDeque<Vec<u8>>,
    outbox: VecDeque<Vec<u8>>,
    /// The bytes of the outbox.
    bytes: usize,
    conversations: HashMap<Key, Conversation>,
}

/// What has been heard and said in one.
#[derive(Default)]
struct Conversation {
    /// The longest segments that the guest takes, if it has said so.
    size: Option<u16>,
    /// By how many bits the stack's window is scaled.
    scale: u8,
    /// The end of the window that the stack has announced last.
    end: Option<TcpSeqNumber>,
    /// What lies behind it and was announced before: a window is rounded, and its end may go back.
    held: Option<Vec<u8>>,
}

impl Wire {
    /// A conversation begins, in which the stack's window is scaled by so many bits if the guest's is as well.
    pub(super) fn begin(&mut self, key: Key, scale: u8) {
        self.conversations.insert(key, Conversation { scale, ..Conversation::default() });
    }

    pub(super) fn end(&mut self, key: &Key) {
        self.conversations.remove(key);
    }

    /// The longest segments that the guest takes, if it has said so.
    pub(super) fn segment_size(&self, key: &Key) -> Option<u16> {
        self.conversations.get(key)?.size
    }

    /// A frame of the guest's.
    pub(super) fn take(&mut self, key: &Key, is_syn: bool, mut frame: Vec<u8>) {
        if let Some(conversation) = self.conversations.get_mut(key).filter(|_| is_syn) {
            let offered = lift_segment_size(&mut frame);
            conversation.size = offered.size;
            if !offered.scales {
                conversation.scale = 0;
            }
        }
        self.inbox.push_back(frame);
    }

    pub(super) fn has_heard(&self) -> bool {
        !self.inbox.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.outbox.len() >= OUTBOX || self.bytes >= OUTBOX_BYTES
    }

    /// The next packet to the guest, behind room for its Ethernet header.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let frame = self.outbox.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }

    /// Has a frame of the guest's end where the window does.
    fn keep_in_window(&mut self, frame: &mut Vec<u8>) {
        let Some((key, _)) = frame.get(ETHERNET_LEN..).and_then(key_of) else { return };
        let Some(conversation) = self.conversations.get_mut(&key) else { return };
        let Some(end) = conversation.end else { return };
        let behind = split(frame, end);
        if behind.is_some() && conversation.held.is_none() {
            let shortest = 1 << conversation.scale;
            conversation.held = behind.filter(|(_, len)| *len < shortest).map(|(frame, _)| frame);
        }
    }

    /// Notes the window that a packet of the stack's announces.
    fn announce(&mut self, packet: &[u8]) {
        let Some(((from, to), tcp)) = key_of(packet) else { return };
        let Some(conversation) = self.conversations.get_mut(&(to, from)).filter(|_| tcp.ack()) else {
            return;
        };
        let end = tcp.ack_number() + (usize::from(tcp.window_len()) << conversation.scale);
        conversation.end = Some(end);
        let fits = |frame: &mut Vec<u8>| segment(frame).is_some_and(|(begin, len)| begin + len <= end);
        self.inbox.extend(conversation.held.take_if(fits));
    }
}

/// The ends of a segment that a packet carries: its sender and its receiver.
fn key_of(packet: &[u8]) -> Option<(Key, TcpPacket<&[u8]>)> {
    let flow = Flow::parse(packet)?;
    let Transport::Tcp { source, destination, .. } = flow.transport else { return None };
    let ip_len = usize::from(packet.first()? & 0xf) * 4;
    let tcp = TcpPacket::new_checked(packet.get(ip_len..)?).ok()?;
    Some((((flow.source, source), (flow.destination, destination)), tcp))
}

/// Where the payload of a frame's segment begins in the conversation, and how long it is.
fn segment(frame: &[u8]) -> Option<(TcpSeqNumber, usize)> {
    let ip = Ipv4Packet::new_checked(frame.get(ETHERNET_LEN..)?).ok()?;
    let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
    Some((tcp.seq_number() + usize::from(tcp.syn()), tcp.payload().len()))
}

/// Has a segment end where the window does. Gives what lay behind, as one of its own, and how long it was.
fn split(frame: &mut Vec<u8>, end: TcpSeqNumber) -> Option<(Vec<u8>, usize)> {
    let (begin, len) = segment(frame)?;
    if begin + len <= end {
        return None;
    }
    let fits = if begin < end { end - begin } else { 0 };
    let ip_len = usize::from(frame[ETHERNET_LEN] & 0xf) * 4;
    let tcp_len = usize::from(TcpPacket::new_unchecked(&frame[ETHERNET_LEN + ip_len..]).header_len());
    let payload = ETHERNET_LEN + ip_len + tcp_len;
    // A packet may be followed by what fills its frame.
    frame.truncate(payload + len);
    let mut behind = [&frame[..payload], &frame[payload + fits..]].concat();
    frame.truncate(payload + fits);
    for part in [&mut *frame, &mut behind] {
        let total_len = (part.len() - ETHERNET_LEN) as u16;
        Ipv4Packet::new_unchecked(&mut part[ETHERNET_LEN..]).set_total_len(total_len);
    }
    let mut first = TcpPacket::new_unchecked(&mut frame[ETHERNET_LEN + ip_len..]);
    first.set_fin(false);
    first.set_psh(false);
    let mut second = TcpPacket::new_unchecked(&mut behind[ETHERNET_LEN + ip_len..]);
    second.set_syn(false);
    second.set_seq_number(begin + fits);
    Some((behind, len - fits))
}

/// What a guest offers that begins or accepts a conversation.
#[derive(Debug, Default, PartialEq, Eq)]
struct Offered {
    /// The longest segments that it takes.
    size: Option<u16>,
    /// Whether windows may be scaled.
    scales: bool,
}

/// Reads a guest's options, and has the stack take it for one that takes segments of any length.
fn lift_segment_size(frame: &mut [u8]) -> Offered {
    let mut offered = Offered::default();
    let Some(mut rest) = options(frame) else { return offered };
    loop {
        let len = match rest {
            [NO_OPERATION, ..] => 1,
            [kind, len, value @ ..] if *kind != END_OF_OPTIONS && *len > 1 => {
                match (*kind, *len, value.first_chunk_mut()) {
                    (SEGMENT_SIZE, 4, Some(size)) => {
                        let there = std::mem::replace(size, LONGEST_SEGMENT.to_be_bytes());
                        offered.size = Some(u16::from_be_bytes(there));
                    }
                    (WINDOW_SCALE, 3, _) => offered.scales = true,
                    _ => {}
                }
                usize::from(*len)
            }
            _ => return offered,
        };
        let Some(behind) = rest.get_mut(len..) else { return offered };
        rest = behind;
    }
}

/// The options of a frame's segment.
fn options(frame: &mut [u8]) -> Option<&mut [u8]> {
    const SHORTEST: usize = 20;
    let ip_len = usize::from(frame.get(ETHERNET_LEN)? & 0xf) * 4;
    let segment = frame.get_mut(ETHERNET_LEN + ip_len..)?;
    let header_len = usize::from(segment.get(12)? >> 4) * 4;
    segment.get_mut(SHORTEST..header_len)
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Outbox<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Outbox<'_>)> {
        let mut frame = self.inbox.pop_front()?;
        self.keep_in_window(&mut frame);
        Some((Received(frame), Outbox(self)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Outbox<'_>> {
        (!self.is_full()).then_some(Outbox(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = LONGEST;
        // What the guest sends came through memory, and may have a checksum that is still to be computed; so may what
        // it gets.
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

pub(super) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0.get(ETHERNET_LEN..).unwrap_or_default())
    }
}

pub(super) struct Outbox<'a>(&'a mut Wire);

impl TxToken for Outbox<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; ETHERNET_LEN + len];
        let result = f(&mut frame[ETHERNET_LEN..]);
        self.0.announce(&frame[ETHERNET_LEN..]);
        self.0.bytes += frame.len();
        self.0.outbox.push_back(frame);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segments_that_a_guest_takes_are_found_and_lifted() {
        let frame = |header_words: u8, options: &[u8]| {
            let mut frame = vec![0; ETHERNET_LEN + 40];
            frame[ETHERNET_LEN] = 0x45;
            frame[ETHERNET_LEN + 32] = header_words << 4;
            frame.extend(options);
            frame
        };
        let check = |header_words, options: &[u8], expect: (Option<u16>, bool), lifted: &[u8]| {
            let mut there = frame(header_words, options);
            let Offered { size, scales } = lift_segment_size(&mut there);
            assert_eq!((size, scales), expect, "{options:?}");
            assert_eq!(there, frame(header_words, lifted), "{options:?}");
        };
        check(6, &[2, 4, 5, 180], (Some(1460), false), &[2, 4, 0xff, 0xd7]);
        check(7, &[1, 3, 3, 7, 2, 4, 5, 180], (Some(1460), true), &[1, 3, 3, 7, 2, 4, 0xff, 0xd7]);
        for lie in [
            &[0, 0, 2, 4, 5, 180, 0, 0][..],
            &[2, 5, 5, 180],
            &[8, 0, 2, 4],
            &[8, 1, 2, 4],
            &[8, 9, 2, 4],
            &[],
        ] {
            check(7, lie, (None, false), lie);
        }
        check(5, &[2, 4, 5, 180], (None, false), &[2, 4, 5, 180]);
        check(6, &[1, 2, 4, 5], (None, false), &[1, 2, 4, 5]);
        check(3, &[], (None, false), &[]);
    }

    #[test]
    fn a_segment_ends_where_the_window_does() {
        let frame = |begin: i32, payload: &[u8], fin: bool| {
            let mut frame = vec![0; ETHERNET_LEN + 40];
            frame.extend(payload);
            let mut ip = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_LEN..]);
            ip.set_version(4);
            ip.set_header_len(20);
            ip.set_total_len(40 + payload.len() as u16);
            let mut tcp = TcpPacket::new_unchecked(&mut frame[ETHERNET_LEN + 20..]);
            tcp.set_src_port(1);
            tcp.set_dst_port(2);
            tcp.set_header_len(20);
            tcp.set_seq_number(TcpSeqNumber(begin));
            tcp.set_fin(fin);
            frame
        };
        let check = |end: i32, first: &[u8], behind: Option<(i32, &[u8])>| {
            let mut there = [frame(i32::MAX - 1, b"abcdef", true), vec![0; 6]].concat();
            let rest = split(&mut there, TcpSeqNumber(end));
            assert_eq!(rest, behind.map(|(begin, rest)| (frame(begin, rest, true), rest.len())), "{end}");
            if behind.is_some() {
                assert_eq!(there, frame(i32::MAX - 1, first, false), "{end}");
            }
        };
        check(i32::MIN + 4, b"abcdef", None);
        check(i32::MIN + 3, b"abcde", Some((i32::MIN + 3, b"f")));
        check(i32::MAX, b"a", Some((i32::MAX, b"bcdef")));
        check(i32::MAX - 1, b"", Some((i32::MAX - 1, b"abcdef")));
        check(i32::MAX - 9, b"", Some((i32::MAX - 1, b"abcdef")));
    }
}
