//! Crashes at a moment of one's choice: a region's directory and state store are copied as they are.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use instance_core::state_store::{Change, Durability, MemoryStateStore, StateStore};
use instance_core::testing::FakeHypervisor;
use instance_core::{RegionOptions, Result};

use super::common::TestRegion;

/// What a crash has left: the directory, in one that goes with it, and the state store.
pub(crate) type Left = (tempfile::TempDir, PathBuf, Shared);

/// A store that can be copied as it is at a moment, as a crash finds it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shared {
    state: Arc<MemoryStateStore>,
    crashes: Arc<Mutex<Option<Crashes>>>,
    /// All that there have been records in.
    tables: Arc<Mutex<BTreeSet<&'static str>>>,
}

/// What crashes before and after each commit leave of a region.
#[derive(Debug)]
struct Crashes {
    dir: PathBuf,
    left: Vec<Left>,
}

impl StateStore for Shared {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        self.state.get(table, key)
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        self.state.scan(table)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        let crash = || {
            if let Some(crashes) = &mut *self.crashes.lock().unwrap() {
                let left = crash(&crashes.dir, self, "", &[]);
                crashes.left.push(left);
            }
        };
        crash();
        self.tables.lock().unwrap().extend(changes.iter().map(|change| change.table));
        self.state.apply(changes, durability)?;
        crash();
        Ok(())
    }
}

impl Shared {
    /// Keeps from here on what a crash before and after each commit leaves of the region in `dir`.
    pub(crate) fn watch(&self, dir: &Path) {
        *self.crashes.lock().unwrap() = Some(Crashes { dir: dir.to_owned(), left: Vec::new() });
    }

    /// What has been kept, in order.
    pub(crate) fn crashes(&self) -> Vec<Left> {
        self.crashes.lock().unwrap().take().unwrap().left
    }

    pub(crate) fn copy(&self) -> Self {
        let copy = Self::default();
        for table in self.tables.lock().unwrap().iter().copied() {
            for (key, value) in self.scan(table).unwrap() {
                copy.apply(&[Change { table, key, value: Some(value) }], Durability::Immediate).unwrap();
            }
        }
        copy
    }
}

pub(crate) fn open(dir: &Path, store: Shared) -> TestRegion {
    RegionOptions::new().state_store(store).open(dir, FakeHypervisor::new()).unwrap()
}

/// What a crash leaves of a region: a copy, in which some of the files of one volume are missing.
pub(crate) fn crash(dir: &Path, store: &Shared, volume: &str, lost: &[&str]) -> Left {
    let after = tempfile::tempdir().unwrap();
    let copy = after.path().join("region");
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).args([dir, &copy]).status().unwrap();
    assert!(copied.success());
    let files: Vec<PathBuf> = match lost {
        [] => Vec::new(),
        _ => fs::read_dir(copy.join("volumes").join(volume)).unwrap().map(|f| f.unwrap().path()).collect(),
    };
    let named =
        |path: &&PathBuf, start: &&str| path.file_name().unwrap().to_str().unwrap().starts_with(start);
    for file in files.iter().filter(|path| lost.iter().any(|start| named(path, start))) {
        fs::remove_file(file).unwrap();
    }
    (after, copy, store.copy())
}
