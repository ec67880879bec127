//! The contract between a region and a hypervisor.
//!
//! A [`Hypervisor`] says what it can do and makes [`Machine`]s from [`MachineSpec`]s. Disks arrive
//! as [`Disk`](storage_block::Disk) handles, network ports as ends of [cables](crate::net), kernels as open
//! [`BootFile`]s, the console as a [`ConsolePort`](crate::console::ConsolePort): a hypervisor looks up no file by name and knows no region.

mod exit;
mod exits;
mod saved;
mod spec;

use std::fmt;
use std::fs::File;
use std::time::Instant;

use ami_core::{AnyArch, Architecture, Arm64, X86, X86_64};

pub use self::exit::{ExitCause, ProcessorError, ProcessorErrorReason, X86Registers};
pub use self::exits::VmExits;
pub use self::saved::{RestoreSpec, SavedMachine};
pub use self::spec::{Boot, BootFile, DiskSpec, Identity, MachineSpec, NetSpec};
use crate::net::MacAddress;
use crate::watch::Watch;

/// Makes machines.
///
/// ```
/// use instance_core::console::Console;
/// use instance_core::machine::{Boot, Hypervisor, MachineSpec, MachineState};
/// use instance_core::testing::{FakeHypervisor, fake_kernel};
///
/// let hypervisor: Box<dyn Hypervisor> = Box::new(FakeHypervisor::new());
/// assert_eq!(hypervisor.capabilities().architectures, [ami_core::Architecture::X86_64]);
/// let boot = Boot::new(fake_kernel("")?, None, "console=ttyS0");
/// let spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, Console::new().port());
/// assert_eq!(hypervisor.create(spec)?.state().get(), MachineState::Created);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Contract
///
/// - Every method may be called from any thread at any time.
/// - [`create`](Self::create) checks the whole specification against
///   [`capabilities`](Self::capabilities) before it takes anything; when it fails it has given back
///   everything it took.
/// - Nothing process-wide is touched: no signal handler, no exit, no global.
pub trait Hypervisor: fmt::Debug + Send + Sync + 'static {
    /// What it can do, on this host, now.
    fn capabilities(&self) -> Capabilities;

    /// Makes a machine, not started.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) for what it cannot do,
    /// [`Boot`](MachineErrorKind::Boot) for a kernel that it cannot load,
    /// [`Host`](MachineErrorKind::Host) for what the host refused.
    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError>;

    /// Makes a machine that goes on where another was [saved](Machine::save), by this kind of hypervisor: it is
    /// `Paused`, and its guest knows of nothing when it is [resumed](Machine::resume). [`RestoreSpec`] shows it.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where [`save`](Capabilities::save) is false,
    /// [`Saved`](MachineErrorKind::Saved) if it is no saved machine, one of another hypervisor, format or host,
    /// or one that had other disks or network ports; [`Host`](MachineErrorKind::Host) for what the host refused.
    fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        let _ = spec;
        let what = format!("{} does not restore machines", self.capabilities().name);
        Err(MachineError::new(MachineErrorKind::Unsupported, what))
    }
}

/// A hypervisor that is known, when the program is compiled, to run images of architecture `A`.
///
/// A hypervisor crate implements it for each architecture that its type promises; every hypervisor
/// takes [`AnyArch`], and `Box<dyn Hypervisor>` takes all of them, checked when an instance is
/// launched.
///
/// ```
/// use ami_core::{Ami, X86_64};
/// use instance_core::machine::{Hypervisor, Runs};
/// use instance_core::{Instance, LaunchSpec, Region, Result};
///
/// /// For any hypervisor whose type promises 64-bit x86.
/// fn launch<H: Runs<X86_64>>(region: &Region<H>, ami: &Ami<X86_64>) -> Result<Instance> {
///     region.launch(ami, LaunchSpec::new("t3.micro".parse()?))
/// }
/// let _ = launch::<Box<dyn Hypervisor>>;
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not run images of architecture `{A}`",
    label = "this image's architecture is not one that the region's hypervisor runs"
)]
pub trait Runs<A>: Hypervisor {}

impl<H: Hypervisor> Runs<AnyArch> for H {}
impl Runs<X86> for Box<dyn Hypervisor> {}
impl Runs<X86_64> for Box<dyn Hypervisor> {}
impl Runs<Arm64> for Box<dyn Hypervisor> {}

