//! A random life of a store and its volumes, on record.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ami_core::Digest;

use super::ledger::{Dropped, KnownSnapshot, KnownVolume, Ledger, contents, open_store};
use super::tape::{Fault, Tape};
use super::{image, memory};
use crate::testing::Random;
use crate::{Error, Result, Store, Volume, VolumeOptions};

/// What is going on.
pub(crate) struct History {
    root: PathBuf,
    tape: Arc<Tape>,
    pub(crate) ledger: Ledger,
    store: Option<Store>,
    /// The volumes that are open, and their places in the ledger.
    volumes: Vec<(usize, Volume)>,
    random: Random,
    /// Where on the tape a process began that took over from one that had died, and where it had opened everything.
    pub(crate) taken_over: Vec<Range<usize>>,
    unharmed: bool,
}

impl History {
    pub(crate) fn new(root: &Path, tape: Arc<Tape>, seed: u64) -> Self {
        Self {
            root: root.to_owned(),
            tape,
            ledger: Ledger::default(),
            store: Some(open_store(root).unwrap()),
            volumes: Vec::new(),
            random: Random(seed),
            taken_over: Vec::new(),
            unharmed: false,
        }
    }

    pub(crate) fn now(&self) -> usize {
        self.tape.position()
    }

    fn store(&self) -> Store {
        self.store.clone().unwrap()
    }

    /// Has the process die after so many more operations.
    pub(crate) fn die_after(&mut self, operations: usize) {
        let fault = Fault { at: self.now() + operations, error: rustix::io::Errno::IO, once: false };
        self.tape.set_fault(Some(fault));
    }

    /// Has one operation fail after so many more.
    pub(crate) fn fail_after(&mut self, operations: usize, error: rustix::io::Errno) {
        self.tape.set_fault(Some(Fault { at: self.now() + operations, error, once: true }));
    }

    /// A store with a snapshot, and a volume that has been written to.
    pub(crate) fn prepare(&mut self) {
        self.import(1).unwrap();
        self.create().unwrap();
        self.change(0).unwrap();
        self.flush(0).unwrap();
    }

    /// One of everything, after [`prepare`](Self::prepare). What fails is told, and has to go well then. Returns
    /// whether any has failed.
    pub(crate) fn one_of_each(
        &mut self,
        mut before: impl FnMut(&Self),
        mut failed: impl FnMut(&mut Self, Error),
    ) -> bool {
        let acts: [fn(&mut Self) -> Result<()>; 11] = [
            |history| history.import(2),
            |history| history.change(0),
            |history| history.flush(0),
            Self::create,
            |history| history.snapshot(0),
            |history| history.grow(0),
            Self::snapshot_all,
            |history| history.sweep(100),
            |history| history.import(1),
            |history| if history.volumes.len() > 1 { history.delete(1) } else { Ok(()) },
            |history| history.import(3),
        ];
        let mut any = false;
        for act in acts {
            before(self);
            let Err(error) = act(self) else { continue };
            any = true;
            failed(self, error);
            if act(self).is_err() {
                // A volume that could not be made durable is not relied on until it has been opened again.
                self.reopen(0).unwrap();
                act(self).unwrap();
            }
        }
        self.unharmed = self.tape.fault().is_some();
        self.tape.set_fault(None);
        any
    }

    /// Whether the operation that was to fail in [`one_of_each`](Self::one_of_each) was never come to.
    pub(crate) fn is_unharmed(&self) -> bool {
        self.unharmed
    }

    /// Checks that something that failed has left nothing half-made, and what there was.
    pub(crate) fn recover(&mut self) {
        let began = self.now();
        let listed = self.store().snapshots().unwrap();
        for digest in listed {
            let known = self.ledger.snapshots.iter().any(|known| known.digest() == Some(digest));
            assert!(known, "{digest} was never acknowledged");
        }
        self.settle_snapshots(began, false);
        for at in 0..self.ledger.volumes.len() {
            let known = &self.ledger.volumes[at];
            assert!(known.acked.is_some() || !self.root.join(&known.dir).exists(), "half a volume stays");
            if !self.settle_removed(at) {
                self.observe(at).unwrap();
            }
        }
        // What has gone is stored again, and not thought to be there.
        self.import(1).unwrap();
        self.import(2).unwrap();
        for digest in self.store().snapshots().unwrap() {
            self.store().snapshot(&digest).unwrap().verify().unwrap();
        }
    }

