//! Packs: files of 64 KiB slots, each slot an object named by its digest, each pack with an index.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::format::{self, CHUNK, INDEX_HEADER, INDEX_RECORD, Id, Kind, PACK_HEADER, PACK_SLOTS};
use crate::fs::File;
use crate::{Error, ErrorKind, Result};

/// A pack with its final name. It is opened at its first read, and stays readable for whoever holds it
/// open even after the store has dropped it.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) number: u32,
    pub(crate) path: PathBuf,
    file: OnceLock<File>,
}

impl Pack {
    pub(crate) fn new(number: u32, path: PathBuf) -> Self {
        Self { number, path, file: OnceLock::new() }
    }

    pub(crate) fn with_file(number: u32, path: PathBuf, file: File) -> Self {
        Self { number, path, file: OnceLock::from(file) }
    }

    /// The open file.
    pub(crate) fn file(&self) -> Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let open = File::open_writable(&self.path);
        let file = open.map_err(|e| Error::io(e, format!("cannot open {}", self.path.display())))?;
        let mut header = vec![0; PACK_HEADER as usize];
        file.read_exact_at(&mut header, 0)
            .map_err(|e| Error::io(e, format!("cannot read the header of {}", self.path.display())))?;
        format::check_pack_header(&header, self.number).map_err(|why| Error::corrupt(&self.path, why))?;
        // Whoever loses this race has opened the same file.
        Ok(self.file.get_or_init(|| file))
    }

    /// Reads from `offset` within the slots that begin at `slot`.
    pub(crate) fn read(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        let at = slot_offset(slot) + offset;
        self.file()?.read_exact_at(buf, at).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::corrupt(&self.path, format_args!("it ends before the end of slot {slot}"))
            }
            _ => Error::io(e, format!("cannot read slot {slot} of {}", self.path.display())),
        })
    }
}

pub(crate) fn slot_offset(slot: u32) -> u64 {
    PACK_HEADER + u64::from(slot) * CHUNK
}

/// Where an object lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) pack: u32,
    pub(crate) slot: u32,
}

/// Every object of the store, in memory; it is what the packs' indices say together.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) places: HashMap<Id, Place>,
    pub(crate) packs: BTreeMap<u32, Arc<Pack>>,
    /// How many slots of a pack are taken, for those that have room and whose index is whole.
    pub(crate) open: BTreeMap<u32, u32>,
    pub(crate) next_number: u32,
}

impl Index {
    /// Where `id` lies, and in which pack.
    pub(crate) fn find(&self, id: &Id) -> Option<(Arc<Pack>, u32)> {
        let place = self.places.get(id)?;
        Some((Arc::clone(self.packs.get(&place.pack)?), place.slot))
    }

    /// The same, with the pack's file open, so that it stays readable whatever the sweep does next.
    pub(crate) fn find_open(&self, id: &Id) -> Result<Option<(Arc<Pack>, u32)>> {
        let found = self.find(id);
        if let Some((pack, _)) = &found {
            pack.file()?;
        }
        Ok(found)
    }

    /// Reads and checks the object `id`.
    pub(crate) fn read(&self, id: &Id, kind: Kind) -> Result<Vec<u8>> {
        let Some((pack, slot)) = self.find(id) else {
            let what = format!("no pack holds the {} {}", kind.name(), hex::encode(id));
            return Err(Error::new(ErrorKind::Corrupt, what));
        };
        read_checked(&pack, slot, id, kind)
    }

    /// Takes in the index of every pack in `dir`.
    pub(crate) fn load(dir: &Path, pack_slots: u32) -> Result<Self> {
        let mut index = Self::default();
        let mut packs = Vec::new();
        for entry in read_dir(dir)? {
            if let Some(number) = number_of(&entry, "pack") {
                packs.push(number);
            }
        }
        packs.sort_unstable();
        for number in packs {
            index.load_pack(dir, number, pack_slots)?;
        }
        index.next_number = index.packs.keys().next_back().map_or(0, |last| last + 1);
        Ok(index)
    }

    fn load_pack(&mut self, dir: &Path, number: u32, pack_slots: u32) -> Result<()> {
        let path = pack_path(dir, number);
        let index_path = index_path(dir, number);
        // Records that a process wrote and did not live to make durable are relied on from here on.
        let mut bytes = Vec::new();
        let read = File::open(&index_path).and_then(|mut file| {
            file.read_to_end(&mut bytes)?;
            file.sync_data()
        });
        match read {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::corrupt(&index_path, "it is missing, and its pack is not"));
            }
            Err(e) => return Err(Error::io(e, format!("cannot read {}", index_path.display()))),
        }
        format::check_index_header(&bytes, number).map_err(|why| Error::corrupt(&index_path, why))?;
        let len = std::fs::metadata(&path)
            .map_err(|e| Error::io(e, format!("cannot look at {}", path.display())))?
            .len();
        let records = bytes[INDEX_HEADER..].chunks_exact(INDEX_RECORD);
        let mut whole = records.remainder().is_empty();
        let mut count = 0;
        for record in records {
            // A record that is not whole was being written in a crash, or has rotted since. Either way its
            // slot is not used, and nothing is appended where it could be hidden.
            match format::parse_index_record(number, count, record) {
                Some((id, kind)) => {
                    if len < slot_offset(count) + kind.len() as u64 {
                        return Err(Error::corrupt(
                            &path,
                            format_args!("it ends before the end of slot {count}"),
                        ));
                    }
                    self.places.insert(id, Place { pack: number, slot: count });
                }
                None => whole = false,
            }
            count += 1;
        }
        self.packs.insert(number, Arc::new(Pack::new(number, path)));
        if count > PACK_SLOTS {
            return Err(Error::corrupt(&index_path, format_args!("it speaks of {count} slots")));
        }
        if whole && count < pack_slots {
            self.open.insert(number, count);
        }
        Ok(())
    }
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Chunk => "chunk",
            Self::Leaf => "manifest leaf",
        }
    }
}

/// Reads an object and checks that it is what its name says.
pub(crate) fn read_checked(pack: &Pack, slot: u32, id: &Id, kind: Kind) -> Result<Vec<u8>> {
    let mut bytes = vec![0; kind.len()];
    pack.read(slot, 0, &mut bytes)?;
    if ami_core::Digest::of(&bytes).as_bytes() != id {
        let why = format!("slot {slot} does not hold the {} {}", kind.name(), hex::encode(id));
        return Err(Error::corrupt(&pack.path, why));
    }
    Ok(bytes)
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
