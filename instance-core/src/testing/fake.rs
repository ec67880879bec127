//! A hypervisor without a virtual machine.
//!
//! Its machines speak the conformance guest's protocol themselves (see
//! [`conformance`](super::conformance)), on real disks and a real console, so that a region and
//! everything above it can be tested without a kernel.

mod guest;
mod machine;
mod memory;
mod streams;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ami_core::{Architecture, Arm64, X86, X86_64};
use machine::FakeMachine;
use memory::Memory;
use streams::{FakeStreams, Program};

use crate::machine::{
    Boot, BootFile, Capabilities, Execution, Hypervisor, Machine, MachineError, MachineErrorKind,
    MachineSpec, MachineState, RestoreSpec, Runs,
};
use crate::vsock::{VsockPort, VsockSpec};

const MAX_DISKS: usize = 32;
const MAX_NETS: usize = 15;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// A kernel that [`FakeHypervisor`] takes for one: an ELF header's first bytes and `text`, in an
/// unnamed temporary file.
///
/// ```
/// use instance_core::testing::fake_kernel;
///
/// assert_eq!(fake_kernel("mine")?.read()?, b"\x7fELFmine");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
///
/// What the operating system says when the temporary file is made.
pub fn fake_kernel(text: &str) -> io::Result<BootFile> {
    use std::io::Write;
    let mut file = tempfile::tempfile()?;
    file.write_all(&ELF_MAGIC)?;
    file.write_all(text.as_bytes())?;
    BootFile::new(file)
}

/// Bytes that an image can carry as its kernel: a bare ELF header for 64-bit x86.
///
/// ```
/// use instance_core::{DirectBoot, testing::tiny_elf};
///
/// let boot = DirectBoot::new(tiny_elf(), None, ""); // for an image whose machines are fake
/// assert_eq!(tiny_elf().len(), 64);
/// ```
pub fn tiny_elf() -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..4].copy_from_slice(&ELF_MAGIC);
    // ELFCLASS64, little endian, version 1; an executable for x86-64 (System V ABI, "ELF header").
    header[4..7].copy_from_slice(&[2, 1, 1]);
    header[16] = 2;
    header[18] = 62;
    header[20] = 1;
    header[52] = 64;
    header
}

/// Makes machines that run no guest code.
///
/// ```
/// use std::time::{Duration, Instant};
/// use instance_core::console::Console;
/// use instance_core::machine::{Boot, Hypervisor, MachineSpec};
/// use instance_core::testing::{FakeHypervisor, fake_kernel};
///
/// let console = Console::new();
/// let boot = Boot::new(fake_kernel("")?, None, "");
/// let spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, console.port());
/// let machine = FakeHypervisor::new().create(spec)?;
/// machine.start()?;
/// console.reader().wait_for("GUEST READY", Instant::now() + Duration::from_secs(10))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct FakeHypervisor {
    architectures: Vec<Architecture>,
    fail_next: Arc<AtomicBool>,
    streams: Program,
}

impl FakeHypervisor {
    /// One that claims to run 64-bit x86.
    pub fn new() -> Self {
        Self::with_architectures(vec![Architecture::X86_64])
    }

    /// One that claims to run these.
    pub fn with_architectures(architectures: Vec<Architecture>) -> Self {
        Self { architectures, fail_next: Arc::default(), streams: Program::default() }
    }