    /// Closes everything, and checks it like what a crash has left.
    pub(crate) fn check_closed(&mut self) -> std::result::Result<(), String> {
        self.volumes.clear();
        self.store = None;
        self.ledger.check(&self.root, self.now() + 1, &mut self.random)
    }

    /// Has the process die within the next operations.
    pub(crate) fn die_soon(&mut self) {
        let at = self.now() + self.random.below(14) as usize;
        let fault = Fault { at, error: rustix::io::Errno::IO, once: false };
        self.tape.set_fault(self.tape.fault().or(Some(fault)));
    }

    /// Does one thing.
    pub(crate) fn step(&mut self) {
        let done = self.try_step();
        match (done, self.tape.fault()) {
            (Ok(()), _) => {}
            (Err(_), Some(fault)) if !fault.once => self.revive(),
            (Err(error), _) => panic!("{error}"),
        }
    }

    /// One thing, that may fail if the tape has it fail.
    pub(crate) fn try_step(&mut self) -> Result<()> {
        if self.volumes.is_empty() || (self.volumes.len() < 3 && self.random.below(20) == 0) {
            return self.create();
        }
        let at = self.random.below(self.volumes.len() as u64) as usize;
        match self.random.below(28) {
            0 | 1 => self.snapshot(at),
            6 => self.snapshot_all(),
            7 => self.grow(at),
            2 => self.sweep(2),
            3 if self.random.below(2) == 0 => {
                let seed = self.random.below(4);
                self.import(seed)
            }
            4 if self.volumes.len() > 1 => self.delete(at),
            5 => self.reopen(at),
            8..=11 => self.flush(at),
            _ => self.change(at),
        }
    }

    fn create(&mut self) -> Result<()> {
        let now = self.now();
        let live: Vec<KnownSnapshot> =
            self.ledger.snapshots.iter().filter(|s| s.must_be(now)).cloned().collect();
        let base = live.get(self.random.below(live.len() as u64 + 1) as usize);
        let mut bytes = base.map_or_else(|| vec![0; 2 << 16], |base| base.content.to_vec());
        bytes.resize(bytes.len().next_multiple_of(4096) + self.random.below(3) as usize * 4096, 0);
        let base =
            base.and_then(KnownSnapshot::digest).map(|digest| self.store().snapshot(&digest)).transpose()?;
        let size = bytes.len() as u64;
        let at = self.ledger.volumes.len();
        let dir = PathBuf::from(format!("volume-{at}"));
        let path = self.root.join(&dir);
        let versions = vec![(now, Arc::new(bytes))];
        let flushes = Vec::new();
        self.ledger.volumes.push(KnownVolume {
            dir,
            begun: now,
            acked: None,
            dropped: None,
            versions,
            flushes,
            grown: Vec::new(),
        });
        // A clone of what is encrypted is, too.
        let mut options = VolumeOptions::new();
        if self.random.below(2) == 0 {
            options = options.encrypt(&self.store().new_key(None)?);
        }
        if self.random.below(2) == 0 {
            let volume = options.create(&path, base.as_ref(), size)?;
            self.volumes.push((at, volume));
        } else {
            let volume = match at % 2 == 0 {
                true => options.create_unsynced(&path, base.as_ref(), size)?,
                false => options.create_on_write(&path, base.as_ref(), size, || ())?,
            };
            self.volumes.push((at, volume));
            let last = self.volumes.len() - 1;
            // Durable with its first flush, or because it is asked to be.
            let made = match self.random.below(2) == 0 {
                true => self.change(last).and_then(|()| self.flush(last)),
                false => self.change(last).and_then(|()| self.volumes[last].1.sync_created()),
            };
            if let Err(error) = made {
                let _ = self.volumes.remove(last).1.delete();
                return Err(error);
            }
        }
        self.ledger.volumes[at].acked = Some(self.now());
        Ok(())
    }

