//! One image, and clones of it of either kind.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ami_benches::storage::{Bench, evict, import, warm};
use anyhow::{Context as _, ensure};
use storage_block::{Snapshot, Store, Volume};

const IMAGE: u64 = 1 << 30;

pub(crate) struct Overlays<'b> {
    image: PathBuf,
    snapshot: Snapshot,
    made: Cell<usize>,
    bench: &'b Bench,
    dir: Dir,
}

/// A directory that goes with its value.
type Dir = ami_benches::storage::TempDir;

impl<'b> Overlays<'b> {
    pub(crate) fn new(bench: &'b Bench) -> anyhow::Result<Self> {
        let dir = bench.temp_dir()?;
        let image = bench.image(IMAGE)?;
        let store = Store::open(dir.path().join("store"))?;
        let snapshot = import(&store, &image)?;
        Ok(Self { image, snapshot, made: Cell::new(0), bench, dir })
    }

    pub(crate) fn size(&self) -> u64 {
        self.bench.bytes(IMAGE)
    }

    /// A path that nobody else uses.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.made.set(self.made.get() + 1);
        self.dir.path().join(format!("{}-{name}", self.made.get()))
    }

    /// A new volume.
    pub(crate) fn volume(&self) -> anyhow::Result<Volume> {
        Ok(Volume::create(&self.path("volume"), Some(&self.snapshot), self.size())?)
    }

    /// A new qcow2 overlay of the raw image.
    pub(crate) fn qcow2(&self) -> anyhow::Result<PathBuf> {
        let path = self.path("overlay.qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&self.image).arg(&path);
        let output = create.stdin(Stdio::null()).output().context("cannot run qemu-img")?;
        ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(path)
    }

    /// Fills the page cache with the image and the store, each file in the same way.
    pub(crate) fn warm(&self) -> anyhow::Result<()> {
        let all: [&Path; 2] = [&self.image, self.dir.path()];
        all.into_iter().try_for_each(evict)?;
        all.into_iter().try_for_each(warm)
    }
}
