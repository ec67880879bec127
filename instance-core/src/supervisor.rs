//! The threads that follow what happens to instances by itself.
//!
//! A machine tells of its end in one of its own threads, where nothing may wait; so the message goes
//! to a thread, which moves the instance on: a guest that powered off is stopped or terminated, one
//! that rebooted gets a new machine. Another makes the volumes of launches durable, so that no end of a
//! machine waits for the disk.

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ami_core::InstanceId;

use crate::region::Inner;

/// For how long launches are gathered whose volumes are made durable together.
const GATHER: Duration = Duration::from_secs(1);

/// What the threads are told.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Message {
    /// A machine has ended: whose, and which of its machines.
    Ended(InstanceId, u64),
    /// An instance was launched, and its volumes are not known to be durable.
    Launched(InstanceId),
    /// The region is closed.
    Close,
}

#[derive(Debug)]
pub(crate) struct Supervisor {
    /// To the first thread, which hands on to the second what is for that.
    sender: Sender<Message>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Supervisor {
    pub(crate) fn new() -> (Self, Receiver<Message>) {
        let (sender, receiver) = mpsc::channel();
        (Self { sender, threads: Mutex::default() }, receiver)
    }

    pub(crate) fn start(&self, receiver: Receiver<Message>, region: Weak<Inner>) -> io::Result<()> {
        let (hand_on, launched) = mpsc::channel();
        let of_volumes = region.clone();
        let settle = move || {
            while let Some(ids) = gather(&launched) {
                match of_volumes.upgrade() {
                    Some(region) => region.settle(&ids),
                    None => return,
                }
            }
        };
        let follow = move || {
            while let Ok(message) = receiver.recv() {
                let Some(region) = region.upgrade() else { return };
                match message {
                    Message::Ended(id, generation) => region.machine_ended(id, generation),
                    // It is there for as long as this one is.
                    Message::Launched(id) => drop(hand_on.send(id)),
                    Message::Close => return,
                }
            }
        };
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.push(thread::Builder::new().name("region".to_owned()).spawn(follow)?);
        threads.push(thread::Builder::new().name("volumes".to_owned()).spawn(settle)?);
        Ok(())
    }

    /// Where machines tell of their end.
    pub(crate) fn sender(&self) -> Sender<Message> {
        self.sender.clone()
    }

    /// Ends the threads and waits for them; called in one of them, it does not wait for the other.
    pub(crate) fn stop(&self) {
        // A thread that has ended already listens no more.
        let _ = self.sender.send(Message::Close);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // A watcher that is told in such a thread may drop the last handle of a region.
        if threads.iter().any(|t| t.thread().id() == thread::current().id()) {
            return;
        }
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// Who is told of within a moment, since one synchronisation of a file system serves them all; none, if the region is
/// closed.
fn gather(launched: &Receiver<InstanceId>) -> Option<BTreeSet<InstanceId>> {
    let mut ids = BTreeSet::from([launched.recv().ok()?]);
    let until = Instant::now() + GATHER;
    loop {
        match launched.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(id) => drop(ids.insert(id)),
            Err(RecvTimeoutError::Timeout) => return Some(ids),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}
