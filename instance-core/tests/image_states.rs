//! States of images: those that are waited for, and those of images that are damaged.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;

use std::time::{Duration, Instant};

use ami_core::{DescribeImages, Filter, ImageState};
use common::{open, register, soon, spec};
use instance_core::ErrorKind;

#[test]
fn an_image_whose_content_is_damaged_becomes_invalid() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    let state = region.watch_image(ami.id()).unwrap();
    let snapshots = std::fs::read_dir(dir.path().join("blocks/snapshots")).unwrap();
    let paths: Vec<_> = snapshots.map(|entry| entry.unwrap().path()).collect();
    let whole = std::fs::read(&paths[0]).unwrap();
    std::fs::write(&paths[0], b"short").unwrap();
    let refused = region.launch(&ami, spec()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused:?}");
    state.wait(soon(), |state| *state == ImageState::Invalid).unwrap();
    let refused = region.launch(&ami, spec()).unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (ErrorKind::ImageUnavailable, "InvalidAMIID.Unavailable"));
    // Nobody waits for what does not come any more.
    for late in [
        region.wait_for_image(ami.id(), ImageState::Available, soon()).unwrap_err(),
        region.wait_for_image_named(ami.name(), soon()).unwrap_err(),
    ] {
        let text = late.to_string();
        assert_eq!((late.kind(), late.code()), (ErrorKind::IncorrectState, "IncorrectState"), "{text}");
        assert!(text.contains("is invalid (Server.InternalError: cannot open the content"), "{text}");
    }
    // Nor is it trusted again once its bytes are back.
    std::fs::write(&paths[0], whole).unwrap();
    drop(region);

    let region = open(dir.path());
    for (name, value) in [
        ("state", "invalid"),
        ("state-reason-code", "Server.InternalError"),
        ("state-reason-message", "cannot open the content sha256:*"),
    ] {
        let invalid = DescribeImages::new().filter(Filter::new(name, [value]).unwrap());
        assert_eq!(region.describe_images(&invalid).unwrap().items.len(), 1, "{name}");
    }
    // A reason is that of the state that it is in, whatever else is changed.
    region.create_tags(&[ami.id().into()], &[("stage", "test")]).unwrap();
    assert!(region.image(ami.id()).unwrap().state_reason().is_some());
    let refused = region.launch(&ami, spec()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ImageUnavailable, "{refused:?}");
    region.deregister_image(ami.id()).unwrap();
    region.launch(&register(&region), spec()).unwrap();
}

/// What fails for another reason says nothing of the image.
#[test]
fn an_image_stays_available_when_something_else_fails() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = instance_core::testing::FakeHypervisor::new();
    let region = instance_core::Region::open(dir.path(), hypervisor.clone()).unwrap();
    let ami = register(&region);
    hypervisor.fail_next_create();
    region.launch(&ami, spec()).unwrap_err();
    assert_eq!(region.image(ami.id()).unwrap().state(), ImageState::Available);
}

#[test]
fn every_state_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region);
    region.wait_for_image(ami.id(), ImageState::Available, Instant::now()).unwrap();
    let late =
        region.wait_for_image(ami.id(), ImageState::Disabled, Instant::now() + Duration::from_millis(1));
    assert_eq!(late.unwrap_err().kind(), ErrorKind::IncorrectState);
    let friend = region.as_account("222222222222".parse().unwrap());
    assert_eq!(friend.watch_image(ami.id()).unwrap_err().kind(), ErrorKind::ImageNotFound);
    std::thread::scope(|scope| {
        let waits = |state| {
            let watch = region.watch_image(ami.id()).unwrap();
            scope.spawn(move || watch.wait(soon(), |now| *now == state).unwrap())
        };
        let (disabled, gone) = (waits(ImageState::Disabled), waits(ImageState::Deregistered));
        let failed =
            scope.spawn(|| region.wait_for_image(ami.id(), ImageState::Invalid, soon()).unwrap_err());
        region.disable_image(ami.id()).unwrap();
        disabled.join().unwrap();
        region.deregister_image(ami.id()).unwrap();
        gone.join().unwrap();
        // It may have come too late to find the image.
        let failed = failed.join().unwrap().to_string();
        assert!(failed.contains("is deregistered, and does not") || failed.contains("not exist"), "{failed}");
    });
    assert_eq!(region.watch_image(ami.id()).unwrap_err().kind(), ErrorKind::ImageNotFound);
}
