//! The guest's RAM.
#![allow(unsafe_code, reason = "KVM and the host's kernel are told addresses")]

use std::num::NonZeroU32;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{HostContext, Result};
use crate::layout;

/// The guest's RAM: anonymous memory that the host provides as it is touched.
pub(crate) type Memory = GuestMemoryMmap<()>;

/// Reserves addresses for `mib` MiB of RAM; no page is touched.
pub(crate) fn allocate(mib: NonZeroU32) -> Result<Memory> {
    let ranges: Vec<_> = ranges(u64::from(mib.get()) << 20)
        .into_iter()
        .map(|(start, len)| (GuestAddress(start), len as usize))
        .collect();
    let memory = Memory::from_ranges(&ranges).host(&format!("cannot map {mib} MiB of memory"))?;
    // What the guest keeps there is nobody else's: no child process gets a copy, no core dump.
    for region in memory.iter() {
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: the region is mapped, and the advice changes nothing for this process.
            let done = unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) };
            if done != 0 {
                return Err(std::io::Error::last_os_error()).host("cannot keep the memory to this process");
            }
        }
    }
    Ok(memory)
}

/// The start and length of each piece of RAM: one below the hole, one above if needed.
fn ranges(len: u64) -> Vec<(u64, u64)> {
    let low = len.min(layout::HOLE);
    let mut ranges = vec![(0, low)];
    if len > low {
        ranges.push((layout::HOLE_END, len - low));
    }
    ranges
}

/// Gives the RAM to the virtual machine. `memory` must outlive it.
///
/// # Safety
///
/// The memory must stay mapped for as long as `vm` or a vCPU of it is open.
pub(crate) unsafe fn register(vm: &VmFd, memory: &Memory) -> Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let described = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped, and the caller keeps it so; regions do not overlap.
        unsafe { vm.set_user_memory_region(described) }.host("KVM did not take the guest's memory")?;
    }
    Ok(())
}

/// What the guest is told of its RAM: start and length of each usable piece.
pub(crate) fn usable(memory: &Memory) -> Vec<(u64, u64)> {
    let mut usable = Vec::new();
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        if start == 0 {
            usable.push((0, layout::LOW_MEMORY_END.min(end)));
            if end > layout::HIGH_MEMORY {
                usable.push((layout::HIGH_MEMORY, end - layout::HIGH_MEMORY));
            }
        } else {
            usable.push((start, end - start));
        }
    }
    usable
}

/// The first address after the RAM below the hole.
pub(crate) fn low_end(memory: &Memory) -> u64 {
    memory.iter().next().map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hole_stays_free() {
        const GIB: u64 = 1 << 30;
        for (len, expect) in [
            (GIB, vec![(0, GIB)]),
            (3 * GIB, vec![(0, 3 * GIB)]),
            (4 * GIB, vec![(0, 3 * GIB), (4 * GIB, GIB)]),
        ] {
            assert_eq!(ranges(len), expect, "{len:#x}");
        }
    }

    #[test]
    fn the_guest_is_not_told_of_the_bios_area() {
        let memory = allocate(NonZeroU32::new(2).unwrap()).unwrap();
        assert_eq!(usable(&memory), [(0, 0x9_fc00), (0x10_0000, 0x10_0000)]);
    }
}
