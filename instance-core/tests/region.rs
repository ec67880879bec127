//! A region from the outside, on the fake machine.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;

use std::sync::mpsc;
use std::time::Duration;

use ami_core::{Ami, AnyAmi, Arm64, BlockDeviceMapping, Digest, X86_64};
use common::{PATIENCE, ask, disk, files, open, register, soon, spec, try_register};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DirectBoot, ErrorKind, ImageSource, InstanceState, LaunchSpec, Region, RegionOptions, Result,
};
use storage_block::{Compression, MemoryDisk, RawFile, Verify};

#[test]
fn a_region_that_is_opened_again_has_lost_its_machines_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let instance = region.launch(&ami, spec()).unwrap();
    ask(&instance, "write 0 3 flushed", "wrote");
    ask(&instance, "flush 0", "flushed");
    let (id, name) = (instance.id(), region.name().clone());

    let in_use = Region::open(dir.path(), FakeHypervisor::new()).unwrap_err();
    assert_eq!(in_use.kind(), ErrorKind::RegionInUse);
    assert!(in_use.to_string().contains("in use"), "{in_use}");
    drop((region, instance));

    // What a crash between the record and the files leaves.
    std::fs::create_dir_all(dir.path().join("volumes/vol-00000000000000000/x")).unwrap();
    std::fs::create_dir_all(dir.path().join("instances/i-00000000000000000")).unwrap();
    let region = open(dir.path());
    assert_eq!(region.name(), &name);
    assert!(!dir.path().join("volumes/vol-00000000000000000").exists());
    assert!(!dir.path().join("instances/i-00000000000000000").exists());
    let instance = region.instance(id).unwrap();
    assert_eq!(instance.state(), InstanceState::Stopped);
    assert_eq!(instance.describe().state_reason.unwrap().code, "Server.InternalError");
    instance.start().unwrap();
    ask(&instance, "read 0 3", "data flushed");
}

#[test]
fn a_launch_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = FakeHypervisor::new();
    let region = Region::open(dir.path(), hypervisor.clone()).unwrap();
    let ami = register(&region);
    let before = files(dir.path());
    hypervisor.fail_next_create();
    assert_eq!(region.launch(&ami, spec()).unwrap_err().kind(), ErrorKind::Hypervisor);
    assert_eq!(files(dir.path()), before);
    assert!(region.instances().is_empty());
    region.launch(&ami, spec()).unwrap();
}

/// What nobody has an error of is told to who listens, in EC2's words.
#[test]
fn a_launch_that_fails_says_in_ec2s_words_why() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = FakeHypervisor::new();
    let region = Region::open(dir.path(), hypervisor.clone()).unwrap();
    let ami = register(&region);
    let events = region.state_changes();
    hypervisor.fail_next_create();
    region.launch(&ami, spec()).unwrap_err();
    let reasons: Vec<_> =
        events.try_iter().filter_map(|change| Some((change.state, change.reason?.code))).collect();
    assert_eq!(reasons, [(InstanceState::Terminated, "Server.InternalError".to_owned())]);
}

/// Whoever kept the id of an image that is gone must not find another by it.
#[test]
fn an_id_is_never_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut ids = Vec::new();
    let mut digests = Vec::new();
    for round in 0..3 {
        let region = RegionOptions::new().name("eu-central-1".parse().unwrap());
        let region = region.open(dir.path(), FakeHypervisor::new()).unwrap();
        for _ in 0..2 {
            let ami = register(&region);
            digests.push(ami.digest());
            let instance = (round == 1).then(|| region.launch(&ami, spec()).unwrap());
            let copy = region.copy_image(ami.id(), "copy").unwrap();
            let known = region.image(ami.id()).unwrap();
            assert_eq!(known.ami(), &ami);
            ids.extend([ami.id(), copy.id()]);
            region.deregister_image(ami.id()).unwrap();
            region.deregister_image(copy.id()).unwrap();
            let child = instance.map(|instance| instance.create_image("child").unwrap().ami);
            if let Some(child) = child {
                assert_eq!(child.manifest().parent(), Some(&ami.digest()));
                ids.push(child.id());
                region.deregister_image(child.id()).unwrap();
            }
            assert!(ids.iter().all(|id| region.image(*id).is_err()));
        }
    }
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "{ids:?}");
    digests.dedup();
    assert_eq!(digests.len(), 1, "what is the same has the same digest");
}