impl Hypervisor for Box<dyn Hypervisor> {
    fn capabilities(&self) -> Capabilities {
        self.as_ref().capabilities()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.as_ref().create(spec)
    }

    fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.as_ref().restore(spec)
    }
}

/// A virtual machine. Dropping it ends it at once and gives back all that it held: threads, child
/// processes, memory, descriptors, files.
///
/// ```
/// # use instance_core::{console::Console, testing::{FakeHypervisor, fake_kernel}};
/// # use instance_core::machine::{Boot, Hypervisor, MachineSpec};
/// use std::time::{Duration, Instant};
/// use instance_core::machine::{ExitCause, MachineState};
///
/// # let boot = Boot::new(fake_kernel("")?, None, "");
/// # let spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, Console::new().port());
/// let machine = FakeHypervisor::new().create(spec)?;
/// machine.start()?;
/// machine.pause()?; // until `resume` its disks stay as they are
/// machine.resume()?;
/// machine.power_button()?;
/// let patience = Instant::now() + Duration::from_secs(10);
/// let end = machine.state().wait(patience, |state| state.exit_cause().is_some());
/// assert_eq!(end, Ok(MachineState::Exited(ExitCause::PowerOff)));
/// machine.kill(); // too late to change anything
/// assert_eq!(machine.state().get().exit_cause(), Some(&ExitCause::PowerOff));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Contract
///
/// - Every method may be called from any thread; none but [`detach_disk`](Self::detach_disk) and
///   [`detach_net`](Self::detach_net) waits for the guest, and while it does the others go on.
/// - The state moves only as [`MachineState`] says, and each change is published.
/// - Hooks on the state may look and may kill; they must not start, pause or resume a machine, change its
///   disks or network ports or drop the last handle of one.
/// - Disks and network ports come and go only while the machine is running or paused; before, they belong in the
///   specification. The first disk of the specification stays as long as the machine.
/// - A guest's reset ends the machine with [`ExitCause::Reset`]. Whoever owns it then makes a new
///   one, because what the root disk boots may have changed.
/// - When the machine has exited, no write of its guest is under way any more: its disks are as they
///   will stay. The guest's writes that it did not flush need not be durable.
pub trait Machine: fmt::Debug + Send + Sync {
    /// The state, to look at and to wait for.
    fn state(&self) -> Watch<MachineState>;

    /// Runs the guest: `Created` → `Running`.
    ///
    /// # Errors
    ///
    /// [`WrongState`](MachineErrorKind::WrongState), or what the host refused.
    fn start(&self) -> Result<(), MachineError>;

    /// Stops the guest's processors and lets its disk requests under way end: when this returns,
    /// its disks do not change until [`resume`](Self::resume). `Running` → `Paused`. A pause that
    /// failed lets the guest run on: where it takes effect later, the machine resumes by itself.
    ///
    /// # Errors
    ///
    /// [`WrongState`](MachineErrorKind::WrongState), or what the host refused.
    fn pause(&self) -> Result<(), MachineError>;

    /// Lets the guest go on: `Paused` → `Running`.
    ///
    /// # Errors
    ///
    /// [`WrongState`](MachineErrorKind::WrongState), or what the host refused.
    fn resume(&self) -> Result<(), MachineError>;

    /// Presses the power button. The guest may obey, late or never.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where
    /// [`power_button`](Capabilities::power_button) is false,
    /// [`WrongState`](MachineErrorKind::WrongState) unless the machine is running.
    fn power_button(&self) -> Result<(), MachineError>;

    /// Gives a machine that is running or paused one more disk. The guest is told, and takes it up soon, late or
    /// never; a paused one, after it is resumed.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where [`hot_plug`](Capabilities::hot_plug) is false,
    /// where the machine has [`max_disks`](Capabilities::max_disks) and for a serial number that is none;
    /// [`DiskExists`](MachineErrorKind::DiskExists) if it has one of this serial number;
    /// [`WrongState`](MachineErrorKind::WrongState), or what the host refused. Then the handle is given back.
    fn attach_disk(&self, disk: DiskSpec) -> Result<(), MachineError> {
        let _ = disk;
        Err(MachineError::new(MachineErrorKind::Unsupported, "this machine takes no disks while it runs"))
    }

