//! What a sender has left to be done to a frame, done for a receiver that does not take it so.

use instance_core::net::{Checksum, Frame, Offloads, Protocol, Segmentation};
use smoltcp::wire::Ipv4Packet;

use crate::packet::ETHERNET_LEN;

/// Where TCP's flags are in its header, and which of them only the last, or the first, of several packets has.
const TCP_FLAGS: usize = 13;
const FIN_AND_PUSH: u8 = 0x01 | 0x08;
const CONGESTION_REDUCED: u8 = 0x80;
/// Where TCP's sequence number and its checksum are.
const TCP_SEQUENCE: usize = 4;
const TCP_CHECKSUM: usize = 16;
/// Where it says how long it is, in words.
const TCP_DATA_OFFSET: usize = 12;
/// A header without options.
const TCP_SHORTEST: usize = 20;

/// The frame, or what it is cut into, as an end that takes `takes` takes them. None of a frame that cannot be
/// made such.
pub(crate) fn finish(frame: Frame, takes: Offloads) -> Vec<Frame> {
    if !frame.is_sound() {
        return Vec::new();
    }
    if frame.is_taken_by(takes) {
        return vec![frame];
    }
    if frame.segmentation.is_some() {
        return segments(&frame).unwrap_or_default();
    }
    match frame.checksum {
        Checksum::Partial { start, offset } => vec![completed(frame, start.into(), offset.into())],
        Checksum::Complete | Checksum::Verified => vec![frame],
    }
}

/// Adds what is missing of a checksum (virtio 1.2, 5.1.6.2).
fn completed(mut frame: Frame, start: usize, offset: usize) -> Frame {
    let sum = !sum(&frame.data[start..], 0);
    // In UDP, zero says that there is none.
    let sum = if sum == 0 { 0xffff } else { sum };
    frame.data[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    frame.checksum = Checksum::Complete;
    frame
}

/// Cuts a long frame of TCP over IPv4.
fn segments(frame: &Frame) -> Option<Vec<Frame>> {
    let cut = frame.segmentation?;
    let Checksum::Partial { start, .. } = frame.checksum else { return None };
    let (tcp, header_len) = (usize::from(start), usize::from(cut.header_len));
    // The IP header ends where TCP's begins, or a segment may be shorter than it says that its header is.
    let ip_len = usize::from(frame.data.get(ETHERNET_LEN)? & 0xf) * 4;
    let is_ipv4 = ip_len >= 20 && tcp == ETHERNET_LEN + ip_len && tcp + TCP_SHORTEST <= header_len;
    let (header, payload) = frame.data.split_at_checked(header_len).filter(|_| is_ipv4)?;
    let sequence = u32::from_be_bytes(*header[tcp + TCP_SEQUENCE..].first_chunk()?);
    let id = u16::from_be_bytes(*header[ETHERNET_LEN + 4..].first_chunk()?);
    let size = usize::from(cut.size).max(1);
    let count = payload.len().div_ceil(size);
    let segment = |(n, part): (usize, &[u8])| {
        let mut data = [header, part].concat();
        let flags = &mut data[tcp + TCP_FLAGS];
        if n + 1 < count {
            *flags &= !FIN_AND_PUSH;
        }
        if n > 0 {
            *flags &= !CONGESTION_REDUCED;
        }
        let at = sequence.wrapping_add((n * size) as u32).to_be_bytes();
        data[tcp + TCP_SEQUENCE..tcp + TCP_SEQUENCE + 4].copy_from_slice(&at);
        let transport_len = (data.len() - tcp) as u16;
        let mut ip = Ipv4Packet::new_unchecked(&mut data[ETHERNET_LEN..]);
        ip.set_total_len((tcp - ETHERNET_LEN) as u16 + transport_len);
        ip.set_ident(id.wrapping_add(n as u16));
        ip.fill_checksum();
        // The pseudo-header's length is the segment's own.
        let pseudo = pseudo_sum(&data[ETHERNET_LEN + 12..ETHERNET_LEN + 20], transport_len.into());
        data[tcp + TCP_CHECKSUM..tcp + TCP_CHECKSUM + 2].fill(0);
        let checksum = !sum(&data[tcp..], pseudo.into());
        data[tcp + TCP_CHECKSUM..tcp + TCP_CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());
        Frame::new(data)
    };
    Some(payload.chunks(size).enumerate().map(segment).collect())
}

/// The Internet checksum's sum (RFC 1071), not yet inverted. It is the same in whatever order a word's bytes are added.
fn sum(bytes: &[u8], start: u32) -> u16 {
    let (words, rest) = bytes.split_at(bytes.len() & !3);
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    let words =
        words.chunks_exact(4).map(|word| u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]])));
    let sum = words.sum::<u64>() + u64::from(u32::from_ne_bytes(last));
    fold(u64::from(u16::from_be(fold(sum))) + u64::from(start))
}

