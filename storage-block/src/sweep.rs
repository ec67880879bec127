//! The one operation that deletes: snapshots nobody names, and the objects that only they had.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use ami_core::Digest;

use crate::format::{HOLE, Id, PACK_HEADER, Slot, UNIT};
use crate::fs;
use crate::pack::{self, Index, Pack};
use crate::places::Place;
use crate::session::Session;
use crate::store::{Inner, lock, read, sync_dir, write};
use crate::turns::Sweeping;
use crate::{Error, ErrorKind, Result, Snapshot, Store};

/// What [`Sweep::remove_unreferenced`] gave back.
///
/// ```
/// use std::collections::HashSet;
/// use storage_block::{MemoryDisk, Store};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path())?;
/// let image = |byte| MemoryDisk::from_vec(vec![byte; 1 << 20]).map(MemoryDisk::into_disk);
/// let keep = store.import(&image(1)?, &mut |_| ())?.0.digest();
/// let drop = store.import(&image(2)?, &mut |_| ())?.0.digest();
/// let gone = store.sweep().remove_unreferenced(&HashSet::from([keep]))?;
/// assert_eq!((gone.snapshots, store.snapshots()?), (1, vec![keep]));
/// assert!(store.snapshot(&drop).is_err());
/// println!("{} bytes in {} packs given back", gone.bytes, gone.packs);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reclaimed {
    /// Snapshots removed.
    pub snapshots: u64,
    /// Packs removed, those that were rewritten with them.
    pub packs: u64,
    /// Bytes of packs given back, less those written anew. Files that a reader still has open give theirs back when
    /// it closes them.
    pub bytes: u64,
}

/// The turn of one who removes what nobody needs, by [`Store::sweep`], which shows it in use.
#[derive(Debug)]
#[must_use = "nothing is removed yet, and nobody can store anything until it is dropped"]
pub struct Sweep {
    store: Store,
    _turn: Sweeping,
}

impl Store {
    /// Waits for imports and snapshots under way, and keeps others from beginning until it is dropped; all else goes on.
    ///
    /// Whoever decides what to keep decides it now: no snapshot comes to be that he does not know of. One that has, and
    /// that nobody has noted yet, is kept as long as it is open, which is as long as its maker holds on to it.
    ///
    /// ```
    /// use std::collections::HashSet;
    /// use storage_block::{MemoryDisk, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::open(dir.path())?;
    /// # let wanted = |_: &ami_core::Digest| true;
    /// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
    /// store.import(&image, &mut |_| ())?;
    /// let sweep = store.sweep();
    /// let keep: HashSet<_> = store.snapshots()?.into_iter().filter(wanted).collect();
    /// assert_eq!(sweep.remove_unreferenced(&keep)?.snapshots, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn sweep(&self) -> Sweep {
        Sweep { _turn: self.0.turns.sweep(), store: self.clone() }
    }
}

impl Sweep {
    /// Removes every snapshot that is not in `keep` and not open, and the chunks that no other has.
    ///
    /// A volume's snapshot counts as open while the volume is; `keep` has to name those of all volumes that are
    /// not. Packs without a live object are deleted, and those at most half alive are rewritten; what is
    /// alive is durable in its new place before its old one goes, so that a crash at any moment loses nothing.
    /// A snapshot that is opened meanwhile is kept if it is still there.
    ///
    /// # Errors
    ///
    /// [`Corrupt`](ErrorKind::Corrupt) if the manifest of a snapshot to be kept cannot be read: nothing is
    /// deleted then. What the file system says, and then a later call finishes the work.
    pub fn remove_unreferenced(self, keep: &HashSet<Digest>) -> Result<Reclaimed> {
        let inner = &*self.store.0;
        let all = self.store.snapshots()?;
        let (mut kept, mut dropped): (Vec<Digest>, Vec<Digest>) =
            all.into_iter().partition(|digest| keep.contains(digest));
        let mut live = HashSet::new();
        loop {
            for digest in kept.drain(..) {
                mark(&Snapshot::new(Arc::clone(&self.store.0), inner.open_root(&digest)?), &mut live)?;
            }
            // Nobody opens one from here until it is gone; who has meanwhile keeps it, and it is marked, too.
            let roots = lock(&inner.roots);
            let is_open = |digest: &Digest| roots.get(digest).is_some_and(|root| root.strong_count() > 0);
            (kept, dropped) = dropped.into_iter().partition(is_open);
            if kept.is_empty() {
                for digest in &dropped {
                    let path = inner.root_path(digest);
                    fs::remove_file(&path)
                        .map_err(|e| Error::io(e, format!("cannot remove {}", path.display())))?;
                }
                break;
            }
        }
        {
            let index = read(&inner.index);
            mark_bases(&index, &mut live);
            // What is lost already cannot be kept.
            live.retain(|id| index.places.contains_key(id));
        }
        // A root that a crash brings back must find its chunks.
        sync_dir(&inner.snapshots_dir())?;
        let mut reclaimed = Reclaimed { snapshots: dropped.len() as u64, ..Reclaimed::default() };
        sweep(inner, &live, &mut reclaimed)?;
        Ok(reclaimed)
    }
}

