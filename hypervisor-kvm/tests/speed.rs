//! What the bare-metal guest can be used for: idle it costs nothing, and code at privilege level 3 runs on
//! the processor even where KVM emulates kernels.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use instance_core::console::Console;
use instance_core::machine::{Hypervisor, Machine, MachineSpec};

use common::{guest, kvm, soon};

/// A machine with this name that is up, and its console.
fn up(name: &str) -> Option<(Box<dyn Machine>, Console)> {
    let kvm = kvm()?;
    let console = Console::new();
    let spec = MachineSpec::new(name, Architecture::X86_64, guest::boot().unwrap(), console.port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    Some((machine, console))
}

/// How long the guest takes to do as told.
fn time(console: &Console, command: &str, answer: &str) -> Duration {
    let mut reader = console.reader_from_now();
    let begun = Instant::now();
    console.write_all(format!("{command}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(&format!("{answer}\n"), soon()).unwrap();
    begun.elapsed()
}

#[test]
fn user_code_runs_on_the_processor() {
    let Some((_machine, console)) = up("user") else { return };
    // Two instructions a turn; an emulator does about a million a second.
    let speed = |took: Duration, turns: f64| 2e-6 * turns / took.as_secs_f64();
    let user = speed(time(&console, "user 20000000", "user done"), 2e7);
    let kernel = speed(time(&console, "kernel 100000", "kernel done"), 1e5);
    println!("user {user:.1} M instructions/s, kernel {kernel:.1} M instructions/s");
    assert!(user > 20.0, "{user:.1} M instructions/s");
    // The way back is complete: kernel and devices work as before, and so does the way there.
    time(&console, "ping again", "pong again");
    time(&console, "user 10", "user done");
}

#[test]
fn an_idle_guest_sleeps() {
    let Some((_machine, console)) = up("idle") else { return };
    time(&console, "ping you", "pong you");
    let before = processor_time("idle/vcpu0");
    let wait = Duration::from_millis(300);
    console.reader_from_now().read(Instant::now() + wait).unwrap_err();
    let used = processor_time("idle/vcpu0") - before;
    assert!(used < wait / 4, "{used:?} of {wait:?}");
    // Typing wakes it.
    time(&console, "ping you", "pong you");
}

/// How long a thread of this process has run.
fn processor_time(name: &str) -> Duration {
    let mut tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let task = tasks
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name))
        .unwrap_or_else(|| panic!("there is no thread {name}"));
    let times = fs::read_to_string(task.join("schedstat")).unwrap();
    Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
}
