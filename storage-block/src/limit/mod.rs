//! How much of a disk's speed, or a network's, somebody may use.

mod bucket;
mod stop;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bucket::Bucket;

pub(crate) use self::stop::Stop;
use crate::store::lock;
use crate::{Error, ErrorKind};

/// So much in a second, and what may be used at once by whoever has used less before.
///
/// ```
/// use storage_block::Rate;
///
/// let baseline = Rate::per_second(3000);
/// assert_eq!((baseline.per_second, baseline.burst), (3000, 3000));
/// let rate = Rate { burst: 1_000_000, ..baseline };
/// assert!(rate.burst > rate.per_second);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How much in a second. Nothing stands still: zero counts as one.
    pub per_second: u64,
    /// How much is saved up while it is not used. Zero counts as one.
    pub burst: u64,
}

impl Rate {
    /// So much in a second, of which one second's worth is saved up.
    pub const fn per_second(amount: u64) -> Self {
        Self { per_second: amount, burst: amount }
    }

    fn at_least_one(self) -> Self {
        Self { per_second: self.per_second.max(1), burst: self.burst.max(1) }
    }
}

/// What a [`Limiter`] lets pass.
///
/// Every request is an operation; the bytes are those that are read and written. Flushes count no bytes, nor do zeroing
/// and discards where they cost no more for many: where the disk's [`Capabilities`](crate::Capabilities) say that zeroes are
/// [not cheap](crate::Capabilities::cheap_zeroes) they are written, and count as that, and so do discards if they
/// [free nothing](crate::Capabilities::discard_frees) either.
///
/// ```
/// use storage_block::{IoLimits, Rate};
///
/// // An EBS volume of type gp3.
/// let gp3 = IoLimits { ops: Some(Rate::per_second(3000)), bytes: Some(Rate::per_second(125 << 20)) };
/// assert_ne!(gp3, IoLimits::NONE);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoLimits {
    /// Requests.
    pub ops: Option<Rate>,
    /// Bytes read and written.
    pub bytes: Option<Rate>,
}

impl IoLimits {
    /// Everything passes.
    pub const NONE: Self = Self { ops: None, bytes: None };
}

/// Makes requests wait so that no more of them pass than its limits say.
///
/// [`Disk::limited`](crate::Disk::limited) puts it in front of a disk; several disks may share one, and a
/// disk may have several. Blocking calls wait in turn; a [`Queue`](crate::Queue) sets requests aside and its submitter
/// goes on. Limits may be changed at any time, which those who wait notice: blocking calls at once, queues
/// within a tenth of a second.
///
/// A request passes as soon as less than the whole burst is used up, and what it takes beyond that the next ones wait
/// for: in any span of time there pass no more than the burst, the rate's share, and one request.
///
/// Cheap to clone; all clones are the same limiter.
///
/// ```
/// use std::time::Instant;
/// use storage_block::{IoLimits, Limiter, MemoryDisk, Rate};
///
/// let limits = IoLimits { bytes: Some(Rate { per_second: 1 << 20, burst: 4096 }), ..IoLimits::NONE };
/// let disk = MemoryDisk::new(1 << 20)?.into_disk().limited(&Limiter::new(limits));
/// let start = Instant::now();
/// for block in 0..16 {
///     disk.write_at(&[1; 4096], block * 4096)?;
/// }
/// assert!(start.elapsed().as_millis() >= 50, "fifteen blocks at 1 MiB in a second");
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Limiter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    start: Instant,
    state: Mutex<State>,
    /// For the one blocking call that is next.
    changed: Condvar,
    /// For those that come after it.
    next: Condvar,
}

#[derive(Debug)]
struct State {
    limits: IoLimits,
    ops: Option<Bucket>,
    bytes: Option<Bucket>,
    /// A blocking call is next, and others wait until it has passed.
    taken: bool,
}

/// What a request takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) ops: u64,
    pub(crate) bytes: u64,
}

impl Limiter {
    /// One with these limits and its bursts saved up.
    pub fn new(limits: IoLimits) -> Self {
        let new = |rate: Rate| Bucket::new(rate.at_least_one(), Duration::ZERO);
        let state = State { limits, ops: limits.ops.map(new), bytes: limits.bytes.map(new), taken: false };
        Self(Arc::new(Inner {
            start: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            next: Condvar::new(),
        }))
    }

    /// The limits.
    pub fn limits(&self) -> IoLimits {
        lock(&self.0.state).limits
    }

    /// Sets other limits. What was saved up or used beforehand stays so.
    pub fn set(&self, limits: IoLimits) {
        let now = self.now();
        let set = |bucket: &mut Option<Bucket>, rate: Option<Rate>| match (&mut *bucket, rate) {
            (Some(bucket), Some(rate)) => bucket.set(rate.at_least_one(), now),
            (_, rate) => *bucket = rate.map(|rate| Bucket::new(rate.at_least_one(), now)),
        };
        let mut state = lock(&self.0.state);
        state.limits = limits;
        set(&mut state.ops, limits.ops);
        set(&mut state.bytes, limits.bytes);
        drop(state);
        self.0.changed.notify_all();
    }

