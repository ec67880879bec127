//! The one operation that deletes: snapshots nobody names, and the objects that only they had.

mod victims;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use ami_core::Digest;

use crate::format::{HOLE, Id, Kind, Slot};
use crate::fs;
use crate::pack::{self, Index, Pack};
use crate::places::Place;
use crate::session::Session;
use crate::store::{Inner, lock, read, sync_dir, write};
use crate::turns::Sweeping;
use crate::{Error, ErrorKind, Result, Snapshot, Store};
use victims::{Contents, Victim};

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
    /// Packs at most half alive that stay, as there was no room to write anew what is alive in them. A later sweep does it
    /// when there is.
    pub packs_left: u64,
    /// Snapshots to be kept whose manifests cannot be read. Anything may be theirs, so that as long as there are some no
    /// pack goes: importing what they held [mends](Store::import) them, and whoever does not keep them gives them up.
    pub unreadable: u64,
    /// Chunks of snapshots to be kept that no pack is known to hold. As long as there are some, packs stay whose indices are
    /// damaged or missing, and those with chunks that are stored as what differs from what is missing: importing that mends them.
    pub missing: u64,
}

/// The turn of one who removes what nobody needs, by [`Store::sweep`], which shows it in use.
///
/// As long as there is one, others who store wait for its end. The thread that holds it cannot: its imports and its snapshots of
/// volumes fail with [`InUse`](ErrorKind::InUse). So they do on the thread that took it, where another has it now, until that
/// [removes](Self::remove_unreferenced) something. Another [`Store::sweep`] and
/// [`Volume::freeze`](crate::Volume::freeze), which never fail, must not be called there: they would wait for ever.
#[derive(Debug)]
#[must_use = "nothing is removed yet, and nobody can store anything until it is dropped"]
pub struct Sweep {
    store: Store,
    turn: Sweeping,
    /// How many objects of packs that are rewritten are listed at one time.
    pub(crate) listed: usize,
}

impl Store {
    /// Waits for imports and snapshots under way, and keeps others from beginning until it is dropped; all else goes on.
    ///
    /// A thread that holds a [`Sweep`] of the store, or has begun to store something in it, as who is told of an import's
    /// progress has and who holds [`FrozenVolumes`](crate::FrozenVolumes), would wait for itself, and for ever.
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
        Sweep { turn: self.0.turns.sweep(), store: self.clone(), listed: victims::LISTED }
    }
}

