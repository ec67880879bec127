//! One writer's way into the packs: objects are appended, made durable together, and only then known.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::RwLockReadGuard;

use ami_core::Digest;

use crate::format::{self, CHUNK, INDEX_HEADER, INDEX_RECORD, Id, Kind};
use crate::fs::{self, File};
use crate::pack::{self, Pack, Place};
use crate::store::{Inner, read, sync_dir, write};
use crate::{Error, Result};

/// Objects wait here until so many bytes can be written at once.
const BUFFER: usize = 1 << 20;

/// What is being appended. Dropped without [`finish`](Self::finish) it leaves nothing behind.
///
/// Sessions run side by side, each in packs of its own, so none ever waits for another's disk. The
/// guard keeps the store from dropping an object that this session has found to be there already.
pub(crate) struct Session<'s> {
    store: &'s Inner,
    _sweep: Option<RwLockReadGuard<'s, ()>>,
    added: HashMap<Id, Place>,
    packs: Vec<Writing>,
    buffer: Vec<u8>,
    appended: u64,
    committed: bool,
}

struct Writing {
    pack: Arc<Pack>,
    index: File,
    index_path: PathBuf,
    /// The pack has its temporary name still.
    new: bool,
    /// Taken slots before this session.
    start: u32,
    /// Taken slots with those in the buffer.
    slots: u32,
    records: Vec<u8>,
}

impl<'s> Session<'s> {
    /// A session that holds the sweep off.
    pub(crate) fn begin(store: &'s Inner) -> Self {
        Self::new(store, Some(read(&store.sweep)))
    }

    /// A session of the sweep itself.
    pub(crate) fn of_sweep(store: &'s Inner) -> Self {
        Self::new(store, None)
    }

    fn new(store: &'s Inner, sweep: Option<RwLockReadGuard<'s, ()>>) -> Self {
        let buffer = Vec::with_capacity(BUFFER);
        Self {
            store,
            _sweep: sweep,
            added: HashMap::new(),
            packs: Vec::new(),
            buffer,
            appended: 0,
            committed: false,
        }
    }

    /// Bytes appended to packs.
    pub(crate) fn appended(&self) -> u64 {
        self.appended
    }

    /// Stores an object of `kind.len()` bytes unless it is there already; returns its id.
    pub(crate) fn put(&mut self, kind: Kind, bytes: &[u8]) -> Result<Id> {
        let id = *Digest::of(bytes).as_bytes();
        self.put_named(kind, &id, bytes)?;
        Ok(id)
    }

    /// The same for an object whose id is known.
    pub(crate) fn put_named(&mut self, kind: Kind, id: &Id, bytes: &[u8]) -> Result<()> {
        if self.added.contains_key(id) || read(&self.store.index).places.contains_key(id) {
            return Ok(());
        }
        self.append(kind, id, bytes)
    }

    /// Stores an object even if it is there already.
    pub(crate) fn append(&mut self, kind: Kind, id: &Id, bytes: &[u8]) -> Result<()> {
        if self.packs.last().is_none_or(|writing| writing.slots >= self.store.pack_slots) {
            self.write_out()?;
            let next = self.open_pack()?;
            self.packs.push(next);
        }
        let Some(writing) = self.packs.last_mut() else { return Ok(()) };
        let slot = writing.slots;
        writing.slots += 1;
        writing.records.extend_from_slice(&format::index_record(writing.pack.number, slot, id, kind));
        self.added.insert(*id, Place { pack: writing.pack.number, slot });
        self.buffer.extend_from_slice(bytes);
        self.buffer.resize(self.buffer.len().next_multiple_of(CHUNK as usize), 0);
        self.appended += kind.len() as u64;
        if self.buffer.len() >= BUFFER { self.write_out() } else { Ok(()) }
    }

