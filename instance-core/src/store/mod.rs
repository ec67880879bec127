//! The records of a region, over a [`StateStore`].
//!
//! A kind of record is a table, a record is JSON under its id, after the SHA-256 of table, id and JSON: a
//! store does not always look at its checksums again, so the digest is what finds a record that has changed
//! since. What several threads commit at once goes to the store in one call: see [`group`].

mod database;
mod group;
mod journal;
#[cfg(test)]
mod journal_tests;
mod journaled_store;
mod known;
mod redb_store;

use ami_core::{Digest, DigestWriter};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::group::Group;
pub(crate) use self::journaled_store::JournaledStore;
pub(crate) use self::known::Known;
use crate::state_store::{Change, Durability, StateStore};
use crate::{Error, ErrorKind, Result};

/// How many bytes a record is expected to have.
const RECORD: usize = 1536;

/// Something kept in the store.
pub(crate) trait Record: Serialize + DeserializeOwned {
    /// The table of its kind.
    const TABLE: &'static str;

    /// What it is found by.
    fn key(&self) -> String;
}

#[derive(Debug)]
pub(crate) struct Store(Group);

impl Store {
    /// # Errors
    ///
    /// When the host has no thread to commit by.
    pub(crate) fn new(state: Box<dyn StateStore>) -> Result<Self> {
        Group::new(state).map(Self)
    }

    /// The record with this key.
    pub(crate) fn get<R: Record>(&self, key: &str) -> Result<Option<R>> {
        let read = self.0.state().get(R::TABLE, key)?;
        read.map(|bytes| parse(R::TABLE, key, &bytes)).transpose()
    }

    /// Every record of a kind, in the order of their keys.
    pub(crate) fn all<R: Record>(&self) -> Result<Vec<R>> {
        let read = self.0.state().scan(R::TABLE)?;
        read.iter().map(|(key, bytes)| parse(R::TABLE, key, bytes)).collect()
    }

    /// A record as JSON, whatever version wrote it.
    pub(crate) fn get_json(&self, table: &str, key: &str) -> Result<Option<Value>> {
        let read = self.0.state().get(table, key)?;
        read.map(|bytes| parse(table, key, &bytes)).transpose()
    }

    /// Every record of a table as JSON, with its key, whatever version wrote it.
    pub(crate) fn all_json(&self, table: &str) -> Result<Vec<(String, Value)>> {
        let read = self.0.state().scan(table)?;
        read.into_iter().map(|(key, bytes)| parse(table, &key, &bytes).map(|json| (key, json))).collect()
    }

    /// Makes the changes that `change` collects, all or none. They are durable when this returns.
    pub(crate) fn commit(&self, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        self.apply(Durability::Immediate, change)
    }

    /// The same without waiting for the disk: everyone sees the changes when this returns, and the next
    /// [`commit`](Self::commit) makes them durable. Until then a crash or a failure of the store's file
    /// may take them back.
    pub(crate) fn stage(&self, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        self.apply(Durability::Eventual, change)
    }

    /// Makes the changes with the next that anybody makes, in front of them, or when the region is closed.
    /// Readers do not see them until then; a crash may lose them.
    pub(crate) fn later(&self, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        let mut changes = Changes(Vec::new());
        change(&mut changes)?;
        self.0.later(changes.0);
        Ok(())
    }

    /// Makes the changes that were left for [`later`](Self::later). They are durable when this returns.
    pub(crate) fn commit_later(&self) -> Result<()> {
        match self.0.has_later() {
            true => self.0.apply(Vec::new(), Durability::Immediate),
            false => Ok(()),
        }
    }

    fn apply(&self, durability: Durability, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        let mut changes = Changes(Vec::new());
        change(&mut changes)?;
        if changes.0.is_empty() {
            return Ok(());
        }
        self.0.apply(changes.0, durability)
    }
}

/// Changes of one commit: records put, records removed.
pub(crate) struct Changes(Vec<Change>);