impl Sweep {
    /// Removes every snapshot that is not in `keep` and not open, and the chunks that no other has.
    ///
    /// A volume's snapshot counts as open while the volume is; `keep` has to name those of all volumes that are
    /// not. Packs of which nobody knows what is in them are deleted where nothing that is kept is missing or known to be
    /// damaged. Packs without a live object are deleted, and then those at most half alive are rewritten, one after the other as
    /// far as there is room; what is alive is durable in its new place before its old one goes, so that a crash at any moment
    /// loses nothing. A snapshot that is opened meanwhile is kept if it is still there.
    ///
    /// A full disk and damage are no errors but in [what it gives back](Reclaimed): what can be removed goes.
    ///
    /// # Errors
    ///
    /// What the file system says, and then a later call finishes the work.
    pub fn remove_unreferenced(self, keep: &HashSet<Digest>) -> Result<Reclaimed> {
        self.turn.move_here();
        let inner = &*self.store.0;
        let all = self.store.snapshots()?;
        let (mut kept, mut dropped): (Vec<Digest>, Vec<Digest>) =
            all.into_iter().partition(|digest| keep.contains(digest));
        let (mut live, mut reclaimed) = (HashSet::new(), Reclaimed::default());
        loop {
            for digest in kept.drain(..) {
                if let Err(error) = mark(&self.store, &digest, &mut live) {
                    tracing::warn!(%digest, %error, "all packs are kept for a snapshot that cannot be read");
                    reclaimed.unreadable += 1;
                }
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
        reclaimed.snapshots = dropped.len() as u64;
        // A root that a crash brings back must find its chunks.
        sync_dir(&inner.snapshots_dir())?;
        if reclaimed.unreadable > 0 {
            return Ok(reclaimed);
        }
        {
            let index = read(&inner.index);
            mark_bases(&index, &mut live);
            let named = live.len();
            // What is lost already cannot be kept.
            live.retain(|id| index.places.contains_key(id));
            reclaimed.missing = (named - live.len()) as u64;
        }
        settle_copies(inner, &live)?;
        // Where something that is kept is missing or damaged, they may be whole again some time.
        let whole = {
            let index = read(&inner.index);
            live.iter().all(|id| index.has(id))
        };
        if whole && reclaimed.missing == 0 {
            delete_broken(inner, &mut reclaimed)?;
        }
        sweep(inner, &live, self.listed, &mut reclaimed)?;
        Ok(reclaimed)
    }
}

/// Marks all that a snapshot consists of.
fn mark(store: &Store, digest: &Digest, live: &mut HashSet<Id>) -> Result<()> {
    let snapshot = Snapshot::new(Arc::clone(&store.0), store.0.open_root(digest)?);
    for (leaf, id) in snapshot.root.leaves.iter().enumerate() {
        // A leaf that another snapshot shares has been walked already.
        if *id == HOLE || live.contains(id) {
            continue;
        }
        let chunks = snapshot.leaf_ids(leaf)?;
        live.insert(*id);
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

/// Has what lies in several places found where it is whole. Which of them is damaged is not known any more once the store
/// was closed, and a pack of which only the others are alive goes.
fn settle_copies(inner: &Inner, live: &HashSet<Id>) -> Result<()> {
    let copied: Vec<(Kind, Id)> = {
        let index = read(&inner.index);
        let copied = index.copies.keys().filter(|id| live.contains(*id));
        copied.filter_map(|id| Some((index.places.get(id)?.slot.kind, *id))).collect()
    };
    for (kind, id) in copied {
        match inner.check_keyless(kind, &id) {
            Err(error) if error.kind() != ErrorKind::Corrupt => return Err(error),
            // Nor is it whole anywhere else.
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Removes the packs that have little alive in them: first those that have nothing, which needs no room, and then those of
/// which the least has to be carried, so that each makes room for the next.
fn sweep(inner: &Inner, live: &HashSet<Id>, listed: usize, reclaimed: &mut Reclaimed) -> Result<()> {
    let mut half_alive = victims::find(inner, live, reclaimed.missing > 0)?;
    let dead = half_alive.iter().take_while(|victim| victim.alive == 0).count();
    let dead: Vec<Arc<Pack>> = half_alive.drain(..dead).map(|victim| victim.pack).collect();
    let freed = dead.iter().map(|pack| file_len(&pack.path)).sum::<Result<u64>>()?;
    let numbers: Vec<u32> = dead.iter().map(|pack| pack.number).collect();
    if !numbers.is_empty() {
        // From here on nobody takes what was in them for stored, or looks for it there; who did has them open.
        write(&inner.index).forget(&numbers);
    }
    reclaimed.packs += dead.len() as u64;
    delete_packs(inner, dead)?;
    reclaimed.bytes += freed;
    while !half_alive.is_empty() {
        let now = victims::listed_at_once(&half_alive, listed);
        let now: Vec<Victim> = half_alive.drain(..now).collect();
        let contents = victims::contents(&read(&inner.index), live, &now);
        let left = rewrite(inner, now.into_iter().zip(contents), reclaimed)?;
        if !left.is_empty() {
            reclaimed.packs_left = (left.len() + half_alive.len()) as u64;
            reopen(inner, left.into_iter().chain(half_alive));
            break;
        }
    }
    debug_assert!(live.iter().all(|id| read(&inner.index).places.contains_key(id)));
    Ok(())
}

/// Rewrites packs as far as there is room; those for which there is none.
fn rewrite(
    inner: &Inner,
    mut victims: impl Iterator<Item = (Victim, Contents)>,
    reclaimed: &mut Reclaimed,
) -> Result<Vec<Victim>> {
    for (victim, Contents { live, dead }) in victims.by_ref() {
        match carry(inner, &victim.pack, &live) {
            Ok(written) => {
                let len = file_len(&victim.pack.path)?;
                // From here on nobody takes what was in it for stored, or looks for it there; who did has it open.
                write(&inner.index).forget_dead(victim.pack.number, &dead);
                delete_packs(inner, vec![victim.pack])?;
                reclaimed.packs += 1;
                reclaimed.bytes += len.saturating_sub(written);
            }
            // Its pack stays as it is, for whoever can mend it.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(%error, "a damaged pack is kept");
            }
            // What there was to be had without room has been had, and nothing is lost.
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                tracing::warn!(%error, "there is no room to rewrite what is half alive");
                return Ok(std::iter::once(victim).chain(victims.map(|(victim, _)| victim)).collect());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Vec::new())
}

/// Stores what is alive in a pack elsewhere; how many bytes that has taken.
fn carry(inner: &Inner, pack: &Pack, live: &[(Id, Place)]) -> Result<u64> {
    let mut session = Session::of_sweep(inner);
    for (id, Place { slot, patch, .. }) in live {
        let stored = read_to_carry(inner, pack, slot, id)?;
        session.carry(id, slot, *patch, &stored)?;
    }
    let written = session.appended();
    session.finish(|_| Ok(()))?;
    Ok(written)
}

/// Lets packs that stay be appended to again.
fn reopen(inner: &Inner, victims: impl Iterator<Item = Victim>) {
    let open = victims.filter_map(|Victim { pack, open, .. }| Some((pack.number, open?)));
    write(&inner.index).open.extend(open);
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

/// Deletes packs that are forgotten. Their names go before those of their indices, so that a crash leaves lone indices,
/// which opening clears away, and never a pack without one. None of it takes room, and what it gives back is there when nobody
/// has the packs open any more.
fn delete_packs(inner: &Inner, packs: Vec<Arc<Pack>>) -> Result<()> {
    if packs.is_empty() {
        return Ok(());
    }
    let dir = &inner.packs_dir();
    let failed = |e, number| Error::io(e, format!("cannot remove pack {number} of {}", dir.display()));
    for (at, pack) in packs.iter().enumerate() {
        if let Err(e) = fs::remove_file(&pack.path) {
            // They are there still, with nothing alive in them, and the next sweep tries again.
            let left = packs[at..].iter().map(|pack| (pack.number, Arc::clone(pack)));
            write(&inner.index).packs.extend(left);
            return Err(failed(e, pack.number));
        }
    }
    sync_dir(dir)?;
    for number in packs.iter().map(|pack| pack.number) {
        fs::remove_file(&pack::index_path(dir, number)).map_err(|e| failed(e, number))?;
    }
    Ok(())
}

/// Deletes the packs of which nobody knows what is in them, as nothing is missed that could be. What they take up is given
/// back. Nobody else goes to them, so they are forgotten when they are gone.
fn delete_broken(inner: &Inner, reclaimed: &mut Reclaimed) -> Result<()> {
    let broken: Vec<u32> = read(&inner.index).broken.keys().copied().collect();
    if broken.is_empty() {
        return Ok(());
    }
    let dir = &inner.packs_dir();
    let remove = |path: &Path| match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(e, format!("cannot remove {}", path.display())))
        }
        _ => Ok(()),
    };
    for number in &broken {
        let path = pack::pack_path(dir, *number);
        // What cannot even be looked at is counted for nothing.
        let len = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        remove(&path)?;
        reclaimed.packs += 1;
        reclaimed.bytes += len;
    }
    sync_dir(dir)?;
    for number in &broken {
        remove(&pack::index_path(dir, *number))?;
        write(&inner.index).broken.remove(number);
    }
    Ok(())
}

fn file_len(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path);
    Ok(metadata.map_err(|e| Error::io(e, format!("cannot look at {}", path.display())))?.len())
}
