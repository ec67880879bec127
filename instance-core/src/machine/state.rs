//! The states of a machine.

use super::ExitCause;

/// Where a machine is in its life.
///
/// ```text
/// Created ──start──▶ Running ◀──pause/resume──▶ Paused ◀── Hypervisor::restore
///    │                  │                          │
///    └──kill────────────┴─ the guest, reset, kill ─┴──▶ Exited(cause)
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
