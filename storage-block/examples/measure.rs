//! Prints how long the things take that should take no time: `cargo run --release --example measure [DIR]`.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use storage_block::{Disk, Engine, QueueOptions, RawFile, Snapshot, Store, Volume};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let parent = std::env::args().nth(1).unwrap_or_else(|| ".".to_owned());
    let dir = tempfile::tempdir_in(parent)?;
    let store = Store::open(dir.path().join("store"))?;

    let dense = image(&dir.path().join("dense"), 1 << 30, 1 << 30)?;
    let sparse = image(&dir.path().join("sparse"), 256 << 30, 64 << 20)?;
    let small = import(&store, "1 GiB, dense", &dense)?;
    import(&store, "1 GiB, dense, again", &dense)?;
    let large = import(&store, "256 GiB, 64 MiB of data", &sparse)?;

    for (name, snapshot) in [("1 GiB", &small), ("256 GiB", &large)] {
        let mut times = Vec::new();
        for number in 0..50 {
            let path = dir.path().join(format!("volume-{number}"));
            let start = Instant::now();
            let volume = Volume::create(&path, Some(snapshot), snapshot.size())?;
            times.push(start.elapsed());
            volume.delete()?;
        }
        println!("create a volume of {name}: {}", percentiles(times));
    }

    reads(&dir.path().join("clone"), &dense, &small)?;
    snapshots(&dir.path().join("written"), &store, &small)
}

fn image(path: &Path, size: u64, data: u64) -> Result<Disk, Box<dyn std::error::Error>> {
    let mut file = File::create_new(path)?;
    let mut state = 1u64;
    let mut part = vec![0u8; 1 << 20];
    for _ in 0..data >> 20 {
        for word in part.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&(state >> 1).to_le_bytes());
        }
        file.write_all(&part)?;
    }
    file.set_len(size)?;
    file.sync_all()?;
    Ok(RawFile::open(path, true)?.into_disk())
}

fn import(store: &Store, name: &str, disk: &Disk) -> Result<Snapshot, Box<dyn std::error::Error>> {
    let start = Instant::now();
    let (snapshot, stats) = store.import(disk, &mut |_| ())?;
    println!("import {name}: {:?}, {} bytes stored", start.elapsed(), stats.stored_bytes);
    Ok(snapshot)
}

/// 4 KiB random reads, cached: batches on a raw file, on the snapshot and on a clone, in turn.
fn reads(path: &Path, raw: &Disk, snapshot: &Snapshot) -> Result<(), Box<dyn std::error::Error>> {
    let volume = Volume::create(path, Some(snapshot), snapshot.size())?;
    let disks = [raw.clone(), raw.clone(), snapshot.disk(), volume.disk()];
    let mut buf = vec![0; 1 << 20];
    for disk in &disks {
        for at in (0..disk.size()).step_by(buf.len()) {
            disk.read_at(&mut buf, at)?;
        }
    }
    let mut times = [const { Vec::new() }; 4];
    for round in 0..40u64 {
        for (disk, times) in disks.iter().zip(&mut times) {
            let mut state = round + 1;
            let start = Instant::now();
            for _ in 0..10_000 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                disk.read_at(&mut buf[..4096], (state >> 20) % (disk.size() / 4096) * 4096)?;
            }
            times.push(start.elapsed() / 10_000);
        }
    }
    for (name, times) in ["raw file", "raw file again", "snapshot", "clone"].iter().zip(times) {
        println!("4 KiB random read, {name}: {}", percentiles(times));
    }
    for engine in [Engine::IoUring, Engine::Threads] {
        for depth in [1, 32] {
            queued(&disks, engine, depth)?;
        }
    }
    Ok(())
}

/// The same by a queue; each batch's time is compared with the raw file's of the same round.
fn queued(disks: &[Disk], engine: Engine, depth: u32) -> Result<(), Box<dyn std::error::Error>> {
    let options = QueueOptions::new(depth).engine(engine);
    let mut queues = disks.iter().map(|disk| disk.queue_with(&options)).collect::<Result<Vec<_>, _>>()?;
    let mut buffers: Vec<_> = (0..depth).map(|_| vec![0; 4096]).collect();
    let mut times = vec![Vec::new(); disks.len()];
    for round in 0..40u64 {
        for (number, queue) in queues.iter_mut().enumerate() {
            let blocks = disks[number].size() / 4096;
            let mut state = round + 1;
            let mut left = 10_000;
            let start = Instant::now();
            while left > 0 || queue.in_flight() > 0 {
                while let Some(buffer) = if left > 0 { buffers.pop() } else { None } {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    queue.read(0, (state >> 20) % blocks * 4096, buffer);
                    left -= 1;
                }
                queue.submit();
                let mut done = queue.wait();
                while let Some(read) = done {
                    read.result?;
                    buffers.extend(read.buffer);
                    done = queue.completed();
                }
            }
            times[number].push(start.elapsed().as_nanos() as f64);
        }
    }
    for (number, name) in ["raw file", "raw file again", "snapshot", "clone"].iter().enumerate() {
        let mut ratios: Vec<_> = times[0].iter().zip(&times[number]).map(|(raw, own)| raw / own).collect();
        ratios.sort_by(f64::total_cmp);
        let mut own = times[number].clone();
        own.sort_by(f64::total_cmp);
        println!(
            "4 KiB random read by {engine:?} at depth {depth}, {name}: {:.0} ns each, {:.2} of the raw file",
            own[own.len() / 2] / 10_000.0,
            ratios[ratios.len() / 2],
        );
    }
    Ok(())
}

/// A snapshot after 256 scattered 4 KiB writes.
fn snapshots(path: &Path, store: &Store, base: &Snapshot) -> Result<(), Box<dyn std::error::Error>> {
    let volume = Volume::create(path, Some(base), base.size())?;
    let mut writes = Vec::new();
    for number in 0..256u64 {
        let start = Instant::now();
        volume.disk().write_at(&[number as u8; 4096], number * 4_190_208 % base.size() / 4096 * 4096)?;
        volume.disk().flush()?;
        writes.push(start.elapsed());
    }
    println!("first 4 KiB write and flush: {}", percentiles(writes));
    let start = Instant::now();
    let (_, stats) = volume.snapshot(store)?;
    println!(
        "snapshot after 256 scattered writes: {:?}, {} bytes stored",
        start.elapsed(),
        stats.stored_bytes
    );
    Ok(())
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 100];
    format!("least {:?}, median {:?}, p90 {:?}", at(0), at(50), at(90))
}
