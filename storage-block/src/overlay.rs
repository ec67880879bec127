//! A volume's overlay: a file, encrypted or not.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::RwLock;

use crate::buffer::{gather, total};
use crate::cipher::Xts;
use crate::format::BLOCK;
use crate::import::is_zero;
use crate::store::{Locked, read, write};
use crate::{IoBuf, SECTOR};

/// Bytes that are encrypted, read or written at once, and that one lock is for.
const PIECE: u64 = 128 << 10;
const LOCKS: usize = 64;

/// The file of a volume's own blocks. It holds the lock on the volume.
#[derive(Debug)]
pub(crate) struct Overlay {
    file: Locked,
    encrypted: Option<Encrypted>,
}

/// Every block is a data unit under its number.
#[derive(Debug)]
struct Encrypted {
    xts: Xts,
    /// A reader must not find a block half-written, which would be neither what it was nor what it will be, and who
    /// writes a part of a block must find the rest of it as it is: a piece is read under its lock for reading and
    /// written under it for writing.
    locks: Box<[RwLock<()>]>,
}

impl Overlay {
    pub(crate) fn new(file: Locked, xts: Option<Xts>) -> Self {
        let encrypted =
            xts.map(|xts| Encrypted { xts, locks: (0..LOCKS).map(|_| RwLock::default()).collect() });
        Self { file, encrypted }
    }

    /// The file; what is in its blocks is not for reading where it is encrypted.
    pub(crate) fn file(&self) -> &Locked {
        &self.file
    }

    /// The descriptor, to read from where blocks lie there as they are.
    pub(crate) fn for_reading(&self) -> Option<BorrowedFd<'_>> {
        self.encrypted.is_none().then(|| self.file.for_reading())
    }

    /// Reads what was written, all of it in blocks that were. A block that has been given back meanwhile is zeroes.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(encrypted) = &self.encrypted else { return self.file.read_exact_at(buf, offset) };
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let len = piece(offset, buf.len());
            let (part, rest) = buf.split_at_mut(len);
            let _held = read(encrypted.lock(offset));
            if offset % BLOCK == 0 && len as u64 % BLOCK == 0 {
                self.read_blocks(encrypted, part, offset)?;
            } else {
                let (from, mut blocks) = around(offset, len);
                self.read_blocks(encrypted, &mut blocks, from)?;
                part.copy_from_slice(&blocks[(offset - from) as usize..][..len]);
            }
            (buf, offset) = (rest, offset + len as u64);
        }
        Ok(())
    }

    /// Writes whole blocks, or parts of blocks that were written before.
    pub(crate) fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let Some(encrypted) = &self.encrypted else { return self.file.write_all_at(buf, offset) };
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let len = piece(offset, buf.len());
            let (part, rest) = buf.split_at(len);
            let (from, mut blocks) = around(offset, len);
            let _held = write(encrypted.lock(offset));
            // The block at either end of which only a part is written.
            let end = offset + len as u64;
            let last = blocks.len() - BLOCK as usize;
            if offset != from {
                self.read_blocks(encrypted, &mut blocks[..BLOCK as usize], from)?;
            }
            if end % BLOCK != 0 && (last > 0 || offset == from) {
                self.read_blocks(encrypted, &mut blocks[last..], from + last as u64)?;
            }
            blocks[(offset - from) as usize..][..len].copy_from_slice(part);
            encrypted.xts.encrypt(&mut blocks, u128::from(from / BLOCK));
            self.file.write_all_at(&blocks, from)?;
            (buf, offset) = (rest, offset + len as u64);
        }
        Ok(())
    }

    /// The same from several buffers, with no copy unless they have to be encrypted.
    pub(crate) fn write_vectored_at(&self, bufs: &mut [IoBuf<'_>], offset: u64) -> io::Result<()> {
        if self.encrypted.is_none() {
            return self.file.write_all_vectored_at(bufs, offset);
        }
        let mut bytes = vec![0; total(bufs).unwrap_or(0) as usize];
        gather(bufs, &mut bytes);
        self.write_at(&bytes, offset)
    }

    /// Gives the space of whole blocks back, where the file system can.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let locks = self.encrypted.as_ref().map_or(&[][..], |encrypted| &encrypted.locks);
        let (first, last) = (offset / PIECE, (offset + len).div_ceil(PIECE));
        let all = last - first >= LOCKS as u64;
        let of_range = |at: u64| all || (first..last).any(|piece| piece % LOCKS as u64 == at);
        // In one order, and nobody else takes more than one.
        let _held: Vec<_> =
            locks.iter().zip(0..).filter(|(_, at)| of_range(*at)).map(|(lock, _)| write(lock)).collect();
        self.file.punch(offset, len)
    }

    fn read_blocks(&self, encrypted: &Encrypted, blocks: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(blocks, offset)?;
        for (block, number) in blocks.chunks_mut(BLOCK as usize).zip(offset / BLOCK..) {
            // No sector that was ever written looks like one that was given back, and a crash may have kept a part of
            // a block from being either.
            let mut zeroes = [false; (BLOCK / SECTOR) as usize];
            for (zero, sector) in zeroes.iter_mut().zip(block.chunks(SECTOR as usize)) {
                *zero = is_zero(sector);
            }
            encrypted.xts.decrypt(block, u128::from(number));
            for (_, sector) in zeroes.iter().zip(block.chunks_mut(SECTOR as usize)).filter(|(zero, _)| **zero)
            {
                sector.fill(0);
            }
        }
        Ok(())
    }
}

impl Encrypted {
    fn lock(&self, offset: u64) -> &RwLock<()> {
        &self.locks[(offset / PIECE) as usize % LOCKS]
    }
}

/// How many bytes from `offset` are in one piece.
fn piece(offset: u64, len: usize) -> usize {
    len.min((PIECE - offset % PIECE) as usize)
}

/// The blocks that hold some bytes: where they begin, and room for them.
fn around(offset: u64, len: usize) -> (u64, Vec<u8>) {
    let (from, to) = (offset / BLOCK * BLOCK, (offset + len as u64).next_multiple_of(BLOCK));
    (from, vec![0; (to - from) as usize])
}
