//! What a sender has left to be done to a frame, done for a receiver that does not take it so.

use super::{Checksum, Frame, Offloads, Protocol, Segmentation};

/// The bytes of an Ethernet header.
pub(super) const ETHERNET_LEN: usize = 14;

/// Where an IPv4 header says how long the packet is, its number, its checksum and its addresses.
pub(super) const IP_TOTAL_LEN: usize = ETHERNET_LEN + 2;
const IP_ID: usize = ETHERNET_LEN + 4;
const IP_CHECKSUM: usize = ETHERNET_LEN + 10;
pub(super) const IP_ADDRESSES: usize = ETHERNET_LEN + 12;
/// Where TCP's flags are in its header, and which of them only the last, or the first, of several packets has.
pub(super) const TCP_FLAGS: usize = 13;
const FIN_AND_PUSH: u8 = 0x01 | 0x08;
const CONGESTION_REDUCED: u8 = 0x80;
/// Where TCP's sequence number and its checksum are.
pub(super) const TCP_SEQUENCE: usize = 4;
const TCP_CHECKSUM: usize = 16;
/// Where it says how long it is, in words.
pub(super) const TCP_DATA_OFFSET: usize = 12;
/// A header without options.
const TCP_SHORTEST: usize = 20;

impl Frame {
    /// The frame, or what it is cut into, as an end that takes `takes` takes them. None of a frame that cannot be
    /// made such.
    ///
    /// ```
    /// use instance_core::net::{Checksum, Frame, Offloads};
    ///
    /// let mut frame = Frame::new(vec![0; 60]);
    /// frame.checksum = Checksum::Partial { start: 34, offset: 6 };
    /// assert_eq!(frame.clone().finish(Offloads::ALL), [frame.clone()]);
    /// assert_eq!(frame.finish(Offloads::NONE)[0].data[40..42], [0xff, 0xff]);
    /// ```
    pub fn finish(self, takes: Offloads) -> Vec<Self> {
        if self.is_sound() && self.is_taken_by(takes) {
            return vec![self];
        }
        let mut finished = Vec::new();
        self.finish_into(|header, payload| finished.push(Self::new([header, payload].concat())));
        finished
    }

    /// Gives the frame, or what it is cut into, to `each`, with nothing left to be done. The two parts of each are behind
    /// one another, so that who copies them copies them once.
    pub(super) fn finish_into(mut self, mut each: impl FnMut(&[u8], &[u8])) {
        if !self.is_sound() {
            return;
        }
        match (self.segmentation, self.checksum) {
            (Some(cut), Checksum::Partial { start, .. }) => {
                segments(&self.data, cut, start.into(), each);
            }
            (Some(_), _) => {}
            (None, Checksum::Partial { start, offset }) => {
                complete(&mut self.data, start.into(), offset.into());
                each(&self.data, &[]);
            }
            (None, _) => each(&self.data, &[]),
        }
    }

    /// A frame of TCP over IPv4 that carries segments of `size` bytes at most, with what it leaves to be done: its
    /// checksum and, if it is longer, its cutting. What is no such frame is left as it is.
    ///
    /// ```
    /// use instance_core::net::Frame;
    ///
    /// let mut data = vec![0; 54 + 3000];
    /// (data[14], data[46]) = (0x45, 0x50); // headers of 20 bytes each
    /// let frame = Frame::unfinished_tcp4(data, 1460);
    /// assert_eq!(frame.segmentation.map(|cut| (cut.size, cut.header_len)), Some((1460, 54)));
    /// ```
    pub fn unfinished_tcp4(mut data: Vec<u8>, size: u16) -> Self {
        let ip_len = data.get(ETHERNET_LEN).map_or(0, |first| usize::from(first & 0xf) * 4);
        let tcp = ETHERNET_LEN + ip_len;
        let Some(offset) = data.get(tcp + TCP_DATA_OFFSET).map(|byte| usize::from(byte >> 4) * 4) else {
            return Self::new(data);
        };
        if data.len() < tcp + TCP_SHORTEST {
            return Self::new(data);
        }
        let pseudo = pseudo_sum(&data[IP_ADDRESSES..IP_ADDRESSES + 8], data.len() - tcp);
        data[tcp + TCP_CHECKSUM..tcp + TCP_CHECKSUM + 2].copy_from_slice(&pseudo.to_be_bytes());
        let header_len = tcp + offset;
        // Options go off what a segment carries.
        let size = size.saturating_sub(offset.saturating_sub(TCP_SHORTEST) as u16).max(1);
        let is_long = data.len() > header_len + usize::from(size);
        let mut frame = Self::new(data);
        frame.checksum = Checksum::Partial { start: tcp as u16, offset: TCP_CHECKSUM as u16 };
        frame.segmentation =
            is_long.then_some(Segmentation { protocol: Protocol::Tcp4, size, header_len: header_len as u16 });
        frame
    }
}

