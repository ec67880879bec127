//! Virtual machines in this process, on KVM: the [`Hypervisor`] that the others are measured by.
//!
//! [`Kvm`] makes machines of 64-bit and of 32-bit x86: a kernel loaded directly, virtio block devices, network
//! ports, sockets, a console, an entropy device and a memory balloon on PCI or, if asked for, on virtio-mmio, where a stock
//! kernel finds them, a serial port, a clock, a power button, and nothing that an instance does not need.
//!
//! ```no_run
//! use std::{fs::File, time::{Duration, Instant}};
//! use ami_core::Architecture;
//! use hypervisor_kvm::Kvm;
//! use instance_core::{console::Console, machine::{Boot, BootFile, Hypervisor, MachineSpec}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kernel = BootFile::new(File::open("vmlinux")?)?;
//! let console = Console::new();
//! let boot = Boot::new(kernel, None, "console=ttyS0");
//! let machine = Kvm::open()?.create(MachineSpec::new("i-1", Architecture::X86_64, boot, console.port()))?;
//! machine.start()?;
//! console.reader().wait_for("Linux version", Instant::now() + Duration::from_secs(10))?;
//! # Ok(())
//! # }
//! ```
//!
//! # How it works
//!
//! - **A thread for each processor, disk and network port**, and one for streams and for a virtio console where there
//!   are such. They wait, run and end together; the last one to leave says why the machine ended. A processor in the
//!   guest is called back by the signal `SIGSTKFLT`, which Linux itself never sends: it stays blocked in these threads and
//!   is let in by KVM alone, so that no handler is needed or touched. One that is sent to the whole process may be lost to
//!   them.
//! - **Disks.** A disk's thread takes up requests from as many virtqueues as there are processors, 16 at most, and
//!   answers them as they end, in any order. They are served by [`storage_block::Queue`], straight from and to the guest's memory: by
//!   io_uring where the host's kernel allows it and the disk's bytes lie in a file, else by threads, which are made when
//!   the guest first uses the disk. Which it is, is chosen then and not again, is told by [`Machine::disk_engines`] and is an event of
//!   `tracing`. A machine that is paused or saved has finished
//!   what it had begun, and what a disk's limits had not let begin goes back to its virtqueue.
//! - **Network ports.** A port's thread moves frames between the guest's memory and a cable. Where the port is on a TAP device
//!   ([`Tap`](instance_core::net::Tap)) the host's kernel does, if it has vhost-net and the port no limits: the thread then
//!   passes on notifications alone, and a machine that stands still has taken its queues back. See [`VhostNet`].
//! - **What a kernel finds.** It is an ELF file, entered as PVH says or else by Linux's 64-bit or 32-bit protocol,
//!   with its command line as given, and ACPI tables for all there is. The addresses are those of the
//!   table in `layout.rs`.
//! - **Processors** are threads of the cores of one package, as many of each as the specification says: 1, 2, 4 and so on.
//!   What they can do is a [`CpuLevel`]'s: the highest of the host's or [the one asked for](Kvm::with_cpu_level), so that an
//!   image finds the same instructions on all hosts of the level and vendor. Family, model and stepping are the host's, since
//!   kernels choose by them how to protect themselves. Guests are told all that by CPUID, which hides what
//!   else the host can do and does not keep a guest from trying it. A saved machine keeps what it was told, and goes on where
//!   new machines have as much, are of the same model, and time stamp counters run as fast or can be scaled.
//! - **Execution.** Some hosts have a `/dev/kvm` that emulates the guest's kernel, thousands of times
//!   slower than a processor. [`Kvm`] runs a short loop in a guest when it is first asked for its
//!   [`execution`](Hypervisor::execution), and says what it measured.
//!
//! # How machines end
//!
//! A power-off by ACPI is [`PowerOff`]; ACPI's reset register, the keyboard controller's reset line and
//! port `0xcf9` are [`Reset`], as is [`Machine::reset`]; a triple fault is [`TripleFault`], and a guest's kernel that says so on the port of
//! pvpanic is [`Panic`]; what KVM cannot go on with is [`ProcessorError`] with its reason, among them instructions
//! that it cannot emulate, which a guest may choose to run. It and a triple fault come with the processor's
//! registers as KVM tells them; on AMD's, a triple fault has reset them before. What fails outside of the guest is
//! [`HostFailure`].
//!
//! # Errors and trust
//!
//! Errors are [`MachineError`]s. The guest is not trusted: a driver that breaks the rules of virtio has
//! its device stopped until it resets it, and no other device or machine notices. The kernel file is
//! checked as it is loaded. KVM and the kernel of the host are trusted.
//!
//! Where that is asked for, the threads of a machine are [confined](Kvm::with_confinement) to the system calls
//! that they need, by filters (seccomp) of their own: what a guest that has taken one over can then ask of the
//! host's kernel.
//!
//! # Saved machines
//!
//! A machine that is paused can be saved into a file, and any number of machines go on from there: their memory is
//! mapped from the file, so that a page is read when it is touched, and copied when it is written. Their guests
//! find a new generation id, by which Linux renews its random numbers. The format is that of
//! `docs/saved-machine-format.md`; a file is checked as far as it is anybody's, and KVM takes from it only what the guest of a new
//! machine could have brought about. Some hosts' KVM does not tell all of a processor: see
//! [`Capabilities::save`](instance_core::machine::Capabilities::save).
//!
//! # What it leaves out
//!
//! Hot-plugging on virtio-mmio, alarms and interrupts of the clock, firmware, other hosts than x86-64 Linux.
//!
//! [`PowerOff`]: instance_core::machine::ExitCause::PowerOff
//! [`Reset`]: instance_core::machine::ExitCause::Reset
//! [`TripleFault`]: instance_core::machine::ExitCause::TripleFault
//! [`Panic`]: instance_core::machine::ExitCause::Panic
//! [`ProcessorError`]: instance_core::machine::ExitCause::ProcessorError
//! [`HostFailure`]: instance_core::machine::ExitCause::HostFailure

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("hypervisor-kvm runs on x86-64 Linux hosts");

