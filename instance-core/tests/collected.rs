//! What nothing names is removed, at the latest when what kept it has gone.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/gate.rs"]
mod gate;

use std::fs;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use ami_core::AmiId;
use common::{disk, register, world};
use gate::{Gate, gate};
use instance_core::state_store::{Change, Durability, MemoryStateStore, StateStore};
use instance_core::testing::FakeHypervisor;
use instance_core::{ErrorKind, LaunchSpec, Region, RegionOptions, Result, VolumeSpec};

#[test]
fn what_could_not_be_collected_goes_when_the_next_thing_is_removed() {
    let (dir, region, ami) = world();
    let stored = fs::read_dir(dir.path().join("blocks/snapshots")).unwrap();
    let stored: Vec<_> = stored.map(|entry| entry.unwrap().path()).collect();
    let [content] = &stored[..] else { panic!("{stored:?}") };
    // In its place is what cannot be removed as it is.
    let aside = dir.path().join("aside");
    fs::rename(content, &aside).unwrap();
    fs::create_dir_all(content.join("in the way")).unwrap();
    let refused = region.deregister_image(ami.id()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Internal, "{refused}");
    assert!(region.images().unwrap().is_empty(), "the image has gone all the same");
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap();
    assert!(content.exists(), "it is still in the way, of nobody who makes something else");
    fs::remove_dir_all(content).unwrap();
    fs::rename(&aside, content).unwrap();
    let snapshot = region.create_snapshot(volume.id, "").unwrap();
    assert!(content.exists(), "who makes something does not look for it all the time");
    region.delete_snapshot(snapshot.id).unwrap();
    assert!(!content.exists(), "it is tried again");
}

type Meanwhile = Box<dyn FnOnce() + Send>;

/// A store that does something before it is next scanned.
#[derive(Clone, Default)]
struct Interrupted(Arc<MemoryStateStore>, Arc<Mutex<Option<Meanwhile>>>);

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Interrupted").field(&self.0).finish_non_exhaustive()
    }
}

impl StateStore for Interrupted {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        self.0.get(table, key)
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        // What `deregister_image` looks for first is whether there are instances.
        let meanwhile = self.1.lock().unwrap().take_if(|_| table != "instances");
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        self.0.scan(table)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        self.0.apply(changes, durability)
    }
}

/// Its image has gone by the time that it is looked for, and what it needs has not been looked for before.
#[test]
fn a_launch_that_begins_while_something_is_collected_loses_nothing() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Interrupted::default());
    let [wanted, other]: [_; 2] = {
        let region = RegionOptions::new().state_store(store.clone());
        let region = region.open(dir.path(), FakeHypervisor::new()).unwrap();
        [("wanted", 7), ("other", 8)].map(|(name, seed)| register(&region, name, &disk(1, seed)).unwrap())
    };
    let (hypervisor, (asked, answer)) = gate();
    let region = RegionOptions::new().state_store(store.clone()).open(dir.path(), hypervisor).unwrap();
    let content = |id: AmiId, region: &Region<Gate>| {
        let image = region.image(id).unwrap();
        let digest = image.ami().manifest().root_device().unwrap().content().unwrap().to_hex();
        dir.path().join("blocks/snapshots").join(digest)
    };
    let [needed, not_needed] = [wanted.id(), other.id()].map(|id| content(id, &region));
    let (launches, launched) = mpsc::channel();
    *store.1.lock().unwrap() = Some(Box::new({
        let (region, id) = (region.clone(), wanted.id());
        move || {
            let in_a_thread = region.clone();
            let spec = LaunchSpec::new("t2.nano".parse().unwrap());
            launches.send(thread::spawn(move || in_a_thread.launch(&wanted, spec).unwrap())).unwrap();
            asked.recv().unwrap();
            region.deregister_image(id).unwrap();
        }
    }));
    region.deregister_image(other.id()).unwrap();
    assert_eq!((needed.exists(), not_needed.exists()), (true, false));
    drop(answer);
    let server = launched.recv().unwrap().join().unwrap();
    server.create_image("child").unwrap();
}
