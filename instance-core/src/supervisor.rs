//! The thread that sees machines end.
//!
//! A machine tells of its end in one of its own threads, where nothing may wait; so the message goes
//! to this one, which moves the instance on: a guest that powered off is stopped or terminated, one
//! that rebooted gets a new machine.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use ami_core::InstanceId;

use crate::region::Inner;

/// What the thread is told.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Message {
    /// A machine has ended: whose, and which of its machines.
    Ended(InstanceId, u64),
    /// The region is closed.
    Close,
}

#[derive(Debug)]
pub(crate) struct Supervisor {
    sender: Sender<Message>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Supervisor {
    pub(crate) fn new() -> (Self, Receiver<Message>) {
        let (sender, receiver) = mpsc::channel();
        (Self { sender, thread: Mutex::new(None) }, receiver)
    }

    pub(crate) fn start(&self, receiver: Receiver<Message>, region: Weak<Inner>) -> io::Result<()> {
        let work = move || {
            while let Ok(Message::Ended(id, generation)) = receiver.recv() {
                match region.upgrade() {
                    Some(region) => region.machine_ended(id, generation),
                    None => return,
                }
            }
        };
        let thread = thread::Builder::new().name("region".to_owned()).spawn(work)?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// Where machines tell of their end.
    pub(crate) fn sender(&self) -> Sender<Message> {
        self.sender.clone()
    }

    /// Ends the thread and waits for it; called in the thread itself, it does not wait.
    pub(crate) fn stop(&self) {
        // A thread that has ended already listens no more.
        let _ = self.sender.send(Message::Close);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A watcher that is told in this thread may drop the last handle of a region.
        if let Some(thread) = thread.filter(|t| t.thread().id() != thread::current().id()) {
            let _ = thread.join();
        }
    }
}
