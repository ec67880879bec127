//! What a guest without a network is told by a disk.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ami_core::{Ami, X86_64};
use common::cable::Cable;
use common::disk;
use instance_core::machine::{
    Capabilities, DiskSpec, Execution, Hypervisor, Machine, MachineError, MachineSpec, RestoreSpec, Runs,
};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    BlockDeviceMappingRequest, DirectBoot, ErrorKind, ImageSource, LaunchSpec, NoCloudSeed, Region,
    RegionOptions,
};
use storage_block::Disk;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me";

/// Remembers how many disks the machine has that was made last, and the last of them, if that is a seed.
#[derive(Debug, Clone)]
struct Remembering(FakeHypervisor, Arc<Mutex<(usize, Option<Disk>)>>);

impl Remembering {
    fn new() -> Self {
        Self(FakeHypervisor::new(), Arc::default())
    }

    fn look(&self, disks: &[DiskSpec]) {
        let last = disks.last().filter(|disk| disk.serial == "nocloud");
        *self.1.lock().unwrap() = (disks.len(), last.map(|disk| disk.disk.clone()));
    }

    fn seed(&self) -> Option<Disk> {
        self.1.lock().unwrap().1.clone()
    }
}

impl Runs<X86_64> for Remembering {}

impl Hypervisor for Remembering {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.0.execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.look(&spec.disks);
        self.0.create(spec)
    }

    fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.look(&spec.disks);
        self.0.restore(spec)
    }
}

fn open(dir: &Path, machines: &Remembering) -> Region<Remembering> {
    RegionOptions::new().open(dir, machines.clone()).unwrap()
}

fn register(region: &Region<Remembering>) -> Ami<X86_64> {
    let root = disk(1, 7);
    let source = ImageSource::new(&root).boot(DirectBoot::new(tiny_elf(), None, ""));
    region.register_image(Ami::<X86_64>::builder("base"), source).unwrap()
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

fn bytes(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What a guest reads of a seed: the metadata and the user data.
fn told(seed: &Disk) -> (serde_json::Value, Vec<u8>) {
    let mut content = std::io::Cursor::new(bytes(seed));
    let files = fatfs::FileSystem::new(&mut content, fatfs::FsOptions::new()).unwrap();
    assert_eq!(files.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
    let read = |name: &str| {
        let mut bytes = Vec::new();
        files.root_dir().open_file(name).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    let mut names: Vec<_> = files.root_dir().iter().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["meta-data", "user-data"]);
    (serde_json::from_slice(&read("meta-data")).unwrap(), read("user-data"))
}

#[test]
fn it_is_told_by_a_disk_what_metadata_would_tell() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Remembering::new();
    let region = open(dir.path(), &machines);
    let ami = register(&region);
    let plain = region.launch(&ami, spec().user_data("x")).unwrap();
    assert!(machines.seed().is_none(), "unless it is asked for");
    plain.terminate().unwrap();

    let more = BlockDeviceMappingRequest::new("/dev/sdf").size_gib(1);
    let longest = vec![b'#'; LaunchSpec::MAX_USER_DATA];
    let launch = spec().nocloud_seed(NoCloudSeed::new().public_key(KEY)).user_data(longest.clone());
    let server = region.launch(&ami, launch.block_device(more).hibernation(true)).unwrap();
    let seed = machines.seed().unwrap();
    let (meta_data, user_data) = told(&seed);
    assert_eq!(meta_data["instance-id"], server.id().to_string());
    assert_eq!(meta_data["local-hostname"], server.id().to_string());
    assert_eq!(meta_data["public-keys"], serde_json::json!([KEY]));
    assert!(user_data == longest);
    assert!(seed.read_only() && seed.write_at(&[0; 512], 0).is_err());
    assert_eq!(machines.1.lock().unwrap().0, 3, "behind its volumes");
    assert_eq!(server.describe().attachments.len(), 2, "and it is none of them");
    let image = server.create_image("copy").unwrap().ami;
    assert_eq!(image.manifest().block_device_mappings().len(), 2);

    // A guest that goes on where it hibernated finds the same.
    server.hibernate(Duration::ZERO).unwrap();
    server.start().unwrap();
    assert!(bytes(&machines.seed().unwrap()) == bytes(&seed));
    server.stop(Duration::ZERO).unwrap();
    server.set_user_data(None).unwrap();
    drop((plain, server, region));
    let region = open(dir.path(), &machines);
    let server = region.instances().into_iter().find(|i| i.state().to_string() == "stopped").unwrap();
    server.start().unwrap();
    assert_eq!(told(&machines.seed().unwrap()), (meta_data, Vec::new()));
}

/// As the programs see it that cloud-init looks for it with.
#[test]
fn the_systems_own_tools_take_it_for_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Remembering::new();
    let region = open(dir.path(), &machines);
    let launch = spec().nocloud_seed(NoCloudSeed::new()).user_data("#!/bin/sh\n");
    let _server = region.launch(&register(&region), launch).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes(&machines.seed().unwrap())).unwrap();
    match Command::new("blkid").args(["-p", "-o", "export"]).arg(file.path()).output() {
        Ok(said) => {
            let said = String::from_utf8(said.stdout).unwrap();
            assert!(said.contains("\nLABEL=CIDATA\n") && said.contains("\nTYPE=vfat\n"), "{said}");
        }
        Err(error) => eprintln!("SKIPPED: there is no blkid: {error}"),
    }
    match Command::new("fsck.fat").arg("-n").arg(file.path()).output() {
        Ok(said) => assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout)),
        Err(error) => eprintln!("SKIPPED: there is no fsck.fat: {error}"),
    }
}

