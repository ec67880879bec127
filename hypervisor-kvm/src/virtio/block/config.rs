//! What a driver is told of a block device: its features and its configuration space.

use serde::{Deserialize, Serialize};
use storage_block::{Capabilities, Disk, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::request::{RANGE_SECTORS_MAX, RANGES_MAX, SEGMENT_BYTES_MAX, SEGMENTS_MAX};

/// The bytes of the configuration space.
const CONFIG_LEN: usize = 60;

/// What a block device has to remember beside its queues: nothing is under way in one that is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// The capacity that the driver is told.
    sectors: u64,
}

impl State {
    /// Of a device of this disk as it is now.
    pub(super) fn of(disk: &Disk) -> Self {
        Self { sectors: disk.size() / SECTOR }
    }

    /// The bytes that the driver knows of.
    pub(crate) fn size(&self) -> u64 {
        self.sectors.saturating_mul(SECTOR)
    }

    /// The configuration space of a device with so many queues, `struct virtio_blk_config`.
    pub(super) fn config(&self, queues: usize, kind: &Kind) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &kind.logical.to_le_bytes());
        put(24, &[(kind.physical / kind.logical).ilog2() as u8]); // topology: physical block, alignment, least and best
        put(34, &(queues as u16).to_le_bytes());
        put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // discard: sectors, ranges, alignment
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // write zeroes: sectors, ranges, may unmap
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
        config
    }
}

/// What the disk is like; that does not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    read_only: bool,
    discards: bool,
    /// Its blocks, powers of two of which the second is no smaller.
    logical: u32,
    physical: u32,
}

impl Kind {
    pub(super) fn of(disk: &Disk) -> Self {
        let Capabilities { logical_block, physical_block, discard_frees, .. } = disk.capabilities();
        let fits = |block: u32| block.is_power_of_two() && block >= SECTOR as u32;
        let whole = fits(logical_block) && disk.size().is_multiple_of(logical_block.into());
        let logical = if whole { logical_block } else { SECTOR as u32 };
        let physical = if fits(physical_block) { physical_block.max(logical) } else { logical };
        Self { read_only: disk.read_only(), discards: discard_frees, logical, physical }
    }

    /// The same for a driver that was told elsewhere that discards are of use: each is served.
    pub(super) fn with_discards(self) -> Self {
        Self { discards: true, ..self }
    }
}

/// The features of a device with so many queues.
pub(super) fn features(queues: usize, kind: &Kind) -> u64 {
    let bits = [
        (VIRTIO_BLK_F_SIZE_MAX, true),
        (VIRTIO_BLK_F_SEG_MAX, true),
        (VIRTIO_BLK_F_BLK_SIZE, true),
        (VIRTIO_BLK_F_TOPOLOGY, true),
        (VIRTIO_BLK_F_FLUSH, true),
        (VIRTIO_BLK_F_MQ, queues > 1),
        (VIRTIO_BLK_F_RO, kind.read_only),
        (VIRTIO_BLK_F_DISCARD, kind.discards && !kind.read_only),
        (VIRTIO_BLK_F_WRITE_ZEROES, !kind.read_only),
    ];
    bits.into_iter().filter(|(_, offered)| *offered).fold(0, |features, (bit, _)| features | 1 << bit)
}
