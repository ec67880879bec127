//! Which blocks of a volume were written since its last snapshot.

use std::sync::atomic::{AtomicU16, Ordering};

use crate::format::{BLOCK, CHUNK, LEAF_IDS};
use crate::sparse::Sparse;

const CHUNK_BLOCKS: u64 = CHUNK / BLOCK;

const _: () = assert!(CHUNK_BLOCKS == 16);

/// A bit for each block of a disk of any size, in memory only where any is set. They are set by many at once; that all
/// are seen who looks later is what the volume's gate is for.
#[derive(Debug, Default)]
pub(crate) struct Changes(Sparse<Box<[AtomicU16]>>);

impl Changes {
    /// Notes that so many blocks were written, or are about to be.
    pub(crate) fn mark(&self, first: u64, count: u64) {
        let (mut block, end) = (first, first + count);
        while block < end {
            let chunk = block / CHUNK_BLOCKS;
            let within = block % CHUNK_BLOCKS;
            let part = (CHUNK_BLOCKS - within).min(end - block);
            let bits = (u16::MAX >> (CHUNK_BLOCKS - part)) << within;
            let cell = self.cell(chunk);
            // What is written is most often written again.
            if cell.load(Ordering::Relaxed) & bits != bits {
                cell.fetch_or(bits, Ordering::Relaxed);
            }
            block += part;
        }
    }

    /// Notes that these blocks of a chunk were, a bit for each.
    pub(crate) fn mark_chunk(&self, chunk: u64, blocks: u16) {
        self.cell(chunk).fetch_or(blocks, Ordering::Relaxed);
    }

    /// The blocks of a chunk that were, a bit for each.
    pub(crate) fn of_chunk(&self, chunk: u64) -> u16 {
        let leaf = self.0.get((chunk / LEAF_IDS as u64) as usize);
        leaf.map_or(0, |leaf| leaf[(chunk % LEAF_IDS as u64) as usize].load(Ordering::Relaxed))
    }

    /// The chunks that have any, in order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = u64> + '_ {
        let leaves = self.0.iter().map(|(number, leaf)| (number * LEAF_IDS as u64, leaf));
        leaves.flat_map(|(first, leaf)| {
            let chunks = (first..).zip(leaf.iter());
            chunks.filter(|(_, bits)| bits.load(Ordering::Relaxed) != 0).map(|(chunk, _)| chunk)
        })
    }

    /// Notes what is noted there, too.
    pub(crate) fn merge(&self, other: &Self) {
        for chunk in other.chunks() {
            self.mark_chunk(chunk, other.of_chunk(chunk));
        }
    }

    fn cell(&self, chunk: u64) -> &AtomicU16 {
        let empty = || (0..LEAF_IDS).map(|_| AtomicU16::new(0)).collect();
        let leaf = self.0.get_or_init((chunk / LEAF_IDS as u64) as usize, empty);
        &leaf[(chunk % LEAF_IDS as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_those_of_a_plain_list() {
        let mut random = crate::testing::Random(3);
        let (one, other) = (Changes::default(), Changes::default());
        let mut blocks = vec![false; 3 * LEAF_IDS * 16];
        for round in 0..200 {
            let first = random.below(blocks.len() as u64 - 100);
            let count = random.below(100);
            if round % 2 == 0 { &one } else { &other }.mark(first, count);
            blocks[first as usize..(first + count) as usize].fill(true);
        }
        one.merge(&other);
        let expected = |chunk: u64| {
            let bits = blocks[chunk as usize * 16..][..16].iter().enumerate();
            bits.fold(0u16, |all, (at, set)| all | u16::from(*set) << at)
        };
        let chunks = 0..blocks.len() as u64 / 16;
        assert!(chunks.clone().all(|chunk| one.of_chunk(chunk) == expected(chunk)));
        assert!(one.chunks().eq(chunks.filter(|chunk| expected(*chunk) != 0)));
    }
}
