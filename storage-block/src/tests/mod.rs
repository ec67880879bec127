//! Tests that look into files, or use what the conformance suite is made of.

mod beside;
mod changed;
mod compression;
mod corrupt;
mod crash;
mod discard;
mod encryption;
pub(crate) mod fault;
mod forged;
mod freeze;
mod full_disk;
mod golden;
mod grow;
mod history;
mod ledger;
mod limited;
mod lineage;
mod mend;
mod model;
mod patches;
mod power;
mod queue;
pub(crate) mod replay;
mod scrub;
mod store;
mod sweep;
pub(crate) mod tape;
mod unreadable;
mod verification;

use std::path::Path;

pub(crate) use self::full_disk::Small;
use crate::testing::Random;
use crate::{Disk, MemoryDisk};

/// `chunks` random chunks of 64 KiB, every fourth of them zero, and `tail` bytes more.
fn image(chunks: usize, tail: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; (chunks << 16) + tail];
    for (number, chunk) in bytes.chunks_mut(1 << 16).enumerate() {
        if number % 4 != 3 {
            chunk.fill_with(|| random.below(256) as u8);
        }
    }
    bytes
}

fn memory(bytes: &[u8]) -> Disk {
    MemoryDisk::from_vec(bytes.to_vec()).unwrap().into_disk()
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// All files under a directory, with their contents.
fn contents(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            found.push((path, bytes));
        }
    }
    found.sort();
    found
}

/// A directory in memory, where there is one.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// What an environment variable says.
pub(crate) fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}
