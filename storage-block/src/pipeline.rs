//! Work done on all processors, whose results come in order.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, Sender};

use crate::Result;
use crate::store::lock;

/// More threads than this find nothing to do: whoever takes the results has but one.
const THREADS: usize = 8;
/// Items under way for each thread: one it works on, one that waits to be taken, one to be given out.
const UNDER_WAY: usize = 3;

/// Does `work` for every item on as many threads as there are processors, and gives each result to `each`,
/// which runs on this one, in the order of the items. The buffer is the item's own until `each` has seen it;
/// what is in it at first is left over from another.
///
/// The memory this takes does not depend on how many items there are. It ends with the error of the earliest
/// item that fails; items that come after it may have been worked on by then.
pub(crate) fn in_order<T: Send, R: Send>(
    items: impl Iterator<Item = Result<T>> + Send,
    work: impl Fn(T, &mut Vec<u8>) -> Result<R> + Sync,
    each: impl FnMut(R, &[u8]) -> Result<()>,
) -> Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    // With one processor threads would only get into each other's way.
    in_order_on(if processors == 1 { 0 } else { processors.min(THREADS) }, items, work, each)
}

fn in_order_on<T: Send, R: Send>(
    threads: usize,
    items: impl Iterator<Item = Result<T>> + Send,
    work: impl Fn(T, &mut Vec<u8>) -> Result<R> + Sync,
    mut each: impl FnMut(R, &[u8]) -> Result<()>,
) -> Result<()> {
    let (give_back, buffers) = mpsc::channel();
    for _ in 0..threads * UNDER_WAY {
        let _ = give_back.send(Vec::new());
    }
    let source = Mutex::new(Source { items, next: 0, buffers });
    std::thread::scope(|scope| {
        let (done, results) = mpsc::channel();
        for _ in 0..threads {
            let (done, source, work) = (done.clone(), &source, &work);
            let thread = std::thread::Builder::new().name("storage-work".to_owned());
            // With fewer threads it is slower and no less right.
            let _ = thread.spawn_scoped(scope, move || work_through(source, work, &done));
        }
        drop(done);
        take_in_order(&results, give_back, &mut each)
    })?;
    // Nothing, unless there were no threads.
    let mut items = source.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).items;
    let mut buf = Vec::new();
    items.try_for_each(|item| each(work(item?, &mut buf)?, &buf))
}

/// What the threads take from, one after the other.
struct Source<I> {
    items: I,
    next: usize,
    buffers: Receiver<Vec<u8>>,
}

/// Told of every item that was taken, also if working on it panics.
struct Taken<'d, R> {
    number: usize,
    result: Option<(Result<R>, Vec<u8>)>,
    done: &'d Sender<Done<R>>,
}

/// An item's number and what became of it; nothing, if working on it panicked.
type Done<R> = (usize, Option<(Result<R>, Vec<u8>)>);

impl<R> Drop for Taken<'_, R> {
    fn drop(&mut self) {
        // Nobody listens when an earlier item has failed.
        let _ = self.done.send((self.number, self.result.take()));
    }
}

fn work_through<T, R>(
    source: &Mutex<Source<impl Iterator<Item = Result<T>>>>,
    work: impl Fn(T, &mut Vec<u8>) -> Result<R>,
    done: &Sender<Done<R>>,
) {
    loop {
        let (mut taken, item, mut buf) = {
            let mut source = lock(source);
            // The buffer first, so that the earliest item is never without one. No more of them come when
            // the results are not taken any more.
            let Ok(buf) = source.buffers.recv() else { return };
            let Some(item) = source.items.next() else { return };
            source.next += 1;
            (Taken { number: source.next - 1, result: None, done }, item, buf)
        };
        let result = item.and_then(|item| work(item, &mut buf));
        taken.result = Some((result, buf));
    }
}

/// Ends when all threads have, or with the first error.
fn take_in_order<R>(
    results: &Receiver<Done<R>>,
    give_back: Sender<Vec<u8>>,
    each: &mut impl FnMut(R, &[u8]) -> Result<()>,
) -> Result<()> {
    let (mut early, mut next) = (BTreeMap::new(), 0);
    for (number, result) in results {
        early.insert(number, result);
        while let Some(result) = early.remove(&next) {
            // The panic goes on where the threads are waited for.
            let Some((result, buf)) = result else { return Ok(()) };
            each(result?, &buf)?;
            next += 1;
            let _ = give_back.send(buf);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::{Error, ErrorKind};

    fn failure(n: usize) -> Error {
        Error::new(ErrorKind::Io, n.to_string())
    }

    #[test]
    fn results_come_in_order_with_their_buffers() {
        for (threads, items) in [(0, 100), (1, 100), (2, 0), (2, 1), (3, 1000)] {
            let work = |n: usize, buf: &mut Vec<u8>| {
                // The earlier of two takes longer.
                let spins = if n % 2 == 0 { 10_000 } else { 1 };
                for spin in 0..spins {
                    std::hint::black_box(spin);
                }
                buf.clear();
                buf.extend_from_slice(&n.to_le_bytes());
                Ok(n)
            };
            let mut seen = Vec::new();
            let each = |n: usize, buf: &[u8]| {
                assert_eq!(buf, n.to_le_bytes());
                seen.push(n);
                Ok(())
            };
            in_order_on(threads, (0..items).map(Ok), work, each).unwrap();
            assert_eq!(seen, (0..items).collect::<Vec<_>>(), "{threads} threads");
        }
    }

    #[test]
    fn threads_work_at_the_same_time() {
        let barrier = Barrier::new(2);
        let work = |_, _: &mut Vec<u8>| {
            barrier.wait();
            Ok(())
        };
        in_order_on(2, (0..10).map(Ok), work, |(), _| Ok(())).unwrap();
    }

    #[test]
    fn the_earliest_error_ends_it_wherever_it_is_from() {
        for threads in [0, 1, 3] {
            for from in ["item", "work", "each"] {
                let here = |place, n: usize| if place == from && n >= 20 { Err(failure(n)) } else { Ok(n) };
                let mut seen = 0;
                let each = |n, _: &[u8]| {
                    here("each", n)?;
                    seen += 1;
                    Ok(())
                };
                let work = |n, _: &mut Vec<u8>| here("work", n);
                let error = in_order_on(threads, (0..1000).map(|n| here("item", n)), work, each).unwrap_err();
                assert_eq!((error.to_string().as_str(), seen), ("20", 20), "{threads} threads, {from}");
            }
        }
    }

    #[test]
    fn no_more_is_begun_than_can_be_under_way() {
        let begun = AtomicUsize::new(0);
        let work = |n: usize, _: &mut Vec<u8>| {
            begun.fetch_add(1, Ordering::SeqCst);
            Ok(n)
        };
        let each = |n: usize, _: &[u8]| {
            assert!(begun.load(Ordering::SeqCst) <= n + 2 * UNDER_WAY);
            Ok(())
        };
        in_order_on(2, (0..1000).map(Ok), work, each).unwrap();
    }

    #[test]
    fn a_panic_in_a_thread_is_no_hang() {
        let work = |n: usize, _: &mut Vec<u8>| if n == 5 { panic!("on purpose") } else { Ok(n) };
        let run = || in_order_on(2, (0..1000).map(Ok), work, |_, _| Ok(()));
        assert!(std::panic::catch_unwind(run).is_err());
    }
}
