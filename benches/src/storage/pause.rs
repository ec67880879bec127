//! How long writers stand still for a snapshot.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use storage_block::{Disk, Store, Volume};

use super::blocks::shuffled;
use super::{Bench, GIB};
use crate::samples::Measurement;

/// Bytes of a write.
const WRITE: u64 = 64 << 10;
/// Bytes of a discard: as many as a volume zeroes in one go, which is what a freeze can have to wait for.
const DISCARD: u64 = 8 << 20;
/// Of so many requests one is a discard, and one a flush.
const OTHERS: usize = 64;

/// The pause, in milliseconds, that so many in a hundred freezes of large volumes at one instant stay below, while two
/// threads a volume write, discard and flush as fast as the disk lets them.
pub(super) fn under_load(bench: &Bench, volumes: u64, percent: usize) -> anyhow::Result<Measurement> {
    let dir = bench.temp_dir()?;
    let store = Store::open(dir.path().join("store"))?;
    let size = bench.bytes(8 * GIB / volumes);
    let volumes = (0..volumes).map(|n| Volume::create(&dir.path().join(n.to_string()), None, size));
    let volumes = volumes.collect::<storage_block::Result<Vec<_>>>()?;
    let (over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let order = shuffled(size / WRITE);
    let write = &|disk: Disk, from: usize| -> storage_block::Result<()> {
        let bytes = vec![7; WRITE as usize];
        for (number, at) in order.iter().cycle().skip(from).enumerate() {
            if over.load(Ordering::Acquire) {
                break;
            }
            match number % OTHERS {
                0 => disk.discard(at * WRITE / DISCARD * DISCARD, DISCARD)?,
                1 => disk.flush()?,
                _ => disk.write_at(&bytes, at * WRITE)?,
            }
            written.fetch_add(1, Ordering::Release);
        }
        Ok(())
    };
    let freezes = bench.rounds(200).rounds.max(20);
    let mut paused: Vec<Duration> = Vec::new();
    thread::scope(|scope| {
        let half = |from| volumes.iter().map(move |volume| (volume.disk(), from));
        let writers = half(0).chain(half(order.len() / 2));
        let writers: Vec<_> = writers.map(|(disk, from)| scope.spawn(move || write(disk, from))).collect();
        for _ in 0..freezes {
            let before = written.load(Ordering::Acquire);
            paused.push(Volume::freeze(&volumes, &store).paused());
            // Each meets writers at work.
            while written.load(Ordering::Acquire) < before + OTHERS as u64 && !writers[0].is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        over.store(true, Ordering::Release);
        writers.into_iter().try_for_each(|writer| match writer.join() {
            Ok(written) => Ok(written?),
            Err(_) => anyhow::bail!("a writer panicked"),
        })
    })?;
    ensure!(paused.len() == freezes, "some freezes are missing");
    let mut pauses: Vec<f64> = paused.iter().map(|paused| paused.as_secs_f64() * 1e3).collect();
    pauses.sort_unstable_by(f64::total_cmp);
    let value = pauses[(pauses.len() * percent / 100).min(pauses.len() - 1)];
    Ok(Measurement { value, noise: None, samples: [("pauses in ms".to_owned(), pauses)].into() })
}
