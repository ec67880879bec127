//! The virtio network device (virtio 1.2, 5.1): a queue of frames to the guest and one from it.
//!
//! Frames go through a [`NetPort`]. What the network takes of checksums to be computed and long frames to be
//! cut is offered to the driver, and what the driver takes is told to the network.

use std::iter;

use instance_core::machine::NetSpec;
use instance_core::net::{Checksum, Frame, NetPort, Offloads, Protocol, Segmentation, SendError};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_S_LINK_UP,
};

use super::chain::{Chain, Malformed};
use super::device::Device;
use super::ring::Running;

/// The queue of frames to the guest.
pub(super) const RECEIVE: usize = 0;
/// The queue of frames from the guest.
pub(super) const TRANSMIT: usize = 1;

/// `struct virtio_net_hdr`, which stands before each frame.
const HEADER_LEN: usize = 12;
/// Addresses and type: what every frame has.
const ETHERNET_LEN: usize = 14;
/// With a VLAN tag.
const ETHERNET_MAX: usize = ETHERNET_LEN + 4;

/// How many frames are moved before the driver and other queues have their turn.
const BATCH: usize = 64;

/// A network device.
#[derive(Debug)]
pub(crate) struct Net {
    /// None when the machine has ended.
    port: Option<NetPort>,
    spec: Config,
    /// What the network took when the machine was made, which is what is offered.
    offered: Offloads,
    /// The frame that the guest has no buffers for yet.
    inbound: Option<Frame>,
    /// The frame that the network has no room for yet.
    outbound: Option<Frame>,
}

#[derive(Debug)]
struct Config {
    mac: [u8; 6],
    mtu: u16,
}

/// What became of a frame for the guest.
enum Delivery {
    Delivered,
    /// It does not fit into what the driver offers, and is lost.
    Dropped,
    /// The driver has not offered enough yet.
    NoRoom(Frame),
}

impl Net {
    /// A device that is plugged in as `spec` says.
    pub(crate) fn new(spec: &NetSpec) -> Self {
        let config = Config { mac: spec.mac.0, mtu: spec.mtu };
        let offered = spec.port.peer_takes();
        Self { port: Some(spec.port.clone()), spec: config, offered, inbound: None, outbound: None }
    }

