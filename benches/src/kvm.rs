//! Machines of `hypervisor-kvm`, without a region: how soon they run, how many there can be, what they weigh.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use ami_core::Architecture;
use anyhow::{Context as _, ensure};
use hypervisor_kvm::{Kvm, Transport};
use instance_core::console::Console;
use instance_core::machine::{
    Boot, DiskSpec, Hypervisor, Machine, MachineError, MachineSpec, RestoreSpec, SavedMachine,
};
use storage_block::{Disk, MemoryDisk};

use crate::samples::{Measurement, Rounds, median, median_ratio};
use crate::{bare, guest};

/// How long a guest may take until it says what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// The memory of a machine that is compared with the bare sequence.
const MIB: NonZeroU32 = NonZeroU32::new(512).unwrap();
/// The memory of one of many small machines.
const SMALL_MIB: NonZeroU32 = NonZeroU32::new(16).unwrap();
/// How many small machines live at once.
const MANY: usize = 1_000;
/// How many of the first and of the last of them are compared.
const ENDS: usize = 50;

/// KVM whose machines are on virtio-mmio, which a guest boots soonest on. All figures are taken so, that they can be compared
/// with those of before.
pub(crate) fn kvm_on_mmio() -> Result<Kvm, MachineError> {
    Ok(Kvm::open()?.with_transport(Transport::Mmio))
}

/// What machines of the bare-metal guest are made of.
struct Maker {
    kvm: Kvm,
    boot: Boot,
    disk: Disk,
}

/// A machine whose guest was started, and its console.
type Live = (Box<dyn Machine>, Console);

impl Maker {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            kvm: kvm_on_mmio()?,
            boot: guest::boot().map_err(anyhow::Error::msg)?,
            disk: MemoryDisk::new(1 << 20)?.into_disk(),
        })
    }

    fn start(&self, mib: NonZeroU32) -> anyhow::Result<Live> {
        let console = Console::new();
        let mut spec = MachineSpec::new("measured", Architecture::X86_64, self.boot.clone(), console.port());
        spec.memory_mib = mib;
        spec.disks = vec![DiskSpec::new(self.disk.clone(), "vol-1")];
        let machine = self.kvm.create(spec)?;
        machine.start()?;
        Ok((machine, console))
    }

    /// From the call that makes a machine until its guest's first byte is on the console.
    fn first_instruction(&self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let (_machine, console) = self.start(MIB)?;
        console.reader().read(begun + PATIENCE)?;
        Ok(begun.elapsed())
    }
}

/// From a machine's making to its guest's first instruction, as a multiple of the bare sequence.
///
/// # Errors
///
/// When there is no KVM or no C compiler, and those of machines.
pub fn machine_first_instruction() -> anyhow::Result<Measurement> {
    let maker = Maker::new()?;
    median_ratio(
        Rounds { rounds: 120, batch: 1 },
        ("machine", &mut || maker.first_instruction()),
        ("bare", &mut || bare::first_instruction(u64::from(MIB.get()) << 20)),
    )
}

/// The memory of a small and of a large machine that are restored.
const SAVED_MIB: [NonZeroU32; 2] = [NonZeroU32::new(128).unwrap(), NonZeroU32::new(2048).unwrap()];

impl Maker {
    /// A machine that was saved while its guest wrote to the console without end.
    fn saved(&self, mib: NonZeroU32) -> anyhow::Result<SavedMachine> {
        let (machine, console) = self.start(mib)?;
        let until = Instant::now() + PATIENCE;
        let mut reader = console.reader();
        reader.wait_for("GUEST READY", until)?;
        console.write_all(b"chatter\n", until)?;
        reader.wait_for("chatter", until)?;
        machine.pause()?;
        let file = tempfile::tempfile()?;
        machine.save(&file)?;
        Ok(SavedMachine::new(file)?)
    }

    /// From the call that makes a machine of one that was saved until its guest's next byte is on the console.
    fn restored_instruction(&self, saved: &SavedMachine) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let console = Console::new();
        let mut spec = RestoreSpec::new("measured", saved.clone(), console.port());
        spec.disks = vec![DiskSpec::new(self.disk.clone(), "vol-1")];
        let machine = self.kvm.restore(spec)?;
        machine.resume()?;
        console.reader().read(begun + PATIENCE)?;
        Ok(begun.elapsed())
    }
}

/// From restoring a machine of 128 MiB to its guest's next instruction, as a multiple of the bare sequence that makes a
/// new one.
///
/// # Errors
///
/// As [`machine_first_instruction`].
pub fn restored_instruction() -> anyhow::Result<Measurement> {
    let maker = Maker::new()?;
    let saved = maker.saved(SAVED_MIB[0])?;
    median_ratio(
        Rounds { rounds: 120, batch: 1 },
        ("restored", &mut || maker.restored_instruction(&saved)),
        ("bare", &mut || bare::first_instruction(u64::from(SAVED_MIB[0].get()) << 20)),
    )
}

