//! What is known of a store and its volumes, and what of it has to be there after a crash at any moment.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ami_core::Digest;

use crate::format::SLOT_UNITS;
use crate::keys::LocalKey;
use crate::testing::Random;
use crate::{Compression, Disk, Error, ErrorKind, Result, Store, StoreOptions, Volume};

pub(crate) type Bytes = Arc<Vec<u8>>;

/// What was done, with the position on the tape at which each call began and at which it had returned.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger {
    pub(crate) snapshots: Vec<KnownSnapshot>,
    pub(crate) volumes: Vec<KnownVolume>,
}

#[derive(Debug, Clone)]
pub(crate) struct KnownSnapshot {
    pub(crate) begun: usize,
    pub(crate) acked: Option<(usize, Digest)>,
    pub(crate) dropped: Option<Dropped>,
    pub(crate) content: Bytes,
}

#[derive(Debug, Clone)]
pub(crate) struct KnownVolume {
    pub(crate) dir: PathBuf,
    pub(crate) begun: usize,
    pub(crate) acked: Option<usize>,
    pub(crate) dropped: Option<Dropped>,
    /// What it held, one after the other, and when the call began that made it so.
    pub(crate) versions: Vec<(usize, Bytes)>,
    /// When a flush had returned, and the version that it covered.
    pub(crate) flushes: Vec<(usize, usize)>,
    /// When it had been made larger, and its size from then on.
    pub(crate) grown: Vec<(usize, usize)>,
}

/// When a removal began and when it had returned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropped {
    pub(crate) begun: usize,
    pub(crate) acked: Option<usize>,
}

impl Dropped {
    pub(crate) fn gone(this: Option<Self>, now: usize) -> bool {
        this.is_some_and(|dropped| dropped.acked.is_some_and(|acked| acked <= now))
    }

    pub(crate) fn going(this: Option<Self>, now: usize) -> bool {
        this.is_some_and(|dropped| dropped.begun < now)
    }
}

impl KnownSnapshot {
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.acked.map(|(_, digest)| digest)
    }

    pub(crate) fn must_be(&self, now: usize) -> bool {
        self.acked.is_some_and(|(acked, _)| acked <= now) && !Dropped::going(self.dropped, now)
    }

    pub(crate) fn may_be(&self, now: usize) -> bool {
        self.begun < now && !Dropped::gone(self.dropped, now)
    }
}

impl KnownVolume {
    pub(crate) fn current(&self) -> &Bytes {
        &self.versions[self.versions.len() - 1].1
    }

    pub(crate) fn must_be(&self, now: usize) -> bool {
        self.acked.is_some_and(|acked| acked <= now) && !Dropped::going(self.dropped, now)
    }

    pub(crate) fn may_be(&self, now: usize) -> bool {
        self.begun < now && !Dropped::gone(self.dropped, now)
    }

    /// Checks that each sector is what it was at the last flush or has been since.
    pub(crate) fn check(&self, found: &[u8], now: usize) -> std::result::Result<(), String> {
        let flushed = self.flushes.iter().rev().find(|(acked, _)| *acked <= now).map_or(0, |(_, at)| *at);
        let versions: Vec<&[u8]> =
            self.versions[flushed..].iter().take_while(|(at, _)| *at < now).map(|(_, v)| &v[..]).collect();
        let Some(newest) = versions.last() else { return Ok(()) };
        let least = self.grown.iter().filter(|(acked, _)| *acked <= now).map(|(_, len)| *len).max();
        let sizes = versions.iter().map(|version| version.len());
        if !sizes.filter(|len| Some(*len) >= least).any(|len| len == found.len()) {
            return Err(format!("{} has {} bytes", self.dir.display(), found.len()));
        }
        // What is new of a larger volume is zero.
        let part = |version: &[u8], at: usize, len: usize| {
            let mut part = version.get(at..at + len).unwrap_or_default().to_vec();
            part.resize(len, 0);
            part
        };
        for (number, sector) in found.chunks(512).enumerate() {
            let at = number * 512;
            if !versions.iter().rev().any(|version| part(version, at, sector.len()) == sector) {
                let (found, newest) = (&sector[..4], part(newest, at, 4));
                let what =
                    format!("sector {number} of {} is {found:?}.., not {newest:?}", self.dir.display());
                return Err(format!("{what}, nor one of {} since the flush", versions.len()));
            }
        }
        Ok(())
    }
}

impl Ledger {
    /// How many calls had returned that promise something.
    pub(crate) fn promises(&self, now: usize) -> usize {
        let drops = |dropped: Option<Dropped>| usize::from(Dropped::gone(dropped, now));
        let snapshots = self.snapshots.iter().map(|snapshot| {
            drops(snapshot.dropped) + usize::from(snapshot.acked.is_some_and(|(acked, _)| acked <= now))
        });
        let volumes = self.volumes.iter().map(|volume| {
            let flushes =
                volume.flushes.iter().chain(&volume.grown).filter(|(acked, _)| *acked <= now).count();
            drops(volume.dropped) + usize::from(volume.acked.is_some_and(|acked| acked <= now)) + flushes
        });
        snapshots.chain(volumes).sum()
    }

