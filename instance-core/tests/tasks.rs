//! Tasks that import and export images: what they tell, how they end, and what they leave.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::ops::ControlFlow;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ami_core::{Ami, AmiBuilder, BlockDeviceMapping, ImdsSupport, X86_64};
use common::slow::slow;
use common::{PATIENCE, check, disk, everything, files, launch, open, register, soon, told, try_open};
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{
    DescribeExportImageTasks, DescribeImportImageTasks, DirectBoot, ErrorKind, Exported, ImportImage,
    InstanceState, RegionOptions, TaskDescription, TaskStatus, Tell,
};
use storage_block::Disk;
use storage_block::keys::LocalKey;

fn builder(name: &str) -> AmiBuilder<X86_64> {
    Ami::<X86_64>::builder(name)
}

fn boot() -> Option<DirectBoot> {
    Some(DirectBoot::new(tiny_elf(), None, ""))
}

#[test]
fn an_import_tells_how_far_it_is_and_makes_what_registering_makes() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let content = disk(8, 7);
    let (held, go) = slow(content.clone());
    let task = region.import_image(builder("imported"), held, boot()).unwrap();
    assert_eq!((task.describe().status, task.describe().image_id), (TaskStatus::Active, None));
    assert!(task.id().to_string().starts_with("import-ami-"));
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = told.clone();
    task.watch().subscribe(move |t: &TaskDescription<_>| sink.lock().unwrap().push((t.progress, t.status)));
    drop(go);
    let ended = task.wait(soon()).unwrap();
    assert_eq!((ended.status, ended.progress), (TaskStatus::Completed, 100));
    let told = told.lock().unwrap();
    assert!(told.is_sorted_by_key(|(percent, _)| *percent) && told.len() > 2, "{told:?}");
    let early = told.iter().filter(|(_, status)| *status == TaskStatus::Active);
    assert!(early.clone().all(|(percent, _)| *percent < 100) && early.count() > 1, "{told:?}");

    let image = region.image(ended.image_id.unwrap()).unwrap();
    let registered = open(&dir.path().join("other"));
    let same = registered
        .register_image(builder("imported"), instance_core::ImageSource::new(&content).boot(boot().unwrap()));
    assert_eq!(image.ami().digest(), same.unwrap().digest());
    launch(&region, &image.ami().typed::<X86_64>().unwrap()).unwrap();
    assert_eq!(task.cancel().unwrap_err().kind(), ErrorKind::IncorrectState);
    assert_eq!(region.import_image_task(task.id()).unwrap().describe(), ended);
}

#[test]
fn an_import_that_is_cancelled_or_fails_leaves_nothing_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    register(&region, "taken", &disk(1, 1)).unwrap();
    let names = |all: std::collections::BTreeMap<String, String>| -> Vec<String> {
        all.into_keys().filter(|name| !name.contains("/packs/")).collect()
    };
    let before = names(everything(&region, dir.path()));
    let (held, go) = slow(disk(8, 7));
    let task = region.import_image(builder("new"), held, boot()).unwrap();
    task.cancel().unwrap();
    assert_eq!(task.describe().status, TaskStatus::Deleting);
    task.cancel().unwrap();
    drop(go);
    let why = task.wait(soon()).unwrap_err();
    check(&why, ErrorKind::Cancelled, "InternalError", &[]);
    assert_eq!((task.describe().status, task.describe().image_id), (TaskStatus::Deleted, None));

    for (name, content, boot, kind, code) in [
        ("taken", disk(1, 7), boot(), ErrorKind::ImageNameDuplicate, "InvalidAMIName.Duplicate"),
        ("x", disk(1, 7), boot(), ErrorKind::MalformedImageName, "InvalidAMIName.Malformed"),
        ("new", disk(1, 7), None, ErrorKind::NotBootable, "ImportFailed.UnsupportedDisk"),
    ] {
        let task = region.import_image(builder(name), content, boot).unwrap();
        check(&task.wait(soon()).unwrap_err(), kind, code, &[]);
        let told = task.describe();
        assert!(told.status == TaskStatus::Deleted && !told.status_message.is_empty(), "{told:?}");
    }
    assert_eq!(names(everything(&region, dir.path())), before);
    let count =
        |request: DescribeImportImageTasks| region.describe_import_image_tasks(&request).unwrap().items.len();
    assert_eq!(count(DescribeImportImageTasks::new()), 4);
    assert_eq!(count(DescribeImportImageTasks::new().filter("task-state", ["deleted"])), 4);
    assert_eq!(count(DescribeImportImageTasks::new().filter("task-state", ["completed"])), 0);
    let gone = "import-ami-0123456789abcdef0".parse().unwrap();
    let missing = region.describe_import_image_tasks(&DescribeImportImageTasks::new().id(gone)).unwrap_err();
    check(&missing, ErrorKind::TaskNotFound, "InvalidConversionTaskId", &[]);
    // They are the account's.
    let friend = region.as_account("222222222222".parse().unwrap());
    check(
        &friend.import_image_task(task.id()).unwrap_err(),
        ErrorKind::TaskNotFound,
        "InvalidConversionTaskId",
        &[],
    );
}

