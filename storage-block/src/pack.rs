//! Packs: files of objects named by their digests, each pack with an index.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::format::{
    self, HOLE, INDEX_HEADER, Id, Kind, PACK_HEADER, PACK_UNITS, PACK_VERSION, Patch, SLOT_UNITS, Slot, UNIT,
    unit_offset,
};
use crate::fs::File;
use crate::object::{Base, Found, Patched};
use crate::places::{Place, Places};
use crate::{Error, ErrorKind, Result};

/// A pack with its final name. It is opened at its first read, and stays readable for whoever holds it
/// open even after the store has dropped it.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) number: u32,
    pub(crate) path: PathBuf,
    version: u32,
    file: OnceLock<File>,
    /// A bit for each unit at which an object begins that was read and found to be what its name says.
    verified: OnceLock<Box<[AtomicU64]>>,
}

impl Pack {
    pub(crate) fn new(number: u32, path: PathBuf, version: u32) -> Self {
        Self { number, path, version, file: OnceLock::new(), verified: OnceLock::new() }
    }

    /// A new one.
    pub(crate) fn with_file(number: u32, path: PathBuf, file: File) -> Self {
        let file = OnceLock::from(file);
        Self { number, path, version: PACK_VERSION, file, verified: OnceLock::new() }
    }

    /// The open file.
    #[inline]
    pub(crate) fn file(&self) -> Result<&File> {
        match self.file.get() {
            Some(file) => Ok(file),
            None => self.open(),
        }
    }

    #[cold]
    fn open(&self) -> Result<&File> {
        let open = File::open_writable(&self.path);
        let file = open.map_err(|e| Error::stored(e, format!("cannot open {}", self.path.display())))?;
        let mut header = vec![0; PACK_HEADER as usize];
        file.read_exact_at(&mut header, 0).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::corrupt(&self.path, "it ends before its header does"),
            _ => Error::stored(e, format!("cannot read the header of {}", self.path.display())),
        })?;
        let version =
            format::check_pack_header(&header, self.number).map_err(|why| Error::corrupt(&self.path, why))?;
        if version != self.version {
            let why = format!("it is of version {version}, and its index of version {}", self.version);
            return Err(Error::corrupt(&self.path, why));
        }
        // Whoever loses this race has opened the same file.
        Ok(self.file.get_or_init(|| file))
    }

    /// The file, if it is open already.
    pub(crate) fn opened(&self) -> Option<&File> {
        self.file.get()
    }

    /// Makes what has been written to it durable.
    pub(crate) fn sync(&self) -> Result<()> {
        let synced = self.file()?.sync_data();
        synced.map_err(|e| Error::io(e, format!("cannot write {}", self.path.display())))
    }

    /// Reads from `offset` within the slot that begins at the unit `start`, and on into those behind it.
    #[inline]
    pub(crate) fn read(&self, start: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file()?
            .read_exact_at(buf, unit_offset(start) + offset)
            .map_err(|error| self.not_read(start, error))
    }

    #[cold]
    fn not_read(&self, start: u32, error: std::io::Error) -> Error {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => self.cut_short(start),
            _ => {
                let what = format!("cannot read slot {} of {}", self.slot_name(start), self.path.display());
                Error::stored(error, what)
            }
        }
    }

    /// Has a slot on its way from the disk.
    pub(crate) fn fetch(&self, slot: &Slot) {
        if let Ok(file) = self.file() {
            file.fetch(unit_offset(slot.start), u64::from(slot.units()) * UNIT);
        }
    }

    /// All units of a slot.
    pub(crate) fn read_stored(&self, slot: &Slot) -> Result<Vec<u8>> {
        let mut stored = vec![0; slot.units() as usize * UNIT as usize];
        self.read(slot.start, 0, &mut stored)?;
        Ok(stored)
    }

    /// The same, and that they are what was once written where the index says that.
    pub(crate) fn read_whole(&self, slot: &Slot) -> Result<Vec<u8>> {
        let stored = self.read_stored(slot)?;
        match slot.crc {
            Some(crc) if crc != crc32c::crc32c(&stored) => Err(self.not_as_stored(slot)),
            _ => Ok(stored),
        }
    }

    /// The error of a slot whose bytes are not those that were stored.
    pub(crate) fn not_as_stored(&self, slot: &Slot) -> Error {
        self.damaged(slot.start, format_args!("has not the checksum of its {}", slot.kind.name()))
    }

    /// The error of a slot that is not what it should be.
    pub(crate) fn damaged(&self, start: u32, what: impl std::fmt::Display) -> Error {
        Error::corrupt(&self.path, format_args!("slot {} {what}", self.slot_name(start)))
    }

    fn cut_short(&self, start: u32) -> Error {
        Error::corrupt(&self.path, format_args!("it ends before the end of slot {}", self.slot_name(start)))
    }

    /// A slot's number in its format: the first of its units, or of 16 of them.
    fn slot_name(&self, start: u32) -> u32 {
        if self.version == 1 { start / SLOT_UNITS } else { start }
    }

    /// Whether the object that begins at `unit` was verified since the store was opened.
    pub(crate) fn is_verified(&self, unit: u32) -> bool {
        let word = self.verified.get().and_then(|bits| bits.get(unit as usize / 64));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (unit % 64) & 1 != 0)
    }

    pub(crate) fn set_verified(&self, unit: u32) {
        let bits = self.verified.get_or_init(|| (0..PACK_UNITS / 64).map(|_| AtomicU64::new(0)).collect());
        if let Some(word) = bits.get(unit as usize / 64) {
            word.fetch_or(1 << (unit % 64), Ordering::Relaxed);
        }
    }
}

