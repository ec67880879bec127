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
    store: PathBuf,
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
        let store = dir.path().join("store");
        let snapshot = import(&Store::open(&store)?, &image)?;
        Ok(Self { image, store, snapshot, made: Cell::new(0), bench, dir })
    }

    /// The raw image.
    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    /// The store that holds it as a snapshot.
    pub(crate) fn store(&self) -> &Path {
        &self.store
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
        overlay_of(&self.image, "raw", &path, self.size())?;
        Ok(path)
    }

    /// Fills the page cache with the image and the store, each file in the same way.
    pub(crate) fn warm(&self) -> anyhow::Result<()> {
        let all: [&Path; 2] = [&self.image, self.dir.path()];
        all.into_iter().try_for_each(evict)?;
        all.into_iter().try_for_each(warm)
    }
}

/// Makes a qcow2 overlay of an image.
pub(crate) fn overlay_of(base: &Path, format: &str, path: &Path, size: u64) -> anyhow::Result<()> {
    let of = ["-q", "-f", "qcow2", "-F", format, "-b"];
    qemu_img("create", |create| create.args(of).arg(base).arg(path).arg(size.to_string()))
}

/// Runs `qemu-img` with a command of its own.
pub(crate) fn qemu_img(command: &str, with: impl FnOnce(&mut Command) -> &mut Command) -> anyhow::Result<()> {
    let mut program = Command::new("qemu-img");
    let output = with(program.arg(command)).stdin(Stdio::null()).output().context("cannot run qemu-img")?;
    ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
