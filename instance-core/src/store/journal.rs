//! The journal in front of the database: what was committed last, as it was committed.
//!
//! A commit of the database writes a handful of pages all over its file. A commit of the journal is one append to a file
//! that has its length already, so that nothing but its bytes has to reach the disk. `docs/region-format.md` says what
//! stands where.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ami_core::{Digest, DigestWriter};

use crate::state_store::Change;
use crate::{Error, ErrorKind, Result};

/// What each entry begins with.
const MAGIC: [u8; 8] = *b"AMIjrnl1";
/// Magic, id, number, length.
const SAID: usize = 8 + 16 + 8 + 4;
/// The same, and the digest.
const HEADER: usize = SAID + Digest::LEN;
/// Entries begin at multiples of this.
pub(super) const ALIGN: usize = 64;
/// The length of a value that is none: the entry goes.
const REMOVED: u32 = u32::MAX;

/// How long a journal grows. What is in it is in memory too, and all of it goes to the database in one commit: the longer,
/// the fewer.
pub(super) const MAX: u64 = 4 << 20;

// The document says so.
const _: () = assert!(HEADER == 68);

/// One change as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Replayed {
    pub(super) table: String,
    pub(super) key: String,
    pub(super) value: Option<Vec<u8>>,
}

/// An open journal. Each append is one entry, durable before the next is written.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// Whose entries they are: those of another journal, of which the file may have some, are none.
    id: [u8; 16],
    /// The number and the place of the next entry.
    next: u64,
    end: u64,
    /// The length of the file: as long as it grows, for appends are to change no metadata, unless the disk was full.
    len: u64,
}

impl Journal {
    /// Opens the journal in `file`, of whose entries the database has those up to `applied`; made when it is not there,
    /// unless it `must` be. Gives the changes of the others, in order.
    ///
    /// What a crash cut off at its end was never acknowledged.
    pub(super) fn open(file: &Path, id: [u8; 16], applied: u64, must: bool) -> Result<(Self, Vec<Replayed>)> {
        let failed = |e| Error::io(e, format!("cannot open the journal {}", file.display()));
        if must && !file.try_exists().map_err(failed)? {
            let what = format!(
                "the journal {} is lost, and with it what was committed last; put back a copy of the region directory",
                file.display()
            );
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let open = open_or_make(file).map_err(failed)?;
        let mut bytes = Vec::new();
        (&open).take(MAX).read_to_end(&mut bytes).map_err(failed)?;
        let (next, end, changes) = replay(&bytes, &id, applied).map_err(|what| {
            let what =
                format!("the journal {} {what}; put back a copy of the region directory", file.display());
            Error::new(ErrorKind::Corrupt, what)
        })?;
        if end > 0 {
            // A process may have died between an append and its synchronisation. What is relied on from here on must not
            // go with the power.
            open.sync_data().map_err(failed)?;
        }
        let mut len = bytes.len() as u64;
        if len < MAX {
            match open.write_all_at(&vec![0; (MAX - len) as usize], len).and_then(|()| open.sync_all()) {
                Ok(()) => len = MAX,
                // Then it has room for less.
                Err(e) => {
                    tracing::warn!(error = crate::error::chain(&e), "the journal cannot have its length")
                }
            }
        }
        Ok((Self { file: open, id, next, end: end as u64, len }, changes))
    }

    /// Takes a number that no entry has, for a commit of the database's.
    pub(super) fn skip(&mut self) -> u64 {
        self.next += 1;
        self.last()
    }

    /// Gives the number back that was taken last.
    pub(super) fn unskip(&mut self) {
        self.next -= 1;
    }

    /// The number of the last entry that there may be.
    pub(super) fn last(&self) -> u64 {
        self.next - 1
    }

    /// Begins anew, for the database has all of it.
    pub(super) fn restart(&mut self) {
        self.end = 0;
    }

    /// Whether changes of so many bytes have no room.
    pub(super) fn is_full(&self, changes: &[&Change]) -> bool {
        let payload: usize = changes.iter().map(|change| length(change)).sum();
        self.end + aligned(HEADER + payload) as u64 > self.len
    }

    /// Appends the changes and makes them durable. After an error they may be durable or not, and the journal takes no more
    /// until the database has had all that was appended before, and it [begins anew](Self::restart).
    pub(super) fn append(&mut self, changes: &[&Change]) -> io::Result<()> {
        let entry = encode(&self.id, self.next, changes)?;
        // Its number is not given again, whatever comes of it.
        self.next += 1;
        self.file.write_all_at(&entry, self.end)?;
        self.file.sync_data()?;
        self.end += entry.len() as u64;
        Ok(())
    }
}

/// Opens the file, whose name is durable.
fn open_or_make(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    // Whoever made it may have died before it was.
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(file)
}

fn aligned(len: usize) -> usize {
    len.next_multiple_of(ALIGN)
}

/// How long a change is in an entry.
fn length(change: &Change) -> usize {
    12 + change.table.len() + change.key.len() + change.value.as_ref().map_or(0, Vec::len)
}

pub(super) fn encode(id: &[u8; 16], number: u64, changes: &[&Change]) -> io::Result<Vec<u8>> {
    // No journal is as long as that.
    let number_of = |len: usize| {
        u32::try_from(len).ok().filter(|n| *n != REMOVED).ok_or(io::Error::from(io::ErrorKind::InvalidInput))
    };
    let payload: usize = changes.iter().map(|change| length(change)).sum();
    let mut entry = Vec::with_capacity(aligned(HEADER + payload));
    entry.extend(MAGIC);
    entry.extend(id);
    entry.extend(number.to_le_bytes());
    entry.extend(number_of(payload)?.to_le_bytes());
    entry.extend([0; Digest::LEN]);
    for Change { table, key, value } in changes {
        let len = value.as_ref().map_or(Ok(REMOVED), |value| number_of(value.len()))?;
        for len in [number_of(table.len())?, number_of(key.len())?, len] {
            entry.extend(len.to_le_bytes());
        }
        entry.extend(table.as_bytes());
        entry.extend(key.as_bytes());
        entry.extend(value.iter().flatten());
    }
    let digest = digest(&entry);
    entry[SAID..HEADER].copy_from_slice(digest.as_bytes());
    entry.resize(aligned(entry.len()), 0);
    Ok(entry)
}

/// Covers all of an entry but itself.
fn digest(entry: &[u8]) -> Digest {
    let mut writer = DigestWriter::new();
    writer.update(&entry[..SAID]);
    writer.update(&entry[HEADER..]);
    writer.finish()
}

/// The number and the payload of the entry that `bytes` begin with, if it is whole and this journal's; and how long it is.
fn entry<'b>(bytes: &'b [u8], id: &[u8; 16]) -> Option<(u64, &'b [u8], usize)> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>()?;
    let (said, digest_of) = header.split_at(SAID);
    let (magic, said) = said.split_first_chunk::<8>()?;
    let (whose, said) = said.split_first_chunk::<16>()?;
    let (number, len) = said.split_first_chunk::<8>()?;
    if *magic != MAGIC || whose != id {
        return None;
    }
    let len = u32::from_le_bytes(len.try_into().ok()?) as usize;
    let payload = rest.get(..len)?;
    let whole = digest(&bytes[..HEADER + len]).as_bytes() == digest_of;
    whole.then(|| (u64::from_le_bytes(*number), payload, aligned(HEADER + len)))
}

