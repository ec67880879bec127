//! What a volume is after a crash: whatever was flushed, and of the rest any part.

use std::path::Path;

use super::{image, memory};
use crate::format::{Run, State};
use crate::log::Log;
use crate::map::StateMap;
use crate::testing::{Random, compare, random_operation};
use crate::{BlockBackend, Disk, ErrorKind, Result, Store, Volume};

const SECTOR: usize = 512;

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The last batch cut short or damaged at every byte: what earlier flushes covered is there, and the blocks that
/// the batch spoke of are what they were before.
#[test]
fn a_torn_batch_is_as_if_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut oracle = image(4, 0, 1);
    let (base, _) = store.import(&memory(&oracle), &mut |_| ()).unwrap();
    let path = dir.path().join("volume");
    let volume = Volume::create(&path, Some(&base), oracle.len() as u64).unwrap();
    let disk = volume.disk();
    disk.write_at(&[1; 4096 * 3], 4096).unwrap();
    oracle[4096..4 * 4096].fill(1);
    disk.flush().unwrap();
    // Forty runs, so that the batch spans two sectors.
    let mut after = oracle.clone();
    for run in 0..20 {
        disk.write_at(&[2; 4096], (10 + 2 * run) * 4096).unwrap();
        after[(10 + 2 * run as usize) * 4096..][..4096].fill(2);
    }
    for run in (0..20).rev() {
        disk.discard((11 + 2 * run) * 4096, 4096).unwrap();
        after[(11 + 2 * run as usize) * 4096..][..4096].fill(0);
    }
    disk.flush().unwrap();
    drop((disk, volume));

    let log = std::fs::read(path.join("log")).unwrap();
    let batch = 4096 + 512..4096 + 512 + 1024;
    let used =
        batch.start + 32 + 16 * u32::from_le_bytes(log[batch.start + 4..][..4].try_into().unwrap()) as usize;
    assert!(used > batch.start + SECTOR && used <= batch.end);
    let check = |bytes: &[u8], expected: &[u8], when: &str| {
        std::fs::write(path.join("log"), bytes).unwrap();
        let volume = Volume::open(&path, &store).unwrap_or_else(|error| panic!("{when}: {error}"));
        compare(&volume.disk(), expected, when);
        // It goes on from there.
        volume.disk().write_at(&[3; 512], 0).unwrap();
        volume.disk().flush().unwrap();
        drop(volume);
        let volume = Volume::open(&path, &store).unwrap();
        let mut first = [0; 512];
        volume.disk().read_at(&mut first, 0).unwrap();
        assert_eq!(first, [3; 512], "{when}");
    };
    for at in batch.start..used {
        let mut flipped = log.clone();
        flipped[at] ^= 0x10;
        if !(batch.start + 28..batch.start + 32).contains(&at) {
            check(&flipped, &oracle, &format!("byte {at} is flipped"));
        }
        let mut zeroed = log.clone();
        zeroed[at..].fill(0);
        if zeroed[..used] != log[..used] {
            check(&zeroed, &oracle, &format!("zeroes from byte {at}"));
        }
    }
    check(&log, &after, "nothing is damaged");
    // A log that is shorter than it was made is no crash's work.
    std::fs::write(path.join("log"), &log[..used]).unwrap();
    assert_eq!(Volume::open(&path, &store).unwrap_err().kind(), ErrorKind::Corrupt);
}

/// The files of a volume at one moment.
#[derive(Clone)]
struct Files {
    overlay: Vec<u8>,
    log: Vec<u8>,
}

impl Files {
    fn take(dir: &Path) -> Self {
        let read = |name| std::fs::read(dir.join(name)).unwrap();
        Self { overlay: read("overlay"), log: read("log") }
    }

    fn put(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("overlay"), &self.overlay).unwrap();
        std::fs::write(dir.join("log"), &self.log).unwrap();
    }
}

/// Some sectors as they were, some as they became: what is on a disk when the power goes.
fn mix(old: &[u8], new: &[u8], random: &mut Random) -> Vec<u8> {
    let mut mixed = old.to_vec();
    mixed.resize(new.len(), 0);
    for (mixed, new) in mixed.chunks_mut(SECTOR).zip(new.chunks(SECTOR)) {
        if random.below(2) == 0 {
            mixed.copy_from_slice(new);
        }
    }
    mixed
}

