//! Instances that hibernate, and go on.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use ami_core::{Ami, X86_64};
use common::{TestRegion, ask, bytes, check, disk, files, open, register, soon};
use instance_core::machine::{
    Capabilities, Execution, Hypervisor, Machine, MachineError, MachineErrorKind, MachineSpec, MachineState,
    RestoreSpec, Runs,
};
use instance_core::testing::FakeHypervisor;
use instance_core::watch::Watch;
use instance_core::{
    BlockDeviceMappingRequest, DescribeInstances, ErrorKind, Instance, InstanceState, LaunchSpec, Region,
    RegionOptions, VolumeSpec,
};
use storage_block::keys::LocalKey;

const HIBERNATED: &str = "Client.UserInitiatedHibernate";

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap()).hibernation(true)
}

/// An instance whose guest has something in mind.
fn mindful<H: Hypervisor + Runs<X86_64>>(region: &Region<H>, ami: &Ami<X86_64>) -> Instance {
    let instance = region.launch(ami, spec()).unwrap();
    ask(&instance, "remember thought", "remembered");
    instance
}

fn reason(instance: &Instance) -> (String, String) {
    instance.describe().state_reason.map(|reason| (reason.code, reason.message)).unwrap_or_default()
}

fn saved(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir.join("hibernated")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_guest_goes_on_with_what_it_had_in_mind() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = mindful(&region, &register(&region, "base", &disk(1, 7)).unwrap());
    ask(&instance, "write 0 0 word", "wrote");
    let changes = region.state_changes();
    instance.hibernate(Duration::ZERO).unwrap();
    assert_eq!(saved(dir.path()), [instance.id().to_string()]);
    assert_eq!(region.used_capacity(), (0, 0));
    instance.hibernate(Duration::ZERO).unwrap();
    instance.start().unwrap();
    let states: Vec<_> = changes
        .try_iter()
        .map(|change| (change.state.as_str(), change.reason.map_or(String::new(), |reason| reason.code)))
        .collect();
    let of = |state, reason: &str| (state, reason.to_owned());
    assert_eq!(
        states,
        [of("stopping", HIBERNATED), of("stopped", HIBERNATED), of("pending", ""), of("running", "")]
    );
    instance.wait_until_status_ok(soon()).unwrap();
    assert_eq!(saved(dir.path()), [""; 0]);
    assert_eq!(ask(&instance, "recall", "recalled"), "thought");
    assert_eq!(ask(&instance, "read 0 0", "data"), "word");
    let console = String::from_utf8(instance.console().output()).unwrap();
    assert_eq!(console.matches("GUEST READY").count(), 1, "it has booted once: {console}");

    // It has forgotten when it boots, and hibernates again.
    instance.reboot().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "");
    ask(&instance, "remember more", "remembered");
    instance.hibernate(Duration::ZERO).unwrap();
    let request = DescribeInstances::new().filter("hibernation-options.configured", ["true"]);
    assert_eq!(region.describe_instances(&request).unwrap().items.len(), 1);
    let id = instance.id();
    drop((instance, region));
    let region = open(dir.path());
    let instance = region.instance(id).unwrap();
    assert_eq!(reason(&instance).0, HIBERNATED);
    instance.start().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "more");
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let unsupported = "UnsupportedHibernationConfiguration";
    let plain = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
    let refused = plain.hibernate(Duration::ZERO).unwrap_err();
    check(&refused, ErrorKind::UnsupportedHibernation, unsupported, &["launched without hibernation"]);
    assert_eq!(plain.state(), InstanceState::Running);

    let instance = mindful(&region, &ami);
    instance.set_stop_protection(true).unwrap();
    assert_eq!(instance.hibernate(Duration::ZERO).unwrap_err().kind(), ErrorKind::OperationNotPermitted);
    instance.set_stop_protection(false).unwrap();
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    region.attach_volume(volume, instance.id(), "/dev/sdg").unwrap();
    let other = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    instance.hibernate(Duration::ZERO).unwrap();
    for refused in [
        region.attach_volume(other, instance.id(), "/dev/sdh"),
        region.detach_volume(volume),
        region.grow_volume(volume, 2).map(drop),
    ] {
        let refused = refused.unwrap_err();
        check(&refused, ErrorKind::IncorrectInstanceState, "IncorrectInstanceState", &["start it first"]);
    }
    let refused = instance.set_instance_type("t2.micro".parse().unwrap()).unwrap_err();
    check(&refused, ErrorKind::Unsupported, "UnsupportedOperation", &["keeps its instance type"]);
    instance.start().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "thought");
    region.detach_volume(volume).unwrap();
    region.delete_volume(volume).unwrap();
    instance.terminate().unwrap();
    assert_eq!(instance.hibernate(Duration::ZERO).unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
}

