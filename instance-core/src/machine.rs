//! The contract between a region and a hypervisor.
//!
//! A [`Hypervisor`] says what it can do and makes [`Machine`]s from [`MachineSpec`]s. Disks arrive
//! as [`Disk`](storage_block::Disk) handles, network ports as ends of [cables](crate::net), kernels as open
//! [`BootFile`]s, the console as a [`ConsolePort`](crate::console::ConsolePort): a hypervisor looks up no file by name and knows no region.

mod capabilities;
mod engines;
mod error;
mod exit;
mod exits;
mod file;
mod saved;
mod spec;
mod state;

use std::fmt;
use std::fs::File;
use std::time::Instant;

use ami_core::{AnyArch, Arm64, X86, X86_64};

pub use self::capabilities::{Capabilities, Execution};
pub use self::engines::DiskEngine;
pub use self::error::{MachineError, MachineErrorKind};
pub use self::exit::{ExitCause, ProcessorError, ProcessorErrorReason, X86Registers};
pub use self::exits::VmExits;
pub use self::file::OpenFile;
pub use self::saved::{RestoreSpec, SavedMachine};
pub use self::spec::{Boot, BootFile, DiskSpec, Identity, MachineSpec, NetSpec};
pub use self::state::MachineState;
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

    /// Whether guest code runs on the processor itself. It may be measured when it is first asked for, which then takes
    /// some ten milliseconds.
    ///
    /// # Errors
    ///
    /// [`Host`](MachineErrorKind::Host) where it could not be measured.
    fn execution(&self) -> Result<Execution, MachineError>;

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

    fn execution(&self) -> Result<Execution, MachineError> {
        self.as_ref().execution()
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
/// - Hooks on the state may look, may kill and may reset; they must not start, pause or resume a machine, change its
///   disks or network ports or drop the last handle of one.
/// - Disks and network ports come and go only while the machine is running or paused; before, they belong in the
///   specification. The first disk of the specification stays as long as the machine.
/// - A reset, the guest's own or [`reset`](Self::reset), ends the machine with [`ExitCause::Reset`]. Whoever owns
///   it then makes a new one, because what the root disk boots may have changed.
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

    /// What serves the requests of each of its disks, the first disk first. Empty where the hypervisor does not tell.
    fn disk_engines(&self) -> Vec<DiskEngine> {
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

    /// Presses the reset button: ends the machine at once, whatever its guest does, as the guest's own reset does:
    /// `Running` or `Paused` → `Exited(Reset)`. When it returns, the guest runs no more. A disk request that is
    /// under way is waited for.
    ///
    /// ```
    /// # use instance_core::{console::Console, testing::{FakeHypervisor, fake_kernel}};
    /// # use instance_core::machine::{Boot, Hypervisor, MachineSpec};
    /// use instance_core::machine::{ExitCause, MachineErrorKind};
    ///
    /// # let boot = Boot::new(fake_kernel("")?, None, "");
    /// # let spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, Console::new().port());
    /// let machine = FakeHypervisor::new().create(spec)?;
    /// machine.start()?;
    /// machine.reset()?;
    /// assert_eq!(machine.state().get().exit_cause(), Some(&ExitCause::Reset));
    /// assert_eq!(machine.reset().map_err(|e| e.kind()), Err(MachineErrorKind::WrongState));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`WrongState`](MachineErrorKind::WrongState) unless the machine is running or paused, also if it ends meanwhile
    /// for another cause.
    fn reset(&self) -> Result<(), MachineError>;

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
