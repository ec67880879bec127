//! Images that are being made, or could not be: known by name, since they have no ids.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use ami_core::{Ami, AmiBuilder, ImageState, X86_64};
use common::slow::slow;
use common::{TestRegion, check, disk, open, register, soon};
use instance_core::testing::tiny_elf;
use instance_core::{
    CopyImage, DirectBoot, ErrorKind, ImportImageTask, TaskDescription, TaskStatus, UnfinishedImage,
};

fn builder(name: &str) -> AmiBuilder<X86_64> {
    Ami::<X86_64>::builder(name)
}

fn boot() -> Option<DirectBoot> {
    Some(DirectBoot::new(tiny_elf(), None, ""))
}

/// An import that does not go on before its other end is dropped.
fn held(region: &TestRegion, name: &str) -> (ImportImageTask, mpsc::Sender<()>) {
    let (disk, go) = slow(disk(1, 7));
    (region.import_image(builder(name), disk, boot()).unwrap(), go)
}

fn states(region: &TestRegion) -> Vec<(String, ImageState)> {
    region.unfinished_images().into_iter().map(|image| (image.name, image.state)).collect()
}

#[test]
fn an_image_is_pending_under_its_name_until_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (task, go) = held(&region, "web");
    let [UnfinishedImage { name, owner, task_id, state, state_reason, progress, .. }] =
        &region.unfinished_images()[..]
    else {
        panic!()
    };
    assert_eq!((name.as_str(), owner, *state), ("web", region.account(), ImageState::Pending));
    assert_eq!((task_id, state_reason, *progress), (&task.id().to_string(), &None, 0));
    let late = region.wait_for_image_named("web", Instant::now() + Duration::from_millis(1)).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::IncorrectState);
    // It is the account's.
    let friend = region.as_account("222222222222".parse().unwrap());
    assert!(friend.unfinished_images().is_empty());
    check(
        &friend.wait_for_image_named("web", soon()).unwrap_err(),
        ErrorKind::ImageNotFound,
        "InvalidAMIID.NotFound",
        &["web"],
    );

    let image = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| region.wait_for_image_named("web", soon()).unwrap());
        drop(go);
        waiting.join().unwrap()
    });
    assert_eq!((image.ami().name(), image.state()), ("web", ImageState::Available));
    assert_eq!(task.wait(soon()).unwrap().image_id, Some(image.id()));
    assert!(states(&region).is_empty(), "what is finished is an image");
    assert_eq!(region.wait_for_image_named("web", Instant::now()).unwrap(), image);
    region.deregister_image(image.id()).unwrap();
    let gone = region.wait_for_image_named("web", soon()).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::ImageNotFound);
}

#[test]
fn an_image_that_could_not_be_made_has_failed_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let (region, other) = (open(&dir.path().join("here")), open(&dir.path().join("there")));
    let taken = register(&other, "taken", &disk(1, 1)).unwrap();
    region.import_image(builder("no-kernel"), disk(1, 2), None).unwrap().wait(soon()).unwrap_err();
    register(&region, "taken", &disk(1, 3)).unwrap();
    let copy = region.begin_copy_image_from(&other, taken.id(), CopyImage::new("taken")).unwrap();
    let refused = copy.wait(soon()).unwrap_err();
    // A name that is taken is found by itself, whoever else has tried.
    assert_eq!(region.wait_for_image_named("taken", soon()).unwrap().source_image(), None);
    let reasons = |region: &TestRegion| {
        let all = region.unfinished_images().into_iter();
        let reason = |i: UnfinishedImage| (i.name, i.state, i.state_reason.unwrap().code);
        all.map(reason).collect::<Vec<_>>()
    };
    let failed = |name: &str, code: &str| (name.to_owned(), ImageState::Failed, code.to_owned());
    let expected = [
        failed("no-kernel", "Client.ImportFailed.UnsupportedDisk"),
        failed("taken", "Client.InvalidAMIName.Duplicate"),
    ];
    assert_eq!(reasons(&region), expected);
    assert_eq!(region.unfinished_images()[1].state_reason.as_ref().unwrap().message, refused.to_string());
    let why = region.wait_for_image_named("no-kernel", soon()).unwrap_err();
    check(&why, ErrorKind::NotBootable, "ImportFailed.UnsupportedDisk", &[]);

    // It is told of when the region is opened again, for an hour.
    drop(region);
    let region = open(&dir.path().join("here"));
    assert_eq!(reasons(&region), expected);
    // As what it was, by the code that is kept of it.
    for (name, kind, code) in [
        ("no-kernel", ErrorKind::NotBootable, "ImportFailed.UnsupportedDisk"),
        ("taken", ErrorKind::ImageNameDuplicate, "InvalidAMIName.Duplicate"),
    ] {
        let failed = region.unfinished_images().into_iter().find(|image| image.name == name).unwrap();
        let why = match failed.task_id.parse() {
            Ok(id) => region.import_image_task(id).unwrap().wait(soon()).unwrap_err(),
            Err(_) => {
                region.copy_image_task(failed.task_id.parse().unwrap()).unwrap().wait(soon()).unwrap_err()
            }
        };
        check(&why, kind, code, &[&failed.state_reason.unwrap().message]);
    }
    // Who tries again is told of the last try.
    region.import_image(builder("no-kernel"), disk(1, 2), boot()).unwrap();
    assert_eq!(region.wait_for_image_named("no-kernel", soon()).unwrap().state(), ImageState::Available);
    assert_eq!(reasons(&region), expected);
}

