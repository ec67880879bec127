//! A launch that a crash follows before its volumes are durable: the host loses what was not yet, which no kill of a
//! process shows.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use ami_core::BlockDeviceMapping;
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
fn volumes_that_a_crash_took_after_their_launch_are_made_again_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let store = Shared::default();
    let region = open(dir.path(), store.clone());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap());
    let launched = region.run_instances(&ami, spec().count(2, 2)).unwrap().instances;
    let root = launched[0].describe().attachments[0].volume_id.to_string();

    for lost in [&[][..], &["log"], &["log", "overlay"]] {
        let (_after, copy, kept) = crash(dir.path(), &store, &root, lost);
        let region = open(&copy, kept);
        let found = region.instances();
        assert!(found.len() == 2 && found.iter().all(|i| i.state() == InstanceState::Stopped), "{found:?}");
        let instance = region.instance(launched[0].id()).unwrap();
        instance.start().unwrap();
        instance.stop(Duration::ZERO).unwrap();
        // They begin with what the image holds.
        let made = instance.create_image("again").unwrap();
        assert_eq!((made.changed_bytes, made.stored_bytes), (0, 0), "{lost:?} of {root}");
    }

    // What was flushed to them makes them durable: what is lost later is damage.
    launched[0].stop(Duration::ZERO).unwrap();
    let (_after, copy, kept) = crash(dir.path(), &store, &root, &["log"]);
    let region = open(&copy, kept);
    assert_eq!(region.instances().len(), 2);
    assert!(region.instance(launched[0].id()).unwrap().start().is_err());
    region.instance(launched[1].id()).unwrap().start().unwrap();
}

/// A volume that goes on without its instance is there, also if the crash took it while the instance ended.
#[test]
fn a_volume_that_is_kept_is_kept_however_soon_the_instance_ends() {
    let dir = tempfile::tempdir().unwrap();
    let store = Shared::default();
    let region = open(dir.path(), store.clone());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let kept = BlockDeviceMapping::blank("/dev/sdk", 1).delete_on_termination(false);
    let spec = LaunchSpec::new("t2.nano".parse().unwrap()).block_device(kept);
    let instance = region.launch(&ami, spec).unwrap();
    let attachments = instance.describe().attachments;
    let volume = attachments.iter().find(|a| a.device_name == "/dev/sdk").unwrap().volume_id;
    instance.terminate().unwrap();
    let (_after, copy, kept) = crash(dir.path(), &store, &volume.to_string(), &[]);
    let region = open(&copy, kept);
    let found = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    assert!(found.iter().any(|v| v.id == volume), "{found:?}");
    region.delete_volume(volume).unwrap();
}