    /// Makes everything durable and known, and then what `publish` does, which is to write the snapshots' roots.
    ///
    /// This synchronises the pack and its index, a root and its directory, and one directory more
    /// where a pack is new: four or five times however much there is, more only if several packs are filled or
    /// several snapshots made.
    /// The index of a pack is written when the pack's bytes are durable, so that a record never speaks
    /// of bytes that a crash took; and a pack gets its final name after its index has.
    pub(crate) fn finish<T>(&mut self, publish: impl FnOnce(&Inner) -> Result<T>) -> Result<T> {
        self.write_out()?;
        for writing in &self.packs {
            let failed = |e, path: &PathBuf| Error::io(e, format!("cannot write {}", path.display()));
            writing.pack.file()?.sync_data().map_err(|e| failed(e, &writing.pack.path))?;
            let at = if writing.new {
                let header = format::index_header(writing.pack.number);
                writing.index.write_all_at(&header, 0).map_err(|e| failed(e, &writing.index_path))?;
                INDEX_HEADER as u64
            } else {
                index_offset(writing.start)
            };
            writing.index.write_all_at(&writing.records, at).map_err(|e| failed(e, &writing.index_path))?;
            writing.index.sync_data().map_err(|e| failed(e, &writing.index_path))?;
        }
        let dir = self.store.packs_dir();
        let mut renamed = false;
        for writing in self.packs.iter().filter(|writing| writing.new) {
            let number = writing.pack.number;
            for (from, to) in [
                (&writing.index_path, pack::index_path(&dir, number)),
                (&writing.pack.path, pack::pack_path(&dir, number)),
            ] {
                fs::rename(from, &to).map_err(|e| Error::io(e, format!("cannot name {}", to.display())))?;
            }
            renamed = true;
        }
        if renamed {
            sync_dir(&dir)?;
        }
        // Nobody who finds the root may fail to find its objects, and a root that cannot be written takes
        // the objects with it.
        let mut index = write(&self.store.index);
        let published = publish(self.store)?;
        for writing in self.packs.drain(..) {
            let number = writing.pack.number;
            if writing.new {
                // The handle that wrote it knows the temporary name, and a reader opens by the final one.
                index.packs.insert(number, Arc::new(Pack::new(number, pack::pack_path(&dir, number))));
            }
            if writing.slots < self.store.pack_slots {
                index.open.insert(number, writing.slots);
            }
        }
        index.places.extend(self.added.drain());
        self.committed = true;
        Ok(published)
    }

    /// Takes a pack that has room, or makes one under a temporary name.
    fn open_pack(&mut self) -> Result<Writing> {
        let dir = self.store.packs_dir();
        let mut index = write(&self.store.index);
        if let Some((number, start)) = index.open.pop_first() {
            let opened = index.packs.get(&number).cloned();
            drop(index);
            if let Some(pack) = opened {
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
                    slots: start,
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
            let written = file.write_all_at(&format::pack_header(number), 0);
            written.map_err(|e| Error::io(e, format!("cannot write {}", path.display()))).map(|()| index)
        });
        match made {
            Ok(index) => {
                let pack = Arc::new(Pack::with_file(number, path, file));
                Ok(Writing { pack, index, index_path, new: true, start: 0, slots: 0, records: Vec::new() })
            }
            Err(error) => {
                let _ = fs::remove_file(&path);
                let _ = fs::remove_file(&index_path);
                Err(error)
            }
        }
    }

    fn write_out(&mut self) -> Result<()> {
        if let (Some(writing), false) = (self.packs.last(), self.buffer.is_empty()) {
            let slots = (self.buffer.len() as u64 / CHUNK) as u32;
            let at = pack::slot_offset(writing.slots - slots);
            let written = writing.pack.file()?.write_all_at(&self.buffer, at);
            written.map_err(|e| Error::io(e, format!("cannot write {}", writing.pack.path.display())))?;
        }
        self.buffer.clear();
        Ok(())
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let dir = self.store.packs_dir();
        for writing in self.packs.drain(..) {
            let number = writing.pack.number;
            let undone = if writing.new {
                // Whichever of the names it had got to; the pack first, which is nothing without its index.
                let names = [
                    pack::pack_path(&dir, number),
                    writing.pack.path.clone(),
                    pack::index_path(&dir, number),
                    writing.index_path.clone(),
                ];
                for name in &names {
                    let _ = fs::remove_file(name);
                }
                Ok(())
            } else {
                let cut = writing.index.set_len(index_offset(writing.start));
                let end = pack::slot_offset(writing.start);
                cut.and_then(|()| writing.pack.file().map_or(Ok(()), |pack| pack.set_len(end)))
            };
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

fn index_offset(slots: u32) -> u64 {
    (INDEX_HEADER + slots as usize * INDEX_RECORD) as u64
}
