//! The virtio block device (virtio 1.2, 5.2): one request in, one answer out.
//!
//! A request is a checked [`Chain`], and its effect is on a [`Disk`] and the guest's memory.

use storage_block::{Disk, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::chain::{Chain, Malformed};
use super::device::Device;
use super::ring::Running;
use crate::memory::Memory;

/// The most descriptors of a request: header, data, status. Half the queue's size, so that two
/// requests always fit.
const SEGMENTS_MAX: u32 = 126;
/// The most bytes of one data descriptor.
const SEGMENT_BYTES_MAX: u32 = 128 << 10;
/// The most data of a request that a driver forms by the two limits above.
const DATA_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// The most sectors of one discard or write-zeroes range: 64 MiB, so that also where a disk has to write
/// each zero, nobody waits long for the request.
const RANGE_SECTORS_MAX: u32 = 1 << 17;
/// The most ranges of one discard or write-zeroes request.
const RANGES_MAX: u32 = 1;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: u64 = 16;
/// Type, reserved, sector.
const HEADER_LEN: u64 = 16;

/// The bytes of the configuration space.
const CONFIG_LEN: usize = 60;

/// A block device.
#[derive(Debug)]
pub(crate) struct Block {
    /// None when the machine has ended, or the guest has let go.
    disk: Option<Disk>,
    /// The capacity that the driver is told.
    sectors: u64,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// How a request ended: the status byte that the driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Io,
    Unsupported,
}

impl From<storage_block::Error> for Failure {
    fn from(error: storage_block::Error) -> Self {
        tracing::debug!(%error, "a disk request failed");
        Self::Io
    }
}

impl Block {
    /// A block device of these bytes; of the serial number, the guest sees the first 20.
    pub(crate) fn new(disk: Disk, serial: &str) -> Self {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self { sectors: disk.size() / SECTOR, disk: Some(disk), serial: id }
    }

    /// The configuration space, `struct virtio_blk_config`.
    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // discard: sectors, ranges, alignment
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // write zeroes: sectors, ranges, may unmap
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Serves a request and writes its status. Returns how many bytes were written to the guest.
    ///
    /// `features` are those that the driver accepted.
    fn answer(&mut self, memory: &Memory, chain: &Chain, features: u64) -> Result<u32, Malformed> {
        let mut header = [0; HEADER_LEN as usize];
        chain.readable.read(memory, 0, &mut header).map_err(|_| Malformed("a request without a header"))?;
        let Some(status_at) = chain.writable.len().checked_sub(1) else {
            return Err(Malformed("a request without room for its status"));
        };
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let request = Request {
            kind: u32::from_le_bytes([t0, t1, t2, t3]),
            sector: u64::from_le_bytes(sector),
            chain,
            out_len: chain.readable.len() - HEADER_LEN,
            in_len: status_at,
        };
        let (status, written) = match self.act(memory, &request, features)? {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        chain.writable.write(memory, status_at, &[status as u8])?;
        Ok(written + 1)
    }

    fn act(
        &mut self,
        memory: &Memory,
        request: &Request<'_>,
        features: u64,
    ) -> Result<Result<u32, Failure>, Malformed> {
        let negotiated = |bit: u32| features & 1 << bit != 0;
        let done = match request.kind {
            VIRTIO_BLK_T_IN => self.read(memory, request)?,
            VIRTIO_BLK_T_OUT => self.write(memory, request)?.map(|()| 0),
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_GET_ID => {
                let len = (request.in_len as usize).min(self.serial.len());
                request.chain.writable.write(memory, 0, &self.serial[..len])?;
                Ok(len as u32)
            }
            VIRTIO_BLK_T_DISCARD if negotiated(VIRTIO_BLK_F_DISCARD) => self.ranges(memory, request)?,
            VIRTIO_BLK_T_WRITE_ZEROES if negotiated(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.ranges(memory, request)?
            }
            _ => Err(Failure::Unsupported),
        };
        // A driver that cannot flush expects what it wrote to stay (virtio 1.2, 5.2.6.2).
        let writes = matches!(request.kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_WRITE_ZEROES);
        Ok(match done {
            Ok(_) if writes && !negotiated(VIRTIO_BLK_F_FLUSH) => self.flush(),
            done => done,
        })
    }

    fn read(&self, memory: &Memory, request: &Request<'_>) -> Result<Result<u32, Failure>, Malformed> {
        let Some(start) = self.extent(request.sector, request.in_len) else { return Ok(Err(Failure::Io)) };
        let mut bufs = request.chain.writable.targets(memory, request.in_len)?;
        let Some(disk) = &self.disk else { return Ok(Err(Failure::Io)) };
        let read = disk.read_vectored_at(&mut bufs, start);
        Ok(read.map(|()| request.in_len as u32).map_err(Failure::from))
    }

    fn write(&self, memory: &Memory, request: &Request<'_>) -> Result<Result<(), Failure>, Malformed> {
        let Some(start) = self.extent(request.sector, request.out_len) else { return Ok(Err(Failure::Io)) };
        let mut bufs = request.chain.readable.sources(memory, HEADER_LEN, request.out_len)?;
        let Some(disk) = &self.disk else { return Ok(Err(Failure::Io)) };
        Ok(disk.write_vectored_at(&mut bufs, start).map_err(Failure::from))
    }

    fn flush(&self) -> Result<u32, Failure> {
        self.disk.as_ref().ok_or(Failure::Io)?.flush()?;
        Ok(0)
    }

    /// Discards, or writes zeroes to, the ranges that are the request's data.
    fn ranges(&self, memory: &Memory, request: &Request<'_>) -> Result<Result<u32, Failure>, Malformed> {
        let discard = request.kind == VIRTIO_BLK_T_DISCARD;
        let count = request.out_len / RANGE_LEN;
        if !request.out_len.is_multiple_of(RANGE_LEN) || count == 0 || count > u64::from(RANGES_MAX) {
            return Ok(Err(Failure::Io));
        }
        let Some(disk) = &self.disk else { return Ok(Err(Failure::Io)) };
        for n in 0..count {
            let mut range = [0; RANGE_LEN as usize];
            request.chain.readable.read(memory, HEADER_LEN + n * RANGE_LEN, &mut range)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let allowed = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
            if u32::from_le_bytes(flags) & !allowed != 0 {
                return Ok(Err(Failure::Unsupported));
            }
            let Some(start) = sector.checked_mul(SECTOR).filter(|_| sectors <= RANGE_SECTORS_MAX) else {
                return Ok(Err(Failure::Io));
            };
            let len = u64::from(sectors) * SECTOR;
            let done = if discard { disk.discard(start, len) } else { disk.write_zeroes(start, len) };
            if let Err(error) = done {
                return Ok(Err(error.into()));
            }
        }
        Ok(Ok(0))
    }

    /// The offset of `len` bytes from `sector` on, if a request may have as many and they are all on
    /// the disk.
    fn extent(&self, sector: u64, len: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(len)?;
        let size = self.disk.as_ref()?.size();
        (len.is_multiple_of(SECTOR) && len <= DATA_MAX && end <= size).then_some(start)
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut bits =
            vec![VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH];
        if self.disk.as_ref().is_some_and(Disk::read_only) {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queues(&self) -> usize {
        1
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn refresh(&mut self) {
        if let Some(disk) = &self.disk {
            self.sectors = disk.size() / SECTOR;
        }
    }

    fn end(&mut self) {
        self.disk = None;
    }

    fn reset(&mut self) {
        self.refresh();
    }

    fn serve(&mut self, _queue: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Some(chain) = ring.next()? else { return Ok(false) };
        let written = self.answer(ring.memory(), &chain, features)?;
        ring.put_used(&chain, written)?;
        Ok(true)
    }
}

/// A request whose header has been read.
struct Request<'a> {
    kind: u32,
    sector: u64,
    chain: &'a Chain,
    /// Bytes of data to the device, after the header.
    out_len: u64,
    /// Bytes of data from the device, before the status.
    in_len: u64,
}
