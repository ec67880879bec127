//! Short ways to say what went wrong.

use instance_core::machine::{MachineError, MachineErrorKind};

/// A result of this crate.
pub(crate) type Result<T, E = MachineError> = std::result::Result<T, E>;

/// The host, mostly KVM, refused what `context` says.
pub(crate) fn host(
    context: impl Into<String>,
) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> MachineError {
    let context = context.into();
    move |source| MachineError::new(MachineErrorKind::Host, context).with_source(source)
}

/// The kernel, initrd or command line cannot be booted.
pub(crate) fn boot(context: impl Into<String>) -> MachineError {
    MachineError::new(MachineErrorKind::Boot, context)
}

/// This hypervisor or host cannot do it.
pub(crate) fn unsupported(context: impl Into<String>) -> MachineError {
    MachineError::new(MachineErrorKind::Unsupported, context)
}

/// A saved machine cannot be restored.
pub(crate) fn saved(context: impl Into<String>) -> MachineError {
    MachineError::new(MachineErrorKind::Saved, context)
}

/// Says what was being done when the host failed.
pub(crate) trait HostContext<T> {
    /// The failure as a [`MachineErrorKind::Host`] error about `context`.
    fn host(self, context: &str) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> HostContext<T> for Result<T, E> {
    fn host(self, context: &str) -> Result<T> {
        self.map_err(|source| host(context)(source.into()))
    }
}