    /// Opens whatever can be opened.
    pub(crate) fn open_all(&self, root: &Path) {
        let Ok(store) = open_store(root) else { return };
        for known in &self.volumes {
            let _ = Volume::open(&root.join(&known.dir), &store);
        }
    }

    /// Opens what is in `root` and checks that it is what a crash at `now` may leave, and can be worked with.
    pub(crate) fn check(
        &self,
        root: &Path,
        now: usize,
        random: &mut Random,
    ) -> std::result::Result<(), String> {
        let said = |what: &str, error: Error| format!("{what}: {error}");
        let store = open_store(root).map_err(|e| said("the store does not open", e))?;
        let listed = store.snapshots().map_err(|e| said("snapshots are not listed", e))?;
        for known in self.snapshots.iter().filter(|known| known.must_be(now)) {
            let digest = known.digest().filter(|digest| listed.contains(digest));
            digest.ok_or_else(|| format!("{:?} is lost", known.digest()))?;
        }
        for digest in &listed {
            let snapshot = store.snapshot(digest).map_err(|e| said("a snapshot does not open", e))?;
            let found = contents(&snapshot.disk()).map_err(|e| said("a snapshot is not read", e))?;
            let of_now = |known: &&KnownSnapshot| known.may_be(now) && *known.content == found;
            self.snapshots.iter().find(of_now).ok_or_else(|| format!("{digest} is none of now"))?;
            // All chunks have been compared, so this seldom finds more.
            if random.below(8) == 0 {
                snapshot.verify().map_err(|e| said("a snapshot is not whole", e))?;
            }
        }
        for name in ["packs", "snapshots"] {
            let left = crate::pack::read_dir(&store.dir().join(name)).map_err(|e| said("no directory", e))?;
            if left.iter().any(|name| name.ends_with(".tmp")) {
                return Err(format!("half-made files stay: {left:?}"));
            }
        }
        for known in &self.volumes {
            let dir = root.join(&known.dir);
            match Volume::open(&dir, &store) {
                Ok(_) if !known.may_be(now) => return Err(format!("{} is still there", known.dir.display())),
                Ok(volume) => {
                    let found = contents(&volume.disk()).map_err(|e| said("a volume is not read", e))?;
                    known.check(&found, now)?;
                    use_volume(&store, &volume, found, random).map_err(|e| said("it cannot go on", e))?;
                }
                Err(e) if known.must_be(now) => return Err(said("a volume does not open", e)),
                // Half-made or half-removed: whoever owns the directory can clear it away.
                Err(_) => Volume::remove(&dir).map_err(|e| said("a rest is not removed", e))?,
            }
        }
        drop(store);
        let store = open_store(root).map_err(|e| said("the store does not open again", e))?;
        for digest in listed.iter().filter(|_| random.below(4) == 0) {
            let snapshot = store.snapshot(digest).map_err(|e| said("it is gone after more work", e))?;
            snapshot.verify().map_err(|e| said("it is not whole after more work", e))?;
        }
        Ok(())
    }
}

/// Writes, flushes, makes a snapshot, and now and then collects everything but that.
fn use_volume(store: &Store, volume: &Volume, mut bytes: Vec<u8>, random: &mut Random) -> Result<()> {
    let at = random.below(bytes.len() as u64 / 512) * 512;
    volume.disk().write_at(&[0xaa; 512], at)?;
    bytes[at as usize..][..512].fill(0xaa);
    volume.disk().flush()?;
    if random.below(3) > 0 {
        return Ok(());
    }
    let (snapshot, _) = volume.snapshot(store)?;
    snapshot.verify()?;
    if random.below(3) == 0 {
        let keep: HashSet<Digest> = store.snapshots()?.into_iter().collect();
        store.sweep().remove_unreferenced(&keep)?;
        snapshot.verify()?;
    }
    if contents(&snapshot.disk())? == bytes {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Corrupt, "a new snapshot holds other bytes than the volume"))
}

pub(crate) fn contents(disk: &Disk) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The store is deeper than one directory, and its packs are small, so that there are many.
pub(crate) fn open_store(root: &Path) -> Result<Store> {
    let options = StoreOptions::new()
        .keys(Arc::new(LocalKey::from_bytes([1; 32])))
        .compression(Compression::WherePays { percent: 10 });
    Store::open_with(root.join("much/deeper/store"), &StoreOptions { pack_units: 5 * SLOT_UNITS, ..options })
}
