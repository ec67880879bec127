//! What a driver asks of a disk: a chain's header, taken apart and checked.

use storage_block::SECTOR;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;

use super::super::chain::{Chain, Malformed};
use super::Refusal;
use crate::memory::Memory;

/// The most descriptors of a request: header, data, status. Half the queue's size, so that two
/// requests always fit.
pub(super) const SEGMENTS_MAX: u32 = 126;
/// The most bytes of one data descriptor.
pub(super) const SEGMENT_BYTES_MAX: u32 = 128 << 10;
/// The most data of a request that a driver forms by the two limits above.
const DATA_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// The most sectors of one discard or write-zeroes range: 64 MiB, so that also where a disk has to write
/// each zero, nobody waits long for the request.
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 17;
/// The most ranges of one discard or write-zeroes request.
pub(super) const RANGES_MAX: u32 = 1;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: u64 = 16;
/// Type, reserved, sector.
pub(super) const HEADER_LEN: u64 = 16;

/// A request whose header has been read.
pub(super) struct Request<'a> {
    kind: u32,
    sector: u64,
    pub(super) chain: &'a Chain,
    /// Bytes of data to the device, after the header.
    out_len: u64,
    /// Bytes of data from the device, before the status.
    pub(super) in_len: u64,
    pub(super) status_at: GuestAddress,
}

/// What a request asks of the disk. Whether that has as many bytes is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Read { sector: u64, len: u64 },
    Write { sector: u64, len: u64 },
    Flush,
    Discard { sector: u64, len: u64 },
    WriteZeroes { sector: u64, len: u64 },
}

impl Op {
    /// How many bytes it takes some time to read or write.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } | Self::WriteZeroes { len, .. } => len,
            Self::Flush | Self::Discard { .. } => 0,
        }
    }
}

impl<'a> Request<'a> {
    pub(super) fn read(memory: &Memory, chain: &'a Chain) -> Result<Self, Malformed> {
        let mut header = [0; HEADER_LEN as usize];
        chain.readable.read(memory, 0, &mut header).map_err(|_| Malformed("a request without a header"))?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let no_status = Malformed("a request without room for its status");
        Ok(Self {
            kind: u32::from_le_bytes([t0, t1, t2, t3]),
            sector: u64::from_le_bytes(sector),
            chain,
            out_len: chain.readable.len() - HEADER_LEN,
            in_len: chain.writable.len().checked_sub(1).ok_or(no_status)?,
            status_at: chain.writable.last().ok_or(no_status)?,
        })
    }

    /// What it asks for, if a driver may that accepted `features`. None if that is the serial number.
    pub(super) fn op(&self, memory: &Memory, features: u64) -> Result<Option<Op>, Refusal> {
        let negotiated = |bit: u32| features & 1 << bit != 0;
        let sector = self.sector;
        let data = |len: u64| {
            if len.is_multiple_of(SECTOR) && len <= DATA_MAX { Ok(len) } else { Err(Refusal::Io) }
        };
        Ok(Some(match self.kind {
            VIRTIO_BLK_T_IN => Op::Read { sector, len: data(self.in_len)? },
            VIRTIO_BLK_T_OUT => Op::Write { sector, len: data(self.out_len)? },
            VIRTIO_BLK_T_FLUSH => Op::Flush,
            VIRTIO_BLK_T_DISCARD if negotiated(VIRTIO_BLK_F_DISCARD) => {
                let (sector, len) = self.range(memory, 0)?;
                Op::Discard { sector, len }
            }
            VIRTIO_BLK_T_WRITE_ZEROES if negotiated(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let (sector, len) = self.range(memory, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?;
                Op::WriteZeroes { sector, len }
            }
            VIRTIO_BLK_T_GET_ID => return Ok(None),
            _ => return Err(Refusal::Unsupported),
        }))
    }

    /// The one range that is the data of a request of this kind: its first sector and its bytes.
    fn range(&self, memory: &Memory, allowed_flags: u32) -> Result<(u64, u64), Refusal> {
        const { assert!(RANGES_MAX == 1, "one range is read") };
        if self.out_len != RANGE_LEN {
            return Err(Refusal::Io);
        }
        let mut range = [0; RANGE_LEN as usize];
        self.chain.readable.read(memory, HEADER_LEN, &mut range)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if u32::from_le_bytes(flags) & !allowed_flags != 0 {
            return Err(Refusal::Unsupported);
        }
        if sectors > RANGE_SECTORS_MAX {
            return Err(Refusal::Io);
        }
        Ok((u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), u64::from(sectors) * SECTOR))
    }
}
