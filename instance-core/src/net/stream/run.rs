//! Segments of a TCP conversation that follow one another, as the one long frame that a guest would have sent whose
//! device takes such. What becomes of it is decided once, and it is copied once.

use crate::net::Frame;
use crate::net::offload::{
    self, ETHERNET_LEN, IP_ADDRESSES, IP_TOTAL_LEN, TCP_DATA_OFFSET, TCP_FLAGS, TCP_SEQUENCE,
};

/// Where IPv4's flags are, and the one that says that a packet is whole and stays so, which makes its number mean nothing
/// (RFC 6864, section 4.1).
const IP_FLAGS: usize = ETHERNET_LEN + 6;
const WHOLE: [u8; 2] = [0x40, 0];
/// Where TCP begins behind an IPv4 header without options.
const TCP: usize = ETHERNET_LEN + 20;
/// The flags of a segment that neither begins nor ends anything, and the one that ends a run.
const ACKNOWLEDGES: u8 = 0x10;
const PUSHES: u8 = 0x08;
/// The longest packet.
const LONGEST: usize = ETHERNET_LEN + 65_535;

/// Frames that are one. Only the last may be shorter than the others.
pub(super) struct Run<'a> {
    frames: Vec<&'a [u8]>,
    /// What is known of the first, where it is such a segment.
    first: Option<Segment<'a>>,
    /// Whether another may follow.
    goes_on: bool,
    len: usize,
    sequence: u32,
}

/// A sound segment of TCP over IPv4 that carries something.
struct Segment<'a> {
    header: &'a [u8],
    payload_len: usize,
    sequence: u32,
    pushes: bool,
}

impl<'a> Run<'a> {
    /// A frame that stays by itself.
    pub(super) fn alone(frame: &'a [u8]) -> Self {
        Self { frames: vec![frame], first: None, goes_on: false, len: frame.len(), sequence: 0 }
    }

    /// A frame that others may follow.
    pub(super) fn new(frame: &'a [u8]) -> Self {
        let first = Segment::parse(frame);
        let goes_on = first.as_ref().is_some_and(|first| !first.pushes);
        let sequence = first.as_ref().map_or(0, Segment::next);
        Self { first, goes_on, sequence, ..Self::alone(frame) }
    }

    /// Adds a frame, if it is what follows. Says whether it is.
    pub(super) fn takes(&mut self, frame: &'a [u8]) -> bool {
        let Some(first) = self.first.as_ref().filter(|_| self.goes_on) else { return false };
        let follows = |next: &Segment<'_>| {
            next.sequence == self.sequence
                && next.payload_len <= first.payload_len
                && self.len + next.payload_len <= LONGEST
                && next.is_like(first)
        };
        let Some(next) = Segment::parse(frame).filter(follows) else { return false };
        self.goes_on = !next.pushes && next.payload_len == first.payload_len;
        self.sequence = next.next();
        self.len += next.payload_len;
        self.frames.push(frame);
        true
    }

    /// The frame.
    pub(super) fn into_frame(self) -> Frame {
        let (Some(first), [_, .., last]) = (&self.first, &self.frames[..]) else {
            return Frame::new(self.frames.concat());
        };
        let header_len = first.header.len();
        let mut data = Vec::with_capacity(self.len);
        data.extend(first.header);
        self.frames.iter().for_each(|frame| data.extend(&frame[header_len..]));
        data[TCP + TCP_FLAGS] = last[TCP + TCP_FLAGS];
        offload::set_ip_len(&mut data, TCP, self.len - ETHERNET_LEN);
        // The options of each segment are counted as part of its size.
        Frame::unfinished_tcp4(data, (first.payload_len + header_len - TCP - 20) as u16)
    }
}

