//! How long it takes to make snapshots: of an image, and of a volume.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;
use storage_block::{Digest, Disk, Store, Volume};

use super::blocks::Random;
use super::{BLOCK, Bench, GIB, MIB, corpus, import};
use crate::samples::{Measurement, ProcessorTime, median_ratio, median_speed};

/// What is imported.
pub const IMAGE: u64 = 4 * GIB;
/// The volume of which a hundredth changes.
pub const VOLUME: u64 = 8 * GIB;
/// What is hashed and stored at once.
const CHUNK: u64 = 64 << 10;

/// How long it takes to import an image into a new store.
///
/// # Errors
///
/// Those of the store.
pub fn timed_import(bench: &Bench, image: &Path) -> anyhow::Result<Duration> {
    let dir = bench.temp_dir()?;
    let store = Store::open(dir.path())?;
    let begun = Instant::now();
    import(&store, image)?;
    Ok(begun.elapsed())
}

/// The time that hashing takes one processor, the reading left out.
fn timed_hash(image: &Path) -> anyhow::Result<Duration> {
    let file = File::open(image)?;
    let (mut buf, mut took) = (vec![0; MIB as usize], Duration::ZERO);
    for at in (0..file.metadata()?.len()).step_by(MIB as usize) {
        file.read_exact_at(&mut buf, at)?;
        let begun = ProcessorTime::of_thread();
        for chunk in buf.chunks(CHUNK as usize) {
            black_box(Digest::of(chunk));
        }
        took += begun.elapsed();
    }
    Ok(took)
}

pub(super) fn over_sha256(bench: &Bench) -> anyhow::Result<Measurement> {
    let image = bench.image(IMAGE)?;
    let mut import = || timed_import(bench, &image);
    let (mut hash, mut again) = (|| timed_hash(&image), || timed_hash(&image));
    let rounds = bench.rounds(3);
    median_speed(rounds, ("import", &mut import), ("SHA-256", &mut hash), ("SHA-256 again", &mut again))
}

pub(super) fn over_copy(bench: &Bench) -> anyhow::Result<Measurement> {
    let image = bench.image(IMAGE)?;
    let mut import = || timed_import(bench, &image);
    let copy = || {
        let dir = bench.temp_dir()?;
        let begun = Instant::now();
        corpus::copy(&image, &dir.path().join("copy"), bench.bytes(IMAGE))?.sync_data()?;
        Ok(begun.elapsed())
    };
    let (mut copy, mut again) = (copy, copy);
    median_speed(bench.rounds(2), ("import", &mut import), ("copy", &mut copy), ("copy again", &mut again))
}

/// What an import takes of all processors, over what hashing alone takes of one.
pub(super) fn processor_time(bench: &Bench) -> anyhow::Result<Measurement> {
    let image = bench.image(IMAGE / 4)?;
    let mut import = || {
        let begun = ProcessorTime::of_process();
        timed_import(bench, &image)?;
        Ok(begun.elapsed())
    };
    let mut hash = || timed_hash(&image);
    median_ratio(bench.rounds(5), ("import", &mut import), ("SHA-256", &mut hash))
}

/// A quarter of the image, so that the disk keeps up.
pub(super) fn two_processors(bench: &Bench) -> anyhow::Result<Measurement> {
    let image = bench.image(IMAGE / 4)?;
    let all = rustix::thread::sched_getaffinity(None)?;
    let of_one = || {
        let mut one = CpuSet::new();
        if let Some(first) = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)) {
            one.set(first);
        }
        rustix::thread::sched_setaffinity(None, &one)?;
        let took = timed_import(bench, &image);
        rustix::thread::sched_setaffinity(None, &all)?;
        took
    };
    let mut two = || timed_import(bench, &image);
    let (mut one, mut again) = (of_one, of_one);
    median_speed(bench.rounds(5), ("all processors", &mut two), ("one", &mut one), ("one again", &mut again))
}

/// Changes a hundredth of a disk, in pieces of a chunk's size that lie as they like, and makes it durable.
///
/// # Errors
///
/// Those of the disk.
pub fn change_a_hundredth(disk: &Disk, seed: u64) -> anyhow::Result<()> {
    let (mut random, mut piece) = (Random::new(seed), vec![0; CHUNK as usize]);
    for _ in 0..disk.size() / 100 / CHUNK {
        piece.fill_with(|| random.below(256) as u8);
        disk.write_at(&piece, random.below((disk.size() - CHUNK) / BLOCK) * BLOCK)?;
    }
    Ok(disk.flush()?)
}

pub(super) fn snapshot(bench: &Bench) -> anyhow::Result<Measurement> {
    let dir = bench.temp_dir()?;
    let store = Store::open(dir.path().join("store"))?;
    let base = import(&store, &bench.image(IMAGE)?)?;
    let size = bench.bytes(VOLUME);
    let changed = std::cell::Cell::new(0);
    let mut round = 0;
    let mut snapshot = || {
        round += 1;
        let volume = Volume::create(&dir.path().join("volume"), Some(&base), size)?;
        change_a_hundredth(&volume.disk(), round)?;
        let begun = Instant::now();
        let (_, stats) = volume.snapshot(&store)?;
        let took = begun.elapsed();
        changed.set(stats.stored_bytes / CHUNK);
        volume.delete()?;
        Ok(took)
    };
    let bytes = vec![0x5a; (MIB * 64) as usize];
    // As many chunks as the snapshot before has stored; its leaves are counted too, half of what they take.
    let hash_and_write = || {
        let path = dir.path().join("written");
        let file = File::create(&path)?;
        let begun = Instant::now();
        let (mut at, end) = (0, changed.get() * CHUNK);
        while at < end {
            let len = (end - at).min(MIB);
            let part = &bytes[(at % bytes.len() as u64) as usize..][..len as usize];
            for chunk in part.chunks(CHUNK as usize) {
                black_box(Digest::of(chunk));
            }
            file.write_all_at(part, at)?;
            at += len;
        }
        file.sync_data()?;
        let took = begun.elapsed();
        std::fs::remove_file(&path)?;
        Ok(took)
    };
    let mut hash_and_write = hash_and_write;
    let rounds = bench.rounds(9);
    median_ratio(rounds, ("snapshot", &mut snapshot), ("hash and write", &mut hash_and_write))
}