/// How much of a pack is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Taken {
    pub(crate) records: u32,
    pub(crate) units: u32,
}

impl Taken {
    /// Whether any object fits into what is left of a pack of so many units.
    pub(crate) fn has_room(self, pack_units: u32) -> bool {
        self.units + SLOT_UNITS <= pack_units
    }
}

/// Every object of the store, in memory; it is what the packs' indices say together.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) places: Places,
    /// Where what is in `places` lies as a whole once more: two sessions may store the same side by side, and what was
    /// damaged is stored again.
    pub(crate) copies: HashMap<Id, Vec<Place>>,
    /// What was found damaged, and is stored again by whoever has it.
    damaged: HashSet<Id>,
    /// Patches of what no pack is known to hold, by its name: they can be read as soon as it is stored again.
    lone: HashMap<Id, Vec<(Id, Place)>>,
    /// Packs with a record that cannot be read: what it speaks of may be there.
    unsure: HashSet<u32>,
    pub(crate) packs: BTreeMap<u32, Arc<Pack>>,
    /// Packs of which nobody knows what is in them, and what is wrong with each.
    pub(crate) broken: BTreeMap<u32, String>,
    /// How much of a pack is taken, for those that have room, whose index is whole, and that are of the
    /// version that is written.
    pub(crate) open: BTreeMap<u32, Taken>,
    pub(crate) next_number: u32,
}

impl Index {
    /// Where `id` lies, and what it differs from.
    pub(crate) fn find(&self, id: &Id) -> Option<Found> {
        let place = self.places.get(id)?;
        let pack = |number: u32| self.packs.get(&number).map(Arc::clone);
        let patch = match &place.patch {
            None => None,
            Some(Patch { mask, base: HOLE }) => Some(Patched { mask: *mask, base: None }),
            Some(Patch { mask, base }) => {
                let of_base = self.places.get(base).filter(|place| place.patch.is_none())?;
                let base = Base { id: *base, pack: pack(of_base.pack)?, slot: of_base.slot };
                Some(Patched { mask: *mask, base: Some(base) })
            }
        };
        Some(Found { pack: pack(place.pack)?, slot: place.slot, patch })
    }