impl<'a> Segment<'a> {
    fn parse(frame: &'a [u8]) -> Option<Self> {
        const IPV4: [u8; 2] = [8, 0];
        const WITHOUT_OPTIONS: u8 = 0x45;
        const OF_TCP: u8 = 6;
        let is_tcp = frame.len() > TCP + 20
            && frame[12..ETHERNET_LEN] == IPV4
            && frame[ETHERNET_LEN] == WITHOUT_OPTIONS
            && frame[IP_TOTAL_LEN..IP_TOTAL_LEN + 2] == ((frame.len() - ETHERNET_LEN) as u16).to_be_bytes()
            && frame[IP_FLAGS..IP_FLAGS + 2] == WHOLE
            && frame[ETHERNET_LEN + 9] == OF_TCP
            && frame[TCP + TCP_DATA_OFFSET] & 0xf == 0
            && frame[TCP + TCP_FLAGS] & !PUSHES == ACKNOWLEDGES;
        if !is_tcp {
            return None;
        }
        let tcp_len = usize::from(frame[TCP + TCP_DATA_OFFSET] >> 4) * 4;
        let (header, payload) = frame.split_at_checked(TCP + tcp_len)?;
        let is_sound = tcp_len >= 20 && !payload.is_empty() && offload::has_right_sums(frame, TCP);
        is_sound.then_some(Self {
            header,
            payload_len: payload.len(),
            sequence: u32::from_be_bytes(*header[TCP + TCP_SEQUENCE..].first_chunk()?),
            pushes: header[TCP + TCP_FLAGS] & PUSHES != 0,
        })
    }

    /// The number of the byte behind it.
    fn next(&self) -> u32 {
        self.sequence.wrapping_add(self.payload_len as u32)
    }

    /// Whether its headers say nothing else than another's, but for where it is in the conversation.
    fn is_like(&self, other: &Self) -> bool {
        // Length, number and flags of the packet have been looked at, and checksums; so have TCP's number and flags.
        let same = [
            0..IP_TOTAL_LEN,
            ETHERNET_LEN + 8..ETHERNET_LEN + 10,
            IP_ADDRESSES..TCP + TCP_SEQUENCE,
            TCP + 8..TCP + TCP_FLAGS,
            TCP + 14..TCP + 16,
            TCP + 20..self.header.len(),
        ];
        self.header.len() == other.header.len()
            && same.into_iter().all(|part| self.header[part.clone()] == other.header[part])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Offloads;

    /// Bytes of a frame to be changed, and whether its checksums are made right after that.
    type Change<'c> = (&'c [(usize, u8)], bool);

    const OPTIONS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    const BEGIN: u32 = u32::MAX - 2000;

