//! A guest that does not let go of its processors is killed and reset at once.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use common::soon;
use instance_core::console::Console;
use instance_core::machine::{ExitCause, Hypervisor, Machine, MachineSpec, MachineState, NetSpec};
use instance_core::net::{self, Frame};

/// What a kill or a reset may take.
const AT_ONCE: Duration = Duration::from_millis(100);
/// When it is done, from when the guest says that it begins.
const IN_THE_MIDDLE: Duration = Duration::from_millis(20);
/// How often it is done, each of which has to be at once.
const KILLS: usize = 5;
/// How often that is tried: on a busy host some thread may have to wait for its turn.
const TRIES: usize = 4;

/// A loop with interrupts off, which asks nothing of any device.
#[test]
fn a_guest_that_hangs_is_killed_at_once() {
    is_ended_at_once("spin", "spinning", |machine| machine.kill(), ExitCause::Killed);
}

#[test]
fn a_guest_that_hangs_is_reset_at_once() {
    is_ended_at_once("spin", "spinning", |machine| machine.reset().unwrap(), ExitCause::Reset);
}

/// A list of pages for the balloon that takes long, each of which is given back by itself, and then another.
#[test]
fn a_guest_that_keeps_a_device_busy_is_killed_at_once() {
    is_ended_at_once("hoard", "hoarding", |machine| machine.kill(), ExitCause::Killed);
}

/// Buffers of next to nothing in 65,281 pieces, all of which are looked at for each frame that finds no room in them.
#[test]
fn a_guest_that_has_frames_looked_for_long_is_killed_at_once() {
    is_ended_at_once("flood", "flooding", |machine| machine.kill(), ExitCause::Killed);
}

fn is_ended_at_once(command: &str, says: &str, end: fn(&dyn Machine), cause: ExitCause) {
    let Some(kvm) = common::kvm() else { return };
    let ends = || -> Vec<Duration> {
        let one = |_| {
            let console = Console::new();
            let boot = common::guest::boot().unwrap();
            let mut spec = MachineSpec::new("hangs", Architecture::X86_64, boot, console.port());
            spec.memory_mib = NonZeroU32::new(128).unwrap();
            spec.vcpus = NonZeroU32::new(2).unwrap();
            let (port, network) = net::link();
            spec.nets = vec![NetSpec::new(port, "02:00:0a:00:00:0c".parse().unwrap())];
            let machine = kvm.create(spec).unwrap();
            machine.start().unwrap();
            console.write_all(format!("{command}\n").as_bytes(), soon()).unwrap();
            console.reader().wait_for(says, soon()).unwrap();
            while network.send(Frame::new(vec![1; 1400])).is_ok() {}
            // What it does then takes longer than this.
            let moment = Instant::now() + IN_THE_MIDDLE;
            while Instant::now() < moment {
                std::hint::spin_loop();
            }
            let begun = Instant::now();
            end(&*machine);
            let took = begun.elapsed();
            assert_eq!(machine.state().get(), MachineState::Exited(cause.clone()));
            took
        };
        (0..KILLS).map(one).collect()
    };
    let mut tried = Vec::new();
    while tried.len() < TRIES {
        let took = ends();
        if took.iter().all(|took| *took < AT_ONCE) {
            return;
        }
        tried.push(took);
    }
    panic!("it took {tried:?}");
}
