//! The threads of a confined machine can do nothing but their work, and others are as free as before.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use ami_core::Architecture;
use hypervisor_kvm::{Confinement, Kvm};
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, Hypervisor, Machine, MachineSpec};
use storage_block::{BlockBackend, Disk, MemoryDisk, Result, Volume, VolumeOptions};

use common::{PATIENCE, guest, kvm, soon};

/// Whether things that a machine has no use for could be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Could {
    make_a_file: bool,
    open_a_socket: bool,
    open_a_file: bool,
    run_a_program: bool,
}

const ANYTHING: Could =
    Could { make_a_file: true, open_a_socket: true, open_a_file: true, run_a_program: true };
const NOTHING: Could =
    Could { make_a_file: false, open_a_socket: false, open_a_file: false, run_a_program: false };

fn try_things(dir: &Path) -> Could {
    let allowed = |done: io::Result<()>| match done {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => false,
        Err(error) => panic!("neither allowed nor refused: {error}"),
    };
    Could {
        make_a_file: allowed(File::create(dir.join("made")).map(drop)),
        open_a_socket: allowed(UdpSocket::bind("127.0.0.1:0").map(drop)),
        open_a_file: allowed(File::open(dir).map(drop)),
        run_a_program: allowed(std::process::Command::new("true").status().map(drop)),
    }
}

/// A disk whose reads try things out.
#[derive(Debug)]
struct Trying {
    inner: Disk,
    dir: std::path::PathBuf,
    tell: mpsc::Sender<Could>,
}

impl BlockBackend for Trying {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _ = self.tell.send(try_things(&self.dir));
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.write_zeroes(offset, len)
    }
}

/// A guest that is up, and its console.
fn up(kvm: &Kvm, disks: Vec<DiskSpec>) -> (Box<dyn Machine>, Console) {
    let console = Console::new();
    let mut spec = MachineSpec::new("confined", Architecture::X86_64, guest::boot().unwrap(), console.port());
    spec.disks = disks;
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    (machine, console)
}

/// What code of an embedder's could do in a disk's thread, and in a processor's.
fn could(kvm: &Kvm) -> [Could; 2] {
    let dir = tempfile::tempdir().unwrap();
    let (tell, told) = mpsc::channel();
    let trying = Trying {
        inner: MemoryDisk::new(4096).unwrap().into_disk(),
        dir: dir.path().to_owned(),
        tell: tell.clone(),
    };
    let (machine, console) = up(kvm, vec![DiskSpec::new(Disk::new(trying).unwrap(), "vol-1")]);
    console.write_all(b"read 0 0\n", soon()).unwrap();
    let on_disk = told.recv_timeout(PATIENCE).unwrap();
    drop(machine);

    // The processor's thread is the only one, and so the last: the hook runs in it.
    let (machine, console) = up(kvm, Vec::new());
    let path = dir.path().to_owned();
    machine.state().subscribe(move |state| {
        if state.exit_cause().is_some() {
            let _ = tell.send(try_things(&path));
        }
    });
    console.write_all(b"poweroff\n", soon()).unwrap();
    [on_disk, told.recv_timeout(PATIENCE).unwrap()]
}

#[test]
fn a_confined_thread_is_refused_what_it_has_no_use_for() {
    let Some(kvm) = kvm() else { return };
    assert_eq!(could(&kvm), [ANYTHING, ANYTHING], "nobody is confined unasked");
    let confined = kvm.clone().with_confinement(Confinement::new());
    // A disk's thread opens the packs of snapshots, and makes the logs of volumes.
    let files = Could { open_a_file: true, make_a_file: true, ..NOTHING };
    assert_eq!(could(&confined), [files, NOTHING]);
    let more = Confinement::new()
        .allow_devices([libc::SYS_socket, libc::SYS_bind, libc::SYS_setsockopt])
        .allow_processors([libc::SYS_openat, libc::SYS_fcntl]);
    let [on_disk, on_processor] = could(&kvm.clone().with_confinement(more));
    assert_eq!(on_disk, Could { open_a_socket: true, ..files });
    assert_eq!(on_processor, Could { open_a_file: true, make_a_file: true, ..NOTHING });
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(try_things(dir.path()), ANYTHING, "who made the machines is as free as ever");
}

#[test]
fn a_new_volume_is_written_and_flushed_by_a_confined_guest() {
    let Some(kvm) = kvm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let made = Volume::create(&dir.path().join("vol-1"), None, 1 << 20).unwrap();
    // One whose files are made in the device's thread, and one whose cannot be.
    let on_write =
        |path: &str| VolumeOptions::new().create_on_write(&dir.path().join(path), None, 1 << 20, || ());
    let (unmade, refused) = (on_write("vol-2").unwrap(), on_write("vol-3").unwrap());
    fs::write(dir.path().join("vol-3"), "is no directory").unwrap();
    let confined = kvm.with_confinement(Confinement::new());
    let disks = [("vol-1", &made), ("vol-2", &unmade), ("vol-3", &refused)];
    let disks = disks.map(|(serial, volume)| DiskSpec::new(volume.disk(), serial));
    let (_machine, console) = up(&confined, disks.to_vec());
    let mut reader = console.reader_from_now();
    for (line, answer) in [
        ("write 0 0 kept", "wrote\n"),
        ("flush 0", "flushed\n"),
        ("write 1 0 kept", "wrote\n"),
        ("flush 1", "flushed\n"),
        ("write 2 0 kept", "error\n"),
    ] {
        console.write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
        reader.wait_for(answer, soon()).unwrap();
    }
}

/// The names of the threads that have a filter, of which a test's own is none.
fn filtered_threads() -> HashSet<String> {
    let mut names = HashSet::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        // A thread of another test may have ended.
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        if field("Seccomp:") == "2" {
            let name = field("Name:");
            assert!(name != "main" && !name.starts_with("each_"), "{name}");
            names.insert(name.to_owned());
        }
    }
    names
}

#[test]
fn each_thread_has_a_filter_and_no_other_has() {
    let Some(kvm) = kvm() else { return };
    let disk = MemoryDisk::new(4096).unwrap().into_disk();
    let confined = kvm.with_confinement(Confinement::new());
    let (_machine, _console) = up(&confined, vec![DiskSpec::new(disk, "vol-1")]);
    // A guest may be up before the thread of its disk has run.
    let until = soon();
    while !["confined/vcpu0", "confined/disk0"].iter().all(|name| filtered_threads().contains(*name)) {
        assert!(Instant::now() < until, "{:?}", filtered_threads());
        std::thread::yield_now();
    }
}
