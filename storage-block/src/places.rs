//! Where objects lie, in little memory.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry as TableEntry;

use crate::format::{CHUNK, Encoding, Id, Kind, PACK_UNITS, Patch, Slot};

/// Where an object lies, and what it differs from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) pack: u32,
    pub(crate) slot: Slot,
    pub(crate) patch: Option<Patch>,
}

#[cfg(test)]
thread_local! {
    /// How many objects this thread has gone through, one after the other.
    pub(crate) static VISITED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The places of objects by their names.
///
/// A store has one for each of its chunks, 16.8 million in a TiB. So the objects stand in a list one after the other, 48
/// bytes each, and the hash table, which is up to twice as large as it need be, has but their numbers: 60 bytes an
/// object at worst, of which 12 are the table's. What few objects have stands elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Places {
    objects: List,
    table: HashTable<u32>,
    patches: HashMap<Id, Patch>,
    /// Names are digests, of which somebody may have searched for some that begin alike.
    hasher: RandomState,
}

impl Places {
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn contains_key(&self, id: &Id) -> bool {
        self.number(id).is_some()
    }

    pub(crate) fn get(&self, id: &Id) -> Option<Place> {
        self.number(id).map(|number| self.place(self.objects.get(number)))
    }

    fn number(&self, id: &Id) -> Option<u32> {
        self.table.find(self.hasher.hash_one(id), |number| self.objects.get(*number).id == *id).copied()
    }

    fn place(&self, object: &Object) -> Place {
        let slot = object.slot();
        let patch = if slot.encoding.patch() { self.patches.get(&object.id).copied() } else { None };
        Place { pack: object.pack, slot, patch }
    }

    /// Says where an object lies, and returns where it did.
    pub(crate) fn insert(&mut self, id: Id, place: Place) -> Option<Place> {
        let before = self.get(&id);
        match place.patch {
            Some(patch) => self.patches.insert(id, patch),
            None if before.is_some_and(|before| before.patch.is_some()) => self.patches.remove(&id),
            None => None,
        };
        let (objects, hasher) = (&mut self.objects, &self.hasher);
        let found = self.table.entry(
            hasher.hash_one(id),
            |number| objects.get(*number).id == id,
            |number| hasher.hash_one(objects.get(*number).id),
        );
        match found {
            TableEntry::Occupied(number) => *objects.get_mut(*number.get()) = Object::new(id, &place),
            TableEntry::Vacant(vacant) => {
                vacant.insert(objects.len());
                objects.push(Object::new(id, &place));
            }
        }
        before
    }

    pub(crate) fn remove(&mut self, id: &Id) {
        let (objects, hasher) = (&mut self.objects, &self.hasher);
        let is_it = |number: &u32| objects.get(*number).id == *id;
        let Ok(found) = self.table.find_entry(hasher.hash_one(id), is_it) else { return };
        let (number, _) = found.remove();
        self.patches.remove(id);
        // The last one takes its number.
        let last = objects.len() - 1;
        let moved = objects.get(last).id;
        if let Some(at) = self.table.find_mut(hasher.hash_one(moved), |number| *number == last) {
            *at = number;
        }
        objects.swap_remove(number);
    }

    /// Removes all but those.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&Id, Place) -> bool) {
        let gone: Vec<Id> = self.iter().filter(|(id, place)| !keep(id, *place)).map(|(id, _)| *id).collect();
        for id in &gone {
            self.remove(id);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Id, Place)> {
        #[cfg(test)]
        VISITED.with(|visited| visited.set(visited.get() + self.len()));
        self.objects.iter().map(|object| (&object.id, self.place(object)))
    }

    /// Bytes of memory, but for patches.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.table.allocation_size() + self.objects.capacity() * size_of::<Object>()
    }
}

/// An object and its place, packed.
#[derive(Debug)]
struct Object {
    id: Id,
    pack: u32,
    crc: u32,
    /// From the lowest bit: the slot's beginning, its length, how it is encoded, whether it is a leaf and whether there is
    /// a checksum.
    slot: u64,
}

const LEN: u32 = 20;
const ENCODING: u32 = 40;
const LEAF: u64 = 1 << 48;
const CRC: u64 = 1 << 49;

const _: () = assert!(PACK_UNITS <= 1 << LEN && CHUNK < 1 << (ENCODING - LEN) && size_of::<Object>() == 48);

impl Object {
    fn new(id: Id, place: &Place) -> Self {
        let Slot { start, len, crc, kind, encoding } = place.slot;
        let mut slot = u64::from(start) | u64::from(len) << LEN | u64::from(encoding.0) << ENCODING;
        if kind == Kind::Leaf {
            slot |= LEAF;
        }
        if crc.is_some() {
            slot |= CRC;
        }
        Self { id, pack: place.pack, crc: crc.unwrap_or(0), slot }
    }

