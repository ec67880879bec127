//! One writer's way into the packs: objects are appended, made durable together, and only then known.

mod writing;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use self::writing::{Writing, index_offset};
use crate::codec::{self, Patches, Stored};
use crate::direct::Direct;
use crate::format::{self, HOLE, INDEX_HEADER, Id, Kind, PACK_VERSION, Patch, Slot, UNIT, unit_offset};
use crate::fs::{self, File};
use crate::import::is_zero;
use crate::keys::EncryptionKey;
use crate::pack::{self, Index, Pack, Taken};
use crate::places::{Place, Places};
use crate::store::{Inner, lock, read, sync_dir, write};
use crate::turns::Storing;
use crate::{Error, Result};

/// What is being appended. Dropped without [`finish`](Self::finish) it leaves nothing behind.
///
/// Sessions run side by side, each in packs of its own, so none ever waits for another's disk. The
/// guard keeps the store from dropping an object that this session has found to be there already.
pub(crate) struct Session<'s> {
    store: &'s Inner,
    /// What holds the sweep off, unless somebody else does.
    _turn: Option<Storing>,
    sweeps: bool,
    added: Places,
    packs: Vec<Writing>,
    direct: Direct,
    appended: u64,
    committed: bool,
}

/// Why the snapshots' roots could not be written.
pub(crate) struct Unpublished {
    pub(crate) error: Error,
    /// Some of them may be there, or come back after a crash.
    pub(crate) left: bool,
}

/// What a chunk was before some of its blocks were written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Was {
    /// The chunk, encrypted with the same key; a hole where it was zero.
    pub(crate) id: Id,
    /// The blocks that were written.
    pub(crate) changed: u16,
}

impl Was {
    /// What it takes to store the chunk as the difference from one that is no patch itself.
    fn patch(self, index: &Index) -> Option<Patch> {
        match index.places.get(&self.id).filter(|_| index.has(&self.id))?.patch {
            None => Some(Patch { mask: self.changed, base: self.id }),
            Some(patch) => Some(Patch { mask: self.changed | patch.mask, base: patch.base }),
        }
    }
}

/// An object that is ready to be stored.
pub(crate) struct Prepared {
    pub(crate) id: Id,
    kind: Kind,
    /// What is to be stored, and its checksum; nothing, if it is a hole or there already.
    new: Option<(Stored, u32)>,
}

/// Does what storing a chunk takes that needs nobody else: many can be prepared side by side. One of zeroes is a
/// hole, any other is encrypted if there is a key.
///
/// There is a session, which sees to it that what is found to be there already stays there.
pub(crate) fn prepare(
    store: &Inner,
    bytes: &[u8],
    key: Option<&EncryptionKey>,
    was: Option<Was>,
) -> Prepared {
    if is_zero(bytes) {
        return Prepared { id: HOLE, kind: Kind::Chunk, new: None };
    }
    prepare_object(store, Kind::Chunk, bytes, key, was)
}

fn prepare_object(
    store: &Inner,
    kind: Kind,
    bytes: &[u8],
    key: Option<&EncryptionKey>,
    was: Option<Was>,
) -> Prepared {
    let id = codec::name(kind, bytes, key);
    let (patch, whole) = {
        let index = read(&store.index);
        if index.has(&id) {
            return Prepared { id, kind, new: None };
        }
        (was.and_then(|was| was.patch(&index)), index.is_damaged(&id))
    };
    let patches = if whole { Patches::None } else { Patches::Of(patch) };
    let stored = codec::encode(kind, &id, bytes, store.compression, key, patches);
    let crc = crc32c::crc32c(stored.bytes.as_deref().unwrap_or(bytes));
    Prepared { id, kind, new: Some((stored, crc)) }
}

impl<'s> Session<'s> {
    /// A session that holds the sweep off.
    pub(crate) fn begin(store: &'s Inner) -> Self {
        Self::new(store, Some(store.turns.store()), false)
    }

    /// The same for one whose turn it is already.
    pub(crate) fn begin_in(store: &'s Inner, _turn: &'s Storing) -> Self {
        Self::new(store, None, false)
    }

    /// A session of the sweep itself.
    pub(crate) fn of_sweep(store: &'s Inner) -> Self {
        Self::new(store, None, true)
    }

