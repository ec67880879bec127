//! What a host holds: memory and vCPUs, counted for the instances that have a machine.

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Error, ErrorKind, InstanceType, Result};

/// How many vCPUs a region gives out for each of the host's, unless told otherwise.
const VCPUS_PER_PROCESSOR: f64 = 16.0;

/// How much memory it gives out for each byte of the host's: guests' memory is taken as they touch it.
const MEMORY_OVERCOMMIT: f64 = 2.0;

/// What the instances of a region that have a machine may take together. A launch or a start beyond it is
/// refused with [`InsufficientCapacity`](ErrorKind::InsufficientCapacity).
///
/// ```
/// use instance_core::testing::FakeHypervisor;
/// use instance_core::{Capacity, RegionOptions};
///
/// let dir = tempfile::tempdir()?;
/// // Eight processors and 32 GiB, each vCPU given out four times and memory once.
/// let capacity = Capacity::new(8, 32 << 10).overcommit(4.0, 1.0);
/// assert_eq!((capacity.vcpus(), capacity.memory_mib()), (32, 32 << 10));
/// let region = RegionOptions::new().capacity(capacity).open(dir.path(), FakeHypervisor::new())?;
/// assert_eq!(region.used_capacity(), (0, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    vcpus: u64,
    memory_mib: u64,
}

impl Capacity {
    /// So many vCPUs and MiB of memory.
    pub const fn new(vcpus: u64, memory_mib: u64) -> Self {
        Self { vcpus, memory_mib }
    }

    /// No limit: whoever makes the machines sees to it.
    pub const fn unlimited() -> Self {
        Self::new(u64::MAX, u64::MAX)
    }

    /// What this host has: its processors and its memory, or no limit where it does not say.
    pub fn of_host() -> Self {
        let vcpus = std::thread::available_parallelism().map_or(u64::MAX, |n| n.get() as u64);
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB"));
        let kib: Option<u64> = total.and_then(|kib| kib.trim().parse().ok());
        Self::new(vcpus, kib.map_or(u64::MAX, |kib| kib / 1024))
    }

    /// So many times as much of each.
    #[must_use]
    pub fn overcommit(self, vcpus: f64, memory: f64) -> Self {
        // A limit that is none stays so: the conversion saturates.
        let times = |limit: u64, factor: f64| (limit as f64 * factor.max(0.0)) as u64;
        Self::new(times(self.vcpus, vcpus), times(self.memory_mib, memory))
    }

    /// How many vCPUs.
    pub const fn vcpus(&self) -> u64 {
        self.vcpus
    }

    /// How much memory, in MiB.
    pub const fn memory_mib(&self) -> u64 {
        self.memory_mib
    }
}

/// This host's, each processor given out 16 times and its memory twice.
impl Default for Capacity {
    fn default() -> Self {
        Self::of_host().overcommit(VCPUS_PER_PROCESSOR, MEMORY_OVERCOMMIT)
    }
}

/// What is given out of a capacity.
#[derive(Debug)]
pub(crate) struct Meter {
    limit: Capacity,
    used: Arc<Mutex<(u64, u64)>>,
}

/// A part of it, given back when dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    used: Arc<Mutex<(u64, u64)>>,
    part: (u64, u64),
}

impl Meter {
    pub(crate) fn new(limit: Capacity) -> Self {
        Self { limit, used: Arc::default() }
    }

    pub(crate) fn used(&self) -> (u64, u64) {
        *lock(&self.used)
    }

    /// Takes what an instance of this type needs.
    pub(crate) fn claim(&self, hardware: &InstanceType) -> Result<Claim> {
        let part = (u64::from(hardware.vcpus().get()), u64::from(hardware.memory_mib().get()));
        let mut used = lock(&self.used);
        let next = (used.0.saturating_add(part.0), used.1.saturating_add(part.1));
        if next.0 > self.limit.vcpus || next.1 > self.limit.memory_mib {
            let left =
                (self.limit.vcpus.saturating_sub(used.0), self.limit.memory_mib.saturating_sub(used.1));
            let what = format!(
                "the host cannot hold another {hardware}: it needs {} vCPUs and {} MiB, and {} vCPUs and {} MiB are left",
                part.0, part.1, left.0, left.1
            );
            return Err(Error::new(ErrorKind::InsufficientCapacity, what));
        }
        *used = next;
        Ok(Claim { used: self.used.clone(), part })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut used = lock(&self.used);
        *used = (used.0 - self.part.0, used.1 - self.part.1);
    }
}

// Nothing that is done under the lock panics half way.
fn lock(used: &Mutex<(u64, u64)>) -> MutexGuard<'_, (u64, u64)> {
    used.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let hardware: InstanceType = "t3.small".parse().unwrap();
        for (limit, fit) in [
            (Capacity::new(4, 1 << 20), 2),
            (Capacity::new(1 << 20, 6 << 10), 3),
            (Capacity::new(1 << 20, (6 << 10) - 1), 2),
            (Capacity::new(2, 2 << 10).overcommit(2.5, 5.0), 2),
            (Capacity::new(0, 0), 0),
        ] {
            let meter = Meter::new(limit);
            let mut claims = Vec::new();
            while let Ok(claim) = meter.claim(&hardware) {
                claims.push(claim);
            }
            assert_eq!(claims.len(), fit, "{limit:?}");
            assert_eq!(meter.used(), (2 * fit as u64, (2 << 10) * fit as u64));
            assert_eq!(claims.pop().is_some(), fit > 0);
            assert_eq!(meter.claim(&hardware).is_ok(), fit > 0, "{limit:?}");
        }
        let unlimited = Meter::new(Capacity::unlimited().overcommit(0.5, 3.0));
        assert!((0..100).map(|_| unlimited.claim(&hardware)).all(|claim| claim.is_ok()));
    }
}
