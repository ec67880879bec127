//! What a driver is told of a network device: its features and its configuration space.

use instance_core::machine::NetSpec;
use instance_core::net::{Frame, Offloads};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

/// Addresses and type, with a VLAN tag.
const ETHERNET_MAX: usize = super::ETHERNET_LEN + 4;

/// Which features require which (virtio 1.2, 5.1.3.1), of those that are offered.
pub(super) const REQUIREMENTS: [(u32, u32); 5] = [
    (VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ),
];

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Config {
    mac: [u8; 6],
    mtu: u16,
    /// The most pairs, if there are several.
    pairs: u16,
}

impl Config {
    pub(super) fn new(spec: &NetSpec, pairs: usize) -> Self {
        Self { mac: spec.mac.0, mtu: spec.mtu, pairs: if pairs > 1 { pairs as u16 } else { 0 } }
    }

    /// The features of a device with this configuration, behind which is who takes `offered`.
    pub(super) fn features(&self, offered: Offloads) -> u64 {
        let Offloads { checksum, tcp4, tcp6, .. } = offered;
        let several = self.pairs > 0;
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
            (VIRTIO_NET_F_CTRL_VQ, several),
            (VIRTIO_NET_F_MQ, several),
        ];
        bits.into_iter().filter(|(_, offered)| *offered).fold(0, |features, (bit, _)| features | 1 << bit)
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let config = self.bytes();
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// `struct virtio_net_config`, as far as features of it are offered.
    fn bytes(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }

    pub(super) fn is_short_enough(&self, frame: &Frame) -> bool {
        frame.segmentation.is_some() || frame.data.len() <= usize::from(self.mtu) + ETHERNET_MAX
    }
}

/// What the driver takes, by the features that it accepted.
pub(super) fn taken_by_driver(features: u64) -> Offloads {
    let accepted = |bit: u32| features & 1 << bit != 0;
    let checksum = accepted(VIRTIO_NET_F_GUEST_CSUM);
    let mut takes = Offloads::NONE;
    takes.checksum = checksum;
    takes.tcp4 = checksum && accepted(VIRTIO_NET_F_GUEST_TSO4);
    takes.tcp6 = checksum && accepted(VIRTIO_NET_F_GUEST_TSO6);
    takes
}
