//! Looking through everything a store has for damage.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ami_core::Digest;
use rustix::io::Errno;

use crate::format::{HOLE, Id, Kind, UNIT};
use crate::keys::EncryptionKey;
use crate::places::Place;
use crate::progress::Reporter;
use crate::snapshot::Root;
use crate::store::{Inner, read};
use crate::{Error, ErrorKind, Progress, Result, Snapshot, Store};

/// The pack that an object lies in, where in it, how many bytes long, and which object it is.
type Lies = (u32, u32, u64, Id);

/// What [`Store::scrub`] has seen and found.
///
/// ```
/// use storage_block::{MemoryDisk, Store};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path())?;
/// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// store.import(&image, &mut |_| ())?;
/// let report = store.scrub(&mut |progress| println!("{} of {}", progress.done, progress.total))?;
/// for damage in &report.damages {
///     eprintln!("{damage}");
/// }
/// assert!(report.damages.is_empty() && report.damaged_snapshots.is_empty());
/// // Sixteen equal chunks are one object, the leaf of the manifest is another.
/// assert_eq!((report.snapshots, report.objects, report.without_key), (1, 2, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct ScrubReport {
    /// Snapshots whose manifests were read through.
    pub snapshots: u64,
    /// Chunks and manifest leaves that were read, whether or not a snapshot has them.
    pub objects: u64,
    /// Of these, the encrypted chunks whose keys are not at hand, or that no snapshot has: they were compared with
    /// checksums, which find any accident, and not with their names, which nobody can forge.
    pub without_key: u64,
    /// Everything that is wrong, by what a read of it says.
    pub damages: Vec<Error>,
    /// The snapshots that cannot be read in full.
    pub damaged_snapshots: Vec<Digest>,
}

impl Store {
    /// Reads every object of every pack and compares it with its name, and sees that all that a snapshot consists of is
    /// there. It goes on after a damage, and reports all there are.
    ///
    /// Everything else goes on meanwhile: reads, writes, imports and the sweep, to which all snapshots are open ones until
    /// it ends. What is stored or dropped while it runs may be seen or not. It reads through the page cache of the system, so that what is there is not read from the
    /// disk, and it takes some 40 bytes of memory for each object, and as much again for each chunk that is encrypted.
    ///
    /// # Errors
    ///
    /// [`Cancelled`](ErrorKind::Cancelled), what the file system says to the list of snapshots, or that there are no more
    /// descriptors or memory to be had, which says nothing of what is stored. Damage, and a file that cannot be read, is no
    /// error but in the report.
    pub fn scrub(&self, progress: &mut dyn FnMut(Progress)) -> Result<ScrubReport> {
        let inner = &self.0;
        let mut report = ScrubReport::default();
        let broken = |why: &String| Error::new(ErrorKind::Corrupt, why.clone());
        report.damages.extend(read(&inner.index).broken.values().map(broken));
        let roots = open_roots(self, &mut report)?;
        let keys = keys_of(inner, &roots)?;
        let (mut objects, copied): (Vec<Lies>, HashSet<Id>) = {
            let index = read(&inner.index);
            let place = |(id, place): (&Id, Place)| {
                (place.pack, place.slot.start, u64::from(place.slot.units()) * UNIT, *id)
            };
            let copies =
                index.copies.iter().flat_map(|(id, copies)| copies.iter().map(move |copy| (id, *copy)));
            (index.places.iter().chain(copies).map(place).collect(), index.copies.keys().copied().collect())
        };
        // In the order in which they lie.
        objects.sort_unstable();

        let mut reporter = Reporter::begin(objects.iter().map(|(.., len, _)| len).sum(), progress)?;
        let (mut damaged, mut done) = (HashSet::new(), 0);
        for (pack, start, len, id) in &objects {
            let key = keys.get(id);
            let checked = match copied.contains(id) {
                true => check_place(inner, id, (*pack, *start), key, &mut report),
                false => check_object(inner, id, key, &mut report).map_err(|error| (error, false)),
            };
            if let Err((error, is_elsewhere)) = checked {
                report.damages.push(of_what_is_stored(error)?);
                if !is_elsewhere {
                    damaged.insert(*id);
                }
            }
            done += len;
            reporter.step(done)?;
        }
        for root in roots {
            reporter.check()?;
            check_snapshot(&Snapshot::new(Arc::clone(inner), root), &mut damaged, &mut report)?;
        }
        reporter.finish();
        Ok(report)
    }
}

/// The snapshots there are, which stay as long as their roots are open. A root that is damaged is one of the damages.
fn open_roots(store: &Store, report: &mut ScrubReport) -> Result<Vec<Arc<Root>>> {
    let inner = &store.0;
    let mut roots = Vec::new();
    for digest in store.snapshots()? {
        match inner.open_root(&digest) {
            Ok(root) => {
                // Whoever has not the key can still say whether the chunks are there.
                let _ = root.unlock(|wrapped, context| inner.unlock(wrapped, context));
                roots.push(root);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                report.damages.push(of_what_is_stored(error)?);
                report.damaged_snapshots.push(digest);
            }
        }
    }
    Ok(roots)
}

