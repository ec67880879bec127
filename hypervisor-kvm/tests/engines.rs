//! What serves a disk is chosen when its guest first uses it, and told to whoever asks the machine.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::Architecture;
use common::soon;
use hypervisor_kvm::{Confinement, Kvm};
use instance_core::console::Console;
use instance_core::machine::{Detach, DiskEngine, DiskSpec, Hypervisor, Machine, MachineSpec};
use storage_block::{Disk, Engine, MemoryDisk, QueueOptions, RawFile};

const SIZE: u64 = 1 << 20;

fn in_file() -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    RawFile::from_file(file, false).unwrap().into_disk()
}

fn in_memory() -> Disk {
    MemoryDisk::new(SIZE).unwrap().into_disk()
}

/// A machine with a disk in a file and one in memory, whose guest is up.
fn up(kvm: &Kvm) -> (Box<dyn Machine>, Console) {
    let console = Console::new();
    let boot = common::guest::boot().unwrap();
    let mut spec = MachineSpec::new("engines", Architecture::X86_64, boot, console.port());
    spec.disks = vec![DiskSpec::new(in_file(), "vol-file"), DiskSpec::new(in_memory(), "vol-memory")];
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    (machine, console)
}

fn ask(console: &Console, command: &str, answer: &str) {
    let mut reader = console.reader_from_now();
    console.write_all(format!("{command}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(answer, soon()).unwrap();
}

fn engines(of: [Option<Engine>; 2]) -> [DiskEngine; 2] {
    [DiskEngine::new("vol-file", of[0]), DiskEngine::new("vol-memory", of[1])]
}

#[test]
fn a_disk_has_its_engine_from_its_first_use_on() {
    let Some(kvm) = common::kvm() else { return };
    let ring = in_file().queue_with(&QueueOptions::new(1).engine(Engine::IoUring)).is_ok();
    let best = if ring { Engine::IoUring } else { Engine::Threads };
    println!("the best that this host has is {best:?}");
    // What a ring is asked for passes by the filters of a confined one.
    for (kvm, best) in [(kvm.clone(), best), (kvm.with_confinement(Confinement::new()), Engine::Threads)] {
        let (machine, console) = up(&kvm);
        assert_eq!(machine.disk_engines(), engines([None; 2]));
        ask(&console, "read 0 0", "data");
        assert_eq!(machine.disk_engines(), engines([Some(best), None]));
        ask(&console, "read 1 0", "data");
        let both = engines([Some(best), Some(Engine::Threads)]);
        assert_eq!(machine.disk_engines(), both);
        // Until the end, whatever the guest does.
        ask(&console, "read 0 0", "data");
        machine.pause().unwrap();
        assert_eq!(machine.disk_engines(), both);
        machine.kill();
        assert_eq!(machine.disk_engines(), both);
    }
}

#[test]
fn those_of_disks_that_come_and_go_do_so_too() {
    let Some(kvm) = common::kvm_as_it_comes() else { return };
    let (machine, _console) = up(&kvm);
    machine.attach_disk(DiskSpec::new(in_memory(), "vol-late")).unwrap();
    let serials = || machine.disk_engines().into_iter().map(|disk| disk.serial).collect::<Vec<_>>();
    assert_eq!(serials(), ["vol-file", "vol-memory", "vol-late"]);
    machine.detach_disk("vol-late", Detach::Force).unwrap();
    assert_eq!(serials(), ["vol-file", "vol-memory"]);
}