mod acpi;
mod boot;
mod bus;
mod confine;
mod cpu;
mod cpu_model;
mod cpuid;
mod device;
mod error;
mod exits;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod generation;
mod gone;
mod hot_plug;
mod kernel;
mod kick;
mod layout;
mod machine;
mod memory;
mod panic;
mod pci;
mod power;
mod probe;
mod rtc;
mod saved;
mod serial;
mod slots;
mod smbios;
mod thread;
mod transport;
mod vcpu;
mod virtio;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ami_core::{Architecture, X86, X86_64};
use instance_core::machine::{
    Capabilities, Execution, Hypervisor, Machine, MachineError, MachineSpec, RestoreSpec, Runs,
};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};

pub use crate::confine::Confinement;
pub use crate::cpu_model::CpuLevel;
use crate::error::{HostContext, unsupported};
use crate::machine::KvmMachine;
use crate::thread::Stacks;
pub use crate::transport::Transport;
pub use crate::virtio::VhostNet;
use crate::virtio::{SharedSpares, Spares};

/// The most processors of a machine.
const MAX_VCPUS: usize = 64;

/// This host's KVM. Clones are the same.
///
/// ```no_run
/// use hypervisor_kvm::Kvm;
/// use instance_core::machine::{Execution, Hypervisor};
///
/// match Kvm::open()?.execution()? {
///     Execution::Hardware { measured } => println!("fit for kernels: {measured}"),
///     other => println!("not fit for kernels: {other:?}"),
/// }
/// # Ok::<(), instance_core::machine::MachineError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Kvm {
    inner: Arc<Inner>,
    transport: Transport,
    confinement: Option<Confinement>,
    vhost_net: VhostNet,
    cpu_level: CpuLevel,
    /// The processors of that level.
    cpu_model: Arc<CpuId>,
}

#[derive(Debug)]
struct Inner {
    device: kvm_ioctls::Kvm,
    stacks: Arc<Stacks>,
    spares: SharedSpares,
    /// What processors KVM supports.
    cpuid: CpuId,
    /// The model-specific registers of a processor, where machines can be saved.
    msrs: Option<Arc<[u32]>>,
    capabilities: Capabilities,
    /// What was measured when it was first asked for.
    execution: Mutex<Option<Execution>>,
}