    /// The same of what lies at this place of a pack, which may be one of several that hold it.
    pub(crate) fn find_at(&self, id: &Id, (pack, start): (u32, u32)) -> Option<Found> {
        let is_there = |place: &Place| place.pack == pack && place.slot.start == start;
        if self.places.get(id).is_some_and(|place| is_there(&place)) {
            return self.find(id);
        }
        let copy = self.copies.get(id)?.iter().find(|copy| is_there(copy))?;
        Some(Found { pack: self.packs.get(&pack).map(Arc::clone)?, slot: copy.slot, patch: None })
    }

    /// Whether nobody need store the object: it is there, and so is what it differs from.
    pub(crate) fn has(&self, id: &Id) -> bool {
        let sound = |id: &Id| self.places.get(id).filter(|_| !self.damaged.contains(id));
        let whole = |id: &Id| sound(id).is_some_and(|place| place.patch.is_none());
        sound(id).is_some_and(|place| match place.patch {
            None => true,
            // What waits for it needs it as a whole.
            Some(_) if self.lone.contains_key(id) => false,
            Some(Patch { base: HOLE, .. }) => true,
            Some(Patch { base, .. }) => whole(&base),
        })
    }

    /// Whether the object was found damaged, or is missed; it is stored as a whole then, as others may differ from it.
    pub(crate) fn is_damaged(&self, id: &Id) -> bool {
        self.damaged.contains(id) || self.lone.contains_key(id)
    }

    /// The packs that may hold more than is known of them, which whoever mends something else makes known again.
    pub(crate) fn with_more(&self) -> HashSet<u32> {
        let lone = self.lone.values().flatten().map(|(_, place)| place.pack);
        lone.chain(self.unsure.iter().copied()).collect()
    }

    /// Notes that what lies there is not what its name says. Whether there is a copy, which takes its place.
    pub(crate) fn mark_damaged(&mut self, id: &Id, pack: u32, start: u32) -> bool {
        let is_there = |place: &Place| place.pack == pack && place.slot.start == start;
        let Some(place) = self.places.get(id) else { return false };
        let mut copies = self.copies.remove(id).unwrap_or_default();
        copies.retain(|copy| !is_there(copy));
        let mut found = !is_there(&place);
        if !found {
            match copies.pop() {
                Some(copy) => {
                    self.places.insert(*id, copy);
                    found = true;
                }
                None => drop(self.damaged.insert(*id)),
            }
        }
        if !copies.is_empty() {
            self.copies.insert(*id, copies);
        }
        found
    }

    /// Takes in what was stored. What is there stays where somebody else has stored the same meanwhile: he may
    /// have told others that it is no patch, who differ from it now.
    pub(crate) fn add(&mut self, id: Id, place: Place) {
        if !self.has(&id) {
            self.damaged.remove(&id);
            self.places.insert(id, place);
            if place.patch.is_none() {
                let waited = self.lone.remove(&id).unwrap_or_default();
                self.add_patches(waited);
            }
        } else if place.patch.is_none() {
            self.copies.entry(id).or_default().push(place);
        }
    }

    /// Forgets packs, what lies in them, and what is stored as the difference from that.
    pub(crate) fn forget(&mut self, numbers: &[u32]) {
        for number in numbers {
            self.packs.remove(number);
            self.unsure.remove(number);
        }
        self.lone.retain(|_, patches| {
            patches.retain(|(_, place)| self.packs.contains_key(&place.pack));
            !patches.is_empty()
        });
        self.places.retain(|_, place| self.packs.contains_key(&place.pack));
        let lone = |place: &Place| {
            let base = place.patch.as_ref().map_or(HOLE, |patch| patch.base);
            base != HOLE && self.places.get(&base).is_none_or(|base| base.patch.is_some())
        };
        let lone: Vec<Id> = self.places.iter().filter(|(_, place)| lone(place)).map(|(id, _)| *id).collect();
        for id in lone {
            self.places.remove(&id);
        }
        self.damaged.retain(|id| self.places.contains_key(id));
        self.copies.retain(|id, copies| {
            copies.retain(|copy| self.packs.contains_key(&copy.pack));
            !copies.is_empty() && self.places.contains_key(id)
        });
    }