#[test]
fn what_is_cancelled_is_nowhere_and_what_a_crash_cuts_off_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(&dir.path().join("region"));
    let (task, go) = held(&region, "given-up");
    task.cancel().unwrap();
    assert_eq!(states(&region), [("given-up".to_owned(), ImageState::Pending)], "it has not ended yet");
    drop(go);
    let cancelled = region.wait_for_image_named("given-up", soon()).unwrap_err();
    assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
    assert!(states(&region).is_empty());
    assert_eq!(task.describe().state_reason.unwrap().code, "Client.UserInitiatedCancel");

    // What the disk has while one is under way is what a crash would leave.
    let (task, go) = held(&region, "cut-off");
    let crashed = dir.path().join("crashed");
    let mut copied = std::process::Command::new("cp");
    copied.args(["-a", "--"]).arg(dir.path().join("region")).arg(&crashed);
    assert!(copied.status().unwrap().success());
    drop(go);
    task.wait(soon()).unwrap();
    let crashed = open(&crashed);
    assert_eq!(states(&crashed), [("cut-off".to_owned(), ImageState::Failed)]);
    let reason = crashed.unfinished_images().remove(0).state_reason.unwrap();
    assert_eq!(reason.code, "Server.InternalError");
    assert!(reason.message.contains("the process that owned the region ended"), "{reason}");
    assert!(crashed.wait_for_image_named("cut-off", soon()).is_err());
}

/// A close is no wish of the user's, who is told as after a crash.
#[test]
fn what_the_region_is_closed_over_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (given_up, first) = held(&region, "given-up");
    given_up.cancel().unwrap();
    let (task, second) = held(&region, "cut-off");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let closing = |told: &TaskDescription<_>| told.status == TaskStatus::Deleting;
            task.watch().wait(soon(), closing).unwrap();
            drop(second);
            task.watch().wait(soon(), |told| told.status.has_ended()).unwrap();
            drop(first);
        });
        drop(region);
    });
    let closed = "the region was closed while the task was under way";
    check(&task.wait(soon()).unwrap_err(), ErrorKind::Internal, "InternalError", &[closed]);

    let region = open(dir.path());
    let [image] = &region.unfinished_images()[..] else { panic!("{:?}", states(&region)) };
    assert_eq!((image.name.as_str(), image.state), ("cut-off", ImageState::Failed));
    let reason = image.state_reason.as_ref().unwrap();
    assert_eq!((reason.code.as_str(), reason.message.as_str()), ("Server.InternalError", closed));
    let waits = |task: &ImportImageTask| region.import_image_task(task.id()).unwrap().wait(soon());
    check(&waits(&task).unwrap_err(), ErrorKind::Internal, "InternalError", &[closed]);
    assert_eq!(waits(&given_up).unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn an_image_is_waited_for_while_any_task_makes_it() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let (task, go) = held(&region, "web");
    let later = region.import_image(builder("web"), disk(1, 2), None).unwrap();
    assert_eq!(later.wait(soon()).unwrap_err().kind(), ErrorKind::NotBootable);
    let pending = region.wait_for_image_named("web", Instant::now()).unwrap_err();
    check(
        &pending,
        ErrorKind::IncorrectState,
        "IncorrectState",
        &[&task.id().to_string(), "at the deadline"],
    );
    task.cancel().unwrap();
    drop(go);
    task.wait(soon()).unwrap_err();
    let last = region.wait_for_image_named("web", soon()).unwrap_err();
    assert_eq!(last.kind(), ErrorKind::NotBootable, "of those that have ended, the last");
}
