//! Where a region keeps what it knows: a small contract, so that it can be kept elsewhere than in the
//! region's own file.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Result;

/// One entry that is put or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The table that the entry is in. A table is there when it has an entry.
    pub table: &'static str,
    /// What the entry is found by.
    pub key: String,
    /// What the entry holds from now on, or nothing if it goes.
    pub value: Option<Vec<u8>>,
}

/// When changes are to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// When the call returns.
    Immediate,
    /// With the next changes that are to be durable immediately. Until then a crash may take them back.
    Eventual,
}

/// Keeps entries by table and key.
///
/// ```
/// use instance_core::state_store::{Change, Durability, MemoryStateStore, StateStore};
///
/// let store = MemoryStateStore::new();
/// let put = Change { table: "fruits", key: "fig".to_owned(), value: Some(b"1".to_vec()) };
/// store.apply(&[put], Durability::Immediate)?;
/// assert_eq!(store.get("fruits", "fig")?.as_deref(), Some(&b"1"[..]));
/// assert_eq!(store.scan("fruits")?.len(), 1);
/// # Ok::<(), instance_core::Error>(())
/// ```
///
/// # Contract
///
/// - What [`apply`](Self::apply) was given is there all of it or nothing of it, at every moment, for every
///   reader and after a crash. In one call later changes win over earlier ones.
/// - When it returned `Ok`, every later call on any thread sees the changes, and those that are to be
///   durable immediately survive a crash, with all that was applied before them.
/// - When it returned an error, the changes may be there after a crash or not. The store stays usable.
/// - The values come with their own digests: a store need not check them, and must not change them.
/// - Any thread may call at any time. The region sends what many threads commit in one call.
///
/// [`testing::state_store_conformance`](crate::testing::state_store_conformance) checks an implementation, and
/// [`durable_state_store_conformance`](crate::testing::durable_state_store_conformance) one that outlives its process.
pub trait StateStore: fmt::Debug + Send + Sync + 'static {
    /// What the entry holds, if there is one.
    ///
    /// # Errors
    ///
    /// What the store met.
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>>;

    /// Every entry of a table, in the order of their keys' bytes.
    ///
    /// # Errors
    ///
    /// What the store met.
    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>>;

    /// Makes the changes, all or none.
    ///
    /// # Errors
    ///
    /// What the store met.
    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()>;
}

/// A store that somebody else has, too.
impl<S: StateStore + ?Sized> StateStore for Arc<S> {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        (**self).get(table, key)
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        (**self).scan(table)
    }

    fn apply(&self, changes: &[Change], durability: Durability) -> Result<()> {
        (**self).apply(changes, durability)
    }
}

type Tables = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// Keeps entries in memory, for tests: they end with it.
#[derive(Debug, Default)]
pub struct MemoryStateStore(Mutex<Tables>);

impl MemoryStateStore {
    /// A store without entries.
    pub fn new() -> Self {
        Self::default()
    }

    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateStore for MemoryStateStore {
    fn get(&self, table: &str, key: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.lock().get(table).and_then(|entries| entries.get(key)).cloned())
    }

    fn scan(&self, table: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let entries = self.lock().get(table).cloned().unwrap_or_default();
        Ok(entries.into_iter().collect())
    }

    fn apply(&self, changes: &[Change], _: Durability) -> Result<()> {
        let mut tables = self.lock();
        for Change { table, key, value } in changes {
            let entries = tables.entry((*table).to_owned()).or_default();
            match value {
                Some(value) => drop(entries.insert(key.clone(), value.clone())),
                None => drop(entries.remove(key)),
            }
        }
        Ok(())
    }
}
