//! Machines that are dropped at any moment give everything back, and no thread is needed to wait for it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use common::soon;
use hypervisor_kvm::{Confinement, Kvm, Transport};
use instance_core::console::Console;
use instance_core::machine::{
    DiskSpec, ExitCause, Hypervisor, Machine, MachineSpec, MachineState, NetSpec, RestoreSpec, SavedMachine,
};
use instance_core::net::{self, NetPort};
use instance_core::vsock::{self, Vsock, VsockSpec};
use storage_block::{Disk, MemoryDisk, RawFile};

/// How many machines are dropped, unless `KVM_DROPS` says how many: in the lab fewer, where it takes ten times as long.
const MACHINES: u32 = 1000;
const IN_LAB: u32 = 100;

/// What a machine has of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    threads: usize,
    descriptors: usize,
    processors: usize,
    /// All mappings but the heap, and their bytes.
    mappings: usize,
    bytes: usize,
}

/// What the C library may keep: stacks of threads that have ended, which it uses again, up to 40 MiB of them. A guest's RAM
/// alone is more.
const MAPPINGS_KEPT: usize = 48;
const BYTES_KEPT: usize = 48 << 20;

impl Held {
    fn now() -> Self {
        let count = |dir| std::fs::read_dir(dir).unwrap().count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let maps: Vec<&str> = maps.lines().filter(|line| !line.ends_with("[heap]")).collect();
        let bytes = |line: &&str| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let [start, end] = [start, end].map(|number| usize::from_str_radix(number, 16).unwrap());
            end - start
        };
        Self {
            threads: count("/proc/self/task"),
            descriptors: count("/proc/self/fd"),
            processors: maps.iter().filter(|line| line.contains("kvm-vcpu")).count(),
            mappings: maps.len(),
            bytes: maps.iter().map(bytes).sum(),
        }
    }

    fn is_no_more_than(self, before: Self) -> bool {
        let exactly = |held: Self| (held.threads, held.descriptors, held.processors);
        exactly(self) == exactly(before)
            && self.mappings <= before.mappings + MAPPINGS_KEPT
            && self.bytes <= before.bytes + BYTES_KEPT
    }
}

/// Has the C library take memory from one place, however many threads there are, which else have one each that stays.
#[allow(unsafe_code, reason = "a setting of the C library's")]
fn keep_one_heap() {
    // SAFETY: it changes a number, and no other thread of this test is there yet.
    assert_eq!(unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) }, 1);
}

/// What machines are made of, of all kinds.
struct Kinds {
    kvm: Kvm,
    disks: [Disk; 2],
    /// One of each transport, where machines can be saved.
    saved: Option<[SavedMachine; 2]>,
}

/// What a machine has to do with while it lives.
struct Made {
    machine: Box<dyn Machine>,
    console: Console,
    _outside: Option<(NetPort, Vsock, Console)>,
}

const TRANSPORTS: [Transport; 2] = [Transport::Mmio, Transport::Pci];

