//! What leaves the guest is counted, and a driver that keeps many requests under way hardly ever leaves it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::num::NonZeroU32;
use std::time::Instant;

use ami_core::Architecture;
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, Hypervisor, Machine, MachineSpec, VmExits};
use storage_block::MemoryDisk;

use common::{guest, kvm, soon};

/// A machine with two processors and a disk of 1 MiB.
fn up() -> Option<(Box<dyn Machine>, Console)> {
    let kvm = kvm()?;
    let console = Console::new();
    let mut spec = MachineSpec::new("exits", Architecture::X86_64, guest::boot().unwrap(), console.port());
    spec.vcpus = NonZeroU32::new(2).unwrap();
    spec.disks = vec![DiskSpec::new(MemoryDisk::new(1 << 20).unwrap().into_disk(), "vol-1")];
    let machine = kvm.create(spec).unwrap();
    assert_eq!(machine.vm_exits(), [VmExits::default(); 2], "it has not begun");
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    Some((machine, console))
}

fn ask(console: &Console, command: &str, answer: &str) -> String {
    let mut reader = console.reader_from_now();
    console.write_all(format!("{command}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(answer, soon()).unwrap();
    String::from_utf8(reader.wait_for("\n", soon()).unwrap()).unwrap().trim().to_owned()
}

#[test]
fn each_kind_is_counted_where_it_happens() {
    let Some((machine, console)) = up() else { return };
    ask(&console, "ping before", "pong");
    let [before, other] = machine.vm_exits()[..] else { panic!("two processors") };
    assert_eq!(other, VmExits::default(), "nobody has started the second processor");
    assert_eq!((before.memory_reads, before.memory_writes), (0, 0));
    // A byte is written after one look at least, and the line's end is one of them.
    ask(&console, "ping hello", "pong");
    let after = machine.vm_exits()[0];
    assert!(after.port_writes >= before.port_writes + "pong hello\n".len() as u64, "{before:?} {after:?}");
    assert!(after.port_reads >= before.port_reads + "pong hello\n".len() as u64, "{before:?} {after:?}");
    // Three registers of the disk, and of the entropy device, which is none.
    ask(&console, "disks", "disks");
    assert_eq!(machine.vm_exits()[0].memory_reads, 6);
    ask(&console, "flush 0", "flushed");
    assert!(machine.vm_exits()[0].memory_writes > 10, "it was set up: {:?}", machine.vm_exits());
    let before = machine.vm_exits()[0].interruptions;
    // It is not interrupted where it has just come out by itself.
    let until = soon();
    while machine.vm_exits()[0].interruptions == before {
        assert!(Instant::now() < until);
        machine.pause().unwrap();
        machine.resume().unwrap();
    }
}

#[test]
fn many_requests_at_once_cost_no_exit_each() {
    let Some((machine, console)) = up() else { return };
    let count = |what: &str, requests: u64| -> u64 {
        let before = machine.vm_exits()[0].total();
        let notified = ask(&console, &format!("storm 0 {what} {requests}"), "notified");
        // Notifications are seen to in the kernel.
        machine.vm_exits()[0].total() - before + notified.parse::<u64>().unwrap()
    };
    for what in ["write", "read"] {
        // What the command itself costs.
        let (few, many) = (count(what, 32), count(what, 20_000));
        println!("{what}: {few} exits for 32 requests, {many} for 20000");
        assert!(many.saturating_sub(few) <= 2_000, "{few} for 32 requests, {many} for 20000");
    }
    // The disk has an ordinary driver again.
    ask(&console, "write 0 5 word", "wrote");
    assert_eq!(ask(&console, "read 0 5", "data"), "word");
}
