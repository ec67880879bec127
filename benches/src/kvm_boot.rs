//! A stock kernel's whole life: from the start of a program that boots it until the program has ended, since the
//! guest has.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ami_core::Architecture;
use anyhow::{Context as _, ensure};
use instance_core::console::Console;
use instance_core::machine::{Boot, BootFile, ExitCause, Hypervisor as _, MachineSpec, MachineState};

use crate::kvm::kvm_on_mmio;
use crate::samples::{Measurement, median};

/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Nothing that a virtual machine does not need is looked for.
const COMMAND_LINE: &str = "console=ttyS0 quiet reboot=k panic=-1 nomodule i8042.noaux";
const MIB: NonZeroU32 = NonZeroU32::new(256).unwrap();
/// By which name this program is the one that is measured.
pub(crate) const ONCE: &str = "boot_once";
const ROUNDS: usize = 3;

/// The seconds from the start of a program to its end, which boots the distribution's kernel with a busybox
/// that reboots.
///
/// # Errors
///
/// When the guest artifacts are not there or the program fails.
pub fn machine_boot_to_exit() -> anyhow::Result<Measurement> {
    let guest = std::env::var_os("AMI_GUEST_DIR").context("AMI_GUEST_DIR names no guest artifacts")?;
    let guest = PathBuf::from(guest).join("amd64");
    let dir = tempfile::tempdir()?;
    // An image's kernel is unpacked when the image is registered.
    let packed = fs::read(guest.join("vmlinuz"))?;
    let kernel = File::create(dir.path().join("vmlinux"))?;
    boot_image::write_sparse(&kernel, &boot_image::unpack_kernel(&packed)?.image)?;
    fs::copy(guest.join("boot.img"), dir.path().join("initrd"))?;
    let program = std::env::current_exe()?;
    let mut samples = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let mut once = Command::new(&program);
        once.arg(ONCE).arg(dir.path()).stdin(Stdio::null());
        let begun = Instant::now();
        let status = once.status()?;
        samples.push(begun.elapsed().as_secs_f64());
        ensure!(status.success(), "the program that boots ended with {status}");
    }
    let value = median(samples.clone());
    Ok(Measurement { value, noise: None, samples: BTreeMap::from([("boot".to_owned(), samples)]) })
}

/// Boots the kernel and the initrd in `dir`, and waits for the guest's reboot.
///
/// # Errors
///
/// When it does anything else.
pub(crate) fn once(dir: &Path) -> anyhow::Result<()> {
    let [kernel, initrd] = ["vmlinux", "initrd"].map(|name| BootFile::new(File::open(dir.join(name))?));
    let console = Console::new();
    let boot = Boot::new(kernel?, Some(initrd?), COMMAND_LINE);
    let mut spec = MachineSpec::new("boot", Architecture::X86_64, boot, console.port());
    spec.memory_mib = MIB;
    let machine = kvm_on_mmio()?.create(spec)?;
    machine.start()?;
    let end = machine.state().wait(Instant::now() + PATIENCE, |state| state.exit_cause().is_some());
    ensure!(end == Ok(MachineState::Exited(ExitCause::Reset)), "the guest did not reboot: {end:?}");
    Ok(())
}
