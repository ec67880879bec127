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
use crate::Result;
use crate::error::chain;
use crate::state_store::{Change, Durability, StateStore};

/// How much is kept back that is to be durable with what comes next.
const MAX_PENDING: usize = 64 << 10;

/// What the database says of its journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct JournalRecord {
    /// Entries of another are none.
    #[serde(with = "uuid::serde::simple")]
    id: uuid::Uuid,
    /// The database has the entries up to this number.
    applied: u64,
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
    /// The journal takes nothing before the database has had all: the database does not know it yet, as that of a version
    /// without journals, which must not have anything in one; or an append failed, and nobody knows what became of it.
    shut: bool,
    /// What is in front of the database, and not in the journal: it is durable with the next append.
    pending: Vec<Change>,
}

impl JournaledStore {
    /// Opens the store in `database` with the journal in `journal`, both made when they are not there.
    pub(crate) fn open(database: &Path, journal: &Path) -> Result<Self> {
        let database = RedbStore::open(database)?;
        let (id, applied, shut) = match database.get(JournalRecord::TABLE, JournalRecord::KEY)? {
            Some(bytes) => {
                let known: JournalRecord = parse(JournalRecord::TABLE, JournalRecord::KEY, &bytes)?;
                (known.id, known.applied, false)
            }
            None => (uuid::Uuid::new_v4(), 0, true),
        };
        let (journal, replayed) = Journal::open(journal, id.into_bytes(), applied)?;
        let mut front = Front::default();
        replayed.iter().for_each(|change| front.put(&change.table, &change.key, &change.value));
        let writer = Writer { id, journal, shut, pending: Vec::new() };
        Ok(Self { database, front: RwLock::new(front), writer: Mutex::new(writer) })
    }

    // A panic under these locks leaves a front that has too much at worst, and that it has in the order of its commits.
    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits to the database all that it does not have yet, and `changes`. The journal begins anew.
    fn to_database(&self, writer: &mut Writer, changes: &[Change]) -> Result<()> {
        let mut said = Changes(Vec::new());
        said.put(&JournalRecord { id: writer.id, applied: writer.journal.last() })?;
        // Readers wait: what they would see otherwise were changes without those that came before.
        let mut front = self.front.write().unwrap_or_else(PoisonError::into_inner);
        let before = front.0.iter().flat_map(|(table, entries)| {
            entries.iter().map(|(key, value)| (&**table, &**key, value.as_deref()))
        });
        let after = changes.iter().chain(&said.0).map(|c| (c.table, &*c.key, c.value.as_deref()));
        self.database.commit(before.chain(after))?;
        front.0.clear();
        writer.journal.restart();
        writer.shut = false;
        writer.pending.clear();
        Ok(())
    }

    /// Makes the changes durable in the journal, if that takes them.
    fn to_journal(&self, writer: &mut Writer, changes: &[Change]) -> bool {
        let Writer { journal, shut, pending, .. } = writer;
        let all: Vec<&Change> = pending.iter().chain(changes).collect();
        if *shut || journal.is_full(&all) {
            return false;
        }
        match journal.append(&all) {
            Ok(()) => pending.clear(),
            Err(e) => {
                tracing::warn!(
                    error = chain(&e),
                    "the journal fails; all goes to the state store's database"
                );
                *shut = true;
            }
        }
        !*shut
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
        match self.to_journal(&mut writer, changes) {
            true => self.put_in_front(changes),
            false => self.to_database(&mut writer, changes)?,
        }
        Ok(())
    }
}

fn taken((key, value): (&String, &Option<Vec<u8>>)) -> Option<(String, Vec<u8>)> {
    Some((key.clone(), value.clone()?))
}

/// Who looks at the database alone of a store that was closed finds all that there is.
impl Drop for JournaledStore {
    fn drop(&mut self) {
        let empty = self.front.get_mut().unwrap_or_else(PoisonError::into_inner).0.is_empty();
        if !empty {
            if let Err(e) = self.to_database(&mut self.writer(), &[]) {
                tracing::warn!(error = chain(&e), "the journal is left to who opens the state store next");
            }
        }
    }
}
