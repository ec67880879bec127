//! What hypervisors fail with.

use std::fmt;

use super::MachineState;
use crate::net::MacAddress;

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
