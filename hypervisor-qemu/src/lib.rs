//! Virtual machines as QEMU child processes: the [`Hypervisor`] for hosts without KVM.
//!
//! [`Qemu`] makes machines of 64-bit x86. Each is one `qemu-system-x86_64` of type `q35`: a kernel
//! loaded directly (PVH), virtio disks and network ports on PCI, one serial port, and little else.
//!
//! ```no_run
//! use std::{fs::File, time::{Duration, Instant}};
//! use ami_core::Architecture;
//! use hypervisor_qemu::Qemu;
//! use instance_core::{console::Console, machine::{Boot, BootFile, Hypervisor, MachineSpec}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kernel = BootFile::new(File::open("vmlinux")?)?;
//! let console = Console::new();
//! let boot = Boot::new(kernel, None, "console=ttyS0");
//! let machine = Qemu::find()?.create(MachineSpec::new("i-1", Architecture::X86_64, boot, console.port()))?;
//! machine.start()?;
//! console.reader().wait_for("Linux version", Instant::now() + Duration::from_secs(10))?;
//! # Ok(())
//! # }
//! ```
//!
//! # How it works
//!
//! - **One thread a machine** starts the child, listens to it and reaps it, besides those that serve
//!   its disks over NBD and one for each network port that its network does not [serve itself](instance_core::net::FrameStream).
//!   The control channel (QMP), the console and the network ports are socket pairs, kernel and initrd are descriptors
//!   that the child inherits: nothing is copied, and nothing lies in the runtime directory while the machine runs.
//! - **The child dies with this process**, whatever ends it, `kill -9` included.
//! - **Execution.** [`Accelerator::Tcg`] is the default: it runs everywhere, many times slower than
//!   the processor. Whether `/dev/kvm` runs guest kernels at hardware speed cannot be told by
//!   looking at it, so [`Accelerator::Kvm`] is used only if asked for.
//!
//! - **Disks come and go** behind a PCI bridge, all but the first, by the guest's ACPI: a guest without a
//!   driver for that never lets go. A disk that grows is connected anew.
//!
//! # How machines end
//!
//! A guest's power-off and reset are told apart by QEMU. A triple fault, which QEMU reports as a reset,
//! is told from one by TCG's log and becomes [`TripleFault`]; under KVM it cannot be, and is a [`Reset`]. A
//! guest that reboots *by* a triple fault, Linux with `reboot=t`, has crashed in these terms. A kernel
//! with a driver for `pvpanic` that panics is a [`Panic`]; another does what its command line says (`panic=-1`:
//! a reset) or stands still. A reset from the host ends the child as a kill does.
//!
//! # Errors and trust
//!
//! Errors are [`MachineError`]s; a QEMU that ends unasked is [`HostFailure`] with its status and the last
//! lines it wrote. The guest and the child are not trusted: what they send is bounded, and the child
//! runs under QEMU's own system-call filter with no descriptors but its own. The program that is run is
//! trusted, as is whoever can write to it or to the runtime directory.
//!
//! # What it leaves out
//!
//! Saving and restoring, firmware, other architectures. Streams to the guest: QEMU has vsock by the host's kernel alone, where every
//! guest has an address that the whole host knows, and for which it takes privileges. Linux sees no threads of cores where the processor is AMD's, as an
//! emulated one is: QEMU tells of them, but not that they are told of.
//!
//! [`TripleFault`]: instance_core::machine::ExitCause::TripleFault
//! [`Panic`]: instance_core::machine::ExitCause::Panic
//! [`Reset`]: instance_core::machine::ExitCause::Reset
//! [`HostFailure`]: instance_core::machine::ExitCause::HostFailure

mod arguments;
mod child;
mod disks;
mod exit;
mod machine;
mod nets;
mod probe;
mod qmp;
mod shared;
mod supervisor;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ami_core::{Architecture, X86_64};
use instance_core::machine::{
    Capabilities, Execution, Hypervisor, Machine, MachineError, MachineErrorKind, MachineSpec, Runs,
};

use crate::machine::{ANSWER_WITHIN, QemuMachine, START_WITHIN};

/// How many vCPUs fit: APIC ids have 8 bits without x2APIC, which TCG does not have.
const MAX_VCPUS: u32 = 255;

/// What runs guest code.
///
/// ```
/// use hypervisor_qemu::Accelerator;
///
/// let accelerator = match std::env::var("ACCELERATE").as_deref() {
///     Ok("kvm") => Accelerator::Kvm,
///     _ => Accelerator::default(),
/// };
/// assert_eq!(Accelerator::default(), Accelerator::Tcg);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Accelerator {
    /// QEMU's translator. Works everywhere, slowly.
    #[default]
    Tcg,
    /// The kernel's KVM, through `/dev/kvm`. Where it is missing, no machine can be made.
    Kvm,
}

