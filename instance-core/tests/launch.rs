//! What an image is launched with, on the fake machine.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::time::Duration;

use ami_core::{Ami, Digest, VolumeType, X86_64};
use common::{TestRegion, check, disk, files, open, register, soon};
use instance_core::testing::FakeHypervisor;
use instance_core::{
    BlockDeviceMappingRequest, Capacity, DescribeInstances, DescribeVolumes, ErrorKind, HttpTokens,
    InstanceState, LaunchSpec, MetadataOptions, Region, RegionOptions, ShutdownBehavior,
};

/// A region and an image with a root volume and a second one.
fn world() -> (tempfile::TempDir, TestRegion, Ami<X86_64>) {
    world_of(FakeHypervisor::new(), Capacity::unlimited())
}

fn world_of(hypervisor: FakeHypervisor, capacity: Capacity) -> (tempfile::TempDir, TestRegion, Ami<X86_64>) {
    let dir = tempfile::tempdir().unwrap();
    let region = RegionOptions::new().capacity(capacity).open(dir.path(), hypervisor).unwrap();
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    (dir, region, ami)
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

fn reopen(dir: &tempfile::TempDir, region: TestRegion) -> TestRegion {
    drop(region);
    open(dir.path())
}

#[test]
fn what_a_launch_was_given_is_told_and_kept() {
    let (dir, region, ami) = world();
    let mut options = MetadataOptions::default();
    options.http_tokens = HttpTokens::Optional;
    options.http_put_response_hop_limit = 64;
    let spec = spec()
        .user_data([0, 159, 146, 150])
        .key_name("laptop")
        .tag("Name", "web")
        .volume_tag("Name", "web-disk")
        .shutdown_behavior(ShutdownBehavior::Terminate)
        .metadata_options(options.clone());
    let instance = region.launch(&ami, spec).unwrap();
    let id = instance.id();
    let told = instance.describe();
    drop(instance);
    let region = reopen(&dir, region);
    let instance = region.instance(id).unwrap();
    let kept = instance.describe();
    assert_eq!((kept.state, told.state), (InstanceState::Stopped, InstanceState::Running));
    for description in [told, kept] {
        assert_eq!(description.key_name.as_deref(), Some("laptop"));
        assert_eq!(description.metadata_options, options);
        assert_eq!(description.shutdown_behavior, ShutdownBehavior::Terminate);
        assert_eq!(description.tags["Name"], "web");
    }
    assert_eq!(instance.user_data().unwrap(), [0, 159, 146, 150]);
    let volumes = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    assert!(volumes.len() == 2 && volumes.iter().all(|v| v.tags.get("Name") == Some("web-disk")));
}

#[test]
fn what_no_launch_can_have_is_refused_before_anything_is_made() {
    let (dir, region, ami) = world();
    let before = files(dir.path());
    let many = |n: usize| (0..n).fold(spec(), |spec, i| spec.tag(i.to_string(), ""));
    let hops = |n: u8| {
        let mut options = MetadataOptions::default();
        options.http_put_response_hop_limit = n;
        spec().metadata_options(options)
    };
    let mut by_ipv6 = MetadataOptions::default();
    by_ipv6.http_protocol_ipv6 = true;
    let mut tags_as_metadata = MetadataOptions::default();
    tags_as_metadata.instance_metadata_tags = true;
    let device = |mapping: BlockDeviceMappingRequest| spec().block_device(mapping);
    let blank = |name: &str, gib| BlockDeviceMappingRequest::new(name).size_gib(gib);
    let gone = Digest::of(b"gone");
    let (parameter, mapping) = (ErrorKind::InvalidParameter, ErrorKind::InvalidBlockDeviceMapping);
    let (invalid, bad_mapping) = ("InvalidParameterValue", "InvalidBlockDeviceMapping");
    let table = [
        (spec().count(0, 1), parameter, invalid),
        (spec().count(2, 1), parameter, invalid),
        (spec().user_data(vec![0; 16 * 1024 + 1]), parameter, invalid),
        (spec().key_name(""), parameter, invalid),
        (spec().key_name("k".repeat(256)), parameter, invalid),
        (spec().client_token("t".repeat(65)), parameter, invalid),
        (spec().client_token("\u{e4}"), parameter, invalid),
        (many(51), ErrorKind::TagLimitExceeded, "TagLimitExceeded"),
        (spec().tag("k".repeat(129), ""), ErrorKind::MalformedTagKey, "InvalidTagKey.Malformed"),
        (spec().tag("k", "v".repeat(257)), parameter, invalid),
        (spec().volume_tag("aws:k", ""), ErrorKind::MalformedTagKey, "InvalidTagKey.Malformed"),
        (hops(0), parameter, invalid),
        (hops(65), parameter, invalid),
        (spec().metadata_options(by_ipv6), ErrorKind::Unsupported, "UnsupportedOperation"),
        (spec().tag("a/b", "").metadata_options(tags_as_metadata), parameter, invalid),
        (device(blank("/dev/hda", 1)), mapping, bad_mapping),
        (device(blank("/dev/sdg", 0)), mapping, bad_mapping),
        (device(blank("/dev/sdg", 1)).block_device(blank("/dev/xvdg", 1)), mapping, bad_mapping),
        (device(BlockDeviceMappingRequest::no_device("/dev/sda1")), mapping, bad_mapping),
        (
            device(BlockDeviceMappingRequest::new("/dev/xvda").snapshot(gone).size_gib(1)),
            mapping,
            bad_mapping,
        ),
        (device(blank("/dev/xvda", 500).volume_type(VolumeType::St1)), mapping, bad_mapping),
        (
            device(BlockDeviceMappingRequest::new("/dev/sdg").snapshot(gone).size_gib(1)),
            ErrorKind::SnapshotNotFound,
            "InvalidSnapshot.NotFound",
        ),
        (
            device(blank("/dev/sdg", 1).encrypted(true)),
            ErrorKind::KeyUnavailable,
            "InvalidKMSKey.InvalidState",
        ),
        (device(BlockDeviceMappingRequest::ephemeral("/dev/sdg", "ephemeral24")), mapping, bad_mapping),
    ];
    for (spec, kind, code) in table {
        let what = format!("{spec:?}");
        let refused = region.run_instances(&ami, spec).err().unwrap_or_else(|| panic!("{what}"));
        check(&refused, kind, code, &[]);
    }
    let two = region.launch(&ami, spec().count(1, 2)).unwrap_err();
    check(&two, ErrorKind::InvalidParameterCombination, "InvalidParameterCombination", &[]);
    assert_eq!(files(dir.path()), before);
    assert!(region.instances().is_empty());
    // The limits themselves can be had.
    let most = many(50).user_data(vec![0; 16 * 1024]).key_name("k".repeat(255)).client_token("t".repeat(64));
    region.launch(&ami, most).unwrap();
}

#[test]
fn a_launch_changes_the_disks_of_its_instance_alone() {
    let (_dir, region, ami) = world();
    let spec = spec()
        .block_device(BlockDeviceMappingRequest::new("/dev/sda1").size_gib(20).delete_on_termination(false))
        .block_device(BlockDeviceMappingRequest::no_device("/dev/sdf"))
        .block_device(BlockDeviceMappingRequest::no_device("/dev/sdz"))
        .block_device(BlockDeviceMappingRequest::new("/dev/sdg").size_gib(3).volume_type(VolumeType::Gp2));
    let instance = region.launch(&ami, spec).unwrap();
    let told = instance.describe();
    let volumes = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    let disks: Vec<_> = (told.attachments.iter())
        .map(|a| {
            let volume = volumes.iter().find(|v| v.id == a.volume_id).unwrap();
            (a.device_name.as_str(), volume.size_gib, volume.volume_type, a.delete_on_termination)
        })
        .collect();
    let expected = [("/dev/xvda", 20, VolumeType::Gp3, false), ("/dev/sdg", 3, VolumeType::Gp2, true)];
    assert_eq!(disks, expected);
    // The root volume has the image's content, and an image of the instance has its disks.
    let child = instance.create_image("child").unwrap().ami;
    let sizes: BTreeSet<_> = (child.manifest().block_device_mappings().iter())
        .map(|m| (m.device_name().to_owned(), m.as_ebs().unwrap().volume_size_gib()))
        .collect();
    assert_eq!(sizes, BTreeSet::from([("/dev/sdg".to_owned(), 3), ("/dev/xvda".to_owned(), 20)]));
    assert_eq!(
        region
            .launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap()))
            .unwrap()
            .describe()
            .attachments
            .len(),
        2
    );

    // The content of an account's own snapshot, if it fits.
    let snapshot = region.create_snapshot(told.attachments[0].volume_id, "").unwrap();
    let with = |gib| {
        LaunchSpec::new("t2.nano".parse().unwrap()).block_device(
            BlockDeviceMappingRequest::new("/dev/sdh").snapshot(snapshot.digest.unwrap()).size_gib(gib),
        )
    };
    region.launch(&ami, with(20)).unwrap();
    let small = region.launch(&ami, with(19)).unwrap_err();
    check(&small, ErrorKind::InvalidBlockDeviceMapping, "InvalidBlockDeviceMapping", &["20 GiB"]);
    let stranger = region.as_account("222222222222".parse().unwrap());
    let share = ami_core::ModifyImageAttribute::new().add_launch_permission(ami_core::Grantee::All);
    region.modify_image_attribute(ami.id(), &share).unwrap();
    let refused = stranger.launch(&ami, with(20)).unwrap_err();
    check(&refused, ErrorKind::SnapshotNotFound, "InvalidSnapshot.NotFound", &[]);
}

