//! What is done to instances while the store fails: what they have stays theirs, and they can be told to go on.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ami_core::{VolumeId, X86_64};
use common::failing::{Failing, How};
use common::{ask, disk, register, soon};
use instance_core::machine::{
    Capabilities, Detach, DiskSpec, Execution, Hypervisor, Machine, MachineError, MachineErrorKind,
    MachineSpec, MachineState, Runs,
};
use instance_core::testing::FakeHypervisor;
use instance_core::watch::Watch;
use instance_core::{ErrorKind, Instance, InstanceState, LaunchSpec, Region, RegionOptions, VolumeSpec};

/// What a record says of an instance that is stopped.
const STOPPED: &str = "\"state\":\"stopped\"";

/// Makes machines that take no disks once they are told so, from when on this store fails.
#[derive(Debug, Clone)]
struct Picky(FakeHypervisor, Arc<AtomicBool>, Failing);

#[derive(Debug)]
struct PickyMachine(Box<dyn Machine>, Picky);

impl Machine for PickyMachine {
    fn state(&self) -> Watch<MachineState> {
        self.0.state()
    }

    fn start(&self) -> Result<(), MachineError> {
        self.0.start()
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.0.pause()
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.0.resume()
    }

    fn power_button(&self) -> Result<(), MachineError> {
        self.0.power_button()
    }

    fn attach_disk(&self, disk: DiskSpec) -> Result<(), MachineError> {
        if !self.1.1.load(Ordering::SeqCst) {
            return self.0.attach_disk(disk);
        }
        self.1.2.set(How::Fails);
        Err(MachineError::new(MachineErrorKind::Host, "it does not want it"))
    }

    fn detach_disk(&self, serial: &str, how: Detach) -> Result<(), MachineError> {
        self.0.detach_disk(serial, how)
    }

    fn save(&self, to: &File) -> Result<(), MachineError> {
        self.0.save(to)
    }

    fn reset(&self) -> Result<(), MachineError> {
        self.0.reset()
    }

    fn kill(&self) {
        self.0.kill();
    }
}

impl Hypervisor for Picky {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.0.execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        Ok(Box::new(PickyMachine(self.0.create(spec)?, self.clone())))
    }
}

impl Runs<X86_64> for Picky {}

/// A region whose store may fail, with a server that has a disk of its own beside its root.
fn world(dir: &Path) -> (Region<Picky>, Failing, Picky, Instance) {
    let store = Failing::new();
    let hypervisor = Picky(FakeHypervisor::new(), Arc::default(), store.clone());
    let options = || RegionOptions::new().state_store(store.clone());
    let ami = register(&options().open(dir, FakeHypervisor::new()).unwrap(), "base", &disk(1, 7)).unwrap();
    let region = options().open(dir, hypervisor.clone()).unwrap();
    let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
    (region, store, hypervisor, server)
}

/// What a volume begins with in a snapshot that is made of it now.
fn said_by(region: &Region<Picky>, id: VolumeId) -> String {
    let snapshot = region.create_snapshot(id, "").unwrap();
    let copy = region.create_volume(VolumeSpec::of_snapshot(snapshot.id)).unwrap();
    let mut bytes = [0; 5];
    region.volume_disk(copy.id).unwrap().read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_volume_whose_detachment_cannot_be_committed_is_still_there_and_no_other_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let (region, store, hypervisor, server) = world(dir.path());
    let first = server.describe().attachments[1].volume_id;
    let second = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    region.attach_volume(second, server.id(), "/dev/sdg").unwrap();
    ask(&server, "write 1 0 first", "wrote");
    ask(&server, "write 2 0 other", "wrote");
    let mut names = 0..;
    let mut check = || {
        let told: Vec<_> = server.describe().attachments.iter().map(|a| a.volume_id).collect();
        assert_eq!(told[1..], [first, second]);
        assert_eq!([first, second].map(|id| said_by(&region, id)), ["first", "other"]);
        let image = server.create_image(format!("child-{}", names.next().unwrap())).unwrap().ami;
        let spec = LaunchSpec::new("t2.nano".parse().unwrap());
        let child = region.launch(&image.typed::<X86_64>().unwrap(), spec).unwrap();
        assert_eq!([1, 2].map(|n| ask(&child, &format!("read {n} 0"), "data ")), ["first", "other"]);
        child.terminate().unwrap();
    };
    for (picky, disks) in [(false, "3"), (true, "2")] {
        hypervisor.1.store(picky, Ordering::SeqCst);
        for detach in [Region::detach_volume, Region::force_detach_volume] {
            store.set(How::Fails);
            assert_eq!(detach(&region, first).unwrap_err().kind(), ErrorKind::Internal);
            store.set(How::Works);
            assert_eq!(ask(&server, "disks", "disks "), disks);
            check();
        }
    }
    // Nor is one kept that its machine has no more.
    region.detach_volume(first).unwrap();
    assert_eq!(said_by(&region, second), "other");
    assert_eq!(server.describe().attachments.len(), 2);
    region.delete_volume(first).unwrap();
}

