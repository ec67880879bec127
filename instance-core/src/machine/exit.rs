//! Why machines end.

use std::fmt;

/// Why a machine ended. [`MachineState`](super::MachineState) holds it.
///
/// What is to be told apart is a variant or a field; the texts are for people.
///
/// ```
/// use instance_core::machine::ExitCause;
///
/// fn start_again(cause: &ExitCause) -> bool {
///     match cause {
///         ExitCause::Reset => true,
///         guest if guest.is_guest_crash() => true,
///         ExitCause::ProcessorError(error) => {
///             eprintln!("{error}"); // with the registers
///             false
///         }
///         _ => false,
///     }
/// }
/// assert!(start_again(&ExitCause::Panic));
/// assert!(!start_again(&ExitCause::PowerOff));
/// assert_eq!(ExitCause::TripleFault(None).to_string(), "the guest crashed: triple fault");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitCause {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself, which is a reboot, or was reset by [`Machine::reset`](super::Machine::reset).
    Reset,
    /// The guest's kernel said that it panicked, by a device or a call that is there for that.
    Panic,
    /// The guest's processor met a fault while it delivered that of a fault, which a processor ends by a
    /// reset. With its registers, where the hypervisor knows them.
    TripleFault(Option<Box<X86Registers>>),
    /// The hypervisor cannot go on with what a processor of the guest's is at. A guest may bring it about.
    ProcessorError(Box<ProcessorError>),
    /// [`Machine::kill`](super::Machine::kill), or the machine's handle was dropped.
    Killed,
    /// The hypervisor or the host failed.
    HostFailure(String),
}

impl ExitCause {
    /// Whether the guest came to grief by itself: it panicked, or by a triple fault.
    pub fn is_guest_crash(&self) -> bool {
        matches!(self, Self::Panic | Self::TripleFault(_))
    }
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest was reset"),
            Self::Panic => f.write_str("the guest crashed: its kernel panicked"),
            Self::TripleFault(None) => f.write_str("the guest crashed: triple fault"),
            Self::TripleFault(Some(registers)) => write!(f, "the guest crashed: triple fault {registers}"),
            Self::ProcessorError(error) => write!(f, "the guest cannot go on: {error}"),
            Self::Killed => f.write_str("the machine was killed"),
            Self::HostFailure(how) => write!(f, "the host failed: {how}"),
        }
    }
}

/// Why a hypervisor cannot go on with a guest's processor, and where that is. Part of an [`ExitCause`].
///
/// ```
/// use instance_core::machine::{ProcessorError, ProcessorErrorReason, X86Registers};
///
/// let mut registers = X86Registers::default();
/// registers.rip = 0x10_0020;
/// let reason = ProcessorErrorReason::UnknownInstruction(vec![0xcc]);
/// let error = ProcessorError::new(reason, Some(registers));
/// assert!(error.to_string().starts_with("an instruction that the hypervisor does not know, [cc], at rip=0x100020"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessorError {
    /// The reason.
    pub reason: ProcessorErrorReason,
    /// The registers that explain it, where the hypervisor knows them.
    pub registers: Option<X86Registers>,
}

impl ProcessorError {
    /// This reason, at these registers.
    pub fn new(reason: ProcessorErrorReason, registers: Option<X86Registers>) -> Self {
        Self { reason, registers }
    }
}

impl fmt::Display for ProcessorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, ", self.reason)?;
        match &self.registers {
            Some(registers) => registers.fmt(f),
            None => f.write_str("at an unknown place"),
        }
    }
}

/// What a hypervisor cannot go on with. Part of a [`ProcessorError`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProcessorErrorReason {
    /// It had to carry out an instruction that it does not know. Its bytes and some that follow, as far as
    /// they are known.
    UnknownInstruction(Vec<u8>),
    /// The host's processor refuses to enter the guest, for this reason in its maker's terms.
    EntryRefused(u64),
    /// An error of the hypervisor's own, by its number.
    Internal(u32),
    /// The hypervisor's call to run the guest failed with this error number of the host's.
    RunFailed(i32),
    /// The guest was left for a reason that this library does not know.
    UnknownExit(String),
}

impl fmt::Display for ProcessorErrorReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownInstruction(bytes) => {
                f.write_str("an instruction that the hypervisor does not know")?;
                if bytes.is_empty() { Ok(()) } else { write!(f, ", {bytes:02x?}") }
            }
            Self::EntryRefused(reason) => write!(f, "the host's processor refuses to enter it ({reason:#x})"),
            Self::Internal(number) => write!(f, "internal error {number} of the hypervisor"),
            Self::RunFailed(number) => {
                write!(f, "it cannot be run: {}", std::io::Error::from_raw_os_error(*number))
            }
            Self::UnknownExit(exit) => write!(f, "an exit that is not known, {exit}"),
        }
    }
}

/// The registers of an x86 processor that tell where a guest was.
///
/// ```
/// let registers = instance_core::machine::X86Registers::default();
/// assert_eq!((registers.rip, registers.general[0]), (0, 0));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct X86Registers {
    /// The address of the instruction, in the code segment.
    pub rip: u64,
    /// The flags.
    pub rflags: u64,
    /// The general registers in the order of their encoding: `rax`, `rcx`, `rdx`, `rbx`, `rsp`, `rbp`, `rsi`,
    /// `rdi` and `r8` to `r15`.
    pub general: [u64; 16],
    /// The code segment's selector.
    pub cs: u16,
    /// The code segment's base.
    pub cs_base: u64,
    /// Control register 0: the processor's mode.
    pub cr0: u64,
    /// Control register 2: the address of the last page fault.
    pub cr2: u64,
    /// Control register 3: the page tables.
    pub cr3: u64,
    /// Control register 4: features that are in use.
    pub cr4: u64,
    /// The extended features that are enabled, 64-bit mode among them.
    pub efer: u64,
}

impl X86Registers {
    /// The names of [`general`](Self::general).
    pub const GENERAL: [&'static str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
}

impl fmt::Display for X86Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rip, rflags, cs, cs_base, cr0, cr2, cr3, cr4, efer, .. } = self;
        write!(f, "at rip={rip:#x} (cs {cs:#x}, base {cs_base:#x}), rflags={rflags:#x}")?;
        for (name, value) in Self::GENERAL.iter().zip(self.general) {
            write!(f, " {name}={value:#x}")?;
        }
        write!(f, ", cr0={cr0:#x} cr2={cr2:#x} cr3={cr3:#x} cr4={cr4:#x} efer={efer:#x}")
    }
}
