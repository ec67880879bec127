//! Who waits for states of volumes is told of them.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;

use std::fs;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Instant;

use common::{ask, open, register, soon, spec};
use instance_core::{BlockDeviceMappingRequest, ErrorKind, VolumeSpec, VolumeState};

#[test]
fn a_volume_is_waited_for_through_its_life() {
    use VolumeState::{Available, Deleted, InUse};
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let server = region.launch(&register(&region), spec()).unwrap();
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let told = Arc::new(Mutex::new(Vec::new()));
    let (sink, watch) = (told.clone(), region.watch_volume(volume).unwrap());
    watch.subscribe(move |state| sink.lock().unwrap().push(*state));
    let mut in_use = pin!(watch.until(|state| *state == InUse));
    let mut context = Context::from_waker(Waker::noop());
    assert_eq!(in_use.as_mut().poll(&mut context), Poll::Pending);
    let refused = region.wait_for_volume(volume, InUse, Instant::now()).unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (ErrorKind::IncorrectState, "IncorrectState"));
    assert!(refused.to_string().contains("available, not in-use"), "{refused}");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| region.wait_for_volume(volume, InUse, soon()));
        region.attach_volume(volume, server.id(), "/dev/sdf").unwrap();
        waiting.join().unwrap().unwrap();
        assert_eq!(in_use.as_mut().poll(&mut context), Poll::Ready(InUse));
        let waiting = scope.spawn(|| region.wait_for_volume(volume, Deleted, soon()));
        region.detach_volume(volume).unwrap();
        region.wait_for_volume(volume, Available, soon()).unwrap();
        region.delete_volume(volume).unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(*told.lock().unwrap(), [InUse, Available, Deleted]);
    let refused = watch.wait(soon(), |state| *state == Deleted);
    assert_eq!(refused, Ok(Deleted));
    region.wait_for_volume(volume, Deleted, Instant::now()).unwrap();
    let refused = region.wait_for_volume(volume, Available, soon()).unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (ErrorKind::VolumeNotFound, "InvalidVolume.NotFound"));
}

#[test]
fn volumes_that_go_with_their_instance_are_deleted_and_others_available() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let kept = BlockDeviceMappingRequest::new("/dev/sdf").size_gib(1).delete_on_termination(false);
    let server = region.launch(&register(&region), spec().block_device(kept)).unwrap();
    let [root, data] = [0, 1].map(|n| server.describe().attachments[n].volume_id);
    let stranger = region.as_account("222222222222".parse().unwrap());
    assert_eq!(stranger.watch_volume(root).unwrap_err().kind(), ErrorKind::VolumeNotFound);
    thread::scope(|scope| {
        let (root_goes, data_stays) =
            (region.watch_volume(root).unwrap(), region.watch_volume(data).unwrap());
        assert_eq!((root_goes.get(), data_stays.get()), (VolumeState::InUse, VolumeState::InUse));
        let never = scope.spawn(|| region.wait_for_volume(root, VolumeState::Available, soon()));
        // It waits, or it will find it gone.
        server.terminate().unwrap();
        assert!(root_goes.wait(soon(), |state| *state == VolumeState::Deleted).is_ok());
        assert!(data_stays.wait(soon(), |state| *state == VolumeState::Available).is_ok());
        let refused = never.join().unwrap().unwrap_err();
        assert!(matches!(refused.kind(), ErrorKind::IncorrectState | ErrorKind::VolumeNotFound), "{refused}");
    });
    region.delete_volume(data).unwrap();
}

#[test]
fn who_waits_for_the_end_of_a_volume_is_told_though_its_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let server = region.launch(&register(&region), spec()).unwrap();
    ask(&server, "write 0 0 word", "wrote");
    let root = server.describe().attachments[0].volume_id;
    let path = dir.path().join("volumes").join(root.to_string());
    for file in fs::read_dir(&path).unwrap() {
        let file = file.unwrap().path();
        fs::remove_file(&file).unwrap();
        fs::create_dir_all(file.join("in the way")).unwrap();
    }
    let watch = region.watch_volume(root).unwrap();
    assert!(server.terminate().is_err(), "its files are in the way");
    assert_eq!(watch.get(), VolumeState::Deleted);
}