impl Changes {
    pub(crate) fn put<R: Record>(&mut self, record: &R) -> Result<()> {
        self.put_json(R::TABLE, record.key(), record)
    }

    pub(crate) fn put_json(&mut self, table: &'static str, key: String, json: &impl Serialize) -> Result<()> {
        // The digest's place, and then most records whole.
        let mut bytes = Vec::with_capacity(RECORD);
        bytes.resize(Digest::LEN, 0);
        serde_json::to_writer(&mut bytes, json)
            .map_err(|e| Error::new(ErrorKind::Internal, "cannot serialise a record").with_source(e))?;
        let digest = digest(table, &key, &bytes[Digest::LEN..]);
        bytes[..Digest::LEN].copy_from_slice(digest.as_bytes());
        self.0.push(Change { table, key, value: Some(bytes) });
        Ok(())
    }

    pub(crate) fn remove<R: Record>(&mut self, key: impl ToString) {
        self.0.push(Change { table: R::TABLE, key: key.to_string(), value: None });
    }
}

fn parse<T: DeserializeOwned>(table: &str, key: &str, bytes: &[u8]) -> Result<T> {
    let whole = bytes.split_first_chunk::<{ Digest::LEN }>();
    match whole.filter(|(said, json)| *said == digest(table, key, json).as_bytes()) {
        Some((_, json)) => serde_json::from_slice(json).map_err(|e| {
            let what = format!("the state store's record {key} in {table} cannot be read by this version");
            Error::new(ErrorKind::Corrupt, what).with_source(e)
        }),
        None => {
            let what = format!(
                "the state store's record {key} in {table} is damaged; put back a copy of the region directory"
            );
            Err(Error::new(ErrorKind::Corrupt, what))
        }
    }
}

/// Covers where the record stands, so that none is taken for another's.
fn digest(table: &str, key: &str, json: &[u8]) -> Digest {
    let mut writer = DigestWriter::new();
    [table.as_bytes(), &[0], key.as_bytes(), &[0], json].iter().for_each(|part| writer.update(part));
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_store::MemoryStateStore;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Fruit(String, u32);

    impl Record for Fruit {
        const TABLE: &'static str = "fruits";

        fn key(&self) -> String {
            self.0.clone()
        }
    }

    fn fruit(name: &str, count: u32) -> Fruit {
        Fruit(name.to_owned(), count)
    }

    #[test]
    fn what_was_committed_is_there_and_nothing_else() {
        let store = Store::new(Box::new(MemoryStateStore::new())).unwrap();
        assert_eq!(store.all::<Fruit>().unwrap(), []);
        store.commit(|c| c.put(&fruit("fig", 1)).and(c.put(&fruit("apple", 2)))).unwrap();
        let refused = store.commit(|c| {
            c.put(&fruit("pear", 3))?;
            Err(Error::new(ErrorKind::Internal, "changed my mind"))
        });
        assert!(refused.is_err());
        assert_eq!(store.all::<Fruit>().unwrap(), [fruit("apple", 2), fruit("fig", 1)]);
        store
            .commit(|c| {
                c.remove::<Fruit>("apple");
                Ok(())
            })
            .unwrap();
        assert_eq!(store.get::<Fruit>("apple").unwrap(), None);
        assert_eq!(store.get::<Fruit>("fig").unwrap(), Some(fruit("fig", 1)));
    }

    #[test]
    fn a_record_in_anothers_place_is_damage() {
        let state = MemoryStateStore::new();
        let mut changes = Changes(Vec::new());
        changes.put(&fruit("fig", 1)).unwrap();
        let moved = Change { key: "apple".to_owned(), ..changes.0.remove(0) };
        state.apply(&[moved], Durability::Immediate).unwrap();
        let store = Store::new(Box::new(state)).unwrap();
        assert_eq!(store.get::<Fruit>("apple").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
