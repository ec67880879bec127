//! A guest that does not let go of its processors is killed at once.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use instance_core::console::Console;
use instance_core::machine::{ExitCause, Hypervisor, MachineSpec, MachineState};

const SOON: Duration = Duration::from_secs(20);
/// What a kill may take.
const AT_ONCE: Duration = Duration::from_millis(100);
/// How often it is tried. The middle one counts: on a busy host some thread may have to wait for its turn.
const KILLS: usize = 9;

#[test]
fn a_guest_that_hangs_is_killed_at_once() {
    let Some(kvm) = common::kvm() else { return };
    let mut took: Vec<_> = (0..KILLS)
        .map(|_| {
            let console = Console::new();
            let boot = common::guest::boot().unwrap();
            let mut spec = MachineSpec::new("hangs", Architecture::X86_64, boot, console.port());
            spec.vcpus = NonZeroU32::new(2).unwrap();
            let machine = kvm.create(spec).unwrap();
            machine.start().unwrap();
            // A loop with interrupts off, which asks nothing of any device.
            console.write_all(b"spin\n", Instant::now() + SOON).unwrap();
            console.reader().wait_for("spinning", Instant::now() + SOON).unwrap();
            let begun = Instant::now();
            machine.kill();
            let took = begun.elapsed();
            assert_eq!(machine.state().get(), MachineState::Exited(ExitCause::Killed));
            took
        })
        .collect();
    took.sort_unstable();
    assert!(took[KILLS / 2] < AT_ONCE, "kills took {took:?}");
}
