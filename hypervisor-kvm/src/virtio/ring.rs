//! A queue between driver and device: how the driver describes it, and how the device works on it.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::chain::{Chain, DESCRIPTOR_LEN, Malformed};
use crate::memory::Memory;

/// The most descriptors of a queue.
pub(crate) const QUEUE_SIZE: u16 = 256;

const OUTSIDE: Malformed = Malformed("the queue lies outside the memory");

/// A queue, with what the driver has said of it so far.
#[derive(Debug)]
pub(crate) struct Ring {
    queue: Queue,
    /// Whether chains may have tables of their own.
    indirect: bool,
    described: Description,
}

/// Where the driver says that a queue is, and of what size: taken over when it is made ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) size: u32,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// A queue as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RingState {
    described: Description,
    /// How far the device has come with a queue that is ready: in the available ring and in the used one.
    pub(crate) at: Option<(u16, u16)>,
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
        Self { queue: new_queue(), indirect: false, described: Description::new() }
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

    /// Takes the queue over as it is described, if it can be one, by the features that the driver accepted.
    pub(crate) fn make_ready(&mut self, memory: &Memory, features: u64) -> Result<(), Malformed> {
        if self.ready() {
            return Ok(());
        }
        let queue = self.as_described(memory, features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        self.queue = queue.ok_or(Malformed("the queue's size or place is impossible"))?;
        self.indirect = features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        Ok(())
    }

    /// The queue as it is now.
    pub(crate) fn save(&self) -> RingState {
        let at = self.ready().then(|| (self.queue.next_avail(), self.queue.next_used()));
        RingState { described: self.described, at }
    }

    /// A queue that goes on where another was saved.
    pub(crate) fn restore(state: &RingState, memory: &Memory, features: u64) -> Result<Self, Malformed> {
        let mut ring = Self { described: state.described, ..Self::new() };
        if let Some((available, used)) = state.at {
            ring.make_ready(memory, features)?;
            ring.queue.set_next_avail(available);
            ring.queue.set_next_used(used);
        }
        Ok(ring)
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
        let used_before = self.queue.next_used();
        let (queue, indirect) = (&mut self.queue, self.indirect);
        Running { queue, indirect, memory, ready: 0, descriptors: 0, used_before, interrupt: false }
    }
}

/// What is to become of a chain that [`Running::take`] has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is taken, and others may be.
    Go,
    /// It is taken, and no other is.
    Last,
    /// It stays the next one.
    Not,
}

/// A queue that is ready, in the hands of its device.
pub(crate) struct Running<'a> {
    queue: &'a mut Queue,
    indirect: bool,
    memory: &'a Memory,
    /// See [`ready`](Self::ready).
    ready: usize,
    /// How many descriptors were read.
    descriptors: usize,
    /// How far the used ring was when this began.
    used_before: u16,
    /// Whether the driver is to be interrupted whatever it waits for.
    interrupt: bool,
}

impl<'a> Running<'a> {
    pub(crate) fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// How many descriptors the driver gave it, which is as many chains as it may have.
    pub(crate) fn size(&self) -> usize {
        self.queue.size().into()
    }

    /// The same of a device whose first queues, so many, are ready.
    pub(crate) fn among(self, ready: usize) -> Self {
        Self { ready, ..self }
    }

    /// How many of the device's queues, from the first on, are ready: those behind one that is not do not count.
    pub(crate) fn ready(&self) -> usize {
        self.ready
    }

    /// How many descriptors have been read, also of chains that were not taken or were put back.
    pub(crate) fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// The next chain that the driver has made available. None until its next notification, which has
    /// been asked for.
    pub(crate) fn next(&mut self) -> Result<Option<Chain>, Malformed> {
        loop {
            let mut taken = None;
            self.take(1, |chain| {
                taken = Some(chain);
                Ok(Taken::Last)
            })?;
            if taken.is_some() || !self.ask()? {
                return Ok(taken);
            }
        }
    }

    /// The next chains that the driver has made available, as far as they are there now and `most` of them at most, and as
    /// far as `each` takes them. Says how many were taken.
    pub(crate) fn take(
        &mut self,
        most: usize,
        mut each: impl FnMut(Chain) -> Result<Taken, Malformed>,
    ) -> Result<usize, Malformed> {
        let size = self.queue.size();
        let part = |start, len| self.memory.get_slice(GuestAddress(start), len).map_err(|_| OUTSIDE);
        let available = part(self.queue.avail_ring(), 4 + 2 * usize::from(size))?;
        let index = u16::from_le(available.load(2, Ordering::Acquire).map_err(|_| OUTSIDE)?);
        let waiting = index.wrapping_sub(self.queue.next_avail());
        if waiting > size {
            return Err(Malformed("the available ring's index is impossible"));
        }
        if waiting == 0 {
            return Ok(0);
        }
        let table = part(self.queue.desc_table(), DESCRIPTOR_LEN * usize::from(size))?;
        let mut count = 0;
        for _ in 0..most.min(waiting.into()) {
            let next = self.queue.next_avail();
            let head = available.load::<u16>(4 + 2 * usize::from(next % size), Ordering::Relaxed);
            let head = u16::from_le(head.map_err(|_| OUTSIDE)?);
            let chain = Chain::read(self.memory, table, head, self.indirect)?;
            self.descriptors += chain.descriptors();
            let taken = each(chain)?;
            if taken == Taken::Not {
                break;
            }
            self.queue.set_next_avail(next.wrapping_add(1));
            count += 1;
            if taken == Taken::Last {
                break;
            }
        }
        Ok(count)
    }

