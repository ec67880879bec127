//! Group commit: what threads commit while the disk is at work on an earlier commit goes to it in one.
//!
//! A thread of its own writes. It sleeps while the disk works, so the scheduler lets it run as soon as that is done, and before
//! those whom it wakes: one of the callers in its place is as much behind as the others, and the disk waits for its turn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::thread::futex;

use crate::state_store::{Change, Durability, StateStore};
use crate::{Error, ErrorKind, Result};

/// What is told of a batch: nothing yet, that all of it was written, or what came of each member.
const NOTHING: u32 = 0;
const WHOLE: u32 = 1;
const EACH: u32 = 2;

#[derive(Debug)]
pub(super) struct Group {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Box<dyn StateStore>,
    /// The batch that is open to all who come.
    open: Mutex<Open>,
    /// Wakes the writer.
    come: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    changes: Vec<Change>,
    /// What goes in front of them, and is waited for by nobody.
    later: Vec<Change>,
    members: Vec<Member>,
    outcome: Arc<Outcome>,
    /// The writer sleeps until somebody comes.
    sleeps: bool,
    /// Nobody will.
    over: bool,
}

/// How many of a batch's changes are one caller's, all or none, and when these are to be durable.
#[derive(Debug)]
struct Member {
    changes: usize,
    durability: Durability,
}

/// What came of a batch.
#[derive(Debug, Default)]
struct Outcome {
    /// A futex, by which all are woken in one call and none then waits for another as at a condition variable's lock.
    told: AtomicU32,
    /// Member by member, if it was not written as a whole.
    each: Mutex<Vec<Result<()>>>,
}

impl Outcome {
    fn tell(&self, each: Vec<Result<()>>) {
        let told = if each.is_empty() { WHOLE } else { EACH };
        *lock(&self.each) = each;
        self.told.store(told, Ordering::Release);
        // It is no error that nobody waits, and there is no other.
        let _ = futex::wake(&self.told, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    /// Waits for what came of the member with this number, which asks once.
    fn wait(&self, member: usize) -> Result<()> {
        loop {
            match self.told.load(Ordering::Acquire) {
                // Woken for whatever reason, it looks again.
                NOTHING => _ = futex::wait(&self.told, futex::Flags::PRIVATE, NOTHING, None),
                WHOLE => return Ok(()),
                _ => return std::mem::replace(&mut lock(&self.each)[member], Ok(())),
            }
        }
    }
}

impl Group {
    /// # Errors
    ///
    /// When the host has no thread.
    pub(super) fn new(state: Box<dyn StateStore>) -> Result<Self> {
        let shared = Arc::new(Shared { state, open: Mutex::default(), come: Condvar::new() });
        let writes = shared.clone();
        let writer = thread::Builder::new().name("commits".to_owned()).spawn(move || writes.work());
        let writer = writer.map_err(|e| Error::io(e, "cannot start the thread that commits"))?;
        Ok(Self { shared, writer: Some(writer) })
    }

    pub(super) fn state(&self) -> &dyn StateStore {
        &*self.shared.state
    }

    /// Makes the changes, all or none, together with what others want just then.
    pub(super) fn apply(&self, mut changes: Vec<Change>, durability: Durability) -> Result<()> {
        let mut open = lock(&self.shared.open);
        let (member, outcome) = (open.members.len(), open.outcome.clone());
        open.members.push(Member { changes: changes.len(), durability });
        open.changes.append(&mut changes);
        let sleeps = std::mem::take(&mut open.sleeps);
        drop(open);
        if sleeps {
            self.shared.come.notify_one();
        }
        outcome.wait(member)
    }

    /// Leaves changes to the next batch.
    pub(super) fn later(&self, changes: Vec<Change>) {
        lock(&self.shared.open).later.extend(changes);
    }

    /// Whether there are such.
    pub(super) fn has_later(&self) -> bool {
        !lock(&self.shared.open).later.is_empty()
    }
}

impl Shared {
    /// Writes batch after batch, until it is over.
    fn work(&self) {
        while let Some(batch) = self.next() {
            let outcome = batch.outcome.clone();
            outcome.tell(self.write(batch));
        }
    }

    /// The open batch, when it has a member.
    fn next(&self) -> Option<Open> {
        let mut open = lock(&self.open);
        while open.members.is_empty() {
            if open.over {
                return None;
            }
            open.sleeps = true;
            open = self.come.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
        open.sleeps = false;
        let over = open.over;
        Some(std::mem::replace(&mut *open, Open { over, ..Open::default() }))
    }

    /// Writes what a batch wants. Gives what came of each member, or nothing if all of it was written.
    fn write(&self, batch: Open) -> Vec<Result<()>> {
        let Open { changes, later, mut members, .. } = batch;
        let waited_for = members.len();
        if !later.is_empty() {
            members.insert(0, Member { changes: later.len(), durability: Durability::Eventual });
        }
        let mut all = later;
        all.extend(changes);
        let immediate = members.iter().any(|one| one.durability == Durability::Immediate);
        let durability = if immediate { Durability::Immediate } else { Durability::Eventual };
        match (self.contained(&all, durability), members.len()) {
            (Ok(()), _) => Vec::new(),
            (failed, 1) => vec![failed],
            // What one of them cannot have, the others may: a removal needs no space on a full disk.
            (Err(_), count) => {
                let mut rest = &all[..];
                let each = members.iter().map(|one| {
                    let (changes, others) = rest.split_at(one.changes);
                    rest = others;
                    self.contained(changes, one.durability)
                });
                let mut each: Vec<_> = each.collect();
                each.split_off(count - waited_for)
            }
        }
    }

    /// A store that panics must not leave the others waiting.
    fn contained(&self, changes: &[Change], durability: Durability) -> Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.state.apply(changes, durability)))
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "the state store panicked")))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        lock(&self.shared.open).over = true;
        self.shared.come.notify_one();
        // It contains the store's panics and has none.
        let _ = self.writer.take().map(JoinHandle::join);
        let later = std::mem::take(&mut lock(&self.shared.open).later);
        if !later.is_empty() {
            // Nobody was promised it.
            if let Err(e) = self.shared.contained(&later, Durability::Immediate) {
                tracing::warn!(error = crate::error::chain(&e), "what was left for later is not written");
            }
        }
    }
}