#[test]
fn the_key_of_its_key_pair_is_among_the_keys() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Remembering::new();
    let region = RegionOptions::new().network(Cable::default()).open(dir.path(), machines.clone()).unwrap();
    // As it is read from a file.
    let seed = NoCloudSeed::new().public_key(format!("{KEY}\n"));
    let launch = spec().key_name("mine").nocloud_seed(seed);
    let _server = region.launch(&register(&region), launch).unwrap();
    let keys = told(&machines.seed().unwrap()).0["public-keys"].clone();
    assert_eq!(keys, serde_json::json!(["ssh-ed25519 AAAA", KEY]));
}

const LONGEST_KEY: usize = 8 << 10;

/// A key with a comment, of what takes most room where it is written down.
fn of_length(len: usize) -> String {
    format!("{KEY}{}", "\"".repeat(len - KEY.len()))
}

#[test]
fn there_is_room_for_the_most_and_longest_of_all() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Remembering::new();
    let region = open(dir.path(), &machines);
    let seed = (0..32).fold(NoCloudSeed::new(), |seed, _| seed.public_key(of_length(LONGEST_KEY)));
    let longest = vec![b'#'; LaunchSpec::MAX_USER_DATA];
    let _server =
        region.launch(&register(&region), spec().nocloud_seed(seed).user_data(longest.clone())).unwrap();
    let (meta_data, user_data) = told(&machines.seed().unwrap());
    assert_eq!(meta_data["public-keys"], serde_json::json!(vec![of_length(LONGEST_KEY); 32]));
    assert!(user_data == longest);
}

#[test]
fn what_is_no_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let machines = Remembering::new();
    let region = open(dir.path(), &machines);
    let ami = register(&region);
    let many = (0..33).fold(NoCloudSeed::new(), |seed, _| seed.public_key(KEY));
    let long = NoCloudSeed::new().public_key(of_length(LONGEST_KEY + 1));
    let with_control = ["\u{1}", "\0", "\n", "\r\n", "\t", "\u{7f}", "\u{85}"]
        .map(|c| NoCloudSeed::new().public_key(KEY).public_key(format!("{KEY}{c}x\n")));
    let seeds = [NoCloudSeed::new().public_key("ssh-ed25519 AAAA"), many, long];
    for seed in seeds.into_iter().chain(with_control) {
        let launch = spec().nocloud_seed(seed);
        let refused = region.create_launch_template("web", launch.clone()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidParameter);
        assert_eq!(region.launch(&ami, launch).unwrap_err().kind(), ErrorKind::InvalidParameter);
    }
    assert!(region.instances().is_empty());
}
