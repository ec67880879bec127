//! The state store that a region has in its directory: a [database](RedbStore) and, in front of it, a [`Journal`].
//!
//! What is in the journal is in memory too, in front of what the database says, and goes there in one commit when the journal
//! is full and when the store is closed. Whatever the journal does not take goes to the database at once, with all that the
//! journal has: a journal that fails, or has no room on a full disk, costs time alone.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::journal::Journal;
use super::redb_store::RedbStore;
use super::{Changes, Record, parse};
use crate::error::chain;
use crate::state_store::{Change, Durability, StateStore};
use crate::{ErrorKind, Result};

/// How much is kept back that is to be durable with what comes next.
const MAX_PENDING: usize = 64 << 10;

/// What the database says of its journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct JournalRecord {
    /// Entries of another are none.
    #[serde(with = "uuid::serde::simple")]
    id: uuid::Uuid,
    /// The database has the entries up to this number, which is that of the commit which says so.
    applied: u64,
    /// It was made when the store was closed: the journal may be missing.
    closed: bool,
}

impl JournalRecord {
    const KEY: &'static str = "journal";
}

impl Record for JournalRecord {
    const TABLE: &'static str = "journal";

    fn key(&self) -> String {
        Self::KEY.to_owned()
    }
}

/// A store in two files.
#[derive(Debug)]
pub(crate) struct JournaledStore {
    database: RedbStore,
    /// What the database does not have yet. Taken after `writer`, where both are held.
    front: RwLock<Front>,
    writer: Mutex<Writer>,
}

/// Table by table and key by key, with nothing for an entry that goes.
#[derive(Debug, Default)]
struct Front(HashMap<String, BTreeMap<String, Option<Vec<u8>>>>);

#[derive(Debug)]
struct Writer {
    id: uuid::Uuid,
    journal: Journal,
    takes: Takes,
    /// The database says that the journal may be missing.
    closed: bool,
    /// What is in front of the database, and not in the journal: it is durable with the next append.
    pending: Vec<Change>,
}

/// What the journal takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    All,
    /// What the database has no room for. So it is at first, for the database has to know that there is more than itself,
    /// and what was replayed may not be on the disk where another process failed to write it.
    AtNeed,
    /// Nothing before the database has had all, since an append or a commit failed of which nobody knows what became.
    Nothing,
}

impl JournaledStore {
    /// Opens the store in `database` with the journal in `journal`, both made when they are not there.
    pub(crate) fn open(database: &Path, journal: &Path) -> Result<Self> {
        let database = RedbStore::open(database)?;
        let new = || JournalRecord { id: uuid::Uuid::new_v4(), applied: 0, closed: true };
        let JournalRecord { id, applied, closed } = known(&database)?.unwrap_or_else(new);
        let (journal, replayed) = Journal::open(journal, id.into_bytes(), applied, !closed)?;
        let mut front = Front::default();
        replayed.iter().for_each(|change| front.put(&change.table, &change.key, &change.value));
        let writer = Writer { id, journal, takes: Takes::AtNeed, closed, pending: Vec::new() };
        Ok(Self { database, front: RwLock::new(front), writer: Mutex::new(writer) })
    }

    #[cfg(test)]
    pub(super) fn database(&self) -> &RedbStore {
        &self.database
    }

    // A panic under these locks leaves a front that has too much at worst, and that it has in the order of its commits.
    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits to the database all that it does not have yet, and `changes`. The journal begins anew.
    ///
    /// After an error, too, the front is what the database does not have: which of both it is, its record tells.
    fn to_database(&self, writer: &mut Writer, changes: &[Change], closed: bool) -> Result<()> {
        let applied = writer.journal.skip();
        let mut said = Changes(Vec::new());
        said.put(&JournalRecord { id: writer.id, applied, closed })?;
        // Readers wait: what they would see otherwise were changes without those that came before.
        let mut front = self.front.write().unwrap_or_else(PoisonError::into_inner);
        let before = front.0.iter().flat_map(|(table, entries)| {
            entries.iter().map(|(key, value)| (&**table, &**key, value.as_deref()))
        });
        let after = changes.iter().chain(&said.0).map(|c| (c.table, &*c.key, c.value.as_deref()));
        let committed = self.database.commit(before.chain(after));
        let has_it = committed.is_ok()
            || match known(&self.database) {
                Ok(known) => known.is_some_and(|known| known.applied == applied),
                // Nobody knows, and the journal takes nothing before somebody does.
                Err(_) => {
                    writer.takes = Takes::Nothing;
                    return committed;
                }
            };
        if has_it {
            front.0.clear();
            writer.journal.restart();
            writer.pending.clear();
            // Nothing may rely on what the disk perhaps has not.
            writer.takes = if committed.is_ok() { Takes::All } else { Takes::Nothing };
            writer.closed = closed;
        } else {
            writer.journal.unskip();
        }
        committed
    }

