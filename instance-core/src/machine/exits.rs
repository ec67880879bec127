//! How often processors leave their guests.

use std::iter::Sum;
use std::ops::Add;

/// How often a processor of a machine's has left its guest for the hypervisor's process, by what the guest
/// did: [`Machine::vm_exits`](super::Machine::vm_exits). Each costs as much as some thousand instructions.
///
/// Left out is what the hypervisor's part in the host's kernel sees to by itself, such as timers, interrupts between
/// processors and, where it can, notifications of disks and network ports.
///
/// ```
/// use instance_core::machine::VmExits;
///
/// let mut first = VmExits::default();
/// first.port_writes = 12;
/// let mut second = VmExits::default();
/// (second.memory_reads, second.interruptions) = (3, 1);
/// assert_eq!([first, second].into_iter().sum::<VmExits>().total(), 16);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmExits {
    /// Reads of I/O ports, such as the serial port's.
    pub port_reads: u64,
    /// Writes to I/O ports.
    pub port_writes: u64,
    /// Reads of devices' registers at addresses of memory.
    pub memory_reads: u64,
    /// Writes to devices' registers at addresses of memory.
    pub memory_writes: u64,
    /// By the hypervisor's own doing, such as to pause the machine.
    pub interruptions: u64,
    /// For any other reason.
    pub others: u64,
}

impl VmExits {
    /// All of them together.
    pub fn total(&self) -> u64 {
        let Self { port_reads, port_writes, memory_reads, memory_writes, interruptions, others } = self;
        port_reads + port_writes + memory_reads + memory_writes + interruptions + others
    }
}

impl Add for VmExits {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            port_reads: self.port_reads + other.port_reads,
            port_writes: self.port_writes + other.port_writes,
            memory_reads: self.memory_reads + other.memory_reads,
            memory_writes: self.memory_writes + other.memory_writes,
            interruptions: self.interruptions + other.interruptions,
            others: self.others + other.others,
        }
    }
}

impl Sum for VmExits {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}
