//! The life of an instance, as one state machine.
//!
//! ```text
//!            launch                 stop, guest powers off
//!              │                 ┌──────────────────────────┐
//!              ▼                 │                          ▼
//!           pending ────────▶ running ◀──┐ (reboot)      stopping ──────▶ stopped
//!              ▲  │              │  └────┘                  │              │  │
//!              │  │              │ terminate                │              │  │ terminate
//!              │  └──────────────┼──▶ shutting-down ◀───────┴──────────────┼──┘
//!              │                 ▼          │                              │
//!              │                            └─────▶ terminated             │
//!              └──────────────────────────── start ────────────────────────┘
//! ```
//!
//! Names, codes and rules are EC2's (API reference, `InstanceState`; User Guide, "Instance
//! lifecycle"). [`InstanceState::after`] is the only place that knows the arrows; it is a pure
//! function.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The state of an instance.
///
/// ```
/// use instance_core::{InstanceState, Transition};
///
/// let state = InstanceState::ShuttingDown;
/// assert_eq!((state.as_str(), state.code()), ("shutting-down", 32));
/// assert_eq!(state.after(Transition::Start), None, "what is being terminated does not come back");
/// let last = InstanceState::ALL.into_iter().filter(|s| s.after(Transition::Terminate).is_none());
/// assert_eq!(last.collect::<Vec<_>>(), [InstanceState::ShuttingDown, InstanceState::Terminated]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// Its volumes and its machine are being made.
    Pending,
    /// Its machine runs.
    Running,
    /// Being terminated.
    ShuttingDown,
    /// Gone; the record stays visible for a while.
    Terminated,
    /// Being stopped.
    Stopping,
    /// It has no machine; its volumes are kept, and it can be started again.
    Stopped,
}

/// What moves an instance from one state to the next.
///
/// ```
/// use instance_core::{InstanceState, Transition};
///
/// let stopping = InstanceState::Running.after(Transition::Stop);
/// assert_eq!(stopping.and_then(|s| s.after(Transition::Stopped)), Some(InstanceState::Stopped));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Transition {
    /// The machine runs.
    Started,
    /// The machine could not be made or started again.
    StartFailed,
    /// A start was asked for.
    Start,
    /// A stop was asked for, or the guest powered itself off.
    Stop,
    /// The machine is gone and the volumes are durable.
    Stopped,
    /// A termination was asked for.
    Terminate,
    /// Machine and volumes are gone.
    Terminated,
    /// The machine ended in a way that nobody asked for, or was lost with the process that ran it.
    Lost,
}

impl InstanceState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Pending, Self::Running, Self::ShuttingDown, Self::Terminated, Self::Stopping, Self::Stopped];

    /// EC2's code of the state.
    ///
    /// ```
    /// use instance_core::InstanceState;
    ///
    /// assert_eq!(InstanceState::Running.code(), 16);
    /// assert_eq!(InstanceState::ShuttingDown.to_string(), "shutting-down");
    /// ```
    pub const fn code(self) -> u16 {
        match self {
            Self::Pending => 0,
            Self::Running => 16,
            Self::ShuttingDown => 32,
            Self::Terminated => 48,
            Self::Stopping => 64,
            Self::Stopped => 80,
        }
    }

    /// EC2's name of the state.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::ShuttingDown => "shutting-down",
            Self::Terminated => "terminated",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }

    /// The state after `transition`, or `None` if it cannot happen in this one.
    pub const fn after(self, transition: Transition) -> Option<Self> {
        use InstanceState as S;
        use Transition as T;
        match (self, transition) {
            (S::Pending, T::Started) => Some(S::Running),
            (S::Pending, T::StartFailed) => Some(S::Stopped),
            (S::Running, T::Stop) => Some(S::Stopping),
            (S::Stopping, T::Stopped) => Some(S::Stopped),
            (S::Stopped, T::Start) => Some(S::Pending),
            (S::Pending | S::Running | S::Stopping | S::Stopped, T::Terminate) => Some(S::ShuttingDown),
            (S::ShuttingDown, T::Terminated) => Some(S::Terminated),
            (S::Pending | S::Running | S::Stopping, T::Lost) => Some(S::Stopped),
            _ => None,
        }
    }
}

impl InstanceState {
    const TRANSITIONS: [Transition; 8] = {
        use Transition as T;
        [T::Started, T::StartFailed, T::Start, T::Stop, T::Stopped, T::Terminate, T::Terminated, T::Lost]
    };

    /// Whether it is `to`, or can come to be, by whatever other states.
    pub(crate) fn leads_to(self, to: Self) -> bool {
        let mut reached = vec![self];
        let mut at = 0;
        while let Some(state) = reached.get(at).copied() {
            let next = Self::TRANSITIONS.into_iter().filter_map(|by| state.after(by));
            let new: Vec<Self> = next.filter(|next| !reached.contains(next)).collect();
            reached.extend(new);
            at += 1;
        }
        reached.contains(&to)
    }
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every arrow of the diagram, written down a second time: what is not here must be refused.
    #[test]
    fn only_the_arrows_of_the_diagram_exist() {
        use InstanceState::*;
        let arrows = [
            (Pending, Transition::Started, Running),
            (Pending, Transition::StartFailed, Stopped),
            (Pending, Transition::Terminate, ShuttingDown),
            (Pending, Transition::Lost, Stopped),
            (Running, Transition::Stop, Stopping),
            (Running, Transition::Terminate, ShuttingDown),
            (Running, Transition::Lost, Stopped),
            (Stopping, Transition::Stopped, Stopped),
            (Stopping, Transition::Terminate, ShuttingDown),
            (Stopping, Transition::Lost, Stopped),
            (Stopped, Transition::Start, Pending),
            (Stopped, Transition::Terminate, ShuttingDown),
            (ShuttingDown, Transition::Terminated, Terminated),
        ];
        for from in InstanceState::ALL {
            for by in InstanceState::TRANSITIONS {
                let expected = arrows.iter().find(|a| (a.0, a.1) == (from, by)).map(|a| a.2);
                assert_eq!(from.after(by), expected, "{from} by {by:?}");
            }
        }
    }

    #[test]
    fn what_is_terminated_leads_nowhere_and_the_rest_to_all() {
        use InstanceState::*;
        for from in InstanceState::ALL {
            for to in InstanceState::ALL {
                let ends = matches!(from, ShuttingDown | Terminated);
                let expected = !ends || to == Terminated || to == from;
                assert_eq!(from.leads_to(to), expected, "{from} to {to}");
            }
        }
    }

    #[test]
    fn codes_and_names_are_those_of_ec2() {
        let table = [
            (0, "pending"),
            (16, "running"),
            (32, "shutting-down"),
            (48, "terminated"),
            (64, "stopping"),
            (80, "stopped"),
        ];
        for (state, (code, name)) in InstanceState::ALL.into_iter().zip(table) {
            assert_eq!((state.code(), state.as_str()), (code, name));
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("{name:?}"));
        }
    }
}
