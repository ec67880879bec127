//! How objects are read: from one slot, or from two where a chunk is stored as what differs from another.

use std::sync::Arc;

use crate::Result;
use crate::cache::{self, Cache};
use crate::codec;
use crate::format::{BLOCK, CHUNK, Encoding, Id, Kind, Slot, UNIT};
use crate::keys::EncryptionKey;
use crate::pack::Pack;

/// Where an object lies, and what it differs from.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) pack: Arc<Pack>,
    pub(crate) slot: Slot,
    pub(crate) patch: Option<Patched>,
}

/// What the blocks of a chunk that it does not store itself are: those of another chunk, or zeroes.
#[derive(Debug, Clone)]
pub(crate) struct Patched {
    /// A bit for each block that is stored, the lowest for the first.
    pub(crate) mask: u16,
    pub(crate) base: Option<Base>,
}

/// A chunk that others differ from. It is no patch itself, so that a read goes no further.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub(crate) id: Id,
    pub(crate) pack: Arc<Pack>,
    pub(crate) slot: Slot,
}

impl Found {
    /// Opens the packs that it is read from.
    pub(crate) fn open(&self) -> Result<()> {
        self.pack.file()?;
        if let Some(Patched { base: Some(base), .. }) = &self.patch {
            base.pack.file()?;
        }
        Ok(())
    }

    pub(crate) fn object<'o>(&'o self, id: &'o Id) -> Object<'o> {
        let own = Part { id, pack: &self.pack, slot: self.slot };
        Object { own, patch: self.patch.as_ref().map(Patched::part) }
    }
}

impl Patched {
    pub(crate) fn part(&self) -> (u16, Option<Part<'_>>) {
        let base = self.base.as_ref();
        (self.mask, base.map(|base| Part { id: &base.id, pack: &base.pack, slot: base.slot }))
    }
}

/// An object, with all that it takes to read it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object<'o> {
    pub(crate) own: Part<'o>,
    /// The blocks that are stored, and what the others are.
    pub(crate) patch: Option<(u16, Option<Part<'o>>)>,
}

/// What one slot holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'o> {
    pub(crate) id: &'o Id,
    pub(crate) pack: &'o Pack,
    pub(crate) slot: Slot,
}

impl Object<'_> {
    /// Reads all of it and checks that it is what its name says.
    pub(crate) fn read_checked(&self, key: Option<&EncryptionKey>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.own.slot.kind.len()];
        self.read_checked_into(key, &mut bytes)?;
        Ok(bytes)
    }

    /// The same without its key: of what is encrypted the bytes as they are stored, compared with their checksum, which
    /// finds any accident.
    pub(crate) fn read_keyless(&self) -> Result<Vec<u8>> {
        let Part { pack, slot, .. } = &self.own;
        if slot.encoding.encrypted() { pack.read_whole(slot) } else { self.read_checked(None) }
    }

    /// [`read_checked`](Self::read_checked) into a buffer of its length, which holds anything after an error.
    pub(crate) fn read_checked_into(&self, key: Option<&EncryptionKey>, bytes: &mut [u8]) -> Result<()> {
        let Part { id, pack, slot } = self.own;
        match self.patch {
            None => self.own.read(key, None, 0, bytes)?,
            Some(patch) => self.read_patched(patch, key, None, 0, bytes)?,
        }
        if codec::name(slot.kind, bytes, key) == *id {
            return Ok(());
        }
        if let Some((_, Some(base))) = self.patch {
            // Where the damage is in what it differs from, that is what has to be named.
            Object { own: base, patch: None }.read_checked(key)?;
        }
        Err(pack
            .damaged(slot.start, format_args!("does not hold the {} {}", slot.kind.name(), hex::encode(id))))
    }

    /// The same where it is enough that the bytes are those that were once stored: by their checksum, if it is given and
    /// they are stored as they are.
    pub(crate) fn read_sound_into(&self, key: Option<&EncryptionKey>, bytes: &mut [u8]) -> Result<()> {
        let Part { pack, slot, .. } = self.own;
        let Some(crc) = slot.crc.filter(|_| slot.encoding == Encoding::RAW) else {
            return self.read_checked_into(key, bytes);
        };
        pack.read(slot.start, 0, bytes)?;
        if crc32c::crc32c(bytes) == crc { Ok(()) } else { Err(pack.not_as_stored(&slot)) }
    }

    /// Reads a part of a chunk that needs no check any more.
    pub(crate) fn read(
        &self,
        key: Option<&EncryptionKey>,
        cache: &Cache,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        match self.patch {
            None => self.own.read(key, Some(cache), offset, buf),
            Some(patch) => self.read_patched(patch, key, Some(cache), offset, buf),
        }
    }

    fn read_patched(
        &self,
        (mask, base): (u16, Option<Part<'_>>),
        key: Option<&EncryptionKey>,
        cache: Option<&Cache>,
        mut offset: u64,
        mut buf: &mut [u8],
    ) -> Result<()> {
        while !buf.is_empty() {
            let block = (offset / BLOCK) as u32;
            let stored = mask >> block & 1 != 0;
            // As many blocks as are alike.
            let alike =
                if stored { (mask >> block).trailing_ones() } else { (mask >> block).trailing_zeros() };
            let end = u64::from(block + alike) * BLOCK;
            let (part, rest) = buf.split_at_mut(((end - offset) as usize).min(buf.len()));
            let len = part.len() as u64;
            match base {
                _ if stored => {
                    let before = (mask & ((1 << block) - 1)).count_ones();
                    self.own.read_units(key, u64::from(before), block, offset % BLOCK, part)?;
                }
                Some(base) => base.read(key, cache, offset, part)?,
                None => part.fill(0),
            }
            (buf, offset) = (rest, offset + len);
        }
        Ok(())
    }
}

