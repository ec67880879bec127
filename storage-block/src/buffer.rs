//! Memory that bytes are read into and written from, whoever else may see it.
#![allow(unsafe_code, reason = "memory that others may change has an address and no reference")]

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;

/// Memory to be written from: a slice, or a piece of memory that others may change meanwhile, such as a
/// guest's.
///
/// It has the layout of the system's `iovec`, so that many of them go to the kernel as they are.
///
/// ```
/// use storage_block::{IoBuf, MemoryDisk};
///
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// disk.write_vectored_at(&mut [IoBuf::new(b"hello, "), IoBuf::new(b"world")], 4096)?;
/// let mut buf = [0; 12];
/// disk.read_at(&mut buf, 4096)?;
/// assert_eq!(&buf, b"hello, world");
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoBuf<'a> {
    iovec: iovec,
    memory: PhantomData<&'a [u8]>,
}

/// Memory to be read into: a slice, or a piece of memory that others may use meanwhile, such as a guest's.
///
/// It has the layout of the system's `iovec`, so that many of them go to the kernel as they are.
///
/// ```
/// use storage_block::{IoBufMut, MemoryDisk};
///
/// let disk = MemoryDisk::from_vec([[1; 512], [2; 512]].concat())?.into_disk();
/// let (mut first, mut second) = ([0; 500], [0; 24]);
/// disk.read_vectored_at(&mut [IoBufMut::new(&mut first), IoBufMut::new(&mut second)], 0)?;
/// assert_eq!((second[11], second[12]), (1, 2));
/// # Ok::<(), storage_block::Error>(())
/// ```
#[repr(transparent)]
pub struct IoBufMut<'a> {
    iovec: iovec,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: they are what `&[u8]` is, less the promise that nobody else writes.
unsafe impl Send for IoBuf<'_> {}
// SAFETY: as above.
unsafe impl Sync for IoBuf<'_> {}
// SAFETY: they are what `&mut [u8]` is, less the promise that nobody else looks.
unsafe impl Send for IoBufMut<'_> {}
// SAFETY: as above; through a shared reference nothing is written.
unsafe impl Sync for IoBufMut<'_> {}

impl<'a> IoBuf<'a> {
    /// The bytes of a slice.
    pub fn new(bytes: &'a [u8]) -> Self {
        // SAFETY: a slice's memory can be read for as long as the slice lives.
        unsafe { Self::from_raw(bytes.as_ptr(), bytes.len()) }
    }

    /// Memory that others may change at any time: what is written is then any mixture of old and new.
    ///
    /// ```
    /// use storage_block::{IoBuf, MemoryDisk};
    ///
    /// let shared = Box::into_raw(Box::new([7u8; 512]));
    /// let disk = MemoryDisk::new(512)?.into_disk();
    /// // SAFETY: the memory is freed below, after its last use.
    /// disk.write_vectored_at(&mut [unsafe { IoBuf::from_raw(shared.cast(), 512) }], 0)?;
    /// # // SAFETY: it came from a box, and nobody uses it any more.
    /// # drop(unsafe { Box::from_raw(shared) });
    /// # Ok::<(), storage_block::Error>(())
    /// ```
    ///
    /// # Safety
    ///
    /// `len` bytes from `start` on are mapped and can be read for all of `'a`. Whoever changes them meanwhile is
    /// outside of what the compiler sees (a guest, a device, another process) or does it by atomic or
    /// volatile stores.
    pub unsafe fn from_raw(start: *const u8, len: usize) -> Self {
        Self { iovec: iovec { iov_base: start.cast_mut().cast(), iov_len: len }, memory: PhantomData }
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.iovec.iov_len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first byte.
    pub fn as_ptr(&self) -> *const u8 {
        self.iovec.iov_base.cast_const().cast()
    }

    /// Copies the first bytes out, as many as there are on both sides.
    pub fn copy_to_slice(&self, to: &mut [u8]) {
        // SAFETY: both are valid for so many bytes, and a `&mut` overlaps with nothing.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr(), to.as_mut_ptr(), self.len().min(to.len())) }
    }
}

impl<'a> IoBufMut<'a> {
    /// The bytes of a slice.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        // SAFETY: a slice's memory can be written for as long as the slice lives, and is nobody else's.
        unsafe { Self::from_raw(bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Memory that others may look at and change at any time.
    ///
    /// # Safety
    ///
    /// `len` bytes from `start` on are mapped and can be written for all of `'a`, and no reference to them
    /// is used meanwhile. Whoever else uses them is outside of what the compiler sees (a guest, a device,
    /// another process) or does it by atomic or volatile access.
    pub unsafe fn from_raw(start: *mut u8, len: usize) -> Self {
        Self { iovec: iovec { iov_base: start.cast(), iov_len: len }, memory: PhantomData }
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.iovec.iov_len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first byte.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.iovec.iov_base.cast()
    }

    /// Fills the first bytes, as many as there are on both sides.
    pub fn copy_from_slice(&mut self, from: &[u8]) {
        // SAFETY: both are valid for so many bytes; a `&` overlaps with nothing that is written.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.as_mut_ptr(), self.len().min(from.len()));
        }
    }

    /// Makes all bytes zero.
    pub fn zero(&mut self) {
        // SAFETY: the memory is valid for so many bytes.
        unsafe { std::ptr::write_bytes(self.as_mut_ptr(), 0, self.len()) }
    }
}

impl fmt::Debug for IoBuf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({:p}, {})", self.iovec.iov_base, self.len())
    }
}

