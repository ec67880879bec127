//! Reading and writing a volume beside a raw file.
//!
//! One request after the other in the page cache is nothing but a processor's work, and it is its time that
//! counts: neither what else runs nor what a disk is busy with is in it. Many at a time, and flushes, wait
//! for each other and for the disk, and there the clock on the wall counts.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use storage_block::{Disk, RawFile, Store, Volume};
use tempfile::TempDir;

use super::{BLOCK, Bench, GIB, MIB, corpus, evict, import, warm};
use crate::samples::{Measurement, ProcessorTime, Rounds, median_speed};

/// What random requests are spread over.
const SIZE: u64 = GIB;
/// Requests in a batch, enough that it takes a tenth of a second.
pub(super) const READS: u64 = 100_000;
const WRITES: u64 = 8192;

/// What is read and written: a disk of this library, or a file by the system's calls alone.
#[derive(Debug)]
pub enum Side {
    /// A disk.
    Disk(Disk),
    /// A file of a size.
    File(File, u64),
}

impl Side {
    /// The size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Disk(disk) => disk.size(),
            Self::File(_, size) => *size,
        }
    }

    /// Fills `buf` from there.
    ///
    /// # Errors
    ///
    /// What reading met.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> anyhow::Result<()> {
        match self {
            Self::Disk(disk) => disk.read_at(buf, at)?,
            Self::File(file, _) => file.read_exact_at(buf, at)?,
        }
        Ok(())
    }

    /// Writes `buf` there.
    ///
    /// # Errors
    ///
    /// What writing met.
    pub fn write_at(&self, buf: &[u8], at: u64) -> anyhow::Result<()> {
        match self {
            Self::Disk(disk) => disk.write_at(buf, at)?,
            Self::File(file, _) => file.write_all_at(buf, at)?,
        }
        Ok(())
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    ///
    /// What the disk or the file says.
    pub fn flush(&self) -> anyhow::Result<()> {
        match self {
            Self::Disk(disk) => disk.flush()?,
            Self::File(file, _) => file.sync_data()?,
        }
        Ok(())
    }
}

/// A volume and two raw files with the same content.
pub struct Beside {
    /// The raw image that the content is from.
    pub image: PathBuf,
    /// The volume, begun as a snapshot of the image.
    pub volume: Volume,
    raw: [PathBuf; 2],
    /// Where all of it lies.
    pub dir: TempDir,
}

impl Beside {
    /// Makes them.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn new(bench: &Bench) -> anyhow::Result<Self> {
        Self::of(bench, SIZE)
    }

    fn of(bench: &Bench, size: u64) -> anyhow::Result<Self> {
        let dir = bench.temp_dir()?;
        let image = bench.image(size)?;
        let raw = ["a.raw", "b.raw"].map(|name| dir.path().join(name));
        for path in &raw {
            corpus::copy(&image, path, bench.bytes(size))?;
        }
        let store = Store::open(dir.path().join("store"))?;
        let snapshot = import(&store, &image)?;
        let volume = Volume::create(&dir.path().join("volume"), Some(&snapshot), snapshot.size())?;
        Ok(Self { image, volume, raw, dir })
    }

    /// The volume's disk and the two files.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn sides(&self) -> anyhow::Result<[Side; 3]> {
        let raw = |path: &PathBuf| {
            let file = File::options().read(true).write(true).open(path)?;
            anyhow::Ok(Side::File(file, self.volume.size()))
        };
        Ok([Side::Disk(self.volume.disk()), raw(&self.raw[0])?, raw(&self.raw[1])?])
    }

    /// Fills the page cache with all of it, each file in the same way, and reads the volume once: chunks are verified
    /// when they are first read, which a figure of its own shows.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn warm(&self) -> anyhow::Result<()> {
        self.warm_files()?;
        let (disk, mut buf) = (self.volume.disk(), vec![0; MIB as usize]);
        (0..disk.size()).step_by(MIB as usize).try_for_each(|at| Ok(disk.read_at(&mut buf, at)?))
    }

    /// The same, and nothing of the volume was ever read.
    fn warm_files(&self) -> anyhow::Result<()> {
        evict(self.dir.path())?;
        warm(self.dir.path())
    }

    /// Writes all of the volume, so that nothing of it is the snapshot's any more, as the files were.
    ///
    /// # Errors
    ///
    /// Those of the volume.
    pub fn touch(&self) -> anyhow::Result<()> {
        let (image, disk) = (RawFile::open(&self.image, true)?.into_disk(), self.volume.disk());
        let mut buf = vec![0; MIB as usize];
        for at in (0..disk.size()).step_by(MIB as usize) {
            image.read_at(&mut buf, at)?;
            disk.write_at(&buf, at)?;
        }
        Ok(disk.flush()?)
    }

    /// Compares what `work` makes of the volume, and of the two files.
    pub(super) fn compare(
        &self,
        rounds: Rounds,
        work: impl FnMut(&Side, u64) -> anyhow::Result<Duration>,
    ) -> anyhow::Result<Measurement> {
        compare(std::slice::from_ref(self), rounds, work)
    }
}