    fn slot(&self) -> Slot {
        let field = |at: u32, bits: u32| (self.slot >> at) as u32 & ((1 << bits) - 1);
        Slot {
            start: field(0, LEN),
            len: field(LEN, ENCODING - LEN),
            crc: (self.slot & CRC != 0).then_some(self.crc),
            kind: if self.slot & LEAF == 0 { Kind::Chunk } else { Kind::Leaf },
            encoding: Encoding(field(ENCODING, 8) as u8),
        }
    }
}

/// Objects by number. They lie in parts, so that a list that grows is never copied, nor twice as large as it need be.
#[derive(Debug, Default)]
struct List {
    parts: Vec<Vec<Object>>,
}

/// Objects in a part.
const PART: usize = 1 << 15;

impl List {
    /// A store has fewer than 2³² objects: they would be 256 TiB.
    fn len(&self) -> u32 {
        self.parts.last().map_or(0, |last| (self.parts.len() - 1) * PART + last.len()) as u32
    }

    fn get(&self, number: u32) -> &Object {
        &self.parts[number as usize / PART][number as usize % PART]
    }

    fn get_mut(&mut self, number: u32) -> &mut Object {
        &mut self.parts[number as usize / PART][number as usize % PART]
    }

    fn push(&mut self, object: Object) {
        match self.parts.last_mut() {
            Some(last) if last.len() < PART => last.push(object),
            // The first grows as it has to, so that a small store takes little.
            None => self.parts.push(vec![object]),
            Some(_) => {
                let mut part = Vec::with_capacity(PART);
                part.push(object);
                self.parts.push(part);
            }
        }
    }

    /// Takes one out, in whose place the last one comes.
    fn swap_remove(&mut self, number: u32) {
        let Some(last) = self.parts.last_mut().and_then(Vec::pop) else { return };
        if self.parts.last().is_some_and(Vec::is_empty) {
            self.parts.pop();
        }
        if number < self.len() {
            *self.get_mut(number) = last;
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Object> {
        self.parts.iter().flatten()
    }

    #[cfg(test)]
    fn capacity(&self) -> usize {
        self.parts.iter().map(Vec::capacity).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn id(number: u64) -> Id {
        *ami_core::Digest::of(&number.to_le_bytes()).as_bytes()
    }

    fn place(random: &mut Random) -> Place {
        let kind = if random.below(2) == 0 { Kind::Chunk } else { Kind::Leaf };
        let encoding = Encoding(random.below(8) as u8);
        let patch = Patch { mask: random.below(1 << 16) as u16, base: id(random.below(9)) };
        let slot = Slot {
            start: random.below(PACK_UNITS.into()) as u32,
            len: random.below(CHUNK + 1) as u32,
            crc: (random.below(2) == 0).then(|| random.below(1 << 32) as u32),
            kind,
            encoding,
        };
        Place { pack: random.below(1 << 32) as u32, slot, patch: encoding.patch().then_some(patch) }
    }

    /// Any order of calls leaves what it leaves in a map of the standard library.
    #[test]
    fn it_is_a_map() {
        let mut random = Random(1);
        let (mut places, mut expected) = (Places::default(), HashMap::new());
        for round in 0..60_000 {
            let id = id(random.below(500 + round));
            match random.below(5) {
                0 | 1 => {
                    places.remove(&id);
                    expected.remove(&id);
                }
                _ => {
                    let place = place(&mut random);
                    assert_eq!(places.insert(id, place), expected.insert(id, place));
                }
            }
            assert_eq!(places.get(&id), expected.get(&id).copied());
            assert_eq!(places.contains_key(&id), expected.contains_key(&id));
            assert_eq!(places.len(), expected.len());
            if round % 20_000 == 19_999 {
                let odd = |place: &Place| place.pack % 2 == 1;
                places.retain(|_, place| odd(&place));
                expected.retain(|_, place| odd(place));
                let all: HashMap<Id, Place> = places.iter().map(|(id, place)| (*id, place)).collect();
                assert_eq!(all, expected);
                assert!(expected.keys().all(|id| places.get(id) == expected.get(id).copied()));
            }
        }
        assert!(expected.len() > 1000 && places.objects.parts.len() < 4);
        let patches = expected.values().filter(|place| place.patch.is_some()).count();
        assert_eq!(places.patches.len(), patches, "what is gone takes no memory");
        places.retain(|_, _| false);
        assert_eq!((places.len(), places.iter().count(), places.objects.parts.len()), (0, 0, 0));
    }

    /// How much a store takes for each TiB of chunks that differ. `STORAGE_BLOCK_INDEX_CHUNKS` says how many to try with.
    #[test]
    fn an_object_takes_little_memory() {
        let chunks = crate::tests::number("STORAGE_BLOCK_INDEX_CHUNKS", 120_000);
        let mut places = Places::default();
        let mut random = Random(1);
        for number in 0..chunks as u64 {
            let place = Place { patch: None, ..place(&mut random) };
            places.insert(id(number), place);
        }
        let each = places.memory() as f64 / chunks as f64;
        println!("{each:.1} bytes an object, {:.2} GiB for a TiB of chunks", each * 16.0 / 1024.0);
        assert!(each < 64.0, "{each} bytes");
    }
}