    /// Makes the changes durable in the journal, if that takes them.
    fn to_journal(&self, writer: &mut Writer, changes: &[Change]) -> bool {
        let Writer { journal, takes, pending, .. } = writer;
        let all: Vec<&Change> = pending.iter().chain(changes).collect();
        if *takes == Takes::Nothing || journal.is_full(&all) {
            return false;
        }
        match journal.append(&all) {
            Ok(()) => pending.clear(),
            Err(e) => {
                tracing::warn!(
                    error = chain(&e),
                    "the journal fails; all goes to the state store's database"
                );
                *takes = Takes::Nothing;
                return false;
            }
        }
        true
    }

    fn put_in_front(&self, changes: &[Change]) {
        let mut front = self.front.write().unwrap_or_else(PoisonError::into_inner);
        changes.iter().for_each(|change| front.put(change.table, &change.key, &change.value));
    }
}

impl Front {
    fn put(&mut self, table: &str, key: &str, value: &Option<Vec<u8>>) {
        if !self.0.contains_key(table) {
            self.0.insert(table.to_owned(), BTreeMap::new());
        }
        if let Some(entries) = self.0.get_mut(table) {
            entries.insert(key.to_owned(), value.clone());
        }
    }
}

impl StateStore for JournaledStore {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        let front = self.front.read().unwrap_or_else(PoisonError::into_inner);
        match front.0.get(table).and_then(|entries| entries.get(key)) {
            Some(value) => Ok(value.clone()),
            // Under the lock: it may be on its way from the front to the database.
            None => self.database.get(table, key),
        }
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let front = self.front.read().unwrap_or_else(PoisonError::into_inner);
        let behind = self.database.scan(table)?;
        let Some(entries) = front.0.get(table) else { return Ok(behind) };
        let mut found = Vec::with_capacity(behind.len() + entries.len());
        let (mut behind, mut entries) = (behind.into_iter().peekable(), entries.iter().peekable());
        loop {
            // Of two with one key, that in front.
            let next = match (behind.peek(), entries.peek()) {
                (Some((key, _)), Some((front, _))) if key < *front => behind.next(),
                (Some((key, _)), Some((front, _))) => {
                    if key == *front {
                        behind.next();
                    }
                    entries.next().and_then(taken)
                }
                (Some(_), None) => behind.next(),
                (None, Some(_)) => entries.next().and_then(taken),
                (None, None) => break,
            };
            found.extend(next);
        }
        Ok(found)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        let mut writer = self.writer();
        let pending = writer.pending.iter().chain(changes);
        let pending: usize =
            pending.map(|change| change.key.len() + change.value.as_ref().map_or(0, Vec::len)).sum();
        if durability == Durability::Eventual && pending <= MAX_PENDING {
            writer.pending.extend_from_slice(changes);
            self.put_in_front(changes);
            return Ok(());
        }
        let mut in_journal = writer.takes == Takes::All && self.to_journal(&mut writer, changes);
        if !in_journal {
            let committed = self.to_database(&mut writer, changes, false);
            let no_room = matches!(&committed, Err(e) if e.kind() == ErrorKind::InsufficientVolumeCapacity);
            in_journal = no_room && writer.takes == Takes::AtNeed && self.to_journal(&mut writer, changes);
            if !in_journal {
                return committed;
            }
        }
        self.put_in_front(changes);
        Ok(())
    }
}

/// What the database says of its journal.
fn known(database: &RedbStore) -> Result<Option<JournalRecord>> {
    let bytes = database.get(JournalRecord::TABLE, JournalRecord::KEY)?;
    bytes.map(|bytes| parse(JournalRecord::TABLE, JournalRecord::KEY, &bytes)).transpose()
}

fn taken((key, value): (&String, &Option<Vec<u8>>)) -> Option<(String, Vec<u8>)> {
    Some((key.clone(), value.clone()?))
}

/// Who looks at the database alone of a store that was closed finds all that there is.
impl Drop for JournaledStore {
    fn drop(&mut self) {
        let empty = self.front.get_mut().unwrap_or_else(PoisonError::into_inner).0.is_empty();
        let mut writer = self.writer();
        if !empty || !writer.closed {
            if let Err(e) = self.to_database(&mut writer, &[], true) {
                tracing::warn!(error = chain(&e), "the journal is left to who opens the state store next");
            }
        }
    }
}
