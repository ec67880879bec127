//! Machines that do not do as they are told, and what a region makes of that.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ami_core::X86_64;
use common::{ask, disk, open, register, soon};
use instance_core::machine::{
    Capabilities, Execution, ExitCause, Hypervisor, Machine, MachineError, MachineErrorKind, MachineSpec,
    MachineState, Runs,
};
use instance_core::testing::FakeHypervisor;
use instance_core::watch::Watch;
use instance_core::{ErrorKind, Instance, InstanceState, LaunchSpec, Region, ShutdownBehavior};

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}

/// A machine whose guest, once paused, can never go on, and does not heed its power button.
#[derive(Debug)]
struct Stubborn(Box<dyn Machine>);

impl Machine for Stubborn {
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
        Err(MachineError::new(MachineErrorKind::Host, "it will not"))
    }

    fn power_button(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), MachineError> {
        self.0.reset()
    }

    fn kill(&self) {
        self.0.kill();
    }
}

/// Makes such machines.
#[derive(Debug)]
struct StubbornHypervisor(FakeHypervisor);

impl Hypervisor for StubbornHypervisor {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.0.execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        Ok(Box::new(Stubborn(self.0.create(spec)?)))
    }
}

impl Runs<X86_64> for StubbornHypervisor {}

#[test]
fn an_instance_that_cannot_be_resumed_is_stopped_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let ami = register(&open(dir.path()), "base", &disk(1, 1)).unwrap();
    let region = Region::open(dir.path(), StubbornHypervisor(FakeHypervisor::new())).unwrap();
    let instance = region.launch(&ami, spec()).unwrap();
    ask(&instance, "write 0 0 kept", "wrote");
    assert_eq!(instance.create_image("child").unwrap_err().kind(), ErrorKind::Hypervisor);
    assert_eq!(instance.state(), InstanceState::Stopped);
    let why = instance.describe().state_reason.unwrap().to_string();
    assert!(why.contains("cannot resume") && why.contains("it will not"), "{why}");
    instance.start().unwrap();
    ask(&instance, "read 0 0", "data kept");
}

#[test]
fn a_guest_that_is_waited_for_can_be_ended_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let ami = register(&open(dir.path()), "base", &disk(1, 1)).unwrap();
    let region = Region::open(dir.path(), StubbornHypervisor(FakeHypervisor::new())).unwrap();
    let patience = Duration::from_secs(30);
    let interrupted = |end: fn(&Instance) -> instance_core::Result<()>| {
        let instance = region.launch(&ami, spec()).unwrap();
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| instance.stop(patience));
            instance.wait_for(InstanceState::Stopping, soon()).unwrap();
            let begun = Instant::now();
            end(&instance).unwrap();
            assert!(begun.elapsed() < patience / 2, "it waited for the guest");
            (stopping.join().unwrap().map_err(|e| e.kind()), instance.state())
        })
    };
    let terminated = (Err(ErrorKind::IncorrectInstanceState), InstanceState::Terminated);
    assert_eq!(interrupted(Instance::terminate), terminated);
    assert_eq!(interrupted(|i| i.stop(Duration::ZERO)), (Ok(()), InstanceState::Stopped));
}

/// Makes machines that do as they are told, and sees how each ends.
#[derive(Debug, Clone)]
struct Watching(FakeHypervisor, Arc<Mutex<Vec<Watch<MachineState>>>>);

impl Watching {
    fn end(&self, machine: usize) -> Option<ExitCause> {
        self.1.lock().unwrap()[machine].get().exit_cause().cloned()
    }
}

impl Hypervisor for Watching {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        self.0.execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        let machine = self.0.create(spec)?;
        self.1.lock().unwrap().push(machine.state());
        Ok(machine)
    }
}

impl Runs<X86_64> for Watching {}

#[test]
fn a_guest_is_asked_before_it_is_rebooted_or_terminated() {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = Watching(FakeHypervisor::new(), Arc::default());
    let ami = register(&open(dir.path()), "base", &disk(1, 1)).unwrap();
    let region = Region::open(dir.path(), hypervisor.clone()).unwrap();
    let changes = region.state_changes();
    // Whoever follows a machine's end is not to take it for its guest's own.
    let instance = region.launch(&ami, spec().shutdown_behavior(ShutdownBehavior::Terminate)).unwrap();
    ask(&instance, "write 0 0 kept", "wrote");
    for round in 0..20 {
        instance.reboot_within(Duration::from_secs(20)).unwrap();
        assert_eq!(
            (hypervisor.end(round), instance.state()),
            (Some(ExitCause::PowerOff), InstanceState::Running)
        );
        ask(&instance, "read 0 0", "data kept");
    }
    instance.terminate_within(Duration::from_secs(20)).unwrap();
    assert_eq!(hypervisor.end(20), Some(ExitCause::PowerOff));
    use InstanceState::{Pending, Running, ShuttingDown, Terminated};
    let states: Vec<_> = changes.try_iter().map(|change| change.state).collect();
    assert_eq!(states, [Pending, Running, ShuttingDown, Terminated]);

    // Once it has been rebooted, its own end is its own again.
    let instance = region.launch(&ami, spec()).unwrap();
    instance.reboot_within(Duration::from_secs(20)).unwrap();
    instance.console().write_all(b"poweroff\n", soon()).unwrap();
    instance.wait_for(InstanceState::Stopped, soon()).unwrap();
    instance.reboot_within(Duration::from_secs(20)).unwrap_err();
}

#[test]
fn a_guest_that_does_not_heed_is_rebooted_and_terminated_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let ami = register(&open(dir.path()), "base", &disk(1, 1)).unwrap();
    let region = Region::open(dir.path(), StubbornHypervisor(FakeHypervisor::new())).unwrap();
    let instance = region.launch(&ami, spec()).unwrap();
    let mut reader = instance.console().reader_from_now();
    instance.reboot_within(Duration::from_millis(50)).unwrap();
    reader.wait_for("GUEST READY", soon()).unwrap();
    assert_eq!(instance.state(), InstanceState::Running);
    instance.terminate_within(Duration::from_millis(50)).unwrap();
    assert_eq!(instance.state(), InstanceState::Terminated);
}

/// Who asks a second time, with more patience or while a stop has less, does not cut the guest short.
#[test]
fn a_guest_that_is_waited_for_longer_is_not_ended_sooner() {
    let dir = tempfile::tempdir().unwrap();
    let ami = register(&open(dir.path()), "base", &disk(1, 1)).unwrap();
    let region = Region::open(dir.path(), StubbornHypervisor(FakeHypervisor::new())).unwrap();
    let instance = region.launch(&ami, spec()).unwrap();
    std::thread::scope(|scope| {
        let short = scope.spawn(|| instance.stop(Duration::from_millis(300)));
        instance.wait_for(InstanceState::Stopping, soon()).unwrap();
        let begun = Instant::now();
        let long = scope.spawn(|| instance.terminate_within(Duration::from_secs(2)));
        assert_eq!(short.join().unwrap().unwrap_err().kind(), ErrorKind::IncorrectInstanceState);
        assert_eq!(instance.state(), InstanceState::ShuttingDown);
        instance.terminate_within(Duration::from_millis(1500)).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(1500), "{:?}", begun.elapsed());
        long.join().unwrap().unwrap();
    });
    // Patience without end is no reason to panic.
    let instance = region.launch(&ami, spec()).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| instance.reboot_within(Duration::MAX));
        while instance.stop(Duration::ZERO).is_err() {}
        assert!(waiting.join().unwrap().is_err());
    });
}
