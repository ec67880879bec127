//! Images of instances that run whose guests have an agent that flushes their file systems.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "common/region.rs"]
mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ami_core::VolumeId;
use common::{PATIENCE, TestRegion, ask, register, soon, spec};
use instance_core::testing::{AgentSays, FakeAgent, FakeHypervisor};
use instance_core::{
    CreateImage, ErrorKind, ImageConsistency, Instance, InstanceState, RegionOptions, SnapshotState,
    VolumeSpec,
};

const PORT: u32 = 9999;
const SYNC: &str = "guest-sync-delimited";
const FREEZE: &str = "guest-fsfreeze-freeze";
const STATUS: &str = "guest-fsfreeze-status";
const THAW: &str = "guest-fsfreeze-thaw";

fn open(dir: &Path, agent: &FakeAgent, options: RegionOptions) -> TestRegion {
    let agent = agent.clone();
    options.open(dir, FakeHypervisor::new().on_streams(move |port| agent.serve(port))).unwrap()
}

fn server(dir: &Path, agent: &FakeAgent) -> (TestRegion, Instance) {
    let region = open(dir, agent, RegionOptions::new().guest_agent(PORT));
    let instance = region.launch(&register(&region), spec()).unwrap();
    (region, instance)
}

#[test]
fn an_image_is_of_file_systems_that_stand_still() {
    let (dir, agent) = (tempfile::tempdir().unwrap(), FakeAgent::new(PORT));
    let (_region, instance) = server(dir.path(), &agent);
    let made = instance.create_image("web").unwrap();
    assert_eq!(made.consistency, ImageConsistency::FileSystemConsistent);
    assert!(made.paused < Duration::from_secs(5), "{:?}", made.paused);
    let task = instance.begin_create_image("by-task").unwrap();
    assert_eq!(task.wait(soon()).unwrap().status_message, "file-system-consistent");
    let once = [SYNC, FREEZE, THAW];
    assert_eq!(
        (agent.asked().get(), agent.frozen()),
        (once.repeat(2).into_iter().map(str::to_owned).collect(), 0)
    );
    // What cannot be made is refused before the guest is bothered, and so is what needs nothing of it.
    assert_eq!(instance.create_image("web").unwrap_err().kind(), ErrorKind::ImageNameDuplicate);
    let made = instance.create_image(CreateImage::new("rebooted").no_reboot(false)).unwrap();
    assert_eq!(made.consistency, ImageConsistency::FileSystemConsistent);
    instance.stop(Duration::ZERO).unwrap();
    assert_eq!(instance.create_image("stopped").unwrap().consistency, ImageConsistency::CrashConsistent);
    assert_eq!(agent.asked().get().len(), 6);
}

#[test]
fn an_image_without_the_guests_part_is_crash_consistent_and_says_so() {
    let bytes = |text: &str| Some(AgentSays::Bytes(text.as_bytes().to_vec()));
    let check = |agent: FakeAgent, options: RegionOptions, asked: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let region = open(dir.path(), &agent, options);
        let instance = region.launch(&register(&region), spec()).unwrap();
        let made = instance.create_image("web").unwrap();
        assert_eq!(made.consistency, ImageConsistency::CrashConsistent, "{asked:?}");
        assert_eq!(
            (agent.asked().get(), agent.frozen()),
            (asked.iter().map(ToString::to_string).collect(), 0)
        );
        ask(&instance, "ping pong", "pong pong");
        assert_eq!(instance.state(), InstanceState::Running);
    };
    let with_agent = || RegionOptions::new().guest_agent(PORT);
    let behaving = |name: &'static str, text: &'static str| {
        FakeAgent::behaving(PORT, move |command| if command == name { bytes(text) } else { None })
    };
    check(FakeAgent::new(PORT), RegionOptions::new().vsock(true), &[]);
    check(FakeAgent::new(PORT), RegionOptions::new().guest_agent(PORT + 1), &[]);
    check(behaving(FREEZE, "{\"error\": {}}\n"), with_agent(), &[SYNC, FREEZE, STATUS, THAW]);
    check(behaving(THAW, "{\"return\": 1}\n"), with_agent(), &[SYNC, FREEZE, THAW]);
}

