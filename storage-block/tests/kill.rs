//! A process that writes, makes snapshots and collects is killed, again and again: whatever it had said to be
//! done is there, and of the rest any part.
//!
//! The process is this test itself. It says in lines on its standard output what it begins and what it has done.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use storage_block::{Digest, Disk, ErrorKind, MemoryDisk, Snapshot, Store, Volume};

const DIR: &str = "STORAGE_BLOCK_KILL_DIR";
const SEED: &str = "STORAGE_BLOCK_KILL_SEED";
const SECTOR: usize = 512;
const SECTORS: u64 = 1024;

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

/// The process that is killed. A test only because the test's program is the one there is.
#[test]
fn the_killed_one() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let dir = Path::new(&dir);
    let store = Store::open(dir.join("store")).unwrap();
    let volume = match Volume::open(&dir.join("main"), &store) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Volume::create(&dir.join("main"), None, SECTORS * SECTOR as u64).unwrap()
        }
        opened => opened.unwrap(),
    };
    say("opened");
    std::thread::scope(|scope| {
        scope.spawn(|| write(&volume.disk(), seed));
        scope.spawn(|| keep(&volume, &store, dir, seed));
    });
}

/// Writes sectors full of a number that was never written before, and flushes.
fn write(disk: &Disk, seed: u64) {
    let mut random = Random(seed);
    for count in 1.. {
        let first = random.below(SECTORS);
        let most = [3, 20, 200][random.below(3) as usize];
        let sectors = (random.below(most) + 1).min(SECTORS - first);
        let tag = if random.below(5) == 0 { 0 } else { seed << 32 | count };
        say(&format!("write {first} {sectors} {tag}"));
        let (offset, len) = (first * SECTOR as u64, sectors * SECTOR as u64);
        match tag {
            0 => disk.discard(offset, len).unwrap(),
            _ => disk.write_at(&tag.to_le_bytes().repeat(len as usize / 8), offset).unwrap(),
        }
        say("written");
        if random.below(3) == 0 {
            disk.flush().unwrap();
            say("flushed");
        }
    }
}

/// Makes snapshots and clones, and collects what it does not want.
fn keep(volume: &Volume, store: &Store, dir: &Path, seed: u64) {
    let mut random = Random(!seed);
    let mut clone: Option<Volume> = None;
    loop {
        say("snapshot");
        let (snapshot, _) = volume.snapshot(store).unwrap();
        say(&format!("made {}", snapshot.digest()));
        match random.below(4) {
            0 => {
                let old = clone.take();
                say("clone none");
                old.map_or(Ok(()), Volume::delete).and_then(|()| Volume::remove(&dir.join("clone"))).unwrap();
                let size = SECTORS * SECTOR as u64;
                clone = Some(Volume::create(&dir.join("clone"), Some(&snapshot), size).unwrap());
                say(&format!("clone {}", snapshot.digest()));
            }
            1 => {
                drop(snapshot);
                let mut keep: HashSet<Digest> = store.snapshots().unwrap().into_iter().collect();
                keep.retain(|_| random.below(2) == 0);
                keep.extend(clone.as_ref().and_then(Volume::base));
                let names: Vec<String> = keep.iter().map(Digest::to_string).collect();
                say(&format!("collect {}", names.join(" ")));
                store.sweep().remove_unreferenced(&keep).unwrap();
                say("collected");
            }
            _ => {}
        }
    }
}

/// What a snapshot or a volume may hold: for each sector, numbers.
type May = Vec<Vec<u64>>;

/// What the killed ones have said so far.
struct Said {
    /// The numbers of the volume's sectors since the last flush, the first of which is the flushed one.
    volume: May,
    /// The sectors of a write that has not returned: the first, and how many.
    writing: Option<(u64, u64)>,
    snapshots: BTreeMap<Digest, May>,
    /// What a snapshot under way may hold.
    making: Option<May>,
    /// What may be gone or not.
    collecting: BTreeMap<Digest, May>,
    clone: Option<Digest>,
}

