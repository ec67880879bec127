//! The registers of a virtio-mmio device (virtio 1.2, 4.2.2), version 2, with one queue.
//!
//! A function of what the driver writes and reads: no thread, no descriptor.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::block::{Block, CONFIG_LEN, DEVICE_ID};
use super::chain::{Chain, Malformed};
use crate::memory::Memory;

/// The most descriptors of the queue.
pub(crate) const QUEUE_SIZE: u16 = 256;

/// `virt`, in memory order.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Nobody has registered a vendor id for us; zero is what devices without one say.
const VENDOR: u32 = 0;

/// The registers, with the device and its queue behind them.
#[derive(Debug)]
pub(crate) struct Transport {
    block: Block,
    offered: u64,
    config: [u8; CONFIG_LEN],
    status: u32,
    offered_select: u32,
    accepted_select: u32,
    accepted: u64,
    queue_select: u32,
    queue: Queue,
    addresses: QueueAddresses,
}

/// Where the driver says that the queue is, and of what size: taken over when it is made ready.
#[derive(Debug, Default)]
struct QueueAddresses {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// What else a register's write does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// There may be requests in the queue.
    Notify,
    /// The device was reset: no interrupt of before is pending.
    Reset,
    /// The driver broke the rules and is told by a configuration change interrupt.
    Broken(Malformed),
}

/// What [`Transport::step`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is nothing to do before the next notification.
    Idle,
    /// A request was served, and whether the driver wants to be interrupted.
    Served { interrupt: bool },
    /// As [`Effect::Broken`].
    Broken(Malformed),
}

impl Transport {
    /// The registers of a block device that nobody has used yet.
    pub(crate) fn new(block: Block) -> Self {
        let transport =
            1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        Self {
            offered: block.features() | transport,
            config: block.config(),
            block,
            status: 0,
            offered_select: 0,
            accepted_select: 0,
            accepted: 0,
            queue_select: 0,
            queue: new_queue(),
            addresses: QueueAddresses::default(),
        }
    }

