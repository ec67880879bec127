//! KVM passes the suite of the contract, with a stock Linux as the guest, wherever it runs a guest's
//! kernel on the processor: on a host with hardware virtualisation, and in the lab (`cargo xtask lab`).
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use hypervisor_kvm::{Confinement, Kvm, Transport};
use instance_core::console::Console;
use instance_core::machine::{Boot, BootFile, ExitCause, Hypervisor, MachineSpec, MachineState};
use instance_core::testing::conformance::TestBed;

/// How long a kernel may take to boot, or to answer, on a processor that is itself emulated.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn kvm_conforms_with_linux() {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return skip(&error.to_string()),
    };
    let execution = kvm.capabilities().execution;
    println!("{execution:?}");
    if !execution.is_hardware() {
        return skip("this host's KVM emulates guest kernels; `cargo xtask test` runs this in the lab");
    }
    boots_by_the_64_bit_entry(&kvm);
    let bed_of = |kvm, guest, architecture| TestBed {
        hypervisor: kvm,
        boot: linux(guest, true),
        architecture,
        foreign_architecture: Architecture::Arm64,
        patience: PATIENCE,
        kill_within: Duration::from_secs(1),
        vcpus: 2,
        memory_mib: 256,
    };
    let bed = |kvm| bed_of(kvm, "amd64", Architecture::X86_64);
    bed(&kvm).run();
    println!("confined:");
    let confined = kvm.clone().with_confinement(Confinement::new());
    bed(&confined).run();
    println!("on PCI:");
    let on_pci = confined.clone().with_transport(Transport::Pci);
    let differs = ["disk", "network port", "restores", "gives everything back"];
    bed(&on_pci).run_those(|check| differs.iter().any(|what| check.contains(what)));
    let works = ["console", "hardware", "who it is", "reads and writes", "power", "reboot", "carries frames"];
    for (guest, architecture) in [("debian-13", Architecture::X86_64), ("i386", Architecture::X86)] {
        if !directory().join(guest).is_dir() {
            println!("there is no guest {guest}: not checked (`cargo xtask guest --others` makes it)");
            continue;
        }
        println!("{guest}:");
        bed_of(&kvm, guest, architecture).run_those(|check| works.iter().any(|what| check.contains(what)));
    }
}

fn boots_by_the_64_bit_entry(kvm: &Kvm) {
    let console = Console::new();
    let spec = MachineSpec::new("64-bit", Architecture::X86_64, linux("amd64", false), console.port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    let soon = Instant::now() + PATIENCE;
    console.reader().wait_for("GUEST READY", soon).unwrap();
    console.write_all(b"poweroff\n", soon).unwrap();
    let end = machine.state().wait(soon, |state| state.exit_cause().is_some()).unwrap();
    assert_eq!(end, MachineState::Exited(ExitCause::PowerOff));
}

/// Says why the test does nothing. In the lab there is no reason to.
fn skip(reason: &str) {
    assert!(std::env::var_os("AMI_LAB").is_none(), "nothing may be skipped in the lab, but: {reason}");
    eprintln!("SKIPPED: {reason}");
}

/// Where `cargo xtask guest` makes the guests.
fn directory() -> PathBuf {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from)
}

/// A conformance guest, with or without the note that names its PVH entry.
fn linux(guest: &str, pvh: bool) -> Boot {
    let dir = directory().join(guest);
    let packed = std::fs::read(dir.join("vmlinuz")).expect("`cargo xtask guest` makes the guest");
    let mut image = boot_image::unpack_kernel(&packed).unwrap().image.into_owned();
    if !pvh {
        // Type 18 (XEN_ELFNOTE_PHYS32_ENTRY) and the note's name.
        let note = [&18u32.to_le_bytes()[..], b"Xen\0"].concat();
        let at = image.windows(note.len()).position(|bytes| bytes == note).unwrap();
        image[at] = 99;
    }
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&image).unwrap();
    let initrd = BootFile::new(File::open(dir.join("conformance.img")).unwrap()).unwrap();
    Boot::new(BootFile::new(kernel).unwrap(), Some(initrd), "console=ttyS0 quiet panic=-1")
}
