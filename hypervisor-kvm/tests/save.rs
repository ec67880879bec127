//! Machines that are saved: many of one, damaged ones, and the golden files of the format.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs::File;
use std::num::NonZeroU32;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ami_core::Architecture;
use common::soon;
use hypervisor_kvm::{Kvm, Transport};
use instance_core::console::Console;
use instance_core::machine::{
    DiskSpec, Hypervisor, Machine, MachineErrorKind, MachineSpec, NetSpec, RestoreSpec, SavedMachine,
};
use instance_core::net::{self, NetPort};
use storage_block::{BlockBackend, Disk, MemoryDisk, RawFile};

const MAC: &str = "02:00:0a:00:00:0c";
const HEADER: usize = 32;

fn disk() -> Disk {
    disk_of(1)
}

fn disk_of(mib: u64) -> Disk {
    MemoryDisk::new(mib << 20).unwrap().into_disk()
}

fn net() -> (NetSpec, NetPort) {
    let (machine, network) = net::link();
    let mut net = NetSpec::new(machine, MAC.parse().unwrap());
    net.mtu = 1400;
    (net, network)
}

fn say(console: &Console, line: &str, answer: &str) {
    let mut reader = console.reader();
    console.write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(answer, soon()).unwrap();
}

/// A machine with two processors, a disk, a network port and a virtio console, saved when it has been told to remember a word.
fn saved(kvm: &Kvm, mib: u32) -> File {
    let console = Console::new();
    let boot = common::guest::boot().unwrap();
    let mut spec = MachineSpec::new("golden", Architecture::X86_64, boot, console.port());
    (spec.vcpus, spec.memory_mib) = (NonZeroU32::new(2).unwrap(), NonZeroU32::new(mib).unwrap());
    spec.disks = vec![DiskSpec::new(disk(), "vol-golden")];
    let (net, _network) = net();
    spec.nets = vec![net];
    spec.virtio_console = Some(Console::new().port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    say(&console, "ping x", "pong x");
    // Its driver is at work, and the other processor is too.
    say(&console, "cpus", "cpus 2");
    say(&console, "write 0 1 word", "wrote");
    // One whose network is up never rests, which is enough of one transport: many are made of it.
    if kvm.capabilities().max_disks < 20 {
        say(&console, "up 0 10.0.0.12", "up");
    }
    say(&console, "remember golden", "remembered");
    machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    machine.save(&file).unwrap();
    file
}

fn restore(kvm: &Kvm, saved: &SavedMachine) -> Result<(Box<dyn Machine>, Console), MachineErrorKind> {
    let console = Console::new();
    let mut spec = RestoreSpec::new("restored", saved.clone(), console.port());
    spec.disks = vec![DiskSpec::new(disk(), "vol-golden")];
    let (net, _network) = net();
    spec.nets = vec![net];
    spec.virtio_console = Some(Console::new().port());
    let machine = kvm.restore(spec).map_err(|e| e.kind())?;
    Ok((machine, console))
}

/// The length of header and state, before the memory.
fn head_len(file: &File) -> usize {
    let mut len = [0; 8];
    file.read_exact_at(&mut len, 16).unwrap();
    HEADER + u64::from_le_bytes(len) as usize
}

#[test]
fn many_machines_start_from_one() {
    const MACHINES: usize = 50;
    let Some(kvm) = common::kvm() else { return };
    for transport in [Transport::Mmio, Transport::Pci] {
        let kvm = kvm.clone().with_transport(transport);
        let file = saved(&kvm, 512);
        // It has holes where the memory is zero, which is nearly everywhere.
        let meta = file.metadata().unwrap();
        assert!(meta.len() > 512 << 20, "{} bytes", meta.len());
        assert!(meta.blocks() * 512 < 4 << 20, "{} bytes on disk", meta.blocks() * 512);
        let saved = SavedMachine::new(file).unwrap();
        let machines: Vec<_> = (0..MACHINES).map(|_| restore(&kvm, &saved).unwrap()).collect();
        for (n, (machine, console)) in machines.iter().enumerate() {
            machine.resume().unwrap();
            say(console, "recall", "recalled golden");
            say(console, &format!("remember {n}"), "remembered");
        }
        for (n, (_, console)) in machines.iter().enumerate() {
            say(console, "recall", &format!("recalled {n}\n"));
        }
    }
}

/// A disk of blocks that are read by the host's kernel, where that may be asked to.
fn disk_in_file() -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 1 << 20], 0).unwrap();
    RawFile::from_file(file, false).unwrap().into_disk()
}

/// Both go on, and no request is lost.
#[test]
fn a_machine_is_saved_while_many_requests_are_under_way() {
    let Some(kvm) = common::kvm() else { return };
    let disks = [(disk(), "read"), (disk(), "write"), (disk_in_file(), "read")];
    let all = disks.iter().flat_map(|disk| [Transport::Mmio, Transport::Pci].map(|on| (disk, on)));
    for ((disk, what), transport) in all {
        let kvm = kvm.clone().with_transport(transport);
        let console = Console::new();
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("storm", Architecture::X86_64, boot, console.port());
        spec.disks = vec![DiskSpec::new(disk.clone(), "vol-1")];
        let machine = kvm.create(spec).unwrap();
        machine.start().unwrap();
        let mut reader = console.reader();
        reader.wait_for("GUEST READY\n", soon()).unwrap();
        console.write_all(format!("storm 0 {what} 60000\n").as_bytes(), soon()).unwrap();
        // Its driver is about to begin.
        while machine.vm_exits()[0].memory_writes < 10 {
            std::thread::yield_now();
        }
        let mut ended = false;
        for n in 0..3 {
            machine.pause().unwrap();
            ended = reader.wait_for("notified ", Instant::now()).is_ok();
            if ended {
                break;
            }
            let file = tempfile::tempfile().unwrap();
            machine.save(&file).unwrap();
            let console = Console::new();
            let saved = SavedMachine::new(file).unwrap();
            let mut spec = RestoreSpec::new("restored", saved, console.port());
            spec.disks = vec![DiskSpec::new(disk.clone(), "vol-1")];
            let restored = kvm.restore(spec).unwrap();
            restored.resume().unwrap();
            let told = console.reader().wait_for("notified ", soon());
            assert!(told.is_ok(), "{what} on {transport:?}, {n}: {told:?}");
            machine.resume().unwrap();
        }
        assert!(ended || reader.wait_for("notified ", soon()).is_ok(), "{what} on {transport:?}");
    }
}

