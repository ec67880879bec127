//! Fragments of IPv4 packets (RFC 791, section 3.2). They are put together before anything is decided about them, as
//! only the first has ports to decide by, and what arrives is cut again where it is too long for its receiver.
//!
//! Whoever sends fragments has a bounded number of packets that wait for the rest. Fragments that overlap have no
//! honest use (RFC 5722) and take all of their packet with them.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use instance_core::net::{Checksum, Frame};
use smoltcp::wire::{IpProtocol, Ipv4Packet};

use crate::packet::{ETHERNET_LEN, sound_ipv4};

/// The most packets that wait for the rest, and of how many fragments each may be.
const PACKETS: usize = 16;
const PIECES: usize = 128;

/// How long one waits, in seconds (RFC 1122, section 3.3.2, wants more; no guest's network is that slow).
const PATIENCE: u32 = 30;

/// The longest packet.
const LONGEST: usize = 65_535;

/// What the fragments of a packet have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: IpProtocol,
    id: u16,
}

#[derive(Debug)]
struct Incomplete {
    key: Key,
    since: u32,
    /// The headers of the fragment that came first of all and, once it has come, of the first one.
    headers: Vec<u8>,
    /// Payload by where it begins.
    pieces: BTreeMap<usize, Vec<u8>>,
    /// The length of the whole payload, once the last fragment has come.
    len: Option<usize>,
}

/// The packets of a sender that are not complete, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Fragments(VecDeque<Incomplete>);

/// Whether a frame carries a fragment of an IPv4 packet.
pub(crate) fn is_fragment(frame: &[u8]) -> bool {
    const IPV4: [u8; 2] = [8, 0];
    if frame.get(12..ETHERNET_LEN) != Some(&IPV4) {
        return false;
    }
    sound_ipv4(&frame[ETHERNET_LEN..]).is_some_and(|ip| ip.more_frags() || ip.frag_offset() != 0)
}

impl Fragments {
    /// Takes a fragment, and gives the frame that it completes. `now` is in seconds.
    pub(crate) fn take(&mut self, frame: &Frame, now: u32) -> Option<Frame> {
        self.0.retain(|packet| now.saturating_sub(packet.since) <= PATIENCE);
        if frame.segmentation.is_some() || matches!(frame.checksum, Checksum::Partial { .. }) {
            return None; // it could be completed only as a whole
        }
        let ip = sound_ipv4(frame.data.get(ETHERNET_LEN..)?)?;
        let (source, destination) = (ip.src_addr(), ip.dst_addr());
        let key = Key { source, destination, protocol: ip.next_header(), id: ip.ident() };
        let (begin, payload) = (usize::from(ip.frag_offset()), ip.payload());
        let headers = &frame.data[..ETHERNET_LEN + usize::from(ip.header_len())];
        let is_last = !ip.more_frags();
        let sound = !payload.is_empty()
            && (is_last || payload.len() % 8 == 0)
            && usize::from(ip.header_len()) + begin + payload.len() <= LONGEST;
        let at = self.0.iter().position(|packet| packet.key == key);
        if !sound {
            at.map(|at| self.0.remove(at));
            return None;
        }
        let mut packet = match at.and_then(|at| self.0.remove(at)) {
            Some(packet) => packet,
            None => {
                let (headers, pieces) = (headers.to_vec(), BTreeMap::new());
                Incomplete { key, since: now, headers, pieces, len: None }
            }
        };
        if !packet.add(begin, payload, is_last) {
            return None;
        }
        if begin == 0 {
            packet.headers = headers.to_vec();
        }
        if packet.is_complete() {
            return packet.whole();
        }
        if self.0.len() >= PACKETS {
            self.0.pop_front();
        }
        self.0.push_back(packet);
        None
    }

    /// That all is as it has to be.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn check(&self) {
        assert!(self.0.len() <= PACKETS);
        for packet in &self.0 {
            assert!(packet.pieces.len() <= PIECES && !packet.is_complete());
            assert!(packet.pieces.values().map(Vec::len).sum::<usize>() <= LONGEST);
        }
    }
}

