//! The threads that follow what happens to instances by itself.
//!
//! A machine tells of its end in one of its own threads, where nothing may wait; so the message goes
//! to a thread, which has others move the instances on, each its own: a guest that powered off is stopped or terminated, one
//! that rebooted gets a new machine. Another makes the volumes of launches durable once their guests write to them, so
//! that no end of a machine waits for the disk, and keeps the host keys that consoles show.

mod ends;

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ami_core::InstanceId;

pub(crate) use self::ends::Message;
use self::ends::{Ended, Ends, Followers};
use crate::machine::ExitCause;
use crate::region::Inner;

/// For how long instances are gathered of which something is made durable together.
const GATHER: Duration = Duration::from_secs(1);

/// Where the threads are told of what they are to follow.
#[derive(Debug, Clone)]
pub(crate) struct Reports {
    ended: Sender<Message>,
    unsettled: Arc<Unsettled>,
}

impl Reports {
    /// A machine has ended: whose, which of its machines, and how.
    pub(crate) fn ended(&self, id: InstanceId, generation: u64, cause: &ExitCause) {
        let ended = Ended { id, generation, reset: *cause == ExitCause::Reset };
        // A supervisor that is gone follows nothing.
        let _ = self.ended.send(Message::Ended(ended));
    }

    /// An end of this instance's machine has been followed.
    fn followed(&self, id: InstanceId) {
        let _ = self.ended.send(Message::Followed(id));
    }

    /// Something of an instance is to become durable: a volume of its launch is on the disk now, or its console has shown
    /// its host keys.
    pub(crate) fn unsettled(&self, id: InstanceId) {
        self.unsettled.add(id);
    }
}

#[derive(Debug)]
pub(crate) struct Supervisor {
    reports: Reports,
    threads: Mutex<Vec<JoinHandle<()>>>,
    followers: Arc<Followers>,
}

impl Supervisor {
    pub(crate) fn new() -> (Self, Receiver<Message>) {
        let (ended, receiver) = mpsc::channel();
        let reports = Reports { ended, unsettled: Arc::default() };
        (Self { reports, threads: Mutex::default(), followers: Arc::default() }, receiver)
    }

    pub(crate) fn start(&self, receiver: Receiver<Message>, region: Weak<Inner>) -> io::Result<()> {
        let (unsettled, of_volumes) = (self.reports.unsettled.clone(), region.clone());
        let settle = move || {
            while let Some(ids) = unsettled.gather() {
                match of_volumes.upgrade() {
                    Some(region) => region.settle(&ids),
                    None => return,
                }
            }
        };
        let ends = Ends::new(region, self.followers.clone());
        let follow = move || ends.follow(&receiver);
        let mut threads = self.threads();
        threads.push(thread::Builder::new().name("region".to_owned()).spawn(follow)?);
        threads.push(thread::Builder::new().name("volumes".to_owned()).spawn(settle)?);
        Ok(())
    }

    /// Where what happens is told.
    pub(crate) fn reports(&self) -> Reports {
        self.reports.clone()
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the caller's is one of the threads.
    pub(crate) fn is_own_thread(&self) -> bool {
        let current = thread::current().id();
        self.threads().iter().any(|thread| thread.thread().id() == current) || self.followers.is_own_thread()
    }

    /// Ends the threads, soon.
    pub(crate) fn close(&self) {
        // A thread that has ended already listens no more.
        let _ = self.reports.ended.send(Message::Close);
        self.reports.unsettled.close();
    }

    /// Waits for their ends. Not to be called in one of them.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// The instances of which something is not known to be durable.
#[derive(Debug, Default)]
struct Unsettled {
    state: Mutex<Gathered>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Gathered {
    ids: BTreeSet<InstanceId>,
    closed: bool,
}

impl Unsettled {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, id: InstanceId) {
        let mut state = self.lock();
        let first = state.ids.is_empty();
        state.ids.insert(id);
        // Who waits for more is not woken for each.
        if first {
            self.changed.notify_one();
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Who is told of within a moment, since one synchronisation of a file system serves them all; none, if the region is
    /// closed.
    fn gather(&self) -> Option<BTreeSet<InstanceId>> {
        let nobody = |state: &mut Gathered| !state.closed && state.ids.is_empty();
        let waited = self.changed.wait_while(self.lock(), nobody).unwrap_or_else(PoisonError::into_inner);
        let open = |state: &mut Gathered| !state.closed;
        let waited = self.changed.wait_timeout_while(waited, GATHER, open);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match state.closed {
            true => None,
            false => Some(std::mem::take(&mut state.ids)),
        }
    }
}
