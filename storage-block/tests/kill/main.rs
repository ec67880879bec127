//! A process that writes, grows, makes snapshots and collects is killed, again and again: whatever it had said to be
//! done is there, and of the rest any part.
//!
//! The process is this test itself. It says in lines on its standard output what it begins and what it has done.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod importer;
mod said;

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use said::Said;
use storage_block::keys::LocalKey;
use storage_block::{Compression, Digest, Disk, ErrorKind, Store, StoreOptions, Volume, VolumeOptions};

const DIR: &str = "STORAGE_BLOCK_KILL_DIR";
const SEED: &str = "STORAGE_BLOCK_KILL_SEED";
const SECTOR: usize = 512;
/// Sectors of a new volume, and of one that has grown for long.
const BEGINNING: u64 = 1024;
const END: u64 = 2048;
/// The volumes, and whether they are encrypted.
const VOLUMES: [(&str, bool); 2] = [("main", false), ("secret", true)];

/// Numbers that are the same in every run (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % limit
    }
}

/// Says a line. It is one write to the pipe, so it is there whole or not at all.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("@{line}\n").as_bytes()).and_then(|()| out.flush()).unwrap();
}

/// Every other time what is stored is compressed.
fn open(dir: &Path, time: u64) -> Store {
    let compression = if time % 2 == 0 { Compression::None } else { Compression::WherePays { percent: 10 } };
    let options = StoreOptions::new().compression(compression).keys(Arc::new(LocalKey::from_bytes([1; 32])));
    Store::open_with(dir.join("store"), &options).unwrap()
}

/// The process that is killed. A test only because the test's program is the one there is.
#[test]
fn the_killed_one() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let dir = Path::new(&dir);
    let store = open(dir, seed);
    let volumes = VOLUMES.map(|(name, encrypted)| match Volume::open(&dir.join(name), &store) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut options = VolumeOptions::new();
            if encrypted {
                options = options.encrypt(&store.new_key(None).unwrap());
            }
            options.create(&dir.join(name), None, BEGINNING * SECTOR as u64).unwrap()
        }
        opened => opened.unwrap(),
    });
    say("opened");
    std::thread::scope(|scope| {
        for (at, volume) in volumes.iter().enumerate() {
            scope.spawn(move || write(at, &volume.disk(), seed));
        }
        scope.spawn(|| keep(&volumes, &store, dir, seed));
    });
}

/// Writes sectors full of a number that was never written before, and flushes.
fn write(at: usize, disk: &Disk, seed: u64) {
    let mut random = Random(seed << 1 | at as u64);
    for count in 1.. {
        let all = disk.size() / SECTOR as u64;
        let first = random.below(all);
        let most = [3, 20, 200][random.below(3) as usize];
        let sectors = (random.below(most) + 1).min(all - first);
        let tag = if random.below(5) == 0 { 0 } else { seed << 32 | count << 1 | at as u64 };
        say(&format!("write {at} {first} {sectors} {tag}"));
        let (offset, len) = (first * SECTOR as u64, sectors * SECTOR as u64);
        match tag {
            0 => disk.discard(offset, len).unwrap(),
            _ => disk.write_at(&tag.to_le_bytes().repeat(len as usize / 8), offset).unwrap(),
        }
        say(&format!("written {at}"));
        if random.below(3) == 0 {
            disk.flush().unwrap();
            say(&format!("flushed {at}"));
        }
    }
}

/// Makes snapshots, of one volume or of all at one instant, and clones; has volumes grow, and collects what it does not
/// want.
fn keep(volumes: &[Volume], store: &Store, dir: &Path, seed: u64) {
    let mut random = Random(!seed);
    let mut clone: Option<Volume> = None;
    loop {
        let (named, frozen) = match random.below(volumes.len() as u64 + 1) as usize {
            at if at < volumes.len() => (at.to_string(), &volumes[at..=at]),
            _ => ("0 1".to_owned(), volumes),
        };
        say(&format!("snapshot {named}"));
        let made = Volume::freeze(frozen, store).store(&mut |_| ()).unwrap();
        let mut snapshots: Vec<_> = made.into_iter().map(|(snapshot, _)| snapshot).collect();
        let digests: Vec<String> = snapshots.iter().map(|snapshot| snapshot.digest().to_string()).collect();
        say(&format!("made {}", digests.join(" ")));
        match random.below(5) {
            0 => {
                let old = clone.take();
                say("clone none");
                old.map_or(Ok(()), Volume::delete).and_then(|()| Volume::remove(&dir.join("clone"))).unwrap();
                let of = snapshots.swap_remove(0);
                clone = Some(Volume::create(&dir.join("clone"), Some(&of), of.size()).unwrap());
                say(&format!("clone {}", of.digest()));
            }
            1 => {
                drop(snapshots);
                let mut keep: HashSet<Digest> = store.snapshots().unwrap().into_iter().collect();
                keep.retain(|_| random.below(2) == 0);
                keep.extend(clone.as_ref().and_then(Volume::base));
                let names: Vec<String> = keep.iter().map(Digest::to_string).collect();
                say(&format!("collect {}", names.join(" ")));
                store.sweep().remove_unreferenced(&keep).unwrap();
                say("collected");
            }
            2 => {
                let at = random.below(volumes.len() as u64) as usize;
                let sectors = volumes[at].size() / SECTOR as u64 + 8 * random.below(3);
                if sectors <= END {
                    say(&format!("grow {at} {sectors}"));
                    volumes[at].grow(sectors * SECTOR as u64).unwrap();
                    say(&format!("grown {at}"));
                }
            }
            _ => {}
        }
    }
}

/// `STORAGE_BLOCK_KILLS` says how many.
#[test]
fn what_a_killed_process_had_done_is_there() {
    let kills = std::env::var("STORAGE_BLOCK_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(50);
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut said = Said::new();
    let mut random = Random(1);
    let mut lines = 0;
    for kill in 1..=kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_killed_one", "--nocapture"])
            .env(DIR, dir.path())
            .env(SEED, kill.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut hear = |said: &mut Said, line: String| {
            if let Some((_, line)) = line.split_once('@') {
                said.hear(line);
                lines += 1;
            }
        };
        // Some die before they have opened anything.
        let most = [4, 60, 200][random.below(3) as usize];
        for _ in 0..random.below(most) {
            let line = output.next().expect("it dies only when it is killed");
            hear(&mut said, line);
        }
        // At any moment of what it does next.
        std::thread::sleep(Duration::from_micros(random.below(1500)));
        child.kill().unwrap();
        output.for_each(|line| hear(&mut said, line));
        child.wait().unwrap();
        said.check(dir.path(), kill);
        if kill % 100 == 0 {
            println!("{kill} of {kills} processes were killed");
        }
    }
    println!("{kills} processes were killed, who had said {lines} lines");
}