    /// Takes the disk with this serial number from a machine that is running or paused. When it returns, no
    /// request of the guest's is under way or will come, and the machine holds the disk's handle no longer.
    ///
    /// # Errors
    ///
    /// [`Held`](MachineErrorKind::Held) if the guest has not let go by the deadline: it keeps the disk, and
    /// may let go later, which gives the handle back as well. The same may then be asked again, or by
    /// [`Detach::Force`]. [`NoSuchDisk`](MachineErrorKind::NoSuchDisk) if there is none of this serial number,
    /// or no more; [`Unsupported`](MachineErrorKind::Unsupported) for the first disk of the specification and
    /// where [`hot_plug`](Capabilities::hot_plug) is false;
    /// [`WrongState`](MachineErrorKind::WrongState), also if the machine ends meanwhile, or what the host
    /// refused.
    fn detach_disk(&self, serial: &str, how: Detach) -> Result<(), MachineError> {
        let _ = (serial, how);
        Err(MachineError::new(MachineErrorKind::Unsupported, "this machine gives no disks up while it runs"))
    }

    /// Plugs one more network port into a machine that is running or paused. The guest is told, and takes it up soon,
    /// late or never; a paused one, after it is resumed.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where [`net_hot_plug`](Capabilities::net_hot_plug) is false,
    /// where the machine has [`max_nets`](Capabilities::max_nets) and for a port that
    /// [cannot be](Capabilities::check_net); [`PortExists`](MachineErrorKind::PortExists) if it has one of this address;
    /// [`WrongState`](MachineErrorKind::WrongState), or what the host refused. Then the port is unplugged.
    fn attach_net(&self, net: NetSpec) -> Result<(), MachineError> {
        let _ = net;
        let what = "this machine takes no network ports while it runs";
        Err(MachineError::new(MachineErrorKind::Unsupported, what))
    }

    /// Takes the network port with this address from a machine that is running or paused. When it returns, the cable
    /// is unplugged at the machine's end.
    ///
    /// # Errors
    ///
    /// As those of [`detach_disk`](Self::detach_disk), with [`NoSuchPort`](MachineErrorKind::NoSuchPort) if there is
    /// none of this address, or no more, and [`Unsupported`](MachineErrorKind::Unsupported) where
    /// [`net_hot_plug`](Capabilities::net_hot_plug) is false. Every port may go.
    fn detach_net(&self, mac: MacAddress, how: Detach) -> Result<(), MachineError> {
        let _ = (mac, how);
        let what = "this machine gives no network ports up while it runs";
        Err(MachineError::new(MachineErrorKind::Unsupported, what))
    }

    /// Says that the disk with this serial number has become larger, which the guest is told. A machine that
    /// is told nothing may or may not let its guest see the new size.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where [`live_growth`](Capabilities::live_growth) is false,
    /// [`NoSuchDisk`](MachineErrorKind::NoSuchDisk), [`WrongState`](MachineErrorKind::WrongState), or what the
    /// host refused.
    fn disk_grown(&self, serial: &str) -> Result<(), MachineError> {
        let _ = serial;
        Err(MachineError::new(
            MachineErrorKind::Unsupported,
            "this machine's disks do not grow while it runs",
        ))
    }

    /// Writes a machine that is paused into a file, which must be empty: its memory, processors and devices, but
    /// not the bytes of its disks. The machine stays paused, and may go on after. Memory that is zero becomes a
    /// hole. The file is not made durable; if this fails, what it holds is of no use.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where [`save`](Capabilities::save) is false,
    /// [`WrongState`](MachineErrorKind::WrongState), or what the host refused.
    fn save(&self, to: &File) -> Result<(), MachineError> {
        let _ = to;
        Err(MachineError::new(MachineErrorKind::Unsupported, "this machine cannot be saved"))
    }

    /// How often each of its processors has left its guest so far, the first processor first: it shows what a
    /// guest's devices cost it. Empty where the hypervisor does not count them.
    fn vm_exits(&self) -> Vec<VmExits> {
        Vec::new()
    }

