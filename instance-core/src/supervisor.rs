//! The thread that sees machines end.
//!
//! A machine tells of its end in one of its own threads, where nothing may wait; so the message goes
//! to this one, which moves the instance on: a guest that powered off is stopped or terminated, one
//! that rebooted gets a new machine.

use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use ami_core::InstanceId;

use crate::region::Inner;

/// That a machine has ended: whose, and which of its machines.
pub(crate) type Ended = (InstanceId, u64);

pub(crate) struct Supervisor {
    sender: Option<Sender<Ended>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    region: Weak<Inner>,
}

impl Supervisor {
    pub(crate) fn new(region: Weak<Inner>) -> Self {
        Self { sender: None, thread: Mutex::default(), region }
    }
}
