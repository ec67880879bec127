//! The guest's RAM.
#![allow(unsafe_code, reason = "KVM and the host's kernel are told addresses")]

use std::fs::File;
use std::io;
use std::num::NonZeroU32;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, VolatileSlice};

use crate::error::{HostContext, Result};
use crate::layout;

mod ram;

pub(crate) use ram::Ram;

/// The guest's RAM: memory that the host provides as it is touched, anonymous or a private copy of a file's.
pub(crate) type Memory = GuestRegionCollection<Ram>;

/// The bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Reserves addresses for `mib` MiB of RAM; no page is touched.
pub(crate) fn allocate(mib: NonZeroU32) -> Result<Memory> {
    put_together(mib, None).host(&format!("cannot map {mib} MiB of memory"))
}

/// Maps `mib` MiB of RAM from `offset` of a file on, privately: a page is read when it is first touched, and
/// copied when it is first written. The file must be that long, and stay so.
pub(crate) fn map(file: &Arc<File>, offset: u64, mib: NonZeroU32) -> Result<Memory> {
    put_together(mib, Some((file, offset))).host(&format!("cannot map {mib} MiB of memory from a file"))
}

fn put_together(mib: NonZeroU32, mut from: Option<(&Arc<File>, u64)>) -> io::Result<Memory> {
    let mut regions = Vec::new();
    for (start, len) in ranges(u64::from(mib.get()) << 20) {
        let ram = Ram::map(start, len, from)?;
        keep_to_this_process(&ram)?;
        regions.push(ram);
        from = from.map(|(file, offset)| (file, offset + len));
    }
    Memory::from_regions(regions).map_err(io::Error::other)
}

/// Reads `len` bytes of a file from `offset` on straight into the memory, which nobody has touched there. Holes of
/// the file are not read: the memory is zero as it is.
pub(crate) fn read_from(
    memory: &Memory,
    address: u64,
    file: &File,
    offset: u64,
    len: usize,
) -> io::Result<()> {
    let (mut done, end) = (offset, offset + len as u64);
    while let Some(data) = next_data(file, done..end)? {
        let (start, len) = (address + (data.start - offset), (data.end - data.start) as usize);
        done = data.start;
        for slice in memory.get_slices(GuestAddress(start), len) {
            let slice = slice.map_err(io::Error::other)?;
            read_into(&slice, file, done)?;
            done += slice.len() as u64;
        }
    }
    Ok(())
}

/// The first bytes within a range of a file that may not be in a hole.
fn next_data(file: &File, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
    if within.is_empty() {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(within.start)) {
        Ok(start) => start,
        Err(Errno::NXIO) if seek(file, SeekFrom::End(0))? < within.end => {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Err(Errno::NXIO) => return Ok(None),
        // A file of which it is not known where it has holes.
        Err(_) => return Ok(Some(within)),
    };
    let end = seek(file, SeekFrom::Hole(start)).map_or(within.end, |hole| hole.min(within.end));
    Ok((start < end).then_some(start..end))
}

fn read_into(slice: &VolatileSlice<'_, ()>, file: &File, mut offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < slice.len() {
        let rest = slice.offset(done).map_err(io::Error::other)?;
        let into = rest.ptr_guard_mut();
        // SAFETY: so many bytes are mapped there, and nobody holds a reference to any.
        let read =
            unsafe { libc::pread(file.as_raw_fd(), into.as_ptr().cast(), rest.len(), offset as libc::off_t) };
        match read {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => (done, offset) = (done + read as usize, offset + read as u64),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

fn keep_to_this_process(ram: &Ram) -> io::Result<()> {
    let (start, len) = ram.mapping();
    // What the guest keeps there is nobody else's: no child process gets a copy, no core dump.
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: the mapping is the region's own, and the advice changes nothing for this process.
        if unsafe { libc::madvise(start.cast(), len, advice) } != 0 {
            return Err(io::Error::last_os_error());
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
    pub(crate) fn of(region: &Ram) -> Self {
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
    use vm_memory::Bytes;

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
    fn holes_of_a_file_touch_no_memory() {
        const MIB: usize = 1 << 20;
        let file = tempfile::tempfile().unwrap();
        for (offset, byte) in [(0, 1), (4 * MIB, 2), (6 * MIB, 3)] {
            file.write_all_at(&[byte; PAGE], offset as u64).unwrap();
        }
        file.set_len(7 * MIB as u64).unwrap();
        let memory = allocate(NonZeroU32::new(16).unwrap()).unwrap();
        read_from(&memory, MIB as u64, &file, 1024, 7 * MIB - 1024).unwrap();
        let mut read = vec![9; 7 * MIB - 1024];
        let ram = memory.iter().next().unwrap();
        let untouched = Untouched::of(ram);
        for (from, len, expect) in
            [(0_usize, MIB, true), (MIB, PAGE, false), (2 * MIB, 2 * MIB, true), (8 * MIB, MIB, true)]
        {
            assert_eq!(untouched.is(from as u64, len), expect, "{from:#x}");
        }
        memory.read_slice(&mut read, GuestAddress(MIB as u64)).unwrap();
        let mut whole = vec![0; 7 * MIB];
        file.read_exact_at(&mut whole, 0).unwrap();
        assert!(read == whole[1024..], "the bytes are not the file's");
        let cut = read_from(&memory, 0, &file, 0, 7 * MIB + 1).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn huge_pages_of_the_guest_can_be_the_hosts() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(3 << 20).unwrap();
        let mib = NonZeroU32::new(3).unwrap();
        // Several, since one may lie well by chance.
        let memories: Vec<_> =
            (0..4).flat_map(|_| [allocate(mib).unwrap(), map(&file, 0, mib).unwrap()]).collect();
        for memory in &memories {
            let ram = memory.iter().next().unwrap();
            assert_eq!((ram.as_ptr() as usize % (2 << 20), ram.len()), (0, 3 << 20));
            memory.write_slice(&[7; 16], GuestAddress((3 << 20) - 16)).unwrap();
        }
    }

    #[test]
    fn what_aligns_memory_is_no_mapping_of_its_own() {
        let memories: Vec<_> = (0..4).map(|_| allocate(NonZeroU32::new(4).unwrap()).unwrap()).collect();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let address = |text| usize::from_str_radix(text, 16).unwrap();
        let mapped: Vec<Range<usize>> = (maps.lines())
            .filter_map(|line| line.split_once(' ')?.0.split_once('-'))
            .map(|(start, end)| address(start)..address(end))
            .collect();
        for memory in &memories {
            let (start, len) = memory.iter().next().unwrap().mapping();
            let (start, last) = (start as usize, start as usize + len - 1);
            let one = mapped.iter().any(|range| range.contains(&start) && range.contains(&last));
            assert!(one, "{start:x} to {last:x} is several mappings:\n{maps}");
        }
    }

    #[test]
    fn the_guest_is_not_told_of_the_bios_area() {
        let memory = allocate(NonZeroU32::new(2).unwrap()).unwrap();
        assert_eq!(usable(&memory), [(0, 0x9_fc00), (0x10_0000, 0x10_0000)]);
    }
}