    /// Asks the guest to leave `mib` MiB of its memory to the host, from now on. It obeys late, in part or never,
    /// and may take some back when it is short of memory. What it leaves is counted as the machine's no longer.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where [`balloon`](Capabilities::balloon) is false, and for
    /// as much as the machine has or more;
    /// [`WrongState`](MachineErrorKind::WrongState) unless the machine is running or paused.
    fn set_balloon(&self, mib: u32) -> Result<(), MachineError> {
        let _ = mib;
        Err(MachineError::new(MachineErrorKind::Unsupported, "this machine's memory stays as it is"))
    }

    /// How many MiB the guest says that it has left to the host. It may lie.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) where [`balloon`](Capabilities::balloon) is false.
    fn balloon(&self) -> Result<u32, MachineError> {
        Err(MachineError::new(MachineErrorKind::Unsupported, "this machine's memory stays as it is"))
    }

    /// Ends the machine at once, whatever its guest does: `Exited(Killed)`. Does nothing to one that
    /// has exited. When it returns, the guest runs no more. A disk request that is under way is waited
    /// for.
    fn kill(&self);
}

/// How a disk or a network port is taken from a guest by [`Machine::detach_disk`] and [`Machine::detach_net`].
///
/// ```
/// # use instance_core::{console::Console, testing::{FakeHypervisor, fake_kernel}};
/// # use instance_core::machine::{Boot, Hypervisor, MachineErrorKind, MachineSpec};
/// use std::time::{Duration, Instant};
/// use instance_core::machine::{Detach, DiskSpec};
/// use storage_block::MemoryDisk;
///
/// # let boot = Boot::new(fake_kernel("")?, None, "");
/// # let spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, Console::new().port());
/// # let machine = FakeHypervisor::new().create(spec)?;
/// machine.start()?;
/// machine.attach_disk(DiskSpec::new(MemoryDisk::new(1 << 20)?.into_disk(), "vol0"))?;
/// let soon = Instant::now() + Duration::from_secs(10);
/// match machine.detach_disk("vol0", Detach::Ask { until: soon }) {
///     Err(e) if e.kind() == MachineErrorKind::Held => machine.detach_disk("vol0", Detach::Force)?,
///     detached => detached?,
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Detach {
    /// The guest is asked to let go, and has until then. A paused one does not.
    Ask {
        /// When it is waited for no longer.
        until: Instant,
    },
    /// At once, whatever the guest does with it. What it has not written is lost, its further requests fail, and
    /// it is told that the disk or the port has gone.
    Force,
}

/// Where a machine is in its life.
///
/// ```text
/// Created ──start──▶ Running ◀──pause/resume──▶ Paused ◀── Hypervisor::restore
///    │                  │                          │
///    └──kill────────────┴── the guest, or kill ────┴──▶ Exited(cause)
/// ```
///
/// ```
/// use instance_core::machine::{ExitCause, MachineState};
///
/// let cause = ExitCause::PowerOff;
/// assert_eq!(MachineState::Exited(cause.clone()).exit_cause(), Some(&cause));
/// assert_eq!(MachineState::Paused.exit_cause(), None);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineState {
    /// Made, not started.
    Created,
    /// The guest runs.
    Running,
    /// The guest's processors stand still.
    Paused,
    /// It has ended, and will not start again.
    Exited(ExitCause),
}

impl MachineState {
    /// Why the machine ended, if it has.
    pub fn exit_cause(&self) -> Option<&ExitCause> {
        match self {
            Self::Exited(cause) => Some(cause),
            _ => None,
        }
    }
}

