//! A piece of the guest's RAM, and where it lies in this process.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::{io, ptr};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as MemoryResult;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

/// RAM of this size or more begins at a multiple of it here, as it does for the guest: only then can KVM map a huge page
/// of the host's whole.
const HUGE_PAGE: usize = 2 << 20;

/// RAM that this process has mapped, until it is dropped.
///
/// vm-memory's own mapping is wherever the kernel has room, and kernels before Linux 6.7 align it to nothing, so that a guest's
/// huge page is never one of the host's: each of its 512 pages is a fault.
#[derive(Debug)]
pub(crate) struct Ram {
    region: GuestRegionMmap<()>,
    /// What the region points to.
    mapping: Mapping,
}

impl Ram {
    /// `len` bytes for the guest's address `start`: of zeroes, or from an offset of a file on, of which they are a
    /// private copy.
    pub(super) fn map(start: u64, len: u64, file: Option<(&Arc<File>, u64)>) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let file = file.map(|(file, offset)| FileOffset::from_arc(file.clone(), offset));
        let mapping = Mapping::new(len, file.as_ref())?;
        let mut region = MmapRegionBuilder::new(len).with_mmap_prot(ACCESS).with_mmap_flags(KIND);
        if let Some(file) = file {
            region = region.with_file_offset(file);
        }
        // SAFETY: so many bytes are mapped there, for as long as the region is used, since it goes with its mapping.
        let region =
            unsafe { region.with_raw_mmap_pointer(mapping.start) }.build().map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(region, GuestAddress(start));
        Ok(Self { region: region.ok_or(io::ErrorKind::InvalidInput)?, mapping })
    }

    /// Where it lies in this process.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.mapping.start
    }

    /// Start and length of the mapping that it lies in, with what aligns it. What is advised of the one is advised of the
    /// other, or the kernel makes two or three mappings of it and has more to lock for every machine of the process; so
    /// machines' memories that lie side by side are even one.
    pub(super) fn mapping(&self) -> (*mut u8, usize) {
        (self.mapping.whole, self.mapping.whole_len)
    }
}

impl GuestMemoryRegion for Ram {
    type B = ();

    fn len(&self) -> u64 {
        self.region.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.region.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {
        self.region.bitmap()
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> MemoryResult<*mut u8> {
        self.region.get_host_address(address)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.region.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        len: usize,
    ) -> MemoryResult<VolatileSlice<'_, BS<'_, ()>>> {
        self.region.get_slice(offset, len)
    }
}

impl GuestMemoryRegionBytes for Ram {}

const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const KIND: libc::c_int = libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// Pages of this process, given back when it is dropped.
///
/// It is mapped by one call and cut by none: each address that is unmapped or mapped anew is told to KVM for every machine of the
/// process, so that making the thousandth would take longer by what a thousand need to hear of it.
#[derive(Debug)]
struct Mapping {
    /// Where what was asked for begins.
    start: *mut u8,
    whole: *mut u8,
    whole_len: usize,
}

// SAFETY: the pointers are those of a mapping, which may be used and unmapped from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; the mapping itself never changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize, file: Option<&FileOffset>) -> io::Result<Self> {
        match file {
            // A private mapping of a file has no huge pages to be a multiple of.
            Some(file) => Self::map(len, 1, KIND, file.file().as_raw_fd(), file.start()),
            None if len < HUGE_PAGE => Self::map(len, 1, KIND | libc::MAP_ANONYMOUS, -1, 0),
            None => Self::map(len, HUGE_PAGE, KIND | libc::MAP_ANONYMOUS, -1, 0),
        }
    }

    /// Maps `len` bytes at a multiple of `align`, and what lies before and after them in a mapping that has them
    /// wherever the kernel puts it. Nobody is told of that, so it never has memory.
    fn map(len: usize, align: usize, kind: libc::c_int, fd: RawFd, offset: u64) -> io::Result<Self> {
        let whole_len = len.checked_add(align - 1).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping, wherever there is room.
        match unsafe { libc::mmap(ptr::null_mut(), whole_len, ACCESS, kind, fd, offset) } {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            whole => {
                let whole = whole.cast::<u8>();
                Ok(Self { start: whole.wrapping_add(whole.align_offset(align)), whole, whole_len })
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the addresses are the mapping's own, and whoever was told of them is gone.
        unsafe { libc::munmap(self.whole.cast(), self.whole_len) };
    }
}
