//! Records that are read again and again: an image is at each of its launches, and takes longer to parse than to read.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Record, Store, parse};
use crate::Result;

/// How many are kept.
const MAX: usize = 64;

/// Records with the bytes that they were parsed of: what has the same bytes is the same record.
#[derive(Debug)]
pub(crate) struct Known<R>(Mutex<HashMap<String, (Vec<u8>, R)>>);

impl<R> Default for Known<R> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<R> Known<R> {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Vec<u8>, R)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// The record with this key, parsed if it is not known.
    pub(crate) fn get_known<R: Record + Clone>(&self, key: &str, known: &Known<R>) -> Result<Option<R>> {
        let Some(read) = self.0.state().get(R::TABLE, key)? else { return Ok(None) };
        if let Some((_, record)) = known.lock().get(key).filter(|(bytes, _)| *bytes == read) {
            return Ok(Some(record.clone()));
        }
        let record: R = parse(R::TABLE, key, &read)?;
        let mut known = known.lock();
        if known.len() >= MAX {
            known.clear();
        }
        known.insert(key.to_owned(), (read, record.clone()));
        Ok(Some(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::state_store::{Change, Durability, MemoryStateStore, StateStore};
    use serde::{Deserialize, Serialize};
    use std::sync::Arc;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Fruit(String, u32);

    impl Record for Fruit {
        const TABLE: &'static str = "fruits";

        fn key(&self) -> String {
            self.0.clone()
        }
    }

    #[test]
    fn what_is_known_is_what_is_stored() {
        let (state, known) = (Arc::<MemoryStateStore>::default(), Known::default());
        let store = Store::new(Box::new(state.clone())).unwrap();
        let get = |key: &str| store.get_known::<Fruit>(key, &known);
        assert_eq!(get("fig").unwrap(), None);
        for count in [1, 2] {
            let fig = Fruit("fig".to_owned(), count);
            store.commit(|c| c.put(&fig)).unwrap();
            assert_eq!((get("fig").unwrap(), get("fig").unwrap()), (Some(fig.clone()), Some(fig)));
        }
        // What is not what was stored is not passed over for being known.
        let mut damaged = state.get("fruits", "fig").unwrap().unwrap();
        *damaged.last_mut().unwrap() ^= 1;
        let change = Change { table: "fruits", key: "fig".to_owned(), value: Some(damaged) };
        state.apply(&[change], Durability::Immediate).unwrap();
        assert_eq!(get("fig").unwrap_err().kind(), ErrorKind::Corrupt);
        let removed = store.commit(|c| {
            c.remove::<Fruit>("fig");
            Ok(())
        });
        removed.unwrap();
        assert_eq!(get("fig").unwrap(), None);
        for n in 0..2 * MAX {
            let fruit = Fruit(n.to_string(), 0);
            store.commit(|c| c.put(&fruit)).unwrap();
            assert_eq!(get(&n.to_string()).unwrap(), Some(fruit));
        }
        assert!(known.lock().len() <= MAX);
    }
}