#[test]
fn a_bad_image_is_refused_with_a_reason_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    register(&region);
    let before = files(dir.path());
    let disk = disk();

    let duplicate = try_register(&region, "base").unwrap_err();
    let no_kernel =
        region.register_image(Ami::<X86_64>::builder("no-kernel"), ImageSource::new(&disk)).unwrap_err();
    let garbage = ImageSource::new(&disk).boot(DirectBoot::new(b"garbage".to_vec(), None, ""));
    let garbage = region.register_image(Ami::<X86_64>::builder("garbage"), garbage).unwrap_err();
    let arm = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    let wrong = region.register_image(Ami::<Arm64>::builder("wrong"), arm).unwrap_err();
    let device =
        ImageSource::new(&disk).root_device("/dev/floppy").boot(DirectBoot::new(tiny_elf(), None, ""));
    let device = region.register_image(Ami::<X86_64>::builder("device"), device).unwrap_err();

    let table = [
        (duplicate, ErrorKind::ImageNameDuplicate, "InvalidAMIName.Duplicate"),
        (no_kernel, ErrorKind::NotBootable, "ImportFailed.UnsupportedDisk"),
        (garbage, ErrorKind::NotBootable, "ImportFailed.UnsupportedDisk"),
        (wrong, ErrorKind::ArchitectureMismatch, "InvalidParameterValue"),
        (device, ErrorKind::InvalidBlockDeviceMapping, "InvalidBlockDeviceMapping"),
    ];
    for (error, kind, code) in table {
        assert_eq!((error.kind(), error.code()), (kind, code), "{error}");
    }
    assert_eq!(files(dir.path()), before);
    assert_eq!(region.images().unwrap().len(), 1);
}

#[test]
fn an_architecture_that_nobody_runs_is_an_error_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami: AnyAmi = register(&region).into_any();
    drop(region);
    let arm_only = FakeHypervisor::with_architectures(vec![ami_core::Architecture::Arm64]);
    let region = Region::open(dir.path(), arm_only).unwrap();
    let before = files(dir.path());
    let refused = region.launch(&ami, spec()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ArchitectureMismatch, "{refused}");
    let refused = region.launch(&ami, LaunchSpec::new("t4g.nano".parse().unwrap())).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ArchitectureMismatch, "{refused}");
    assert_eq!(files(dir.path()), before);
}

#[test]
fn deregistering_hurts_no_instance_and_gives_the_bytes_back() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let instance = region.launch(&ami, spec()).unwrap();
    region.deregister_image(ami.id()).unwrap();
    assert_eq!(region.launch(&ami, spec()).unwrap_err().code(), "InvalidAMIID.NotFound");
    assert_eq!(region.deregister_image(ami.id()).unwrap_err().code(), "InvalidAMIID.NotFound");
    ask(&instance, "read 0 0", "data class");
    instance.stop(Duration::ZERO).unwrap();
    instance.start().unwrap();
    ask(&instance, "read 0 0", "data class");

    // An image of it is still a child of the one that is gone, and all goes with the last of both.
    let child = instance.create_image("child").unwrap().ami;
    assert_eq!(child.manifest().parent(), Some(&ami.digest()));
    instance.terminate().unwrap();
    region.deregister_image(child.id()).unwrap();
    for place in ["boot", "blocks/snapshots", "blocks/packs", "volumes", "instances"] {
        assert_eq!(files(&dir.path().join(place)), [""; 0], "{place}");
    }
}

