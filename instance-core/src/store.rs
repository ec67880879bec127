//! The state store: what a region knows, in one transactional file.
//!
//! A thin layer over `redb`: a kind of record is a table, a record is JSON under its id. A commit is
//! durable when it returns, and all of it or nothing of it is there after a crash.

#![expect(clippy::result_large_err, reason = "redb's errors are large; they become ours before they leave")]

use std::path::Path;

use redb::{Database, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

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
        // The format of redb 3 and 4, so that a later version reads what this one wrote.
        let opened = Database::builder().create_with_file_format_v3(true).create(file);
        opened
            .map(Self)
            .map_err(|e| database_error(e.into(), &format!("cannot open the state store {}", file.display())))
    }

    /// The record with this key.
    pub(crate) fn get<R: Record>(&self, key: &str) -> Result<Option<R>> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            match self.0.begin_read()?.open_table(table(R::TABLE)) {
                Ok(table) => Ok(table.get(key)?.map(|v| v.value().to_vec())),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
                Err(e) => Err(e.into()),
            }
        };
        read().map_err(failed_read)?.map(|bytes| parse::<R>(key, &bytes)).transpose()
    }

    /// Every record of a kind, in the order of their keys.
    pub(crate) fn all<R: Record>(&self) -> Result<Vec<R>> {
        let read = || -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            match self.0.begin_read()?.open_table(table(R::TABLE)) {
                Ok(table) => table
                    .iter()?
                    .map(|entry| entry.map(|(k, v)| (k.value().to_owned(), v.value().to_vec())))
                    .map(|entry| entry.map_err(redb::Error::from))
                    .collect(),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(Vec::new()),
                Err(e) => Err(e.into()),
            }
        };
        read().map_err(failed_read)?.iter().map(|(key, bytes)| parse::<R>(key, bytes)).collect()
    }

    /// Makes the changes that `change` collects, all or none. They are durable when this returns.
    pub(crate) fn commit(&self, change: impl FnOnce(&mut Changes) -> Result<()>) -> Result<()> {
        let mut changes = Changes(Vec::new());
        change(&mut changes)?;
        let write = || -> Result<(), redb::Error> {
            let transaction = self.0.begin_write()?;
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
        write().map_err(|e| database_error(e, "cannot commit to the state store"))
    }
}

/// Changes of one commit: records put, records removed.
pub(crate) struct Changes(Vec<(&'static str, String, Option<Vec<u8>>)>);

impl Changes {
    pub(crate) fn put<R: Record>(&mut self, record: &R) -> Result<()> {
        let bytes = serde_json::to_vec(record)
            .map_err(|e| Error::new(ErrorKind::Internal, "cannot serialise a record").caused_by(e))?;
        self.0.push((R::TABLE, record.key(), Some(bytes)));
        Ok(())
    }

    pub(crate) fn remove<R: Record>(&mut self, key: impl ToString) {
        self.0.push((R::TABLE, key.to_string(), None));
    }
}

fn parse<R: Record>(key: &str, bytes: &[u8]) -> Result<R> {
    serde_json::from_slice(bytes).map_err(|e| {
        let what = format!("the state store's record {key} in {} cannot be read", R::TABLE);
        Error::new(ErrorKind::Corrupt, what).caused_by(e)
    })
}

fn failed_read(e: redb::Error) -> Error {
    database_error(e, "cannot read the state store")
}

fn database_error(e: redb::Error, context: &str) -> Error {
    match e {
        redb::Error::Io(e) => Error::io(e, context),
        redb::Error::DatabaseAlreadyOpen => Error::new(ErrorKind::RegionInUse, context).caused_by(e),
        redb::Error::Corrupted(_) => Error::new(ErrorKind::Corrupt, context).caused_by(e),
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