impl Part<'_> {
    /// Where it is in the cache for who has this key. What is encrypted is there for nobody else.
    pub(crate) fn cache_key(&self, key: Option<&EncryptionKey>) -> Result<cache::Key> {
        let Slot { start, encoding, .. } = self.slot;
        let key = match (encoding.encrypted(), key) {
            (false, _) => None,
            (true, Some(key)) => Some(key.check()),
            (true, None) => return Err(self.pack.damaged(start, codec::NO_KEY)),
        };
        Ok((self.pack.number, start, key))
    }

    /// All of an object that is no patch.
    fn decode(&self, key: Option<&EncryptionKey>) -> Result<Vec<u8>> {
        let stored = self.pack.read_stored(&self.slot)?;
        codec::decode(&self.slot, self.id, stored, key).map_err(|why| self.pack.damaged(self.slot.start, why))
    }

    /// A part of an object that is no patch.
    fn read(
        &self,
        key: Option<&EncryptionKey>,
        cache: Option<&Cache>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        if !self.slot.encoding.compressed() {
            return self.read_units(key, offset / UNIT, (offset / UNIT) as u32, offset % UNIT, buf);
        }
        let range = offset as usize..offset as usize + buf.len();
        let cached = self.cache_key(key)?;
        if let Some(bytes) = cache.and_then(|cache| cache.get(&cached)) {
            buf.copy_from_slice(&bytes[range]);
            return Ok(());
        }
        let bytes = self.decode(key)?;
        buf.copy_from_slice(&bytes[range]);
        if let Some(cache) = cache {
            cache.insert(cached, &bytes.into());
        }
        Ok(())
    }

    /// Reads from `within` the unit `unit` of the slot and on, which were encrypted, if they are, as the blocks from
    /// `block` of the chunk.
    fn read_units(
        &self,
        key: Option<&EncryptionKey>,
        unit: u64,
        block: u32,
        within: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let start = self.slot.start;
        if !self.slot.encoding.encrypted() {
            return self.pack.read(start, unit * UNIT + within, buf);
        }
        let Some(key) = key else { return Err(self.pack.damaged(start, codec::NO_KEY)) };
        let tweak = codec::tweak(self.id).wrapping_add(u128::from(block));
        if within == 0 && buf.len() % UNIT as usize == 0 {
            self.pack.read(start, unit * UNIT, buf)?;
            key.chunks().decrypt(buf, tweak);
            return Ok(());
        }
        let within = within as usize;
        let mut units = vec![0; (within + buf.len()).next_multiple_of(UNIT as usize)];
        self.pack.read(start, unit * UNIT, &mut units)?;
        key.chunks().decrypt(&mut units, tweak);
        buf.copy_from_slice(&units[within..within + buf.len()]);
        Ok(())
    }
}

const _: () = assert!(CHUNK / BLOCK == 16 && BLOCK == UNIT && Kind::Chunk.len() as u64 == CHUNK);