    /// Makes the next [`create`](Hypervisor::create) fail as if the host had refused.
    ///
    /// ```
    /// use ami_core::Architecture::Arm64;
    /// use instance_core::console::Console;
    /// use instance_core::machine::{Boot, Hypervisor, MachineErrorKind, MachineSpec};
    /// use instance_core::testing::{FakeHypervisor, fake_kernel};
    ///
    /// let hypervisor = FakeHypervisor::with_architectures(vec![Arm64]);
    /// let boot = Boot::new(fake_kernel("")?, None, "");
    /// let spec = MachineSpec::new("demo", Arm64, boot, Console::new().port());
    /// hypervisor.fail_next_create();
    /// let refused = hypervisor.create(spec.clone()).err().map(|e| e.kind());
    /// assert_eq!(refused, Some(MachineErrorKind::Host));
    /// assert!(hypervisor.create(spec).is_ok(), "only the next one fails");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn fail_next_create(&self) {
        self.fail_next.store(true, Ordering::SeqCst);
    }

    /// Has its guests do this with their [streams](crate::vsock), where they have a place for them: it is called in the guest's
    /// thread, while that runs and is not paused, when there is a packet for it, all of which it takes. It must not block. Without
    /// it nobody listens in a guest.
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use instance_core::console::Console;
    /// use instance_core::machine::{Boot, Hypervisor, MachineSpec};
    /// use instance_core::testing::{FakeHypervisor, fake_kernel};
    /// use instance_core::vsock::{self, Op, Packet, VsockSpec};
    ///
    /// // Takes whoever connects, and says nothing.
    /// let hypervisor = FakeHypervisor::new().on_streams(|port| {
    ///     while let Some(packet) = port.next(usize::MAX) {
    ///         if packet.op == Op::Request {
    ///             port.deliver(Packet { op: Op::Response, buf_alloc: 1 << 16, fwd_cnt: 0, ..packet });
    ///         }
    ///     }
    /// });
    /// let console = Console::new();
    /// let boot = Boot::new(fake_kernel("")?, None, "");
    /// let mut spec = MachineSpec::new("demo", ami_core::Architecture::X86_64, boot, console.port());
    /// let (port, streams) = vsock::cable();
    /// spec.vsock = Some(VsockSpec::new(port));
    /// let machine = hypervisor.create(spec)?;
    /// machine.start()?;
    /// streams.connect(9999, Instant::now() + Duration::from_secs(10))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn on_streams(self, program: impl Fn(&VsockPort) + Send + Sync + 'static) -> Self {
        Self { streams: Program::new(program), ..self }
    }

    fn streams(&self, spec: Option<VsockSpec>) -> Option<FakeStreams> {
        spec.map(|spec| FakeStreams::new(spec, &self.streams))
    }
}

impl Default for FakeHypervisor {
    fn default() -> Self {
        Self::new()
    }
}

impl Runs<X86> for FakeHypervisor {}
impl Runs<X86_64> for FakeHypervisor {}
impl Runs<Arm64> for FakeHypervisor {}

impl Hypervisor for FakeHypervisor {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::new("fake", self.architectures.clone());
        capabilities.max_vcpus = 64;
        capabilities.max_disks = MAX_DISKS;
        capabilities.max_nets = MAX_NETS;
        capabilities.power_button = true;
        capabilities.hot_plug = true;
        capabilities.live_growth = true;
        capabilities.save = true;
        capabilities.vsock = true;
        capabilities
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        Ok(Execution::Emulated { measured: "no guest code runs".to_owned() })
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.capabilities().check(&spec)?;
        if self.fail_next.swap(false, Ordering::SeqCst) {
            return Err(MachineError::new(MachineErrorKind::Host, "the fake host was told to refuse"));
        }
        check_kernel(&spec.boot)?;
        let (memory, streams) = (Memory::new(&spec), self.streams(spec.vsock));
        let ports = (spec.nets, streams);
        Ok(Box::new(FakeMachine::new(MachineState::Created, memory, spec.disks, ports, spec.console)))
    }

    fn restore(&self, mut spec: RestoreSpec) -> Result<Box<dyn Machine>, MachineError> {
        let memory = Memory::restore(&mut spec)?;
        let ports = (spec.nets, self.streams(spec.vsock));
        let machine = FakeMachine::new(MachineState::Paused, memory, spec.disks, ports, spec.console);
        machine.run_guest()?;
        Ok(Box::new(machine))
    }
}

fn check_kernel(boot: &Boot) -> Result<(), MachineError> {
    let kernel = boot
        .kernel
        .read()
        .map_err(|e| MachineError::new(MachineErrorKind::Boot, "cannot read the kernel").with_source(e))?;
    if kernel.starts_with(&ELF_MAGIC) {
        Ok(())
    } else {
        Err(MachineError::new(MachineErrorKind::Boot, "the kernel is not an ELF file"))
    }
}