/// A root volume that is to be larger is kept all the same, with what is on it.
#[test]
fn what_a_launch_leaves_unsaid_of_a_disk_is_the_images() {
    let (_dir, region, ami) = world();
    let of_image = BlockDeviceMappingRequest::new("/dev/xvda").volume_type(VolumeType::Gp2);
    let first = region.launch(&ami, spec().block_device(of_image.delete_on_termination(false))).unwrap();
    let kept = first.create_image("kept").unwrap().ami.typed::<X86_64>().unwrap();
    let larger = || BlockDeviceMappingRequest::new("/dev/sda1").size_gib(20);
    region.create_launch_template("larger", LaunchSpec::default().block_device(larger())).unwrap();
    let by_template = || {
        let version = instance_core::TemplateVersion::Default;
        region
            .launch_from_template("larger", version, spec().image_id(kept.id()))
            .unwrap()
            .instances
            .remove(0)
    };
    let by_itself = region.launch(&kept, spec().block_device(larger())).unwrap();
    for instance in [by_itself, by_template()] {
        let root = instance.describe().attachments[0].clone();
        assert_eq!((root.device_name.as_str(), root.delete_on_termination), ("/dev/xvda", false));
        instance.terminate().unwrap();
        let kept = region.describe_volumes(&DescribeVolumes::new().id(root.volume_id)).unwrap().items;
        assert_eq!((kept[0].size_gib, kept[0].volume_type), (20, VolumeType::Gp2));
    }
    // So is a disk of an instance in an image of it.
    let larger = instance_core::CreateImage::new("larger").block_device(larger());
    let made = first.create_image(larger).unwrap().ami;
    let root = made.manifest().root_device().unwrap().as_ebs().unwrap();
    assert_eq!((root.volume_size_gib(), root.volume_type()), (20, VolumeType::Gp2));
    assert!(!root.delete_on_termination());
}