    fn change(&mut self, at: usize) -> Result<()> {
        let now = self.now();
        let (known, volume) = &self.volumes[at];
        let known = &mut self.ledger.volumes[*known];
        let mut bytes = known.current().to_vec();
        let align = [512, 4096, 4096][self.random.below(3) as usize];
        let offset = self.random.below(bytes.len() as u64 / align) * align;
        let most = [2, 2, 24][self.random.below(3) as usize] * align;
        let len = (self.random.below(most) + 1).next_multiple_of(align).min(bytes.len() as u64 - offset);
        let fill = self.random.below(4).saturating_sub(1) as u8 * (self.random.below(80) as u8 + 1);
        bytes[offset as usize..][..len as usize].fill(fill);
        known.versions.push((now, Arc::new(bytes)));
        match (fill, self.random.below(3)) {
            (0, 0) => volume.disk().write_zeroes(offset, len),
            (0, 1) => volume.disk().discard(offset, len),
            _ => volume.disk().write_at(&vec![fill; len as usize], offset),
        }
    }

    fn flush(&mut self, at: usize) -> Result<()> {
        let (known, volume) = &self.volumes[at];
        volume.disk().flush()?;
        let now = self.tape.position();
        let known = &mut self.ledger.volumes[*known];
        known.flushes.push((now, known.versions.len() - 1));
        Ok(())
    }

    fn snapshot(&mut self, at: usize) -> Result<()> {
        let (known, volume) = &self.volumes[at];
        let content = Arc::clone(self.ledger.volumes[*known].current());
        let begun = self.now();
        self.ledger.snapshots.push(KnownSnapshot { begun, acked: None, dropped: None, content });
        let digest = volume.snapshot(&self.store())?.0.digest();
        self.know(digest);
        Ok(())
    }

    /// Snapshots of all volumes at one instant, after which one goes on before they are stored.
    fn snapshot_all(&mut self) -> Result<()> {
        let begun = self.now();
        let first = self.ledger.snapshots.len();
        for (known, _) in &self.volumes {
            let content = Arc::clone(self.ledger.volumes[*known].current());
            self.ledger.snapshots.push(KnownSnapshot { begun, acked: None, dropped: None, content });
        }
        let store = self.store();
        let frozen = Volume::freeze(self.volumes.iter().map(|(_, volume)| volume), &store);
        self.change(0)?;
        let made = frozen.store(&mut |_| ())?;
        let now = self.now();
        for (known, (snapshot, _)) in self.ledger.snapshots[first..].iter_mut().zip(made) {
            known.acked = Some((now, snapshot.digest()));
        }
        Ok(())
    }

    fn grow(&mut self, at: usize) -> Result<()> {
        let now = self.now();
        let (known, volume) = &self.volumes[at];
        let known = &mut self.ledger.volumes[*known];
        let mut bytes = known.current().to_vec();
        bytes.resize(bytes.len() + self.random.below(3) as usize * 4096, 0);
        let size = bytes.len();
        known.versions.push((now, Arc::new(bytes)));
        volume.grow(size as u64)?;
        known.grown.push((self.tape.position(), size));
        Ok(())
    }

    fn import(&mut self, seed: u64) -> Result<()> {
        let content = Arc::new(image(2, 512, seed));
        let begun = self.now();
        let known = KnownSnapshot { begun, acked: None, dropped: None, content: Arc::clone(&content) };
        self.ledger.snapshots.push(known);
        let digest = self.store().import(&memory(&content), &mut |_| ())?.0.digest();
        self.know(digest);
        Ok(())
    }

    /// The last snapshot was made.
    fn know(&mut self, digest: Digest) {
        let now = self.now();
        if let Some(last) = self.ledger.snapshots.last_mut() {
            last.acked = Some((now, digest));
        }
    }

    /// Keeps what volumes need, and of the others one in `one_in`.
    fn sweep(&mut self, one_in: u64) -> Result<()> {
        let now = self.now();
        let bases: HashSet<Digest> = self.volumes.iter().filter_map(|(_, volume)| volume.base()).collect();
        let listed = self.store().snapshots()?;
        let mut keep: HashSet<Digest> =
            listed.into_iter().filter(|_| self.random.below(one_in) == 0).collect();
        keep.extend(&bases);
        for known in &mut self.ledger.snapshots {
            if known.dropped.is_none() && known.digest().is_some_and(|digest| !keep.contains(&digest)) {
                known.dropped = Some(Dropped { begun: now, acked: None });
            }
        }
        self.store().sweep().remove_unreferenced(&keep)?;
        let now = self.now();
        for dropped in self.ledger.snapshots.iter_mut().filter_map(|known| known.dropped.as_mut()) {
            dropped.acked.get_or_insert(now);
        }
        Ok(())
    }

