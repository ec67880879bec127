//! What a host holds: memory and vCPUs, counted for the instances that have a machine.

use std::fs;
use std::ops::RangeInclusive;
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
        self.claim_several(hardware, 1..=1)?.pop().ok_or_else(|| self.is_full(hardware, self.used()))
    }

    /// Takes what so many need, as many as there is room for, at once: who asks meanwhile does not get a part of it.
    pub(crate) fn claim_several(
        &self,
        hardware: &InstanceType,
        count: RangeInclusive<u32>,
    ) -> Result<Vec<Claim>> {
        let mut used = lock(&self.used);
        let fit = self.room(hardware, &count, *used)?;
        let part = part_of(hardware);
        *used = plus(*used, part, fit);
        Ok((0..fit).map(|_| Claim { used: self.used.clone(), part }).collect())
    }

    /// The same without taking it.
    pub(crate) fn check(&self, hardware: &InstanceType, count: RangeInclusive<u32>) -> Result<()> {
        self.room(hardware, &count, self.used()).map(|_| ())
    }

    /// How many of so many fit.
    fn room(&self, hardware: &InstanceType, count: &RangeInclusive<u32>, used: (u64, u64)) -> Result<u32> {
        let part = part_of(hardware);
        let times = |limit: u64, used: u64, part: u64| match limit {
            u64::MAX => u64::MAX,
            limit => limit.saturating_sub(used) / part,
        };
        let fit = times(self.limit.vcpus, used.0, part.0)
            .min(times(self.limit.memory_mib, used.1, part.1))
            .min((*count.end()).into());
        let fit = u32::try_from(fit).unwrap_or(*count.end());
        if fit < *count.start() { Err(self.is_full(hardware, plus(used, part, fit))) } else { Ok(fit) }
    }

    fn is_full(&self, hardware: &InstanceType, used: (u64, u64)) -> Error {
        let part = part_of(hardware);
        let left = (self.limit.vcpus.saturating_sub(used.0), self.limit.memory_mib.saturating_sub(used.1));
        let what = format!(
            "the host cannot hold another {hardware}: it needs {} vCPUs and {} MiB, and {} vCPUs and {} MiB are left",
            part.0, part.1, left.0, left.1
        );
        Error::new(ErrorKind::InsufficientCapacity, what)
    }
}

/// The vCPUs and the memory in MiB that an instance takes.
fn part_of(hardware: &InstanceType) -> (u64, u64) {
    (u64::from(hardware.vcpus().get()), u64::from(hardware.memory_mib().get()))
}

/// What is used when so many have taken their parts.
fn plus(used: (u64, u64), part: (u64, u64), count: u32) -> (u64, u64) {
    let more = |used: u64, part: u64| used.saturating_add(part.saturating_mul(count.into()));
    (more(used.0, part.0), more(used.1, part.1))
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
            let asked = |count| (meter.check(&hardware, count).is_ok(), meter.used());
            assert_eq!(asked(fit..=fit + 1), (true, (0, 0)));
            assert_eq!(asked(fit + 1..=fit + 1), (false, (0, 0)));
            assert!(meter.claim_several(&hardware, fit + 1..=fit + 9).is_err());
            assert_eq!(meter.used(), (0, 0), "nothing of what does not fit is taken");
            assert_eq!(meter.claim_several(&hardware, 0..=fit + 9).unwrap().len(), fit as usize);
            let mut claims = Vec::new();
            while let Ok(claim) = meter.claim(&hardware) {
                claims.push(claim);
            }
            assert_eq!(claims.len(), fit as usize, "{limit:?}");
            assert_eq!(meter.used(), (2 * u64::from(fit), (2 << 10) * u64::from(fit)));
            assert_eq!(claims.pop().is_some(), fit > 0);
            assert_eq!(meter.claim(&hardware).is_ok(), fit > 0, "{limit:?}");
        }
        let unlimited = Meter::new(Capacity::unlimited().overcommit(0.5, 3.0));
        // As fast for many as for few.
        assert!(unlimited.check(&hardware, u32::MAX..=u32::MAX).is_ok());
        assert!((0..100).map(|_| unlimited.claim(&hardware)).all(|claim| claim.is_ok()));
    }
}
