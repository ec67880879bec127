//! What fails outside of a guest ends its machine, and is told as that.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, mpsc};
use std::time::Instant;

use ami_core::Architecture;
use common::soon;
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, ExitCause, Hypervisor, MachineSpec};
use storage_block::{BlockBackend, Disk, Result};

/// A disk whose second sector takes until one of its machine's threads has ended. Not the one that has asked for it: the
/// last to end waits for the disk.
#[derive(Debug)]
struct Slow {
    threads: Mutex<mpsc::Receiver<Vec<File>>>,
}

impl BlockBackend for Slow {
    fn size(&self) -> u64 {
        4096
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        if offset == 512 {
            let threads = self.threads.lock().unwrap().recv().unwrap();
            let until = soon();
            // It cannot be read of a thread that has ended.
            let all_run = || threads.iter().all(|thread| thread.read_at(&mut [0], 0).is_ok());
            while all_run() && Instant::now() < until {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

/// Sets how many descriptors the process may have, and says how many it might.
#[allow(unsafe_code, reason = "a limit of the process")]
fn limit_descriptors(to: libc::rlim_t) -> libc::rlim_t {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is this function's.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        let before = limit.rlim_cur;
        limit.rlim_cur = to;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        before
    }
}

/// The status of each thread of a machine.
fn threads(machine: &str) -> Vec<File> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let name = |task: &PathBuf| fs::read_to_string(task.join("comm")).unwrap();
    let tasks = tasks.filter(|task| name(task).starts_with(&format!("{machine}/")));
    tasks.map(|task| File::open(task.join("stat")).unwrap()).collect()
}

/// A device's thread that may wait for no descriptors any more. Alone in its file: the limit is the process's.
#[test]
fn a_device_that_cannot_be_served_ends_its_machine() {
    let Some(kvm) = common::kvm() else { return };
    let (tell, told) = mpsc::channel();
    let disk = Disk::new(Slow { threads: Mutex::new(told) }).unwrap();
    let console = Console::new();
    let boot = common::guest::boot().unwrap();
    let mut spec = MachineSpec::new("fails", Architecture::X86_64, boot, console.port());
    spec.disks = vec![DiskSpec::new(disk, "vol-1")];
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    let mut reader = console.reader();
    reader.wait_for("GUEST READY\n", soon()).unwrap();
    // It has what it needs to read.
    console.write_all(b"read 0 0\n", soon()).unwrap();
    reader.wait_for("data \n", soon()).unwrap();
    let threads = threads("fails");
    assert!(threads.len() >= 2, "a processor and a disk: {threads:?}");
    tell.send(threads).unwrap();
    let before = limit_descriptors(0);
    console.write_all(b"read 0 1\n", soon()).unwrap();
    let end = machine.state().wait(soon(), |state| state.exit_cause().is_some());
    limit_descriptors(before);
    let end = end.unwrap();
    let Some(ExitCause::HostFailure(why)) = end.exit_cause() else { panic!("{end:?}") };
    assert!(why.contains("device 0 cannot be served"), "{why}");
}