    /// How long what is no disk's request has to wait at least before it may pass, an operation with bytes; none if it
    /// may now. Whoever lets it pass [charges](Self::charge) it: by that, something that is not known before it is
    /// there, such as a frame of a network, is held to limits like a request.
    ///
    /// ```
    /// use storage_block::{IoLimits, Limiter, Rate};
    ///
    /// let limiter = Limiter::new(IoLimits { ops: Some(Rate { per_second: 1, burst: 2 }), ..IoLimits::NONE });
    /// assert_eq!(limiter.delay(), None);
    /// limiter.charge(2, 3000);
    /// assert!(limiter.delay().is_some_and(|delay| delay.as_millis() > 500));
    /// ```
    pub fn delay(&self) -> Option<Duration> {
        lock(&self.0.state).delay(self.now(), Cost { ops: 1, bytes: 1 })
    }

    /// Takes what something costs that passes. See [`delay`](Self::delay).
    pub fn charge(&self, ops: u64, bytes: u64) {
        lock(&self.0.state).charge(self.now(), Cost { ops, bytes });
    }

    /// Lets a request pass, or says how long to wait at least.
    pub(crate) fn try_take(&self, cost: Cost) -> Result<(), Duration> {
        lock(&self.0.state).try_take(self.now(), cost)
    }

    /// Gives back what a request took that is not made after all. Who waits notices as if the limits had changed.
    pub(crate) fn give_back(&self, cost: Cost) {
        for (bucket, cost) in lock(&self.0.state).parts(cost) {
            if let Some(bucket) = bucket {
                bucket.give_back(cost);
            }
        }
        self.0.changed.notify_all();
    }