#[test]
fn a_file_that_is_not_empty_is_left_alone() {
    let Some(kvm) = common::kvm() else { return };
    let saved = SavedMachine::new(saved(&kvm, 16)).unwrap();
    let (machine, _console) = restore(&kvm, &saved).unwrap();
    // Above all the one that its memory is read from.
    let refused = machine.save(saved.file()).unwrap_err();
    assert_eq!(refused.kind(), MachineErrorKind::Host, "{refused}");
    assert_eq!(saved.file().metadata().unwrap().len(), saved.len());
}

#[test]
fn damaged_machines_are_refused_or_do_no_harm() {
    let Some(kvm) = common::kvm() else { return };
    let file = saved(&kvm, 4);
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let head = head_len(&file);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut refused, mut restored) = (0, 0);
    for n in 0..400 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mut damaged = bytes.clone();
        damaged[HEADER + (random >> 16) as usize % (head - HEADER)] ^= (random >> 8) as u8 | 1;
        if n % 4 != 0 {
            // By somebody who knows the format.
            let checksum = crc32c::crc32c(&damaged[HEADER..head]);
            damaged[12..16].copy_from_slice(&checksum.to_le_bytes());
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&damaged, 0).unwrap();
        match restore(&kvm, &SavedMachine::new(file).unwrap()) {
            Ok((machine, console)) => {
                restored += 1;
                machine.resume().unwrap();
                // Its guest may have become anything; what counts is that it can be ended.
                let _ = console.write_all(b"recall\n", Instant::now() + Duration::from_millis(1));
                machine.kill();
            }
            Err(kind) => {
                refused += 1;
                assert!(matches!(kind, MachineErrorKind::Saved | MachineErrorKind::Host), "{kind:?}");
            }
        }
    }
    assert!(refused >= 100 && restored >= 100, "{refused} are refused, {restored} restored");
    let saved = SavedMachine::new(file).unwrap();
    let (machine, console) = restore(&kvm, &saved).unwrap();
    machine.resume().unwrap();
    say(&console, "recall", "recalled golden");
}

/// A disk that can grow while it is used.
#[derive(Debug)]
struct Growing {
    size: Arc<AtomicU64>,
    inner: Disk,
}

impl BlockBackend for Growing {
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage_block::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> storage_block::Result<()> {
        self.inner.write_at(buf, offset)
    }

    fn flush(&self) -> storage_block::Result<()> {
        self.inner.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> storage_block::Result<()> {
        self.inner.write_zeroes(offset, len)
    }
}

#[test]
fn a_machine_whose_disk_has_grown_goes_on_with_that() {
    let Some(kvm) = common::kvm() else { return };
    for transport in [Transport::Mmio, Transport::Pci] {
        let kvm = kvm.clone().with_transport(transport);
        let size = Arc::new(AtomicU64::new(1 << 20));
        let growing = Growing { size: size.clone(), inner: disk_of(2) };
        let console = Console::new();
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("growing", Architecture::X86_64, boot, console.port());
        spec.disks = vec![DiskSpec::new(Disk::new(growing).unwrap(), "vol-1")];
        let machine = kvm.create(spec).unwrap();
        machine.start().unwrap();
        say(&console, "ping x", "pong x");
        size.store(2 << 20, Ordering::SeqCst);
        machine.disk_grown("vol-1").unwrap();
        machine.pause().unwrap();
        let file = tempfile::tempfile().unwrap();
        machine.save(&file).unwrap();
        let saved = SavedMachine::new(file).unwrap();
        let restored = |mib: u64, console: &Console| {
            let mut spec = RestoreSpec::new("grown", saved.clone(), console.port());
            spec.disks = vec![DiskSpec::new(disk_of(mib), "vol-1")];
            kvm.restore(spec)
        };
        assert_eq!(restored(1, &Console::new()).map(drop).unwrap_err().kind(), MachineErrorKind::Saved);
        let console = Console::new();
        let machine = restored(2, &console).unwrap();
        machine.resume().unwrap();
        say(&console, "ping again", "pong again");
    }
}

/// Run it to write the golden files of a new version of the format.
#[test]
#[ignore = "writes golden files"]
fn writes_golden_files() {
    let kvm = Kvm::open().unwrap();
    for (transport, name) in [(Transport::Mmio, "saved-4-mmio"), (Transport::Pci, "saved-4-pci")] {
        let file = saved(&kvm.clone().with_transport(transport), 4);
        let mut head = vec![0; head_len(&file)];
        file.read_exact_at(&mut head, 0).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        std::fs::create_dir_all(&golden).unwrap();
        std::fs::write(golden.join(name), head).unwrap();
    }
}
