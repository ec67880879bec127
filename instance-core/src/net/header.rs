//! What stands before each frame on a TAP device: what is left to be done with it, as virtio has it.

use super::{Checksum, Frame, Protocol, Segmentation};

/// The bytes of `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), little-endian.
pub(super) const HEADER_LEN: usize = 12;

const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const NOT_CUT: u8 = 0;
const TCP4: u8 = 1;
const TCP6: u8 = 4;

/// The header of a frame.
pub(super) fn header_of(frame: &Frame) -> [u8; HEADER_LEN] {
    let (flags, start, offset) = match frame.checksum {
        Checksum::Complete => (0, 0, 0),
        Checksum::Verified => (DATA_VALID, 0, 0),
        Checksum::Partial { start, offset } => (NEEDS_CHECKSUM, start, offset),
    };
    let (kind, header_len, size) = match frame.segmentation {
        None => (NOT_CUT, 0, 0),
        Some(Segmentation { protocol: Protocol::Tcp4, size, header_len }) => (TCP4, header_len, size),
        Some(Segmentation { protocol: Protocol::Tcp6, size, header_len }) => (TCP6, header_len, size),
    };
    let [h0, h1] = header_len.to_le_bytes();
    let [g0, g1] = size.to_le_bytes();
    let [s0, s1] = start.to_le_bytes();
    let [o0, o1] = offset.to_le_bytes();
    [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1, 0, 0]
}

/// The frame behind a header. None where there is none, or it is to be cut in a way that no port knows, or without a
/// checksum to be completed, as no device may have it (virtio 1.2, 5.1.6.4.1).
pub(super) fn frame_of(bytes: &[u8]) -> Option<Frame> {
    let (header, data) = bytes.split_first_chunk::<HEADER_LEN>()?;
    // How long the headers are is what the kernel has in one piece of memory, which may be more or less.
    let [flags, kind, _, _, g0, g1, s0, s1, o0, o1, ..] = *header;
    let (start, offset) = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([o0, o1]));
    let mut frame = Frame::new(data.to_vec());
    if flags & NEEDS_CHECKSUM != 0 {
        frame.checksum = Checksum::Partial { start, offset };
    } else if flags & DATA_VALID != 0 {
        frame.checksum = Checksum::Verified;
    }
    let protocol = match kind {
        NOT_CUT => return Some(frame),
        TCP4 if flags & NEEDS_CHECKSUM != 0 => Protocol::Tcp4,
        TCP6 if flags & NEEDS_CHECKSUM != 0 => Protocol::Tcp6,
        _ => return None,
    };
    let size = u16::from_le_bytes([g0, g1]);
    frame.segmentation = Some(Segmentation::of_tcp(&frame.data, start, protocol, size));
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Offloads;

    #[test]
    fn a_frame_comes_back_as_it_went() {
        let partial = Checksum::Partial { start: 34, offset: 16 };
        let cut = |protocol| Some(Segmentation { protocol, size: 1448, header_len: 66 });
        for (checksum, segmentation) in [
            (Checksum::Complete, None),
            (Checksum::Verified, None),
            (partial, None),
            (partial, cut(Protocol::Tcp4)),
            (partial, cut(Protocol::Tcp6)),
        ] {
            let mut frame = Frame { checksum, segmentation, ..Frame::new((0..100).collect()) };
            frame.data[46] = 0x80; // a TCP header of eight words
            let bytes = [&header_of(&frame)[..], &frame.data].concat();
            assert_eq!(frame_of(&bytes), Some(frame));
        }
    }

    #[test]
    fn how_long_the_headers_are_is_seen_in_them() {
        let mut data = vec![0; 54 + 3000];
        (data[14], data[46]) = (0x45, 0x50);
        let frame = Frame::unfinished_tcp4(data, 1460);
        for hint in [0u16, 34, 66, 3054, u16::MAX] {
            let mut bytes = [&header_of(&frame)[..], &frame.data].concat();
            bytes[2..4].copy_from_slice(&hint.to_le_bytes());
            let came = frame_of(&bytes).unwrap_or_default();
            assert!(came.is_sound() && came.finish(Offloads::NONE).len() == 3, "{hint}");
        }
    }

    #[test]
    fn the_header_is_that_of_virtio() {
        let mut frame = Frame::new(vec![0; 60]);
        frame.checksum = Checksum::Partial { start: 0x0122, offset: 0x0310 };
        frame.segmentation =
            Some(Segmentation { protocol: Protocol::Tcp6, size: 0x0504, header_len: 0x0706 });
        assert_eq!(header_of(&frame), [1, 4, 0x06, 0x07, 0x04, 0x05, 0x22, 0x01, 0x10, 0x03, 0, 0]);
    }

    #[test]
    fn what_is_no_frame_is_none() {
        assert_eq!(frame_of(&[0; HEADER_LEN - 1]), None);
        let udp = 3;
        assert_eq!(frame_of(&[DATA_VALID, TCP4, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]), None);
        assert_eq!(frame_of(&[0, udp, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]), None);
        assert_eq!(frame_of(&[0; HEADER_LEN]), Some(Frame::default()));
    }
}
