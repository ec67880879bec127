//! A file system that is full: what fails says so and leaves nothing, and what gives space back works.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ami_core::{Ami, X86_64};
use common::{ask, check, disk, everything, files, launch, open, register, skip};
use instance_core::machine::{
    Capabilities, Execution, Hypervisor, Machine, MachineError, MachineErrorKind, MachineSpec, Runs,
};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    Capacity, DirectBoot, Error, ErrorKind, ImageSource, InstanceState, InstanceType, LaunchSpec, Region,
    RegionOptions, VolumeSpec,
};

/// A file system of a fixed size, unmounted at the end.
#[derive(Debug)]
struct Small(PathBuf, #[expect(dead_code, reason = "removes the directory")] tempfile::TempDir);

impl Small {
    fn mount(kib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).status();
        if mount.is_ok_and(|status| status.success()) {
            return Some(Self(dir.path().to_owned(), dir));
        }
        skip("a small file system cannot be mounted, which takes root; full disks are not tested");
        None
    }

    fn region(&self) -> PathBuf {
        self.0.join("region")
    }

    /// Takes up all space but so much.
    fn leave(&self, kib: u64) {
        let mut ballast = File::create(self.0.join("ballast")).unwrap();
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        let free = stat.f_bfree * stat.f_frsize;
        ballast.write_all(&vec![1; free.saturating_sub(kib << 10) as usize]).unwrap();
    }

    fn relieve(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

const ADVICE: &str = "free space on the file system of the region";

fn check_full(error: &Error) {
    check(error, ErrorKind::InsufficientVolumeCapacity, "InsufficientVolumeCapacity", &[ADVICE]);
}

/// Of a launch EC2 says so whatever the host has too little of.
fn check_no_room(error: &Error) {
    check(error, ErrorKind::InsufficientCapacity, "InsufficientInstanceCapacity", &[ADVICE]);
}

/// That a region is, in this process and in the next, what it was.
fn unchanged(region: common::TestRegion, dir: &Path, before: &std::collections::BTreeMap<String, String>) {
    assert_eq!(everything(&region, dir), *before);
    drop(region);
    assert_eq!(everything(&open(dir), dir), *before, "after reopening");
}

#[test]
fn a_region_that_does_not_fit_can_be_opened_later() {
    let Some(small) = Small::mount(4 << 10) else { return };
    for kib in [0, 4, 8, 100, 1000] {
        small.leave(kib);
        check_full(&common::try_open(&small.region()).expect_err(&format!("{kib} KiB")));
        small.relieve();
    }
    assert!(open(&small.region()).images().unwrap().is_empty());
}

#[test]
fn images_that_do_not_fit_leave_nothing() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let dir = small.region();
    for kib in [0, 4, 60, 100, 500, 1500, 3000] {
        let region = open(&dir);
        let before = everything(&region, &dir);
        small.leave(kib);
        check_full(&register(&region, "large", &disk(3, 7)).expect_err(&format!("{kib} KiB")));
        small.relieve();
        unchanged(region, &dir, &before);
    }
    register(&open(&dir), "large", &disk(3, 7)).unwrap();
}

#[test]
fn volumes_and_snapshots_that_do_not_fit_leave_nothing() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let dir = small.region();
    let region = open(&dir);
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let bytes: Vec<u8> = (0..3u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    region.volume_disk(volume).unwrap().write_at(&bytes, 0).unwrap();
    let before = everything(&region, &dir);
    small.leave(0);
    check_full(&region.create_volume(VolumeSpec::new(1)).unwrap_err());
    check_full(&region.create_snapshot(volume, "").unwrap_err());
    small.relieve();
    assert_eq!(everything(&region, &dir), before);
    region.create_snapshot(volume, "").unwrap();
    region.create_volume(VolumeSpec::new(1)).unwrap();
}

#[test]
fn launches_that_do_not_fit_leave_nothing() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let dir = small.region();
    let ami = register(&open(&dir), "base", &disk(1, 1)).unwrap();
    // The data volume, which outlives its instance, is made at once.
    for kib in [0, 4, 8, 12, 28] {
        let region = open(&dir);
        let before = everything(&region, &dir);
        small.leave(kib);
        check_no_room(&launch(&region, &ami).expect_err(&format!("{kib} KiB")));
        small.relieve();
        assert!(region.instances().is_empty());
        unchanged(region, &dir, &before);
    }
    launch(&open(&dir), &ami).unwrap();
}

