//! A queue between driver and device: how the driver describes it, and how the device works on it.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, Malformed};
use crate::memory::Memory;

/// The most descriptors of a queue.
pub(crate) const QUEUE_SIZE: u16 = 256;

const RING: Malformed = Malformed("the available ring's index is impossible");

/// A queue, with what the driver has said of it so far.
#[derive(Debug)]
pub(crate) struct Ring {
    queue: Queue,
    described: Description,
}

/// Where the driver says that a queue is, and of what size: taken over when it is made ready.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) size: u32,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

impl Description {
    /// Of the largest size there is, which a driver may leave as it is.
    fn new() -> Self {
        Self { size: QUEUE_SIZE.into(), descriptors: 0, available: 0, used: 0 }
    }
}

impl Ring {
    /// A queue that nobody has described yet.
    pub(crate) fn new() -> Self {
        Self { queue: new_queue(), described: Description::new() }
    }

    pub(crate) fn ready(&self) -> bool {
        self.queue.ready()
    }

    pub(crate) fn described(&self) -> &Description {
        &self.described
    }

    /// Changes the description; fails where the queue is in use.
    pub(crate) fn describe(&mut self, change: impl FnOnce(&mut Description)) -> Result<(), Malformed> {
        if self.ready() {
            return Err(Malformed("the queue was changed while it was in use"));
        }
        change(&mut self.described);
        Ok(())
    }

    /// Takes the queue over as it is described, if it can be one.
    pub(crate) fn make_ready(&mut self, memory: &Memory, event_idx: bool) -> Result<(), Malformed> {
        if self.ready() {
            return Ok(());
        }
        let queue = self.as_described(memory, event_idx);
        self.queue = queue.ok_or(Malformed("the queue's size or place is impossible"))?;
        Ok(())
    }

    /// The driver takes the queue back.
    pub(crate) fn stop(&mut self) {
        self.queue = new_queue();
    }

    fn as_described(&self, memory: &Memory, event_idx: bool) -> Option<Queue> {
        let mut queue = new_queue();
        queue.try_set_size(u16::try_from(self.described.size).ok()?).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.described.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.described.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.described.used)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }

    /// The queue at work.
    pub(crate) fn run<'a>(&'a mut self, memory: &'a Memory) -> Running<'a> {
        Running { queue: &mut self.queue, memory, used: false }
    }
}

/// A queue that is ready, in the hands of its device.
pub(crate) struct Running<'a> {
    queue: &'a mut Queue,
    memory: &'a Memory,
    used: bool,
}

impl Running<'_> {
    pub(crate) fn memory(&self) -> &Memory {
        self.memory
    }

    /// The next chain that the driver has made available. None until its next notification, which has
    /// been asked for.
    pub(crate) fn next(&mut self) -> Result<Option<Chain>, Malformed> {
        loop {
            if let Some(next) = self.queue.iter(self.memory).map_err(|_| RING)?.next() {
                // Not the size that the driver gave the queue: a table of its own may have more descriptors.
                return Chain::read(self.memory, next, usize::from(QUEUE_SIZE)).map(Some);
            }
            if !self.queue.enable_notification(self.memory).map_err(|_| RING)? {
                return Ok(None);
            }
        }
    }

    /// Gives a chain back to the driver, with so many bytes written to it.
    pub(crate) fn put_used(&mut self, chain: &Chain, written: u32) -> Result<(), Malformed> {
        self.used = true;
        self.queue.add_used(self.memory, chain.head, written).map_err(|_| RING)
    }

    /// Whether the driver wants to hear of what was put into the used ring (virtio 1.2, 2.7.7).
    pub(crate) fn wants_interrupt(self) -> Result<bool, Malformed> {
        const NO_INTERRUPT: u16 = 1 << 0;
        if !self.used {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(self.memory).map_err(|_| RING);
        }
        let flags = self.memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Acquire);
        Ok(flags.map_err(|_| RING)? & NO_INTERRUPT == 0)
    }
}

fn new_queue() -> Queue {
    // A constant power of two is a valid size.
    Queue::new(QUEUE_SIZE).unwrap_or_default()
}