#[test]
fn an_import_is_encrypted_and_says_what_registering_says() {
    let dir = tempfile::tempdir().unwrap();
    let keys = Arc::new(LocalKey::generate().unwrap());
    let region = RegionOptions::new().keys(keys).open(dir.path(), FakeHypervisor::new()).unwrap();
    let how = ImportImage::new().boot(boot().unwrap()).encrypted(true).imds_support(ImdsSupport::V2_0);
    let root = BlockDeviceMapping::blank("/dev/sda1", 9);
    let named = builder("web").root_device("/dev/sda1").block_device(root);
    let made = region.import_image(named, disk(1, 7), how).unwrap().wait(soon()).unwrap();
    let image = region.image(made.image_id.unwrap()).unwrap();
    assert_eq!(image.imds_support(), Some(ImdsSupport::V2_0));
    let root = image.ami().manifest().root_device().unwrap();
    let volume = root.as_ebs().unwrap();
    assert_eq!((root.device_name(), volume.encrypted(), volume.volume_size_gib()), ("/dev/sda1", true, 9));
    launch(&region, &image.ami().typed::<X86_64>().unwrap()).unwrap();
}

/// What names content goes at once, and others begin to make some; only its bytes stay for as long as something is being made.
#[test]
fn nobody_waits_for_an_import_to_remove_an_image_or_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "base", &disk(1, 1)).unwrap();
    let server = launch(&region, &ami).unwrap();
    let snapshot = region.create_snapshot(server.describe().attachments[1].volume_id, "").unwrap();
    server.terminate().unwrap();
    let stored = || std::fs::read_dir(dir.path().join("blocks/snapshots")).unwrap().count();
    assert_eq!(stored(), 2);

    let (held, go) = slow(disk(8, 7));
    let task = region.import_image(builder("new"), held, boot()).unwrap();
    let (done, all_done) = mpsc::channel();
    let (other, gone) = (region.clone(), ami.id());
    std::thread::spawn(move || {
        other.deregister_image(gone).unwrap();
        other.delete_snapshot(snapshot.id).unwrap();
        register(&other, "another", &disk(1, 2)).unwrap();
        done.send(()).unwrap();
    });
    all_done.recv_timeout(PATIENCE).expect("somebody waits for the import");
    assert_eq!(task.describe().status, TaskStatus::Active);
    assert!(region.image(gone).is_err());
    assert_eq!(stored(), 3, "of what was being made nobody knows what it needs");
    drop(go);
    task.wait(soon()).unwrap();
    assert_eq!(stored(), 2, "the last who makes something collects");
}

#[test]
fn closing_a_region_ends_its_tasks_and_nothing_is_left_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let before: Vec<String> = files(dir.path()).into_keys().collect();
    let (held, go) = slow(disk(8, 7));
    let task = region.import_image(builder("new"), held, boot()).unwrap();
    let letting = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(go);
    });
    drop(region);
    assert!(task.describe().status.has_ended(), "the region has waited for it");
    letting.join().unwrap();
    let region = open(dir.path());
    assert!(region.images().unwrap().is_empty());
    let known = region.import_image_task(task.id()).unwrap().describe();
    assert_eq!((known.status, known.status_message.is_empty()), (TaskStatus::Deleted, false));
    assert_eq!(known, task.describe());
    let after: Vec<String> = files(dir.path()).into_keys().collect();
    let kept =
        |all: Vec<String>| -> Vec<String> { all.into_iter().filter(|n| !n.contains("/packs")).collect() };
    assert_eq!(kept(after), kept(before));
}