/// Has an IPv4 header, which ends before `end`, say that its packet is so long.
pub(super) fn set_ip_len(header: &mut [u8], end: usize, len: usize) {
    header[IP_TOTAL_LEN..IP_TOTAL_LEN + 2].copy_from_slice(&(len as u16).to_be_bytes());
    header[IP_CHECKSUM..IP_CHECKSUM + 2].fill(0);
    let sum = !sum(&header[ETHERNET_LEN..end], 0);
    header[IP_CHECKSUM..IP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Whether the checksums of a frame of TCP over IPv4 are right whose TCP header begins at `tcp`.
pub(super) fn has_right_sums(frame: &[u8], tcp: usize) -> bool {
    const RIGHT: u16 = 0xffff;
    let pseudo = pseudo_sum(&frame[IP_ADDRESSES..IP_ADDRESSES + 8], frame.len() - tcp);
    sum(&frame[ETHERNET_LEN..tcp], 0) == RIGHT && sum(&frame[tcp..], pseudo.into()) == RIGHT
}

/// Adds what is missing of a checksum (virtio 1.2, 5.1.6.2).
fn complete(data: &mut [u8], start: usize, offset: usize) {
    let sum = !sum(&data[start..], 0);
    // In UDP, zero says that there is none.
    let sum = if sum == 0 { 0xffff } else { sum };
    data[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Cuts a long frame of TCP over IPv4.
fn segments(data: &[u8], cut: Segmentation, tcp: usize, mut each: impl FnMut(&[u8], &[u8])) -> Option<()> {
    let header_len = usize::from(cut.header_len);
    // The headers end where they say that they do, or a segment may be shorter than they say.
    let ip_len = usize::from(data.get(ETHERNET_LEN)? & 0xf) * 4;
    let tcp_len = usize::from(data.get(tcp + TCP_DATA_OFFSET)? >> 4) * 4;
    let is_ipv4 = ip_len >= 20 && tcp == ETHERNET_LEN + ip_len;
    let is_whole = is_ipv4 && tcp_len >= TCP_SHORTEST && header_len == tcp + tcp_len;
    let (header, payload) = data.split_at_checked(header_len).filter(|_| is_whole)?;
    let mut header = header.to_vec();
    let sequence = u32::from_be_bytes(*header[tcp + TCP_SEQUENCE..].first_chunk()?);
    let id = u16::from_be_bytes(*header[IP_ID..].first_chunk()?);
    let flags = header[tcp + TCP_FLAGS];
    let size = usize::from(cut.size).max(1);
    let count = payload.len().div_ceil(size);
    for (n, part) in payload.chunks(size).enumerate() {
        let mut put = |at: usize, word: u16| header[at..at + 2].copy_from_slice(&word.to_be_bytes());
        put(IP_ID, id.wrapping_add(n as u16));
        put(tcp + TCP_CHECKSUM, 0);
        let at = sequence.wrapping_add((n * size) as u32).to_be_bytes();
        header[tcp + TCP_SEQUENCE..tcp + TCP_SEQUENCE + 4].copy_from_slice(&at);
        let not_here =
            (if n + 1 < count { FIN_AND_PUSH } else { 0 }) | (if n > 0 { CONGESTION_REDUCED } else { 0 });
        header[tcp + TCP_FLAGS] = flags & !not_here;
        set_ip_len(&mut header, tcp, header_len - ETHERNET_LEN + part.len());
        // The pseudo-header's length is the segment's own.
        let pseudo = pseudo_sum(&header[IP_ADDRESSES..IP_ADDRESSES + 8], tcp_len + part.len());
        let of_tcp = !sum(part, sum(&header[tcp..], pseudo.into()).into());
        header[tcp + TCP_CHECKSUM..tcp + TCP_CHECKSUM + 2].copy_from_slice(&of_tcp.to_be_bytes());
        each(&header, part);
    }
    Some(())
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
mod tests {
    use super::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{
        IpAddress, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr,
        TcpSeqNumber,
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
            let done = partial(&vec![3; len]).finish(Offloads::NONE);
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
            let mut frame = Frame::unfinished_tcp4(data, size);
            let cut = frame.segmentation.take().map(|cut| (cut.size, cut.header_len));
            assert_eq!((frame, cut), (expect, is_long.then_some((size.max(1), 54))));
        }
        // What has no such header is left alone.
        assert_eq!(Frame::unfinished_tcp4(vec![0x45; 20], 1460), Frame::new(vec![0x45; 20]));
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
        let done = frame.clone().finish(Offloads::NONE);
        assert_eq!(done.len(), 4);
        let mut whole: Vec<u8> = Vec::new();
        for (n, segment) in done.iter().enumerate() {
            let tcp = tcp(segment);
            assert_eq!(tcp.seq_number(), TcpSeqNumber(-5) + whole.len());
            assert_eq!(tcp.psh(), n == 3);
            whole.extend(tcp.payload());
        }
        assert_eq!(whole, payload);
        assert_eq!(frame.clone().finish(Offloads::ALL), [frame]);
    }

    #[test]
    fn a_header_that_is_longer_than_its_segment_is_dropped() {
        let mut frame = partial(&[1; 3000]);
        frame.data[ETHERNET_LEN] = 0x4f;
        frame.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size: 3, header_len: 54 });
        assert_eq!(frame.finish(Offloads::NONE), []);
    }

    #[test]
    fn what_lies_is_dropped() {
        let mut frame = partial(&[1; 3000]);
        for (start, header_len, size) in
            [(34, 20, 1460), (20, 54, 1460), (34, 4000, 1460), (34, 54, 0), (60000, 54, 100)]
        {
            frame.checksum = Checksum::Partial { start, offset: 16 };
            frame.segmentation = Some(Segmentation { protocol: Protocol::Tcp4, size, header_len });
            assert_eq!(frame.clone().finish(Offloads::NONE), [], "{start} {header_len} {size}");
        }
    }
}