    /// Returns when a request may pass, or when it is to end and would have to wait.
    pub(crate) fn wait(&self, cost: Cost, stop: Option<&Stop>) -> Result<(), Error> {
        let mut state = lock(&self.0.state);
        if !state.taken && state.try_take(self.now(), cost).is_ok() {
            return Ok(());
        }
        drop(state);
        let _waiting = stop.map(|stop| stop.wait_at(self));
        let ended = || stop.is_some_and(Stop::is_set);
        state = lock(&self.0.state);
        while state.taken && !ended() {
            state = self.0.next.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut passed = Err(Error::new(ErrorKind::Cancelled, "it ended before its limits let it pass"));
        if !state.taken {
            state.taken = true;
            while !ended() {
                let Err(delay) = state.try_take(self.now(), cost) else {
                    passed = Ok(());
                    break;
                };
                let waited = self.0.changed.wait_timeout(state, delay);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            state.taken = false;
        }
        // Also by who does not wait any more, who may have been told instead of another.
        self.0.next.notify_one();
        passed
    }

    /// Has all who wait look again.
    fn wake(&self) {
        // Who has looked before it waits by now.
        drop(lock(&self.0.state));
        self.0.changed.notify_all();
        self.0.next.notify_all();
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn now(&self) -> Duration {
        self.0.start.elapsed()
    }
}

impl State {
    fn try_take(&mut self, now: Duration, cost: Cost) -> Result<(), Duration> {
        if let Some(delay) = self.delay(now, cost) {
            return Err(delay);
        }
        self.take(cost);
        Ok(())
    }

    /// Takes what something costs that passes now: of what was saved up until now, which is no more than a burst.
    fn charge(&mut self, now: Duration, cost: Cost) {
        let _ = self.delay(now, cost);
        self.take(cost);
    }

    /// How long until a request may pass, if it may not now.
    fn delay(&mut self, now: Duration, cost: Cost) -> Option<Duration> {
        // Who asks for nothing of a kind does not wait for it.
        let asked = self.parts(cost).into_iter().filter(|(_, cost)| *cost > 0);
        asked.filter_map(|(bucket, _)| bucket.as_mut()?.ready(now).err()).max()
    }

    fn take(&mut self, cost: Cost) {
        for (bucket, cost) in self.parts(cost) {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
    }

    fn parts(&mut self, cost: Cost) -> [(&mut Option<Bucket>, u64); 2] {
        [(&mut self.ops, cost.ops), (&mut self.bytes, cost.bytes)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OP: Cost = Cost { ops: 1, bytes: 4096 };

    fn limits(ops: Rate) -> IoLimits {
        IoLimits { ops: Some(ops), ..IoLimits::NONE }
    }

    #[test]
    fn both_kinds_count() {
        let limiter = Limiter::new(IoLimits {
            ops: Some(Rate { per_second: 1, burst: 3 }),
            bytes: Some(Rate { per_second: 1, burst: 8192 }),
        });
        assert_eq!([limiter.try_take(OP), limiter.try_take(OP)], [Ok(()), Ok(())]);
        let wait = limiter.try_take(OP).unwrap_err();
        assert!(wait <= Duration::from_secs(1), "until one byte is there: {wait:?}");
        let flush = Cost { ops: 1, bytes: 0 };
        limiter.try_take(flush).expect("the third operation has no bytes");
        limiter.try_take(flush).expect_err("there were three");
    }

    #[test]
    fn what_is_charged_is_waited_for_by_all() {
        let limiter =
            Limiter::new(IoLimits { bytes: Some(Rate { per_second: 1, burst: 100 }), ..IoLimits::NONE });
        limiter.charge(1, 99);
        assert_eq!(limiter.delay(), None, "a whole byte is left, whatever the next one costs");
        limiter.charge(1, 1500);
        let delay = limiter.delay().expect("it has taken more than there was");
        assert!(delay > Duration::from_secs(1490) && delay <= Duration::from_secs(1500), "{delay:?}");
        limiter.try_take(OP).expect_err("requests wait for it as well");
        limiter.set(IoLimits::NONE);
        assert_eq!(limiter.delay(), None);
    }

    #[test]
    fn what_is_charged_late_is_charged_to_one_burst() {
        let at = Duration::from_secs;
        let new = |rate| Some(Bucket::new(rate, at(0)));
        let mut state = State {
            limits: IoLimits::NONE,
            ops: new(Rate { per_second: 1, burst: 10 }),
            bytes: new(Rate { per_second: 1000, burst: 1000 }),
            taken: false,
        };
        state.charge(at(100), Cost { ops: 1, bytes: 5000 });
        assert_eq!(state.delay(at(100), OP), Some(Duration::from_millis(4001)));
    }

    const LONG: Cost = Cost { ops: 10_000, bytes: 0 };

    /// A waiting call notices that the limits are gone.
    #[test]
    fn a_change_wakes_who_waits() {
        let limiter = Limiter::new(limits(Rate { per_second: 1, burst: 1 }));
        limiter.wait(LONG, None).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.wait(OP, None));
            limiter.set(limits(Rate { per_second: 1, burst: 2 }));
            assert!(!waiting.is_finished(), "it has hours to wait");
            limiter.set(IoLimits::NONE);
        });
        assert_eq!(limiter.limits(), IoLimits::NONE);
    }

    /// Whoever is to end waits no longer, the one that is next as well as those behind it, and the others go on waiting.
    #[test]
    fn a_stop_ends_who_waits() {
        for [first, second] in [[true, false], [false, true], [true, true]] {
            let limiter = Limiter::new(limits(Rate { per_second: 1, burst: 1 }));
            limiter.wait(LONG, None).unwrap();
            let stop = Stop::default();
            let wait = |stops: bool| limiter.wait(OP, stops.then_some(&stop)).map_err(|e| e.kind());
            let waiting = || lock(&stop.waited_for).len();
            std::thread::scope(|scope| {
                let begin = |stops, begun: &dyn Fn() -> bool| {
                    let wait = &wait;
                    let thread = scope.spawn(move || wait(stops));
                    while !begun() {
                        std::thread::yield_now();
                    }
                    (stops, thread)
                };
                let next = begin(first, &|| lock(&limiter.0.state).taken);
                let behind = begin(second, &|| waiting() == usize::from(first) + usize::from(second));
                stop.set();
                let (end, go_on): (Vec<_>, Vec<_>) =
                    [next, behind].into_iter().partition(|(stops, _)| *stops);
                let ended = Err(ErrorKind::Cancelled);
                end.into_iter().for_each(|(_, thread)| assert_eq!(thread.join().unwrap(), ended));
                assert_eq!(wait(true), ended, "none waits from here on");
                assert!(go_on.iter().all(|(_, thread)| !thread.is_finished()));
                limiter.set(IoLimits::NONE);
                go_on.into_iter().for_each(|(_, thread)| assert_eq!(thread.join().unwrap(), Ok(())));
            });
            assert_eq!((waiting(), lock(&limiter.0.state).taken), (0, false));
            assert_eq!(wait(true), Ok(()), "which has not to wait");
        }
    }

    /// What a request took of one limit before it was ended at another is there for the next.
    #[test]
    fn who_is_ended_at_one_limit_gives_back_what_others_let_pass() {
        // What a request takes comes again in more than a day.
        let limiter = |burst| {
            let rate = Rate { per_second: 1, burst };
            Limiter::new(IoLimits { bytes: Some(rate), ..IoLimits::NONE })
        };
        let (plenty, little) = (limiter(200_000), limiter(1));
        let stop = Arc::new(Stop::default());
        stop.set();
        let disk = crate::MemoryDisk::new(1 << 20).unwrap().into_disk();
        let read = |limiters: &[&Limiter]| {
            let limited = limiters.iter().fold(disk.clone(), |disk, limiter| disk.limited(limiter));
            limited.until(&stop).read_at(&mut [0; 100_000], 0).map_err(|e| e.kind())
        };
        assert_eq!(read(&[&little]), Ok(()), "it takes more than there is once");
        for _ in 0..3 {
            assert_eq!(read(&[&plenty, &little]), Err(ErrorKind::Cancelled));
        }
        assert_eq!([read(&[&plenty]), read(&[&plenty])], [Ok(()), Ok(())]);
    }
}
