//! The conformance suite of [`StateStore`].

use std::collections::BTreeMap;
use std::sync::Barrier;

use crate::state_store::{Change, Durability, StateStore};

/// Checks that the stores that `empty` makes keep the contract of [`StateStore`], as far as one process
/// can tell: what a crash leaves is for its implementation to test.
///
/// `empty` gives a new store without entries whenever it is called.
///
/// ```
/// use instance_core::{state_store::MemoryStateStore, testing::state_store_conformance};
///
/// state_store_conformance(MemoryStateStore::new);
/// ```
///
/// # Panics
///
/// Where the contract is broken, with what was expected.
pub fn state_store_conformance<S: StateStore>(mut empty: impl FnMut() -> S) {
    an_entry_comes_back_as_it_was_put(&empty());
    later_changes_win_over_earlier_ones(&empty());
    tables_are_kept_apart(&empty());
    a_scan_is_in_the_order_of_the_keys(&empty());
    any_sequence_of_changes_leaves_what_it_should(&empty());
    a_reader_sees_all_of_a_call_or_nothing(&empty());
    nothing_is_lost_between_threads(&empty());
}

/// Checks that a store that outlives its process has, each time `open` gives it anew after it was closed, what was applied
/// before. It begins without entries.
///
/// ```
/// use std::sync::Arc;
/// use instance_core::{state_store::MemoryStateStore, testing::durable_state_store_conformance};
///
/// // In memory it lives as long as somebody has it.
/// let store = Arc::new(MemoryStateStore::new());
/// durable_state_store_conformance(|| store.clone());
/// ```
///
/// # Panics
///
/// Where it has lost something, or has something that was not applied.
pub fn durable_state_store_conformance<S: StateStore>(mut open: impl FnMut() -> S) {
    let mut expected = BTreeMap::new();
    let mut random = Random(2);
    for life in 0..40 {
        let store = open();
        let what = format!("opened for the time {life} after it was closed");
        assert_eq!(must(store.scan("t")), expected.clone().into_iter().collect::<Vec<_>>(), "{what}");
        for step in 0..random.below(4) {
            change(&store, &mut expected, &mut random, (life * 4 + step) as u32, step % 2 == 0);
        }
    }
}

const BOTH: [Durability; 2] = [Durability::Immediate, Durability::Eventual];

fn put(table: &'static str, key: &str, value: &[u8]) -> Change {
    Change { table, key: key.to_owned(), value: Some(value.to_vec()) }
}

fn remove(table: &'static str, key: &str) -> Change {
    Change { table, key: key.to_owned(), value: None }
}

#[track_caller]
fn must<T>(result: crate::Result<T>) -> T {
    result.unwrap_or_else(|e| panic!("{}", crate::error::chain(&e)))
}

fn an_entry_comes_back_as_it_was_put(store: &impl StateStore) {
    assert_eq!(must(store.get("t", "k")), None, "a table that is not there has no entry");
    assert_eq!(must(store.scan("t")), [], "a table that is not there is empty");
    must(store.apply(&[remove("t", "k")], Durability::Immediate));
    let large = vec![0xa5; 1 << 20];
    for durability in BOTH {
        for value in [&b""[..], b"v", b"\0\xff", &large] {
            must(store.apply(&[put("t", "k", value)], durability));
            assert_eq!(must(store.get("t", "k")).as_deref(), Some(value));
        }
        must(store.apply(&[remove("t", "k")], durability));
        assert_eq!(must(store.get("t", "k")), None);
    }
    must(store.apply(&[], Durability::Immediate));
}

fn later_changes_win_over_earlier_ones(store: &impl StateStore) {
    let changes = [put("t", "a", b"1"), put("t", "a", b"2"), put("t", "b", b"1"), remove("t", "b")];
    must(store.apply(&changes, Durability::Immediate));
    assert_eq!(must(store.scan("t")), [("a".to_owned(), b"2".to_vec())]);
    must(store.apply(&[remove("t", "a"), put("t", "a", b"3")], Durability::Immediate));
    assert_eq!(must(store.get("t", "a")).as_deref(), Some(&b"3"[..]));
}

fn tables_are_kept_apart(store: &impl StateStore) {
    must(store.apply(&[put("one", "k", b"1"), put("two", "k", b"2")], Durability::Immediate));
    must(store.apply(&[remove("one", "k")], Durability::Immediate));
    assert_eq!(must(store.get("one", "k")), None);
    assert_eq!(must(store.get("two", "k")).as_deref(), Some(&b"2"[..]));
}

fn a_scan_is_in_the_order_of_the_keys(store: &impl StateStore) {
    let keys = ["", "B", "a", "a-", "a1", "ab", "b", "\u{e4}"];
    for key in keys.iter().rev() {
        must(store.apply(&[put("t", key, b"")], Durability::Eventual));
    }
    let found: Vec<String> = must(store.scan("t")).into_iter().map(|(key, _)| key).collect();
    assert_eq!(found, keys);
}

/// Numbers that depend on a seed alone (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// Makes a few changes to the store, and to what is expected of it.
fn change(
    store: &impl StateStore,
    expected: &mut BTreeMap<String, Vec<u8>>,
    random: &mut Random,
    step: u32,
    immediately: bool,
) {
    let mut changes = Vec::new();
    for _ in 0..random.below(4) {
        let key = random.below(8).to_string();
        if random.below(3) == 0 {
            expected.remove(&key);
            changes.push(remove("t", &key));
        } else {
            let value = step.to_le_bytes().to_vec();
            expected.insert(key.clone(), value.clone());
            changes.push(put("t", &key, &value));
        }
    }
    must(store.apply(&changes, BOTH[usize::from(!immediately)]));
}

/// Against a map.
fn any_sequence_of_changes_leaves_what_it_should(store: &impl StateStore) {
    let (mut expected, mut random) = (BTreeMap::new(), Random(1));
    for step in 0..200_u32 {
        change(store, &mut expected, &mut random, step, step % 16 == 0);
        assert_eq!(must(store.scan("t")), expected.clone().into_iter().collect::<Vec<_>>(), "step {step}");
    }
}

fn a_reader_sees_all_of_a_call_or_nothing(store: &impl StateStore) {
    const KEYS: [&str; 3] = ["a", "b", "c"];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for n in 0..100_u32 {
                let changes = KEYS.map(|key| put("t", key, &n.to_le_bytes()));
                must(store.apply(&changes, Durability::Eventual));
            }
        });
        while !writer.is_finished() {
            let found = must(store.scan("t"));
            assert!(found.windows(2).all(|two| two[0].1 == two[1].1), "half of a call: {found:?}");
            assert!([0, KEYS.len()].contains(&found.len()), "half of a call: {found:?}");
        }
    });
}

fn nothing_is_lost_between_threads(store: &impl StateStore) {
    const THREADS: usize = 4;
    const EACH: usize = 25;
    let start = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                for n in 0..EACH {
                    must(store.apply(&[put("t", &format!("{thread}-{n}"), b"")], Durability::Immediate));
                }
            });
        }
    });
    assert_eq!(must(store.scan("t")).len(), THREADS * EACH);
}

#[cfg(test)]
mod tests {
    use super::durable_state_store_conformance;
    use crate::state_store::MemoryStateStore;

    #[test]
    #[should_panic(expected = "after it was closed")]
    fn a_store_that_keeps_nothing_is_found_out() {
        durable_state_store_conformance(MemoryStateStore::new);
    }
}
