//! Who follows the ends of machines: a thread for each instance whose machine has ended, for as long as that takes.
//!
//! What an end comes to may take long: volumes are flushed, and the kernel of a guest that reset itself is read and unpacked
//! anew, whatever it has become. No other instance's end waits for that.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use ami_core::InstanceId;

use super::Reports;
use crate::region::Inner;

/// How many guests that have reset themselves get a new machine at a time. Each takes a processor of the host's and the memory
/// for what it boots, so those that reset themselves without end take turns.
const MOST_RESETS: usize = 2;

/// What the thread that follows ends is told.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Message {
    /// A machine has ended.
    Ended(Ended),
    /// A thread has followed an end of this instance's machine.
    Followed(InstanceId),
    /// The region is closed.
    Close,
}

/// The end of a machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    /// Whose.
    pub(super) id: InstanceId,
    /// Which of its machines.
    pub(super) generation: u64,
    /// It has been reset.
    pub(super) reset: bool,
}

/// The threads that follow ends, of one instance one at most.
#[derive(Debug, Default)]
pub(super) struct Followers(Mutex<BTreeMap<InstanceId, JoinHandle<()>>>);

impl Followers {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<InstanceId, JoinHandle<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the caller's is one of them.
    pub(super) fn is_own_thread(&self) -> bool {
        let current = thread::current().id();
        self.lock().values().any(|thread| thread.thread().id() == current)
    }

    /// Waits for the end of an instance's.
    fn join(&self, id: InstanceId) {
        // Not locked meanwhile: it may be asking whether it is one of them.
        let thread = self.lock().remove(&id);
        // What it panicked with has been told.
        let _ = thread.map(JoinHandle::join);
    }

    fn join_all(&self) {
        let threads = std::mem::take(&mut *self.lock());
        for thread in threads.into_values() {
            let _ = thread.join();
        }
    }
}

/// Says in a thread that it has done what it was for, whatever has become of that.
struct Done(Reports, InstanceId);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.followed(self.1);
    }
}

/// What is done for the instances whose machines have ended.
pub(super) struct Ends {
    region: Weak<Inner>,
    followers: Arc<Followers>,
    /// For whom there is a thread, and for what.
    at_work: BTreeMap<InstanceId, Work>,
    /// Resets that others go before, of an instance one at most.
    waiting: VecDeque<Ended>,
}

/// What a thread does.
#[derive(Debug)]
struct Work {
    reset: bool,
    /// The end that was told of meanwhile.
    next: Option<Ended>,
}

impl Ends {
    pub(super) fn new(region: Weak<Inner>, followers: Arc<Followers>) -> Self {
        Self { region, followers, at_work: BTreeMap::new(), waiting: VecDeque::new() }
    }

    /// Follows what is told until the region is closed, and has let go of all threads then. A reset that waits until then is
    /// of an instance that runs no more; any other end is followed still.
    pub(super) fn follow(mut self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Ended(ended) => self.ended(ended),
                Message::Followed(id) => self.followed(id),
                Message::Close => break,
            }
        }
        self.followers.join_all();
        let mut left: Vec<_> = self.at_work.into_values().filter_map(|work| work.next).collect();
        left.extend(messages.try_iter().filter_map(|message| match message {
            Message::Ended(ended) => Some(ended),
            Message::Followed(_) | Message::Close => None,
        }));
        let Some(region) = self.region.upgrade() else { return };
        left.iter().filter(|end| !end.reset).for_each(|end| region.machine_ended(end.id, end.generation));
    }

    fn ended(&mut self, ended: Ended) {
        if let Some(work) = self.at_work.get_mut(&ended.id) {
            work.next = Some(later(work.next, ended));
        } else if ended.reset {
            match self.waiting.iter_mut().find(|waiting| waiting.id == ended.id) {
                Some(waiting) => *waiting = later(Some(*waiting), ended),
                None => self.waiting.push_back(ended),
            }
            self.start_resets();
        } else {
            self.start(ended);
        }
    }

    fn followed(&mut self, id: InstanceId) {
        self.followers.join(id);
        let next = self.at_work.remove(&id).and_then(|work| work.next);
        next.into_iter().for_each(|ended| self.ended(ended));
        self.start_resets();
    }

    fn start_resets(&mut self) {
        while self.at_work.values().filter(|work| work.reset).count() < MOST_RESETS {
            let Some(ended) = self.waiting.pop_front() else { return };
            match self.at_work.get_mut(&ended.id) {
                // A later machine of its has ended since.
                Some(work) => work.next = Some(later(work.next, ended)),
                None => self.start(ended),
            }
        }
    }

    /// Has a thread follow an end. There is none for the instance.
    fn start(&mut self, ended: Ended) {
        let Some(region) = self.region.upgrade() else { return };
        let mut threads = self.followers.lock();
        let (reports, its_region) = (region.supervisor.reports(), region.clone());
        let follow = move || {
            // Said when the region is let go of, which may close it.
            let _done = Done(reports, ended.id);
            let region = its_region;
            region.machine_ended(ended.id, ended.generation);
        };
        match thread::Builder::new().name("ended".to_owned()).spawn(follow) {
            Ok(thread) => {
                threads.insert(ended.id, thread);
                self.at_work.insert(ended.id, Work { reset: ended.reset, next: None });
            }
            Err(e) => {
                drop(threads);
                tracing::warn!(instance = %ended.id, error = %e, "others wait for what follows a machine's end");
                region.machine_ended(ended.id, ended.generation);
            }
        }
    }
}

/// The end of the later machine of two of an instance's.
fn later(one: Option<Ended>, other: Ended) -> Ended {
    one.filter(|one| one.generation > other.generation).unwrap_or(other)
}