/// The agent does not come to an end with freezing; the instance is nobody's meanwhile.
#[test]
fn an_instance_goes_its_way_while_its_guest_freezes() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAgent::behaving(PORT, |name| (name == FREEZE).then_some(AgentSays::Nothing));
    let (region, instance) = server(dir.path(), &agent);
    let is_asked =
        |count| move |asked: &Vec<String>| asked.iter().filter(|name| *name == FREEZE).count() == count;
    let begin = |name: &'static str, count: usize| {
        let other = instance.clone();
        let making = thread::spawn(move || other.create_image(name));
        assert!(agent.asked().wait(soon(), is_asked(count)).is_ok());
        making
    };
    let making = begin("rebooted", 1);
    region.create_tags(&[instance.id().into()], &[("stage", "test")]).unwrap();
    instance.reboot().unwrap();
    let made = making.join().unwrap().unwrap();
    assert_eq!(made.consistency, ImageConsistency::CrashConsistent);
    let making = begin("stopped", 2);
    instance.stop(Duration::ZERO).unwrap();
    assert_eq!(making.join().unwrap().unwrap().consistency, ImageConsistency::CrashConsistent);
    instance.start().unwrap();
    let making = begin("terminated", 3);
    instance.terminate().unwrap();
    assert_eq!(making.join().unwrap().unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
}

fn hibernating(region: &TestRegion) -> Instance {
    region.launch(&register(region), spec().hibernation(true)).unwrap()
}

fn count(asked: &[String], name: &str) -> usize {
    asked.iter().filter(|asked| *asked == name).count()
}

#[test]
fn nothing_is_saved_while_it_stands_still_for_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let server: Arc<OnceLock<Instance>> = Arc::default();
    let (sleeping, sleeper) = mpsc::channel();
    let agent = FakeAgent::behaving(PORT, {
        let server = server.clone();
        move |name| {
            if name == FREEZE {
                let instance = server.get().unwrap().clone();
                let hibernates = instance.clone();
                let asleep = thread::spawn(move || hibernates.hibernate(Duration::ZERO));
                // It must not begin; there is nothing to wait for but that.
                let _ =
                    instance.wait_for(InstanceState::Stopping, Instant::now() + Duration::from_millis(500));
                sleeping.send((instance.state(), asleep)).unwrap();
            }
            None
        }
    });
    let region = open(dir.path(), &agent, RegionOptions::new().guest_agent(PORT));
    let instance = server.get_or_init(|| hibernating(&region));
    let made = instance.create_image("web").unwrap();
    let (state, asleep) = sleeper.recv().unwrap();
    asleep.join().unwrap().unwrap();
    assert_eq!((state, instance.state()), (InstanceState::Running, InstanceState::Stopped));
    assert_eq!((made.consistency, agent.frozen()), (ImageConsistency::FileSystemConsistent, 0));
    instance.start().unwrap();
    assert_eq!(agent.asked().get(), [SYNC, FREEZE, THAW]);
}

/// The agent comes back when its guest has been woken, in a region that asks no agents.
#[test]
fn what_stands_still_when_it_is_saved_goes_on_when_it_is_woken() {
    let dir = tempfile::tempdir().unwrap();
    let deaf = Arc::new(AtomicBool::new(true));
    let agent = FakeAgent::behaving(PORT, {
        let deaf = deaf.clone();
        move |name| (name == THAW && deaf.load(SeqCst)).then_some(AgentSays::HangUp)
    });
    let region = open(dir.path(), &agent, RegionOptions::new().guest_agent(PORT));
    let instance = hibernating(&region);
    assert_eq!(instance.create_image("web").unwrap().consistency, ImageConsistency::CrashConsistent);
    instance.hibernate(Duration::ZERO).unwrap();
    let (id, asked) = (instance.id(), count(&agent.asked().get(), THAW));
    assert_eq!(agent.frozen(), 2);
    drop((instance, region));
    deaf.store(false, SeqCst);
    let region = open(dir.path(), &agent, RegionOptions::new());
    let instance = region.instance(id).unwrap();
    instance.start().unwrap();
    let thawed = |now: &Vec<String>| count(now, THAW) > asked;
    assert!(agent.asked().wait(soon(), thawed).is_ok(), "{:?}", agent.asked().get());
    assert_eq!(agent.frozen(), 0);
    ask(&instance, "ping pong", "pong pong");
}