/// What a hypervisor can do on this host.
///
/// ```
/// use ami_core::Architecture;
/// use instance_core::machine::{Capabilities, Execution};
///
/// let execution = Execution::Hardware { measured: "guest kernel code: 2.9 G instructions/s".to_owned() };
/// let mut can = Capabilities::new("mine", vec![Architecture::X86, Architecture::X86_64], execution);
/// can.max_vcpus = 32;
/// can.power_button = true;
/// assert!(can.execution.is_hardware());
/// assert!(!Execution::Emulated { measured: "TCG of QEMU 7.2".to_owned() }.is_hardware());
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Its name, such as `kvm`.
    pub name: &'static str,
    /// The architectures whose machines it makes.
    pub architectures: Vec<Architecture>,
    /// The most vCPUs of one machine.
    pub max_vcpus: u32,
    /// The most memory of one machine, in MiB.
    pub max_memory_mib: u64,
    /// The most disks of one machine.
    pub max_disks: usize,
    /// The most network ports of one machine.
    pub max_nets: usize,
    /// Whether the frames of network ports are held to the limits of a [specification](NetSpec::receive_limits).
    pub net_limits: bool,
    /// Whether guest code runs on the processor itself.
    pub execution: Execution,
    /// Whether [`Machine::power_button`] works.
    pub power_button: bool,
    /// Whether [`Machine::attach_disk`] and [`Machine::detach_disk`] work.
    pub hot_plug: bool,
    /// Whether [`Machine::attach_net`] and [`Machine::detach_net`] work.
    pub net_hot_plug: bool,
    /// Whether [`Machine::disk_grown`] works.
    pub live_growth: bool,
    /// Whether [`Machine::save`] and [`Hypervisor::restore`] work.
    pub save: bool,
    /// Whether [`Machine::set_balloon`] and [`Machine::balloon`] work.
    pub balloon: bool,
    /// Whether a machine may have a [place for streams](MachineSpec::vsock).
    pub vsock: bool,
    /// Whether a machine may have a [virtio console](MachineSpec::virtio_console).
    pub virtio_console: bool,
}

impl Capabilities {
    /// Capabilities of a hypervisor called `name` that makes machines of these architectures: one
    /// vCPU, up to 1 TiB of memory, one disk, no network port, no power button, no disks or ports that come, go or
    /// grow while it runs, no balloon, no streams, no virtio console, unless the fields are then set otherwise.
    pub fn new(name: &'static str, architectures: Vec<Architecture>, execution: Execution) -> Self {
        Self {
            name,
            architectures,
            max_vcpus: 1,
            max_memory_mib: 1 << 20,
            max_disks: 1,
            max_nets: 0,
            net_limits: false,
            execution,
            power_button: false,
            hot_plug: false,
            net_hot_plug: false,
            live_growth: false,
            save: false,
            balloon: false,
            vsock: false,
            virtio_console: false,
        }
    }

    /// Whether a machine can be made to this specification, as far as that can be told from the
    /// numbers alone. Every hypervisor begins [`Hypervisor::create`] with it.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported), with what was asked and what is possible.
    pub fn check(&self, spec: &MachineSpec) -> Result<(), MachineError> {
        let unsupported = |what: String| Err(MachineError::new(MachineErrorKind::Unsupported, what));
        let name = self.name;
        if !self.architectures.contains(&spec.architecture) {
            let runs: Vec<&str> = self.architectures.iter().map(|a| a.as_str()).collect();
            let (asked, runs) = (spec.architecture, runs.join(", "));
            return unsupported(format!("{name} cannot run {asked} on this host; it runs {runs}"));
        }
        if spec.vcpus.get() > self.max_vcpus {
            let (asked, most) = (spec.vcpus, self.max_vcpus);
            return unsupported(format!("{name} cannot give a machine {asked} vCPUs; the most is {most}"));
        }
        if u64::from(spec.memory_mib.get()) > self.max_memory_mib {
            let (asked, most) = (spec.memory_mib, self.max_memory_mib);
            return unsupported(format!(
                "{name} cannot give a machine {asked} MiB of memory; the most is {most}"
            ));
        }
        if spec.disks.len() > self.max_disks {
            let (asked, most) = (spec.disks.len(), self.max_disks);
            return unsupported(format!("{name} cannot give a machine {asked} disks; the most is {most}"));
        }
        spec.disks.iter().try_for_each(DiskSpec::check)?;
        if spec.nets.len() > self.max_nets {
            let (asked, most) = (spec.nets.len(), self.max_nets);
            return unsupported(format!(
                "{name} cannot give a machine {asked} network ports; the most is {most}"
            ));
        }
        spec.nets.iter().try_for_each(|net| self.check_net(net))?;
        match &spec.vsock {
            Some(_) if !self.vsock => return unsupported(format!("{name} has no streams for machines")),
            Some(vsock) if !vsock.is_valid() => {
                return unsupported(format!("{} is no guest's address", vsock.cid));
            }
            Some(_) | None => {}
        }
        if spec.virtio_console.is_some() && !self.virtio_console {
            return unsupported(format!("{name} has no virtio consoles for machines"));
        }
        if spec.identity.as_ref().is_some_and(|identity| !identity.is_valid()) {
            return unsupported(format!("{name} cannot tell a guest of {:?}", spec.identity));
        }
        Ok(())
    }

