//! What a guest sees of the devices that are not disks or network ports.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::{Duration, Instant, SystemTime};

use ami_core::Architecture;
use hypervisor_kvm::Kvm;
use instance_core::console::{Console, ConsoleReader};
use instance_core::machine::{ExitCause, Hypervisor, Machine, MachineSpec};

const PATIENCE: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// A guest that is up, and its console.
struct Guest {
    machine: Box<dyn Machine>,
    console: Console,
    reader: ConsoleReader,
}

impl Guest {
    fn with(kvm: &Kvm, change: impl FnOnce(&mut MachineSpec)) -> Self {
        let console = Console::new();
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("devices", Architecture::X86_64, boot, console.port());
        change(&mut spec);
        let machine = kvm.create(spec).unwrap();
        machine.start().unwrap();
        let mut guest = Self { machine, reader: console.reader(), console };
        guest.reader.wait_for("GUEST READY\n", soon()).unwrap();
        guest
    }

    fn say(&self, line: &str) {
        self.console.write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    }

    /// The number that it answers, behind the word that it was asked with.
    fn number(&mut self, word: &str) -> u64 {
        self.say(word);
        let answer = self.reader.wait_for("\n", soon()).unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        answer.trim().strip_prefix(word.split(' ').next().unwrap()).unwrap().trim().parse().unwrap()
    }

    fn end(&self) -> ExitCause {
        let end = self.machine.state().wait(soon(), |state| state.exit_cause().is_some()).unwrap();
        end.exit_cause().unwrap().clone()
    }
}

#[test]
fn a_panic_is_the_end_of_a_machine() {
    let Some(kvm) = common::kvm() else { return };
    let guest = Guest::with(&kvm, |_| ());
    guest.say("panic");
    assert_eq!(guest.end(), ExitCause::Panic);
}

#[test]
fn the_clock_has_the_hosts_time() {
    let Some(kvm) = common::kvm() else { return };
    let mut guest = Guest::with(&kvm, |_| ());
    let before = SystemTime::now();
    let told = guest.number("clock");
    let after = SystemTime::now();
    let digits = |time: SystemTime| {
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let time = time::OffsetDateTime::from_unix_timestamp(seconds as i64).unwrap();
        let date = [i64::from(time.year()), time.month() as i64, time.day().into()];
        let clock = [time.hour(), time.minute(), time.second()].map(i64::from);
        date.into_iter().chain(clock).fold(0, |all, digits| all * 100 + digits) as u64
    };
    assert!((digits(before)..=digits(after)).contains(&told), "{told}");
}
