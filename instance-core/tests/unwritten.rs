//! Volumes that a launch has made and no guest has written to: there is nothing of them but their records.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ami_core::{Ami, BlockDeviceMapping, X86_64};
use common::{TestRegion, ask, disk, files, open};
use instance_core::state_store::{Change, Durability, MemoryStateStore, StateStore};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DescribeVolumes, DirectBoot, ImageSource, Instance, InstanceState, LaunchSpec, RegionOptions, Result,
    VolumeSpec,
};

/// An image whose volumes, its root and an empty one, go with the instance.
fn register(region: &TestRegion) -> Ami<X86_64> {
    let disk = disk(1, 7);
    let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    let data = BlockDeviceMapping::blank("/dev/sdf", 1);
    region.register_image(Ami::<X86_64>::builder("base").block_device(data), source).unwrap()
}

fn launch(region: &TestRegion, ami: &Ami<X86_64>) -> Instance {
    region.launch(ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap()
}

/// How many volumes have something on the disk.
fn on_disk(dir: &Path) -> usize {
    fs::read_dir(dir.join("volumes")).unwrap().count()
}

/// That its volumes are what its image says.
fn is_new(instance: &Instance, name: &str) {
    let made = instance.create_image(name).unwrap();
    assert_eq!((made.changed_bytes, made.stored_bytes), (0, 0), "{name}");
}

#[test]
fn nothing_is_on_the_disk_before_a_guest_writes() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let before = files(dir.path());
    let instance = launch(&region, &ami);
    assert_eq!(files(dir.path()), before);
    ask(&instance, "read 0 2047", "data");
    ask(&instance, "read 1 0", "data");
    assert_eq!(ask(&instance, "size 1", "size"), (1 << 30).to_string());
    assert_eq!(region.describe_volumes(&DescribeVolumes::new()).unwrap().items.len(), 2);
    assert_eq!(on_disk(dir.path()), 0);
    // Nor is anything made for it to be rebooted, stopped, started or terminated.
    instance.reboot().unwrap();
    instance.stop(Duration::ZERO).unwrap();
    instance.start().unwrap();
    instance.stop(Duration::ZERO).unwrap();
    assert_eq!(on_disk(dir.path()), 0);
    instance.terminate().unwrap();
    assert_eq!(files(dir.path()), before);
    // One write makes the volume that it is to.
    let instance = launch(&region, &ami);
    ask(&instance, "write 1 0 word", "wrote");
    assert_eq!(on_disk(dir.path()), 1);
    ask(&instance, "write 0 0 word", "wrote");
    assert_eq!(on_disk(dir.path()), 2);
    instance.terminate().unwrap();
    assert_eq!(files(dir.path()), before);
}

/// Whatever is done to an instance whose guest has written nothing, while it runs and when it is stopped.
#[test]
fn what_is_done_to_volumes_without_files_is_done() {
    type Act = fn(&TestRegion, &Instance);
    let acts: [(&str, Act); 6] = [
        ("an image", |_, instance| is_new(instance, "child")),
        ("a snapshot", |region, instance| {
            let id = instance.describe().attachments[0].volume_id;
            let snapshot = region.create_snapshot(id, "").unwrap();
            let mut found = vec![0; 1 << 20];
            region.snapshot_disk(snapshot.id).unwrap().read_at(&mut found, 0).unwrap();
            let mut expected = vec![0; 1 << 20];
            disk(1, 7).read_at(&mut expected, 0).unwrap();
            assert!(found == expected);
        }),
        ("growth", |region, instance| {
            let id = instance.describe().attachments[1].volume_id;
            assert_eq!(region.grow_volume(id, 2).unwrap().size_gib, 2);
        }),
        ("detachment", |region, instance| {
            let id = instance.describe().attachments[1].volume_id;
            region.detach_volume(id).unwrap();
            region.attach_volume(id, instance.id(), "/dev/sdf").unwrap();
        }),
        ("a volume that is not of its launch", |region, instance| {
            let volume = region.create_volume(VolumeSpec::new(1)).unwrap();
            region.attach_volume(volume.id, instance.id(), "/dev/sdg").unwrap();
            region.detach_volume(volume.id).unwrap();
        }),
        ("a reboot", |_, instance| {
            if instance.state() == InstanceState::Running {
                instance.reboot().unwrap();
            }
        }),
    ];
    for (what, act) in acts {
        for stopped in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let region = open(dir.path());
            let instance = launch(&region, &register(&region));
            if stopped {
                instance.stop(Duration::ZERO).unwrap();
            }
            act(&region, &instance);
            if !stopped {
                instance.stop(Duration::ZERO).unwrap();
            }
            instance.start().unwrap();
            ask(&instance, "write 0 0 root", "wrote");
            ask(&instance, "write 1 0 data", "wrote");
            let id = instance.id();
            drop((instance, region));
            let region = open(dir.path());
            let instance = region.instance(id).unwrap();
            instance.start().unwrap();
            let found = [ask(&instance, "read 0 0", "data"), ask(&instance, "read 1 0", "data")];
            assert_eq!(found, ["root", "data"], "{what}, stopped: {stopped}");
        }
    }
}