/// Compares what `work` makes of volumes, and of the files beside them, one after the other and again.
fn compare(
    all: &[Beside],
    rounds: Rounds,
    mut work: impl FnMut(&Side, u64) -> anyhow::Result<Duration>,
) -> anyhow::Result<Measurement> {
    let sides = all.iter().map(Beside::sides).collect::<anyhow::Result<Vec<_>>>()?;
    let (sides, work) = (&sides, std::cell::RefCell::new(&mut work));
    // Each does in a round what the others do in it.
    let numbered = |which: usize| {
        let (work, mut round) = (&work, 0);
        move || {
            round += 1;
            (*work.borrow_mut())(&sides[(round as usize - 1) % sides.len()][which], round - 1)
        }
    };
    let (mut volume, mut raw, mut again) = (numbered(0), numbered(1), numbered(2));
    median_speed(rounds, ("volume", &mut volume), ("raw", &mut raw), ("raw again", &mut again))
}

/// Numbers that look random and are the same every time (xorshift).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// One sequence for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(bound)) >> 64) as u64
    }
}

/// Reads random blocks, so many at a time.
///
/// # Errors
///
/// Those of the side.
pub fn read_blocks(side: &Side, reads: u64, depth: u64, seed: u64) -> anyhow::Result<Duration> {
    let blocks = side.size() / BLOCK;
    let work = |seed| {
        let (mut buf, mut random) = ([0; BLOCK as usize], Random::new(seed));
        for _ in 0..reads / depth {
            side.read_at(&mut buf, random.below(blocks) * BLOCK)?;
            black_box(&mut buf);
        }
        anyhow::Ok(())
    };
    if depth == 1 {
        let begun = ProcessorTime::of_thread();
        work(seed)?;
        return Ok(begun.elapsed());
    }
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..depth).map(|n| scope.spawn(move || work(seed * depth + n))).collect();
        let mut joined = threads.into_iter().map(|thread| thread.join());
        joined.try_for_each(|done| done.map_err(|_| anyhow!("a reader panicked"))?)
    })?;
    Ok(begun.elapsed())
}

/// Writes to these blocks, and flushes when the time is up.
///
/// # Errors
///
/// Those of the side.
pub fn write_blocks(side: &Side, blocks: impl Iterator<Item = u64>) -> anyhow::Result<Duration> {
    let buf = [0x5a; BLOCK as usize];
    let begun = ProcessorTime::of_thread();
    for block in blocks {
        side.write_at(&buf, block * BLOCK)?;
    }
    let took = begun.elapsed();
    side.flush()?;
    Ok(took)
}