fn mark(snapshot: &Snapshot, live: &mut HashSet<Id>) -> Result<()> {
    for (leaf, id) in snapshot.root.leaves.iter().enumerate() {
        // A leaf that another snapshot shares has been walked already.
        if *id == HOLE || !live.insert(*id) {
            continue;
        }
        let chunks = snapshot.leaf_ids(leaf)?;
        live.extend(chunks.into_iter().filter(|id| *id != HOLE));
    }
    Ok(())
}

/// What others differ from lives as long as they do.
fn mark_bases(index: &Index, live: &mut HashSet<Id>) {
    let base = |id: &Id| index.places.get(id)?.patch.map(|patch| patch.base);
    let bases: Vec<Id> = live.iter().filter_map(base).filter(|base| *base != HOLE).collect();
    live.extend(bases);
}

/// The live objects of a pack, and their places.
type Objects = Vec<(Id, Place)>;

fn sweep(inner: &Inner, live: &HashSet<Id>, reclaimed: &mut Reclaimed) -> Result<()> {
    let mut victims: BTreeMap<u32, (Arc<Pack>, Objects)> = BTreeMap::new();
    {
        let mut index = write(&inner.index);
        for (number, pack) in &index.packs {
            victims.insert(*number, (Arc::clone(pack), Vec::new()));
        }
        for (id, place) in index.places.iter() {
            if let (true, Some((_, objects))) = (live.contains(id), victims.get_mut(&place.pack)) {
                objects.push((*id, place));
            }
        }
        let mut sized = Vec::new();
        for (number, (pack, objects)) in &victims {
            let len = file_len(&pack.path)?.saturating_sub(PACK_HEADER);
            let alive: u64 = objects.iter().map(|(_, place)| u64::from(place.slot.units()) * UNIT).sum();
            if alive * 2 > len {
                sized.push(*number);
            }
        }
        for number in sized {
            victims.remove(&number);
        }
        // What is about to go is not appended to.
        index.open.retain(|number, _| !victims.contains_key(number));
    }

    let mut session = Session::of_sweep(inner);
    let mut rotten = Vec::new();
    for (number, (pack, objects)) in &mut victims {
        objects.sort_unstable_by_key(|(_, place)| place.slot.start);
        for (id, Place { slot, patch, .. }) in objects {
            match read_to_carry(inner, pack, slot, id) {
                Ok(stored) => session.carry(id, slot, *patch, &stored)?,
                // Its pack stays as it is, for whoever can mend it.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    tracing::warn!(%error, "a damaged pack is kept");
                    rotten.push(*number);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    for number in rotten {
        victims.remove(&number);
    }
    let written = session.appended();
    session.finish(|_| Ok(()))?;

    let mut freed = 0;
    for (pack, _) in victims.values() {
        freed += file_len(&pack.path)?;
    }
    reclaimed.packs = victims.len() as u64;
    reclaimed.bytes = freed.saturating_sub(written);
    drop_packs(inner, victims.into_values().map(|(pack, _)| pack).collect())?;
    debug_assert!(live.iter().all(|id| read(&inner.index).places.contains_key(id)));
    Ok(())
}

/// An object as it is stored. Damage is not carried on: what can be is compared with its name, and what is
/// encrypted, for which nobody needs to have the key here, with its checksum.
fn read_to_carry(inner: &Inner, pack: &Pack, slot: &Slot, id: &Id) -> Result<Vec<u8>> {
    let stored = pack.read_whole(slot)?;
    if !slot.encoding.encrypted() {
        inner.find_open(slot.kind, id)?.object(id).read_checked(None)?;
    }
    Ok(stored)
}

/// Forgets what is in packs and deletes them. First they lose their names, so that a crash leaves
/// lone indices, which opening clears away, and never a pack without one.
fn drop_packs(inner: &Inner, packs: Vec<Arc<Pack>>) -> Result<()> {
    if packs.is_empty() {
        return Ok(());
    }
    let numbers: Vec<u32> = packs.iter().map(|pack| pack.number).collect();
    // From here on nobody takes what was in them for stored, or looks for it there; who did has them open.
    write(&inner.index).forget(&numbers);
    let dir = &inner.packs_dir();
    let failed = |e, number| Error::io(e, format!("cannot remove pack {number} of {}", dir.display()));
    let doomed = |number| dir.join(format!("{number:08x}.pack.tmp"));
    for (at, &number) in numbers.iter().enumerate() {
        if let Err(e) = fs::rename(&pack::pack_path(dir, number), &doomed(number)) {
            // They are there still, with nothing alive in them, and the next sweep tries again.
            let left = packs[at..].iter().map(|pack| (pack.number, Arc::clone(pack)));
            write(&inner.index).packs.extend(left);
            return Err(failed(e, number));
        }
    }
    sync_dir(dir)?;
    for &number in &numbers {
        fs::remove_file(&pack::index_path(dir, number)).map_err(|e| failed(e, number))?;
        fs::remove_file(&doomed(number)).map_err(|e| failed(e, number))?;
    }
    Ok(())
}

fn file_len(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path);
    Ok(metadata.map_err(|e| Error::io(e, format!("cannot look at {}", path.display())))?.len())
}
