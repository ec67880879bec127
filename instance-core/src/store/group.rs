//! Group commit: what threads commit while the disk is at work on an earlier commit goes to it in one.
//!
//! The first to come leads: it takes all that waits, writes it in one call, tells the others, and hands
//! the lead to the first of those that have come meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::state_store::{Change, Durability, StateStore};
use crate::{Error, ErrorKind, Result};

#[derive(Debug)]
pub(super) struct Group {
    state: Box<dyn StateStore>,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<Waiting>,
    /// What goes in front of the next batch, and is waited for by nobody.
    later: Vec<Change>,
    /// Somebody writes, or has been told to.
    led: bool,
}

#[derive(Debug)]
struct Waiting {
    changes: Vec<Change>,
    durability: Durability,
    turn: Arc<Turn>,
}

/// What comes of one who waits.
#[derive(Debug, Default)]
struct Turn {
    news: Mutex<Option<News>>,
    told: Condvar,
}

#[derive(Debug)]
enum News {
    /// It is to lead.
    Lead,
    /// Its changes were written, or not.
    Done(Result<()>),
}

impl Turn {
    fn tell(&self, news: News) {
        *lock(&self.news) = Some(news);
        self.told.notify_one();
    }

    fn wait(&self) -> News {
        let mut news = lock(&self.news);
        loop {
            match news.take() {
                Some(news) => return news,
                None => news = self.told.wait(news).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Group {
    pub(super) fn new(state: Box<dyn StateStore>) -> Self {
        Self { state, queue: Mutex::default() }
    }

    pub(super) fn state(&self) -> &dyn StateStore {
        &*self.state
    }

    /// Makes the changes, all or none, together with what others want just then.
    pub(super) fn apply(&self, changes: Vec<Change>, durability: Durability) -> Result<()> {
        let turn = Arc::new(Turn::default());
        let mut queue = lock(&self.queue);
        queue.waiting.push(Waiting { changes, durability, turn: turn.clone() });
        let leads = !std::mem::replace(&mut queue.led, true);
        drop(queue);
        if !leads {
            if let News::Done(done) = turn.wait() {
                return done;
            }
        }
        let mut queue = lock(&self.queue);
        let mut batch = std::mem::take(&mut queue.waiting);
        let later = std::mem::take(&mut queue.later);
        drop(queue);
        if !later.is_empty() {
            let turn = Arc::new(Turn::default());
            batch.insert(0, Waiting { changes: later, durability: Durability::Eventual, turn });
        }
        self.write(batch);
        let mut queue = lock(&self.queue);
        match queue.waiting.first() {
            Some(next) => next.turn.tell(News::Lead),
            None => queue.led = false,
        }
        drop(queue);
        match turn.wait() {
            News::Done(done) => done,
            News::Lead => Err(Error::new(ErrorKind::Internal, "a commit that was written leads again")),
        }
    }

    /// Leaves changes to the next batch.
    pub(super) fn later(&self, changes: Vec<Change>) {
        lock(&self.queue).later.extend(changes);
    }

    /// Whether there are such.
    pub(super) fn has_later(&self) -> bool {
        !lock(&self.queue).later.is_empty()
    }

    /// Writes what a batch wants and tells each of its members.
    fn write(&self, mut batch: Vec<Waiting>) {
        let immediate = batch.iter().any(|one| one.durability == Durability::Immediate);
        let durability = if immediate { Durability::Immediate } else { Durability::Eventual };
        let parts: Vec<usize> = batch.iter().map(|one| one.changes.len()).collect();
        let all: Vec<Change> = batch.iter_mut().flat_map(|one| std::mem::take(&mut one.changes)).collect();
        match (self.contained(&all, durability), &batch[..]) {
            (done, [one]) => one.turn.tell(News::Done(done)),
            (Ok(()), _) => batch.iter().for_each(|one| one.turn.tell(News::Done(Ok(())))),
            // What one of them cannot have, the others may: a removal needs no space on a full disk.
            (Err(_), _) => {
                let mut rest = &all[..];
                for (one, part) in batch.iter().zip(parts) {
                    let (changes, others) = rest.split_at(part);
                    one.turn.tell(News::Done(self.contained(changes, one.durability)));
                    rest = others;
                }
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
        let later = std::mem::take(&mut lock(&self.queue).later);
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

    /// Says how many changes come in one call, and waits to be let on; refuses a key named `bad`.
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
            assert_eq!(called.recv().unwrap(), 1);
            let others: Vec<_> = (keys.iter().map(String::as_str).chain(["bad"]))
                .map(|key| {
                    let group = &group;
                    let other = scope.spawn(move || group.apply(put(key), Durability::Immediate));
                    (key, other)
                })
                .collect();
            while lock(&group.queue).waiting.len() < others.len() {
                std::thread::yield_now();
            }
            go.send(()).unwrap();
            assert_eq!(called.recv().unwrap(), others.len(), "all that has come meanwhile");
            // The batch is refused for one of them; each of the others gets what it wants.
            for _ in 0..others.len() + 1 {
                go.send(()).unwrap();
            }
            first.join().unwrap().unwrap();
            for (key, other) in others {
                assert_eq!(other.join().unwrap().is_ok(), key != "bad", "{key}");
            }
        });
        assert_eq!(group.state().scan("t").unwrap().len(), keys.len() + 1);
        assert!(!lock(&group.queue).led);
    }
}
