//! A descriptor chain, read from the guest's memory once and checked.

use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::ring::QUEUE_SIZE;
use crate::memory::Memory;

/// The bytes of a descriptor (virtio 1.2, 2.7.5).
pub(super) const DESCRIPTOR_LEN: usize = 16;

/// The driver broke the rules of virtio in a way that leaves nothing to answer to. The device stops
/// until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// It is the ring or another descriptor that names it, and neither the queue's table nor the chain's own has it.
const MISSING: Malformed = Malformed("a descriptor lies outside its table");
/// A chain's own table has not been agreed on, is one in another, has descriptors behind it, is no whole number of them, or
/// lies outside the memory.
const TABLE: Malformed = Malformed("a table of descriptors is not one that may be");

/// The memory of one request: what the device reads, then what it writes.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Buffers,
    pub(crate) writable: Buffers,
}

impl Chain {
    /// Reads and checks the chain that begins with the descriptor `head` of a queue's table, and that may have a table of
    /// its own if that was agreed on, as `indirect` says. All of it lies in the guest's RAM, which does not change its
    /// size, so that no later access to it fails.
    pub(crate) fn read(
        memory: &Memory,
        table: VolatileSlice<'_>,
        head: u16,
        indirect: bool,
    ) -> Result<Self, Malformed> {
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let (mut table, mut may_be_table, mut next) = (table, indirect, head);
        // Not the size that the driver gave the queue: a table of its own may have more descriptors. One more is that of
        // the table.
        for _ in 0..=QUEUE_SIZE {
            let at = usize::from(next) * DESCRIPTOR_LEN;
            let descriptor = table.get_ref::<Descriptor>(at).map_err(|_| MISSING)?.load();
            let (address, len) = (descriptor.addr(), descriptor.len());
            // Pieces of RAM do not adjoin, so that each buffer, and each table, lies in one.
            let mapped = memory.get_slice(address, len as usize);
            if descriptor.refers_to_indirect_table() {
                let whole = (len as usize).is_multiple_of(DESCRIPTOR_LEN);
                let is_table = may_be_table && whole && !descriptor.has_next();
                table = mapped.ok().filter(|_| is_table).ok_or(TABLE)?;
                (may_be_table, next) = (false, 0);
                continue;
            }
            if len > 0 && mapped.is_err() {
                return Err(Malformed("a descriptor points outside the memory"));
            }
            let buffers = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.segments.is_empty() {
                &mut chain.readable
            } else {
                return Err(Malformed("a readable descriptor follows a writable one"));
            };
            buffers.segments.push((address, len));
            buffers.len += u64::from(len);
            if chain.readable.len + chain.writable.len > u64::from(u32::MAX) {
                return Err(Malformed("a descriptor chain has more bytes than one may have"));
            }
            if !descriptor.has_next() {
                return Ok(chain);
            }
            next = descriptor.next();
        }
        Err(Malformed("a descriptor chain does not end"))
    }

    /// How many descriptors it has.
    pub(crate) fn descriptors(&self) -> usize {
        self.readable.segments.len() + self.writable.segments.len()
    }
}

/// Pieces of the guest's memory that are read or written as one.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    /// Mostly few.
    segments: SmallVec<[(GuestAddress, u32); 4]>,
    len: u64,
}

impl Buffers {
    /// How many bytes there are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Where each piece begins, and how long it is. All of it is RAM.
    pub(crate) fn segments(&self) -> impl Iterator<Item = (u64, u32)> {
        self.segments.iter().map(|(address, len)| (address.0, *len))
    }

    /// Fills `buf` with the bytes from `offset` on.
    pub(crate) fn read(&self, memory: &Memory, offset: u64, buf: &mut [u8]) -> Result<(), Malformed> {
        let mut rest = buf;
        self.pieces(offset, rest.len(), |address, len| {
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            memory.get_slice(address, len).and_then(|from| Ok(from.read_slice(piece, 0)?)).is_ok()
        })
    }

    /// Appends the `len` bytes from `offset` on. What they are copied to is not cleared first.
    pub(crate) fn append_to(
        &self,
        bytes: &mut Vec<u8>,
        memory: &Memory,
        offset: u64,
        len: usize,
    ) -> Result<(), Malformed> {
        self.pieces(offset, len, |address, len| memory.write_all_volatile_to(address, bytes, len).is_ok())
    }

    /// Writes `bytes` from `offset` on.
    pub(crate) fn write(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<(), Malformed> {
        let mut rest = bytes;
        self.pieces(offset, rest.len(), |address, len| {
            let (piece, after) = rest.split_at(len);
            rest = after;
            memory.get_slice(address, len).and_then(|to| Ok(to.write_slice(piece, 0)?)).is_ok()
        })
    }

    /// Where the last byte lies, if there is one.
    pub(crate) fn last(&self) -> Option<GuestAddress> {
        let (start, len) = self.segments.iter().rfind(|(_, len)| *len > 0)?;
        Some(GuestAddress(start.0 + u64::from(len - 1)))
    }

    /// Calls `each` with where the pieces of `len` bytes from `offset` on are mapped here.
    pub(super) fn slices(
        &self,
        memory: &Memory,
        offset: u64,
        len: u64,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Result<(), Malformed> {
        self.pieces(offset, len as usize, |address, len| {
            let slice = memory.get_slice(address, len);
            slice.map(|slice| each(slice.ptr_guard_mut().as_ptr(), slice.len())).is_ok()
        })
    }

    /// Calls `each` with the address and length of each piece of `len` bytes from `offset` on.
    fn pieces(
        &self,
        mut offset: u64,
        mut len: usize,
        mut each: impl FnMut(GuestAddress, usize) -> bool,
    ) -> Result<(), Malformed> {
        for &(address, segment) in &self.segments {
            if offset >= u64::from(segment) {
                offset -= u64::from(segment);
                continue;
            }
            let piece = ((u64::from(segment) - offset) as usize).min(len);
            if piece > 0 && !each(GuestAddress(address.0 + offset), piece) {
                return Err(Malformed("a buffer lies outside the memory"));
            }
            len -= piece;
            offset = 0;
        }
        if len == 0 { Ok(()) } else { Err(Malformed("a buffer is too short")) }
    }
}