// Nothing that is done under these locks panics half way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_store::MemoryStateStore;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Says how many changes come in one call, and waits to be let on; refuses a key named `bad`, panics at one named `worse`.
    #[derive(Debug)]
    struct Slow {
        kept: MemoryStateStore,
        calls: Mutex<Sender<usize>>,
        go: Mutex<Receiver<()>>,
    }

    impl StateStore for Slow {
        fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
            self.kept.get(table, key)
        }

        fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
            self.kept.scan(table)
        }

        fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
            lock(&self.calls).send(changes.len()).unwrap();
            lock(&self.go).recv().unwrap();
            assert!(changes.iter().all(|c| c.key != "worse"), "worse");
            match changes.iter().any(|c| c.key == "bad") {
                true => Err(Error::new(ErrorKind::Internal, "refused")),
                false => self.kept.apply(changes, durability),
            }
        }
    }

    fn put(key: &str) -> Vec<Change> {
        vec![Change { table: "t", key: key.to_owned(), value: Some(Vec::new()) }]
    }

    #[test]
    fn what_is_for_later_goes_in_front_of_what_comes_next() {
        let group = Group::new(Box::new(MemoryStateStore::new())).unwrap();
        group.later([put("a"), put("b")].concat());
        assert_eq!(group.state().scan("t").unwrap(), []);
        let gone = Change { value: None, ..put("a").remove(0) };
        group.apply(vec![gone], Durability::Eventual).unwrap();
        let left: Vec<String> = group.state().scan("t").unwrap().into_iter().map(|(key, _)| key).collect();
        assert_eq!(left, ["b"]);
    }

    #[test]
    fn what_comes_while_the_disk_is_at_work_is_written_in_one() {
        let ((calls, called), (go, let_on)) = (channel(), channel());
        let slow = Slow { kept: MemoryStateStore::new(), calls: Mutex::new(calls), go: Mutex::new(let_on) };
        let group = Group::new(Box::new(slow)).unwrap();
        let keys: Vec<String> = (0..8).map(|n| n.to_string()).collect();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| group.apply(put("first"), Durability::Immediate));
            assert_eq!(called.recv().unwrap(), 1);
            let others: Vec<_> = (keys.iter().map(String::as_str).chain(["bad"]))
                .map(|key| {
                    let group = &group;
                    let other = scope.spawn(move || group.apply(put(key), Durability::Immediate));
                    (key, other)
                })
                .collect();
            while lock(&group.shared.open).members.len() < others.len() {
                std::thread::yield_now();
            }
            group.later(put("later"));
            go.send(()).unwrap();
            assert_eq!(called.recv().unwrap(), others.len() + 1, "all that has come meanwhile");
            // The batch is refused for one of them; each of the others gets what it wants.
            for _ in 0..others.len() + 2 {
                go.send(()).unwrap();
            }
            first.join().unwrap().unwrap();
            for (key, other) in others {
                assert_eq!(other.join().unwrap().is_ok(), key != "bad", "{key}");
            }
        });
        assert_eq!(group.state().scan("t").unwrap().len(), keys.len() + 2);
        assert!(lock(&group.shared.open).members.is_empty());
    }

    #[test]
    fn a_store_that_panics_leaves_nobody_waiting() {
        let ((calls, called), (go, let_on)) = (channel(), channel());
        let slow = Slow { kept: MemoryStateStore::new(), calls: Mutex::new(calls), go: Mutex::new(let_on) };
        let group = Group::new(Box::new(slow)).unwrap();
        (0..2).for_each(|_| go.send(()).unwrap());
        let panicked = group.apply(put("worse"), Durability::Immediate).unwrap_err();
        assert_eq!(panicked.kind(), ErrorKind::Internal);
        group.apply(put("fig"), Durability::Immediate).unwrap();
        drop(group);
        assert_eq!(called.iter().count(), 2, "the writer has ended with its group");
    }
}
