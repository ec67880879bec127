//! A volume's log, cut off in a crash and rewritten.

use super::{image, memory};
use crate::format::{Run, State};
use crate::log::Log;
use crate::map::StateMap;
use crate::testing::compare;
use crate::{ErrorKind, Store, Volume};

const SECTOR: usize = 512;

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

    let named = Log::find(&path).unwrap();
    let log = std::fs::read(&named).unwrap();
    let batch = 4096 + 512..4096 + 512 + 1024;
    let used =
        batch.start + 32 + 16 * u32::from_le_bytes(log[batch.start + 4..][..4].try_into().unwrap()) as usize;
    assert!(used > batch.start + SECTOR && used <= batch.end);
    let check = |bytes: &[u8], expected: &[u8], when: &str| {
        std::fs::write(&named, bytes).unwrap();
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
    std::fs::write(&named, &log[..used]).unwrap();
    assert_eq!(Volume::open(&path, &store).unwrap_err().kind(), ErrorKind::Corrupt);
}

/// A log that grows is rewritten, and says the same afterwards.
#[test]
fn long_logs_are_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::create(dir.path(), 1 << 30, None, None).unwrap();
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
    let len = std::fs::metadata(Log::find(dir.path()).unwrap()).unwrap().len();
    assert!(len < 2 << 20, "the log has {len} bytes");
    let (log, map) = Log::open(dir.path()).unwrap();
    assert_eq!(map.runs(0, 1 << 18), expected.runs(0, 1 << 18));
    assert_eq!((log.header().size, log.header().base), (1 << 30, None));
    assert!(!dir.path().join("log.tmp").exists());
}
