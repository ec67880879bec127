//! From `Region::launch` to a guest at work.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ami_core::{Ami, X86_64};
use anyhow::{Context as _, anyhow, ensure};
use hypervisor_kvm::Kvm;
use instance_core::machine::Hypervisor;
use instance_core::machine::Runs;
use instance_core::testing::{FakeHypervisor, tiny_elf};
use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
use storage_block::{Disk, MemoryDisk, RawFile};
use tempfile::TempDir;

use crate::kvm::kvm_on_mmio;
use crate::samples::{Measurement, Rounds, median, median_ratio};
use crate::{bare, guest};

/// The hardware of the machines.
const TYPE: &str = "t2.nano";
const TYPE_BYTES: u64 = 512 << 20;
const GIB: u64 = 1 << 30;
/// How long a guest may take until it says what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the guest says first, where it is a Linux.
pub const FIRST_LINE: &str = "first line of userspace";

/// A region in a directory of its own, with an image to launch.
#[derive(Debug)]
pub struct Launcher<H: Runs<X86_64>> {
    region: Region<H>,
    image: Ami<X86_64>,
    // Declared last, so that the region is closed before its directory goes.
    dirs: Vec<TempDir>,
}

impl<H: Runs<X86_64>> Launcher<H> {
    fn new(hypervisor: H, root: &Disk, boot: DirectBoot) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let region = Region::open(dir.path(), hypervisor)?;
        let source = ImageSource::new(root).boot(boot);
        let image = region.register_image(Ami::<X86_64>::builder("measured"), source)?;
        Ok(Self { region, image, dirs: vec![dir] })
    }

    /// How long it takes from the call of `launch` to its return.
    ///
    /// # Errors
    ///
    /// Those of the region.
    pub fn launch(&self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let instance = self.region.launch(&self.image, LaunchSpec::new(TYPE.parse()?))?;
        let took = begun.elapsed();
        instance.terminate()?;
        Ok(took)
    }

    /// How long it takes from the call of `launch` until the console has said `text`.
    ///
    /// # Errors
    ///
    /// Those of the region, and that it was not said within a minute.
    pub fn launch_until(&self, text: &str) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let instance = self.region.launch(&self.image, LaunchSpec::new(TYPE.parse()?))?;
        instance.console().reader().wait_for(text, begun + PATIENCE)?;
        let took = begun.elapsed();
        instance.terminate()?;
        Ok(took)
    }

    /// How long it takes from the call of `launch` until the console has said anything. That is before the
    /// call returns, which waits until all it promises is durable, so another thread listens: it hears of
    /// the instance when the region tells of it.
    ///
    /// # Errors
    ///
    /// Those of the region, and that nothing was said within a minute.
    pub fn launch_until_it_speaks(&self) -> anyhow::Result<Duration> {
        let changes = self.region.state_changes();
        std::thread::scope(|scope| {
            let listener = scope.spawn(move || -> anyhow::Result<Instant> {
                let change = changes.recv_timeout(PATIENCE).context("the region told of no instance")?;
                let console = self.region.instance(change.instance_id)?.console();
                console.reader().read(Instant::now() + PATIENCE)?;
                Ok(Instant::now())
            });
            let begun = Instant::now();
            let launched = self.region.launch(&self.image, LaunchSpec::new(TYPE.parse()?));
            let spoke = listener.join().map_err(|_| anyhow!("the listener panicked"))?;
            launched?.terminate()?;
            Ok(spoke?.duration_since(begun))
        })
    }
}

/// Launches the bare-metal guest on KVM with a small root disk.
///
/// # Errors
///
/// When there is no KVM or no C compiler, and those of the region.
pub fn bare_metal() -> anyhow::Result<Launcher<Kvm>> {
    let elf = guest::elf64().map_err(anyhow::Error::msg)?;
    let begins = elf.windows(bare::FIRST_INSTRUCTIONS.len()).any(|code| code == bare::FIRST_INSTRUCTIONS);
    ensure!(begins, "the bare-metal guest does not begin as the bare sequence does");
    let disk = MemoryDisk::new(1 << 20)?.into_disk();
    Launcher::new(kvm_on_mmio()?, &disk, DirectBoot::new(elf, None, ""))
}

