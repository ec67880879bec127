//! Packs and their indices. Version 1 has slots of 64 KiB, one for each record; in version 2 a slot is as many
//! units of 4 KiB as what is stored takes, and the record says where it begins, how long it is, how it is encoded, and
//! which other chunk it leaves out what is equal of.

use super::{BLOCK, CHUNK, HOLE, Id, Wrong, check_crc, check_magic, put, u16_at, u32_at, u64_at};

/// Where the first slot of a pack begins.
pub(crate) const PACK_HEADER: u64 = 4096;
/// Slots in a full pack of version 1.
pub(crate) const PACK_SLOTS: u32 = 16384;
/// The unit of which slots are made.
pub(crate) const UNIT: u64 = 4 << 10;
/// Units in a slot of version 1.
pub(crate) const SLOT_UNITS: u32 = (CHUNK / UNIT) as u32;
/// Units in a full pack, of either version.
pub(crate) const PACK_UNITS: u32 = PACK_SLOTS * SLOT_UNITS;
/// Where the first record of a pack's index begins.
pub(crate) const INDEX_HEADER: usize = 64;
/// Bytes of a record of the index of a pack of version 1.
pub(crate) const INDEX_RECORD_1: usize = 40;
/// Bytes of a record of the index of a pack of version 2.
pub(crate) const INDEX_RECORD: usize = 84;

/// The version of packs that are written.
pub(crate) const PACK_VERSION: u32 = 2;

const PACK_MAGIC: &[u8; 8] = b"BLKPACK\0";
const INDEX_MAGIC: &[u8; 8] = b"BLKINDX\0";

// Files written with other numbers are out there for ever: none of these may change under these versions.
const _: () = {
    assert!(PACK_VERSION == 2);
    assert!(PACK_HEADER == 4096 && PACK_SLOTS == 16384 && UNIT == 4096);
    assert!(SLOT_UNITS == 16 && PACK_UNITS == 262_144);
    assert!(INDEX_HEADER == 64 && INDEX_RECORD_1 == 40 && INDEX_RECORD == 84);
    assert!(Kind::Chunk as u32 == 1 && Kind::Leaf as u32 == 2);
    assert!(Encoding::LZ4.0 == 1 && Encoding::ENCRYPTED.0 == 2 && Encoding::PATCH.0 == 4);
};

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Chunk = 1,
    Leaf = 2,
}

impl Kind {
    /// The number of bytes that the object's name is made from.
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::Chunk => CHUNK as usize,
            Self::Leaf => super::LEAF_BYTES,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Chunk => "chunk",
            Self::Leaf => "manifest leaf",
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Chunk),
            2 => Some(Self::Leaf),
            _ => None,
        }
    }
}

/// What has been done to an object's bytes before they were stored: some of them left out, or compressed; and then
/// encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Encoding(pub(crate) u8);

impl Encoding {
    pub(crate) const RAW: Self = Self(0);
    pub(crate) const LZ4: Self = Self(1);
    pub(crate) const ENCRYPTED: Self = Self(2);
    pub(crate) const PATCH: Self = Self(4);

    pub(crate) fn compressed(self) -> bool {
        self.0 & Self::LZ4.0 != 0
    }

    pub(crate) fn encrypted(self) -> bool {
        self.0 & Self::ENCRYPTED.0 != 0
    }

    pub(crate) fn patch(self) -> bool {
        self.0 & Self::PATCH.0 != 0
    }

    pub(crate) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What a chunk is stored as that differs little from another, or from zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patch {
    /// A bit for each block that is stored, the lowest for the first; at least one, and not all.
    pub(crate) mask: u16,
    /// The chunk that the others are of, which is no patch itself; [`HOLE`] where they are zero.
    pub(crate) base: Id,
}

/// How an object is stored, and where in its pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    /// The first unit.
    pub(crate) start: u32,
    /// Bytes before the zeroes that fill up the last unit.
    pub(crate) len: u32,
    /// The CRC of all units, as they are stored; version 1 has none.
    pub(crate) crc: Option<u32>,
    pub(crate) kind: Kind,
    pub(crate) encoding: Encoding,
}

impl Slot {
    /// Units that it takes.
    pub(crate) fn units(&self) -> u32 {
        units(self.len as usize)
    }

    /// One past the last unit.
    pub(crate) fn end(&self) -> u32 {
        self.start + self.units()
    }

    /// Whether an object can be stored so.
    fn is_sound(&self, id: &Id, patch: Option<&Patch>) -> bool {
        let full = self.kind.len() as u32;
        let Encoding(bits) = self.encoding;
        let known = bits & !(Encoding::LZ4.0 | Encoding::ENCRYPTED.0 | Encoding::PATCH.0) == 0;
        // A leaf is stored so that what is alive can be found without any key.
        let kind = self.kind == Kind::Chunk || bits & !Encoding::LZ4.0 == 0;
        let len = match patch {
            Some(Patch { mask: 0 | u16::MAX, .. }) => false,
            Some(Patch { mask, base }) => {
                !self.encoding.compressed() && self.len == mask.count_ones() * BLOCK as u32 && base != id
            }
            None if self.encoding.compressed() => 0 < self.len && self.len < full,
            None => self.len == full,
        };
        known && kind && len && self.start < PACK_UNITS && self.end() <= PACK_UNITS
    }
}

/// Units that `len` bytes take.
pub(crate) fn units(len: usize) -> u32 {
    len.div_ceil(UNIT as usize) as u32
}

/// Where a unit begins in its pack's file.
pub(crate) fn unit_offset(unit: u32) -> u64 {
    PACK_HEADER + u64::from(unit) * UNIT
}