    /// Moves frames from the network to the driver. False if there is nothing to do before the next frame or
    /// buffer.
    fn receive(&mut self, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Some(port) = self.port.clone() else { return Ok(false) };
        let takes = taken_by_driver(features);
        if port.takes() != takes {
            port.set_takes(takes);
        }
        for _ in 0..BATCH {
            let Some(frame) = self.inbound.take().or_else(|| port.recv()) else { return Ok(false) };
            if !frame.is_sound() || !frame.is_taken_by(takes) || !self.spec.is_short_enough(&frame) {
                tracing::trace!("a frame for a guest is not one that it takes");
                continue;
            }
            if let Delivery::NoRoom(frame) = deliver(frame, ring, features)? {
                self.inbound = Some(frame);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Moves frames from the driver to the network. False if there is nothing to do before the next frame, or
    /// before the network has room.
    fn transmit(&mut self, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Some(port) = self.port.clone() else { return Ok(false) };
        for _ in 0..BATCH {
            if let Some(frame) = self.outbound.take() {
                if let Err(SendError::Full(frame)) = port.send(frame) {
                    self.outbound = Some(frame);
                    return Ok(false);
                }
            }
            let Some(chain) = ring.next()? else { return Ok(false) };
            self.outbound = self.take_frame(&chain, ring, features)?;
            ring.put_used(&chain, 0)?;
        }
        Ok(true)
    }

    /// Copies the frame of a chain, once. None where it is not one for the network.
    fn take_frame(
        &self,
        chain: &Chain,
        ring: &Running<'_>,
        features: u64,
    ) -> Result<Option<Frame>, Malformed> {
        if chain.writable.len() > 0 {
            return Err(Malformed("a frame's buffers are not for reading"));
        }
        let mut header = [0; HEADER_LEN];
        chain.readable.read(ring.memory(), 0, &mut header).map_err(|_| Malformed("a frame has no header"))?;
        let len = chain.readable.len() - HEADER_LEN as u64;
        if len < ETHERNET_LEN as u64 || len > Frame::MAX_LEN as u64 {
            return Ok(None);
        }
        let mut frame = Frame::new(chain.readable.to_vec(ring.memory(), HEADER_LEN as u64, len as usize)?);
        Header::parse(header).apply(&mut frame, features)?;
        let sound = frame.is_sound() && frame.is_taken_by(self.offered) && self.spec.is_short_enough(&frame);
        Ok(sound.then_some(frame))
    }
}

impl Config {
    /// `struct virtio_net_config`, as far as features of it are offered.
    fn bytes(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }

    fn is_short_enough(&self, frame: &Frame) -> bool {
        frame.segmentation.is_some() || frame.data.len() <= usize::from(self.mtu) + ETHERNET_MAX
    }
}

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let Offloads { checksum, tcp4, tcp6, .. } = self.offered;
        let bits = [
            (VIRTIO_NET_F_MAC, true),
            (VIRTIO_NET_F_STATUS, true),
            (VIRTIO_NET_F_MTU, true),
            (VIRTIO_NET_F_MRG_RXBUF, true),
            (VIRTIO_NET_F_GUEST_CSUM, true),
            (VIRTIO_NET_F_GUEST_TSO4, true),
            (VIRTIO_NET_F_GUEST_TSO6, true),
            (VIRTIO_NET_F_CSUM, checksum),
            (VIRTIO_NET_F_HOST_TSO4, checksum && tcp4),
            (VIRTIO_NET_F_HOST_TSO6, checksum && tcp6),
        ];
        bits.into_iter().filter(|(_, offered)| *offered).fold(0, |features, (bit, _)| features | 1 << bit)
    }

    fn queues(&self) -> usize {
        2
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.spec.bytes();
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn serve(&mut self, queue: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        match queue {
            RECEIVE => self.receive(ring, features),
            TRANSMIT => self.transmit(ring, features),
            _ => Ok(false),
        }
    }

    /// The frames that wait are lost, as on a cable that was pulled.
    fn reset(&mut self) {
        (self.inbound, self.outbound) = (None, None);
        if let Some(port) = &self.port {
            port.set_takes(Offloads::NONE);
            let waiting = port.waiting();
            iter::from_fn(|| port.recv()).take(waiting).for_each(drop);
        }
    }

    fn end(&mut self) {
        if let Some(port) = self.port.take() {
            port.set_waker(None);
        }
    }
}

/// What the driver takes, by the features that it accepted.
fn taken_by_driver(features: u64) -> Offloads {
    let accepted = |bit: u32| features & 1 << bit != 0;
    let checksum = accepted(VIRTIO_NET_F_GUEST_CSUM);
    let mut takes = Offloads::NONE;
    takes.checksum = checksum;
    takes.tcp4 = checksum && accepted(VIRTIO_NET_F_GUEST_TSO4);
    takes.tcp6 = checksum && accepted(VIRTIO_NET_F_GUEST_TSO6);
    takes
}

/// Writes a frame into the driver's next buffers: into one or, if it takes them so, into several.
fn deliver(frame: Frame, ring: &mut Running<'_>, features: u64) -> Result<Delivery, Malformed> {
    let merge = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
    let needed = (HEADER_LEN + frame.data.len()) as u64;
    let (mut chains, mut room) = (Vec::new(), 0);
    while room < needed && (merge || chains.is_empty()) {
        let Some(chain) = ring.next()? else {
            ring.put_back(chains.len() as u16);
            return Ok(Delivery::NoRoom(frame));
        };
        if chain.readable.len() > 0 {
            return Err(Malformed("a buffer for frames is not for writing"));
        }
        if chains.is_empty() && chain.writable.len() < HEADER_LEN as u64 {
            return Err(Malformed("a buffer for frames is shorter than their header"));
        }
        room += chain.writable.len();
        chains.push(chain);
    }
    if room < needed {
        ring.put_back(chains.len() as u16);
        return Ok(Delivery::Dropped);
    }
    let header = Header::of(&frame, features, chains.len() as u16).to_bytes();
    let mut rest = &frame.data[..];
    let mut used = Vec::with_capacity(chains.len());
    for (n, chain) in chains.iter().enumerate() {
        let start = if n == 0 { HEADER_LEN as u64 } else { 0 };
        if n == 0 {
            chain.writable.write(ring.memory(), 0, &header)?;
        }
        let (piece, after) = rest.split_at(rest.len().min((chain.writable.len() - start) as usize));
        chain.writable.write(ring.memory(), start, piece)?;
        rest = after;
        used.push((chain.head, (start + piece.len() as u64) as u32));
    }
    ring.put_all_used(used)?;
    Ok(Delivery::Delivered)
}

/// `struct virtio_net_hdr` (virtio 1.2, 5.1.6).
#[derive(Debug, Default, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    fn parse(bytes: [u8; HEADER_LEN]) -> Self {
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

    fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }

    /// What a guest that accepted `features` is told of a frame that it takes.
    fn of(frame: &Frame, features: u64, num_buffers: u16) -> Self {
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
    fn apply(&self, frame: &mut Frame, features: u64) -> Result<(), Malformed> {
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
        let header_len = tcp_header_end(&frame.data, self.csum_start);
        frame.segmentation = Some(Segmentation { protocol, size: self.gso_size, header_len });
        Ok(())
    }
}

/// Where the TCP header ends that begins at `start`. The driver says that as well, and is not to be trusted with
/// it. Beyond the frame where there is no header.
fn tcp_header_end(frame: &[u8], start: u16) -> u16 {
    const DATA_OFFSET: usize = 12;
    let offset = frame.get(usize::from(start) + DATA_OFFSET).map_or(u8::MAX, |byte| byte >> 4);
    start.saturating_add(u16::from(offset) * 4)
}
