//! A launch that a crash cuts off between its record and its volumes: the host loses what was not durable yet,
//! which no kill of a process shows.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::{TestRegion, disk, register};
use instance_core::state_store::{Change, Durability, MemoryStateStore, StateStore};
use instance_core::testing::FakeHypervisor;
use instance_core::{DescribeVolumes, InstanceState, LaunchSpec, RegionOptions, Result};

/// A store that can be copied as it is at a moment, as a crash finds it.
#[derive(Debug, Clone, Default)]
struct Shared(Arc<MemoryStateStore>);

impl StateStore for Shared {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        self.0.get(table, key)
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        self.0.scan(table)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        self.0.apply(changes, durability)
    }
}

impl Shared {
    fn copy(&self) -> Self {
        let copy = Self::default();
        for table in ["region", "images", "instances", "volumes"] {
            for (key, value) in self.scan(table).unwrap() {
                copy.apply(&[Change { table, key, value: Some(value) }], Durability::Immediate).unwrap();
            }
        }
        copy
    }
}

fn open(dir: &Path, store: Shared) -> TestRegion {
    RegionOptions::new().state_store(store).open(dir, FakeHypervisor::new()).unwrap()
}

/// What a crash leaves of a region: a copy, in which some of the files of one volume are missing.
fn crash(dir: &Path, store: &Shared, volume: &str, lost: &[&str]) -> (tempfile::TempDir, PathBuf, Shared) {
    let after = tempfile::tempdir().unwrap();
    let copy = after.path().join("region");
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).args([dir, &copy]).status().unwrap();
    assert!(copied.success());
    let files = fs::read_dir(copy.join("volumes").join(volume)).unwrap().map(|file| file.unwrap().path());
    let named = |path: &PathBuf, start: &&str| path.file_name().unwrap().to_str().unwrap().starts_with(start);
    for file in files.filter(|path| lost.iter().any(|start| named(path, start))) {
        fs::remove_file(file).unwrap();
    }
    (after, copy, store.copy())
}

#[test]
fn a_launch_that_lost_a_volume_is_undone_and_one_that_has_them_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Shared::default();
    let region = open(dir.path(), store.clone());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap());
    let launched = region.run_instances(&ami, spec().count(2, 2)).unwrap().instances;
    let volume = launched[0].describe().attachments[1].volume_id.to_string();

    // Both have all of their files.
    let (_after, copy, kept) = crash(dir.path(), &store, &volume, &[]);
    let found = open(&copy, kept).instances();
    assert!(found.len() == 2 && found.iter().all(|i| i.state() == InstanceState::Stopped), "{found:?}");

    // The files of one had not been made durable: both are gone, for they were launched as one.
    for lost in [&["log"][..], &["log", "overlay"]] {
        let (_after, copy, kept) = crash(dir.path(), &store, &volume, lost);
        let region = open(&copy, kept);
        assert!(region.instances().is_empty(), "{lost:?} of {volume}");
        assert!(region.describe_volumes(&DescribeVolumes::new()).unwrap().items.is_empty());
        assert_eq!(fs::read_dir(copy.join("volumes")).unwrap().count(), 0);
    }

    // Once something else was committed the launch is known to be whole: what is lost later is damage.
    launched[1].stop(Duration::ZERO).unwrap();
    let (_after, copy, kept) = crash(dir.path(), &store, &volume, &["log"]);
    let region = open(&copy, kept);
    assert_eq!(region.instances().len(), 2);
    assert!(region.instance(launched[0].id()).unwrap().start().is_err());
}