/// A disk whose flushes do nothing, so that the only ones are those of the test.
#[derive(Debug)]
struct Unflushed(Disk);

impl BlockBackend for Unflushed {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len)
    }
}

/// Checks that each sector is one that it has been since the last flush.
fn check_sectors(found: &[u8], history: &[Vec<u8>]) -> std::result::Result<(), usize> {
    for (number, sector) in found.chunks(SECTOR).enumerate() {
        let range = number * SECTOR..number * SECTOR + sector.len();
        if !history.iter().any(|bytes| &bytes[range.clone()] == sector) {
            return Err(number);
        }
    }
    Ok(())
}

/// Power cuts before, in and after a flush. `wrong` does what no flush may: the log before the data.
fn power_cuts(rounds: usize, seed: u64, wrong: bool) -> std::result::Result<(), usize> {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let mut oracle = image(6, 0, seed);
    let (base, _) = store.import(&memory(&oracle), &mut |_| ()).unwrap();
    let (path, copy) = (dir.path().join("volume"), dir.path().join("copy"));
    let volume = Volume::create(&path, Some(&base), oracle.len() as u64).unwrap();
    let disk = Disk::new(Unflushed(volume.disk())).unwrap();
    let mut random = Random(seed);
    for _ in 0..rounds {
        let before = Files::take(&path);
        let mut history = vec![oracle.clone()];
        for _ in 0..=random.below(5) {
            random_operation(&disk, &mut oracle, &mut random);
            history.push(oracle.clone());
        }
        volume.disk().flush().unwrap();
        let after = Files::take(&path);
        for _ in 0..4 {
            let data_on_its_way =
                Files { overlay: mix(&before.overlay, &after.overlay, &mut random), ..before.clone() };
            let log_on_its_way = Files { log: mix(&before.log, &after.log, &mut random), ..after.clone() };
            let log_first = Files { overlay: before.overlay.clone(), ..after.clone() };
            for files in if wrong { vec![log_first] } else { vec![data_on_its_way, log_on_its_way] } {
                files.put(&copy);
                let crashed = Volume::open(&copy, &store).unwrap();
                check_sectors(&contents(&crashed.disk()), &history)?;
            }
        }
        after.put(&copy);
        let whole = Volume::open(&copy, &store).unwrap();
        compare(&whole.disk(), &oracle, "after a flush");
    }
    Ok(())
}

#[test]
fn power_cuts_lose_nothing_that_was_flushed() {
    for seed in 1..=4 {
        assert_eq!(power_cuts(25, seed, false), Ok(()), "seed {seed}");
    }
}

/// The test above would see a log that is written before the data.
#[test]
fn the_wrong_order_would_be_seen() {
    assert!((1..=4).any(|seed| power_cuts(25, seed, true).is_err()));
}

/// A log that grows is rewritten, and says the same afterwards.
#[test]
fn long_logs_are_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut log = Log::create(&path, 1 << 30, None).unwrap();
    let expected = StateMap::default();
    let mut append = |runs: &[Run]| {
        runs.iter().for_each(|run| expected.set(*run));
        assert!(log.append(runs).is_ok());
    };
    // Many records, and little that they come to; the second batch is longer than one may be.
    for round in 0..12 {
        let count = if round == 1 { 100_000 } else { 10_000 };
        let state = if round % 2 == 0 { State::Overlay } else { State::Zero };
        append(&(0..count).map(|n| Run { first: n * 2 + round % 2, count: 1, state }).collect::<Vec<_>>());
        append(&[Run { first: 10, count: 200_000, state: State::Zero }]);
    }
    append(&[Run { first: 1 << 17, count: 5, state: State::Overlay }]);
    drop(log);
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len < 2 << 20, "the log has {len} bytes");
    let (log, map) = Log::open(&path).unwrap();
    assert_eq!(map.runs(0, 1 << 18), expected.runs(0, 1 << 18));
    assert_eq!((log.header().size, log.header().base), (1 << 30, None));
    assert!(!path.with_extension("tmp").exists());
}
