//! Decompressed chunks that were read lately, so that small reads in a row do not decompress the same one again.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::format::KEY_CHECK;
use crate::store::lock;

/// What somebody may have read: a place in a pack, and the check of the key that it was decrypted with, if it was. What a
/// place holds never changes while a process lives, so nothing here ever goes stale.
pub(crate) type Key = (u32, u32, Option<[u8; KEY_CHECK]>);

/// Objects by what they were read from, up to so many bytes. Which goes first: the oldest that was not read again since
/// it was last considered.
#[derive(Debug)]
pub(crate) struct Cache {
    max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Key, Entry>,
    queue: VecDeque<Key>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    bytes: Arc<[u8]>,
    used: AtomicBool,
}

impl Cache {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, state: Mutex::default() }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<[u8]>> {
        let state = lock(&self.state);
        let entry = state.entries.get(key)?;
        entry.used.store(true, Ordering::Relaxed);
        Some(Arc::clone(&entry.bytes))
    }

    pub(crate) fn insert(&self, key: Key, bytes: &Arc<[u8]>) {
        let mut state = lock(&self.state);
        if bytes.len() > self.max || state.entries.contains_key(&key) {
            return;
        }
        while state.bytes + bytes.len() > self.max {
            let Some(oldest) = state.queue.pop_front() else { break };
            let again =
                state.entries.get(&oldest).is_some_and(|entry| entry.used.swap(false, Ordering::Relaxed));
            if again {
                state.queue.push_back(oldest);
            } else if let Some(gone) = state.entries.remove(&oldest) {
                state.bytes -= gone.bytes.len();
            }
        }
        state.bytes += bytes.len();
        state.queue.push_back(key);
        state.entries.insert(key, Entry { bytes: Arc::clone(bytes), used: AtomicBool::new(false) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_what_is_read_again_and_never_more_than_it_may() {
        let cache = Cache::new(1000);
        let bytes = |byte| Arc::<[u8]>::from(vec![byte; 100]);
        for unit in 0..10 {
            cache.insert((1, unit, None), &bytes(unit as u8));
        }
        assert_eq!(cache.get(&(1, 0, None)).as_deref(), Some(&[0; 100][..]));
        for unit in 10..15 {
            cache.insert((1, unit, None), &bytes(unit as u8));
            assert!(lock(&cache.state).bytes <= 1000 && lock(&cache.state).queue.len() <= 10);
        }
        let held: Vec<u32> = (0..15).filter(|unit| cache.get(&(1, *unit, None)).is_some()).collect();
        assert_eq!(held, [0, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert!(cache.get(&(2, 9, None)).is_none() && cache.get(&(1, 9, Some([0; KEY_CHECK]))).is_none());
        cache.insert((1, 99, None), &Arc::from(vec![0; 1001]));
        assert!(cache.get(&(1, 99, None)).is_none(), "it would not fit");
    }
}
