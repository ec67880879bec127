//! A state store that fails.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::{Arc, Mutex};

use instance_core::state_store::{Change, Durability, MemoryStateStore, StateStore};
use instance_core::watch::Publisher;
use instance_core::{Error, ErrorKind, Result};

/// How it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Works,
    Fails,
    /// Once, after it has made the changes.
    FailsLate,
    /// It refuses changes of which one says this.
    Refuses(&'static str),
}

/// A store that fails, and has made the changes all the same or not.
#[derive(Debug, Clone)]
pub(crate) struct Failing {
    state: Arc<MemoryStateStore>,
    how: Arc<Mutex<How>>,
    refusals: Arc<Publisher<usize>>,
}

impl Failing {
    /// One that works.
    pub(crate) fn new() -> Self {
        let how = Arc::new(Mutex::new(How::Works));
        Self { state: Arc::default(), how, refusals: Arc::new(Publisher::new(0)) }
    }

    pub(crate) fn set(&self, how: How) {
        *self.how.lock().unwrap() = how;
    }

    /// Waits until it has refused something, ever.
    pub(crate) fn wait_for_refusal(&self) {
        let soon = super::soon();
        self.refusals.watch().wait(soon, |refusals| *refusals > 0).unwrap();
    }
}

impl StateStore for Failing {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        self.state.get(table, key)
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        self.state.scan(table)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        let says = |text: &str| {
            let values = changes.iter().filter_map(|change| change.value.as_deref());
            values.map(String::from_utf8_lossy).any(|value| value.contains(text))
        };
        let mut how = self.how.lock().unwrap();
        let (makes, works) = match *how {
            How::Works => (true, true),
            How::Fails => (false, false),
            How::FailsLate => (true, false),
            How::Refuses(what) => (!says(what), !says(what)),
        };
        if makes {
            self.state.apply(changes, durability)?;
        }
        if *how == How::FailsLate {
            *how = How::Works;
        }
        drop(how);
        if works {
            return Ok(());
        }
        self.refusals.update(|refusals| {
            *refusals += 1;
            true
        });
        Err(Error::new(ErrorKind::Internal, "the store's disk is gone"))
    }
}