    fn new(store: &'s Inner, turn: Option<Storing>, sweeps: bool) -> Self {
        Self {
            store,
            _turn: turn,
            sweeps,
            added: Places::default(),
            packs: Vec::new(),
            direct: Direct::default(),
            appended: 0,
            committed: false,
        }
    }

    /// Bytes appended to packs.
    pub(crate) fn appended(&self) -> u64 {
        self.appended
    }

    /// What [`prepare`] needs to know.
    pub(crate) fn store(&self) -> &'s Inner {
        self.store
    }

    /// Stores a manifest leaf unless it is there already; returns its id.
    pub(crate) fn put_leaf(&mut self, ids: &[Id]) -> Result<Id> {
        let bytes = ids.as_flattened();
        let prepared = prepare_object(self.store, Kind::Leaf, bytes, None, None);
        self.put(&prepared, bytes)?;
        Ok(prepared.id)
    }

    /// Stores an object that was prepared while there was this session.
    pub(crate) fn put(&mut self, prepared: &Prepared, bytes: &[u8]) -> Result<()> {
        let Prepared { id, kind, new } = prepared;
        let Some((Stored { bytes: stored, len, encoding, patch }, crc)) = new else { return Ok(()) };
        if self.added.contains_key(id) || read(&self.store.index).has(id) {
            return Ok(());
        }
        let slot = Slot { start: 0, len: *len, crc: Some(*crc), kind: *kind, encoding: *encoding };
        self.append(id, slot, *patch, stored.as_deref().unwrap_or(bytes))
    }

    /// Carries an object, as it is stored elsewhere, even if it is there already.
    pub(crate) fn carry(&mut self, id: &Id, slot: &Slot, patch: Option<Patch>, stored: &[u8]) -> Result<()> {
        self.append(id, Slot { crc: Some(crc32c::crc32c(stored)), ..*slot }, patch, stored)
    }

    /// Finds a place for all units of a slot, wherever it is to begin, and has them written there.
    fn append(&mut self, id: &Id, slot: Slot, patch: Option<Patch>, stored: &[u8]) -> Result<()> {
        let max = self.store.pack_units;
        if self.packs.last().is_none_or(|writing| writing.taken.units + slot.units() > max) {
            let next = self.open_pack()?;
            self.packs.push(next);
        }
        let Some(writing) = self.packs.last_mut() else { return Ok(()) };
        let slot = Slot { start: writing.taken.units, ..slot };
        let number = writing.pack.number;
        let record = format::index_record(number, writing.taken.records, id, &slot, patch.as_ref());
        writing.records.extend_from_slice(&record);
        writing.taken = Taken { records: writing.taken.records + 1, units: slot.end() };
        self.added.insert(*id, Place { pack: number, slot, patch });
        self.appended += u64::from(slot.units()) * UNIT;
        self.direct.write(&writing.pack, unit_offset(slot.start), stored)
    }

    /// Makes everything durable and known, and then what `publish` does, which is to write the snapshots' roots.
    ///
    /// This synchronises the pack and its index, a root and its directory, and twice one directory more
    /// where a pack is new: four or six times however much there is, more only if several packs are filled or
    /// several snapshots made. Of much that is appended most has been sent to the disk before.
    /// The index of a pack is written when the pack's bytes are durable, so that a record never speaks
    /// of bytes that a crash took; and a pack gets its final name after its index has.
    ///
    /// Of what `publish` has done and failed at nothing may be left, unless it says so: then everything stays
    /// here, too.
    pub(crate) fn finish<T>(&mut self, publish: impl FnOnce(&Inner) -> Result<T, Unpublished>) -> Result<T> {
        self.direct.finish()?;
        for writing in &self.packs {
            let failed = |e, path: &PathBuf| Error::io(e, format!("cannot write {}", path.display()));
            writing.pack.sync()?;
            let at = if writing.new {
                let header = format::index_header(PACK_VERSION, writing.pack.number);
                writing.index.write_all_at(&header, 0).map_err(|e| failed(e, &writing.index_path))?;
                INDEX_HEADER as u64
            } else {
                index_offset(writing.start.records)
            };
            writing.index.write_all_at(&writing.records, at).map_err(|e| failed(e, &writing.index_path))?;
            writing.index.sync_data().map_err(|e| failed(e, &writing.index_path))?;
        }
        let dir = self.store.packs_dir();
        // A pack whose name is durable has an index whose name is, in whatever order a file system keeps them.
        let new: Vec<&Writing> = self.packs.iter().filter(|writing| writing.new).collect();
        let name = |from: &PathBuf, to: PathBuf| {
            fs::rename(from, &to).map_err(|e| Error::io(e, format!("cannot name {}", to.display())))
        };
        if !new.is_empty() {
            for writing in &new {
                name(&writing.index_path, pack::index_path(&dir, writing.pack.number))?;
            }
            sync_dir(&dir)?;
            for writing in &new {
                name(&writing.pack.path, pack::pack_path(&dir, writing.pack.number))?;
            }
            sync_dir(&dir)?;
        }
        // A root that cannot be written takes the objects with it, so these are known after it; who finds a root and not
        // its objects waits for this lock and looks again. It also keeps two from giving one root its name, of whom one
        // might take it back.
        let _publishing = lock(&self.store.publishing);
        let published = match publish(self.store) {
            Err(Unpublished { error, left: false }) => return Err(error),
            published => published.map_err(|unpublished| unpublished.error),
        };
        let mut index = write(&self.store.index);
        for writing in self.packs.drain(..) {
            let number = writing.pack.number;
            if writing.new {
                // The handle that wrote it knows the temporary name, and a reader opens by the final one.
                let path = pack::pack_path(&dir, number);
                index.packs.insert(number, Arc::new(Pack::new(number, path, PACK_VERSION)));
            }
            if writing.taken.has_room(self.store.pack_units) {
                index.open.insert(number, writing.taken);
            }
        }
        for (id, place) in std::mem::take(&mut self.added).iter() {
            match self.sweeps {
                // What the sweep has carried is what it was.
                true => drop(index.places.insert(*id, place)),
                false => index.add(*id, place),
            }
        }
        self.committed = true;
        published
    }

    /// Takes a pack that has room, or makes one under a temporary name.
    fn open_pack(&mut self) -> Result<Writing> {
        let dir = self.store.packs_dir();
        let mut index = write(&self.store.index);
        while let Some((number, start)) = index.open.pop_first() {
            let opened = index.packs.get(&number).cloned();
            drop(index);
            // One whose header is damaged is not appended to.
            if let Some(pack) = opened.filter(|pack| pack.file().is_ok()) {
                let index_path = pack::index_path(&dir, number);
                let file = File::open_writable(&index_path);
                let file = file.map_err(|e| Error::io(e, format!("cannot open {}", index_path.display())))?;
                let records = Vec::new();
                return Ok(Writing {
                    pack,
                    index: file,
                    index_path,
                    new: false,
                    start,
                    taken: start,
                    records,
                });
            }
            index = write(&self.store.index);
        }
        let number = index.next_number;
        index.next_number += 1;
        drop(index);
        let path = dir.join(format!("{number:08x}.pack.tmp"));
        let index_path = dir.join(format!("{number:08x}.index.tmp"));
        let create = |path: &PathBuf| {
            File::create(path).map_err(|e| Error::io(e, format!("cannot create {}", path.display())))
        };
        let file = create(&path)?;
        let made = create(&index_path).and_then(|index| {
            let written = file.write_all_at(&format::pack_header(PACK_VERSION, number), 0);
            written.map_err(|e| Error::io(e, format!("cannot write {}", path.display()))).map(|()| index)
        });
        match made {
            Ok(index) => {
                let pack = Arc::new(Pack::with_file(number, path, file));
                let (start, taken) = <(Taken, Taken)>::default();
                Ok(Writing { pack, index, index_path, new: true, start, taken, records: Vec::new() })
            }
            Err(error) => {
                let _ = fs::remove_file(&path);
                let _ = fs::remove_file(&index_path);
                Err(error)
            }
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // Nobody works any more on what is undone now.
        drop(std::mem::take(&mut self.direct));
        let dir = self.store.packs_dir();
        for writing in self.packs.drain(..) {
            let number = writing.pack.number;
            let undone = if writing.new { writing.remove(&dir) } else { writing.cut() };
            match undone {
                // A pack whose undoing failed is never appended to again, so its odd end does no harm.
                Err(error) => tracing::warn!(pack = number, %error, "cannot undo a failed import"),
                Ok(()) if !writing.new => {
                    write(&self.store.index).open.insert(number, writing.start);
                }
                Ok(()) => {}
            }
        }
    }
}
