//! The state store that a region has in its directory: one transactional file of `redb`'s.

#![expect(clippy::result_large_err, reason = "redb's errors are large; they become ours before they leave")]

use std::path::Path;

use redb::{ReadableTable, TableDefinition};

use super::database::{self, Database};
use crate::state_store::{Change, Durability, StateStore};
use crate::{Error, ErrorKind, Result};

const fn table(name: &str) -> TableDefinition<'_, &'static str, &'static [u8]> {
    TableDefinition::new(name)
}

/// A store in a file.
#[derive(Debug)]
pub(crate) struct RedbStore(Database);

impl RedbStore {
    /// Opens the store in `file`, made when it is not there.
    pub(crate) fn open(file: &Path) -> Result<Self> {
        Database::open(file)
            .map(Self)
            .map_err(|e| database_error(e, &format!("cannot open the state store {}", file.display())))
    }
}

impl StateStore for RedbStore {
    fn get(&self, name: &str, key: &str) -> Result<Option<Vec<u8>>> {
        let read = |database: &redb::Database| -> database::Result<Option<Vec<u8>>> {
            match database.begin_read()?.open_table(table(name)) {
                Ok(table) => Ok(table.get(key)?.map(|v| v.value().to_vec())),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
                Err(e) => Err(e.into()),
            }
        };
        self.0.with(read).map_err(failed_read)
    }

    fn scan(&self, name: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let read = |database: &redb::Database| -> database::Result<Vec<(String, Vec<u8>)>> {
            match database.begin_read()?.open_table(table(name)) {
                Ok(table) => table
                    .iter()?
                    .map(|entry| entry.map(|(k, v)| (k.value().to_owned(), v.value().to_vec())))
                    .map(|entry| entry.map_err(redb::Error::from))
                    .collect(),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(Vec::new()),
                Err(e) => Err(e.into()),
            }
        };
        self.0.with(read).map_err(failed_read)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        let write = |database: &redb::Database| -> database::Result<()> {
            let mut transaction = database.begin_write()?;
            transaction.set_durability(match durability {
                Durability::Immediate => redb::Durability::Immediate,
                Durability::Eventual => redb::Durability::None,
            });
            for Change { table: name, key, value } in changes {
                let mut table = transaction.open_table(table(name))?;
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

fn failed_read(e: redb::Error) -> Error {
    database_error(e, "cannot read the state store")
}

fn database_error(e: redb::Error, context: &str) -> Error {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match e {
        redb::Error::Io(e) if matches!(e.kind(), InvalidData | UnexpectedEof) => {
            Error::new(ErrorKind::Corrupt, format!("{context}: it is no database; put back a copy of it"))
                .with_source(e)
        }
        redb::Error::Io(e) => Error::io(e, context),
        redb::Error::DatabaseAlreadyOpen => Error::new(ErrorKind::RegionInUse, context).with_source(e),
        redb::Error::Corrupted(_) => {
            Error::new(ErrorKind::Corrupt, format!("{context}: it is damaged; put back a copy of it"))
                .with_source(e)
        }
        e => Error::new(ErrorKind::Internal, context).with_source(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        let mut number = 0;
        crate::testing::state_store_conformance(|| {
            number += 1;
            RedbStore::open(&dir.path().join(number.to_string())).unwrap()
        });
    }

    #[test]
    fn what_was_applied_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("db");
        let put = |key: &str, durability| {
            let change = Change { table: "t", key: key.to_owned(), value: Some(b"v".to_vec()) };
            RedbStore::open(&file).unwrap().apply(&[change], durability).unwrap();
        };
        put("immediate", Durability::Immediate);
        assert_eq!(RedbStore::open(&file).unwrap().scan("t").unwrap().len(), 1);
    }

    #[test]
    fn a_file_that_is_no_store_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("db");
        std::fs::write(&file, [7; 4096]).unwrap();
        let err = RedbStore::open(&file).unwrap_err();
        assert!(err.to_string().contains("cannot open the state store"), "{err}");
    }
}
