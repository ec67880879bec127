//! What a program that embeds machines may do, and what it may be spared.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::sync::mpsc::channel;
use std::time::Instant;

use ami_core::Architecture;
use common::{PATIENCE, soon};
use hypervisor_kvm::{Confinement, Kvm};
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, ExitCause, Hypervisor, Machine, MachineSpec, MachineState, NetSpec};
use instance_core::net;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use storage_block::MemoryDisk;

/// A machine that was made, not started, and its console.
fn made(kvm: &Kvm) -> (Box<dyn Machine>, Console) {
    let console = Console::new();
    let boot = common::guest::boot().unwrap();
    let mut spec = MachineSpec::new("embedded", Architecture::X86_64, boot, console.port());
    spec.disks = vec![DiskSpec::new(MemoryDisk::new(1 << 20).unwrap().into_disk(), "vol-1")];
    (kvm.create(spec).unwrap(), console)
}

/// Does `work`, which must not hang.
fn without_hanging(what: &str, work: impl FnOnce() + Send + 'static) {
    let (done, finished) = channel();
    std::thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    assert!(finished.recv_timeout(PATIENCE).is_ok(), "{what} hangs");
}

/// One test, because limits and descriptors are the whole process's.
#[test]
fn machines_keep_to_themselves() {
    let Some(kvm) = common::kvm() else { return };
    no_descriptor_is_inherited(&kvm);
    a_hook_may_end_the_machine_it_watches(&kvm);
    a_hook_that_panics_harms_nobody(&kvm);
    a_user_who_has_no_signals_left_can_kill(&kvm);
    who_moves_frames_takes_no_processor_from_others(&kvm);
}

fn no_descriptor_is_inherited(kvm: &Kvm) {
    let (machine, console) = made(kvm);
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY", soon()).unwrap();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        // The standard ones are, and the directory's own is gone by now.
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{name}")).unwrap_or_default();
        let target = std::fs::read_link(format!("/proc/self/fd/{name}")).unwrap_or_default();
        let ours = ["kvm", "eventfd"].iter().any(|kind| target.to_string_lossy().contains(kind));
        let Some(flags) = info.lines().find_map(|line| line.strip_prefix("flags:")).filter(|_| ours) else {
            continue;
        };
        let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
        assert_ne!(flags & 0o200_0000, 0, "children inherit {}", target.display());
    }
}

fn who_moves_frames_takes_no_processor_from_others(kvm: &Kvm) {
    let boot = common::guest::boot().unwrap();
    let mut spec = MachineSpec::new("waits", Architecture::X86_64, boot, Console::new().port());
    spec.disks = vec![DiskSpec::new(MemoryDisk::new(1 << 20).unwrap().into_disk(), "vol-1")];
    let (port, _network) = net::link();
    spec.nets = vec![NetSpec::new(port, "02:00:0a:00:00:0c".parse().unwrap())];
    for kvm in [kvm.clone(), kvm.clone().with_confinement(Confinement::new())] {
        let machine = kvm.create(spec.clone()).unwrap();
        machine.start().unwrap();
        for (name, expect) in [
            ("waits/vcpu0", libc::SCHED_OTHER),
            ("waits/disk0", libc::SCHED_OTHER),
            ("waits/net1", libc::SCHED_BATCH),
        ] {
            // A thread says first how it is called.
            let end = soon();
            while policy(name) != Some(expect) {
                assert!(Instant::now() < end, "{name} is scheduled by {:?}", policy(name));
                std::thread::yield_now();
            }
        }
    }
}

/// By which policy a thread of this process is scheduled, if it is there (proc(5), `/proc/pid/stat`).
fn policy(name: &str) -> Option<i32> {
    const BEHIND_NAME: usize = 41 - 3;
    let mut tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let stat = tasks.find_map(|task| {
        let comm = std::fs::read_to_string(task.join("comm")).ok()?;
        std::fs::read_to_string(task.join("stat")).ok().filter(|_| comm.trim_end() == name)
    })?;
    let (_, behind_name) = stat.rsplit_once(") ")?;
    behind_name.split(' ').nth(BEHIND_NAME)?.parse().ok()
}

fn a_hook_may_end_the_machine_it_watches(kvm: &Kvm) {
    type End = (fn(&dyn Machine), ExitCause);
    let ends: [End; 2] = [
        (|machine| machine.kill(), ExitCause::Killed),
        (|machine| machine.reset().unwrap(), ExitCause::Reset),
    ];
    for (end, cause) in ends {
        let (machine, _console) = made(kvm);
        let machine = std::sync::Arc::new(machine);
        let (state, ender) = (machine.state(), std::sync::Arc::downgrade(&machine));
        state.subscribe(move |state| {
            if let (MachineState::Running, Some(machine)) = (state, ender.upgrade()) {
                end(&**machine);
            }
        });
        without_hanging("a hook that ends it", move || {
            let _ = machine.start();
            drop(machine);
        });
        assert_eq!(state.get(), MachineState::Exited(cause));
    }
}

fn a_hook_that_panics_harms_nobody(kvm: &Kvm) {
    let (machine, console) = made(kvm);
    let state = machine.state();
    state.subscribe(|state| panic!("a hook that was told {state:?}"));
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY", soon()).unwrap();
    without_hanging("the end after a hook's panic", move || drop(machine));
    assert_eq!(state.get(), MachineState::Exited(ExitCause::Killed));
}

fn a_user_who_has_no_signals_left_can_kill(kvm: &Kvm) {
    let (machine, console) = made(kvm);
    machine.start().unwrap();
    console.write_all(b"spin\n", soon()).unwrap();
    console.reader().wait_for("spinning", soon()).unwrap();
    let before = getrlimit(Resource::Sigpending);
    setrlimit(Resource::Sigpending, Rlimit { current: Some(0), ..before }).unwrap();
    without_hanging("a kill without signals", move || machine.kill());
    setrlimit(Resource::Sigpending, before).unwrap();
}
