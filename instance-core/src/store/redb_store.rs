//! The database of the state store that a region has in its directory: one transactional file of `redb`'s.

#![expect(clippy::result_large_err, reason = "redb's errors are large; they become ours before they leave")]

use std::path::Path;

use redb::{ReadableTable, TableDefinition};

use super::database::{self, Database};
use crate::{Error, ErrorKind, Result};

const fn table(name: &str) -> TableDefinition<'_, &'static str, &'static [u8]> {
    TableDefinition::new(name)
}

/// Entries by table and key, in a file.
#[derive(Debug)]
pub(super) struct RedbStore {
    database: Database,
    #[cfg(test)]
    pub(super) fault: std::sync::Mutex<Option<Fault>>,
}

/// When the next commit fails.
#[cfg(test)]
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    Before,
    After,
}

impl RedbStore {
    /// Opens the database in `file`, made when it is not there.
    pub(super) fn open(file: &Path) -> Result<Self> {
        Database::open(file)
            .map(|database| Self {
                database,
                #[cfg(test)]
                fault: Default::default(),
            })
            .map_err(|e| database_error(e, &format!("cannot open the state store {}", file.display())))
    }

    /// What the entry holds, if there is one.
    pub(super) fn get(&self, name: &str, key: &str) -> Result<Option<Vec<u8>>> {
        let read = |database: &redb::Database| -> database::Result<Option<Vec<u8>>> {
            match database.begin_read()?.open_table(table(name)) {
                Ok(table) => Ok(table.get(key)?.map(|v| v.value().to_vec())),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
                Err(e) => Err(e.into()),
            }
        };
        self.database.with(read).map_err(failed_read)
    }

    /// Every entry of a table, in the order of their keys' bytes.
    pub(super) fn scan(&self, name: &str) -> Result<Vec<(String, Vec<u8>)>> {
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
        self.database.with(read).map_err(failed_read)
    }

    /// Makes the changes, all or none, later ones over earlier ones. They are durable when this returns.
    pub(super) fn commit<'c>(
        &self,
        changes: impl Iterator<Item = (&'c str, &'c str, Option<&'c [u8]>)> + Clone,
    ) -> Result<()> {
        let write = |database: &redb::Database| -> database::Result<()> {
            let transaction = database.begin_write()?;
            let mut changes = changes.clone().peekable();
            while let Some((name, key, value)) = changes.next() {
                let mut table = transaction.open_table(table(name))?;
                put(&mut table, key, value)?;
                // To open a table is more work than to put an entry into it.
                while let Some((_, key, value)) = changes.next_if(|(next, ..)| *next == name) {
                    put(&mut table, key, value)?;
                }
            }
            transaction.commit()?;
            Ok(())
        };
        #[cfg(test)]
        let fault = self.fault.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        #[cfg(test)]
        if matches!(fault, Some(Fault::Before)) {
            return Err(Error::new(ErrorKind::Internal, "it fails before"));
        }
        let committed =
            self.database.with(write).map_err(|e| database_error(e, "cannot commit to the state store"));
        #[cfg(test)]
        if fault.is_some() {
            return Err(Error::new(ErrorKind::Internal, "it fails after"));
        }
        committed
    }
}

fn put(
    table: &mut redb::Table<'_, &'static str, &'static [u8]>,
    key: &str,
    value: Option<&[u8]>,
) -> database::Result<()> {
    match value {
        Some(bytes) => table.insert(key, bytes)?,
        None => table.remove(key)?,
    };
    Ok(())
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
    fn a_file_that_is_no_store_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("db");
        std::fs::write(&file, [7; 4096]).unwrap();
        let err = RedbStore::open(&file).unwrap_err();
        assert!(err.to_string().contains("cannot open the state store"), "{err}");
    }
}
