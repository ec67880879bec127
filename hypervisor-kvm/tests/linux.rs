//! KVM passes the suite of the contract, with a stock Linux as the guest, wherever it runs a guest's
//! kernel on the processor: on a host with hardware virtualisation, and in the lab (`cargo xtask lab`).
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant, SystemTime};

use ami_core::Architecture;
use common::held::private_bytes;
use common::linux;
use common::{PATIENCE, soon};
use hypervisor_kvm::{Confinement, CpuLevel, Kvm, Transport};
use instance_core::console::{Console, ConsoleReader, ConsoleSize};
use instance_core::machine::{
    ExitCause, Hypervisor, Machine, MachineSpec, MachineState, NetSpec, RestoreSpec, SavedMachine,
};
use instance_core::net::{self, NetPort};
use instance_core::testing::conformance::{Link, TestBed};
use instance_core::vsock::{self, Stream, Vsock, VsockSpec};

#[test]
fn kvm_conforms_with_linux() {
    let Some(kvm) = common::kvm_as_it_comes() else { return };
    let execution = kvm.execution().unwrap();
    println!("{execution:?}");
    if !execution.is_hardware() {
        return skip("this host's KVM emulates guest kernels; `cargo xtask test` runs this in the lab");
    }
    boots_by_the_64_bit_entry(&kvm.clone().with_cpu_level(CpuLevel::V1).unwrap());
    println!("processors are {}", kvm.cpu_level());
    is_as_large_as_it_is_told(&kvm);
    let on_mmio = kvm.clone().with_transport(Transport::Mmio);
    has_drivers_for_every_device(&kvm);
    gives_free_memory_back(&kvm);
    println!("on virtio-mmio:");
    has_drivers_for_every_device(&on_mmio);
    let bed_of = |kvm, boot, architecture| TestBed {
        hypervisor: kvm,
        boot,
        architecture,
        foreign_architecture: Architecture::Arm64,
        patience: PATIENCE,
        kill_within: Duration::from_secs(1),
        vcpus: 2,
        memory_mib: 256,
        link: Link::cable,
    };
    let bed = |kvm| bed_of(kvm, linux::boot("amd64", true), Architecture::X86_64);
    println!("on PCI:");
    bed(&kvm).run();
    let only = |these: &'static [&str]| move |check: &str| these.iter().any(|what| check.contains(what));
    let confined = |kvm: &Kvm| kvm.clone().with_confinement(Confinement::new());
    println!("on virtio-mmio, and confined:");
    let confined_on_mmio = confined(&on_mmio);
    bed(&confined_on_mmio).run_those(only(&[
        "disk",
        "network port",
        "power button",
        "restores",
        "gives everything back",
    ]));
    println!("confined:");
    let confined = confined(&kvm);
    bed(&confined).run_those(only(&["attaches", "holds it", "gives everything back"]));
    let works = &["hardware", "reads and writes", "power-off", "power button", "carries frames"][..];
    let (amd64, i386) = (Architecture::X86_64, Architecture::X86);
    for (guest, architecture, works) in [
        ("debian-13", amd64, works),
        ("i386", i386, works),
        // Those that are made for all hardware.
        ("full", amd64, &works[..1]),
        ("debian-13-full", amd64, &works[..1]),
    ] {
        if !linux::directory().join(guest).is_dir() {
            let why =
                format!("there is no guest {guest}: not checked (`cargo xtask guest --others` makes it)");
            assert!(std::env::var_os("CI").is_none(), "{why}");
            println!("{why}");
            continue;
        }
        println!("{guest}, from its root disk:");
        bed_of(&kvm, linux::boot_of_disk(guest), architecture).run_those(only(works));
    }
}

