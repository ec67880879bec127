//! Requests on their way to a disk, with the guest's memory that they are about.
#![allow(unsafe_code, reason = "requests under way use the guest's memory, which is kept for as long")]

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use instance_core::machine::DiskSpec;
use smallvec::SmallVec;
use storage_block::{Disk, Engine, Error, IoBuf, IoBufMut, Queue, QueueOptions, Result};
use vmm_sys_util::eventfd::EventFd;

use super::super::chain::{Buffers, Malformed};
use crate::error::HostContext;
use crate::memory::Memory;

/// The most requests of a device under way: with the least that each takes, a whole queue's descriptors.
pub(super) const DEPTH: u32 = 128;

/// The most descriptors of a line: an event, a timer, one that waits for both, a ring, and one to be waited for by others.
const DESCRIPTORS: usize = 5;

/// Fails where the process has not the descriptors that serving these disks takes, all of them at once. A guest's first
/// request takes them. They are only tried here, and not a whole line: to unmap its ring, or the stack of its thread, the
/// host's kernel asks every virtual machine of the process, so that a thousandth machine would wait for all the others.
pub(crate) fn check_descriptors<'a>(
    disks: impl IntoIterator<Item = &'a DiskSpec>,
) -> crate::error::Result<()> {
    let mut tried = Vec::new();
    for spec in disks {
        let context = format!("disk {:?} cannot be served", spec.serial);
        for _ in 0..DESCRIPTORS {
            tried.push(EventFd::new(libc::EFD_CLOEXEC).host(&context)?);
        }
    }
    Ok(())
}

/// A disk's queue. It is made when it is first used, since most of what it takes is no use to an idle disk.
///
/// Dropping it waits for what has begun, after which nobody reads the guest's memory or writes to it.
#[derive(Debug)]
pub(super) struct Line {
    // Declared before the memory, and so dropped before it: dropping it waits.
    queue: Queue,
    memory: Memory,
    /// The queue's descriptor, which somebody may wait for while the queue goes.
    ended: Arc<OwnedFd>,
}

/// Where the data of a request lies: mostly in one or two pieces.
type Pieces<T> = SmallVec<[T; 4]>;

impl Line {
    /// Served by the engine that was chosen before, or else by the best that is to be had, which is told.
    pub(super) fn new(
        disk: &Disk,
        memory: &Memory,
        chosen: &OnceLock<Engine>,
        serial: &[u8],
    ) -> Result<Self> {
        let options = chosen.get().copied().into_iter().fold(QueueOptions::new(DEPTH), QueueOptions::engine);
        let mut queue = disk.queue_with(&options)?;
        if chosen.set(queue.engine()).is_ok() {
            let serial = serial.split(|byte| *byte == 0).next().unwrap_or_default().escape_ascii();
            tracing::info!(%serial, engine = ?queue.engine(), "a guest's disk is served");
        }
        let ended = queue.fd().try_clone_to_owned();
        let ended = ended.map_err(|e| Error::io(e, "cannot duplicate the descriptor of a disk's queue"))?;
        queue.unwatch();
        Ok(Self { queue, memory: memory.clone(), ended: Arc::new(ended) })
    }

    /// Begins to fill the first `len` bytes of `to` with those at `offset`.
    pub(super) fn read(&mut self, token: u64, offset: u64, to: &Buffers, len: u64) -> Result<(), Malformed> {
        let mut bufs = Pieces::new();
        to.slices(&self.memory, 0, len, |start, len| {
            // SAFETY: the memory is mapped for as long as this line keeps it, no reference to it is ever made, and
            // whoever else uses it is the guest, or does so by volatile access.
            bufs.push(unsafe { IoBufMut::from_raw(start, len) });
        })?;
        // SAFETY: the buffers lie in `self.memory`, which is neither replaced nor dropped before the queue is.
        unsafe { self.queue.read_raw(token, offset, &mut bufs) };
        Ok(())
    }

    /// Begins to write `len` bytes of `from`, from its byte `skip` on, at `offset`.
    pub(super) fn write(
        &mut self,
        token: u64,
        offset: u64,
        from: &Buffers,
        skip: u64,
        len: u64,
    ) -> Result<(), Malformed> {
        let mut bufs = Pieces::new();
        from.slices(&self.memory, skip, len, |start, len| {
            // SAFETY: the memory is mapped for as long as this line keeps it, and whoever changes it is the guest, or
            // does so by volatile access.
            bufs.push(unsafe { IoBuf::from_raw(start, len) });
        })?;
        // SAFETY: the buffers lie in `self.memory`, which is neither replaced nor dropped before the queue is.
        unsafe { self.queue.write_raw(token, offset, &bufs) };
        Ok(())
    }

    /// What is going to be waited for: see [`Queue::fd`].
    pub(super) fn watch(&mut self) -> Arc<OwnedFd> {
        self.queue.fd();
        self.ended.clone()
    }

    pub(super) fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }
}