/// A volume that comes while the others stand still has file systems that do not.
#[test]
fn what_was_attached_meanwhile_did_not_stand_still() {
    let dir = tempfile::tempdir().unwrap();
    let server: Arc<OnceLock<(TestRegion, VolumeId, Instance)>> = Arc::default();
    let agent = FakeAgent::behaving(PORT, {
        let server = server.clone();
        let once = AtomicBool::new(true);
        move |name| {
            if name == FREEZE && once.swap(false, SeqCst) {
                let (region, volume, instance) = server.get().unwrap();
                region.attach_volume(*volume, instance.id(), "/dev/sdf").unwrap();
            }
            None
        }
    });
    let (region, instance) = self::server(dir.path(), &agent);
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    let (_, _, instance) = server.get_or_init(|| (region, volume, instance));
    let made = instance.create_image("web").unwrap();
    assert_eq!(made.ami.manifest().block_device_mappings().len(), 2);
    assert_eq!((made.consistency, agent.frozen()), (ImageConsistency::CrashConsistent, 0));
    assert_eq!(agent.asked().get(), [SYNC, FREEZE, THAW]);
    assert_eq!(instance.create_image("web-2").unwrap().consistency, ImageConsistency::FileSystemConsistent);
}

#[test]
fn two_images_at_once_do_not_share_an_agent() {
    let (dir, agent) = (tempfile::tempdir().unwrap(), FakeAgent::new(PORT));
    let (_region, instance) = server(dir.path(), &agent);
    let made = Arc::new(Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for number in 0..4 {
            let (instance, made) = (&instance, made.clone());
            scope.spawn(move || {
                let image = instance.create_image(format!("image-{number}")).unwrap();
                made.lock().unwrap().push(image.consistency);
            });
        }
    });
    assert_eq!(*made.lock().unwrap(), [ImageConsistency::FileSystemConsistent; 4]);
    assert_eq!(agent.asked().get(), [SYNC, FREEZE, THAW].repeat(4));
}

/// A snapshot is begun when the guest's file systems stand still already, and takes its time.
#[test]
fn nothing_stands_still_while_another_snapshot_is_stored() {
    for seed in 1..20_u64 {
        let dir = tempfile::tempdir().unwrap();
        let (to_begin, begin) = mpsc::channel::<(TestRegion, VolumeId)>();
        let (begun, is_begun) = mpsc::channel();
        let begin = Mutex::new((begin, begun));
        let agent = FakeAgent::behaving(PORT, move |name| {
            let begin = begin.lock().unwrap();
            let due = (name == FREEZE).then(|| begin.0.try_recv().ok()).flatten();
            if let Some((region, volume)) = due {
                let snapshot = region.begin_create_snapshot(volume, "").unwrap();
                let (go, wait) = mpsc::channel::<()>();
                let wait = Mutex::new(wait);
                snapshot.watch().subscribe(move |_| {
                    let _ = wait.lock().unwrap().recv();
                });
                begin.1.send((snapshot, go)).unwrap();
            }
            None
        });
        let (region, instance) = server(dir.path(), &agent);
        let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
        let to = region.volume_disk(volume).unwrap();
        // To so many places that storing it takes a while.
        for place in 0..1500_u64 {
            let block = [seed.to_le_bytes(), place.to_le_bytes()].concat().repeat(256);
            to.write_at(&block, place << 16).unwrap();
        }
        drop(to);
        region.attach_volume(volume, instance.id(), "/dev/sdf").unwrap();
        to_begin.send((region.clone(), volume)).unwrap();
        let other = instance.clone();
        let making = thread::spawn(move || other.create_image("web").unwrap());
        let (snapshot, go) = is_begun.recv_timeout(PATIENCE).unwrap();
        assert!(agent.asked().wait(soon(), |asked| asked.iter().any(|name| name == THAW)).is_ok());
        let pending = snapshot.describe().state == SnapshotState::Pending;
        drop(go);
        assert_eq!(making.join().unwrap().consistency, ImageConsistency::FileSystemConsistent);
        snapshot.wait(soon()).unwrap();
        assert_eq!(agent.frozen(), 0);
        let times = agent.asked().get().len() / 3;
        assert_eq!(agent.asked().get(), [SYNC, FREEZE, THAW].repeat(times));
        if pending && times == 2 {
            return;
        }
    }
    panic!("every snapshot is stored before anybody can look");
}
