//! The instances' changes of state, told as they come and kept for the report.

use std::collections::BTreeMap;
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow};
use instance_core::{InstanceState, StateChanges};
use serde::Serialize;

use super::display::Display;

/// A change of an instance's state.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Change {
    state: String,
    /// Seconds since 1970.
    at: f64,
    /// How long the instance was in the state before.
    seconds_after_previous: f64,
    /// How long it had been `pending` or more.
    seconds_after_launch: f64,
}

/// The changes of each instance, by its id.
pub(crate) type Changes = BTreeMap<String, Vec<Change>>;

/// A thread that listens to a region until it is closed.
pub(crate) struct Watcher(JoinHandle<Changes>);

impl Watcher {
    pub(crate) fn start(changes: StateChanges, display: Display) -> Self {
        Self(thread::spawn(move || {
            let mut lives: BTreeMap<String, Life> = BTreeMap::new();
            for change in changes {
                let id = change.instance_id.to_string();
                let life = lives.entry(id.clone()).or_default();
                let line = life.add(change.state, change.at);
                display.say(&format!("    {id} {line}"));
            }
            lives.into_iter().map(|(id, life)| (id, life.changes)).collect()
        }))
    }

    /// All that it heard, once the region is closed.
    pub(crate) fn finish(self) -> Result<Changes> {
        self.0.join().map_err(|_| anyhow!("the thread that listens to the region panicked"))
    }
}

/// An instance's life so far.
#[derive(Default)]
struct Life {
    launched: Option<SystemTime>,
    last: Option<(InstanceState, SystemTime)>,
    changes: Vec<Change>,
}

impl Life {
    /// Adds a change, and says in words how long it took.
    fn add(&mut self, state: InstanceState, at: SystemTime) -> String {
        let since = |then: SystemTime| at.duration_since(then).unwrap_or_default();
        let launched = *self.launched.get_or_insert(at);
        let (previous, line) = match self.last {
            None => (Duration::ZERO, format!("{state}")),
            Some((last, then)) if then == launched => {
                (since(then), format!("{state} ({:.1?} after {last})", since(then)))
            }
            Some((last, then)) => {
                let line = format!(
                    "{state} ({:.1?} after {last}, {:.1?} after launch)",
                    since(then),
                    since(launched)
                );
                (since(then), line)
            }
        };
        self.last = Some((state, at));
        self.changes.push(Change {
            state: state.to_string(),
            at: at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            seconds_after_previous: previous.as_secs_f64(),
            seconds_after_launch: since(launched).as_secs_f64(),
        });
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_each_time_from_the_change_before() {
        let mut life = Life::default();
        let at = |millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        for (state, millis, line) in [
            (InstanceState::Pending, 1000, "pending"),
            (InstanceState::Running, 1012, "running (12.0ms after pending)"),
            (InstanceState::ShuttingDown, 3512, "shutting-down (2.5s after running, 2.5s after launch)"),
            // A clock that was set back.
            (InstanceState::Terminated, 500, "terminated (0.0ns after shutting-down, 0.0ns after launch)"),
        ] {
            assert_eq!(life.add(state, at(millis)), line);
        }
        let times: Vec<_> =
            life.changes.iter().map(|c| (c.seconds_after_previous, c.seconds_after_launch)).collect();
        assert_eq!(times, [(0.0, 0.0), (0.012, 0.012), (2.5, 2.512), (0.0, 0.0)]);
    }
}
