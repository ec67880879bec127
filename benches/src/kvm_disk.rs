//! What a disk costs a guest: a driver in the guest's ring 3, which runs on the processor also where KVM emulates
//! kernels, keeps 32 requests of 4 KiB under way on a raw file, beside io_uring on the host that does the same.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::num::NonZeroU32;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use anyhow::{Context as _, ensure};
use instance_core::console::Console;
use instance_core::machine::{DiskSpec, Hypervisor as _, Machine, MachineSpec, VmExits};
use io_uring::{IoUring, opcode, types};
use storage_block::RawFile;
use tempfile::TempDir;

use crate::guest;
use crate::kvm::kvm_on_mmio;
use crate::samples::{Measurement, median, median_speed};
use crate::storage::Bench;

/// How long the guest may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// The file, which stays in the page cache: the disk under it is not what is measured.
const SIZE: u64 = 256 << 20;
const BLOCK: usize = 4096;
const DEPTH: u32 = 32;

/// Which way the data goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Read,
    Write,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    /// How many requests are a sample: some tenths of a second's, so that its beginning and its end do not count. A file
    /// system spends several times as long on a write as on a read, also of what stays in the page cache.
    fn requests(self, bench: &Bench) -> u64 {
        let full = match self {
            Self::Read => 200_000,
            Self::Write => 20_000,
        };
        bench.bytes(full * BLOCK as u64) / BLOCK as u64
    }
}

/// A guest that is up, with the file as its disk.
struct Storm {
    machine: Box<dyn Machine>,
    console: Console,
    file: File,
    _dir: TempDir,
}

impl Storm {
    fn new(bench: &Bench) -> anyhow::Result<Self> {
        let dir = bench.temp_dir()?;
        let path = dir.path().join("disk.raw");
        let file = filled(&path)?;
        let console = Console::new();
        let boot = guest::boot().map_err(anyhow::Error::msg)?;
        let mut spec = MachineSpec::new("storm", Architecture::X86_64, boot, console.port());
        spec.memory_mib = NonZeroU32::new(64).context("more than none")?;
        spec.disks = vec![DiskSpec::new(RawFile::open(&path, false)?.into_disk(), "vol-1")];
        let machine = kvm_on_mmio()?.create(spec)?;
        machine.start()?;
        console.reader().wait_for("GUEST READY\n", Instant::now() + PATIENCE)?;
        Ok(Self { machine, console, file, _dir: dir })
    }

    /// Has the guest's driver do so many requests. Returns how long that took, and how often it notified the device.
    fn run(&self, what: What, requests: u64) -> anyhow::Result<(Duration, u64)> {
        let until = Instant::now() + PATIENCE;
        let mut reader = self.console.reader_from_now();
        let begun = Instant::now();
        self.console.write_all(format!("storm 0 {} {requests}\n", what.name()).as_bytes(), until)?;
        reader.wait_for("notified ", until)?;
        let took = begun.elapsed();
        let notified = String::from_utf8(reader.wait_for("\n", until)?)?;
        Ok((took, notified.trim().parse()?))
    }

