//! The life of instances against a reference that fits on a page: any sequence of actions, by the
//! user and by the guest, leaves the region as the reference says.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Duration;

use ami_core::{AmiId, Digest, X86_64};
use common::{TestRegion, soon};
use instance_core::InstanceState::{self, Running, Stopped, Terminated};
use instance_core::{ErrorKind, Instance, LaunchSpec, ShutdownBehavior};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Action {
    Launch { image: usize, terminate: bool },
    Stop { who: usize, politely: bool },
    Hibernate(usize),
    Start(usize),
    Reboot(usize),
    Terminate(usize),
    GuestPowersOff(usize),
    GuestReboots(usize),
    GuestCrashes(usize),
    Write { who: usize, word: u8 },
    CreateImage(usize),
    Deregister(usize),
    Reopen,
}

fn action() -> impl Strategy<Value = Action> {
    let who = || 0..4usize;
    prop_oneof![
        3 => (who(), any::<bool>()).prop_map(|(image, terminate)| Action::Launch { image, terminate }),
        2 => (who(), any::<bool>()).prop_map(|(who, politely)| Action::Stop { who, politely }),
        2 => who().prop_map(Action::Hibernate),
        2 => who().prop_map(Action::Start),
        1 => who().prop_map(Action::Reboot),
        1 => who().prop_map(Action::Terminate),
        1 => who().prop_map(Action::GuestPowersOff),
        1 => who().prop_map(Action::GuestReboots),
        1 => who().prop_map(Action::GuestCrashes),
        3 => (who(), any::<u8>()).prop_map(|(who, word)| Action::Write { who, word }),
        2 => who().prop_map(Action::CreateImage),
        1 => who().prop_map(Action::Deregister),
        1 => Just(Action::Reopen),
    ]
}

/// What an instance should be.
#[derive(Debug, Clone)]
struct Expected {
    id: String,
    state: InstanceState,
    reason: Option<&'static str>,
    word: String,
    /// What its guest keeps in mind.
    mind: String,
    terminate: bool,
    image: AmiId,
}

const BY_USER: &str = "Client.UserInitiatedShutdown";
const ASLEEP: &str = "Client.UserInitiatedHibernate";
const BY_GUEST: &str = "Client.InstanceInitiatedShutdown";
const BY_CRASH: &str = "Client.InternalError";
const BY_HOST: &str = "Server.InternalError";

impl Expected {
    /// The arrows, a second time and in other words: what a call makes of a state, or that it may
    /// not be made.
    fn call(&mut self, call: &str) -> Result<(), ErrorKind> {
        let (state, reason) = match (call, self.state) {
            ("start", Stopped) => (Running, None),
            ("start", Running) | ("stop" | "hibernate", Stopped) => return Ok(()),
            ("reboot", Running) => (Running, self.reason),
            ("hibernate", Running) => (Stopped, Some(ASLEEP)),
            ("stop", Running) => (Stopped, Some(BY_USER)),
            ("terminate", Terminated) => return Ok(()),
            ("terminate", _) => (Terminated, Some(BY_USER)),
            ("power off", Running) if self.terminate => (Terminated, Some(BY_GUEST)),
            ("power off", Running) => (Stopped, Some(BY_GUEST)),
            ("crash", Running) => (Stopped, Some(BY_CRASH)),
            ("close", Running) => (Stopped, Some(BY_HOST)),
            ("close", _) => return Ok(()),
            _ => return Err(ErrorKind::IncorrectInstanceState),
        };
        // What it had in mind is there again if nothing but a hibernation was between.
        if !matches!(call, "start" | "hibernate") {
            self.mind.clear();
        }
        (self.state, self.reason) = (state, reason);
        Ok(())
    }
}

struct World {
    dir: tempfile::TempDir,
    region: Option<TestRegion>,
    instances: Vec<Expected>,
    images: Vec<(AmiId, String)>,
    made: usize,
}

