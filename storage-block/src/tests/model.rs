//! Volumes, snapshots and clones against plain memory, with everything opened anew now and then.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ami_core::Digest;

use super::{memory, number, scratch};
use crate::keys::{EncryptionKey, LocalKey};
use crate::testing::{Random, compare, random_operation};
use crate::{Compression, Store, StoreOptions, Volume, VolumeOptions};

struct Model {
    dir: PathBuf,
    store: Option<Store>,
    volumes: Vec<(Volume, Vec<u8>)>,
    snapshots: Vec<(Digest, Vec<u8>)>,
    made: usize,
    opened: usize,
    random: Random,
}

/// Packs are small, so that there are many. Every other time what is stored is compressed, so that what is compressed
/// and what is not lie side by side.
fn open(dir: &Path, time: usize) -> Store {
    let compression = if time % 2 == 0 { Compression::None } else { Compression::WherePays { percent: 10 } };
    let keys = Arc::new(LocalKey::from_bytes([1; 32]));
    let options = StoreOptions::new().compression(compression).keys(keys);
    let options = StoreOptions { pack_units: 7 * 16, ..options };
    Store::open_with(dir.join("store"), &options).unwrap()
}

impl Model {
    fn new(dir: &Path, seed: u64) -> Self {
        let store = Some(open(dir, seed as usize));
        let (volumes, snapshots) = (Vec::new(), Vec::new());
        Self {
            dir: dir.to_owned(),
            store,
            volumes,
            snapshots,
            made: 0,
            opened: seed as usize,
            random: Random(seed),
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn step(&mut self) {
        if self.volumes.is_empty() || (self.random.below(40) == 0 && self.volumes.len() < 4) {
            return self.create();
        }
        let at = self.random.below(self.volumes.len() as u64) as usize;
        match self.random.below(60) {
            0 | 1 => self.snapshot(at..at + 1),
            6 => self.snapshot(0..self.volumes.len()),
            7 => self.grow(at),
            2 => self.reopen_volume(at),
            3 if self.random.below(4) == 0 => self.reopen_all(),
            4 => self.sweep(),
            5 if self.volumes.len() > 2 => self.volumes.swap_remove(at).0.delete().unwrap(),
            _ => {
                let (volume, oracle) = &mut self.volumes[at];
                random_operation(&volume.disk(), oracle, &mut self.random);
            }
        }
    }

    /// A volume of nothing, or a clone that may be larger than its snapshot.
    fn create(&mut self) {
        let choice = self.random.below(self.snapshots.len() as u64 + 1) as usize;
        let grown = self.random.below(40) as usize * 4096;
        let (base, mut oracle) = match self.snapshots.get(choice) {
            Some((digest, bytes)) => (Some(self.store().snapshot(digest).unwrap()), bytes.clone()),
            None => (None, vec![0; 5 << 16]),
        };
        // What is cloned is snapshotted and cloned again, and a long history should not end in large disks.
        let size = oracle.len().next_multiple_of(4096);
        oracle.resize((size + grown).min(size.max(12 << 16)), 0);
        let dir = self.dir.join(format!("volume-{}", self.made));
        self.made += 1;
        // Encrypted as its snapshot is, if it is; under the key of another volume; or under a key of its own.
        let mut options = VolumeOptions::new();
        match self.random.below(4) {
            0 => options = options.encrypt(&self.store().new_key(None).unwrap()),
            1 => {
                let others = self.volumes.iter().filter_map(|(volume, _)| volume.key());
                options = others.fold(options, |options, key| options.encrypt(key));
            }
            _ => {}
        }
        let size = oracle.len() as u64;
        let volume = match self.random.below(2) {
            0 => options.create(&dir, base.as_ref(), size).unwrap(),
            _ => options.create_on_write(&dir, base.as_ref(), size, || ()).unwrap(),
        };
        compare(&volume.disk(), &oracle, "a new clone");
        self.volumes.push((volume, oracle));
    }

    /// Snapshots of volumes at one instant, after which each goes on before they are stored.
    fn snapshot(&mut self, range: Range<usize>) {
        let frozen =
            Volume::freeze(self.volumes[range.clone()].iter().map(|(volume, _)| volume), self.store());
        let then: Vec<(Option<EncryptionKey>, Vec<u8>)> = self.volumes[range.clone()]
            .iter()
            .map(|(volume, oracle)| (volume.key().cloned(), oracle.clone()))
            .collect();
        for (volume, oracle) in &mut self.volumes[range] {
            // Few enough that none has to wait, for who stores them comes after.
            random_operation(&volume.disk(), &mut oracle[..3 << 16], &mut self.random);
        }
        let made = frozen.store(&mut |_| ()).unwrap();
        for ((snapshot, _), (key, oracle)) in made.into_iter().zip(then) {
            compare(&snapshot.disk(), &oracle, "a snapshot");
            snapshot.verify().unwrap();
            // The digest is one of the content and the key alone, however it came about.
            let (imported, stats) = match &key {
                Some(key) => self.store().import_encrypted(&memory(&oracle), key, &mut |_| ()).unwrap(),
                None => self.store().import(&memory(&oracle), &mut |_| ()).unwrap(),
            };
            assert_eq!(snapshot.encrypted(), key.is_some());
            assert_eq!((imported.digest(), stats.stored_bytes), (snapshot.digest(), 0));
            if !self.snapshots.iter().any(|(digest, _)| *digest == snapshot.digest()) {
                self.snapshots.push((snapshot.digest(), oracle));
            }
        }
    }

    fn grow(&mut self, at: usize) {
        let (volume, oracle) = &mut self.volumes[at];
        // What grows is snapshotted and cloned, and a long history should not end in large disks.
        let room = (40_usize << 16).saturating_sub(oracle.len()) / 4096;
        let size = oracle.len() + self.random.below(30).min(room as u64) as usize * 4096;
        volume.grow(size as u64).unwrap();
        oracle.resize(size, 0);
        compare(&volume.disk(), oracle, "a volume that grew");
    }

    fn reopen_volume(&mut self, at: usize) {
        let (volume, oracle) = self.volumes.swap_remove(at);
        volume.disk().flush().unwrap();
        let dir = volume.dir().to_owned();
        drop(volume);
        let volume = Volume::open(&dir, self.store()).unwrap();
        compare(&volume.disk(), &oracle, "an opened volume");
        self.volumes.push((volume, oracle));
    }

    fn reopen_all(&mut self) {
        let mut closed = Vec::new();
        for (volume, oracle) in self.volumes.drain(..) {
            volume.disk().flush().unwrap();
            closed.push((volume.dir().to_owned(), oracle));
        }
        self.store = None;
        self.opened += 1;
        let store = open(&self.dir, self.opened);
        for (dir, oracle) in closed {
            let volume = Volume::open(&dir, &store).unwrap();
            compare(&volume.disk(), &oracle, "a volume after the store was opened");
            self.volumes.push((volume, oracle));
        }
        self.store = Some(store);
        self.check_snapshots();
    }

    fn sweep(&mut self) {
        let kept = self.random.below(self.snapshots.len() as u64 + 1) as usize;
        let keep: HashSet<Digest> = self.snapshots.iter().take(kept).map(|(digest, _)| *digest).collect();
        self.store().sweep().remove_unreferenced(&keep).unwrap();
        let bases: HashSet<Digest> = self.volumes.iter().filter_map(|(volume, _)| volume.base()).collect();
        self.snapshots.retain(|(digest, _)| keep.contains(digest) || bases.contains(digest));
        let mut expected: Vec<Digest> = keep.union(&bases).copied().collect();
        expected.sort_unstable();
        assert_eq!(self.store().snapshots().unwrap(), expected);
        self.check_snapshots();
        for (volume, oracle) in &self.volumes {
            compare(&volume.disk(), oracle, "a volume after a sweep");
        }
    }

    fn check_snapshots(&self) {
        for (digest, oracle) in &self.snapshots {
            let snapshot = self.store().snapshot(digest).unwrap();
            snapshot.verify().unwrap();
            compare(&snapshot.disk(), oracle, "an older snapshot");
        }
    }
}

/// Steps of one history.
const HISTORY: usize = 10_000;

/// `STORAGE_BLOCK_MODEL_STEPS` says how many, in several histories.
#[test]
fn random_histories_agree_with_memory() {
    let steps = number("STORAGE_BLOCK_MODEL_STEPS", 0);
    let histories = if steps == 0 { vec![700; 3] } else { vec![HISTORY; steps.div_ceil(HISTORY)] };
    for (steps, seed) in histories.into_iter().zip(1..) {
        let dir = scratch();
        let mut model = Model::new(dir.path(), seed);
        for _ in 0..steps {
            model.step();
        }
        model.reopen_all();
        let encrypted = model.volumes.iter().filter(|(volume, _)| volume.encrypted()).count();
        println!("history {seed}: {steps} steps, {} volumes, {encrypted} encrypted at its end", model.made);
    }
}

/// The same where a manifest has several leaves.
#[test]
fn operations_across_leaves_agree_with_memory() {
    let dir = scratch();
    let store = Store::open(dir.path().join("store")).unwrap();
    let size = (64 << 20) + (3 << 16);
    let mut oracle = vec![0; size];
    let mut base = None;
    for round in 0..3 {
        let path = dir.path().join(format!("volume-{round}"));
        let volume = Volume::create(&path, base.as_ref(), size as u64).unwrap();
        let disk = volume.disk();
        for step in 0..12 {
            let at = (64 << 20) - (6 << 12) + step * 4096 + round * 100;
            disk.write_at(&[step as u8 + 1; 5000], at as u64).unwrap();
            oracle[at..at + 5000].fill(step as u8 + 1);
        }
        disk.discard((64 << 20) - 4096, 8192).unwrap();
        oracle[(64 << 20) - 4096..(64 << 20) + 4096].fill(0);
        compare(&disk, &oracle, "a volume of two leaves");
        let (snapshot, stats) = volume.snapshot(&store).unwrap();
        // Two chunks and two leaves at most.
        assert!(stats.stored_bytes <= 2 * ((64 << 10) + (32 << 10)), "{stats:?}");
        compare(&snapshot.disk(), &oracle, "a snapshot of two leaves");
        base = Some(snapshot);
    }
}
