//! A value that can be waited for.
//!
//! One thread publishes, any number watch: by looking, by blocking with a deadline, or as a future
//! that needs no particular runtime.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use event_listener::{Event, Listener};

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Event,
}

struct State<T> {
    value: T,
    hooks: Vec<Hook<T>>,
    /// Values that have not been told, and the hooks that there were when each was published.
    untold: VecDeque<(T, Vec<Hook<T>>)>,
    /// A thread is telling them.
    telling: bool,
}

type Hook<T> = Arc<dyn Fn(&T) + Send + Sync>;

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone> Shared<T> {
    /// Tells the hooks what they have not been told, in order, without a lock while they run. Does
    /// nothing where another thread, or a hook's caller further up, is at it: that one goes on.
    fn tell(&self) {
        let mut state = self.lock();
        if state.telling {
            return;
        }
        state.telling = true;
        while let Some((value, hooks)) = state.untold.pop_front() {
            drop(state);
            for hook in hooks {
                // A hook runs in whatever thread has changed the value, whose work is not its own.
                if catch_unwind(AssertUnwindSafe(|| hook(&value))).is_err() {
                    tracing::error!("a hook panicked");
                }
            }
            state = self.lock();
        }
        state.telling = false;
    }
}

/// The side that changes the value. Make one with [`Publisher::new`], hand out [`Watch`]es.
///
/// ```
/// use std::sync::mpsc;
/// use instance_core::watch::Publisher;
///
/// let publisher = Publisher::new("created");
/// let (told, values) = mpsc::channel();
/// publisher.watch().subscribe(move |value| drop(told.send(*value)));
/// publisher.set("running");
/// let changed = publisher.update(|value| {
///     let change = *value == "paused";
///     *value = if change { "running" } else { *value };
///     change
/// });
/// assert!(!changed && publisher.get() == "running");
/// assert_eq!(values.try_iter().collect::<Vec<_>>(), ["running"]);
/// ```
pub struct Publisher<T>(Arc<Shared<T>>);

impl<T: Clone + Send> Publisher<T> {
    /// A publisher of `value`.
    pub fn new(value: T) -> Self {
        let state = State { value, hooks: Vec::new(), untold: VecDeque::new(), telling: false };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Event::new() }))
    }

    /// A watch on the value.
    pub fn watch(&self) -> Watch<T> {
        Watch(self.0.clone())
    }

    /// Changes the value with `change` and, if that says `true`, tells every watcher. Returns what
    /// `change` said. The value is locked meanwhile: `change` must not look at it by another way.
    pub fn update(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        {
            let mut state = self.0.lock();
            if !change(&mut state.value) {
                return false;
            }
            if !state.hooks.is_empty() {
                let told = (state.value.clone(), state.hooks.clone());
                state.untold.push_back(told);
            }
        }
        self.0.changed.notify(usize::MAX);
        self.0.tell();
        true
    }

    /// Publishes `value`.
    pub fn set(&self, value: T) {
        self.update(|v| {
            *v = value;
            true
        });
    }

    /// The value now.
    pub fn get(&self) -> T {
        self.0.lock().value.clone()
    }
}

impl<T: fmt::Debug> fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Publisher").field(&self.0.lock().value).finish()
    }
}

/// The side that looks at the value and waits for it. Cheap to clone.
///
/// ```
/// use std::time::{Duration, Instant};
/// use instance_core::watch::Publisher;
///
/// let publisher = Publisher::new(0);
/// let watch = publisher.watch();
/// let thread = std::thread::spawn(move || publisher.set(42));
/// let deadline = Instant::now() + Duration::from_secs(10);
/// assert_eq!(watch.wait(deadline, |n| *n == 42), Ok(42));
/// # thread.join().unwrap();
/// ```
pub struct Watch<T>(Arc<Shared<T>>);

impl<T> Clone for Watch<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Clone> Watch<T> {
    /// The value now.
    pub fn get(&self) -> T {
        self.0.lock().value.clone()
    }