    /// Whether a machine may have this network port, as far as that can be told from it alone.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn check_net(&self, net: &NetSpec) -> Result<(), MachineError> {
        if net.is_limited() && !self.net_limits {
            let what = format!("{} does not hold network ports to limits", self.name);
            return Err(MachineError::new(MachineErrorKind::Unsupported, what));
        }
        net.check()
    }
}

/// How guest code runs. Part of a hypervisor's [`Capabilities`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Execution {
    /// On the processor, at its speed.
    Hardware {
        /// What was measured, in words, such as `guest kernel code: 2.9 G instructions/s`.
        measured: String,
    },
    /// By an emulator or interpreter.
    Emulated {
        /// What was measured or known, in words.
        measured: String,
    },
}

impl Execution {
    /// Whether guest code runs on the processor itself.
    pub fn is_hardware(&self) -> bool {
        matches!(self, Self::Hardware { .. })
    }
}

/// What kind of failure a [`MachineError`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MachineErrorKind {
    /// This hypervisor, or this host, cannot do that.
    Unsupported,
    /// The machine's state does not allow it.
    WrongState,
    /// A saved machine cannot be restored: it is none, of another kind, or does not fit what it is given.
    Saved,
    /// The kernel or initrd cannot be loaded.
    Boot,
    /// The machine has no disk of that serial number.
    NoSuchDisk,
    /// The machine has a disk of that serial number already.
    DiskExists,
    /// The machine has no network port of that address.
    NoSuchPort,
    /// The machine has a network port of that address already.
    PortExists,
    /// The guest did not let go of a disk or a network port in time.
    Held,
    /// A program or device that the hypervisor needs is missing; the text says what to install.
    Missing,
    /// The host refused or failed.
    Host,
}

/// A hypervisor's failure: its kind, what it happened to, and what caused it.
///
/// ```
/// use std::error::Error;
/// use instance_core::machine::{MachineError, MachineErrorKind, MachineState};
///
/// let refused = std::io::Error::from(std::io::ErrorKind::OutOfMemory);
/// let err = MachineError::new(MachineErrorKind::Host, "cannot map memory").with_source(refused);
/// assert_eq!(err.to_string(), "cannot map memory");
/// assert!(err.source().is_some());
/// let early = MachineError::wrong_state("pause", &MachineState::Created);
/// assert_eq!(early.kind(), MachineErrorKind::WrongState);
/// ```
#[derive(Debug)]
pub struct MachineError {
    kind: MachineErrorKind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl MachineError {
    /// An error of `kind` about what `context` says.
    pub fn new(kind: MachineErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// The same with its cause.
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// That the machine is in `state`, in which it cannot `action`.
    pub fn wrong_state(action: &str, state: &MachineState) -> Self {
        Self::new(MachineErrorKind::WrongState, format!("cannot {action} a machine that is {state:?}"))
    }

    /// That the machine has no disk with this serial number.
    pub fn no_such_disk(serial: &str) -> Self {
        Self::new(MachineErrorKind::NoSuchDisk, format!("the machine has no disk {serial:?}"))
    }

    /// That the machine has a disk with this serial number already.
    pub fn disk_exists(serial: &str) -> Self {
        Self::new(MachineErrorKind::DiskExists, format!("the machine has a disk {serial:?} already"))
    }

    /// That the machine has no network port with this address.
    pub fn no_such_port(mac: MacAddress) -> Self {
        Self::new(MachineErrorKind::NoSuchPort, format!("the machine has no network port {mac}"))
    }

    /// That the machine has a network port with this address already.
    pub fn port_exists(mac: MacAddress) -> Self {
        Self::new(MachineErrorKind::PortExists, format!("the machine has a network port {mac} already"))
    }

    /// That the guest has not let go of the network port with this address.
    pub fn port_held(mac: MacAddress) -> Self {
        Self::new(MachineErrorKind::Held, format!("the guest has not let go of network port {mac}"))
    }

    /// That the guest has not let go of the disk with this serial number.
    pub fn held(serial: &str) -> Self {
        Self::new(MachineErrorKind::Held, format!("the guest has not let go of disk {serial:?}"))
    }

    /// The kind of failure.
    pub fn kind(&self) -> MachineErrorKind {
        self.kind
    }
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for MachineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
