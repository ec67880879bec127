//! Power cuts while several threads are at work: who flushes, who makes snapshots and who collects does so beside who writes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::ledger::{Dropped, KnownSnapshot, KnownVolume, Ledger, contents, open_store};
use super::power::{Recorded, power_cuts};
use super::tape::Tape;
use super::{image, memory, number, scratch};
use crate::store::lock;
use crate::testing::Random;
use crate::{Result, Store, Volume};

/// A volume that one thread writes to, and what all the threads promise.
struct Beside {
    tape: Arc<Tape>,
    store: Store,
    volume: Volume,
    ledger: Mutex<Ledger>,
    /// The last version of the volume of which the write has returned.
    written: AtomicUsize,
    over: AtomicBool,
}

/// Ends all that goes on when it is dropped, if that is not to be by a panic alone.
struct Over<'b>(&'b AtomicBool, bool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let Self(over, by_panic) = *self;
        if !by_panic || std::thread::panicking() {
            over.store(true, Ordering::Release);
        }
    }
}

impl Beside {
    /// A volume over a snapshot that is zero nowhere: what is lost of it is missed.
    fn new(root: &Path, tape: Arc<Tape>) -> Self {
        let store = open_store(root).unwrap();
        let mut ledger = Ledger::default();
        let content: Vec<u8> = image(3, 0, 1).iter().map(|byte| byte | 1).collect();
        let begun = tape.position();
        let (base, _) = store.import(&memory(&content), &mut |_| ()).unwrap();
        let content = Arc::new(content);
        let acked = Some((tape.position(), base.digest()));
        ledger.snapshots.push(KnownSnapshot { begun, acked, dropped: None, content: content.clone() });
        let (dir, begun) = (PathBuf::from("volume"), tape.position());
        let volume = Volume::create(&root.join(&dir), Some(&base), base.size()).unwrap();
        ledger.volumes.push(KnownVolume {
            dir,
            begun,
            acked: Some(tape.position()),
            dropped: None,
            versions: vec![(begun, content)],
            flushes: Vec::new(),
            grown: Vec::new(),
        });
        let (written, over) = Default::default();
        Self { tape, store, volume, ledger: Mutex::new(ledger), written, over }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Does something at its own pace, each time that so many more writes, and one, have returned.
    fn every(&self, writes: usize, act: impl Fn(u64)) {
        let _over = Over(&self.over, true);
        let (mut next, mut done) = (0, 0);
        while !self.is_over() {
            if self.written.load(Ordering::Acquire) > next {
                act(done);
                (next, done) = (self.written.load(Ordering::Acquire) + writes, done + 1);
            }
            std::thread::yield_now();
        }
    }

    fn flushes(&self) -> usize {
        lock(&self.ledger).volumes[0].flushes.len()
    }

    fn write(&self, random: &mut Random) -> Result<()> {
        let disk = self.volume.disk();
        let len = (random.below(3) + 1) * [512, 4096][random.below(2) as usize];
        let offset = random.below((disk.size() - len) / 512) * 512;
        let byte = random.below(3) as u8 * (random.below(80) as u8 + 1);
        let version = {
            let mut ledger = lock(&self.ledger);
            let known = &mut ledger.volumes[0];
            let mut bytes = known.current().to_vec();
            bytes[offset as usize..][..len as usize].fill(byte);
            known.versions.push((self.tape.position(), Arc::new(bytes)));
            known.versions.len() - 1
        };
        match byte {
            0 => disk.discard(offset, len)?,
            _ => disk.write_at(&vec![byte; len as usize], offset)?,
        }
        self.written.store(version, Ordering::Release);
        Ok(())
    }

    /// What had been written when it began is durable when it has returned.
    fn flush(&self) -> Result<()> {
        let version = self.written.load(Ordering::Acquire);
        self.volume.disk().flush()?;
        let mut ledger = lock(&self.ledger);
        ledger.volumes[0].flushes.push((self.tape.position(), version));
        Ok(())
    }

    /// What is in it is known when it is there. Without a return of the call nobody knows, and it may be there all the same.
    fn snapshot(&self) -> Result<()> {
        let begun = self.tape.position();
        let (snapshot, _) = self.volume.snapshot(&self.store)?;
        let acked = Some((self.tape.position(), snapshot.digest()));
        let content = Arc::new(contents(&snapshot.disk())?);
        lock(&self.ledger).snapshots.push(KnownSnapshot { begun, acked, dropped: None, content });
        Ok(())
    }

    /// Stores something, and collects it again and what else it does not know to be wanted.
    fn import_and_collect(&self, seed: u64) -> Result<()> {
        let content = Arc::new(image(2, 512, seed));
        let begun = self.tape.position();
        let digest = self.store.import(&memory(&content), &mut |_| ())?.0.digest();
        let acked = Some((self.tape.position(), digest));
        let sweep = self.store.sweep();
        let begun_to_drop = self.tape.position();
        let keep: HashSet<_> = self.store.snapshots()?.into_iter().filter(|one| *one != digest).collect();
        sweep.remove_unreferenced(&keep)?;
        let dropped = Some(Dropped { begun: begun_to_drop, acked: Some(self.tape.position()) });
        lock(&self.ledger).snapshots.push(KnownSnapshot { begun, acked, dropped, content });
        Ok(())
    }
}

/// What is on record of so many writes and of what went on beside them, and how many flushes others wrote beside.
fn record(seed: u64, writes: usize) -> (Recorded, usize) {
    let dir = scratch();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let tape = Tape::record(&root);
    let beside = Beside::new(&root, tape.clone());
    let overlapped = AtomicUsize::new(0);
    tape.set_unrest(seed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            beside.every(0, |_| {
                let before = beside.written.load(Ordering::Acquire);
                beside.flush().unwrap();
                if beside.written.load(Ordering::Acquire) > before {
                    overlapped.fetch_add(1, Ordering::Relaxed);
                }
            });
        });
        scope.spawn(|| beside.every(8, |_| beside.snapshot().unwrap()));
        scope.spawn(|| beside.every(12, |done| beside.import_and_collect(seed * 100 + done).unwrap()));
        let _over = Over(&beside.over, false);
        let mut random = Random(seed);
        for number in 1..=writes {
            beside.write(&mut random).unwrap();
            // Nobody is left behind.
            while number % 8 == 0 && beside.flushes() * 8 < number && !beside.is_over() {
                std::thread::yield_now();
            }
        }
    });
    let (ledger, taken_over) = (lock(&beside.ledger).clone(), Vec::new());
    (Recorded { steps: tape.steps(), ledger, taken_over }, overlapped.into_inner())
}

/// `STORAGE_BLOCK_BESIDE_SEEDS` says how many histories, `STORAGE_BLOCK_BESIDE_WRITES` how much is written in each.
#[test]
fn power_cuts_lose_nothing_that_was_promised_beside_others() {
    let (mut states, mut overlaps) = (0, 0);
    let seeds = number("STORAGE_BLOCK_BESIDE_SEEDS", 3) as u64;
    for seed in 1..=seeds {
        let (recorded, overlapped) = record(seed, number("STORAGE_BLOCK_BESIDE_WRITES", 60));
        overlaps += overlapped;
        match power_cuts(&recorded, &recorded.steps, 0..usize::MAX, 3, seed) {
            Ok(count) => states += count,
            Err(why) => panic!("seed {seed}: {why}"),
        }
        println!(
            "history {seed} of {seeds}: {states} disks after power cuts so far, {overlaps} flushes beside writes"
        );
    }
    assert!(overlaps > 0, "nobody has written while somebody flushed");
}