fn header(magic: &[u8; 8], version: u32, number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    put(&mut bytes, 0, magic);
    put(&mut bytes, 8, &version.to_le_bytes());
    put(&mut bytes, 12, &granule(version).to_le_bytes());
    put(&mut bytes, 16, &u64::from(number).to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..24]);
    put(&mut bytes, 24, &crc.to_le_bytes());
    bytes
}

/// What slots are counted in.
fn granule(version: u32) -> u32 {
    if version == 1 { CHUNK as u32 } else { UNIT as u32 }
}

fn check(bytes: &[u8], magic: &[u8; 8], number: u32, len: usize) -> Result<u32, Wrong> {
    let version = check_magic(bytes, len, magic, PACK_VERSION)?;
    check_crc(bytes, 24)?;
    if u32_at(bytes, 12) != granule(version) {
        return Err(format!("its slots are counted in {} bytes", u32_at(bytes, 12)));
    }
    if u64_at(bytes, 16) != u64::from(number) {
        return Err(format!("it says that it is pack {}", u64_at(bytes, 16)));
    }
    Ok(version)
}

pub(crate) fn pack_header(version: u32, number: u32) -> Vec<u8> {
    header(PACK_MAGIC, version, number, PACK_HEADER as usize)
}

/// The version that the header of pack `number` names.
pub(crate) fn check_pack_header(bytes: &[u8], number: u32) -> Result<u32, Wrong> {
    check(bytes, PACK_MAGIC, number, PACK_HEADER as usize)
}

pub(crate) fn index_header(version: u32, number: u32) -> Vec<u8> {
    header(INDEX_MAGIC, version, number, INDEX_HEADER)
}

/// The version that the header of the index of pack `number` names.
pub(crate) fn check_index_header(bytes: &[u8], number: u32) -> Result<u32, Wrong> {
    check(bytes, INDEX_MAGIC, number, INDEX_HEADER)
}

/// Bytes of a record of an index.
pub(crate) fn record_len(version: u32) -> usize {
    if version == 1 { INDEX_RECORD_1 } else { INDEX_RECORD }
}

/// The length of an index that no pack's can be longer than.
pub(crate) fn index_max(version: u32) -> usize {
    let records = if version == 1 { PACK_SLOTS } else { PACK_UNITS };
    INDEX_HEADER + records as usize * record_len(version)
}

/// Record `place` of an index. Its checksum covers where it stands too, so that no record is ever taken
/// for another's.
pub(crate) fn index_record(
    number: u32,
    place: u32,
    id: &Id,
    slot: &Slot,
    patch: Option<&Patch>,
) -> [u8; INDEX_RECORD] {
    let mut bytes = [0; INDEX_RECORD];
    put(&mut bytes, 0, id);
    put(&mut bytes, 32, &slot.start.to_le_bytes());
    put(&mut bytes, 36, &slot.len.to_le_bytes());
    put(&mut bytes, 40, &slot.crc.unwrap_or_default().to_le_bytes());
    bytes[44] = slot.kind as u8;
    bytes[45] = slot.encoding.0;
    if let Some(patch) = patch {
        put(&mut bytes, 46, &patch.mask.to_le_bytes());
        put(&mut bytes, 48, &patch.base);
    }
    let crc = record_crc(number, place, &bytes[..80]);
    put(&mut bytes, 80, &crc.to_le_bytes());
    bytes
}

/// What a record of an index of `version` says, if it is whole and can be true.
pub(crate) fn parse_index_record(version: u32, number: u32, place: u32, bytes: &[u8]) -> Option<Record> {
    let len = record_len(version);
    if bytes.len() != len || u32_at(bytes, len - 4) != record_crc(number, place, &bytes[..len - 4]) {
        return None;
    }
    let id: Id = bytes.get(..32)?.try_into().ok()?;
    let (slot, patch) = if version == 1 {
        let kind = Kind::from_number(u8::try_from(u32_at(bytes, 32)).ok()?)?;
        let start = place.checked_mul(SLOT_UNITS)?;
        (Slot { start, len: kind.len() as u32, crc: None, kind, encoding: Encoding::RAW }, None)
    } else {
        let encoding = Encoding(bytes[45]);
        let patch = Patch { mask: u16_at(bytes, 46), base: bytes.get(48..80)?.try_into().ok()? };
        if !encoding.patch() && (patch.mask != 0 || patch.base != HOLE) {
            return None;
        }
        let slot = Slot {
            start: u32_at(bytes, 32),
            len: u32_at(bytes, 36),
            crc: Some(u32_at(bytes, 40)),
            kind: Kind::from_number(bytes[44])?,
            encoding,
        };
        (slot, encoding.patch().then_some(patch))
    };
    slot.is_sound(&id, patch.as_ref()).then_some((id, slot, patch))
}

/// What a record says: the object's name, where and how it is stored.
pub(crate) type Record = (Id, Slot, Option<Patch>);

fn record_crc(number: u32, place: u32, bytes: &[u8]) -> u32 {
    let place = (u64::from(number) << 32 | u64::from(place)).to_le_bytes();
    crc32c::crc32c_append(crc32c::crc32c(&place), bytes)
}

/// A record of version 1, which nobody writes any more.
#[cfg(any(test, fuzzing))]
pub(crate) fn index_record_1(number: u32, place: u32, id: &Id, kind: Kind) -> [u8; INDEX_RECORD_1] {
    let mut bytes = [0; INDEX_RECORD_1];
    put(&mut bytes, 0, id);
    put(&mut bytes, 32, &(kind as u32).to_le_bytes());
    let crc = record_crc(number, place, &bytes[..36]);
    put(&mut bytes, 36, &crc.to_le_bytes());
    bytes
}