/// Whatever the region's own thread is doing just then.
#[test]
fn a_region_is_closed_when_its_last_handle_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let id = {
        let region = open(dir.path());
        region.launch(&register(&region), spec()).unwrap().id()
    };
    for round in 0..30 {
        let region = Region::open(dir.path(), FakeHypervisor::new());
        let region = region.unwrap_or_else(|e| panic!("round {round}: {e}"));
        let instance = region.instance(id).unwrap();
        instance.start().unwrap();
        let mut reader = instance.console().reader();
        instance.console().write_all(b"poweroff\n", soon()).unwrap();
        reader.wait_for("GUEST READY", soon()).unwrap();
        let stops = instance.watch().wait(soon(), |d| d.state != InstanceState::Running).unwrap();
        assert!(matches!(stops.state, InstanceState::Stopping | InstanceState::Stopped));
    }
}

#[test]
fn what_no_instance_could_have_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let base = register(&region);
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 << 30).unwrap();
    let large = RawFile::from_file(file, false).unwrap().into_disk();
    let large = ImageSource::new(&large).boot(DirectBoot::new(tiny_elf(), None, ""));
    let large = region.register_image(Ami::<X86_64>::builder("large"), large).unwrap();
    let snapshot = *large.manifest().block_device_mappings()[0].as_ebs().unwrap().snapshot().unwrap();
    let before = files(dir.path());
    let disk = disk();
    let try_device = |device: BlockDeviceMapping| {
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let refused = region.register_image(Ami::<X86_64>::builder("other").block_device(device), source);
        let refused = refused.unwrap_err();
        (refused.kind(), refused.code().to_owned())
    };
    let unknown = BlockDeviceMapping::ebs("/dev/sdf", Digest::of(b"unknown"), 8);
    let table = [
        (try_device(unknown), ErrorKind::SnapshotNotFound, "InvalidSnapshot.NotFound"),
        (
            try_device(BlockDeviceMapping::ebs("/dev/sdf", snapshot, 1)),
            ErrorKind::InvalidBlockDeviceMapping,
            "InvalidBlockDeviceMapping",
        ),
    ];
    for ((kind, code), expected, expected_code) in table {
        assert_eq!((kind, code.as_str()), (expected, expected_code));
    }
    let tags = spec().tag("aws:mine", "");
    assert_eq!(region.launch(&base, tags).unwrap_err().kind(), ErrorKind::MalformedTagKey);
    assert_eq!(files(dir.path()), before);
}

#[test]
fn stray_files_do_not_keep_a_region_closed() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    for place in ["volumes/a-file", "instances/a-file", "boot/a-file"] {
        std::fs::write(dir.path().join(place), "stray").unwrap();
    }
    std::fs::create_dir(dir.path().join("boot/a-directory")).unwrap();
    drop(open(dir.path()));
    for place in ["volumes", "instances", "boot"] {
        assert_eq!(std::fs::read_dir(dir.path().join(place)).unwrap().count(), 0, "{place}");
    }
}

/// A launch finds all of an image or none of it, and its instance can have images in either case.
#[test]
fn a_launch_that_races_a_deregistration_fails_cleanly_or_leaves_a_whole_instance() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (mut launched, mut refused) = (0, 0);
    for round in 0.. {
        let ami = try_register(&region, &format!("base-{round}")).unwrap();
        let start = std::sync::Barrier::new(2);
        let instance = std::thread::scope(|scope| {
            let launching = scope.spawn(|| {
                start.wait();
                // Which of the two is first differs from round to round.
                (0..round % 8).for_each(|_| drop(region.images()));
                region.launch(&ami, spec())
            });
            start.wait();
            region.deregister_image(ami.id()).unwrap();
            launching.join().unwrap()
        });
        match instance {
            Ok(instance) => {
                launched += 1;
                instance.create_image(format!("child-{round}")).unwrap();
                instance.terminate().unwrap();
            }
            Err(e) => {
                refused += 1;
                assert_eq!(e.kind(), ErrorKind::ImageNotFound, "round {round}: {e:?}");
            }
        }
        if round >= 40 && launched.min(refused) > 0 || round == 400 {
            break;
        }
    }
    assert!(launched.min(refused) > 0, "launched {launched}, refused {refused}");
}