/// As much of it as the store may have, and however the region ends.
#[test]
fn a_volume_whose_attachment_failed_is_the_nexts_alone() {
    for (stopped, how) in [
        (false, None),
        (false, Some(How::Fails)),
        (false, Some(How::FailsLate)),
        (true, Some(How::FailsLate)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (region, store, hypervisor, first) = world(dir.path());
        let ami = region.images().unwrap().remove(0).ami().clone().typed::<X86_64>().unwrap();
        let second = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
        if stopped {
            first.stop(Duration::ZERO).unwrap();
        }
        let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
        // From then on the store is told of nothing else with it.
        region.attach_volume(volume, first.id(), "/dev/sdg").unwrap();
        region.detach_volume(volume).unwrap();
        let has = |i: &Instance| i.describe().attachments.iter().any(|a| a.volume_id == volume);
        let holders = |region: &Region<Picky>| {
            let all = region.instances();
            all.iter().filter(|i| has(i)).map(Instance::id).collect::<Vec<_>>()
        };
        // By the machine, with which the store fails, or by the store alone.
        hypervisor.1.store(how.is_none(), Ordering::SeqCst);
        how.into_iter().for_each(|how| store.set(how));
        let failed = region.attach_volume(volume, first.id(), "/dev/sdg").unwrap_err();
        let kind = if how.is_none() { ErrorKind::Hypervisor } else { ErrorKind::Internal };
        assert_eq!(failed.kind(), kind, "{failed:?}");
        store.set(How::Works);
        hypervisor.1.store(false, Ordering::SeqCst);
        assert_eq!(holders(&region), []);
        if !stopped {
            assert_eq!(ask(&first, "disks", "disks "), "2");
        }
        region.attach_volume(volume, second.id(), "/dev/sdg").unwrap();
        let ids = [&first, &second].map(Instance::id);
        drop((first, second, region));
        let region = RegionOptions::new().state_store(store).open(dir.path(), hypervisor).unwrap();
        assert_eq!(holders(&region), ids[1..], "{how:?}");
        region.detach_volume(volume).unwrap();
        region.attach_volume(volume, ids[0], "/dev/sdg").unwrap();
    }
}

#[test]
fn an_instance_whose_failed_start_could_not_be_written_down_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let (region, store, hypervisor, server) = world(dir.path());
    server.stop(Duration::ZERO).unwrap();
    hypervisor.0.fail_next_create();
    store.set(How::Refuses(STOPPED));
    assert_eq!(server.start().unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!((server.state(), region.used_capacity().0), (InstanceState::Pending, 0));
    store.set(How::Works);
    server.start().unwrap();
    assert_eq!((server.state(), region.used_capacity().0), (InstanceState::Running, 1));
    ask(&server, "ping again", "pong again");
}

#[test]
fn an_instance_whose_lost_machine_could_not_be_written_down_gets_no_other_but_by_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let (region, store, _, server) = world(dir.path());
    store.set(How::Refuses(STOPPED));
    server.console().write_all(b"crash\n", soon()).unwrap();
    store.wait_for_refusal();
    for reboot in [Instance::reboot, |i: &Instance| i.reboot_within(Duration::from_secs(20))] {
        assert_eq!(reboot(&server).unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
    }
    assert_eq!((server.state(), region.used_capacity().0), (InstanceState::Running, 0));
    store.set(How::Works);
    assert_eq!(server.reboot().unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
    server.start().unwrap();
    assert_eq!((server.state(), region.used_capacity().0), (InstanceState::Running, 1));
    ask(&server, "ping again", "pong again");
    server.reboot().unwrap();
}