impl fmt::Debug for IoBufMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBufMut({:p}, {})", self.iovec.iov_base, self.len())
    }
}

/// What the two kinds have in common.
pub(crate) trait Buffer {
    fn iovec(&mut self) -> &mut iovec;
    fn size(&self) -> usize;
}

impl Buffer for IoBuf<'_> {
    fn iovec(&mut self) -> &mut iovec {
        &mut self.iovec
    }
    fn size(&self) -> usize {
        self.len()
    }
}

impl Buffer for IoBufMut<'_> {
    fn iovec(&mut self) -> &mut iovec {
        &mut self.iovec
    }
    fn size(&self) -> usize {
        self.len()
    }
}

/// The bytes of all together; `None` where no memory has as many.
pub(crate) fn total<B: Buffer>(bufs: &[B]) -> Option<u64> {
    bufs.iter().try_fold(0u64, |sum, buf| sum.checked_add(buf.size() as u64))
}

/// Calls `act` with buffers that are the first `len` bytes of `bufs`, and takes these off `bufs`.
///
/// There must be as many.
pub(crate) fn take_first<B: Buffer, R>(
    bufs: &mut &mut [B],
    mut len: usize,
    act: impl FnOnce(&mut [B]) -> R,
) -> R {
    let mut whole = 0;
    while let Some(buf) = bufs.get(whole).filter(|buf| buf.size() <= len) {
        len -= buf.size();
        whole += 1;
    }
    let all = std::mem::take(bufs);
    if len == 0 {
        let (first, rest) = all.split_at_mut(whole);
        *bufs = rest;
        return act(first);
    }
    // The buffer in the middle is cut short for the call, and then what was cut off. What `act` has left in its place
    // may be anything, also another's memory.
    let full = *all[whole].iovec();
    all[whole].iovec().iov_len = len;
    let result = act(&mut all[..=whole]);
    let iov_base = full.iov_base.wrapping_byte_add(len);
    *all[whole].iovec() = iovec { iov_base, iov_len: full.iov_len - len };
    *bufs = &mut all[whole..];
    result
}

