//! A value that can be waited for.
//!
//! One thread publishes, any number watch: by looking, by blocking with a deadline, or as a future
//! that needs no particular runtime.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use event_listener::{Event, Listener};

struct Shared<T> {
    value: Mutex<T>,
    changed: Event,
    hooks: Mutex<Vec<Hook<T>>>,
}

type Hook<T> = Box<dyn Fn(&T) + Send + Sync>;

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
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
        Self(Arc::new(Shared {
            value: Mutex::new(value),
            changed: Event::new(),
            hooks: Mutex::new(Vec::new()),
        }))
    }

    /// A watch on the value.
    pub fn watch(&self) -> Watch<T> {
        Watch(self.0.clone())
    }

    /// Changes the value with `change` and, if that says `true`, tells every watcher. Returns what
    /// `change` said. The value is locked meanwhile: `change` must not look at it by another way.
    pub fn update(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let now = {
            let mut value = self.0.lock();
            if !change(&mut value) {
                return false;
            }
            value.clone()
        };
        self.0.changed.notify(usize::MAX);
        for hook in self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            hook(&now);
        }
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
        self.0.lock().clone()
    }
}

impl<T: fmt::Debug> fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Publisher").field(&*self.0.lock()).finish()
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
        self.0.lock().clone()
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

    /// Calls `hook` with every value published from now on, in the thread that publishes it: it
    /// must be quick, and must not publish to or subscribe to the same value.
    pub fn subscribe(&self, hook: impl Fn(&T) + Send + Sync + 'static) {
        self.0.hooks.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
    }
}

impl<T: fmt::Debug> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&*self.0.lock()).finish()
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
}
