//! What clones take up on the disk.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use storage_block::{Disk, Store, Volume};

use super::blocks::shuffled;
use super::{BLOCK, Bench, GIB, import};
use crate::samples::Measurement;

/// The clones of an image.
pub const CLONES: u64 = 20;

/// Writes a hundredth of the blocks of the `n`-th clone, which no other clone writes, and makes it durable. Returns how
/// many bytes that is.
///
/// # Errors
///
/// Those of the disk.
pub fn write_private(disk: &Disk, n: u64, order: &[u64]) -> anyhow::Result<u64> {
    let private = order.len() / 100;
    for block in &order[n as usize * private..][..private] {
        disk.write_at(&[n as u8 + 1; BLOCK as usize], block * BLOCK)?;
    }
    disk.flush()?;
    Ok(private as u64 * BLOCK)
}

/// The space of an image and its clones, a hundredth of each written, over that of the image's file and what
/// was written.
pub(super) fn of_clones(bench: &Bench) -> anyhow::Result<Measurement> {
    let dir = bench.temp_dir()?;
    let image = bench.image(GIB)?;
    let store = Store::open(dir.path().join("store"))?;
    let snapshot = import(&store, &image)?;
    let order = shuffled(snapshot.size() / BLOCK);
    let mut ideal = allocated(&image)?;
    for n in 0..CLONES {
        let volume =
            Volume::create(&dir.path().join(format!("volume-{n}")), Some(&snapshot), snapshot.size())?;
        ideal += write_private(&volume.disk(), n, &order)?;
    }
    let taken = allocated(dir.path())?;
    let samples = [("bytes".to_owned(), vec![taken as f64, ideal as f64])].into();
    Ok(Measurement { value: taken as f64 / ideal as f64, noise: None, samples })
}

/// The bytes on the disk of all that is below `path`.
///
/// # Errors
///
/// What the file system says.
pub fn allocated(path: &Path) -> anyhow::Result<u64> {
    let metadata = path.symlink_metadata()?;
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in path.read_dir()? {
            bytes += allocated(&entry?.path())?;
        }
    }
    Ok(bytes)
}