    /// Asks the driver to notify of the next chain. True if it is there already.
    pub(crate) fn ask(&mut self) -> Result<bool, Malformed> {
        self.queue.enable_notification(self.memory).map_err(|_| OUTSIDE)
    }

    /// Leaves the last `count` chains to be the next ones again.
    pub(crate) fn put_back(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a chain back to the driver, with so many bytes written to it.
    pub(crate) fn put_used(&mut self, chain: &Chain, written: u32) -> Result<(), Malformed> {
        self.put_all_used([(chain.head, written)])
    }

    /// Gives chains back, each with the bytes written to it, so that the driver sees all of them at once.
    pub(crate) fn put_all_used(
        &mut self,
        chains: impl IntoIterator<Item = (u16, u32)>,
    ) -> Result<(), Malformed> {
        const ELEMENTS: usize = 4;
        let size = usize::from(self.queue.size());
        let ring = self.memory.get_slice(GuestAddress(self.queue.used_ring()), ELEMENTS + 8 * size);
        let ring = ring.map_err(|_| OUTSIDE)?;
        let mut next = self.queue.next_used();
        for (head, written) in chains {
            // `struct virtq_used_elem` (virtio 1.2, 2.7.8).
            let element = u64::from(head) | u64::from(written) << 32;
            ring.write_obj(element.to_le(), ELEMENTS + 8 * (usize::from(next) % size))
                .map_err(|_| OUTSIDE)?;
            next = next.wrapping_add(1);
        }
        ring.store(next.to_le(), 2, Ordering::Release).map_err(|_| OUTSIDE)?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Where the queue is and of what size, for somebody else to work on it; each part lies in one piece of memory, as
    /// nobody else looks.
    pub(crate) fn place(&self) -> Result<Description, Malformed> {
        let size = self.queue.size();
        let place = Description {
            size: size.into(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        };
        let size = usize::from(size);
        for (start, len) in
            [(place.descriptors, 16 * size), (place.available, 6 + 2 * size), (place.used, 6 + 8 * size)]
        {
            let piece = self.memory.get_slice(GuestAddress(start), len);
            piece.map_err(|_| OUTSIDE)?;
        }
        Ok(place)
    }

    /// Which chain is the next one, by the index of the available ring.
    pub(crate) fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Goes on from this chain, and from what is in the used ring: somebody else has worked on the queue.
    pub(crate) fn go_on_from(&mut self, next_available: u16) -> Result<(), Malformed> {
        let used = self.queue.used_idx(self.memory, Ordering::Acquire).map_err(|_| OUTSIDE)?;
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(used.0);
        Ok(())
    }

    /// Whether who works on the queue has asked to be told of what the driver has put there (virtio 1.2, 2.7.10).
    pub(crate) fn is_awaited(&self) -> Result<bool, Malformed> {
        const NO_NOTIFY: u16 = 1 << 0;
        let available = self.queue.avail_idx(self.memory, Ordering::Acquire).map_err(|_| OUTSIDE)?;
        // What was put there comes before the look at what is waited for.
        fence(Ordering::SeqCst);
        let used = self.queue.used_ring();
        let event_idx = self.queue.event_idx_enabled();
        let at = if event_idx { used + 4 + 8 * u64::from(self.queue.size()) } else { used };
        let said = self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed).map_err(|_| OUTSIDE)?;
        let said = u16::from_le(said);
        Ok(if event_idx { said != available.0 } else { said & NO_NOTIFY == 0 })
    }

    /// Who works on the queue has found that the driver wants to be interrupted.
    pub(crate) fn interrupt(&mut self) {
        self.interrupt = true;
    }

    /// Whether the driver wants to hear of what was put into the used ring (virtio 1.2, 2.7.7).
    pub(crate) fn wants_interrupt(self) -> Result<bool, Malformed> {
        const NO_INTERRUPT: u16 = 1 << 0;
        let used = self.queue.next_used();
        if self.interrupt || used == self.used_before {
            return Ok(self.interrupt);
        }
        // What was put into the used ring comes before the look at what the driver waits for.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            let event = available + 4 + 2 * u64::from(self.queue.size());
            let event =
                self.memory.load::<u16>(GuestAddress(event), Ordering::Relaxed).map_err(|_| OUTSIDE)?;
            let since_event = used.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
            return Ok(since_event < used.wrapping_sub(self.used_before));
        }
        let flags = self.memory.load::<u16>(GuestAddress(available), Ordering::Acquire);
        Ok(u16::from_le(flags.map_err(|_| OUTSIDE)?) & NO_INTERRUPT == 0)
    }
}

fn new_queue() -> Queue {
    // A constant power of two is a valid size.
    Queue::new(QUEUE_SIZE).unwrap_or_default()
}