#[test]
fn a_token_is_good_for_one_launch() {
    let (dir, region, ami) = world();
    let asked = || spec().count(2, 3).client_token("once");
    let ids = |region: &TestRegion, spec: LaunchSpec| -> BTreeSet<String> {
        let instances = region.run_instances(&ami, spec).unwrap().instances;
        instances.iter().map(|i| i.id().to_string()).collect()
    };
    // Whoever asks, and as often as they ask at once.
    let start = Barrier::new(4);
    let all: Vec<BTreeSet<String>> = std::thread::scope(|scope| {
        let ask = || {
            start.wait();
            ids(&region, asked())
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(all[0].len() == 3 && all.iter().all(|ids| *ids == all[0]), "{all:?}");
    assert_eq!(region.instances().len(), 3);
    let other = region.run_instances(&ami, asked().tag("Name", "other")).unwrap_err();
    check(&other, ErrorKind::IdempotentParameterMismatch, "IdempotentParameterMismatch", &["once"]);
    region.run_instances(&ami, asked().tag("Name", "other").dry_run(true)).unwrap_err();

    // Another account's token is another.
    let stranger = region.as_account("222222222222".parse().unwrap());
    let share = ami_core::ModifyImageAttribute::new().add_launch_permission(ami_core::Grantee::All);
    region.modify_image_attribute(ami.id(), &share).unwrap();
    assert!(ids(&stranger, asked()).is_disjoint(&all[0]));

    drop(stranger);
    let region = reopen(&dir, region);
    assert_eq!(ids(&region, asked()), all[0], "it is remembered with the instances");
    region.run_instances(&ami, asked().user_data("other")).unwrap_err();

    // Also of those that are terminated, for as long as the region tells of them; of a launch of which nothing else is left
    // that is said.
    let terminate = |id: &String| region.instance(id.parse().unwrap()).unwrap().terminate().unwrap();
    all[0].iter().skip(1).for_each(terminate);
    assert_eq!(ids(&region, asked()), all[0]);
    all[0].iter().take(1).for_each(terminate);
    let region = reopen(&dir, region);
    let ended = region.run_instances(&ami, asked()).unwrap_err();
    check(&ended, ErrorKind::IdempotentInstanceTerminated, "IdempotentInstanceTerminated", &["once"]);
    let other = region.run_instances(&ami, asked().user_data("other")).unwrap_err();
    assert_eq!(other.kind(), ErrorKind::IdempotentParameterMismatch);
    let gone = region.instance(all[0].first().unwrap().parse().unwrap()).unwrap().describe();
    assert_eq!(gone.state, InstanceState::Terminated);
    let why = gone.state_transition_reason.clone();
    assert!(why.starts_with("User initiated (20") && why.ends_with(" GMT)"), "{why}");
    let asked_for = DescribeInstances::new().filter("reason", ["User initiated*"]);
    assert_eq!(region.describe_instances(&asked_for).unwrap().items.len(), 3);
}

#[test]
fn a_token_is_free_again_after_a_launch_that_failed() {
    let hypervisor = FakeHypervisor::new();
    let (_dir, region, ami) = world_of(hypervisor.clone(), Capacity::unlimited());
    hypervisor.fail_next_create();
    let asked = || spec().client_token("again");
    assert_eq!(region.launch(&ami, asked()).unwrap_err().kind(), ErrorKind::Hypervisor);
    let made = region.launch(&ami, asked()).unwrap();
    assert_eq!(region.launch(&ami, asked()).unwrap().id(), made.id());
}

/// Who follows the states of instances is told of those that no store has held, too.
#[test]
fn a_launch_that_fails_is_told_of_and_leaves_nothing() {
    let hypervisor = FakeHypervisor::new();
    let (dir, region, ami) = world_of(hypervisor.clone(), Capacity::unlimited());
    let changes = region.state_changes();
    hypervisor.fail_next_create();
    region.launch(&ami, spec()).unwrap_err();
    let told: Vec<_> = changes.try_iter().collect();
    let states: Vec<_> = told.iter().map(|change| change.state).collect();
    assert_eq!(states, [InstanceState::Pending, InstanceState::Terminated]);
    assert!(told.iter().all(|change| change.instance_id == told[0].instance_id));
    assert_eq!(told[1].reason.as_ref().unwrap().code, "Server.InternalError");
    assert!(region.instance(told[0].instance_id).is_err());
    drop(region);
    assert!(open(dir.path()).instances().is_empty());
}

#[test]
fn as_many_are_launched_as_can_be_and_none_below_the_minimum() {
    let hypervisor = FakeHypervisor::new();
    // Room for four: t2.nano has one vCPU and 512 MiB.
    let (dir, region, ami) = world_of(hypervisor.clone(), Capacity::new(4, 1 << 20));
    let run = |min, max| region.run_instances(&ami, spec().count(min, max)).map(|r| r.instances);
    let before = files(dir.path());
    check(
        &run(5, 9).unwrap_err(),
        ErrorKind::InsufficientCapacity,
        "InsufficientInstanceCapacity",
        &["0 vCPUs"],
    );
    assert_eq!((files(dir.path()), region.used_capacity()), (before.clone(), (0, 0)));

    // One that fails takes the others with it if they are too few.
    hypervisor.fail_next_create();
    assert_eq!(run(3, 3).unwrap_err().kind(), ErrorKind::Hypervisor);
    assert_eq!((files(dir.path()), region.used_capacity()), (before, (0, 0)));
    assert!(region.instances().is_empty());
    hypervisor.fail_next_create();
    let two = run(2, 3).unwrap();
    assert_eq!((two.len(), region.instances().len(), region.used_capacity()), (2, 2, (2, 1024)));
    assert!(two.iter().all(|i| i.state() == InstanceState::Running));

    let four = run(1, 9).unwrap();
    assert_eq!((four.len(), region.used_capacity()), (2, (4, 2048)));
    let reservation: BTreeSet<_> = four.iter().map(|i| i.describe().reservation_id).collect();
    let places: BTreeSet<_> = four.iter().map(|i| i.describe().launch_index).collect();
    assert_eq!((reservation.len(), places), (1, BTreeSet::from([0, 1])));

    // What is stopped takes nothing, and must find room to start again.
    four[0].stop(Duration::ZERO).unwrap();
    four[0].set_instance_type("t2.medium".parse().unwrap()).unwrap();
    check(
        &four[0].start().unwrap_err(),
        ErrorKind::InsufficientCapacity,
        "InsufficientInstanceCapacity",
        &["t2.medium"],
    );
    assert_eq!((four[0].state(), region.used_capacity()), (InstanceState::Stopped, (3, 1536)));
    two[0].terminate().unwrap();
    four[0].start().unwrap();
    assert_eq!(region.used_capacity(), (4, 512 * 2 + 4096));
    four[0].reboot().unwrap();
    assert_eq!(region.used_capacity(), (4, 512 * 2 + 4096), "a reboot keeps its place");
    four[1].console().write_all(b"poweroff\n", soon()).unwrap();
    four[1].wait_for(InstanceState::Stopped, soon()).unwrap();
    assert_eq!(region.used_capacity(), (3, 512 + 4096));
    // The one that was terminated is still told of.
    assert_eq!(region.describe_instances(&DescribeInstances::new()).unwrap().items.len(), 4);
}

#[test]
fn protection_holds_until_it_is_taken_back() {
    let (dir, region, ami) = world();
    let against = |protected: LaunchSpec| region.launch(&ami, protected).unwrap();
    let terminating = against(spec().termination_protection(true));
    let stopping = against(spec().stop_protection(true));
    let refused = |result: instance_core::Result<()>| {
        check(&result.unwrap_err(), ErrorKind::OperationNotPermitted, "OperationNotPermitted", &[]);
    };
    refused(terminating.terminate());
    refused(stopping.terminate());
    refused(stopping.stop(Duration::ZERO));
    stopping.reboot().unwrap();
    terminating.stop(Duration::ZERO).unwrap();
    refused(terminating.terminate());
    let (one, two) = (terminating.id(), stopping.id());
    drop((terminating, stopping));
    let region = {
        drop(region);
        open(dir.path())
    };
    let (terminating, stopping) = (region.instance(one).unwrap(), region.instance(two).unwrap());
    refused(terminating.terminate());
    terminating.set_termination_protection(false).unwrap();
    terminating.terminate().unwrap();
    let late = terminating.set_termination_protection(true).unwrap_err();
    check(&late, ErrorKind::IncorrectInstanceState, "IncorrectInstanceState", &["terminated"]);

    // A guest that powers itself off is not protected against itself.
    stopping.set_shutdown_behavior(ShutdownBehavior::Terminate).unwrap();
    stopping.start().unwrap();
    stopping.console().write_all(b"poweroff\n", soon()).unwrap();
    stopping.wait_for(InstanceState::Terminated, soon()).unwrap();
}

#[test]
fn what_is_changed_while_stopped_is_refused_while_running() {
    let (_dir, region, ami) = world();
    let instance = region.launch(&ami, spec()).unwrap();
    let hardware = || "t2.micro".parse().unwrap();
    let state = (ErrorKind::IncorrectInstanceState, "IncorrectInstanceState");
    check(&instance.set_instance_type(hardware()).unwrap_err(), state.0, state.1, &["running"]);
    check(&instance.set_user_data(None).unwrap_err(), state.0, state.1, &["running"]);
    instance.stop(Duration::ZERO).unwrap();
    let arm = instance.set_instance_type("t4g.nano".parse().unwrap()).unwrap_err();
    check(&arm, ErrorKind::ArchitectureMismatch, "InvalidParameterValue", &["t4g.nano"]);
    let long = instance.set_user_data(Some(vec![0; 16 * 1024 + 1])).unwrap_err();
    check(&long, ErrorKind::InvalidParameter, "InvalidParameterValue", &["16384"]);
    instance.set_instance_type(hardware()).unwrap();
    instance.set_user_data(Some(b"new".to_vec())).unwrap();
    let before = instance.describe().launch_time;
    instance.start().unwrap();
    let described = instance.describe();
    assert_eq!((described.instance_type, instance.user_data()), (hardware(), Some(b"new".to_vec())));
    assert!(described.launch_time >= before);
    assert_eq!(region.used_capacity(), (1, 1024));
}

#[test]
fn launches_from_many_threads_are_all_there_and_none_twice() {
    let (dir, region, ami) = world();
    const EACH: usize = 8;
    let ids: Vec<String> = std::thread::scope(|scope| {
        let launch = || (0..EACH).map(|_| region.launch(&ami, spec()).unwrap().id().to_string()).collect();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(launch)).collect();
        threads.into_iter().flat_map(|t| -> Vec<String> { t.join().unwrap() }).collect()
    });
    let made: BTreeSet<String> = ids.iter().cloned().collect();
    assert_eq!((ids.len(), made.len()), (8 * EACH, 8 * EACH));
    let found = |region: &TestRegion| -> BTreeSet<String> {
        region.instances().iter().map(|i| i.id().to_string()).collect()
    };
    assert_eq!(found(&region), made);
    let region: Region<FakeHypervisor> = reopen(&dir, region);
    assert_eq!(found(&region), made);
}

/// No instance type has an instance store, and EC2 passes over what is mapped to one then.
#[test]
fn instance_store_and_what_is_left_out_are_no_disks() {
    let (_dir, region, ami) = world();
    let spec = spec()
        .block_device(BlockDeviceMappingRequest::ephemeral("/dev/sdb", "ephemeral0"))
        .block_device(BlockDeviceMappingRequest::ephemeral("/dev/sdf", "ephemeral1"))
        .block_device(BlockDeviceMappingRequest::no_device("/dev/sdh"))
        .block_device(BlockDeviceMappingRequest::new("/dev/sdg").size_gib(2));
    let server = region.launch(&ami, spec).unwrap();
    let devices: Vec<String> = server.describe().attachments.iter().map(|a| a.device_name.clone()).collect();
    assert_eq!(devices, ["/dev/xvda", "/dev/sdg"], "the image's disk at /dev/sdf has given way");
}
