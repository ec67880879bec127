//! A process that is killed while it imports.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use storage_block::{Digest, Disk, MemoryDisk, Store};

use super::{Random, SEED, say};

const IMPORTS: &str = "STORAGE_BLOCK_KILL_IMPORTS_DIR";
/// So much that it is written past the page cache, in several parts.
const IMAGE: usize = 10 << 20;

/// Snapshots that are kept, so that it takes no longer the more there were.
const KEPT: usize = 20;

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
/// `STORAGE_BLOCK_IMPORTER_KILLS` says how often.
#[test]
fn what_a_killed_importer_had_done_is_there() {
    let kills = std::env::var("STORAGE_BLOCK_IMPORTER_KILLS").ok().and_then(|kills| kills.parse().ok());
    let kills: u64 = kills.unwrap_or(10);
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(2);
    // What was imported from the seeds 1, 2 and so on, of which the last are kept.
    let (mut seeds, mut said) = (0, Vec::<Digest>::new());
    for kill in 1..=kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "importer::the_killed_importer", "--nocapture"])
            .env(IMPORTS, dir.path())
            .env(SEED, (seeds + 1).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut hear = |line: String| {
            if let Some((_, digest)) = line.split_once("@imported ") {
                said.push(digest.parse().unwrap());
                seeds += 1;
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
        let (again, _) = store.import(&imported(seeds + 1), &mut |_| ()).unwrap();
        seeds += 1;
        again.verify().unwrap();
        let mut others = listed.iter().filter(|digest| !said.contains(digest));
        assert!(others.all(|digest| *digest == again.digest()));
        said.push(again.digest());
        drop(again);
        if said.len() > KEPT {
            said.drain(..said.len() - KEPT);
            store.sweep().remove_unreferenced(&said.iter().copied().collect()).unwrap();
        }
        if kill % 100 == 0 {
            println!("{kill} of {kills} importers were killed");
        }
    }
    assert!(seeds > kills, "nothing was imported before it was killed");
}