/// The number and the place of the next entry of a journal, and the changes of those after `applied`; or what is wrong with
/// it.
pub(super) fn replay(
    bytes: &[u8],
    id: &[u8; 16],
    applied: u64,
) -> Result<(u64, usize, Vec<Replayed>), String> {
    if applied > u64::MAX / 2 {
        return Err(format!("is said to have had {applied} entries"));
    }
    let (mut last, mut changes, mut end) = (applied, Vec::new(), 0);
    let at = |place: usize| bytes.get(place..).and_then(|rest| entry(rest, id));
    // One that is not the next is of before the journal began anew.
    while let Some((_, payload, len)) = at(end).filter(|(number, ..)| *number == last + 1) {
        last += 1;
        parse(payload, &mut changes).ok_or_else(|| format!("has an entry {last} of nonsense"))?;
        end += len;
    }
    // One is written when the one before it is durable: a later one that does not follow is a sign of rot, or of a database
    // that is not this journal's, and never of a crash.
    let later =
        (end..bytes.len()).step_by(ALIGN).find_map(|place| at(place).filter(|(number, ..)| *number > last));
    match later {
        Some((number, ..)) => Err(format!("has entry {number} and not entry {}", last + 1)),
        None => Ok((last + 1, end, changes)),
    }
}

fn parse(mut payload: &[u8], into: &mut Vec<Replayed>) -> Option<()> {
    while !payload.is_empty() {
        let mut lens = [0; 3];
        for len in &mut lens {
            let (bytes, rest) = payload.split_first_chunk::<4>()?;
            (*len, payload) = (u32::from_le_bytes(*bytes), rest);
        }
        let mut take = |len: u32| {
            let (taken, rest) = payload.split_at_checked(len as usize)?;
            payload = rest;
            Some(taken)
        };
        let [table, key, value] = lens;
        let (table, key) = (take(table)?, take(key)?);
        let value = match value {
            REMOVED => None,
            len => Some(take(len)?.to_vec()),
        };
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        into.push(Replayed { table: text(table)?, key: text(key)?, value });
    }
    Some(())
}