    /// Forgets one pack of which nothing is alive any more, with what was dead in it and what differed from that. The cost is
    /// that of what is forgotten, however much else there is.
    pub(crate) fn forget_dead(&mut self, number: u32, dead: &Dead) {
        self.packs.remove(&number);
        self.unsure.remove(&number);
        for id in &dead.objects {
            // It may be found elsewhere by now, if it is not only here.
            if self.places.get(id).is_some_and(|place| place.pack == number) {
                self.remove(id);
            }
        }
        for id in &dead.patches {
            let base = self.places.get(id).and_then(|place| place.patch).map_or(HOLE, |patch| patch.base);
            if base != HOLE && self.places.get(&base).is_none_or(|base| base.patch.is_some()) {
                self.remove(id);
            }
        }
        // Of these there are few.
        self.lone.retain(|_, patches| {
            patches.retain(|(_, place)| place.pack != number);
            !patches.is_empty()
        });
        self.copies.retain(|_, copies| {
            copies.retain(|copy| copy.pack != number);
            !copies.is_empty()
        });
    }

    fn remove(&mut self, id: &Id) {
        self.places.remove(id);
        self.damaged.remove(id);
        self.copies.remove(id);
    }

    /// The error of an object that no pack has, as far as anybody knows.
    pub(crate) fn lost(&self, kind: Kind, id: &Id) -> Error {
        let mut what = format!("no pack holds the {} {}", kind.name(), hex::encode(id));
        for why in self.broken.values() {
            what = format!("{what}; what a damaged one holds is not known: {why}");
        }
        Error::new(ErrorKind::Corrupt, what)
    }

    /// Takes in patches, of which there may be several of one chunk, as two sessions may store it side by side. One of
    /// a chunk that is stored as a whole, too, is of no use: others may differ from that. One that differs from
    /// something that is not there waits for it, and if it is the only one the chunk shall be stored again.
    fn add_patches(&mut self, patches: Vec<(Id, Place)>) {
        for (id, place) in patches {
            let whole = |id: &Id| self.places.get(id).filter(|place| place.patch.is_none());
            if whole(&id).is_some() {
                continue;
            }
            let base = place.patch.as_ref().map_or(HOLE, |patch| patch.base);
            match whole(&base) {
                None if base != HOLE => self.lone.entry(base).or_default().push((id, place)),
                Some(other) if other.slot.kind != Kind::Chunk => {}
                _ => {
                    self.damaged.remove(&id);
                    self.places.insert(id, place);
                }
            }
        }
    }

