//! Machines that do not do as they are told, and what a region makes of that.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::{Duration, Instant};

use ami_core::X86_64;
use common::{disk, open, register};
use instance_core::machine::{
    Capabilities, Hypervisor, Machine, MachineError, MachineErrorKind, MachineSpec, MachineState, Runs,
};
use instance_core::testing::FakeHypervisor;
use instance_core::watch::Watch;
use instance_core::{ErrorKind, Instance, InstanceState, LaunchSpec, Region};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

/// Tells the guest something and waits for the answer.
fn ask(instance: &Instance, line: &str, answer: &str) {
    let mut reader = instance.console().reader_from_now();
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(answer, soon()).unwrap_or_else(|e| panic!("{line}: {e}"));
}

/// A machine whose guest, once paused, can never go on.
#[derive(Debug)]
struct Stiff(Box<dyn Machine>);

impl Machine for Stiff {
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
        Err(MachineError::new(MachineErrorKind::Host, "it is stiff"))
    }

    fn power_button(&self) -> Result<(), MachineError> {
        self.0.power_button()
    }

    fn kill(&self) {
        self.0.kill();
    }
}

/// Makes such machines.
#[derive(Debug)]
struct Stiffening(FakeHypervisor);

impl Hypervisor for Stiffening {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        Ok(Box::new(Stiff(self.0.create(spec)?)))
    }
}

impl Runs<X86_64> for Stiffening {}

#[test]
fn an_instance_that_cannot_be_resumed_is_stopped_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let ami = register(&open(dir.path()), "base", &disk(1, 1)).unwrap();
    let region = Region::open(dir.path(), Stiffening(FakeHypervisor::new())).unwrap();
    let instance = region.launch(&ami, spec()).unwrap();
    ask(&instance, "write 0 0 kept", "wrote");
    assert_eq!(instance.create_image("child").unwrap_err().kind(), ErrorKind::Hypervisor);
    assert_eq!(instance.state(), InstanceState::Stopped);
    let why = instance.describe().state_reason.unwrap().to_string();
    assert!(why.contains("cannot resume") && why.contains("it is stiff"), "{why}");
    instance.start().unwrap();
    ask(&instance, "read 0 0", "data kept");
}