impl Incomplete {
    /// False if the fragment does not go with those that are there.
    fn add(&mut self, begin: usize, payload: &[u8], is_last: bool) -> bool {
        let end = begin + payload.len();
        let end_before = self.pieces.range(..begin).next_back().map_or(0, |(at, piece)| at + piece.len());
        let overlaps = end_before > begin || self.pieces.range(begin..end).next().is_some();
        let contradicts = self.len.is_some_and(|len| is_last || end > len)
            || is_last && self.pieces.last_key_value().is_some_and(|(at, piece)| at + piece.len() > end);
        if overlaps || contradicts || self.pieces.len() >= PIECES {
            return false;
        }
        if is_last {
            self.len = Some(end);
        }
        self.pieces.insert(begin, payload.to_vec());
        true
    }

    fn is_complete(&self) -> bool {
        // They do not overlap, so there are none missing if there are enough bytes.
        self.len.is_some_and(|len| self.pieces.values().map(Vec::len).sum::<usize>() == len)
    }

    fn whole(self) -> Option<Frame> {
        let header_len = self.headers.len() - ETHERNET_LEN;
        let len = u16::try_from(header_len + self.len?).ok()?;
        let mut data = self.headers;
        self.pieces.values().for_each(|piece| data.extend(piece));
        let mut ip = Ipv4Packet::new_unchecked(&mut data[ETHERNET_LEN..]);
        ip.set_total_len(len);
        ip.set_more_frags(false);
        ip.set_frag_offset(0);
        ip.fill_checksum();
        Some(Frame::new(data))
    }
}

/// A frame of IPv4 that may be cut, with a number by which its fragments are known.
pub(crate) fn numbered(mut frame: Frame, id: u16) -> Frame {
    // What is no packet is not cut either.
    if frame.data.get(ETHERNET_LEN..).is_some_and(|packet| sound_ipv4(packet).is_some()) {
        let mut ip = Ipv4Packet::new_unchecked(&mut frame.data[ETHERNET_LEN..]);
        ip.set_dont_frag(false);
        ip.set_ident(id);
        ip.fill_checksum();
    }
    frame
}