/// It is made when the guest writes to it, who is told then, and again when there is room.
#[test]
fn a_volume_that_does_not_fit_is_made_when_it_does() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let dir = small.region();
    let region = open(&dir);
    let image = disk(1, 1);
    let source = ImageSource::new(&image).boot(DirectBoot::new(tiny_elf(), None, ""));
    let ami = region.register_image(Ami::<X86_64>::builder("root alone"), source).unwrap();
    small.leave(0);
    let instance = launch(&region, &ami).unwrap();
    for _ in 0..2 {
        ask(&instance, "write 0 0 word", "error");
        assert_eq!(std::fs::read_dir(dir.join("volumes")).unwrap().count(), 0);
        ask(&instance, "read 0 0", "data");
    }
    instance.reboot().unwrap();
    instance.stop(Duration::ZERO).unwrap();
    instance.start().unwrap();
    ask(&instance, "write 0 0 word", "error");
    small.relieve();
    ask(&instance, "write 0 0 word", "wrote");
    let id = instance.id();
    drop((instance, region));
    let region = open(&dir);
    let instance = region.instance(id).unwrap();
    instance.start().unwrap();
    ask(&instance, "read 0 0", "data word");
}

#[test]
fn an_image_of_an_instance_that_does_not_fit_leaves_nothing_and_the_instance_goes_on() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let dir = small.region();
    let region = open(&dir);
    let instance = launch(&region, &register(&region, "base", &disk(1, 1)).unwrap()).unwrap();
    for sector in 0..20 {
        ask(&instance, &format!("write 0 {} word-{sector}", sector * 128), "wrote");
    }
    ask(&instance, "flush 0", "flushed");
    let before = everything(&region, &dir);
    for kib in [0, 4, 20, 60, 100] {
        small.leave(kib);
        check_full(&instance.create_image("child").expect_err(&format!("{kib} KiB")));
        small.relieve();
        assert_eq!(everything(&region, &dir), before, "{kib} KiB");
        ask(&instance, "read 0 2432", "data word-19");
    }
    let child = instance.create_image("child").unwrap().ami;
    let copy = launch(&region, &child.typed().unwrap()).unwrap();
    ask(&copy, "read 0 2432", "data word-19");
}

/// It is shut down in the end, as it would be on EC2.
#[test]
fn a_hibernation_that_does_not_fit_is_a_stop_and_leaves_nothing() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let dir = small.region();
    let region = open(&dir);
    let ami = register(&region, "base", &disk(1, 1)).unwrap();
    let spec = LaunchSpec::new("t2.nano".parse().unwrap()).hibernation(true);
    let instance = region.launch(&ami, spec).unwrap();
    // More than a page of memory.
    ask(&instance, &format!("remember {}", "x".repeat(9000)), "remembered");
    ask(&instance, "write 0 0 kept", "wrote");
    for kib in [0, 4, 8] {
        small.leave(kib);
        instance.hibernate(Duration::ZERO).unwrap();
        small.relieve();
        let reason = instance.describe().state_reason.unwrap();
        assert_eq!(reason.code, "Client.UserInitiatedShutdown", "{kib} KiB: {reason}");
        assert!(reason.message.contains("could not hibernate"), "{kib} KiB: {reason}");
        assert_eq!(std::fs::read_dir(dir.join("hibernated")).unwrap().count(), 0, "{kib} KiB");
        instance.start().unwrap();
        ask(&instance, "recall", "recalled");
        ask(&instance, "read 0 0", "data kept");
        ask(&instance, &format!("remember {}", "x".repeat(9000)), "remembered");
    }
    instance.hibernate(Duration::ZERO).unwrap();
    instance.start().unwrap();
    ask(&instance, "recall", &format!("recalled {}", "x".repeat(9000)));
}

/// A host whose disk is full when the machine has been made.
#[derive(Debug)]
struct Filling(FakeHypervisor, std::sync::Arc<Small>);

impl Hypervisor for Filling {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.0.execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        let machine = self.0.create(spec);
        self.1.leave(0);
        machine
    }
}

impl Runs<X86_64> for Filling {}

#[test]
fn a_launch_that_cannot_be_recorded_in_the_end_leaves_nothing() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let (dir, small) = (small.region(), std::sync::Arc::new(small));
    let mut refused = 0;
    // Records so long that the state store has room for one copy and, of some, not for two.
    for kib in [500, 2000, 4000, 5000, 6000] {
        let ami = register(&open(&dir), "base", &disk(1, 1)).unwrap();
        let region = Region::open(&dir, Filling(FakeHypervisor::new(), small.clone())).unwrap();
        let before = files(&dir);
        let (one, name) = (std::num::NonZeroU32::MIN, "x".repeat(kib << 10));
        let hardware = InstanceType::custom(name, one, one.saturating_add(511));
        if let Err(error) = region.launch(&ami, LaunchSpec::new(hardware)) {
            refused += 1;
            check_no_room(&error);
            assert!(region.instances().is_empty());
            assert_eq!(files(&dir), before, "{kib} KiB");
        }
        drop(region);
        small.relieve();
        std::fs::remove_dir_all(&dir).unwrap();
    }
    assert!(refused > 0, "all could be recorded");
}

