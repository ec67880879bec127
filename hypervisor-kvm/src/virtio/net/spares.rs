//! Memory of long frames, used again.
//!
//! A frame is made in the thread of the machine that sends it and ends in that of the one that receives it. Given back to
//! the allocator in between, memory of this size often goes back to the system and has to be cleared, page by page, when it
//! comes again, which takes as long as another copy.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use instance_core::net::Frame;

/// What is shorter is left to the allocator, and of what is longer than a frame nothing is kept.
const SHORTEST: usize = 16 << 10;
const LONGEST: usize = Frame::MAX_LEN.next_multiple_of(SHORTEST);
/// How many are kept: about as many bytes as wait in a cable.
const KEPT: usize = 64;

/// What the network devices of all machines of one [`Kvm`](crate::Kvm) share, as long as there is a machine.
#[derive(Debug, Default)]
pub(crate) struct Shared(Mutex<Weak<Spares>>);

impl Shared {
    pub(crate) fn get(&self) -> Arc<Spares> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let made = Arc::default();
            *shared = Arc::downgrade(&made);
            made
        })
    }
}

/// The memory that no frame uses; what was given last comes last.
#[derive(Debug, Default)]
pub(crate) struct Spares(Mutex<VecDeque<Vec<u8>>>);

impl Spares {
    /// Room for a frame, which takes no more than twice what it needs: what waits in a cable may take that much more than
    /// the bytes that are counted there.
    pub(super) fn take(&self, len: usize) -> Vec<u8> {
        if len < SHORTEST {
            return Vec::with_capacity(len);
        }
        let mut kept = self.lock();
        let fitting = kept.iter().rposition(|spare| (len..=2 * len).contains(&spare.capacity()));
        let spare = fitting.and_then(|fitting| kept.remove(fitting));
        drop(kept);
        spare.unwrap_or_else(|| Vec::with_capacity(len.next_multiple_of(SHORTEST)))
    }

    /// Takes the memory of a frame that has been delivered, if need be in the place of other: frames are mostly as long
    /// as those before them.
    pub(super) fn give(&self, mut data: Vec<u8>) {
        if !(SHORTEST..=LONGEST).contains(&data.capacity()) {
            return;
        }
        data.clear();
        let mut kept = self.lock();
        let other = if kept.len() == KEPT { kept.pop_front() } else { None };
        kept.push_back(data);
        drop(kept);
        drop(other);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_taken_where_it_fits() {
        let spares = Spares::default();
        spares.give(spares.take(60_000));
        // Not for what needs less than half of it, or more.
        for (len, left) in [(20_000, 1), (70_000, 1), (100, 1), (40_000, 0), (60_000, 0)] {
            let data = spares.take(len);
            assert!(data.is_empty() && data.capacity() >= len);
            assert_eq!(spares.lock().len(), left, "{len}");
        }
    }

    #[test]
    fn what_is_shared_goes_with_the_last_who_has_it() {
        let shared = Shared::default();
        let one = shared.get();
        one.give(one.take(SHORTEST));
        assert_eq!(shared.get().lock().len(), 1);
        drop(one);
        assert_eq!(shared.get().lock().len(), 0);
    }

    #[test]
    fn no_more_is_kept_than_is_of_use() {
        let spares = Spares::default();
        [100, LONGEST + 1].into_iter().for_each(|len| spares.give(vec![1; len]));
        assert_eq!(spares.lock().len(), 0);
        (0..2 * KEPT).for_each(|_| spares.give(vec![1; SHORTEST]));
        assert_eq!(spares.lock().len(), KEPT);
        assert!(spares.lock().iter().all(Vec::is_empty));
        // What comes now is of more use than what nobody has asked for.
        (0..KEPT).for_each(|_| spares.give(vec![1; LONGEST]));
        assert!(spares.lock().iter().all(|spare| spare.capacity() == LONGEST));
    }
}