impl Kinds {
    fn new(kvm: Kvm) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 1 << 20], 0).unwrap();
        // Threads serve the one, and the host's kernel the other where it may.
        let in_memory = MemoryDisk::new(1 << 20).unwrap().into_disk();
        let disks = [in_memory, RawFile::from_file(file, false).unwrap().into_disk()];
        let mut kinds = Self { kvm, disks, saved: None };
        kinds.saved = kinds.kvm.capabilities().save.then(|| {
            TRANSPORTS.map(|transport| {
                let Made { machine, console, _outside } = kinds.new_one(transport, true, false);
                machine.start().unwrap();
                console.reader().wait_for("GUEST READY\n", soon()).unwrap();
                machine.pause().unwrap();
                let file = tempfile::tempfile().unwrap();
                machine.save(&file).unwrap();
                SavedMachine::new(file).unwrap()
            })
        });
        kinds
    }

    /// The `n`th: new or restored, on either transport, with all devices or with disks alone, confined or not.
    fn make(&self, n: u32) -> Made {
        let bit = |of: u32| n >> of & 1 == 1;
        let (transport, confined) = (usize::from(bit(0)), bit(2));
        match &self.saved {
            Some(saved) if n % 5 > 2 => self.restored(&saved[transport], confined),
            _ => self.new_one(TRANSPORTS[transport], bit(1), confined),
        }
    }

    fn kvm(&self, transport: Transport, confined: bool) -> Kvm {
        let kvm = self.kvm.clone().with_transport(transport);
        if confined { kvm.with_confinement(Confinement::new()) } else { kvm }
    }

    fn disks(&self) -> Vec<DiskSpec> {
        self.disks.iter().zip(["vol-0", "vol-1"]).map(|(disk, id)| DiskSpec::new(disk.clone(), id)).collect()
    }

    fn new_one(&self, transport: Transport, with_all: bool, confined: bool) -> Made {
        let console = Console::new();
        let boot = common::guest::boot().unwrap();
        let mut spec = MachineSpec::new("drop", Architecture::X86_64, boot, console.port());
        spec.vcpus = NonZeroU32::new(2).unwrap();
        spec.disks = self.disks();
        let outside = with_all.then(|| {
            let (net, vsock, terminal, outside) = outside();
            (spec.nets, spec.vsock, spec.virtio_console) = (vec![net], Some(vsock), Some(terminal.port()));
            outside
        });
        Made { machine: self.kvm(transport, confined).create(spec).unwrap(), console, _outside: outside }
    }

    fn restored(&self, saved: &SavedMachine, confined: bool) -> Made {
        let console = Console::new();
        let mut spec = RestoreSpec::new("drop", saved.clone(), console.port());
        spec.disks = self.disks();
        let (net, vsock, terminal, outside) = outside();
        (spec.nets, spec.vsock, spec.virtio_console) = (vec![net], Some(vsock), Some(terminal.port()));
        let machine = self.kvm(Transport::Mmio, confined).restore(spec).unwrap();
        Made { machine, console, _outside: Some(outside) }
    }
}

/// A network port, a place for streams and a terminal, and their other ends.
fn outside() -> (NetSpec, VsockSpec, Console, (NetPort, Vsock, Console)) {
    let (port, network) = net::link();
    let (streams, host) = vsock::cable();
    let terminal = Console::new();
    let net = NetSpec::new(port, "02:00:0a:00:00:0c".parse().unwrap());
    (net, VsockSpec::new(streams), terminal.clone(), (network, host, terminal))
}

/// Alone in its file: it counts what the process holds.
#[test]
fn machines_dropped_at_any_moment_leave_nothing() {
    let Some(kvm) = common::kvm() else { return };
    keep_one_heap();
    let kinds = Kinds::new(kvm);
    (0..40).for_each(|n| drop(kinds.make(n)));
    let before = Held::now();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let usual = if std::env::var_os("AMI_LAB").is_some() { IN_LAB } else { MACHINES };
    let machines = std::env::var("KVM_DROPS").map_or(usual, |number| number.parse().unwrap());
    for n in 0..machines {
        // xorshift: the same moments in every run.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let Made { machine, console, _outside } = kinds.make(n);
        let state = machine.state();
        if random >> 32 & 7 != 0 {
            match state.get() {
                MachineState::Paused => machine.resume().unwrap(),
                _ => machine.start().unwrap(),
            }
            // Commands that end, or more requests than it lives to see the end of.
            let commands: &[u8] = match random >> 35 & 3 {
                0 => b"write 0 1 x\ncpus\nup 0 10.0.0.12\ncid\nterminal\n",
                1 => b"storm 0 write 4000000000\n",
                2 => b"storm 1 read 4000000000\n",
                _ => b"cid\nup 0 10.0.0.12\nread 1 0\n",
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
        drop((machine, _outside));
        let end = state.get();
        let by_button = n % 4 == 2 && end == MachineState::Exited(ExitCause::PowerOff);
        assert!(by_button || end == MachineState::Exited(ExitCause::Killed), "machine {n}: {end:?}");
        let held = Held::now();
        assert!(held.is_no_more_than(before), "machine {n}: {held:?} is held, before it was {before:?}");
    }
}