    /// Takes in the index of every pack in `dir`.
    pub(crate) fn load(dir: &Path, pack_units: u32) -> Result<Self> {
        let mut index = Self::default();
        let mut packs = Vec::new();
        for entry in read_dir(dir)? {
            if let Some(number) = number_of(&entry, "pack") {
                packs.push(number);
            }
        }
        packs.sort_unstable();
        index.next_number = packs.last().map_or(0, |last| last + 1);
        let mut rest = Rest::default();
        for number in packs {
            match index.load_pack(dir, number, pack_units, &mut rest) {
                // The other packs are as good as ever.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    tracing::warn!(%error, "a damaged pack is left alone");
                    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                    index.broken.insert(number, format!("{error}{}", cause.unwrap_or_default()));
                }
                loaded => loaded?,
            }
        }
        index.add_patches(rest.patches);
        for (id, place) in rest.cut {
            // Where there is no other, a read of it says what is wrong.
            if !index.places.contains_key(&id) {
                index.places.insert(id, place);
                index.damaged.insert(id);
            }
        }
        Ok(index)
    }

    /// Takes in the index of one pack, but for what has to wait for the others.
    fn load_pack(&mut self, dir: &Path, number: u32, pack_units: u32, rest: &mut Rest) -> Result<()> {
        let path = pack_path(dir, number);
        let index_path = index_path(dir, number);
        // Records that a process wrote and did not live to make durable are relied on from here on.
        let mut bytes = Vec::new();
        let read = File::open(&index_path).and_then(|file| {
            let synced = file.sync_data();
            // One byte more than there can be is enough to see that there is too much.
            file.take(format::index_max(PACK_VERSION) as u64 + 1).read_to_end(&mut bytes)?;
            Ok(synced)
        });
        match read {
            Ok(synced) => {
                synced.map_err(|e| Error::io(e, format!("cannot make {} durable", index_path.display())))?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::corrupt(&index_path, "it is missing, and its pack is not"));
            }
            Err(e) => return Err(Error::stored(e, format!("cannot read {}", index_path.display()))),
        }
        let version =
            format::check_index_header(&bytes, number).map_err(|why| Error::corrupt(&index_path, why))?;
        if bytes.len() > format::index_max(version) {
            return Err(Error::corrupt(&index_path, "it speaks of more slots than a pack has"));
        }
        let len = std::fs::metadata(&path)
            .map_err(|e| Error::stored(e, format!("cannot look at {}", path.display())))?
            .len();
        let pack = Pack::new(number, path, version);
        let records = bytes[INDEX_HEADER..].chunks_exact(format::record_len(version));
        let mut whole = records.remainder().is_empty();
        if !whole {
            self.unsure.insert(number);
        }
        let mut taken = Taken::default();
        for record in records {
            // A record that is not whole was being written in a crash, or has rotted since. Either way its
            // slot is not used, and nothing is appended where it could be hidden.
            match format::parse_index_record(version, number, taken.records, record) {
                Some((id, slot, patch)) => {
                    taken.units = taken.units.max(slot.end());
                    let place = Place { pack: number, slot, patch };
                    if len < unit_offset(slot.end()) {
                        whole = false;
                        rest.cut.push((id, place));
                    } else if place.patch.is_some() {
                        rest.patches.push((id, place));
                    } else if let Some(before) = self.places.insert(id, place) {
                        self.copies.entry(id).or_default().push(before);
                    }
                }
                None => {
                    whole = false;
                    self.unsure.insert(number);
                }
            }
            taken.records += 1;
        }
        self.packs.insert(number, Arc::new(pack));
        if whole && version == PACK_VERSION && taken.has_room(pack_units) {
            self.open.insert(number, taken);
        }
        Ok(())
    }
}

/// What goes with a pack of which nothing is alive any more.
#[derive(Debug, Default)]
pub(crate) struct Dead {
    /// The objects that lie in it, as far as they are not to be found elsewhere.
    pub(crate) objects: Vec<Id>,
    /// Those, elsewhere, that are stored as what differs from one of them.
    pub(crate) patches: Vec<Id>,
}

/// What a pack's index says that means something only when all are known.
#[derive(Default)]
struct Rest {
    patches: Vec<(Id, Place)>,
    /// Objects that lie beyond the end of their pack.
    cut: Vec<(Id, Place)>,
}

pub(crate) fn pack_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:08x}.pack"))
}

pub(crate) fn index_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:08x}.index"))
}

/// The number in the name of a pack's file.
pub(crate) fn number_of(name: &str, extension: &str) -> Option<u32> {
    let stem = name.strip_suffix(extension)?.strip_suffix('.')?;
    (stem.len() == 8).then(|| u32::from_str_radix(stem, 16).ok())?
}

/// The names in a directory.
pub(crate) fn read_dir(dir: &Path) -> Result<Vec<String>> {
    let context = || format!("cannot list {}", dir.display());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(e, context()))? {
        let entry = entry.map_err(|e| Error::io(e, context()))?;
        names.extend(entry.file_name().into_string().ok());
    }
    Ok(names)
}
