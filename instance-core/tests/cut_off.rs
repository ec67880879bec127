//! What a crash cuts off: a launch whose volumes are not durable yet, where the host loses what no kill of a process
//! shows; and a hibernation and a task before and after each of their commits.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "common/crashes.rs"]
mod crashes;

use std::fs;
use std::time::{Duration, Instant};

use ami_core::{Ami, X86_64};
use common::{ask, disk, register};
use crashes::{Shared, crash, open};
use instance_core::testing::tiny_elf;
use instance_core::{
    BlockDeviceMappingRequest, DescribeVolumes, DirectBoot, InstanceState, LaunchSpec, TaskStatus,
};

#[test]
fn volumes_that_a_crash_took_after_their_launch_are_made_again_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let store = Shared::default();
    let region = open(dir.path(), store.clone());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap());
    let launched = region.run_instances(&ami, spec().count(2, 2)).unwrap().instances;
    let root = launched[0].describe().attachments[0].volume_id.to_string();
    // Before the volumes are noted as durable.
    let at_launch = store.copy();
    // There is something to lose.
    ask(&launched[0], "write 0 0 word", "wrote");

    for lost in [&[][..], &["log"], &["log", "overlay"]] {
        let (_after, copy, kept) = crash(dir.path(), &at_launch, &root, lost);
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
    let kept = BlockDeviceMappingRequest::new("/dev/sdk").size_gib(1).delete_on_termination(false);
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

/// At every moment there is a saved machine that belongs to its volumes, or none; and none goes on twice.
#[test]
fn a_hibernation_that_is_cut_off_has_the_guest_go_on_once_or_boot() {
    let dir = tempfile::tempdir().unwrap();
    let store = Shared::default();
    let region = open(dir.path(), store.clone());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let spec = LaunchSpec::new("t2.nano".parse().unwrap()).hibernation(true);
    let instance = region.launch(&ami, spec).unwrap();
    // Of which nothing is left that its launch would have committed later.
    instance.stop(Duration::ZERO).unwrap();
    instance.start().unwrap();
    ask(&instance, "remember thought", "remembered");
    ask(&instance, "write 0 0 flushed", "wrote");
    ask(&instance, "flush 0", "flushed");
    ask(&instance, "write 0 1 unflushed", "wrote");
    store.watch(dir.path());
    instance.hibernate(Duration::ZERO).unwrap();
    instance.start().unwrap();
    let crashes = store.crashes();
    let found: Vec<(bool, bool)> = (crashes.into_iter())
        .map(|(_after, copy, kept)| {
            let region = open(&copy, kept);
            let instance = region.instance(instance.id()).unwrap();
            assert_eq!(instance.state(), InstanceState::Stopped);
            let saved = fs::read_dir(copy.join("hibernated")).unwrap().count() == 1;
            instance.start().unwrap();
            assert_eq!(ask(&instance, "read 0 0", "data"), "flushed");
            assert_eq!(fs::read_dir(copy.join("hibernated")).unwrap().count(), 0);
            let goes_on = ask(&instance, "recall", "recalled") == "thought";
            assert!(!goes_on || ask(&instance, "read 0 1", "data") == "unflushed");
            (saved, goes_on)
        })
        .collect();
    let (boots, goes_on) = ((false, false), (true, true));
    let expected = [
        // It is `stopping`.
        [boots, boots],
        // It is `stopped`, and names what it has saved.
        [boots, goes_on],
        // It is `pending`.
        [goes_on, goes_on],
        // It is `running`, and names it no more.
        [goes_on, boots],
    ];
    assert_eq!(found, expected.concat());
}

/// A task has completed if and only if its image is there, and is told of in any case once it has begun.
#[test]
fn an_import_that_is_cut_off_is_told_of_and_has_left_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Shared::default();
    let region = open(dir.path(), store.clone());
    store.watch(dir.path());
    let boot = DirectBoot::new(tiny_elf(), None, "");
    let task = region.import_image(Ami::<X86_64>::builder("imported"), disk(1, 7), Some(boot)).unwrap();
    task.wait(Instant::now() + Duration::from_secs(60)).unwrap();
    drop(region);
    let crashes = store.crashes();
    let mut found: Vec<Option<TaskStatus>> = Vec::new();
    for (_after, copy, kept) in crashes {
        let region = open(&copy, kept.clone());
        let known = region.import_image_task(task.id()).ok().map(|task| task.describe());
        let images: Vec<_> = region.images().unwrap().iter().map(|image| image.ami().id()).collect();
        let made: Vec<_> = known.iter().filter_map(|task| task.image_id).collect();
        assert_eq!(images, made, "{known:?}");
        let stored = fs::read_dir(copy.join("blocks/snapshots")).unwrap().count();
        assert_eq!(stored, images.len(), "{known:?}");
        if let Some(known) = known.as_ref().filter(|task| task.status == TaskStatus::Deleted) {
            assert!(known.status_message.contains("the process that owned the region ended"), "{known:?}");
        }
        drop(region);
        let again = open(&copy, kept).import_image_task(task.id()).ok().map(|task| task.describe());
        assert_eq!(again, known, "once is enough");
        found.push(known.map(|task| task.status));
    }
    found.dedup();
    assert_eq!(found, [None, Some(TaskStatus::Deleted), Some(TaskStatus::Completed)]);
}
