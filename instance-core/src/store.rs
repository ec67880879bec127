//! The state store: what a region knows, in one transactional file.
//!
//! A thin layer over `redb`: a kind of record is a table, a record is JSON under its id, after the
//! SHA-256 of table, id and JSON. A commit is durable when it returns, and all of it or nothing of it is
//! there after a crash. redb does not look at its checksums again once a file was closed in order, so
//! the digest is what finds a record that has changed since.

#![expect(clippy::result_large_err, reason = "redb's errors are large; they become ours before they leave")]

use std::path::Path;

use ami_core::Digest;
use redb::{Durability, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::database::{self, Database};
use crate::{Error, ErrorKind, Result};

/// Something kept in the store.
pub(crate) trait Record: Serialize + DeserializeOwned {
    /// The table of its kind.
    const TABLE: &'static str;

    /// What it is found by.
    fn key(&self) -> String;
}

const fn table(name: &'static str) -> TableDefinition<'static, &'static str, &'static [u8]> {
    TableDefinition::new(name)
}

#[derive(Debug)]
pub(crate) struct Store(Database);

impl Store {
    /// Opens the store in `file`, made when it is not there.
    pub(crate) fn open(file: &Path) -> Result<Self> {
        Database::open(file)
            .map(Self)
            .map_err(|e| database_error(e, &format!("cannot open the state store {}", file.display())))
    }

    /// The record with this key.
    pub(crate) fn get<R: Record>(&self, key: &str) -> Result<Option<R>> {
        let read = |database: &redb::Database| -> database::Result<Option<Vec<u8>>> {
            match database.begin_read()?.open_table(table(R::TABLE)) {
                Ok(table) => Ok(table.get(key)?.map(|v| v.value().to_vec())),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
                Err(e) => Err(e.into()),
            }
        };
        let read = self.0.with(read).map_err(failed_read)?;
        read.map(|bytes| parse::<R>(key, &bytes)).transpose()
    }

    /// Every record of a kind, in the order of their keys.
    pub(crate) fn all<R: Record>(&self) -> Result<Vec<R>> {
        let read = |database: &redb::Database| -> database::Result<Vec<(String, Vec<u8>)>> {
            match database.begin_read()?.open_table(table(R::TABLE)) {
                Ok(table) => table
                    .iter()?
                    .map(|entry| entry.map(|(k, v)| (k.value().to_owned(), v.value().to_vec())))
                    .map(|entry| entry.map_err(redb::Error::from))
                    .collect(),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(Vec::new()),
                Err(e) => Err(e.into()),
            }
        };
        let read = self.0.with(read).map_err(failed_read)?;
        read.iter().map(|(key, bytes)| parse::<R>(key, bytes)).collect()
    }

    /// Makes the changes that `change` collects, all or none. They are durable when this returns.
    pub(crate) fn commit(&self, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        self.apply(Durability::Immediate, change)
    }

    /// The same without waiting for the disk: everyone sees the changes when this returns, and the next
    /// [`commit`](Self::commit) makes them durable. Until then a crash or a failure of the store's file
    /// may take them back, so whoever relies on them puts them into that commit again.
    pub(crate) fn stage(&self, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        self.apply(Durability::None, change)
    }

    fn apply(&self, durability: Durability, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        let mut changes = Changes(Vec::new());
        change(&mut changes)?;
        let write = |database: &redb::Database| -> database::Result<()> {
            let mut transaction = database.begin_write()?;
            transaction.set_durability(durability);
            for (table_name, key, value) in &changes.0 {
                let mut table = transaction.open_table(table(table_name))?;
                match value {
                    Some(bytes) => table.insert(key.as_str(), bytes.as_slice())?,
                    None => table.remove(key.as_str())?,
                };
            }
            transaction.commit()?;
            Ok(())
        };
        self.0.with(write).map_err(|e| database_error(e, "cannot commit to the state store"))
    }
}

/// Changes of one commit: records put, records removed.
pub(crate) struct Changes(Vec<(&'static str, String, Option<Vec<u8>>)>);

impl Changes {
    pub(crate) fn put<R: Record>(&mut self, record: &R) -> Result<()> {
        let json = serde_json::to_vec(record)
            .map_err(|e| Error::new(ErrorKind::Internal, "cannot serialise a record").caused_by(e))?;
        let key = record.key();
        let mut bytes = digest::<R>(&key, &json).as_bytes().to_vec();
        bytes.extend(json);
        self.0.push((R::TABLE, key, Some(bytes)));
        Ok(())
    }

    pub(crate) fn remove<R: Record>(&mut self, key: impl ToString) {
        self.0.push((R::TABLE, key.to_string(), None));
    }
}

fn parse<R: Record>(key: &str, bytes: &[u8]) -> Result<R> {
    let table = R::TABLE;
    let whole = bytes.split_first_chunk::<{ Digest::LEN }>();
    match whole.filter(|(said, json)| *said == digest::<R>(key, json).as_bytes()) {
        Some((_, json)) => serde_json::from_slice(json).map_err(|e| {
            let what = format!("the state store's record {key} in {table} cannot be read by this version");
            Error::new(ErrorKind::Corrupt, what).caused_by(e)
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
fn digest<R: Record>(key: &str, json: &[u8]) -> Digest {
    Digest::of(&[R::TABLE.as_bytes(), &[0], key.as_bytes(), &[0], json].concat())
}

fn failed_read(e: redb::Error) -> Error {
    database_error(e, "cannot read the state store")
}

fn database_error(e: redb::Error, context: &str) -> Error {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match e {
        redb::Error::Io(e) if matches!(e.kind(), InvalidData | UnexpectedEof) => {
            Error::new(ErrorKind::Corrupt, format!("{context}: it is no database; put back a copy of it"))
                .caused_by(e)
        }
        redb::Error::Io(e) => Error::io(e, context),
        redb::Error::DatabaseAlreadyOpen => Error::new(ErrorKind::RegionInUse, context).caused_by(e),
        redb::Error::Corrupted(_) => {
            Error::new(ErrorKind::Corrupt, format!("{context}: it is damaged; put back a copy of it"))
                .caused_by(e)
        }
        e => Error::new(ErrorKind::Internal, context).caused_by(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn what_was_committed_is_there_after_reopening_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("db");
        let store = Store::open(&file).unwrap();
        assert_eq!(store.all::<Fruit>().unwrap(), []);
        store.commit(|c| c.put(&fruit("fig", 1)).and(c.put(&fruit("apple", 2)))).unwrap();
        let refused = store.commit(|c| {
            c.put(&fruit("pear", 3))?;
            Err(Error::new(ErrorKind::Internal, "changed my mind"))
        });
        assert!(refused.is_err());
        drop(store);

        let store = Store::open(&file).unwrap();
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
    fn a_file_that_is_no_store_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("db");
        std::fs::write(&file, [7; 4096]).unwrap();
        let err = Store::open(&file).unwrap_err();
        assert!(err.to_string().contains("cannot open the state store"), "{err}");
    }
}
