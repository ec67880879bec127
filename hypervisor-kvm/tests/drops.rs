//! Machines that are dropped at any moment give everything back, and no thread is needed to wait for it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, ExitCause, Hypervisor, MachineSpec, MachineState};
use storage_block::{MemoryDisk, RawFile};

/// How many machines are dropped, unless `KVM_DROPS` says how many.
const MACHINES: u32 = 200;

/// Threads, descriptors and mappings of this process.
fn held() -> (usize, usize, usize) {
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let kvm = maps.lines().filter(|line| line.contains("kvm-vcpu")).count();
    (count("/proc/self/task"), count("/proc/self/fd"), kvm)
}

/// Alone in its file: it counts what the process holds.
#[test]
fn machines_dropped_at_any_moment_leave_nothing() {
    let Some(kvm) = common::kvm() else { return };
    let boot = common::guest::boot().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 1 << 20], 0).unwrap();
    // Threads serve the one, and the host's kernel the other where it may.
    let disks =
        [MemoryDisk::new(1 << 20).unwrap().into_disk(), RawFile::from_file(file, false).unwrap().into_disk()];
    let make = |console: &Console| {
        let mut spec = MachineSpec::new("drop", Architecture::X86_64, boot.clone(), console.port());
        spec.vcpus = std::num::NonZeroU32::new(2).unwrap();
        spec.disks =
            disks.iter().zip(["vol-0", "vol-1"]).map(|(d, id)| DiskSpec::new(d.clone(), id)).collect();
        kvm.create(spec).unwrap()
    };
    drop(make(&Console::new()));
    let before = held();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let machines = std::env::var("KVM_DROPS").map_or(MACHINES, |number| number.parse().unwrap());
    for n in 0..machines {
        // xorshift: the same moments in every run.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let console = Console::new();
        let machine = make(&console);
        let state = machine.state();
        if n % 8 != 0 {
            machine.start().unwrap();
            // Commands that end, or more requests than it lives to see the end of.
            let commands: &[u8] = match n % 3 {
                0 => b"write 0 1 x\ncpus\n",
                1 => b"storm 0 write 4000000000\n",
                _ => b"storm 1 read 4000000000\n",
            };
            let _ = console.write_all(commands, Instant::now() + Duration::from_secs(1));
            // From before the first instruction until after the last command.
            let moment = Instant::now() + Duration::from_micros(random % 3_000);
            while Instant::now() < moment {
                std::hint::spin_loop();
            }
            match n % 4 {
                1 => machine.pause().unwrap(),
                2 => machine.power_button().unwrap(),
                _ => {}
            }
        }
        drop(machine);
        let end = state.get();
        let by_button = n % 4 == 2 && end == MachineState::Exited(ExitCause::PowerOff);
        assert!(by_button || end == MachineState::Exited(ExitCause::Killed), "machine {n}: {end:?}");
        assert_eq!(held(), before, "machine {n} left threads, descriptors or mappings");
    }
}