impl Said {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["opened"] => {}
            ["write", first, sectors, tag] => {
                let (first, sectors) = (first.parse().unwrap(), sectors.parse::<u64>().unwrap());
                let range = first as usize..(first + sectors) as usize;
                for may in [Some(&mut self.volume), self.making.as_mut()].into_iter().flatten() {
                    may[range.clone()].iter_mut().for_each(|tags| tags.push(tag.parse().unwrap()));
                }
                self.writing = Some((first, sectors));
            }
            ["written"] => self.writing = None,
            ["flushed"] => self.volume.iter_mut().for_each(|tags| *tags = tags[tags.len() - 1..].to_vec()),
            ["snapshot"] => {
                let (first, sectors) = self.writing.unwrap_or((0, 0));
                let making = self.volume.iter().zip(0..).map(|(tags, sector)| {
                    // The sectors of a write that has not returned are what they were, or what they will be.
                    let open = usize::from((first..first + sectors).contains(&sector));
                    tags[tags.len().saturating_sub(1 + open)..].to_vec()
                });
                self.making = Some(making.collect());
            }
            ["made", digest] => {
                let digest = digest.parse().unwrap();
                let may = self.making.take().unwrap();
                self.collecting.remove(&digest);
                self.snapshots.insert(digest, may);
            }
            ["clone", "none"] => self.clone = None,
            ["clone", digest] => self.clone = Some(digest.parse().unwrap()),
            ["collect", ref keep @ ..] => {
                let keep: HashSet<&str> = keep.iter().copied().collect();
                let snapshots = std::mem::take(&mut self.snapshots).into_iter();
                let (kept, going) =
                    snapshots.partition(|(digest, _)| keep.contains(digest.to_string().as_str()));
                (self.snapshots, self.collecting) = (kept, going);
            }
            ["collected"] => self.collecting.clear(),
            _ => panic!("what is {line:?}?"),
        }
    }

    /// Opens everything, checks it, and takes what is there for what is to be there from now on.
    fn check(&mut self, dir: &Path) {
        let store = Store::open(dir.join("store")).unwrap();
        let listed = store.snapshots().unwrap();
        for digest in self.snapshots.keys() {
            assert!(listed.contains(digest), "{digest} is lost");
        }
        let mut there = BTreeMap::new();
        for digest in listed {
            let snapshot = store.snapshot(&digest).unwrap();
            snapshot.verify().unwrap();
            let found = tags(&snapshot.disk());
            let known = self.snapshots.get(&digest).or(self.collecting.get(&digest));
            let may = known.or(self.making.as_ref()).unwrap_or_else(|| panic!("who made {digest}?"));
            agree(&found, may, "a snapshot");
            there.insert(digest, found.into_iter().map(|tag| vec![tag]).collect());
        }
        (self.snapshots, self.collecting, self.making) = (there, BTreeMap::new(), None);

        if let Some(digest) = self.clone {
            let clone = Volume::open(&dir.join("clone"), &store).unwrap();
            assert_eq!(clone.base(), Some(digest));
            agree(&tags(&clone.disk()), &self.snapshots[&digest], "a clone");
        }
        // Another one begins without, so it may go.
        self.clone = None;
        Volume::remove(&dir.join("clone")).unwrap();

        let volume = match Volume::open(&dir.join("main"), &store) {
            Ok(volume) => volume,
            Err(error) => {
                assert!(self.volume.iter().all(|tags| tags[..] == [0]), "{error}");
                return Volume::remove(&dir.join("main")).unwrap();
            }
        };
        let found = tags(&volume.disk());
        agree(&found, &self.volume, "the volume");
        self.volume = found.iter().map(|tag| vec![*tag]).collect();
        self.writing = None;
        let (snapshot, _): (Snapshot, _) = volume.snapshot(&store).unwrap();
        snapshot.verify().unwrap();
        assert_eq!(tags(&snapshot.disk()), found);
        self.snapshots.insert(snapshot.digest(), self.volume.clone());
    }
}