/// An error that says something of what is stored, and not of this process.
fn of_what_is_stored(error: Error) -> Result<Error> {
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<std::io::Error>());
    let of_process = [Errno::MFILE, Errno::NFILE, Errno::NOMEM].map(Errno::raw_os_error);
    match source.and_then(std::io::Error::raw_os_error) {
        Some(code) if of_process.contains(&code) => Err(error),
        _ => Ok(error),
    }
}

/// The keys of the chunks that are encrypted, as far as they are at hand. Manifests that cannot be read are found later.
fn keys_of(inner: &Arc<Inner>, roots: &[Arc<Root>]) -> Result<HashMap<Id, EncryptionKey>> {
    let mut keys = HashMap::new();
    for root in roots {
        let Some(key) = root.key() else { continue };
        let snapshot = Snapshot::new(Arc::clone(inner), Arc::clone(root));
        for leaf in 0..root.leaves.len() {
            let ids = match snapshot.leaf_ids(leaf) {
                Ok(ids) => ids,
                Err(error) => {
                    of_what_is_stored(error)?;
                    continue;
                }
            };
            keys.extend(ids.into_iter().filter(|id| *id != HOLE).map(|id| (id, key.clone())));
        }
    }
    Ok(keys)
}

fn check_object(inner: &Inner, id: &Id, key: Option<&EncryptionKey>, report: &mut ScrubReport) -> Result<()> {
    // Where it lies now: the sweep may have carried it elsewhere, or dropped it.
    let Some(found) = read(&inner.index).find(id) else { return Ok(()) };
    report.objects += 1;
    if found.slot.encoding.encrypted() && key.is_none() {
        report.without_key += 1;
        return inner.check_keyless(found.slot.kind, id);
    }
    inner.read_object(found.slot.kind, id, key).map(drop)
}

/// The same for an object that lies in several places, in one of them. After a damage, also whether it is to be had elsewhere.
fn check_place(
    inner: &Inner,
    id: &Id,
    place: (u32, u32),
    key: Option<&EncryptionKey>,
    report: &mut ScrubReport,
) -> Result<(), (Error, bool)> {
    // The guard keeps the pack's file there until it is open.
    let found = {
        let index = read(&inner.index);
        index.find_at(id, place).map(|found| (found.open(), found))
    };
    let Some((opened, found)) = found else {
        return check_object(inner, id, key, report).map_err(|error| (error, false));
    };
    report.objects += 1;
    let keyless = found.slot.encoding.encrypted() && key.is_none();
    report.without_key += u64::from(keyless);
    match opened {
        Err(error) if error.kind() != ErrorKind::Corrupt => return Err((error, false)),
        // One that is damaged says so again.
        _ => {}
    }
    inner.check_found(id, &found, |object| match keyless {
        true => object.read_keyless(),
        false => object.read_checked(key),
    })
}

/// Sees that a snapshot's leaves and chunks are there, and that none of them is among the damaged.
fn check_snapshot(snapshot: &Snapshot, damaged: &mut HashSet<Id>, report: &mut ScrubReport) -> Result<()> {
    report.snapshots += 1;
    let root = &snapshot.root;
    let mut whole = true;
    for (leaf, leaf_id) in root.leaves.iter().enumerate() {
        if damaged.contains(leaf_id) {
            whole = false;
            continue;
        }
        let ids = match snapshot.leaf_ids(leaf) {
            Ok(ids) => ids,
            Err(error) => {
                report.damages.push(of_what_is_stored(error)?);
                damaged.insert(*leaf_id);
                whole = false;
                continue;
            }
        };
        for id in ids.iter().filter(|id| **id != HOLE) {
            if damaged.contains(id) {
                whole = false;
            } else if read(&snapshot.store.index).find(id).is_none() {
                // It may be on its way still.
                let Err(error) = snapshot.store.find_open(Kind::Chunk, id) else { continue };
                // Once, however many snapshots have it.
                report.damages.push(of_what_is_stored(error)?);
                damaged.insert(*id);
                whole = false;
            }
        }
    }
    if !whole {
        report.damaged_snapshots.push(root.digest);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_process_lacks_is_no_damage() {
        let error = |errno: Errno| Error::io(errno.into(), "cannot open a pack");
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            assert!(of_what_is_stored(error(errno)).is_err(), "{errno:?}");
        }
        for errno in [Errno::IO, Errno::NOENT, Errno::ACCESS] {
            assert!(of_what_is_stored(error(errno)).is_ok(), "{errno:?}");
        }
        assert!(of_what_is_stored(Error::new(ErrorKind::Corrupt, "it has rotted")).is_ok());
    }
}
