//! Reading a clone that has blocks of its own, and one by a queue.

use std::time::{Duration, Instant};

use storage_block::RawFile;

use super::blocks::{Beside, READS, Random, Side, read_blocks, shuffled, write_blocks};
use super::{BLOCK, Bench};
use crate::samples::Measurement;

/// Random reads of a clone of which so many in a hundred blocks, at random, were overwritten.
pub(super) fn overwritten(bench: &Bench, percent: u64) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    let blocks = beside.volume.size() / BLOCK;
    let own = (blocks * percent / 100) as usize;
    write_blocks(&Side::Disk(beside.volume.disk()), shuffled(blocks).into_iter().take(own))?;
    beside.warm()?;
    beside.compare(bench.rounds(25), |side, round| read_blocks(side, bench.bytes(READS), 1, round))
}

/// Random reads by a queue, of a clone and of a raw disk.
pub(super) fn queued(bench: &Bench, depth: u32) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.warm()?;
    beside.compare(bench.rounds(25), |side, round| read_queued(side, bench.bytes(READS), depth, round))
}

fn read_queued(side: &Side, reads: u64, depth: u32, seed: u64) -> anyhow::Result<Duration> {
    let disk = match side {
        Side::Disk(disk) => disk.clone(),
        Side::File(file, _) => RawFile::from_file(file.try_clone()?, true)?.into_disk(),
    };
    let mut queue = disk.queue(depth)?;
    let (mut random, mut pushed) = (Random::new(seed), 0);
    let begun = Instant::now();
    let mut buffers = vec![vec![0; BLOCK as usize]; depth as usize];
    loop {
        for buffer in buffers.drain(..).take((reads - pushed) as usize) {
            queue.read(pushed, random.below(disk.size() / BLOCK) * BLOCK, buffer);
            pushed += 1;
        }
        // What else has ended is reported before more begins, all at once.
        let Some(first) = queue.wait() else { break };
        let mut next = Some(first);
        while let Some(done) = next {
            done.result?;
            buffers.extend(done.buffer);
            next = queue.completed();
        }
    }
    Ok(begun.elapsed())
}