    /// Blocks until `found` holds of the value, and returns that value.
    ///
    /// A value that came and went between two looks may be missed: ask for what stays.
    ///
    /// ```
    /// use std::time::Instant;
    /// use instance_core::watch::Publisher;
    ///
    /// let watch = Publisher::new(1).watch();
    /// assert_eq!(watch.wait(Instant::now(), |n| *n == 1), Ok(1));
    /// assert_eq!(watch.wait(Instant::now(), |n| *n == 2), Err(1), "the value at the deadline");
    /// ```
    ///
    /// # Errors
    ///
    /// The value at `deadline`, if `found` did not hold of it.
    pub fn wait(&self, deadline: Instant, mut found: impl FnMut(&T) -> bool) -> Result<T, T> {
        loop {
            let listener = self.0.changed.listen();
            let value = self.get();
            if found(&value) {
                return Ok(value);
            }
            if listener.wait_deadline(deadline).is_none() {
                let value = self.get();
                return if found(&value) { Ok(value) } else { Err(value) };
            }
        }
    }

    /// Waits, without blocking the thread, until `found` holds of the value, and returns it.
    ///
    /// ```
    /// use std::pin::pin;
    /// use std::task::{Context, Poll, Waker};
    /// use instance_core::watch::Publisher;
    ///
    /// let publisher = Publisher::new(1);
    /// let watch = publisher.watch();
    /// let mut two = pin!(watch.until(|n| *n == 2));
    /// let mut context = Context::from_waker(Waker::noop()); // a runtime gives its own
    /// assert_eq!(two.as_mut().poll(&mut context), Poll::Pending);
    /// publisher.set(2);
    /// assert_eq!(two.as_mut().poll(&mut context), Poll::Ready(2));
    /// ```
    pub async fn until(&self, mut found: impl FnMut(&T) -> bool) -> T {
        loop {
            let listener = self.0.changed.listen();
            let value = self.get();
            if found(&value) {
                return value;
            }
            listener.await;
        }
    }

    /// Calls `hook` with every value published from now on, in order, one after the other, in a thread
    /// that publishes one: it must be quick. It may look, subscribe and publish; what it publishes is told
    /// when it has returned. A panic in it ends that call of it and nothing else.
    pub fn subscribe(&self, hook: impl Fn(&T) + Send + Sync + 'static) {
        self.0.lock().hooks.push(Arc::new(hook));
    }
}

impl<T: fmt::Debug> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.0.lock().value).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_deadline_gives_back_the_value_that_did_not_do() {
        let publisher = Publisher::new(1);
        let soon = Instant::now() + Duration::from_millis(5);
        assert_eq!(publisher.watch().wait(soon, |n| *n == 2), Err(1));
    }

    #[test]
    fn an_update_that_changes_nothing_tells_nobody() {
        let publisher = Publisher::new(1);
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = told.clone();
        publisher.watch().subscribe(move |n| sink.lock().unwrap().push(*n));
        assert!(!publisher.update(|_| false));
        assert!(publisher.update(|n| {
            *n += 1;
            true
        }));
        assert_eq!(*told.lock().unwrap(), [2]);
    }

    #[test]
    fn a_hook_may_publish_and_panic_and_the_order_stays() {
        let publisher = Arc::new(Publisher::new(0));
        let told = Arc::new(Mutex::new(Vec::new()));
        let again = publisher.clone();
        publisher.watch().subscribe(move |n| {
            if *n == 1 {
                again.set(2);
                panic!("a hook's own affair");
            }
        });
        let sink = told.clone();
        publisher.watch().subscribe(move |n| sink.lock().unwrap().push(*n));
        publisher.set(1);
        publisher.set(3);
        assert_eq!(*told.lock().unwrap(), [1, 2, 3]);
    }

    #[test]
    fn hooks_hear_every_value_in_the_order_in_which_it_was_published() {
        let publisher = Publisher::new(0);
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = told.clone();
        publisher.watch().subscribe(move |n| sink.lock().unwrap().push(*n));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        publisher.update(|n| {
                            *n += 1;
                            true
                        });
                    }
                });
            }
        });
        assert_eq!(*told.lock().unwrap(), (1..=2000).collect::<Vec<_>>());
    }
}