#[test]
fn nothing_stays_of_one_that_is_terminated() {
    let dir = tempfile::tempdir().unwrap();
    let region = open(dir.path());
    let instance = mindful(&region, &register(&region, "base", &disk(1, 7)).unwrap());
    instance.hibernate(Duration::ZERO).unwrap();
    instance.terminate().unwrap();
    assert_eq!(saved(dir.path()), [""; 0]);
}

#[test]
fn what_is_damaged_does_not_go_on_and_the_instance_boots() {
    let dir = tempfile::tempdir().unwrap();
    let damages: [fn(&Path); 4] = [
        |path| fs::remove_file(path).unwrap(),
        |path| File::options().write(true).open(path).unwrap().set_len(7).unwrap(),
        |path| fs::write(path, vec![b'x'; fs::metadata(path).unwrap().len() as usize]).unwrap(),
        |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        },
    ];
    let region = open(dir.path());
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    for (number, damage) in damages.into_iter().enumerate() {
        let instance = mindful(&region, &ami);
        ask(&instance, "write 0 0 word", "wrote");
        instance.hibernate(Duration::ZERO).unwrap();
        damage(&dir.path().join("hibernated").join(instance.id().to_string()));
        instance.start().unwrap();
        let (code, message) = reason(&instance);
        assert_eq!(code, "Server.InternalError", "{number}");
        assert!(message.contains("could not go on where it hibernated"), "{message}");
        assert_eq!(ask(&instance, "recall", "recalled"), "");
        assert_eq!(ask(&instance, "read 0 0", "data"), "word");
        assert_eq!(saved(dir.path()), [""; 0], "{number}");
        instance.terminate().unwrap();
    }
}

/// A host that fails, as it is told.
#[derive(Debug, Clone, Default)]
struct Frail {
    fake: FakeHypervisor,
    fails: Arc<AtomicU8>,
}

const NOTHING: u8 = 0;
const CANNOT_SAVE: u8 = 1;
const SAVE_FAILS: u8 = 2;
const RESTORE_FAILS: u8 = 3;
const RESUME_FAILS: u8 = 4;

impl Frail {
    fn fails_at(&self, what: u8) -> bool {
        self.fails.load(Ordering::SeqCst) == what
    }
}

#[derive(Debug)]
struct FrailMachine(Box<dyn Machine>, Frail);

fn host() -> MachineError {
    MachineError::new(MachineErrorKind::Host, "the host was told to fail")
}

impl Hypervisor for Frail {
    fn capabilities(&self) -> Capabilities {
        let mut can = self.fake.capabilities();
        can.save = !self.fails_at(CANNOT_SAVE);
        can
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.fake.execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        Ok(Box::new(FrailMachine(self.fake.create(spec)?, self.clone())))
    }

    fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        match self.fails_at(RESTORE_FAILS) {
            true => Err(host()),
            false => Ok(Box::new(FrailMachine(self.fake.restore(spec)?, self.clone()))),
        }
    }
}

impl Runs<X86_64> for Frail {}

impl Machine for FrailMachine {
    fn state(&self) -> Watch<MachineState> {
        self.0.state()
    }

    fn start(&self) -> Result<(), MachineError> {
        self.0.start()
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.0.pause()
    }

    fn resume(&self) -> Result<(), MachineError> {
        if self.1.fails_at(RESUME_FAILS) { Err(host()) } else { self.0.resume() }
    }

    fn power_button(&self) -> Result<(), MachineError> {
        self.0.power_button()
    }

    fn save(&self, to: &File) -> Result<(), MachineError> {
        if self.1.fails_at(SAVE_FAILS) { Err(host()) } else { self.0.save(to) }
    }

    fn reset(&self) -> Result<(), MachineError> {
        self.0.reset()
    }

    fn kill(&self) {
        self.0.kill();
    }
}

fn frail(dir: &Path) -> (Region<Frail>, Ami<X86_64>, Frail) {
    let host = Frail::default();
    let region = Region::open(dir, host.clone()).unwrap();
    let source = disk(1, 7);
    let source = instance_core::ImageSource::new(&source).boot(instance_core::DirectBoot::new(
        instance_core::testing::tiny_elf(),
        None,
        "",
    ));
    let ami = region.register_image(Ami::<X86_64>::builder("base"), source).unwrap();
    (region, ami, host)
}