    /// The driver reads at `offset`. The interrupt status, which is not kept here, is
    /// `interrupt_status`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], interrupt_status: u32) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            let config = self.config.iter().skip(at as usize);
            data.iter_mut().zip(config).for_each(|(to, from)| *to = *from);
        } else if let (Ok(word), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *word = self.register(offset as u32, interrupt_status).to_le_bytes();
        }
    }

    fn register(&self, offset: u32, interrupt_status: u32) -> u32 {
        let queue_exists = self.queue_select == 0;
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => DEVICE_ID,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, self.offered_select),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX if queue_exists => u32::from(QUEUE_SIZE),
            reg::VIRTIO_MMIO_QUEUE_READY if queue_exists => u32::from(self.queue.ready()),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => interrupt_status,
            reg::VIRTIO_MMIO_STATUS => self.status,
            // All ones: there is no such shared memory.
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// The driver writes at `offset`. The interrupt acknowledgement is not handled here.
    pub(crate) fn write(&mut self, memory: &Memory, offset: u64, data: &[u8]) -> Effect {
        // The configuration space has no field that can be written.
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return Effect::None };
        match offset as u32 {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.offered_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.accepted_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => {
                if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                    set_half(&mut self.accepted, self.accepted_select, value);
                }
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => return Effect::Notify,
            reg::VIRTIO_MMIO_STATUS => return self.set_status(value),
            offset => return self.write_queue(memory, offset, value),
        }
        Effect::None
    }

    fn write_queue(&mut self, memory: &Memory, offset: u32, value: u32) -> Effect {
        let addresses = &mut self.addresses;
        let (field, select) = match offset {
            reg::VIRTIO_MMIO_QUEUE_READY if self.queue_select == 0 => return self.set_ready(memory, value),
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                if self.queue_select != 0 || self.queue.ready() {
                    return self.live_queue_changed();
                }
                addresses.size = value;
                return Effect::None;
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => (&mut addresses.descriptors, 0),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => (&mut addresses.descriptors, 1),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => (&mut addresses.available, 0),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => (&mut addresses.available, 1),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => (&mut addresses.used, 0),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => (&mut addresses.used, 1),
            _ => return Effect::None,
        };
        if self.queue_select != 0 || self.queue.ready() {
            return self.live_queue_changed();
        }
        set_half(field, select, value);
        Effect::None
    }

    /// A write to a queue that does not exist is ignored; one to a queue in use is not.
    fn live_queue_changed(&mut self) -> Effect {
        if self.queue_select != 0 {
            return Effect::None;
        }
        self.break_down(Malformed("the queue was changed while it was in use"))
    }

    fn set_ready(&mut self, memory: &Memory, value: u32) -> Effect {
        if value != 1 {
            self.queue = new_queue();
            return Effect::None;
        }
        if self.queue.ready() {
            return Effect::None;
        }
        match self.ready_queue(memory) {
            Some(queue) => self.queue = queue,
            None => return self.break_down(Malformed("the queue's size or place is impossible")),
        }
        Effect::None
    }

    /// The queue as the driver described it, if it can be one.
    fn ready_queue(&self, memory: &Memory) -> Option<Queue> {
        let mut queue = new_queue();
        queue.try_set_size(u16::try_from(self.addresses.size).ok()?).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.addresses.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.addresses.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.addresses.used)).ok()?;
        queue.set_event_idx(self.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }

    fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.status = 0;
            self.accepted = 0;
            (self.offered_select, self.accepted_select, self.queue_select) = (0, 0, 0);
            self.queue = new_queue();
            self.addresses = QueueAddresses::default();
            return Effect::Reset;
        }
        const DRIVER_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
            | VIRTIO_CONFIG_S_DRIVER
            | VIRTIO_CONFIG_S_DRIVER_OK
            | VIRTIO_CONFIG_S_FEATURES_OK
            | VIRTIO_CONFIG_S_FAILED;
        let mut added = value & DRIVER_BITS & !self.status;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_acceptable() {
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        self.status |= added;
        // Requests may have been put into the queue before the driver was done.
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 { Effect::Notify } else { Effect::None }
    }

    fn features_are_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn break_down(&mut self, why: Malformed) -> Effect {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        Effect::Broken(why)
    }

    /// Serves the next request, if there is one and the driver is ready.
    pub(crate) fn step(&mut self, memory: &Memory) -> Step {
        const WORKING: u32 = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        const STOPPED: u32 = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        if self.status & (WORKING | STOPPED) != WORKING || !self.queue.ready() {
            return Step::Idle;
        }
        match self.try_step(memory) {
            Ok(step) => step,
            Err(why) => {
                self.break_down(why);
                Step::Broken(why)
            }
        }
    }

    fn try_step(&mut self, memory: &Memory) -> Result<Step, Malformed> {
        const RING: Malformed = Malformed("the available ring's index is impossible");
        let next = loop {
            if let Some(next) = self.queue.iter(memory).map_err(|_| RING)?.next() {
                break next;
            }
            if !self.queue.enable_notification(memory).map_err(|_| RING)? {
                return Ok(Step::Idle);
            }
        };
        // Not the size that the driver gave the queue: a table of its own may have more descriptors.
        let chain = Chain::read(memory, next, usize::from(QUEUE_SIZE))?;
        let written = self.block.serve(memory, &chain, self.accepted)?;
        self.queue.add_used(memory, chain.head, written).map_err(|_| RING)?;
        Ok(Step::Served { interrupt: self.wants_interrupt(memory).ok_or(RING)? })
    }

    /// Whether the driver wants to hear of what was just put into the used ring (virtio 1.2, 2.7.7).
    fn wants_interrupt(&mut self, memory: &Memory) -> Option<bool> {
        const NO_INTERRUPT: u16 = 1 << 0;
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(memory).ok();
        }
        let flags: u16 = memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire).ok()?;
        Some(flags & NO_INTERRUPT == 0)
    }
}

fn new_queue() -> Queue {
    // A constant power of two is a valid size.
    Queue::new(QUEUE_SIZE).unwrap_or_default()
}

/// The half of a 64-bit value that a selector names; others are zero.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
