//! A request on its way, with the memory it is about.
#![allow(unsafe_code, reason = "a request in flight has addresses, whose life its submitter promises")]

use libc::iovec;

use crate::disk::Op;
use crate::{Disk, IoBuf, IoBufMut, Result};

/// What was pushed, until it is reported.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) token: u64,
    pub(super) op: Op,
    pub(super) offset: u64,
    /// The bytes still to do.
    pub(super) len: u64,
    pub(super) memory: Memory,
    /// What `memory` points to, where the queue keeps it.
    pub(super) owned: Option<Vec<u8>>,
    /// How many of the disk's limiters have let it pass.
    pub(super) passed: usize,
}

/// Addresses that are valid until the request is reported: for writing if it is a read, for reading if it is
/// a write.
#[derive(Debug)]
pub(super) enum Memory {
    None,
    One([Piece; 1]),
    Many(Box<[Piece]>),
}

#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct Piece(iovec); // its layout is what the kernel reads

// SAFETY: it is an address; whoever made the request has promised that the memory may be used from any thread.
unsafe impl Send for Piece {}

impl Memory {
    /// Memory to read into.
    ///
    /// # Safety
    ///
    /// It is valid for as long as this value is used.
    pub(super) unsafe fn target(bufs: &mut [IoBufMut<'_>]) -> Self {
        Self::new(bufs.iter_mut().map(|buf| iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }))
    }

    /// Memory to write from.
    ///
    /// # Safety
    ///
    /// It is valid for as long as this value is used.
    pub(super) unsafe fn source(bufs: &[IoBuf<'_>]) -> Self {
        Self::new(
            bufs.iter().map(|buf| iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() }),
        )
    }

    fn new(pieces: impl Iterator<Item = iovec>) -> Self {
        let mut pieces = pieces.filter(|piece| piece.iov_len > 0).map(Piece);
        match (pieces.next(), pieces.next()) {
            (None, _) => Self::None,
            (Some(one), None) => Self::One([one]),
            (Some(one), Some(two)) => Self::Many([one, two].into_iter().chain(pieces).collect()),
        }
    }

    pub(super) fn pieces(&mut self) -> &mut [Piece] {
        match self {
            Self::None => &mut [],
            Self::One(piece) => piece,
            Self::Many(pieces) => pieces,
        }
    }

    /// Takes the first `len` bytes off.
    pub(super) fn advance(&mut self, mut len: usize) {
        for piece in self.pieces() {
            let taken = len.min(piece.0.iov_len);
            piece.0.iov_base = piece.0.iov_base.wrapping_byte_add(taken);
            piece.0.iov_len -= taken;
            len -= taken;
        }
        if let Self::Many(pieces) = self {
            if pieces.first().is_some_and(|piece| piece.0.iov_len == 0) {
                *self = Self::new(std::mem::take(pieces).into_iter().map(|piece| piece.0));
            }
        }
    }

    /// The memory of a read.
    fn as_target(&mut self) -> &mut [IoBufMut<'_>] {
        // SAFETY: both types are an `iovec`, and whoever made this one has promised that the memory is valid.
        unsafe { &mut *(std::ptr::from_mut(self.pieces()) as *mut [IoBufMut<'_>]) }
    }

    /// The memory of a write.
    fn as_source(&mut self) -> &mut [IoBuf<'_>] {
        // SAFETY: both types are an `iovec`, and whoever made this one has promised that the memory is valid.
        unsafe { &mut *(std::ptr::from_mut(self.pieces()) as *mut [IoBuf<'_>]) }
    }

    /// Makes the memory of a read zero.
    pub(super) fn zero(&mut self) {
        self.as_target().iter_mut().for_each(IoBufMut::zero);
    }
}

impl Piece {
    pub(super) fn start(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    pub(super) fn len(&self) -> usize {
        self.0.iov_len
    }
}

/// A request as a thread does it. It is not done twice: its memory is used up.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) slot: usize,
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) memory: Memory,
}

impl Job {
    /// Does it, on this thread.
    pub(super) fn run(mut self, disk: &Disk) -> Result<()> {
        match self.op {
            Op::Read => disk.read_vectored_at(self.memory.as_target(), self.offset),
            Op::Write => disk.write_vectored_at(self.memory.as_source(), self.offset),
            Op::Flush => disk.flush(),
            Op::Discard => disk.discard(self.offset, self.len),
            Op::WriteZeroes => disk.write_zeroes(self.offset, self.len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left after the first bytes, however many, is the rest, and begins with a byte.
    #[test]
    fn advancing() {
        let bytes: Vec<u8> = (0..30).collect();
        let shapes: [&[usize]; 5] = [&[30], &[1, 29], &[10, 10, 10], &[29, 1], &[5, 1, 1, 1, 22]];
        for lens in shapes {
            for first in 0..30 {
                let mut rest = &bytes[..];
                let bufs: Vec<_> = lens
                    .iter()
                    .map(|len| {
                        let (buf, after) = rest.split_at(*len);
                        rest = after;
                        IoBuf::new(buf)
                    })
                    .collect();
                // SAFETY: the bytes outlive it.
                let mut memory = unsafe { Memory::source(&bufs) };
                memory.advance(first / 2);
                memory.advance(first - first / 2);
                let mut found = Vec::new();
                for buf in memory.as_source() {
                    let mut part = vec![0; buf.len()];
                    buf.copy_to_slice(&mut part);
                    found.extend(part);
                }
                assert_eq!(found, bytes[first..], "{first} bytes off {lens:?}");
                assert!(memory.pieces().first().is_some_and(|piece| piece.len() > 0));
            }
        }
    }
}
