//! What becomes of whole images: made, kept as they are at an instant, and how much of the disk they take.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use ami_benches::samples::{Measurement, median_ratio};
use ami_benches::storage::blocks::shuffled;
use ami_benches::storage::imports::{self, change_a_hundredth, timed_import};
use ami_benches::storage::space::{CLONES, allocated, write_private};
use ami_benches::storage::{BLOCK, Bench, import};
use anyhow::ensure;
use storage_block::{Store, Volume};

use crate::imago_disk;
use crate::overlays::{Overlays, overlay_of, qemu_img};

fn sync(path: &Path) -> anyhow::Result<()> {
    Ok(File::open(path)?.sync_all()?)
}

/// A raw image becomes a qcow2 image there, and a snapshot here.
pub(crate) fn import_beside_qemu_img(bench: &Bench) -> anyhow::Result<Measurement> {
    let image = bench.image(imports::IMAGE)?;
    let mut theirs = || {
        let dir = bench.temp_dir()?;
        let to = dir.path().join("image.qcow2");
        let begun = Instant::now();
        qemu_img("convert", |it| it.args(["-q", "-f", "raw", "-O", "qcow2"]).arg(&image).arg(&to))?;
        sync(&to)?;
        Ok(begun.elapsed())
    };
    let mut ours = || timed_import(bench, &image);
    median_ratio(bench.rounds(3), ("qemu-img", &mut theirs), ("import", &mut ours))
}

/// A hundredth of a clone has changed, and is to be kept while the clone goes on. There the overlay gets one on top of it
/// that is written from then on, and its clusters are copied to an overlay of the image, so that what is kept does not
/// depend on the clone and no chain grows.
pub(crate) fn snapshot_beside_qemu_img(bench: &Bench) -> anyhow::Result<Measurement> {
    let dir = bench.temp_dir()?;
    let (image, size) = (bench.image(imports::IMAGE)?, bench.bytes(imports::VOLUME));
    let store = Store::open(dir.path().join("store"))?;
    let base = import(&store, &image)?;
    let mut round = 0;
    let mut theirs = || {
        round += 1;
        let dir = bench.temp_dir()?;
        let [clone, next, kept] = ["clone", "next", "kept"].map(|name| dir.path().join(name));
        overlay_of(&image, "raw", &clone, size)?;
        change_a_hundredth(&imago_disk::open(&clone)?, round)?;
        let begun = Instant::now();
        overlay_of(&clone, "qcow2", &next, size)?;
        qemu_img("convert", |it| {
            it.args(["-q", "-f", "qcow2", "-O", "qcow2", "-F", "raw", "-B"]).args([&image, &clone, &kept])
        })?;
        sync(&next)?;
        sync(&kept)?;
        let took = begun.elapsed();
        ensure!(allocated(&kept)? >= size / 128, "qemu-img has not kept what has changed");
        Ok(took)
    };
    let mut again = 0;
    let mut ours = || {
        again += 1;
        let volume = Volume::create(&dir.path().join("volume"), Some(&base), size)?;
        change_a_hundredth(&volume.disk(), again)?;
        let begun = Instant::now();
        volume.snapshot(&store)?;
        let took = begun.elapsed();
        volume.delete()?;
        Ok(took)
    };
    median_ratio(bench.rounds(9), ("qemu-img", &mut theirs), ("snapshot", &mut ours))
}

/// The space of an image and its overlays over that of a snapshot and its volumes, a hundredth of each written.
pub(crate) fn space_of_20_clones(bench: &Bench) -> anyhow::Result<Measurement> {
    let overlays = Overlays::new(bench)?;
    let order = shuffled(overlays.size() / BLOCK);
    let (mut theirs, mut ours) = (allocated(overlays.image())?, allocated(overlays.store())?);
    for n in 0..CLONES {
        let overlay = overlays.qcow2()?;
        write_private(&imago_disk::open(&overlay)?, n, &order)?;
        theirs += allocated(&overlay)?;
        let volume = overlays.volume()?;
        write_private(&volume.disk(), n, &order)?;
        ours += allocated(volume.dir())?;
    }
    let samples = [("bytes".to_owned(), vec![theirs as f64, ours as f64])].into();
    Ok(Measurement { value: theirs as f64 / ours as f64, noise: None, samples })
}
