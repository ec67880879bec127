//! What launches that are under way need, though no record says so yet.
//!
//! A launch writes its records once, when its machines run: whatever looks for what is still needed has to look here too,
//! before it looks for those records, and after it has looked for what launches begin with.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ami_core::{AmiId, Digest, ReservationId};

use crate::boot_cache::BootPlan;

/// What a launch needs.
#[derive(Debug, Clone)]
pub(crate) struct Needs {
    pub(crate) image: AmiId,
    pub(crate) contents: Vec<Digest>,
    pub(crate) direct_boot: Option<BootPlan>,
}

#[derive(Debug, Default)]
pub(crate) struct InFlight(Mutex<HashMap<ReservationId, Needs>>);

/// A launch that is under way, until this is dropped.
pub(crate) struct Flight<'a>(&'a InFlight, ReservationId);

impl InFlight {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, HashMap<ReservationId, Needs>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, id: ReservationId, needs: Needs) -> Flight<'_> {
        self.lock().insert(id, needs);
        Flight(self, id)
    }

    pub(crate) fn needs(&self) -> Vec<Needs> {
        self.lock().values().cloned().collect()
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}
