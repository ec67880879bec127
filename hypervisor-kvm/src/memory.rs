//! The guest's RAM.
#![allow(unsafe_code, reason = "KVM and the host's kernel are told addresses")]

use std::fs::File;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::error::{HostContext, Result};
use crate::layout;

/// The guest's RAM: memory that the host provides as it is touched, anonymous or a private copy of a file's.
pub(crate) type Memory = GuestMemoryMmap<()>;

/// The bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Reserves addresses for `mib` MiB of RAM; no page is touched.
pub(crate) fn allocate(mib: NonZeroU32) -> Result<Memory> {
    let ranges: Vec<_> = ranges(u64::from(mib.get()) << 20)
        .into_iter()
        .map(|(start, len)| (GuestAddress(start), len as usize))
        .collect();
    let memory = Memory::from_ranges(&ranges).host(&format!("cannot map {mib} MiB of memory"))?;
    keep_to_this_process(&memory)?;
    Ok(memory)
}

/// Maps `mib` MiB of RAM from `offset` of a file on, privately: a page is read when it is first touched, and
/// copied when it is first written. The file must be that long, and stay so.
pub(crate) fn map(file: &Arc<File>, offset: u64, mib: NonZeroU32) -> Result<Memory> {
    let failed = format!("cannot map {mib} MiB of memory from a file");
    let mut regions = Vec::new();
    let mut offset = offset;
    for (start, len) in ranges(u64::from(mib.get()) << 20) {
        let mapping = MmapRegionBuilder::new(len as usize)
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .host(&failed)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or("the region is beyond the address space").host(&failed)?);
        offset += len;
    }
    let memory = Memory::from_regions(regions).host(&failed)?;
    keep_to_this_process(&memory)?;
    Ok(memory)
}

/// Reads `len` bytes of a file from `offset` on straight into the memory, which no guest uses yet.
pub(crate) fn read_from(
    memory: &Memory,
    address: u64,
    file: &File,
    mut offset: u64,
    len: usize,
) -> io::Result<()> {
    for slice in memory.get_slices(GuestAddress(address), len) {
        let slice = slice.map_err(io::Error::other)?;
        let mut done = 0;
        while done < slice.len() {
            let rest = slice.offset(done).map_err(io::Error::other)?;
            let into = rest.ptr_guard_mut();
            // SAFETY: so many bytes are mapped there, and nobody holds a reference to any.
            let read = unsafe {
                libc::pread(file.as_raw_fd(), into.as_ptr().cast(), rest.len(), offset as libc::off_t)
            };
            match read {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                1.. => (done, offset) = (done + read as usize, offset + read as u64),
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
    Ok(())
}

fn keep_to_this_process(memory: &Memory) -> Result<()> {
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
    Ok(())
}

/// Which pages of a region nobody has touched, so that they are zero and need not be looked at, which would have
/// the host provide tables for them.
pub(crate) struct Untouched {
    /// What the host says of every page of this process's addresses, as far as it can be asked
    /// (`Documentation/admin-guide/mm/pagemap.rst`): 64 bits each.
    told: Option<File>,
    first_page: u64,
}

impl Untouched {
    pub(crate) fn of(region: &GuestRegionMmap<()>) -> Self {
        // What is mapped from a file is not zero before it is touched.
        let anonymous = region.file_offset().is_none();
        let told = anonymous.then(|| File::open("/proc/self/pagemap").ok()).flatten();
        Self { told, first_page: region.as_ptr() as u64 / PAGE as u64 }
    }

    /// Whether none of `len` bytes from `offset` on, whole pages, has been touched.
    pub(crate) fn is(&self, offset: u64, len: usize) -> bool {
        const IN_MEMORY_OR_SWAPPED: u64 = 3 << 62;
        let Some(told) = &self.told else { return false };
        let mut entries = vec![0; len / PAGE * 8];
        let first = self.first_page + offset / PAGE as u64;
        let read = told.read_exact_at(&mut entries, first * 8);
        let touched = |entry: &[u8]| {
            entry.try_into().map_or(true, |entry| u64::from_ne_bytes(entry) & IN_MEMORY_OR_SWAPPED != 0)
        };
        read.is_ok() && !entries.chunks_exact(8).any(touched)
    }
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

/// Gives the pages that lie wholly in a range back to the host; used again, they read as zeroes, or as they are in
/// the file that the memory is mapped from. None, and nothing is done, where the range is not all RAM.
pub(crate) fn release(memory: &Memory, start: u64, len: u64) -> Option<()> {
    let (start, len) = (GuestAddress(start), usize::try_from(len).ok()?);
    if !memory.check_range(start, len) {
        return None;
    }
    for slice in memory.get_slices(start, len) {
        let slice = slice.ok()?;
        let guard = slice.ptr_guard_mut();
        let skipped = guard.as_ptr().align_offset(PAGE);
        let whole = slice.len().saturating_sub(skipped) / PAGE * PAGE;
        if whole == 0 {
            continue;
        }
        // SAFETY: `skipped + whole` bytes of the slice are mapped and stay so. They are the guest's, to whom no
        // reference exists, and whose bytes may change at any time.
        let done = unsafe { libc::madvise(guard.as_ptr().add(skipped).cast(), whole, libc::MADV_DONTNEED) };
        if done != 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "the host did not take a guest's pages back");
        }
    }
    Some(())
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
