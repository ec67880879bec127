//! Which of a volume's blocks are its own: two bits for each, in memory only where any is.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::{BLOCK, CHUNK, LEAF_SPAN, Run, State};
use crate::sparse::Sparse;

/// Blocks in a word.
const WORD: u64 = 32;
/// Words in a leaf, which speaks of as much disk as a manifest leaf.
const LEAF_WORDS: usize = (LEAF_SPAN / BLOCK / WORD) as usize;
const LEAF_BLOCKS: u64 = LEAF_SPAN / BLOCK;
const CHUNK_BLOCKS: u64 = CHUNK / BLOCK;
const LEAF_CHUNKS: u64 = LEAF_SPAN / CHUNK;
/// The low bit of every block's two.
const LOW: u64 = 0x5555_5555_5555_5555;

/// The state of every block of a disk of any size; [`State::Base`] where nothing was said.
///
/// A volume's blocks never come back to [`State::Base`].
///
/// A state is read with acquire ordering and set with release ordering: who sees a block in the overlay
/// sees the bytes that were written there before.
#[derive(Debug, Default)]
pub(crate) struct StateMap(Sparse<Box<[AtomicU64]>>);

impl StateMap {
    pub(crate) fn get(&self, block: u64) -> State {
        self.leaf(block).map_or(State::Base, |leaf| state(word(leaf, block), block % WORD))
    }

    /// The state of `first` and how many blocks from there, `max` at most, share it. The run may end
    /// early; the next one says so.
    #[inline]
    pub(crate) fn run(&self, first: u64, max: u64) -> (State, u64) {
        let max = max.min(LEAF_BLOCKS - first % LEAF_BLOCKS);
        match self.leaf(first) {
            Some(leaf) => run_in(leaf, first, max),
            None => (State::Base, max),
        }
    }

    /// Whether these blocks share this state, as far as one look tells: it may say that they do not although they do.
    #[inline]
    pub(crate) fn is_at_once(&self, first: u64, count: u64, state: State) -> bool {
        let within = first % WORD;
        if !(1..=WORD - within).contains(&count) {
            return false;
        }
        let mask = (u64::MAX >> (64 - 2 * count)) << (2 * within);
        self.leaf(first).is_some_and(|leaf| (word(leaf, first) ^ (LOW * state as u64)) & mask == 0)
    }

    /// All runs from `first`, neighbours in one state joined.
    pub(crate) fn runs(&self, first: u64, count: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let (mut first, end) = (first, first + count);
        while first < end {
            let (state, count) = self.run(first, end - first);
            match runs.last_mut() {
                Some(last) if last.state == state => last.count += count,
                _ => runs.push(Run { first, count, state }),
            }
            first += count;
        }
        runs
    }

    pub(crate) fn set(&self, run: Run) {
        let (mut block, end) = (run.first, run.first + run.count);
        while block < end {
            let part = (end - block).min(WORD - block % WORD);
            let leaf = self.0.get_or_init((block / LEAF_BLOCKS) as usize, empty_leaf);
            let mask = (u64::MAX >> (64 - 2 * part)) << (2 * (block % WORD));
            let bits = (LOW * run.state as u64) & mask;
            let cell = &leaf[(block % LEAF_BLOCKS / WORD) as usize];
            let mut old = cell.load(Ordering::Relaxed);
            while let Err(now) =
                cell.compare_exchange_weak(old, old & !mask | bits, Ordering::Release, Ordering::Relaxed)
            {
                old = now;
            }
            block += part;
        }
    }

    /// Whether anything was said of any block of a leaf's.
    pub(crate) fn has_leaf(&self, leaf: u64) -> bool {
        self.0.get(leaf as usize).is_some()
    }

    /// Which blocks of a chunk are not in [`State::Base`], a bit for each.
    pub(crate) fn changed_blocks(&self, chunk: u64) -> u16 {
        let block = chunk * CHUNK_BLOCKS;
        self.leaf(block).map_or(0, |leaf| changed_in(leaf, block))
    }

    /// The chunks with a block that is not in [`State::Base`].
    pub(crate) fn changed_chunks(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().flat_map(|(number, leaf)| {
            let chunks = number * LEAF_CHUNKS..(number + 1) * LEAF_CHUNKS;
            chunks.filter(|chunk| changed_in(leaf, chunk * CHUNK_BLOCKS) != 0)
        })
    }

    /// One past the last block in the overlay.
    pub(crate) fn overlay_end(&self) -> u64 {
        let in_overlay = |leaf: u64| {
            let runs = self.runs(leaf * LEAF_BLOCKS, LEAF_BLOCKS);
            runs.into_iter().rev().find(|run| run.state == State::Overlay)
        };
        let last = self.0.iter().rev().find_map(|(leaf, _)| in_overlay(leaf));
        last.map_or(0, |run| run.first + run.count)
    }

    fn leaf(&self, block: u64) -> Option<&[AtomicU64]> {
        self.0.get((block / LEAF_BLOCKS) as usize).map(|leaf| &**leaf)
    }
}

const _: () = assert!(CHUNK_BLOCKS * 2 == WORD && LEAF_BLOCKS % WORD == 0);

/// The same in the leaf that speaks of all `max` blocks.
fn run_in(leaf: &[AtomicU64], first: u64, max: u64) -> (State, u64) {
    let of_first = state(word(leaf, first), first % WORD);
    let mut count = 1;
    while count < max {
        let block = first + count;
        let bits = word(leaf, block);
        if block % WORD == 0 && bits == LOW * of_first as u64 {
            count += WORD;
        } else if state(bits, block % WORD) == of_first {
            count += 1;
        } else {
            break;
        }
    }
    (of_first, count.min(max))
}

fn empty_leaf() -> Box<[AtomicU64]> {
    (0..LEAF_WORDS).map(|_| AtomicU64::new(0)).collect()
}

fn word(leaf: &[AtomicU64], block: u64) -> u64 {
    leaf[(block % LEAF_BLOCKS / WORD) as usize].load(Ordering::Acquire)
}

/// Which blocks of the chunk that begins with `block` are not in [`State::Base`], a bit for each.
fn changed_in(leaf: &[AtomicU64], block: u64) -> u16 {
    let bits = (word(leaf, block) >> (2 * (block % WORD))) as u32;
    // Every second bit, and then these pushed together.
    let mut blocks = (bits | bits >> 1) & LOW as u32;
    for (by, mask) in [(1, 0x3333_3333), (2, 0x0f0f_0f0f), (4, 0x00ff_00ff), (8, 0xffff)] {
        blocks = (blocks | blocks >> by) & mask;
    }
    blocks as u16
}

fn state(word: u64, block: u64) -> State {
    match word >> (2 * block) & 3 {
        0 => State::Base,
        1 => State::Overlay,
        _ => State::Zero,
    }
}