/// Reads or writes the `round`-th quarter, MiB after MiB.
///
/// # Errors
///
/// Those of the side.
pub fn sequentially(
    side: &Side,
    round: u64,
    mut each: impl FnMut(&Side, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Duration> {
    let quarter = side.size() / 4;
    let first = round % 4 * quarter;
    let begun = ProcessorTime::of_thread();
    for at in (first..first + quarter).step_by(MIB as usize) {
        each(side, at)?;
    }
    Ok(begun.elapsed())
}

/// The blocks of a disk in a random order.
#[must_use]
pub fn shuffled(blocks: u64) -> Vec<u64> {
    let mut all: Vec<u64> = (0..blocks).collect();
    let mut random = Random::new(1);
    for n in (1..all.len()).rev() {
        all.swap(n, random.below(n as u64 + 1) as usize);
    }
    all
}

pub(super) fn random_read(bench: &Bench, depth: u64) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.warm()?;
    beside.compare(bench.rounds(25), |side, round| read_blocks(side, bench.bytes(READS), depth, round))
}

/// Of several volumes beside as many pairs of files: where its pages lie in memory makes a file a fifth slower or faster to
/// write to than another, for as long as they are there.
pub(super) fn random_overwrite(bench: &Bench) -> anyhow::Result<Measurement> {
    const SETS: u64 = 32;
    let all = (0..SETS).map(|_| Beside::of(bench, SIZE / SETS)).collect::<anyhow::Result<Vec<_>>>()?;
    for beside in &all {
        beside.touch()?;
        beside.warm()?;
    }
    compare(&all, bench.rounds(2 * SETS as usize), |side, round| {
        let (mut random, blocks) = (Random::new(round), side.size() / BLOCK);
        write_blocks(side, (0..bench.bytes(WRITES)).map(|_| random.below(blocks)))
    })
}

pub(super) fn random_overwrite_first(bench: &Bench) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.warm()?;
    let order = shuffled(beside.volume.size() / BLOCK);
    let writes = bench.bytes(WRITES) as usize;
    beside.compare(bench.rounds(15), |side, round| {
        let blocks = &order[round as usize * writes..][..writes];
        write_blocks(side, blocks.iter().copied())
    })
}

/// With a flush after every 32 blocks, which is most of what it takes.
fn write_and_flush(side: &Side, blocks: impl Iterator<Item = u64>) -> anyhow::Result<Duration> {
    let buf = [0x5a; BLOCK as usize];
    let begun = Instant::now();
    for (block, n) in blocks.zip(1..) {
        side.write_at(&buf, block * BLOCK)?;
        if n % 32 == 0 {
            side.flush()?;
        }
    }
    Ok(begun.elapsed())
}

pub(super) fn random_overwrite_flushed(bench: &Bench) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.touch()?;
    beside.warm()?;
    beside.compare(bench.rounds(15), |side, round| {
        let (mut random, blocks) = (Random::new(round), side.size() / BLOCK);
        write_and_flush(side, (0..512).map(|_| random.below(blocks)))
    })
}

pub(super) fn random_overwrite_first_flushed(bench: &Bench) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.warm()?;
    let order = shuffled(beside.volume.size() / BLOCK);
    beside.compare(bench.rounds(15), |side, round| {
        write_and_flush(side, order[round as usize * 512..][..512].iter().copied())
    })
}

pub(super) fn sequential_read(bench: &Bench) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.warm()?;
    let mut buf = vec![0; MIB as usize];
    beside.compare(bench.rounds(25), |side, round| {
        sequentially(side, round, |side, at| side.read_at(&mut buf, at))
    })
}

/// A quarter in each round, and no quarter twice, the one that does not count among them.
pub(super) fn sequential_read_first(bench: &Bench) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.warm_files()?;
    let mut buf = vec![0; MIB as usize];
    beside.compare(Rounds { rounds: 3, batch: 1 }, |side, round| {
        sequentially(side, round, |side, at| side.read_at(&mut buf, at))
    })
}

pub(super) fn sequential_write(bench: &Bench) -> anyhow::Result<Measurement> {
    let beside = Beside::new(bench)?;
    beside.touch()?;
    write_quarters(&beside, bench.rounds(8))
}

/// What is the snapshot's before, a quarter in each round and none twice.
pub(super) fn sequential_write_first(bench: &Bench) -> anyhow::Result<Measurement> {
    write_quarters(&Beside::new(bench)?, Rounds { rounds: 3, batch: 1 })
}

fn write_quarters(beside: &Beside, rounds: Rounds) -> anyhow::Result<Measurement> {
    beside.warm()?;
    let buf = vec![0x5a; MIB as usize];
    beside.compare(rounds, |side, round| {
        let took = sequentially(side, round, |side, at| side.write_at(&buf, at));
        side.flush()?;
        took
    })
}