/// A QEMU on this host.
///
/// ```no_run
/// use std::time::Duration;
/// use hypervisor_qemu::{Accelerator, Qemu};
/// use instance_core::machine::Hypervisor;
///
/// let qemu = Qemu::find()?
///     .acceleration(Accelerator::Kvm)
///     .sandbox(false) // this one is built without seccomp
///     .start_within(Duration::from_secs(120))
///     .answer_within(Duration::from_secs(120));
/// println!("QEMU {}.{}", qemu.version().0, qemu.version().1);
/// assert!(qemu.execution()?.is_hardware());
/// # Ok::<(), instance_core::machine::MachineError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    version: (u32, u32),
    accelerator: Accelerator,
    sandbox: bool,
    start_within: Duration,
    answer_within: Duration,
}

impl Qemu {
    /// The `qemu-system-x86_64` in `PATH`.
    ///
    /// # Errors
    ///
    /// [`Missing`](MachineErrorKind::Missing) if there is none, or one before 6.2; else as
    /// [`with_binary`](Self::with_binary).
    pub fn find() -> Result<Self, MachineError> {
        Self::with_binary(probe::find(std::env::var_os("PATH").as_deref())?)
    }

    /// The QEMU at `program`, which is run once to tell its version.
    ///
    /// ```
    /// use hypervisor_qemu::Qemu;
    /// use instance_core::machine::MachineErrorKind;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// let missing = Qemu::with_binary(dir.join("qemu-system-x86_64")).err().map(|e| e.kind());
    /// assert_eq!(missing, Some(MachineErrorKind::Missing));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Missing`](MachineErrorKind::Missing) if it is not there or older than 6.2,
    /// [`Host`](MachineErrorKind::Host) if it does not run, or is no QEMU.
    pub fn with_binary(program: impl Into<PathBuf>) -> Result<Self, MachineError> {
        let program = program.into();
        let version = probe::version(&program, Instant::now() + START_WITHIN)?;
        Ok(Self {
            program,
            version,
            accelerator: Accelerator::default(),
            sandbox: true,
            start_within: START_WITHIN,
            answer_within: ANSWER_WITHIN,
        })
    }

    /// Runs guests by `accelerator`.
    pub fn acceleration(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = accelerator;
        self
    }

    /// Whether QEMU filters its own system calls (`-sandbox`); it does unless this says otherwise. For
    /// a QEMU built without seccomp.
    pub fn sandbox(mut self, on: bool) -> Self {
        self.sandbox = on;
        self
    }

    /// How long a QEMU may take from its start until it takes commands: 30 seconds unless this says
    /// otherwise.
    pub fn start_within(mut self, limit: Duration) -> Self {
        self.start_within = limit;
        self
    }

    /// How long a QEMU may take to do as it is told: 30 seconds unless this says otherwise. Pausing a
    /// guest waits for what it is writing, which slow disks take long for.
    pub fn answer_within(mut self, limit: Duration) -> Self {
        self.answer_within = limit;
        self
    }

    /// Its version, major and minor.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Checks all that can be told without QEMU.
    fn check(&self, spec: &MachineSpec) -> Result<(), MachineError> {
        self.capabilities().check(spec)?;
        if spec.name.contains('\0') || spec.boot.command_line.contains('\0') {
            let what = "a zero byte in a name or command line";
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        }
        check_kernel(spec)
    }
}

/// Refuses what is no ELF file for x86; the rest QEMU says.
fn check_kernel(spec: &MachineSpec) -> Result<(), MachineError> {
    use std::os::unix::fs::FileExt;
    let not_loadable = |why: &str| MachineError::new(MachineErrorKind::Boot, format!("the kernel {why}"));
    let mut header = [0; 20];
    match spec.boot.kernel.file().read_exact_at(&mut header, 0) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(not_loadable("is shorter than any ELF file"));
        }
        Err(e) => return Err(not_loadable("cannot be read").with_source(e)),
        Ok(()) => {}
    }
    // The machine numbers are those of i386 and x86-64; QEMU enters both in 32-bit mode (PVH).
    match (&header[..4], u16::from_le_bytes([header[18], header[19]])) {
        (b"\x7fELF", 3 | 62) => Ok(()),
        (b"\x7fELF", other) => Err(not_loadable(&format!("is an ELF file for machine {other}, not x86"))),
        _ => Err(not_loadable("is not an ELF file")),
    }
}

impl Hypervisor for Qemu {
    fn capabilities(&self) -> Capabilities {
        let mut can = Capabilities::new("qemu", vec![Architecture::X86_64]);
        can.max_vcpus = MAX_VCPUS;
        can.max_disks = crate::disks::SLOTS;
        (can.max_nets, can.net_limits, can.tap) = (crate::nets::MAX_NETS, true, true);
        can.power_button = true;
        can.hot_plug = true;
        can.live_growth = true;
        can
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        let (major, minor) = self.version;
        Ok(match self.accelerator {
            Accelerator::Tcg => {
                Execution::Emulated { measured: format!("QEMU {major}.{minor} translates guest code (TCG)") }
            }
            Accelerator::Kvm => Execution::Hardware {
                measured: format!("not measured: QEMU {major}.{minor} was told to use KVM"),
            },
        })
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.check(&spec)?;
        Ok(Box::new(QemuMachine::create(self, spec)?))
    }
}

impl Runs<X86_64> for Qemu {}
