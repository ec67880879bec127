//! How often a processor left its guest, counted by the thread that runs it.

use std::sync::atomic::{AtomicU64, Ordering};

use instance_core::machine::VmExits;

/// A processor's counts. One thread adds, any may look; in a cache line of their own, so that no other
/// processor's thread is slowed down by it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Exits {
    pub(crate) port_reads: Count,
    pub(crate) port_writes: Count,
    pub(crate) memory_reads: Count,
    pub(crate) memory_writes: Count,
    pub(crate) interruptions: Count,
    pub(crate) others: Count,
}

#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// Adds one. Only the processor's thread does, so no lock is needed.
    pub(crate) fn add(&self) {
        self.0.store(self.get().wrapping_add(1), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Exits {
    /// The counts as they are now.
    pub(crate) fn read(&self) -> VmExits {
        let mut read = VmExits::default();
        read.port_reads = self.port_reads.get();
        read.port_writes = self.port_writes.get();
        read.memory_reads = self.memory_reads.get();
        read.memory_writes = self.memory_writes.get();
        read.interruptions = self.interruptions.get();
        read.others = self.others.get();
        read
    }
}