/// Who is told of something in such a thread may hold what tasks wait for.
#[test]
fn a_region_that_is_closed_in_a_thread_of_its_own_waits_for_no_task() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let server = launch(&region, &ami).unwrap();
    let ((go, wait), (begun, has_begun)) = (mpsc::channel::<()>(), mpsc::channel());
    let wait = move |_: &Disk, _: &mut Tell<'_>| {
        begun.send(())?;
        Ok(wait.recv()?)
    };
    let task = region.export_image(ami.id(), "/dev/xvda", wait).unwrap();
    has_begun.recv().unwrap();
    let (dropped, is_dropped) = mpsc::channel();
    let last = Mutex::new(Some((region, go)));
    server.watch().subscribe(move |_| {
        let Some((region, go)) = last.lock().unwrap().take() else { return };
        drop(region);
        dropped.send(()).unwrap();
        drop(go);
    });
    let console = server.console();
    drop(server);
    console.write_all(b"crash\n", soon()).unwrap();
    is_dropped.recv_timeout(PATIENCE).unwrap();
    let ended = task.wait(soon()).unwrap_err();
    check(&ended, ErrorKind::Internal, "InternalError", &["the region was closed"]);
    let region = loop {
        match try_open(dir.path()) {
            // With the last of its threads.
            Err(e) if e.kind() == ErrorKind::RegionInUse => std::thread::yield_now(),
            opened => break opened.unwrap_or_else(|e| panic!("{}", told(&e))),
        }
    };
    assert_eq!(region.images().unwrap().len(), 1);
    assert_eq!(region.instances()[0].state(), InstanceState::Stopped);
    assert_eq!(region.export_image_task(task.id()).unwrap().describe(), task.describe());
}

#[test]
fn an_export_gives_the_bytes_and_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(&dir.path().join("region"));
    let content = disk(2, 7);
    let ami = register(&region, "base", &content).unwrap();
    let (sender, receiver) = mpsc::channel();
    let task = region
        .export_image(ami.id(), "/dev/xvda", move |disk: &Disk, tell: &mut Tell<'_>| {
            let mut bytes = vec![0; disk.size() as usize];
            disk.read_at(&mut bytes, 0)?;
            assert!(tell(1, 4).is_continue());
            sender.send(bytes)?;
            Ok(())
        })
        .unwrap();
    assert!(task.id().to_string().starts_with("export-ami-"));
    assert_eq!(task.wait(soon()).unwrap().image_id, Some(ami.id()));
    let mut wanted = vec![0; content.size() as usize];
    content.read_at(&mut wanted, 0).unwrap();
    assert_eq!(receiver.recv().unwrap(), wanted);

    // One that goes on until it is told not to; the image may go meanwhile.
    let endless = |_: &Disk, tell: &mut Tell<'_>| {
        while tell(3, 4) == ControlFlow::Continue(()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("told not to go on".into())
    };
    let task = region.export_image(ami.id(), "/dev/xvda", endless).unwrap();
    assert_eq!(task.watch().wait(soon(), |t| t.progress == 75).unwrap().status, TaskStatus::Active);
    let late = task.wait(Instant::now()).unwrap_err();
    check(&late, ErrorKind::IncorrectState, "IncorrectState", &["active at the deadline"]);
    task.cancel().unwrap();
    check(&task.wait(soon()).unwrap_err(), ErrorKind::Cancelled, "InternalError", &["told not to go on"]);

    let broken = |_: &Disk, _: &mut Tell<'_>| Err("the disk is full".into());
    let task = region.export_image(ami.id(), "/dev/xvda", broken).unwrap();
    check(&task.wait(soon()).unwrap_err(), ErrorKind::Internal, "InternalError", &["the disk is full"]);
    let panics = |_: &Disk, _: &mut Tell<'_>| -> Exported { panic!("a sink of one's own") };
    let task = region.export_image(ami.id(), "/dev/xvda", panics).unwrap();
    check(&task.wait(soon()).unwrap_err(), ErrorKind::Internal, "InternalError", &["panicked"]);

    let none = region.export_image(ami.id(), "/dev/sdf", endless).unwrap_err();
    check(&none, ErrorKind::InvalidBlockDeviceMapping, "InvalidBlockDeviceMapping", &[]);
    let gone = "export-ami-0123456789abcdef0".parse().unwrap();
    let missing = region.describe_export_image_tasks(&DescribeExportImageTasks::new().id(gone)).unwrap_err();
    check(&missing, ErrorKind::ExportTaskNotFound, "InvalidExportTaskID.NotFound", &[]);

    // Twenty at once, and no more.
    let tasks: Vec<_> =
        (0..20).map(|_| region.export_image(ami.id(), "/dev/xvda", endless).unwrap()).collect();
    let more = region.export_image(ami.id(), "/dev/xvda", endless).unwrap_err();
    check(&more, ErrorKind::ResourceLimitExceeded, "ResourceLimitExceeded", &[]);
    let active = DescribeExportImageTasks::new().filter("task-state", ["active"]).max_results(5);
    let page = region.describe_export_image_tasks(&active).unwrap();
    assert!(page.items.len() == 5 && page.next_token.is_some());
    tasks[0].cancel().unwrap();
    assert!(tasks[0].wait(soon()).is_err());
    drop(region.export_image(ami.id(), "/dev/xvda", endless).unwrap());
    drop(region);
    assert!(tasks.iter().all(|task| task.describe().status == TaskStatus::Deleted));
}