/// A full disk is emptied by deregistering and terminating, so these work on one.
#[test]
fn what_gives_space_back_needs_none() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let dir = small.region();
    let region = open(&dir);
    let ami = register(&region, "base", &disk(1, 1)).unwrap();
    // What is kept of the file that holds both takes room to be written anew.
    let kept = register(&region, "kept", &disk(1, 2)).unwrap();
    let (one, two) = (launch(&region, &ami).unwrap(), launch(&region, &ami).unwrap());
    ask(&one, "write 0 0 kept", "wrote");
    small.leave(0);
    one.stop(Duration::ZERO).unwrap();
    assert_eq!(one.state(), InstanceState::Stopped);
    two.terminate().unwrap();
    region.deregister_image(ami.id()).unwrap();
    one.terminate().unwrap();
    drop((one, two, region));
    let region = open(&dir);
    assert!(region.instances().iter().all(|i| i.state() == InstanceState::Terminated));
    assert_eq!(region.images().unwrap().iter().map(|image| image.id()).collect::<Vec<_>>(), [kept.id()]);
    drop(region);
    small.relieve();
    let packs = || files(&dir.join("blocks/packs")).into_keys().collect::<Vec<_>>();
    let before = packs();
    let region = open(&dir);
    assert_ne!(packs(), before, "there is room to write it anew");
    ask(&launch(&region, &kept).unwrap(), "read 0 0", "data");
}

/// Nor do they when the journal is full of what the database does not have yet.
#[test]
fn what_gives_space_back_needs_none_behind_a_full_journal() {
    let Some(small) = Small::mount(32 << 10) else { return };
    let dir = small.region();
    let options = RegionOptions::new().capacity(Capacity::unlimited());
    let region = options.open(&dir, FakeHypervisor::new()).unwrap();
    let ami = register(&region, "base", &disk(1, 1)).unwrap();
    // Records of more than 20 KiB.
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap()).user_data([7; LaunchSpec::MAX_USER_DATA]);
    let instances: Vec<_> = (0..44).map(|_| region.launch(&ami, spec()).unwrap()).collect();
    small.leave(0);
    instances.iter().for_each(|instance| instance.terminate().unwrap());
    region.deregister_image(ami.id()).unwrap();
    drop((instances, region));
    let region = open(&dir);
    assert!(region.instances().iter().all(|i| i.state() == InstanceState::Terminated));
    assert!(region.images().unwrap().is_empty());
}

/// A stop that could not make the volumes durable is finished by the next.
#[test]
fn a_stop_that_failed_is_done_again() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let region = open(&small.region());
    let instance = launch(&region, &register(&region, "base", &disk(1, 1)).unwrap()).unwrap();
    // More runs than fit into the volume's log as it is, whose growth then finds no space.
    for block in 0..1800 {
        ask(&instance, &format!("write 0 {} w{block}", block * 16), "wrote");
    }
    small.leave(0);
    check_full(&instance.stop(Duration::ZERO).unwrap_err());
    assert_eq!(instance.state(), InstanceState::Stopping);
    small.relieve();
    instance.stop(Duration::ZERO).unwrap();
    assert_eq!(instance.state(), InstanceState::Stopped);
    instance.start().unwrap();
    ask(&instance, "read 0 28784", "data w1799");
}

/// A host that fails, while it is told to, with more words than a full disk has room for.
#[derive(Debug)]
struct Wordy(FakeHypervisor, std::sync::Arc<AtomicBool>);

impl Hypervisor for Wordy {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.0.execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        match self.1.load(Ordering::SeqCst) {
            true => Err(MachineError::new(MachineErrorKind::Host, "x".repeat(6 << 20))),
            false => self.0.create(spec),
        }
    }
}

impl Runs<X86_64> for Wordy {}

/// A machine that is gone makes no running instance, even where its loss could not be recorded.
#[test]
fn an_instance_whose_loss_could_not_be_recorded_can_be_started() {
    let Some(small) = Small::mount(16 << 10) else { return };
    let ami = register(&open(&small.region()), "base", &disk(1, 1)).unwrap();
    let fails = std::sync::Arc::new(AtomicBool::new(false));
    let region = Region::open(small.region(), Wordy(FakeHypervisor::new(), fails.clone())).unwrap();
    let instance = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
    small.leave(0);
    fails.store(true, Ordering::SeqCst);
    instance.reboot().unwrap_err();
    assert_eq!(instance.state(), InstanceState::Running, "the loss could be recorded");
    fails.store(false, Ordering::SeqCst);
    small.relieve();
    instance.start().unwrap();
    ask(&instance, "ping there", "pong there");
}
