//! Memory of long frames, used again.
//!
//! A frame is made in the thread of the machine that sends it and ends in that of the one that receives it. Given back to
//! the allocator in between, memory of this size often goes back to the system and has to be cleared, page by page, when it
//! comes again, which takes as long as another copy.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Frames that are shorter are left to the allocator.
const SHORTEST: usize = 16 << 10;
/// How many are kept: as many bytes as wait in a cable.
const KEPT: usize = 64;

/// The memory that no frame uses, of the network devices of all machines of one [`Kvm`](crate::Kvm).
#[derive(Debug, Default)]
pub(crate) struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    /// Room for a frame, which takes no more than twice what it needs.
    pub(super) fn take(&self, len: usize) -> Vec<u8> {
        if len < SHORTEST {
            return Vec::with_capacity(len);
        }
        let mut kept = self.lock();
        match kept.iter().rposition(|spare| (len..=2 * len).contains(&spare.capacity())) {
            Some(fitting) => kept.swap_remove(fitting),
            None => Vec::with_capacity(len.next_multiple_of(SHORTEST)),
        }
    }

    /// Takes the memory of a frame that has been delivered.
    pub(super) fn give(&self, mut data: Vec<u8>) {
        if data.capacity() < SHORTEST {
            return;
        }
        data.clear();
        let mut kept = self.lock();
        if kept.len() < KEPT {
            kept.push(data);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
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
    fn no_more_is_kept_than_is_of_use() {
        let spares = Spares::default();
        spares.give(vec![1; 100]);
        assert_eq!(spares.lock().len(), 0);
        (0..2 * KEPT).for_each(|_| spares.give(vec![1; SHORTEST]));
        assert_eq!(spares.lock().len(), KEPT);
        assert!(spares.lock().iter().all(Vec::is_empty));
    }
}