    /// The segment behind so many bytes, the `n`th.
    fn segment(n: u16, behind: u32, payload: &[u8], options: &[u8], (change, mends): Change<'_>) -> Vec<u8> {
        let mut data = vec![0; TCP + 20];
        data[..ETHERNET_LEN].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        data[ETHERNET_LEN..TCP]
            .copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 4, 10, 0, 0, 5]);
        data[ETHERNET_LEN + 4..ETHERNET_LEN + 6].copy_from_slice(&(7 + n).to_be_bytes());
        data[TCP..TCP + 4].copy_from_slice(&[3, 232, 0, 80]);
        data[TCP + 4..TCP + 8].copy_from_slice(&BEGIN.wrapping_add(behind).to_be_bytes());
        data[TCP + TCP_DATA_OFFSET] = ((20 + options.len()) * 4) as u8;
        data[TCP + TCP_FLAGS] = ACKNOWLEDGES;
        data.extend(options);
        data.extend(payload);
        let sound = |mut data: Vec<u8>| {
            let len = data.len() - ETHERNET_LEN;
            offload::set_ip_len(&mut data, TCP, len);
            let finished = Frame::unfinished_tcp4(data, u16::MAX).finish(Offloads::NONE);
            finished.into_iter().next().map(|frame| frame.data).unwrap_or_default()
        };
        let mut data = sound(data);
        change.iter().for_each(|(at, byte)| data[*at] ^= byte);
        if mends && !change.is_empty() { sound(data) } else { data }
    }

    const NONE: Change<'_> = (&[], true);

    #[test]
    fn what_is_one_is_what_it_was_when_it_is_cut_again() {
        for options in [&[][..], &OPTIONS] {
            for lens in [&[1000][..], &[1000, 1000], &[1000, 1], &[1000, 1000, 1000, 7], &[1448; 45], &[1, 1]]
            {
                let (mut behind, mut frames) = (0, Vec::new());
                for (n, len) in lens.iter().enumerate() {
                    let pushes = (TCP + TCP_FLAGS, PUSHES * u8::from(n + 1 == lens.len()));
                    let payload: Vec<u8> = (0..*len).map(|at| (at * 7 + n) as u8).collect();
                    frames.push(segment(n as u16, behind, &payload, options, (&[pushes], true)));
                    behind += payload.len() as u32;
                }
                let mut run = Run::new(&frames[0]);
                assert!(frames[1..].iter().all(|frame| run.takes(frame)), "{lens:?}");
                let frame = run.into_frame();
                assert!(frame.is_sound() && frame.segmentation.is_some() == (lens.len() > 1));
                let again: Vec<_> =
                    frame.finish(Offloads::NONE).into_iter().map(|frame| frame.data).collect();
                assert!(again == frames, "{lens:?}");
            }
        }
    }

    #[test]
    fn what_is_not_the_same_or_not_the_next_stays_apart() {
        let payload = [3; 1000];
        let first = segment(0, 0, &payload, &OPTIONS, NONE);
        let takes = |first: &[u8], next: &[u8]| Run::new(first).takes(next);
        let next = |change: Change<'_>| segment(1, 1000, &payload, &OPTIONS, change);
        assert!(takes(&first, &next(NONE)));
        let changes: &[(&str, &[(usize, u8)])] = &[
            ("address of Ethernet", &[(0, 4)]),
            ("protocol of Ethernet", &[(12, 1)]),
            ("version", &[(ETHERNET_LEN, 0x20)]),
            ("class of service", &[(ETHERNET_LEN + 1, 1)]),
            ("may be cut", &[(IP_FLAGS, 0x40)]),
            ("is a fragment", &[(IP_FLAGS, 0x20)]),
            ("is a later fragment", &[(IP_FLAGS + 1, 1)]),
            ("hops", &[(ETHERNET_LEN + 8, 1)]),
            ("protocol", &[(ETHERNET_LEN + 9, 1)]),
            ("source", &[(IP_ADDRESSES, 1)]),
            ("destination", &[(IP_ADDRESSES + 7, 1)]),
            ("source port", &[(TCP, 1)]),
            ("destination port", &[(TCP + 3, 1)]),
            ("sequence", &[(TCP + 7, 1)]),
            ("acknowledges other", &[(TCP + 11, 1)]),
            ("reserved bits", &[(TCP + 12, 1)]),
            ("ends", &[(TCP + TCP_FLAGS, 1)]),
            ("begins", &[(TCP + TCP_FLAGS, 2)]),
            ("resets", &[(TCP + TCP_FLAGS, 4)]),
            ("acknowledges nothing", &[(TCP + TCP_FLAGS, ACKNOWLEDGES)]),
            ("is urgent", &[(TCP + TCP_FLAGS, 0x20)]),
            ("congestion", &[(TCP + TCP_FLAGS, 0x80)]),
            ("window", &[(TCP + 15, 1)]),
            ("options", &[(TCP + 27, 1)]),
        ];
        for (what, change) in changes {
            assert!(!takes(&first, &next((*change, true))), "{what}");
        }
        for (what, at) in
            [("the packet's checksum", ETHERNET_LEN + 10), ("the segment's", TCP + 17), ("a byte", TCP + 500)]
        {
            let change: Change<'_> = (&[(at, 1)], false);
            assert!(!takes(&first, &next(change)), "{what} is wrong");
            let wrong = segment(0, 0, &payload, &OPTIONS, change);
            assert!(!takes(&wrong, &next(NONE)), "{what} of the first is wrong");
        }
        let padded = [&next(NONE)[..], &[0; 6]].concat();
        let longer = segment(1, 1000, &[3; 1001], &OPTIONS, NONE);
        let (empty, without) = (segment(1, 1000, &[], &OPTIONS, NONE), segment(1, 1000, &payload, &[], NONE));
        for other in [padded, longer, empty, without, next(NONE)[..60].to_vec(), vec![], vec![0x45; 54]] {
            assert!(!takes(&first, &other));
        }
        let pushes = segment(0, 0, &payload, &OPTIONS, (&[(TCP + TCP_FLAGS, PUSHES)], true));
        assert!(!takes(&pushes, &next(NONE)), "nothing follows what is pushed");
        let shorter = segment(1, 1000, &[3; 999], &OPTIONS, NONE);
        let mut run = Run::new(&first);
        assert!(run.takes(&shorter) && !run.takes(&segment(2, 1999, &[3; 999], &OPTIONS, NONE)));
    }

    #[test]
    fn a_run_is_no_longer_than_a_packet() {
        let frames: Vec<_> =
            (0..70).map(|n| segment(n, u32::from(n) * 1000, &[1; 1000], &[], NONE)).collect();
        let mut run = Run::new(&frames[0]);
        let taken = 1 + frames[1..].iter().take_while(|frame| run.takes(frame)).count();
        assert_eq!((taken, run.into_frame().data.len()), (65, 54 + 65_000));
    }
}