    /// How often so many requests have the guest left, by cause.
    fn exits(&self, what: What, requests: u64) -> anyhow::Result<[(&'static str, u64); 5]> {
        let so_far = || self.machine.vm_exits().into_iter().sum::<VmExits>();
        let before = so_far();
        let (_, notified) = self.run(what, requests)?;
        let now = so_far();
        let since = |of: fn(&VmExits) -> u64| of(&now) - of(&before);
        Ok([
            ("notifications", notified),
            ("ports", since(|exits| exits.port_reads + exits.port_writes)),
            ("memory", since(|exits| exits.memory_reads + exits.memory_writes)),
            ("interruptions", since(|exits| exits.interruptions)),
            ("others", since(|exits| exits.others)),
        ])
    }

    /// How long they take without the command itself, which is what the fewest requests take: the guest's kernel, which
    /// may be emulated, reads it and sets up the device.
    fn time(&self, what: What, requests: u64) -> anyhow::Result<Duration> {
        let (command, _) = self.run(what, DEPTH.into())?;
        let (all, _) = self.run(what, requests)?;
        Ok(all.saturating_sub(command))
    }
}

/// A file whose every block has been written.
fn filled(path: &Path) -> anyhow::Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    let piece = vec![0x5a; 1 << 20];
    for _ in 0..SIZE >> 20 {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// The same on the host: io_uring with as many requests under way.
fn host(file: &File, what: What, requests: u64) -> anyhow::Result<Duration> {
    let mut ring = IoUring::new(DEPTH)?;
    let mut buffers = vec![vec![0x5a_u8; BLOCK]; DEPTH as usize];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let fd = types::Fd(file.as_raw_fd());
    let (mut begun, mut ended) = (0, 0);
    let mut free: Vec<usize> = (0..buffers.len()).collect();
    let start = Instant::now();
    while ended < requests {
        while let Some(slot) = (begun < requests).then(|| free.pop()).flatten() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (random >> 33) % (SIZE / BLOCK as u64) * BLOCK as u64;
            let buffer = &mut buffers[slot];
            let entry = match what {
                What::Read => opcode::Read::new(fd, buffer.as_mut_ptr(), BLOCK as u32).offset(at).build(),
                What::Write => opcode::Write::new(fd, buffer.as_ptr(), BLOCK as u32).offset(at).build(),
            };
            // SAFETY: the buffers and the file outlive the ring's requests, each of which is waited for below, and
            // nobody else uses a buffer whose request is under way.
            #[allow(unsafe_code, reason = "the kernel is told addresses")]
            unsafe {
                ring.submission().push(&entry.user_data(slot as u64))?;
            }
            begun += 1;
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            ensure!(entry.result() == BLOCK as i32, "the host's request ended with {}", entry.result());
            free.push(entry.user_data() as usize);
            ended += 1;
        }
    }
    Ok(start.elapsed())
}

/// Of several guests, each with a file of its own: where its pages lie in memory makes a file a fifth slower or faster to
/// write to than another, for as long as they are there.
fn over_host(bench: &Bench, what: What) -> anyhow::Result<Measurement> {
    const STORMS: usize = 5;
    let storms = (0..STORMS).map(|_| Storm::new(bench)).collect::<anyhow::Result<Vec<_>>>()?;
    let requests = what.requests(bench);
    let next = |turn: &mut usize| {
        *turn += 1;
        &storms[*turn % STORMS]
    };
    // Each comes to the same one in a round.
    let mut turns = [0; 3];
    let [guest, file, again] = &mut turns;
    median_speed(
        bench.rounds(5 * STORMS),
        ("guest", &mut || next(guest).time(what, requests)),
        ("host", &mut || host(&next(file).file, what, requests)),
        ("host again", &mut || host(&next(again).file, what, requests)),
    )
}

/// The speed of a guest's random reads as a share of the host's.
///
/// # Errors
///
/// When there is no KVM, no io_uring or no C compiler, and those of machines.
pub fn machine_random_reads_over_host(bench: &Bench) -> anyhow::Result<Measurement> {
    over_host(bench, What::Read)
}

/// The speed of a guest's random writes as a share of the host's.
///
/// # Errors
///
/// As [`machine_random_reads_over_host`].
pub fn machine_random_writes_over_host(bench: &Bench) -> anyhow::Result<Measurement> {
    over_host(bench, What::Write)
}

/// How often the guest's processor leaves the guest for each request, notifications that the kernel sees to
/// among them.
///
/// # Errors
///
/// As [`machine_random_reads_over_host`].
pub fn machine_exits_per_request(bench: &Bench) -> anyhow::Result<Measurement> {
    let storm = Storm::new(bench)?;
    let mut samples = BTreeMap::<String, Vec<f64>>::new();
    let mut value = 0_f64;
    for what in [What::Read, What::Write] {
        let (requests, mut totals) = (what.requests(bench), Vec::new());
        for _ in 0..bench.rounds(5).rounds {
            // Without what the command itself costs, which is what the fewest requests take.
            let few = storm.exits(what, DEPTH.into())?;
            let many = storm.exits(what, requests)?;
            let mut total = 0.0;
            for ((cause, many), (_, few)) in many.into_iter().zip(few) {
                let a_request = many.saturating_sub(few) as f64 / requests as f64;
                samples.entry(format!("{}: {cause}", what.name())).or_default().push(a_request);
                total += a_request;
            }
            totals.push(total);
        }
        value = value.max(median(totals));
    }
    Ok(Measurement { value, noise: None, samples })
}