/// A large disk is copied for minutes, which keeps nobody from making images of instances.
#[test]
fn images_are_made_beside_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = region.launch(&register(&region), spec()).unwrap();
    ask(&instance, "write 0 0 object", "wrote");
    let (copying, copies) = mpsc::channel();
    let (done, made) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            copies.recv().unwrap();
            // Nobody hears of it that took too long.
            let _ = done.send(instance.create_image("child").map(|made| made.ami));
        });
        let mut child = None;
        let mut progress = |_| {
            if child.is_none() {
                copying.send(()).unwrap();
                child = Some(made.recv_timeout(PATIENCE).expect("it waited for the copy"));
            }
        };
        let disk = disk();
        let source =
            ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, "")).progress(&mut progress);
        region.register_image(Ami::<X86_64>::builder("beside"), source).unwrap();
        let copy = region.launch(&child.unwrap().unwrap(), spec()).unwrap();
        ask(&copy, "read 0 0", "data object");
    });
}

/// Of several who want a name, one has it.
#[test]
fn a_name_is_given_once_whoever_asks() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    for round in 0..10 {
        let name = format!("name-{round}");
        let registered = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..4).map(|_| scope.spawn(|| try_register(&region, &name))).collect();
            tries.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        });
        let refused: Vec<_> = registered.iter().filter_map(|r| r.as_ref().err()).map(|e| e.kind()).collect();
        assert_eq!(refused, [ErrorKind::ImageNameDuplicate; 3], "round {round}");
        let ami = registered.into_iter().find_map(Result::ok).unwrap();
        region.launch(&ami, spec()).unwrap().terminate().unwrap();
    }
}

/// What is chosen for the content of images reaches it.
#[test]
fn content_is_stored_and_read_as_the_options_say() {
    let disk = MemoryDisk::from_vec(vec![7; 1 << 20]).unwrap().into_disk();
    let make = |options: RegionOptions| {
        let dir = tempfile::tempdir().unwrap();
        let region = options.open(dir.path(), FakeHypervisor::new()).unwrap();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
        let ami = region.register_image(Ami::<X86_64>::builder("plain"), source).unwrap();
        (dir, ami.id())
    };
    let pack = |dir: &tempfile::TempDir| dir.path().join("blocks/packs/00000000.pack");
    let (dir, id) = make(RegionOptions::new());
    let (small, _) = make(RegionOptions::new().compression(Compression::WherePays { percent: 20 }));
    let [plain, packed] = [&dir, &small].map(|dir| std::fs::metadata(pack(dir)).unwrap().len());
    assert!(packed + (48 << 10) < plain, "{packed} and {plain} bytes");

    let mut bytes = std::fs::read(pack(&dir)).unwrap();
    bytes[4096] ^= 1;
    std::fs::write(pack(&dir), bytes).unwrap();
    for (verify, found) in [(Verify::Never, Ok(6)), (Verify::Digest, Err(storage_block::ErrorKind::Corrupt))]
    {
        let options = RegionOptions::new().verify(verify).cache_bytes(4 << 20);
        assert!(format!("{options:?}").contains("cache: 4194304"), "{options:?}");
        let region = options.open(dir.path(), FakeHypervisor::new()).unwrap();
        let mut first = [0];
        let read = region.image_disk(id, "/dev/xvda").unwrap().read_at(&mut first, 0);
        assert_eq!(read.map(|()| first[0]).map_err(|e| e.kind()), found, "{verify:?}");
    }
}