#[test]
fn a_hypervisor_that_saves_nothing_has_nobody_hibernate() {
    let dir = tempfile::tempdir().unwrap();
    let (region, ami, host) = frail(dir.path());
    let instance = mindful(&region, &ami);
    host.fails.store(CANNOT_SAVE, Ordering::SeqCst);
    let refused = region.launch(&ami, spec()).unwrap_err();
    let says = ["does not save machines"];
    check(&refused, ErrorKind::UnsupportedHibernation, "UnsupportedHibernationConfiguration", &says);
    let refused = instance.hibernate(Duration::ZERO).unwrap_err();
    check(&refused, ErrorKind::Unsupported, "UnsupportedOperation", &says);
    assert_eq!(ask(&instance, "recall", "recalled"), "thought");
}

#[test]
fn one_that_cannot_be_saved_is_shut_down() {
    let dir = tempfile::tempdir().unwrap();
    let (region, ami, host) = frail(dir.path());
    let instance = mindful(&region, &ami);
    host.fails.store(SAVE_FAILS, Ordering::SeqCst);
    // The guest heeds its power button: it is not ended at the end of its patience.
    let begun = Instant::now();
    instance.hibernate(Duration::from_secs(600)).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60));
    let (code, message) = reason(&instance);
    assert_eq!((instance.state(), code.as_str()), (InstanceState::Stopped, "Client.UserInitiatedShutdown"));
    assert!(message.contains("could not hibernate") && message.contains("told to fail"), "{message}");
    assert_eq!(saved(dir.path()), [""; 0]);
    host.fails.store(NOTHING, Ordering::SeqCst);
    instance.start().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "");
}

#[test]
fn what_was_saved_is_kept_when_the_host_fails_and_given_up_when_the_guest_may_have_gone_on() {
    let dir = tempfile::tempdir().unwrap();
    let (region, ami, host) = frail(dir.path());
    let instance = mindful(&region, &ami);
    instance.hibernate(Duration::ZERO).unwrap();
    host.fails.store(RESTORE_FAILS, Ordering::SeqCst);
    assert_eq!(instance.start().unwrap_err().kind(), ErrorKind::Hypervisor);
    assert_eq!(instance.state(), InstanceState::Stopped);
    assert_eq!(saved(dir.path()).len(), 1);
    host.fails.store(NOTHING, Ordering::SeqCst);
    instance.start().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "thought");

    instance.hibernate(Duration::ZERO).unwrap();
    host.fails.store(RESUME_FAILS, Ordering::SeqCst);
    assert_eq!(instance.start().unwrap_err().kind(), ErrorKind::Hypervisor);
    assert_eq!((instance.state(), saved(dir.path())), (InstanceState::Stopped, Vec::new()));
    host.fails.store(NOTHING, Ordering::SeqCst);
    instance.start().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "");
}

#[test]
fn what_is_saved_is_as_secret_as_the_root_volume() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("region");
    let key = Arc::new(LocalKey::generate().unwrap());
    let reopen = |keys: Option<Arc<LocalKey>>| -> TestRegion {
        let options = RegionOptions::new();
        let options = match keys {
            Some(keys) => options.keys(keys),
            None => options,
        };
        options.open(&path, FakeHypervisor::new()).unwrap()
    };
    let region = reopen(Some(key.clone()));
    let ami = register(&region, "base", &disk(1, 7)).unwrap();
    let root = BlockDeviceMappingRequest::new("/dev/xvda").size_gib(1).encrypted(true);
    let instance = region.launch(&ami, spec().block_device(root)).unwrap();
    ask(&instance, "remember a-secret-in-memory", "remembered");
    instance.hibernate(Duration::ZERO).unwrap();
    let id = instance.id();
    drop((instance, region));
    let saved_files = files(&path).into_keys().filter(|name| name.starts_with("hibernated/"));
    let saved_files: Vec<_> = saved_files.map(|name| path.join(name)).filter(|path| path.is_file()).collect();
    assert!(!saved_files.is_empty());
    for path in saved_files {
        let (secret, bytes) = (b"a-secret-in-memory", bytes(&path));
        assert!(!bytes.windows(secret.len()).any(|found| found == secret), "{}", path.display());
    }

    // Nobody but who has the key sees it, and it waits for them.
    let region = reopen(None);
    assert_eq!(region.instance(id).unwrap().start().unwrap_err().kind(), ErrorKind::KeyUnavailable);
    drop(region);
    let region = reopen(Some(key));
    let instance = region.instance(id).unwrap();
    instance.start().unwrap();
    assert_eq!(ask(&instance, "recall", "recalled"), "a-secret-in-memory");
    assert_eq!(saved(&path), [""; 0]);
}