    fn delete(&mut self, at: usize) -> Result<()> {
        let (known, volume) = self.volumes.swap_remove(at);
        self.ledger.volumes[known].dropped = Some(Dropped { begun: self.now(), acked: None });
        volume.delete()?;
        self.ledger.volumes[known].dropped =
            self.ledger.volumes[known].dropped.map(|dropped| Dropped { acked: Some(self.now()), ..dropped });
        Ok(())
    }

    fn reopen(&mut self, at: usize) -> Result<()> {
        let (known, volume) = self.volumes.swap_remove(at);
        drop(volume);
        self.open(known)
    }

    fn open(&mut self, at: usize) -> Result<()> {
        let volume =
            Volume::open(&self.root.join(&self.ledger.volumes[at].dir), self.store.as_ref().unwrap())?;
        self.volumes.push((at, volume));
        self.observe(at)
    }

    /// Takes what an open volume holds for what it is to hold: what was not flushed may have gone.
    fn observe(&mut self, at: usize) -> Result<()> {
        let now = self.now();
        let Some((_, volume)) = self.volumes.iter().find(|(known, _)| *known == at) else { return Ok(()) };
        let found = contents(&volume.disk())?;
        let known = &mut self.ledger.volumes[at];
        known.check(&found, now + 1).unwrap();
        known.versions.push((now, Arc::new(found)));
        Ok(())
    }

    /// The process dies, and another takes over what it finds.
    pub(crate) fn revive(&mut self) {
        self.volumes.clear();
        self.store = None;
        self.tape.set_fault(None);
        let died = self.now();
        self.store = Some(open_store(&self.root).unwrap());
        self.settle_snapshots(died, true);
        for at in 0..self.ledger.volumes.len() {
            if !self.settle_removed(at) {
                self.open(at).unwrap();
            }
        }
        self.taken_over.push(died..self.now());
    }

    /// Whether or not a call had returned that made or removed a snapshot, what is there counts from now on.
    fn settle_snapshots(&mut self, began: usize, opened: bool) {
        let store = self.store();
        let listed = store.snapshots().unwrap();
        let now = self.now();
        for at in 0..self.ledger.snapshots.len() {
            let known = &mut self.ledger.snapshots[at];
            let there = listed.iter().copied().find(|digest| {
                known.digest().map_or_else(
                    || contents(&store.snapshot(digest).unwrap().disk()).unwrap() == *known.content,
                    |known| known == *digest,
                )
            });
            match (there, known.acked, known.dropped) {
                // It had not been acknowledged, or was to be removed: from now on it is there.
                (Some(digest), None, _) => known.acked = Some((now, digest)),
                (Some(digest), Some(_), Some(Dropped { acked: None, .. })) => {
                    known.dropped = Some(Dropped { begun: began, acked: Some(now) });
                    let again = KnownSnapshot {
                        begun: began,
                        acked: Some((now, digest)),
                        dropped: None,
                        ..known.clone()
                    };
                    self.ledger.snapshots.push(again);
                }
                (None, None, _) => known.dropped = Some(Dropped { begun: began, acked: Some(now) }),
                // What a sweep removed that failed is durable when the store is opened, or the next is through.
                (None, Some(_), Some(_)) if !opened => {}
                (None, Some(_), Some(dropped)) => {
                    known.dropped = Some(Dropped { acked: dropped.acked.or(Some(now)), ..dropped });
                }
                (None, Some(_), None) => panic!("{:?} is lost", known.digest()),
                (Some(_), Some(_), _) => {}
            }
        }
    }

    /// Removes a volume that was half-made or half-removed, as nobody relies on it. Returns whether it is gone.
    fn settle_removed(&mut self, at: usize) -> bool {
        let now = self.now();
        let known = &mut self.ledger.volumes[at];
        if known.acked.is_some() && known.dropped.is_none() {
            return false;
        }
        if known.dropped.is_none_or(|dropped| dropped.acked.is_none()) {
            Volume::remove(&self.root.join(&known.dir)).unwrap();
            let begun = known.dropped.map_or(now, |dropped| dropped.begun);
            known.dropped = Some(Dropped { begun, acked: Some(self.tape.position()) });
        }
        true
    }
}