/// The sum of a number's parts of 16 bits.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What the checksum field of a TCP segment over IPv4 holds whose checksum is left to be completed: the sum of the
/// pseudo-header.
fn pseudo_sum(addresses: &[u8], transport_len: usize) -> u16 {
    const TCP: u32 = 6;
    sum(addresses, TCP + transport_len as u32)
}

/// A frame of TCP over IPv4 that carries segments of `size` bytes at most, with what it leaves to be done: its checksum
/// and, if it is longer, its cutting.
pub(crate) fn left_to_do(mut data: Vec<u8>, size: u16) -> Frame {
    let ip_len = data.get(ETHERNET_LEN).map_or(0, |first| usize::from(first & 0xf) * 4);
    let tcp = ETHERNET_LEN + ip_len;
    let Some(offset) = data.get(tcp + TCP_DATA_OFFSET).map(|byte| usize::from(byte >> 4) * 4) else {
        return Frame::new(data);
    };
    let pseudo = pseudo_sum(&data[ETHERNET_LEN + 12..ETHERNET_LEN + 20], data.len() - tcp);
    data[tcp + TCP_CHECKSUM..tcp + TCP_CHECKSUM + 2].copy_from_slice(&pseudo.to_be_bytes());
    let header_len = tcp + offset;
    // Options go off what a segment carries.
    let size = size.saturating_sub(offset.saturating_sub(TCP_SHORTEST) as u16).max(1);
    let is_long = data.len() > header_len + usize::from(size);
    let mut frame = Frame::new(data);
    frame.checksum = Checksum::Partial { start: tcp as u16, offset: TCP_CHECKSUM as u16 };
    frame.segmentation =
        is_long.then_some(Segmentation { protocol: Protocol::Tcp4, size, header_len: header_len as u16 });
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{
        IpAddress, IpProtocol, Ipv4Address, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    };

    const FROM: Ipv4Address = Ipv4Address::new(10, 0, 0, 4);
    const TO: Ipv4Address = Ipv4Address::new(10, 0, 0, 5);

    /// A frame of TCP as a guest leaves it, with the sum of the pseudo-header alone.
    fn partial(payload: &[u8]) -> Frame {
        let tcp = TcpRepr {
            src_port: 1000,
            dst_port: 80,
            control: TcpControl::Psh,
            seq_number: TcpSeqNumber(-5),
            ack_number: Some(TcpSeqNumber(7)),
            window_len: 100,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        let len = tcp.buffer_len();
        let ip = Ipv4Repr {
            src_addr: FROM,
            dst_addr: TO,
            next_header: IpProtocol::Tcp,
            payload_len: len,
            hop_limit: 64,
        };
        let mut data = vec![0; ETHERNET_LEN + 20 + len];
        data[12..14].copy_from_slice(&[8, 0]);
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut data[ETHERNET_LEN..]), &ChecksumCapabilities::default());
        tcp.emit(
            &mut TcpPacket::new_unchecked(&mut data[34..]),
            &FROM.into(),
            &TO.into(),
            &ChecksumCapabilities::ignored(),
        );
        let pseudo = sum(&data[26..34], 6 + len as u32);
        data[50..52].copy_from_slice(&pseudo.to_be_bytes());
        let mut frame = Frame::new(data);
        frame.checksum = Checksum::Partial { start: 34, offset: 16 };
        frame
    }

    fn tcp(frame: &Frame) -> TcpPacket<&[u8]> {
        let ip = Ipv4Packet::new_checked(&frame.data[ETHERNET_LEN..]).unwrap();
        assert!(ip.verify_checksum());
        let tcp = TcpPacket::new_checked(&frame.data[34..]).unwrap();
        assert!(tcp.verify_checksum(&IpAddress::from(FROM), &IpAddress::from(TO)));
        tcp
    }

    #[test]
    fn a_checksum_is_completed() {
        for len in [0, 1, 2, 99, 1460] {
            let done = finish(partial(&vec![3; len]), Offloads::NONE);
            assert_eq!((done.len(), done[0].checksum), (1, Checksum::Complete));
            assert_eq!(tcp(&done[0]).payload(), vec![3; len]);
        }
    }

    #[test]
    fn what_is_left_to_do_is_what_a_driver_leaves() {
        for (len, size, is_long) in [(0, 1460, false), (1460, 1460, false), (1461, 1460, true), (9, 0, true)]
        {
            let expect = partial(&vec![3; len]);
            let mut data = expect.data.clone();
            data[50..52].fill(0);
            let mut frame = left_to_do(data, size);
            let cut = frame.segmentation.take().map(|cut| (cut.size, cut.header_len));
            assert_eq!((frame, cut), (expect, is_long.then_some((size.max(1), 54))));
        }
        // What has no such header is left alone.
        assert_eq!(left_to_do(vec![0x45; 20], 1460), Frame::new(vec![0x45; 20]));
    }

    #[test]
    fn a_sum_is_that_of_its_words() {
        for len in 0..70 {
            let bytes: Vec<u8> = (0..len).map(|n| (n * 37 + 200) as u8).collect();
            let words = bytes.chunks(2).map(|pair| [pair[0], *pair.get(1).unwrap_or(&0)]);
            let plain: u32 = words.map(|word| u32::from(u16::from_be_bytes(word))).sum();
            for start in [0, 6, 0xffff, 0x12345] {
                assert_eq!(sum(&bytes, start) % 0xffff, ((plain + start) % 0xffff) as u16, "{len} {start}");
            }
        }
    }

    #[test]
    fn a_long_frame_is_cut() {
        let payload: Vec<u8> = (0..5000).map(|n| (n / 7) as u8).collect();
        let mut frame = partial(&payload);
        frame.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size: 1460, header_len: 54 });
        let done = finish(frame.clone(), Offloads::NONE);
        assert_eq!(done.len(), 4);
        let mut whole: Vec<u8> = Vec::new();
        for (n, segment) in done.iter().enumerate() {
            let tcp = tcp(segment);
            assert_eq!(tcp.seq_number(), TcpSeqNumber(-5) + whole.len());
            assert_eq!(tcp.psh(), n == 3);
            whole.extend(tcp.payload());
        }
        assert_eq!(whole, payload);
        assert_eq!(finish(frame.clone(), Offloads::ALL), [frame]);
    }

    #[test]
    fn a_header_that_is_longer_than_its_segment_is_dropped() {
        let mut frame = partial(&[1; 3000]);
        frame.data[ETHERNET_LEN] = 0x4f;
        frame.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size: 3, header_len: 54 });
        assert_eq!(finish(frame, Offloads::NONE), []);
    }

    #[test]
    fn what_lies_is_dropped() {
        let mut frame = partial(&[1; 3000]);
        for (start, header_len, size) in
            [(34, 20, 1460), (20, 54, 1460), (34, 4000, 1460), (34, 54, 0), (60000, 54, 100)]
        {
            frame.checksum = Checksum::Partial { start, offset: 16 };
            frame.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size, header_len });
            assert_eq!(finish(frame.clone(), Offloads::NONE), [], "{start} {header_len} {size}");
        }
    }
}
