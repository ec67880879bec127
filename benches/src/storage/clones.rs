//! How long it takes to make a volume of a snapshot.

use std::fs::File;
use std::time::{Duration, Instant};

use storage_block::{Snapshot, Store, Volume};
use tempfile::TempDir;

use super::{BLOCK, Bench, GIB, import};
use crate::samples::{Measurement, Rounds, median_ratio};

/// Snapshots to clone, in a directory of their own.
struct Origin {
    small: Snapshot,
    large: Snapshot,
    dir: TempDir,
}

impl Origin {
    fn new(bench: &Bench) -> anyhow::Result<Self> {
        let dir = bench.temp_dir()?;
        let store = Store::open(dir.path().join("store"))?;
        let small = import(&store, &bench.image(GIB)?)?;
        // In every GiB of it there is something.
        let path = dir.path().join("large.raw");
        let disk = storage_block::RawFile::create(&path, 1024 * GIB)?.into_disk();
        for n in 0..1024_u64 {
            disk.write_at(&(n + 1).to_le_bytes().repeat(512), n * GIB + n * BLOCK)?;
        }
        drop(disk);
        let large = import(&store, &path)?;
        Ok(Self { small, large, dir })
    }

    fn clone(&self, of: &Snapshot) -> anyhow::Result<Duration> {
        let path = self.dir.path().join("volume");
        let begun = Instant::now();
        let volume = Volume::create(&path, Some(of), of.size())?;
        let took = begun.elapsed();
        volume.delete()?;
        Ok(took)
    }

    /// The least that anything durable costs. A file that a power cut must not take the name of is `named`: POSIX asks
    /// for its directory to be synchronised, as a clone's is.
    fn empty_file(&self, named: bool) -> anyhow::Result<Duration> {
        let path = self.dir.path().join("empty");
        let begun = Instant::now();
        File::create_new(&path)?.sync_all()?;
        if named {
            File::open(self.dir.path())?.sync_all()?;
        }
        let took = begun.elapsed();
        std::fs::remove_file(&path)?;
        Ok(took)
    }
}

fn rounds(bench: &Bench) -> Rounds {
    Rounds { batch: 8, ..bench.rounds(25) }
}

pub(super) fn large_over_small(bench: &Bench) -> anyhow::Result<Measurement> {
    let origin = Origin::new(bench)?;
    let mut large = || origin.clone(&origin.large);
    let mut small = || origin.clone(&origin.small);
    median_ratio(rounds(bench), ("1 TiB", &mut large), ("1 GiB", &mut small))
}

pub(super) fn over_empty_file(bench: &Bench, named: bool) -> anyhow::Result<Measurement> {
    let origin = Origin::new(bench)?;
    let mut clone = || origin.clone(&origin.large);
    let mut empty = || origin.empty_file(named);
    median_ratio(rounds(bench), ("1 TiB", &mut clone), ("empty file", &mut empty))
}