impl Kvm {
    /// The KVM at `/dev/kvm`. Whether it runs a guest's kernel on the processor is measured when its
    /// [`execution`](Hypervisor::execution) is first asked for.
    ///
    /// ```
    /// use hypervisor_kvm::Kvm;
    /// use instance_core::machine::{Hypervisor, MachineErrorKind};
    ///
    /// match Kvm::open() {
    ///     Ok(kvm) => assert!(kvm.capabilities().power_button),
    ///     Err(e) if e.kind() == MachineErrorKind::Missing => println!("{e}"), // says what to do
    ///     Err(e) => println!("this host is not fit: {e}"),
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Missing`](instance_core::machine::MachineErrorKind::Missing) where it is not there or may not be opened,
    /// [`Unsupported`](instance_core::machine::MachineErrorKind::Unsupported) where it cannot do what machines need,
    /// [`Host`](instance_core::machine::MachineErrorKind::Host) where it fails.
    pub fn open() -> Result<Self, MachineError> {
        let device = device::open(Path::new("/dev/kvm"))?;
        let cpuid = (device.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
            .host("KVM did not tell what processors it supports")?;
        let mut capabilities = Capabilities::new("kvm", vec![Architecture::X86_64, Architecture::X86]);
        capabilities.max_vcpus = device.get_max_vcpus().min(MAX_VCPUS) as u32;
        capabilities.power_button = true;
        (capabilities.live_growth, capabilities.net_limits, capabilities.tap) = (true, true, true);
        (capabilities.balloon, capabilities.vsock, capabilities.virtio_console) = (true, true, true);
        capabilities.save = saved::NEEDED.into_iter().all(|cap| device.check_extension(cap));
        let msrs = device.get_msr_index_list().host("KVM did not tell which registers it has")?;
        let msrs = capabilities.save.then(|| saved::msrs_to_save(msrs.as_slice()));
        let (stacks, spares, execution) = Default::default();
        let inner = Arc::new(Inner { device, stacks, spares, cpuid, msrs, capabilities, execution });
        let cpu_level = CpuLevel::highest(&inner.cpuid);
        let cpu_model = Arc::new(cpu_model::of_level(&inner.cpuid, cpu_level)?);
        let (transport, vhost_net) = Default::default();
        Ok(Self { inner, transport, confinement: None, vhost_net, cpu_level, cpu_model })
    }

    /// The same, with another transport for the machines made by it. Without it that is [PCI](Transport::Pci). A machine that is
    /// restored has the one that it had.
    ///
    /// ```
    /// use hypervisor_kvm::{Kvm, Transport};
    ///
    /// if let Ok(kvm) = Kvm::open() {
    ///     let kvm = kvm.with_transport(Transport::Mmio); // no bus, and no volume that comes or goes
    /// #   drop(kvm);
    /// }
    /// ```
    #[must_use]
    pub fn with_transport(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    /// The same, with the threads of the machines made by it confined to the system calls that they need.
    ///
    /// ```
    /// use hypervisor_kvm::{Confinement, Kvm};
    ///
    /// if let Ok(kvm) = Kvm::open() {
    ///     let confined = kvm.with_confinement(Confinement::new());
    /// #   drop(confined);
    /// }
    /// ```
    #[must_use]
    pub fn with_confinement(self, confinement: Confinement) -> Self {
        Self { confinement: Some(confinement), ..self }
    }

    /// The same, with this choice for the network ports of the machines made by it that are on TAP devices.
    ///
    /// ```
    /// use hypervisor_kvm::{Kvm, VhostNet};
    ///
    /// if let Ok(kvm) = Kvm::open() {
    ///     let kvm = kvm.with_vhost_net(VhostNet::Always); // or an error where it cannot be
    /// #   drop(kvm);
    /// }
    /// ```
    #[must_use]
    pub fn with_vhost_net(self, vhost_net: VhostNet) -> Self {
        Self { vhost_net, ..self }
    }

    /// The same, with processors of this level for the machines made by it, so that they see the same on hosts that could do
    /// more. Without it they are of the highest that this host has. Restored machines keep those that
    /// they had, if these are not of a higher level.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](instance_core::machine::MachineErrorKind::Unsupported) where the host lacks the level,
    /// [`Host`](instance_core::machine::MachineErrorKind::Host) where memory does.
    pub fn with_cpu_level(self, level: CpuLevel) -> Result<Self, MachineError> {
        if !level.is_supported(&self.inner.cpuid) {
            let most = CpuLevel::highest(&self.inner.cpuid);
            return Err(unsupported(format!("this host's processors are {most}, not {level}")));
        }
        let cpu_model = Arc::new(cpu_model::of_level(&self.inner.cpuid, level)?);
        Ok(Self { cpu_level: level, cpu_model, ..self })
    }

    /// The level of the processors of the machines made by it.
    pub fn cpu_level(&self) -> CpuLevel {
        self.cpu_level
    }

    fn vhost_net(&self) -> VhostNet {
        self.vhost_net
    }

    fn confinement(&self) -> Option<&Confinement> {
        self.confinement.as_ref()
    }

    fn device(&self) -> &kvm_ioctls::Kvm {
        &self.inner.device
    }

    fn stacks(&self) -> Arc<Stacks> {
        self.inner.stacks.clone()
    }

    fn spares(&self) -> Arc<Spares> {
        self.inner.spares.get()
    }

    fn cpu_model(&self) -> &CpuId {
        &self.cpu_model
    }

    fn msrs(&self) -> Option<Arc<[u32]>> {
        self.inner.msrs.clone()
    }

    fn most_processors(&self) -> usize {
        self.inner.capabilities.max_vcpus as usize
    }

    fn transport(&self) -> Transport {
        self.transport
    }
}

impl Hypervisor for Kvm {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities.clone();
        capabilities.max_disks = self.transport.device_places(false);
        capabilities.max_nets = capabilities.max_disks;
        capabilities.max_devices = capabilities.max_disks;
        capabilities.hot_plug = self.transport == Transport::Pci;
        capabilities.net_hot_plug = capabilities.hot_plug;
        capabilities
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        let mut known = self.inner.execution.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some(execution) => Ok(execution.clone()),
            None => probe::measure(&self.inner.device).inspect(|measured| *known = Some(measured.clone())),
        }
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.capabilities().check(&spec)?;
        let (disks, nets) = (spec.disks.len(), spec.nets.len());
        let most = self.transport.device_places(spec.virtio_console.is_some());
        if disks + nets > most {
            let what = format!(
                "{disks} disks and {nets} network ports are more than the {most} that kvm has room for"
            );
            return Err(unsupported(what));
        }
        Ok(Box::new(KvmMachine::create(self, &spec)?))
    }

    fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        if !self.inner.capabilities.save {
            return Err(unsupported("this host's KVM does not take all of a machine's state"));
        }
        Ok(Box::new(KvmMachine::restore(self, spec)?))
    }
}

impl Runs<X86_64> for Kvm {}
impl Runs<X86> for Kvm {}
