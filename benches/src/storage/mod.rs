//! Volumes and snapshots beside raw files, bare hashing and `qemu-nbd`.
//!
//! What is compared holds the same real bytes, on one file system, and its page cache is filled in the same
//! way: written, synchronised, dropped and read from one end to the other.

pub mod blocks;
mod clones;
pub mod corpus;
pub mod imports;
pub mod nbd;
mod pause;
mod reads;
pub mod space;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::Advice;
use storage_block::{RawFile, Snapshot, Store};
pub use tempfile::TempDir;

use crate::samples::{Measurement, Rounds};

/// A block, the unit of random requests.
pub const BLOCK: u64 = 4096;
/// The unit of sequential requests.
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Where to measure, and how much.
#[derive(Debug, Clone)]
pub struct Bench {
    dir: PathBuf,
    quick: bool,
}

impl Bench {
    /// Measures in `dir`, which is there; quickly means less data and fewer rounds, to see that it works.
    pub fn new(dir: &Path, quick: bool) -> Self {
        Self { dir: dir.to_owned(), quick }
    }

    /// A size, or a sixteenth of it.
    #[must_use]
    pub fn bytes(&self, full: u64) -> u64 {
        if self.quick { full / 16 } else { full }
    }

    /// Rounds with a batch of one, or few.
    #[must_use]
    pub fn rounds(&self, full: usize) -> Rounds {
        Rounds { rounds: if self.quick { full.min(3) } else { full }, batch: 1 }
    }

    /// A directory of one measurement's own.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn temp_dir(&self) -> anyhow::Result<TempDir> {
        tempfile::tempdir_in(&self.dir)
            .with_context(|| format!("cannot make a directory in {}", self.dir.display()))
    }

    /// Real data, `bytes` of it as [`bytes`](Self::bytes) scales them, as a raw image.
    ///
    /// # Errors
    ///
    /// As [`corpus::prepare`].
    pub fn image(&self, bytes: u64) -> anyhow::Result<PathBuf> {
        corpus::prepare(&self.dir, self.bytes(bytes))
    }
}

/// Takes the measurement of this name.
///
/// # Errors
///
/// When there is none, or what it needs is not there.
pub fn measure(name: &str, bench: &Bench) -> anyhow::Result<Measurement> {
    match name {
        "clone_1t_over_1g" => clones::large_over_small(bench),
        "clone_over_empty_file" => clones::over_empty_file(bench, false),
        "clone_over_named_file" => clones::over_empty_file(bench, true),
        "random_read" => blocks::random_read(bench, 1),
        "random_read_depth_32" => blocks::random_read(bench, 32),
        "random_read_depth_32_queued" => reads::queued(bench, 32),
        "random_read_overwritten_5" => reads::overwritten(bench, 5),
        "random_read_overwritten_50" => reads::overwritten(bench, 50),
        "random_overwrite" => blocks::random_overwrite(bench),
        "random_overwrite_first" => blocks::random_overwrite_first(bench),
        "random_overwrite_flushed" => blocks::random_overwrite_flushed(bench),
        "random_overwrite_first_flushed" => blocks::random_overwrite_first_flushed(bench),
        "sequential_read" => blocks::sequential_read(bench),
        "sequential_read_first" => blocks::sequential_read_first(bench),
        "sequential_write" => blocks::sequential_write(bench),
        "sequential_write_first" => blocks::sequential_write_first(bench),
        "import_over_sha256" => imports::over_sha256(bench),
        "import_over_copy" => imports::over_copy(bench),
        "import_processor_time" => imports::processor_time(bench),
        "import_two_processors" => imports::two_processors(bench),
        "snapshot_over_hash_and_write" => imports::snapshot(bench),
        "snapshot_pause" => pause::under_load(bench, 1, 95),
        "snapshot_pause_longest" => pause::under_load(bench, 1, 100),
        "snapshot_pause_of_4" => pause::under_load(bench, 4, 95),
        "space_of_20_clones" => space::of_clones(bench),
        "nbd_read_4k" => nbd::read_4k(bench),
        "nbd_write_4k" => nbd::write_4k(bench),
        "nbd_read_1m" => nbd::read_1m(bench),
        "nbd_write_1m" => nbd::write_1m(bench),
        _ => bail!("there is no measurement {name:?}"),
    }
}

/// Imports a raw image.
///
/// # Errors
///
/// Those of the store.
pub fn import(store: &Store, image: &Path) -> anyhow::Result<Snapshot> {
    let disk = RawFile::open(image, true)?.into_disk();
    Ok(store.import(&disk, &mut |_| ())?.0)
}

/// Calls `each` with every file below a path, or with the path's own file.
fn each_file(path: &Path, each: &mut dyn FnMut(&File) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            each_file(&entry?.path(), each)?;
        }
    } else if path.is_file() {
        each(&File::open(path)?)?;
    }
    Ok(())
}

/// Makes the files below `path` durable and drops them from the page cache.
///
/// # Errors
///
/// What the file system says.
pub fn evict(path: &Path) -> anyhow::Result<()> {
    each_file(path, &mut |file| {
        file.sync_all()?;
        Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
    })
}

/// Fills the page cache with the files below `path`, each from one end to the other. Files that are mostly holes
/// are left out: nothing is read from them.
///
/// # Errors
///
/// What the file system says.
pub fn warm(path: &Path) -> anyhow::Result<()> {
    let mut buf = vec![0; MIB as usize];
    each_file(path, &mut |mut file| {
        let metadata = file.metadata()?;
        let filled = metadata.blocks() * 512 >= metadata.len() / 2;
        while filled && file.read(&mut buf)? > 0 {}
        Ok(())
    })
}