/// The baseline of [`bare_metal`]: KVM's system calls and nothing else.
///
/// # Errors
///
/// Those of KVM.
pub fn bare_ioctls() -> anyhow::Result<Duration> {
    bare::first_instruction(TYPE_BYTES)
}

/// KVM, where it runs kernels on the processor.
pub(crate) fn kvm_for_linux() -> anyhow::Result<Kvm> {
    let kvm = kvm_on_mmio()?;
    let execution = kvm.execution()?;
    ensure!(execution.is_hardware(), "KVM does not run Linux here: {execution:?}");
    Ok(kvm)
}

/// One of the guest artifacts.
pub(crate) fn artifact(name: &str) -> anyhow::Result<Vec<u8>> {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    let dir = std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from);
    let path = dir.join("amd64").join(name);
    std::fs::read(&path).with_context(|| format!("cannot read {}; run `cargo xtask guest`", path.display()))
}

/// Launches Debian's kernel on KVM, with an init that says a line and ends.
///
/// # Errors
///
/// When KVM does not run kernels on the processor, when the guest artifacts are not there, and those of
/// the region.
pub fn linux() -> anyhow::Result<Launcher<Kvm>> {
    let kvm = kvm_for_linux()?;
    let command_line = format!("console=ttyS0 quiet panic=-1 rdinit=/bin/busybox -- echo {FIRST_LINE}");
    let boot = DirectBoot::new(artifact("vmlinuz")?, Some(artifact("conformance.img")?), command_line);
    Launcher::new(kvm, &MemoryDisk::new(1 << 20)?.into_disk(), boot)
}

/// Launches an image of so many GiB, in each of which something is written, on a machine that runs no
/// guest: what remains is the region and its volumes.
///
/// # Errors
///
/// Those of the file system and the region.
pub fn of_size(gib: u64) -> anyhow::Result<Launcher<FakeHypervisor>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path)?.set_len(gib * GIB)?;
    let disk = RawFile::open(&path, false)?.into_disk();
    for n in 0..gib {
        disk.write_at(&n.to_le_bytes().repeat(512), n * GIB + 4096 * n)?;
    }
    let mut launcher = Launcher::new(FakeHypervisor::new(), &disk, DirectBoot::new(tiny_elf(), None, ""))?;
    launcher.dirs.push(dir);
    Ok(launcher)
}

/// From the launch to the guest's first instruction, as a multiple of the bare sequence.
///
/// # Errors
///
/// Those of [`bare_metal`].
pub fn first_instruction() -> anyhow::Result<Measurement> {
    let launcher = bare_metal()?;
    median_ratio(
        Rounds { rounds: 120, batch: 1 },
        ("launch", &mut || launcher.launch_until_it_speaks()),
        ("bare", &mut bare_ioctls),
    )
}

/// From the launch to Linux's first line of userspace, in seconds.
///
/// # Errors
///
/// Those of [`linux`].
pub fn first_userspace_line() -> anyhow::Result<Measurement> {
    let launcher = linux()?;
    // The first launch also pays for what is read when it is first needed.
    launcher.launch_until(FIRST_LINE)?;
    let samples = (0..3).map(|_| Ok(launcher.launch_until(FIRST_LINE)?.as_secs_f64()));
    let samples = samples.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Measurement {
        value: median(samples.clone()),
        noise: None,
        samples: [("launch".to_owned(), samples)].into(),
    })
}

/// The launch of a 256 GiB image as a multiple of that of a 1 GiB image.
///
/// # Errors
///
/// Those of [`of_size`].
pub fn launch_256g_over_1g() -> anyhow::Result<Measurement> {
    let (large, small) = (of_size(256)?, of_size(1)?);
    median_ratio(
        Rounds { rounds: 15, batch: 8 },
        ("256 GiB", &mut || large.launch()),
        ("1 GiB", &mut || small.launch()),
    )
}