fn tell(instance: &Instance, line: &str, answer: &str) -> String {
    let mut reader = instance.console().reader_from_now();
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(answer, soon()).unwrap_or_else(|e| panic!("{line}: {e}"));
    String::from_utf8(reader.wait_for("\n", soon()).unwrap()).unwrap().trim().to_owned()
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let region = common::open(dir.path());
        let disk = storage_block::MemoryDisk::new(1 << 20).unwrap().into_disk();
        let ami = common::register(&region, "base", &disk).unwrap();
        let images = vec![(ami.id(), String::new())];
        Self { dir, region: Some(region), instances: Vec::new(), images, made: 0 }
    }

    fn region(&self) -> &TestRegion {
        self.region.as_ref().unwrap()
    }

    /// The instance at this place, if there is one, and what it should be.
    fn at(&mut self, place: usize) -> Option<(Instance, &mut Expected)> {
        let expected = self.instances.get(place)?;
        let instance = self.region().instance(expected.id.parse().unwrap()).unwrap();
        Some((instance, &mut self.instances[place]))
    }

    /// Makes a call, which the reference allows or refuses.
    fn call(&mut self, place: usize, call: &str, make: impl FnOnce(&Instance) -> instance_core::Result<()>) {
        let Some((instance, expected)) = self.at(place) else { return };
        let before = expected.state;
        let allowed = expected.call(call);
        let made = make(&instance).map_err(|e| e.kind());
        assert_eq!(made, allowed, "{call} of one that is {before}");
    }

    /// Has a running guest do something to itself.
    fn guest(&mut self, place: usize, line: &str, call: &str) {
        let Some((instance, expected)) = self.at(place).filter(|(_, e)| e.state == Running) else { return };
        expected.call(call).unwrap();
        instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
        instance.wait_for(expected.state, soon()).unwrap();
    }

    fn launch(&mut self, image: usize, terminate: bool) {
        if self.instances.iter().filter(|i| i.state != Terminated).count() >= 3 {
            return;
        }
        let Some((image, word)) = self.images.get(image).cloned() else { return };
        let behavior = if terminate { ShutdownBehavior::Terminate } else { ShutdownBehavior::Stop };
        let spec = LaunchSpec::new("t2.nano".parse().unwrap()).shutdown_behavior(behavior).hibernation(true);
        let ami = self.region().image(image).unwrap().ami().typed::<X86_64>().unwrap();
        let id = self.region().launch(&ami, spec).unwrap().id().to_string();
        // The places of those that are gone are taken first, so that few numbers name them all.
        let place = self.instances.iter().position(|i| i.state == Terminated);
        let mind = String::new();
        let expected = Expected { id, state: Running, reason: None, word, mind, terminate, image };
        match place {
            Some(place) => self.instances[place] = expected,
            None => self.instances.push(expected),
        }
    }

    fn create_image(&mut self, place: usize) {
        self.made += 1;
        let name = format!("made-{}", self.made);
        let full = self.images.len() >= 4;
        let Some((instance, expected)) = self.at(place).filter(|_| !full) else { return };
        let (state, word, image) = (expected.state, expected.word.clone(), expected.image);
        match instance.create_image(&name) {
            Ok(made) => {
                assert!(matches!(state, Running | Stopped), "an image was made of one that is {state}");
                let parent: Option<Digest> = made.ami.manifest().parent().copied();
                let registered = self.region().image(image).map(|i| i.ami().digest());
                assert!(registered.is_err() || registered.ok() == parent);
                self.images.push((made.ami.id(), word));
            }
            Err(e) => {
                assert_eq!((e.kind(), state), (ErrorKind::IncorrectInstanceState, Terminated), "{e}");
            }
        }
    }

    fn act(&mut self, action: &Action) {
        match *action {
            Action::Launch { image, terminate } => self.launch(image, terminate),
            Action::Stop { who, politely } => {
                let patience = if politely { Duration::from_secs(20) } else { Duration::ZERO };
                self.call(who, "stop", |i| i.stop(patience));
            }
            Action::Hibernate(who) => self.call(who, "hibernate", |i| i.hibernate(Duration::ZERO)),
            Action::Start(who) => self.call(who, "start", Instance::start),
            Action::Reboot(who) => self.call(who, "reboot", Instance::reboot),
            Action::Terminate(who) => self.call(who, "terminate", Instance::terminate),
            Action::GuestPowersOff(who) => self.guest(who, "poweroff", "power off"),
            Action::GuestCrashes(who) => self.guest(who, "crash", "crash"),
            Action::GuestReboots(who) => {
                let Some((instance, expected)) = self.at(who).filter(|(_, e)| e.state == Running) else {
                    return;
                };
                expected.mind.clear();
                let mut reader = instance.console().reader_from_now();
                instance.console().write_all(b"reboot\n", soon()).unwrap();
                reader.wait_for("GUEST READY", soon()).unwrap();
            }
            Action::Write { who, word } => {
                let Some((instance, expected)) = self.at(who).filter(|(_, e)| e.state == Running) else {
                    return;
                };
                expected.word = format!("w{word}");
                expected.mind = format!("m{word}");
                tell(&instance, &format!("write 0 0 w{word}"), "wrote");
                tell(&instance, &format!("remember m{word}"), "remembered");
            }
            Action::CreateImage(who) => self.create_image(who),
            Action::Deregister(image) => {
                if self.images.len() > 1 && image < self.images.len() {
                    let (id, _) = self.images.remove(image);
                    self.region().deregister_image(id).unwrap();
                }
            }
            Action::Reopen => {
                self.region = None;
                self.region = Some(common::open(self.dir.path()));
                self.instances.iter_mut().for_each(|i| i.call("close").unwrap());
            }
        }
    }

    /// Compares all of the region with all of the reference.
    fn check(&mut self) {
        let mut images: Vec<AmiId> = self.images.iter().map(|(id, _)| *id).collect();
        images.sort_by_key(AmiId::to_string);
        let found: Vec<AmiId> = self.region().images().unwrap().iter().map(|i| i.ami().id()).collect();
        assert_eq!(found, images);
        for place in 0..self.instances.len() {
            let (instance, expected) = self.at(place).unwrap();
            let found = instance.describe();
            let reason = found.state_reason.as_ref().map(|reason| reason.code.as_str());
            assert_eq!((found.state, reason), (expected.state, expected.reason), "{}", expected.id);
            assert_eq!(found.image_id, expected.image);
            if expected.state == Running {
                let (word, mind) = (expected.word.clone(), expected.mind.clone());
                assert_eq!(tell(&instance, "read 0 0", "data"), word);
                assert_eq!(tell(&instance, "recall", "recalled"), mind);
            }
        }
        let alive = self.instances.iter().filter(|i| i.state != Terminated).count();
        let known = self.region().instances();
        assert_eq!(known.iter().filter(|i| i.state() != Terminated).count(), alive);
    }
}

/// Actions of one life, at most.
const LIFE: u32 = 40;

/// `REGION_MODEL_STEPS` says how many actions, in lives of which each has about half of the most.
fn lives() -> u32 {
    std::env::var("REGION_MODEL_STEPS").map_or(24, |steps| steps.parse::<u32>().unwrap() / (LIFE / 2))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: lives(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_life_is_as_the_reference_says(actions in proptest::collection::vec(action(), 1..LIFE as usize)) {
        let mut world = World::new();
        for action in &actions {
            world.act(action);
            world.check();
        }
        world.act(&Action::Reopen);
        world.check();
    }
}