/// Copies all bytes into one slice, which has room for them.
pub(crate) fn gather(bufs: &[IoBuf<'_>], mut to: &mut [u8]) {
    for buf in bufs {
        let (part, rest) = to.split_at_mut(buf.len());
        buf.copy_to_slice(part);
        to = rest;
    }
}

/// Fills the buffers from one slice, which has as many bytes.
pub(crate) fn scatter(mut from: &[u8], bufs: &mut [IoBufMut<'_>]) {
    for buf in bufs {
        let (part, rest) = from.split_at(buf.len());
        buf.copy_from_slice(part);
        from = rest;
    }
}

/// Takes the first `len` bytes off; there must be as many.
fn advance<B: Buffer>(bufs: &mut &mut [B], len: usize) {
    take_first(bufs, len, |_| ());
}

/// The most buffers that the kernel takes at once.
const IOV_MAX: usize = 1024;

/// Reads until all is full; a file that ends before is an error. What is read is taken off the buffers.
pub(crate) fn read_all_at(
    file: BorrowedFd<'_>,
    bufs: &mut &mut [IoBufMut<'_>],
    mut offset: u64,
) -> io::Result<()> {
    while !bufs.is_empty() {
        let (count, at) = (bufs.len().min(IOV_MAX) as i32, offset as i64);
        let done = match &mut **bufs {
            // Most are alone, and the call for one is shorter.
            [one] => {
                let iovec { iov_base, iov_len } = *one.iovec();
                // SAFETY: an `IoBufMut` is an `iovec` of memory that may be written.
                unsafe { libc::pread64(file.as_raw_fd(), iov_base, iov_len, at) }
            }
            // SAFETY: as above.
            all => unsafe { libc::preadv64(file.as_raw_fd(), all.as_ptr().cast(), count, at) },
        };
        step(bufs, &mut offset, done, io::ErrorKind::UnexpectedEof)?;
    }
    Ok(())
}

/// Writes everything. What is written is taken off the buffers.
pub(crate) fn write_all_at(
    file: BorrowedFd<'_>,
    bufs: &mut &mut [IoBuf<'_>],
    mut offset: u64,
) -> io::Result<()> {
    while !bufs.is_empty() {
        let (count, at) = (bufs.len().min(IOV_MAX) as i32, offset as i64);
        let done = match &mut **bufs {
            // Most are alone, and the call for one is shorter.
            [one] => {
                let iovec { iov_base, iov_len } = *one.iovec();
                // SAFETY: an `IoBuf` is an `iovec` of memory that may be read.
                unsafe { libc::pwrite64(file.as_raw_fd(), iov_base, iov_len, at) }
            }
            // SAFETY: as above.
            all => unsafe { libc::pwritev64(file.as_raw_fd(), all.as_ptr().cast(), count, at) },
        };
        step(bufs, &mut offset, done, io::ErrorKind::WriteZero)?;
    }
    Ok(())
}

/// Goes on from what a system call did.
fn step<B: Buffer>(
    bufs: &mut &mut [B],
    offset: &mut u64,
    done: isize,
    nothing: io::ErrorKind,
) -> io::Result<()> {
    match usize::try_from(done) {
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
        Ok(0) if bufs.iter().any(|buf| buf.size() > 0) => Err(nothing.into()),
        Ok(done) if matches!(bufs, [one] if one.size() == done) => {
            *bufs = &mut [];
            Ok(())
        }
        Ok(done) => {
            advance(bufs, done);
            *offset += done as u64;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(bufs: &[IoBuf<'_>]) -> Vec<usize> {
        bufs.iter().map(IoBuf::len).collect()
    }

    /// Every way to cut three buffers in two.
    #[test]
    fn cuts() {
        let bytes: Vec<u8> = (0..30).collect();
        for cut in 0..=30 {
            let mut bufs = [
                IoBuf::new(&bytes[..10]),
                IoBuf::new(&[]),
                IoBuf::new(&bytes[10..11]),
                IoBuf::new(&bytes[11..]),
            ];
            let mut rest = &mut bufs[..];
            let gather = |bufs: &[IoBuf<'_>]| {
                let mut found = vec![0; total(bufs).unwrap() as usize];
                gather(bufs, &mut found);
                found
            };
            let first = take_first(&mut rest, cut, |first| {
                let found = gather(first);
                // What the call does to its buffers does not matter to the rest.
                let mut first = first;
                let half = found.len() / 2;
                advance(&mut first, half);
                found
            });
            assert_eq!((first, gather(rest)), (bytes[..cut].to_vec(), bytes[cut..].to_vec()), "cut at {cut}");
        }
    }

    /// Whatever a call puts in the place of its buffers, the rest is that of those it was given.
    #[test]
    fn a_call_may_leave_other_buffers_behind() {
        let bytes: Vec<u8> = (0..30).collect();
        let changes: [fn(&mut [IoBuf<'_>]); 4] = [
            |bufs| bufs.reverse(),
            |bufs| bufs.fill(IoBuf::new(&[])),
            |bufs| bufs.fill(IoBuf::new(b"x")),
            |bufs| bufs.fill(IoBuf::new(&[7; 100])),
        ];
        for (cut, change) in (0..=30).flat_map(|cut| changes.map(|change| (cut, change))) {
            let mut bufs = [IoBuf::new(&bytes[..5]), IoBuf::new(&bytes[5..10]), IoBuf::new(&bytes[10..])];
            let mut rest = &mut bufs[..];
            take_first(&mut rest, cut, change);
            let mut found = vec![0; total(rest).unwrap() as usize];
            gather(rest, &mut found);
            assert_eq!(found, bytes[cut..], "cut at {cut}");
        }
    }

    #[test]
    fn more_buffers_than_the_kernel_takes() {
        use std::os::fd::AsFd;

        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        let mut bufs: Vec<_> = bytes.chunks(2).map(IoBuf::new).collect();
        assert_eq!(lens(&bufs).len(), 2500);
        write_all_at(file.as_fd(), &mut &mut bufs[..], 100).unwrap();
        let mut found = vec![0; 5000];
        let mut bufs: Vec<_> = found.chunks_mut(1).map(IoBufMut::new).collect();
        read_all_at(file.as_fd(), &mut &mut bufs[..], 100).unwrap();
        assert_eq!(found, bytes);
        let beyond = read_all_at(file.as_fd(), &mut &mut [IoBufMut::new(&mut found)][..], 101);
        assert_eq!(beyond.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        read_all_at(file.as_fd(), &mut &mut [IoBufMut::new(&mut [])][..], 1 << 40).unwrap();
    }
}
