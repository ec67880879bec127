//! Memory that much is written from at once.
#![allow(unsafe_code, reason = "memory is asked of the system, which is told how it will be used")]

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::slice;

use libc::c_void;

/// What large pages are multiples of, in length and in place: 2 MiB on x86-64, and on ARM with pages of 4 KiB.
const LARGE: usize = 2 << 20;

/// Memory of one's own, from a multiple of 2 MiB on, of zeroes at first.
///
/// It is no `Vec`: what an allocator gives out may have been used before, in small pages, and need not begin where a large
/// one could.
#[derive(Debug)]
pub(crate) struct Room {
    map: NonNull<c_void>,
    map_len: usize,
    bytes: NonNull<u8>,
    len: usize,
    large: bool,
}

// SAFETY: nobody else knows of the memory, which is that of no thread.
unsafe impl Send for Room {}
// SAFETY: as above; through a shared reference nothing is written.
unsafe impl Sync for Room {}

impl Room {
    /// So many bytes in ordinary pages, which take nothing before they are used.
    ///
    /// # Errors
    ///
    /// When the system has no more.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let map_len = len + LARGE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory takes nothing from anybody.
        let map = unsafe { libc::mmap(ptr::null_mut(), map_len, access, flags, -1, 0) };
        let map = NonNull::new(map).filter(|map| map.as_ptr() != libc::MAP_FAILED);
        let map = map.ok_or_else(io::Error::last_os_error)?;
        let first = map.cast::<u8>();
        // SAFETY: at most `LARGE` bytes from the first are all within the mapping.
        let bytes = unsafe { first.add(first.align_offset(LARGE)) };
        Ok(Self { map, map_len, bytes, len, large: false })
    }

    /// So many bytes in large pages, where the system has such.
    ///
    /// A device is told of a large page as one piece, and of others as one piece for each 4 KiB. A disk that is another
    /// program's, as a virtual machine's is, was written twice as fast from them.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub(crate) fn of_large_pages(len: usize) -> io::Result<Self> {
        let mut new = Self::new(len)?;
        new.large = true;
        // A system that has none is slower and no less right.
        // SAFETY: these are pages of this mapping, and the advice leaves what is in them.
        unsafe { libc::madvise(new.bytes.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Ok(new)
    }

    /// Whether it was asked for [`of_large_pages`](Self::of_large_pages).
    pub(crate) fn has_large_pages(&self) -> bool {
        self.large
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference to it any more.
        unsafe { libc::munmap(self.map.as_ptr(), self.map_len) };
    }
}

impl Deref for Room {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped, and nobody else knows of them.
        unsafe { slice::from_raw_parts(self.bytes.as_ptr(), self.len) }
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { slice::from_raw_parts_mut(self.bytes.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of the mapping that this byte is in.
    fn flags(at: *const u8) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut within = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let range = range.map(|(start, end)| [start, end].map(|at| usize::from_str_radix(at, 16)));
            if let Some([Ok(start), Ok(end)]) = range {
                within = (start..end).contains(&at.addr());
            }
            if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| within) {
                return format!("{flags} ");
            }
        }
        panic!("no mapping has {at:?}");
    }

    #[test]
    fn it_is_ones_own_and_begins_where_a_large_page_does() {
        let mut rooms: Vec<Room> = Vec::new();
        for len in [1, 4096, LARGE - 1, LARGE, 2 * LARGE + 5] {
            rooms.extend([Room::new(len).unwrap(), Room::of_large_pages(len).unwrap()]);
            assert!(rooms.iter().rev().take(2).all(|room| room.len() == len));
        }
        for (room, byte) in rooms.iter_mut().zip(1..) {
            assert!(room.as_ptr().addr() % LARGE == 0 && room.iter().all(|byte| *byte == 0));
            room.fill(byte);
        }
        assert!(rooms.iter().zip(1..).all(|(room, byte)| room.iter().all(|found| *found == byte)));
    }

    #[test]
    fn the_system_is_asked_for_large_pages() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            eprintln!("SKIPPED: this kernel has no large pages to be asked for");
            return;
        }
        let (ordinary, large) = (Room::new(2 * LARGE).unwrap(), Room::of_large_pages(2 * LARGE).unwrap());
        for (room, expected) in [(&ordinary, false), (&large, true)] {
            for at in [0, room.len() - 1] {
                let flags = flags(&raw const room[at]);
                assert_eq!((flags.contains(" hg "), room.has_large_pages()), (expected, expected), "{flags}");
            }
        }
    }

    /// Else there were no addresses left before the end.
    #[test]
    fn it_is_given_back() {
        for _ in 0..140_000 {
            Room::new(1 << 30).unwrap();
        }
    }
}
