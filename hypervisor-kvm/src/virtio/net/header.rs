//! What stands before each frame in a buffer: what is left to be done with it.

use instance_core::net::{Checksum, Frame, Protocol, Segmentation};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use crate::virtio::chain::Malformed;

/// The bytes of a header.
pub(super) const HEADER_LEN: usize = 12;

/// `struct virtio_net_hdr` (virtio 1.2, 5.1.6).
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    pub(super) fn parse(bytes: [u8; HEADER_LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    pub(super) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }

    /// What a guest that accepted `features` is told of a frame that it takes.
    pub(super) fn of(frame: &Frame, features: u64, num_buffers: u16) -> Self {
        let mut header = Self { num_buffers, ..Self::default() };
        match frame.checksum {
            Checksum::Partial { start, offset } => {
                header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
                (header.csum_start, header.csum_offset) = (start, offset);
            }
            Checksum::Verified if features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0 => {
                header.flags = VIRTIO_NET_HDR_F_DATA_VALID as u8;
            }
            Checksum::Verified | Checksum::Complete => {}
        }
        if let Some(cut) = frame.segmentation {
            header.gso_type = match cut.protocol {
                Protocol::Tcp4 => VIRTIO_NET_HDR_GSO_TCPV4,
                Protocol::Tcp6 => VIRTIO_NET_HDR_GSO_TCPV6,
                // Not among what is taken.
                _ => VIRTIO_NET_HDR_GSO_NONE,
            } as u8;
            (header.gso_size, header.hdr_len) = (cut.size, cut.header_len);
        }
        header
    }

    /// Marks a frame of a driver that accepted `features` with what it has left to be done. What it may not leave
    /// is against the rules (5.1.6.2.1).
    pub(super) fn apply(&self, frame: &mut Frame, features: u64) -> Result<(), Malformed> {
        let accepted = |bit: u32| features & 1 << bit != 0;
        let needs_checksum = self.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 != 0;
        if needs_checksum {
            if !accepted(VIRTIO_NET_F_CSUM) {
                return Err(Malformed("a checksum is left to be computed that may not be"));
            }
            frame.checksum = Checksum::Partial { start: self.csum_start, offset: self.csum_offset };
        }
        let (protocol, feature) = match u32::from(self.gso_type) {
            VIRTIO_NET_HDR_GSO_NONE => return Ok(()),
            VIRTIO_NET_HDR_GSO_TCPV4 => (Protocol::Tcp4, VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => (Protocol::Tcp6, VIRTIO_NET_F_HOST_TSO6),
            _ => return Err(Malformed("a frame is to be cut in a way that was not offered")),
        };
        if !needs_checksum || !accepted(feature) {
            return Err(Malformed("a frame is left to be cut that may not be"));
        }
        frame.segmentation =
            Some(Segmentation::of_tcp(&frame.data, self.csum_start, protocol, self.gso_size));
        Ok(())
    }
}
