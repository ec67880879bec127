//! A machine for which the process has too few descriptors is not made; one that is made can serve its disks.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::Write as _;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, Hypervisor, MachineErrorKind, MachineSpec};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use storage_block::RawFile;

/// The limit is the whole process's, so this is the only test here.
#[test]
fn a_disk_that_cannot_be_served_is_no_machine() {
    let Some(kvm) = common::kvm() else { return };
    let boot = common::guest::boot().unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[0; 1 << 20]).unwrap();
    let disk = RawFile::open(file.path(), false).unwrap().into_disk();
    let console = Console::new();
    let make = || {
        let mut spec = MachineSpec::new("few", Architecture::X86_64, boot.clone(), console.port());
        spec.memory_mib = NonZeroU32::new(64).unwrap();
        spec.disks = vec![DiskSpec::new(disk.clone(), "vol-1")];
        kvm.create(spec)
    };
    // What is made once in a process is no machine's.
    drop(make().unwrap());
    let usual = getrlimit(Resource::Nofile);
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let allow = |most| setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..usual }).unwrap();
    let mut refusals = Vec::new();
    let machine = (open - 1..open + 100).find_map(|most| {
        allow(most);
        match make() {
            Ok(machine) => Some(machine),
            Err(error) => {
                assert_eq!(error.kind(), MachineErrorKind::Host);
                refusals.push(error.to_string());
                None
            }
        }
    });
    let machine = machine.expect("so many are enough for a machine");
    assert!(refusals.iter().any(|said| said == "disk \"vol-1\" cannot be served"), "{refusals:?}");
    let soon = Instant::now() + Duration::from_secs(60);
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon).unwrap();
    // No request has failed.
    console.write_all(b"storm 0 read 32\n", soon).unwrap();
    console.reader().wait_for("notified", soon).unwrap();
    allow(usual.current.unwrap_or(open));
}
