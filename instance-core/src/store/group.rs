//! Group commit: what threads commit while the disk is at work on an earlier commit goes to it in one.
//!
//! The first to come while nobody leads does: it writes the batch in one call, wakes all who wait for it and goes on with
//! what has come meanwhile, so that the disk need not wait until another thread runs. After [`MOST`] batches the first member
//! of the next leads on.

use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::thread::futex;

use crate::state_store::{Change, Durability, StateStore};
use crate::{Error, ErrorKind, Result};

/// What is told of a batch: nothing yet, that its first member is to lead, that all of it was written, or what came of each
/// member.
const NOTHING: u32 = 0;
const LEAD: u32 = 1;
const WHOLE: u32 = 2;
const EACH: u32 = 3;

/// How many batches one caller writes, its own among them: it returns only then. More would be faster together, by a tenth
/// with 16, and have that caller wait for as many synchronisations.
const MOST: usize = 4;

/// By which the first member of a batch is woken alone, and by which the others wait.
const FIRST: NonZeroU32 = NonZeroU32::MIN;
const OTHERS: NonZeroU32 = FIRST.saturating_add(1);

#[derive(Debug)]
pub(super) struct Group {
    state: Box<dyn StateStore>,
    /// The batch that is open to all who come.
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    changes: Vec<Change>,
    /// What goes in front of them, and is waited for by nobody.
    later: Vec<Change>,
    members: Vec<Member>,
    outcome: Arc<Outcome>,
    /// Whether somebody leads, and will write this batch or have its first member do so.
    led: bool,
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

    /// Has the first member lead.
    fn hand_over(&self) {
        self.told.store(LEAD, Ordering::Release);
        let _ = futex::wake_bitset(&self.told, futex::Flags::PRIVATE, 1, FIRST);
    }

    /// Waits for what came of the member with this number, which asks once; or, with nothing, until it is to lead.
    fn wait(&self, member: usize) -> Option<Result<()>> {
        let which = if member == 0 { FIRST } else { OTHERS };
        loop {
            match self.told.load(Ordering::Acquire) {
                LEAD if member == 0 => return None,
                // Woken for whatever reason, it looks again.
                told @ (NOTHING | LEAD) => {
                    let _ = futex::wait_bitset(&self.told, futex::Flags::PRIVATE, told, None, which);
                }
                WHOLE => return Some(Ok(())),
                _ => return Some(std::mem::replace(&mut lock(&self.each)[member], Ok(()))),
            }
        }
    }
}

impl Group {
    pub(super) fn new(state: Box<dyn StateStore>) -> Self {
        Self { state, open: Mutex::default() }
    }

    pub(super) fn state(&self) -> &dyn StateStore {
        &*self.state
    }

    /// Makes the changes, all or none, together with what others want just then.
    pub(super) fn apply(&self, mut changes: Vec<Change>, durability: Durability) -> Result<()> {
        let mut open = lock(&self.open);
        let leads = !std::mem::replace(&mut open.led, true);
        let (member, outcome) = (open.members.len(), open.outcome.clone());
        open.members.push(Member { changes: changes.len(), durability });
        open.changes.append(&mut changes);
        drop(open);
        if leads {
            self.lead();
        }
        loop {
            match outcome.wait(member) {
                Some(came) => return came,
                None => self.lead(),
            }
        }
    }

    /// Writes the open batch, and those that come meanwhile.
    fn lead(&self) {
        for _ in 0..MOST {
            let mut open = lock(&self.open);
            if open.members.is_empty() {
                open.led = false;
                return;
            }
            let batch = std::mem::replace(&mut *open, Open { led: true, ..Open::default() });
            drop(open);
            let outcome = batch.outcome.clone();
            outcome.tell(self.write(batch));
        }
        let mut open = lock(&self.open);
        open.led = !open.members.is_empty();
        let next = open.led.then(|| open.outcome.clone());
        drop(open);
        if let Some(next) = next {
            next.hand_over();
        }
    }

    /// Leaves changes to the next batch.
    pub(super) fn later(&self, changes: Vec<Change>) {
        lock(&self.open).later.extend(changes);
    }

    /// Whether there are such.
    pub(super) fn has_later(&self) -> bool {
        !lock(&self.open).later.is_empty()
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
        let later = std::mem::take(&mut lock(&self.open).later);
        if !later.is_empty() {
            // Nobody was promised it.
            if let Err(e) = self.contained(&later, Durability::Immediate) {
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
    use std::thread::ThreadId;

    /// Says how many changes come in one call, and from which thread, and waits to be let on; refuses a key named `bad`.
    #[derive(Debug)]
    struct Slow {
        kept: MemoryStateStore,
        calls: Mutex<Sender<(usize, ThreadId)>>,
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
            lock(&self.calls).send((changes.len(), std::thread::current().id())).unwrap();
            lock(&self.go).recv().unwrap();
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
        let group = Group::new(Box::new(MemoryStateStore::new()));
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
        let group = Group::new(Box::new(slow));
        let keys: Vec<String> = (0..8).map(|n| n.to_string()).collect();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| group.apply(put("first"), Durability::Immediate));
            assert_eq!(called.recv().unwrap().0, 1);
            let others: Vec<_> = (keys.iter().map(String::as_str).chain(["bad"]))
                .map(|key| {
                    let group = &group;
                    let other = scope.spawn(move || group.apply(put(key), Durability::Immediate));
                    (key, other)
                })
                .collect();
            while lock(&group.open).members.len() < others.len() {
                std::thread::yield_now();
            }
            group.later(put("later"));
            go.send(()).unwrap();
            assert_eq!(called.recv().unwrap().0, others.len() + 1, "all that has come meanwhile");
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
        assert!(lock(&group.open).members.is_empty());
    }

    #[test]
    fn who_leads_goes_on_and_yet_returns() {
        let ((calls, called), (go, let_on)) = (channel(), channel());
        let slow = Slow { kept: MemoryStateStore::new(), calls: Mutex::new(calls), go: Mutex::new(let_on) };
        let group = Group::new(Box::new(slow));
        std::thread::scope(|scope| {
            // Gone if this panics, so that nobody waits for it.
            let go = go;
            let first = scope.spawn(|| group.apply(put("first"), Durability::Immediate));
            let mut others = Vec::new();
            for n in 0..MOST {
                assert_eq!(called.recv().unwrap(), (1, first.thread().id()), "batch {n}");
                let group = &group;
                // Of the last two one waits until the other has led.
                let come = if n + 1 < MOST { 1 } else { 2 };
                for key in (0..come).map(|one| format!("{n} {one}")) {
                    others.push(scope.spawn(move || group.apply(put(&key), Durability::Immediate)));
                }
                while lock(&group.open).members.len() < come {
                    std::thread::yield_now();
                }
                go.send(()).unwrap();
            }
            let (changes, leader) = called.recv().unwrap();
            assert_eq!(changes, 2);
            assert!(others[MOST - 1..].iter().any(|other| other.thread().id() == leader));
            // While the next is not written yet.
            first.join().unwrap().unwrap();
            go.send(()).unwrap();
            others.into_iter().for_each(|other| other.join().unwrap().unwrap());
        });
        assert_eq!(group.state().scan("t").unwrap().len(), MOST + 2);
        assert!(!lock(&group.open).led);
    }
}