/// By the entry of kernels without a PVH note, on the least that a processor can be.
fn boots_by_the_64_bit_entry(kvm: &Kvm) {
    let console = Console::new();
    let spec = MachineSpec::new("64-bit", Architecture::X86_64, linux::boot("amd64", false), console.port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    let soon = soon();
    console.reader().wait_for("GUEST READY", soon).unwrap();
    console.write_all(b"poweroff\n", soon).unwrap();
    let end = machine.state().wait(soon, |state| state.exit_cause().is_some()).unwrap();
    assert_eq!(end, MachineState::Exited(ExitCause::PowerOff));
}

/// Many processors, and memory on both sides of the hole below 4 GiB. Not all 64 that there can be: they would take minutes of
/// the lab's.
fn is_as_large_as_it_is_told(kvm: &Kvm) {
    let (vcpus, mib) = (8, 5 << 10);
    let console = Console::new();
    let mut spec =
        MachineSpec::new("large", Architecture::X86_64, linux::boot("amd64", true), console.port());
    (spec.vcpus, spec.memory_mib) = (vcpus.try_into().unwrap(), mib.try_into().unwrap());
    spec.threads_per_core = 2.try_into().unwrap();
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    let (soon, mut reader) = (Instant::now() + 5 * PATIENCE, console.reader());
    reader.wait_for("GUEST READY", soon).unwrap();
    // What lies between 640 KiB and 1 MiB is no RAM.
    for (ask, answer) in [("cpus", vcpus), ("memory", mib - 1)] {
        console.write_all(format!("{ask}\n").as_bytes(), soon).unwrap();
        reader.wait_for(&format!("{ask} {answer}"), soon).unwrap();
    }
    let mut guest = Guest { machine, console, reader };
    for (file, shown) in [
        ("smt/active", "1"),
        ("cpu2/cache/index2/size", "1024K"),
        ("cpu2/cache/index2/shared_cpu_list", "2-3"),
        ("cpu1/topology/core_id", "0"),
        ("cpu2/topology/core_id", "1"),
        ("cpu7/topology/core_id", "3"),
        ("cpu7/topology/physical_package_id", "0"),
    ] {
        assert_eq!(guest.show(&format!("devices/system/cpu/{file}")), shown, "{file}");
    }
}

/// A guest that is asked about its devices.
struct Guest {
    machine: Box<dyn Machine>,
    console: Console,
    reader: ConsoleReader,
}

impl Guest {
    /// The first line of a file under `/sys`.
    fn show(&mut self, file: &str) -> String {
        let soon = soon();
        self.console.write_all(format!("show {file}\n").as_bytes(), soon).unwrap();
        loop {
            let line = self.reader.wait_for("\n", soon).unwrap();
            let line = String::from_utf8(line).unwrap();
            match line.trim().split_once(' ') {
                Some(("show", shown)) => return shown.to_owned(),
                // What is left of the line before.
                None if line.trim().is_empty() => {}
                _ => panic!("{file}: {line}"),
            }
        }
    }

    /// What `open` gives of the host's end of a stream, which the guest's program is told of and says that it has.
    fn stream(&mut self, told: &str, says: &str, open: impl FnOnce() -> Stream) -> Stream {
        let soon = soon();
        self.console.write_all(format!("vsock {told}\n").as_bytes(), soon).unwrap();
        self.reader.wait_for(&format!("vsock: {says}"), soon).unwrap();
        let mut stream = open();
        stream.set_deadline(Some(soon));
        stream
    }

    /// Either side opens a stream, which comes back whole from the guest, and ends.
    fn echoes_streams(&mut self, host: &Vsock) {
        let soon = soon();
        let listener = host.listen(5000).unwrap();
        let from_guest = self.stream("connect 5000", "connected", || listener.accept(soon).unwrap());
        self.echoes(from_guest);
        let from_host = self.stream("listen 7", "listening", || host.connect(7, soon).unwrap());
        self.echoes(from_host);
    }

    fn echoes(&mut self, mut stream: Stream) {
        // More than both sides keep.
        let all: Vec<u8> = (0..400_000_u32).map(|n| (n % 253) as u8).collect();
        let (mut writer, sent) = (stream.clone(), all.clone());
        let writing = std::thread::spawn(move || writer.write_all(&sent));
        let mut got = vec![0; all.len()];
        stream.read_exact(&mut got).unwrap();
        writing.join().unwrap().unwrap();
        assert!(got == all, "the guest's echo is not what it was sent");
        drop(stream);
        self.reader.wait_for("vsock: ended", soon()).unwrap();
    }

    /// Waits for a balloon of so many MiB.
    fn wait_for_balloon(&self, mib: u32) {
        let soon = soon();
        self.machine.set_balloon(mib).unwrap();
        while self.machine.balloon().unwrap() != mib {
            assert!(Instant::now() < soon, "{} MiB, not {mib}", self.machine.balloon().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until an interrupt of ACPI's has come so often.
    fn wait_for_event(&mut self, times: &str) {
        let soon = soon();
        loop {
            let shown = self.show("firmware/acpi/interrupts/gpe00");
            assert!(shown.contains("enabled"), "{shown}");
            if shown.split(' ').next() == Some(times) {
                return;
            }
            assert!(Instant::now() < soon, "{shown}");
        }
    }
}

fn has_drivers_for_every_device(kvm: &Kvm) {
    let (port, host) = vsock::cable();
    let (console, terminal) = (Console::new(), Console::new());
    terminal.resize(ConsoleSize { columns: 132, rows: 43 });
    let mut spec =
        MachineSpec::new("devices", Architecture::X86_64, linux::boot("amd64", true), console.port());
    (spec.memory_mib, spec.vsock) = (256.try_into().unwrap(), Some(VsockSpec::new(port)));
    spec.virtio_console = Some(terminal.port());
    let (net, _network) = net_port();
    (spec.vcpus, spec.nets) = (2.try_into().unwrap(), vec![net]);
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    let mut guest = Guest { machine, reader: console.reader(), console };
    guest.reader.wait_for("GUEST READY", soon()).unwrap();

    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let before = now();
    let clock: u64 = guest.show("class/rtc/rtc0/since_epoch").parse().unwrap();
    assert!((before..=now()).contains(&clock), "{before} <= {clock}");
    let generation = guest.show("bus/acpi/devices/QEMUVGID:00/modalias");
    assert_eq!(generation, "acpi:QEMUVGID:VM_GEN_COUNTER:");
    // Its driver has asked for a pair of queues for each processor, and was given them.
    assert_eq!(guest.show("class/net/eth0/queues/tx-1/tx_timeout"), "0");
    // Its driver answers that nobody listens there.
    let refused = host.connect(9999, soon()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
    guest.echoes_streams(&host);
    let listener = host.listen(6000).unwrap();
    let _broken = guest.stream("connect 6000", "connected", || listener.accept(soon()).unwrap());
    talk(&terminal, "hello", "said hello");
    wait_for_size(&terminal, "43 132");
    terminal.resize(ConsoleSize { columns: 90, rows: 30 });
    wait_for_size(&terminal, "30 90");
    // More than its queues hold.
    talk(&terminal, &"x".repeat(4000), &format!("said {}", "x".repeat(4000)));
    guest.wait_for_balloon(64);
    guest.wait_for_balloon(0);
    guest.wait_for_balloon(32);

    guest.wait_for_event("0");
    guest.machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    guest.machine.save(&file).unwrap();
    drop(guest);
    let (port, host) = vsock::cable();
    let (console, terminal) = (Console::new(), Console::new());
    terminal.resize(ConsoleSize { columns: 200, rows: 60 });
    let mut spec = RestoreSpec::new("restored", SavedMachine::new(file).unwrap(), console.port());
    spec.vsock = Some(VsockSpec::new(port));
    spec.virtio_console = Some(terminal.port());
    let (net, _network) = net_port();
    spec.nets = vec![net];
    let machine = kvm.restore(spec).unwrap();
    let mut guest = Guest { machine, reader: console.reader(), console };
    guest.machine.resume().unwrap();
    // The stream that it had when it was saved has another end than the host's.
    guest.reader.wait_for("vsock: reset", soon()).unwrap();
    guest.wait_for_event("1");
    guest.echoes_streams(&host);
    guest.wait_for_balloon(48);
    wait_for_size(&terminal, "60 200");
    talk(&terminal, "again", "said again");
}

/// The kernel reports pages that were free for a while to the balloon, which nobody has asked for anything.
fn gives_free_memory_back(kvm: &Kvm) {
    // More than any other machine here has.
    const MEMORY: u32 = 384;
    // Files have half of the memory.
    const USED: u64 = 96;
    const MOST: u64 = 3 * USED / 4;
    let console = Console::new();
    let mut spec =
        MachineSpec::new("reports", Architecture::X86_64, linux::boot("amd64", true), console.port());
    spec.memory_mib = MEMORY.try_into().unwrap();
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    let (soon, mut reader) = (Instant::now() + 2 * PATIENCE, console.reader());
    let held = || private_bytes(u64::from(MEMORY) << 20) >> 20;
    reader.wait_for("GUEST READY", soon).unwrap();
    console.write_all(format!("fill {USED}\n").as_bytes(), soon).unwrap();
    reader.wait_for("filled", soon).unwrap();
    let full = held();
    assert!(full >= USED, "{full} MiB are held of what {USED} MiB were written to");
    console.write_all(b"drain\n", soon).unwrap();
    reader.wait_for("drained", soon).unwrap();
    while held() > full - MOST {
        assert!(Instant::now() < soon, "{} of {full} MiB are held", held());
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{} of {full} MiB are held when they are free", held());
    assert_eq!(machine.balloon().unwrap(), 0);
}

fn net_port() -> (NetSpec, NetPort) {
    let (machine, network) = net::link();
    (NetSpec::new(machine, "02:00:0a:00:00:0c".parse().unwrap()), network)
}

/// What the guest says at its second console to what it is told there.
fn talk(terminal: &Console, told: &str, said: &str) {
    let mut reader = terminal.reader_from_now();
    terminal.write_all(format!("{told}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(said, soon()).unwrap();
}

/// Waits until the guest knows of a second console of this size: rows and columns.
fn wait_for_size(terminal: &Console, size: &str) {
    let soon = soon();
    let mut reader = terminal.reader_from_now();
    loop {
        terminal.write_all(b"size\n", soon).unwrap();
        let line = String::from_utf8(reader.wait_for("\n", soon).unwrap()).unwrap();
        if line.trim() == size {
            return;
        }
        assert!(Instant::now() < soon, "{line:?}, not {size:?}");
    }
}

/// Says why the test does nothing. In the lab there is no reason to.
fn skip(reason: &str) {
    assert!(std::env::var_os("AMI_LAB").is_none(), "nothing may be skipped in the lab, but: {reason}");
    eprintln!("SKIPPED: {reason}");
}