/// The number that each sector is full of.
fn tags(disk: &Disk) -> Vec<u64> {
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    let sector = |sector: &[u8]| {
        let tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
        assert!(sector.chunks(8).all(|part| part == tag.to_le_bytes()), "half a sector was written");
        tag
    };
    bytes.chunks(SECTOR).map(sector).collect()
}

fn agree(found: &[u64], may: &May, what: &str) {
    assert_eq!(found.len(), may.len(), "{what}");
    for (sector, (found, may)) in found.iter().zip(may).enumerate() {
        assert!(may.contains(found), "sector {sector} of {what} is {found}, and may be {may:?}");
    }
}

/// `STORAGE_BLOCK_KILLS` says how many.
#[test]
fn what_a_killed_process_had_done_is_there() {
    let kills = std::env::var("STORAGE_BLOCK_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(50);
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut said = Said {
        volume: vec![vec![0]; SECTORS as usize],
        writing: None,
        snapshots: BTreeMap::new(),
        making: None,
        collecting: BTreeMap::new(),
        clone: None,
    };
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
        said.check(dir.path());
    }
    println!("{kills} processes were killed, who had said {lines} lines");
}

const IMPORTS: &str = "STORAGE_BLOCK_KILL_IMPORTS_DIR";
/// So much that it is written past the page cache, in several parts.
const IMAGE: usize = 10 << 20;

/// An image of which no two chunks are equal.
fn imported(seed: u64) -> Disk {
    let words = (0..IMAGE as u64 / 8).flat_map(|word| (seed << 32 | word).to_le_bytes());
    MemoryDisk::from_vec(words.collect()).unwrap().into_disk()
}

/// The process that is killed while it imports.
#[test]
fn the_killed_importer() {
    let Some(dir) = std::env::var_os(IMPORTS) else { return };
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let store = Store::open(Path::new(&dir)).unwrap();
    for seed in seed.. {
        let image = imported(seed);
        say(&format!("import {seed}"));
        let (snapshot, _) = store.import(&image, &mut |_| ()).unwrap();
        say(&format!("imported {}", snapshot.digest()));
    }
}

/// What was imported is there, whole, and what was not goes well when it is imported again.
#[test]
fn what_a_killed_importer_had_done_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(2);
    // What was imported from the seeds 1, 2 and so on.
    let mut said: Vec<Digest> = Vec::new();
    for _ in 0..10 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_killed_importer", "--nocapture"])
            .env(IMPORTS, dir.path())
            .env(SEED, (said.len() + 1).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut hear = |line: String| {
            if let Some((_, digest)) = line.split_once("@imported ") {
                said.push(digest.parse().unwrap());
            }
        };
        for _ in 0..=random.below(3) {
            hear(output.next().expect("it dies only when it is killed"));
        }
        std::thread::sleep(Duration::from_millis(random.below(150)));
        child.kill().unwrap();
        output.for_each(&mut hear);
        child.wait().unwrap();

        let store = Store::open(dir.path()).unwrap();
        let listed = store.snapshots().unwrap();
        for digest in &said {
            assert!(listed.contains(digest), "{digest} is lost");
        }
        for digest in &listed {
            store.snapshot(digest).unwrap().verify().unwrap();
        }
        // At most one more had been made, and nobody told of it.
        let (again, _) = store.import(&imported(said.len() as u64 + 1), &mut |_| ()).unwrap();
        again.verify().unwrap();
        let mut others = listed.iter().filter(|digest| !said.contains(digest));
        assert!(others.all(|digest| *digest == again.digest()));
        said.push(again.digest());
    }
    assert!(said.len() > 10, "nothing was imported before it was killed");
}