/// A complete frame as a receiver can take it: cut if its packet is longer than `mtu`. None of what may not be cut.
pub(crate) fn cut(frame: Frame, mtu: u16) -> Vec<Frame> {
    let mtu = usize::from(mtu);
    if frame.segmentation.is_some() || frame.data.len() <= ETHERNET_LEN + mtu {
        return vec![frame];
    }
    let Some(ip) = sound_ipv4(&frame.data[ETHERNET_LEN..]) else { return Vec::new() };
    let header_len = usize::from(ip.header_len());
    let size = mtu.saturating_sub(header_len) / 8 * 8;
    let may_be_cut = !ip.dont_frag() && !ip.more_frags() && ip.frag_offset() == 0;
    if !may_be_cut || size == 0 || !matches!(frame.checksum, Checksum::Complete | Checksum::Verified) {
        return Vec::new();
    }
    let headers = &frame.data[..ETHERNET_LEN + header_len];
    let count = ip.payload().len().div_ceil(size);
    let piece = |(n, payload): (usize, &[u8])| {
        let mut data = [headers, payload].concat();
        let mut ip = Ipv4Packet::new_unchecked(&mut data[ETHERNET_LEN..]);
        ip.set_total_len((header_len + payload.len()) as u16);
        ip.set_frag_offset((n * size) as u16);
        ip.set_more_frags(n + 1 < count);
        ip.fill_checksum();
        Frame::new(data)
    };
    ip.payload().chunks(size).enumerate().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame of a packet with this payload.
    fn frame(payload: &[u8]) -> Frame {
        let mut data = vec![0; ETHERNET_LEN + 20];
        data[12..14].copy_from_slice(&[8, 0]);
        data.extend(payload);
        let len = (data.len() - ETHERNET_LEN) as u16;
        let mut ip = Ipv4Packet::new_unchecked(&mut data[ETHERNET_LEN..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len(len);
        ip.set_ident(7);
        ip.set_next_header(IpProtocol::Udp);
        ip.set_src_addr(Ipv4Addr::new(10, 0, 0, 4));
        ip.set_dst_addr(Ipv4Addr::new(10, 0, 0, 5));
        ip.fill_checksum();
        Frame::new(data)
    }

    fn payload(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n / 3) as u8).collect()
    }

    /// One fragment: where it begins, how long it is, and whether more follow.
    fn piece(begin: u16, len: usize, more: bool) -> Frame {
        let mut frame = frame(&payload(len));
        let mut ip = Ipv4Packet::new_unchecked(&mut frame.data[ETHERNET_LEN..]);
        ip.set_frag_offset(begin);
        ip.set_more_frags(more);
        ip.fill_checksum();
        frame
    }

    #[test]
    fn what_is_cut_is_put_together_in_whatever_order_it_comes() {
        for len in [1481, 2960, 2961, 9000, 65_515] {
            let whole = frame(&payload(len));
            let mut pieces = cut(whole.clone(), 1500);
            assert!(pieces.len() > 1 && pieces.iter().all(|piece| piece.data.len() <= 1514));
            assert!(pieces.iter().all(|piece| is_fragment(&piece.data)));
            for turn in 0..pieces.len().min(5) {
                pieces.rotate_left(turn);
                let mut fragments = Fragments::default();
                let (last, before) = pieces.split_last().unwrap();
                assert!(before.iter().all(|piece| fragments.take(piece, 0).is_none()), "{len}");
                fragments.check();
                assert_eq!(fragments.take(last, 0), Some(whole.clone()), "{len}");
                assert!(fragments.0.is_empty());
            }
        }
    }

    #[test]
    fn what_fits_is_not_cut_and_what_may_not_be_is_dropped() {
        let mut whole = frame(&payload(1480));
        assert_eq!(cut(whole.clone(), 1500), [whole.clone()]);
        assert_eq!(cut(whole.clone(), 1499).len(), 2);
        Ipv4Packet::new_unchecked(&mut whole.data[ETHERNET_LEN..]).set_dont_frag(true);
        assert_eq!(cut(whole, 1499), []);
    }

    #[test]
    fn what_does_not_go_together_is_forgotten() {
        for (what, pieces) in [
            ("an overlap", vec![(0, 16, true), (8, 16, true), (16, 8, false)]),
            ("one twice", vec![(0, 8, true), (0, 8, true), (8, 8, false)]),
            ("two ends", vec![(8, 8, false), (16, 8, false), (0, 8, true)]),
            ("more behind the end", vec![(8, 8, false), (16, 8, true), (0, 8, true)]),
            ("an end before what is there", vec![(16, 8, true), (8, 8, false), (0, 8, true)]),
            ("an odd length", vec![(0, 9, true), (16, 8, false)]),
            ("none", vec![(0, 8, true), (8, 0, true), (8, 8, false)]),
            ("too long a packet", vec![(65_512, 8, false), (0, 8, true)]),
        ] {
            let mut fragments = Fragments::default();
            for (begin, len, more) in pieces {
                assert_eq!(fragments.take(&piece(begin, len, more), 0), None, "{what}");
                fragments.check();
            }
        }
    }

    #[test]
    fn memory_and_patience_are_bounded() {
        let mut fragments = Fragments::default();
        for id in 0..1000 {
            let mut begun = piece(0, 1480, true);
            Ipv4Packet::new_unchecked(&mut begun.data[ETHERNET_LEN..]).set_ident(id);
            assert_eq!(fragments.take(&begun, 0), None);
        }
        fragments.check();
        // The newest are there, and not for ever.
        let mut end = piece(1480, 8, false);
        Ipv4Packet::new_unchecked(&mut end.data[ETHERNET_LEN..]).set_ident(999);
        assert!(fragments.take(&end, PATIENCE).is_some());
        Ipv4Packet::new_unchecked(&mut end.data[ETHERNET_LEN..]).set_ident(998);
        assert!(fragments.take(&end, PATIENCE + 1).is_none());

        let mut fragments = Fragments::default();
        (0..8000).for_each(|n| drop(fragments.take(&piece(n * 8, 8, true), 0)));
        fragments.check();
    }
}
