//! Prints what compression, encryption and verification cost, and what clones of an image take:
//! `cargo run --release --example packs IMAGE [DIR]`, with any large file of real data for the image.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use storage_block::keys::LocalKey;
use storage_block::{Compression, Disk, RawFile, Store, StoreOptions, Verify, Volume};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).ok_or("which image?")?;
    let parent = std::env::args().nth(2).unwrap_or_else(|| ".".to_owned());
    let image = RawFile::open(image, true)?.into_disk();
    for (name, compressed, encrypted) in [
        ("plain", false, false),
        ("compressed", true, false),
        ("encrypted", false, true),
        ("compressed and encrypted", true, true),
    ] {
        let dir = tempfile::tempdir_in(&parent)?;
        let compression = if compressed { Compression::WherePays { percent: 20 } } else { Compression::None };
        let options = StoreOptions::new().compression(compression).keys(Arc::new(LocalKey::generate()?));
        measure(name, &image, dir.path(), &options, encrypted)?;
    }
    Ok(())
}

fn measure(
    name: &str,
    image: &Disk,
    dir: &Path,
    options: &StoreOptions,
    encrypted: bool,
) -> Result<(), Error> {
    println!("{name}");
    let store = Store::open_with(dir.join("store"), options)?;
    let start = Instant::now();
    let (snapshot, stats) = match encrypted {
        true => store.import_encrypted(image, &store.new_key(None)?, &mut |_| ())?,
        false => store.import(image, &mut |_| ())?,
    };
    let took = start.elapsed();
    println!("  import of {} MiB: {took:?}, {} MiB stored", image.size() >> 20, stats.stored_bytes >> 20);

    for what in ["first read, with verification", "second read"] {
        println!("  {what}: {:.0} MiB/s", read_through(&snapshot.disk())?);
    }
    let unverified = Store::open_with(dir.join("other"), &options.clone().verify(Verify::Never))?;
    let (copy, _) = match encrypted {
        true => unverified.import_encrypted(image, &unverified.new_key(None)?, &mut |_| ())?,
        false => unverified.import(image, &mut |_| ())?,
    };
    println!("  first read, without verification: {:.0} MiB/s", read_through(&copy.disk())?);
    drop((copy, unverified));
    std::fs::remove_dir_all(dir.join("other"))?;

    let volume = Volume::create(&dir.join("reader"), Some(&snapshot), snapshot.size())?;
    random_reads(image, &volume.disk())?;
    drop(volume);

    let image_stored = allocated(&dir.join("store"))?;
    for (what, scattered) in [("scattered blocks", true), ("runs of 1 MiB", false)] {
        let before = allocated(dir)?;
        let mut private = 0;
        for number in 0..20u64 {
            let path = dir.join(format!("{what}-{number}"));
            let volume = Volume::create(&path, Some(&snapshot), snapshot.size())?;
            private += write_part(&volume.disk(), image, number, scattered)?;
            volume.disk().flush()?;
            volume.snapshot(&store)?;
        }
        let all = allocated(dir)? - before + image_stored;
        println!(
            "  20 clones with 1 % of {what} each, snapshotted: {:.2} of image and private data ({} MiB)",
            all as f64 / (image_stored + private) as f64,
            all >> 20
        );
    }
    Ok(())
}

/// Writes one percent of the disk, other bytes of the image; returns how many bytes.
fn write_part(disk: &Disk, image: &Disk, seed: u64, scattered: bool) -> Result<u64, Error> {
    let len: u64 = if scattered { 4096 } else { 1 << 20 };
    let mut random = Random(seed + 1);
    let mut buf = vec![0; len as usize];
    let places = disk.size() / len;
    for _ in 0..places / 100 {
        image.read_at(&mut buf, random.below(places) * len)?;
        buf.iter_mut().for_each(|byte| *byte ^= seed as u8 | 1);
        disk.write_at(&buf, random.below(places) * len)?;
    }
    Ok(places / 100 * len)
}

fn read_through(disk: &Disk) -> Result<f64, Error> {
    let mut buf = vec![0; 1 << 20];
    let start = Instant::now();
    for at in (0..disk.size() >> 20 << 20).step_by(buf.len()) {
        disk.read_at(&mut buf, at)?;
    }
    Ok((disk.size() >> 20) as f64 / start.elapsed().as_secs_f64())
}

/// 4 KiB random reads, cached: batches on the raw file, on itself again and on a clone, in turn.
fn random_reads(raw: &Disk, clone: &Disk) -> Result<(), Error> {
    const READS: u32 = 5_000;
    let disks = [raw, raw, clone];
    for disk in disks {
        read_through(disk)?;
    }
    let mut ratios = [Vec::new(), Vec::new()];
    let (mut buf, mut least) = (vec![0; 4096], Duration::MAX);
    for round in 0..40 {
        let mut times = Vec::new();
        for disk in disks {
            let mut random = Random(round + 1);
            let start = Instant::now();
            for _ in 0..READS {
                disk.read_at(&mut buf, random.below(disk.size() / 4096) * 4096)?;
            }
            times.push(start.elapsed() / READS);
        }
        least = least.min(times[2]);
        for (ratios, time) in ratios.iter_mut().zip(&times[1..]) {
            ratios.push(times[0].as_secs_f64() / time.as_secs_f64());
        }
    }
    ratios.iter_mut().for_each(|ratios| ratios.sort_by(f64::total_cmp));
    let [noise, clone] = ratios.map(|ratios| ratios[ratios.len() / 2]);
    println!(
        "  4 KiB random reads of a clone: {clone:.2} of a raw file (itself: {noise:.2}), {least:?} at best"
    );
    Ok(())
}

/// Bytes that the files under a directory take on the disk.
fn allocated(dir: &Path) -> Result<u64, Error> {
    use std::os::unix::fs::MetadataExt as _;
    let mut sum = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += if metadata.is_dir() { allocated(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(sum)
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end.max(1)
    }
}