/// The same for a machine of 2 GiB, as a multiple of that of one of 128 MiB.
///
/// # Errors
///
/// As [`machine_first_instruction`].
pub fn restored_2g_over_128m() -> anyhow::Result<Measurement> {
    let maker = Maker::new()?;
    let [small, large] = [maker.saved(SAVED_MIB[0])?, maker.saved(SAVED_MIB[1])?];
    median_ratio(
        Rounds { rounds: 120, batch: 1 },
        ("2 GiB", &mut || maker.restored_instruction(&large)),
        ("128 MiB", &mut || maker.restored_instruction(&small)),
    )
}

/// The same of the bare sequence: what KVM itself takes longer for more memory, of which it may make tables.
///
/// # Errors
///
/// As [`machine_first_instruction`].
pub fn bare_2g_over_128m() -> anyhow::Result<Measurement> {
    let bare = |mib: NonZeroU32| move || bare::first_instruction(u64::from(mib.get()) << 20);
    median_ratio(
        Rounds { rounds: 120, batch: 1 },
        ("2 GiB", &mut bare(SAVED_MIB[1])),
        ("128 MiB", &mut bare(SAVED_MIB[0])),
    )
}

/// What a thousand machines took to make, each in seconds, and the bytes of this process that are not their
/// guests' memory: before there were any, and while all of them waited for a command.
struct Thousand {
    seconds: Vec<f64>,
    before: u64,
    after: u64,
}

fn thousand() -> anyhow::Result<Thousand> {
    let maker = Maker::new()?;
    // What is made once in a process is no machine's.
    drop(maker.start(SMALL_MIB)?);
    let before = resident_of_host()?;
    let mut seconds = Vec::with_capacity(MANY);
    let mut live: Vec<Live> = Vec::with_capacity(MANY);
    for n in 0..MANY {
        let begun = Instant::now();
        let made = maker.start(SMALL_MIB).with_context(|| format!("cannot make machine {n}"))?;
        seconds.push(begun.elapsed().as_secs_f64());
        made.1.reader().wait_for("GUEST READY", begun + PATIENCE)?;
        live.push(made);
    }
    let after = resident_of_host()?;
    // All of them are alive, not only the last.
    for (n, (_, console)) in live.iter().enumerate() {
        let until = Instant::now() + PATIENCE;
        console.write_all(b"cpus\n", until)?;
        console.reader().wait_for("cpus 1", until).with_context(|| format!("machine {n} is dead"))?;
    }
    Ok(Thousand { seconds, before, after })
}

/// What making and starting the last of a thousand machines takes, as a multiple of the first.
///
/// # Errors
///
/// As [`machine_first_instruction`].
pub fn thousandth_machine_over_first() -> anyhow::Result<Measurement> {
    Ok(last_over_first("machine", thousand()?.seconds))
}

/// The same of guests of the bare sequence: what KVM itself takes longer for each, the more there are.
///
/// # Errors
///
/// As [`machine_first_instruction`].
pub fn thousandth_bare_over_first() -> anyhow::Result<Measurement> {
    let (mut seconds, mut alive) = (Vec::with_capacity(MANY), Vec::with_capacity(MANY));
    for _ in 0..MANY {
        let (took, guest) = bare::make(u64::from(SMALL_MIB.get()) << 20)?;
        seconds.push(took.as_secs_f64());
        alive.push(guest);
    }
    Ok(last_over_first("bare", seconds))
}

fn last_over_first(name: &str, seconds: Vec<f64>) -> Measurement {
    let value = median(seconds[MANY - ENDS..].to_vec()) / median(seconds[..ENDS].to_vec());
    Measurement { value, noise: None, samples: [(name.to_owned(), seconds)].into() }
}

/// The KiB of a machine at rest beyond its guest's memory, without what the host's kernel keeps of it.
///
/// # Errors
///
/// As [`machine_first_instruction`].
pub fn machine_beyond_guest() -> anyhow::Result<Measurement> {
    let Thousand { before, after, .. } = thousand()?;
    ensure!(after > before, "a thousand machines weigh nothing: {before} bytes before, {after} after");
    let value = (after - before) as f64 / MANY as f64 / 1024.0;
    Ok(Measurement { value, noise: None, samples: BTreeMap::new() })
}

/// The bytes in memory of this process but for guests' RAM, which alone is kept out of both child processes
/// and core dumps without being a device's (`VmFlags` in proc_pid_smaps(5)).
fn resident_of_host() -> anyhow::Result<u64> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let (mut total, mut resident) = (0, 0);
    for line in smaps.lines() {
        if let Some(size) = line.strip_prefix("Pss:") {
            let kib: u64 = size.trim().trim_end_matches(" kB").parse().context("smaps has an odd size")?;
            resident = kib << 10;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |flag| flags.split_whitespace().any(|has| has == flag);
            let of_guest = has("dc") && has("dd") && !has("io") && !has("pf");
            total += if of_guest { 0 } else { resident };
        }
    }
    Ok(total)
}
