//! The kernel's own queue, io_uring, for reads of files.
//!
//! Writes do not go there: those to the page cache are handed on to threads of the kernel, one at a time for
//! each file, and that was measured to take half as long again as threads of our own.
#![allow(unsafe_code, reason = "the kernel is told addresses and descriptors")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::types::Fd;
use io_uring::{IoUring, Probe, opcode};

use super::request::Memory;
use super::signal::Event;

/// What the kernel does at once of one request; it may do less at any time.
const PART: usize = 1 << 30;
const IOV_MAX: usize = 1024;

/// A ring that signals an event.
pub(super) struct Ring {
    ring: IoUring,
    /// Entries that were pushed and have not ended.
    running: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("running", &self.running).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring of at least so many entries, if the kernel lets this process have one that can do what is needed.
    pub(super) fn new(depth: u32, event: &Event) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(depth.next_power_of_two())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Readv::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(event.fd().as_raw_fd())?;
        let mut ring = Self { ring, running: 0 };
        ring.signals(false);
        Ok(ring)
    }

    /// Whether the event is signalled when something ends.
    pub(super) fn signals(&mut self, on: bool) {
        let completion = self.ring.completion();
        if on { completion.enable_eventfd() } else { completion.disable_eventfd() }
    }

    pub(super) fn running(&self) -> usize {
        self.running
    }

    /// Puts a read in line: its first gibibyte, if it is longer. `memory` is not empty.
    ///
    /// # Safety
    ///
    /// Until `slot` comes out of [`collect`](Self::collect), `file` stays open, the memory stays valid and
    /// `memory` stays as it is, though it may be moved. There is room in the ring: no more entries are
    /// running than its depth allows.
    pub(super) unsafe fn push(
        &mut self,
        slot: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        memory: &mut Memory,
    ) {
        let fd = Fd(file.as_raw_fd());
        let entry = match &*memory.pieces() {
            [one] => opcode::Read::new(fd, one.start(), one.len().min(PART) as u32).offset(offset).build(),
            many => {
                let count = many.len().min(IOV_MAX) as u32;
                opcode::Readv::new(fd, many.as_ptr().cast(), count).offset(offset).build()
            }
        };
        // SAFETY: descriptor and memory are valid until the entry has ended, as the caller has promised.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) };
        debug_assert!(pushed.is_ok(), "more requests than the ring has entries");
        self.running += 1;
    }

    /// Tells the kernel of what was pushed.
    pub(super) fn submit(&mut self) {
        self.enter(0);
    }

    /// Waits until something has ended, or returns early.
    pub(super) fn wait(&mut self) {
        self.enter(usize::from(self.running > 0));
    }

    fn enter(&mut self, want: usize) {
        if want == 0 && !self.unsent() {
            return;
        }
        // What a signal or a lack of memory keeps back is sent by the next call.
        if let Err(error) = self.ring.submit_and_wait(want) {
            tracing::trace!(%error, "the kernel took no requests");
        }
    }

    /// Whether there is something that the kernel has not taken.
    pub(super) fn unsent(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Takes what has ended: the slot, and how many bytes were done, or the error's number.
    pub(super) fn collect(&mut self, mut each: impl FnMut(usize, Result<usize, i32>)) {
        if self.running == 0 {
            return;
        }
        for entry in self.ring.completion() {
            self.running -= 1;
            let result = usize::try_from(entry.result()).map_err(|_| -entry.result());
            each(entry.user_data() as usize, result);
        }
    }
}

impl Drop for Ring {
    /// Waits for all requests: the kernel uses their memory until then.
    fn drop(&mut self) {
        while self.running > 0 {
            self.wait();
            self.collect(|_, _| ());
        }
    }
}