#[test]
fn a_region_that_was_closed_has_them_again() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let instances = [launch(&region, &ami), launch(&region, &ami)];
    let ids = instances.each_ref().map(Instance::id);
    ask(&instances[1], "write 0 0 word", "wrote");
    instances[0].stop(Duration::ZERO).unwrap();
    drop((instances, region));
    // All that are of an instance of which one was written.
    assert_eq!(on_disk(dir.path()), 2);
    let region = open(dir.path());
    assert_eq!(on_disk(dir.path()), 2);
    let [first, second] = ids.map(|id| region.instance(id).unwrap());
    is_new(&first, "first");
    first.start().unwrap();
    second.start().unwrap();
    ask(&first, "write 0 0 first", "wrote");
    ask(&first, "write 1 0 first", "wrote");
    assert_eq!(ask(&second, "read 0 0", "data"), "word");
    // What is there now is damage when it is lost.
    first.stop(Duration::ZERO).unwrap();
    let root = first.describe().attachments[0].volume_id;
    fs::remove_dir_all(dir.path().join("volumes").join(root.to_string())).unwrap();
    assert!(first.start().is_err());
}

/// However soon the instance is stopped: a guest's data is never taken for what can be made again.
#[test]
fn what_was_written_and_is_lost_is_not_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = launch(&region, &register(&region));
    ask(&instance, "write 0 0 word", "wrote");
    instance.stop(Duration::ZERO).unwrap();
    assert_eq!(on_disk(dir.path()), 2, "the other one, too");
    let root = instance.describe().attachments[0].volume_id;
    fs::remove_dir_all(dir.path().join("volumes").join(root.to_string())).unwrap();
    assert!(instance.start().is_err());
    let id = instance.id();
    drop((instance, region));
    for _ in 0..2 {
        let region = open(dir.path());
        assert!(region.instance(id).unwrap().start().is_err());
    }
    assert_eq!(on_disk(dir.path()), 1);
}

/// Tells of instances whose records say that their volumes are durable.
#[derive(Debug)]
struct Telling(Arc<MemoryStateStore>, Mutex<Sender<String>>);

impl StateStore for Telling {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        self.0.get(table, key)
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        self.0.scan(table)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        self.0.apply(changes, durability)?;
        for change in changes.iter().filter(|change| change.table == "instances") {
            let json = String::from_utf8_lossy(change.value.as_deref().unwrap_or_default()).into_owned();
            if json.contains("\"launched\":true") {
                self.1.lock().unwrap().send(change.key.clone()).unwrap_or_default();
            }
        }
        Ok(())
    }
}

/// From the first write on a volume that is lost is soon known to be lost, and so are the others of its instance.
#[test]
fn the_first_write_has_all_volumes_become_durable() {
    let dir = tempfile::tempdir().unwrap();
    let (tell, told) = channel();
    let state = Telling(Arc::default(), Mutex::new(tell));
    let options = RegionOptions::new().state_store(state);
    let region: TestRegion = options.open(dir.path(), FakeHypervisor::new()).unwrap();
    let ami = register(&region);
    let (idle, busy) = (launch(&region, &ami), launch(&region, &ami));
    ask(&busy, "write 1 0 word", "wrote");
    assert_eq!(told.recv_timeout(Duration::from_secs(60)).unwrap(), busy.id().to_string());
    assert_eq!(on_disk(dir.path()), 2);
    ask(&idle, "write 0 0 word", "wrote");
    assert_eq!(told.recv_timeout(Duration::from_secs(60)).unwrap(), idle.id().to_string());
    assert_eq!(on_disk(dir.path()), 4);
}
