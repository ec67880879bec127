//! As many processors as there can be, and the time that they tell.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::{Duration, Instant};

use ami_core::Architecture;
use common::soon;
use instance_core::console::Console;
use instance_core::machine::{Hypervisor, MachineSpec, RestoreSpec, SavedMachine};

#[track_caller]
fn number(console: &Console, word: &str) -> u64 {
    let mut reader = console.reader_from_now();
    console.write_all(format!("{word}\n").as_bytes(), soon()).unwrap();
    let answer = reader.wait_for("\n", soon()).unwrap();
    String::from_utf8(answer).unwrap().trim().strip_prefix(word).unwrap().trim().parse().unwrap()
}

#[test]
fn as_many_processors_as_there_can_be_come_up() {
    let Some(kvm) = common::kvm() else { return };
    let most = kvm.capabilities().max_vcpus;
    assert_eq!(most, 64);
    let console = Console::new();
    let boot = common::guest::boot().unwrap();
    let mut spec = MachineSpec::new("many", Architecture::X86_64, boot, console.port());
    spec.vcpus = most.try_into().unwrap();
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    assert_eq!(number(&console, "cpus"), 64);
    // All of them are called back.
    machine.pause().unwrap();
    assert_eq!(machine.vm_exits().len(), 64);
    machine.kill();
}

/// When somebody did something: not before the one, not after the other.
#[derive(Clone, Copy)]
struct When(Instant, Instant);

impl When {
    fn of<T>(act: impl FnOnce() -> T) -> (Self, T) {
        let begun = Instant::now();
        let done = act();
        (Self(begun, Instant::now()), done)
    }

    /// What passes from here to there, at least and at most.
    fn until(self, then: Self) -> (Duration, Duration) {
        (then.0.saturating_duration_since(self.1), then.1.duration_since(self.0))
    }
}

/// Clocks may be wrong by a thousandth, and a millisecond.
#[track_caller]
fn assert_within(guest: u64, (least, most): (Duration, Duration)) {
    let (guest, slack) = (Duration::from_nanos(guest), most / 1000 + Duration::from_millis(1));
    assert!(guest + slack >= least && guest <= most + slack, "{guest:?} is not {least:?} to {most:?}");
}

/// Guests that know KVM see the time pass while they are paused, and none while they are saved.
#[test]
fn the_clock_of_kvm_stands_still_in_a_file_alone() {
    let Some(kvm) = common::kvm() else { return };
    let wait = || std::thread::sleep(Duration::from_millis(300));
    let console = Console::new();
    let boot = common::guest::boot().unwrap();
    let spec = MachineSpec::new("clock", Architecture::X86_64, boot, console.port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    let read = |console: &Console| When::of(|| number(console, "kvmclock"));
    let (at_first, first) = read(&console);
    wait();
    let (at_second, second) = read(&console);
    assert_within(second.saturating_sub(first), at_first.until(at_second));
    machine.pause().unwrap();
    wait();
    machine.resume().unwrap();
    let (at_third, third) = read(&console);
    assert_within(third.saturating_sub(second), at_second.until(at_third));
    if !kvm.capabilities().save {
        return eprintln!("SKIPPED: this host's KVM does not tell all of a machine's state");
    }
    machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    let (at_save, ()) = When::of(|| machine.save(&file).unwrap());
    wait();
    let console = Console::new();
    let spec = RestoreSpec::new("clock", SavedMachine::new(file).unwrap(), console.port());
    let (at_restore, machine) = When::of(|| kvm.restore(spec).unwrap());
    machine.resume().unwrap();
    let (at_fourth, fourth) = read(&console);
    let (before, after) = (at_third.until(at_save), at_restore.until(at_fourth));
    assert_within(fourth.saturating_sub(third), (before.0 + after.0, before.1 + after.1));
}
