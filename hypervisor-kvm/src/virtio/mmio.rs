//! The registers of a virtio-mmio device (virtio 1.2, 4.2.2), version 2.
//!
//! A function of what the driver writes and reads: no thread, no descriptor.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio as reg;

use super::chain::Malformed;
use super::core::{Core, CoreState, Effect, Step};
use super::device::Device;
use super::half::{half, set_half};
use super::ring::{Description, QUEUE_SIZE};
use crate::memory::Memory;

/// `virt`, in memory order.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Nobody has registered a vendor id for us; zero is what devices without one say.
const VENDOR: u32 = 0;

/// The registers, with the device behind them.
#[derive(Debug)]
pub(crate) struct Mmio {
    core: Core,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u32,
}

/// The registers as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MmioState {
    pub(super) core: CoreState,
    /// The selectors: of the features that are offered, of those accepted, of the queue.
    selected: [u32; 3],
}

impl Mmio {
    /// The registers of a device that nobody has used yet.
    pub(crate) fn new(device: impl Device + 'static) -> Self {
        Self { core: Core::new(Box::new(device)), offered_select: 0, accepted_select: 0, queue_select: 0 }
    }

    /// The registers as they are now.
    pub(crate) fn save(&self) -> MmioState {
        let selected = [self.offered_select, self.accepted_select, self.queue_select];
        MmioState { core: self.core.save(), selected }
    }

    /// See [`Core::restore`].
    pub(crate) fn restore(&mut self, memory: &Memory, state: &MmioState) -> Result<(), Malformed> {
        [self.offered_select, self.accepted_select, self.queue_select] = state.selected;
        self.core.restore(memory, &state.core)
    }

    /// How many queues the device has.
    pub(crate) fn queues(&self) -> usize {
        self.core.queues()
    }

    /// See [`Core::refresh`].
    pub(crate) fn refresh(&mut self) -> bool {
        self.core.refresh()
    }

    /// See [`Device::due_in`].
    pub(crate) fn due_in(&self) -> Option<Duration> {
        self.core.due_in()
    }

    /// See [`Core::end`].
    pub(crate) fn end(&mut self) {
        self.core.end();
    }

    /// See [`Device::ended`].
    pub(crate) fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        self.core.ended()
    }

    /// See [`Core::step`].
    pub(crate) fn step(&mut self, memory: &Memory, queue: usize) -> Step {
        self.core.step(memory, queue)
    }

    /// See [`Core::settle`].
    pub(crate) fn settle(&mut self, memory: &Memory, queue: usize) -> Step {
        self.core.settle(memory, queue)
    }

    /// The driver reads at `offset`. The interrupt status, which is not kept here, is
    /// `interrupt_status`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], interrupt_status: u32) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            self.core.read_config(at, data);
        } else if let (Ok(word), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *word = self.register(offset as u32, interrupt_status).to_le_bytes();
        }
    }

    fn register(&self, offset: u32, interrupt_status: u32) -> u32 {
        let queue = self.queue_select as usize;
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.core.kind(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.core.offered(), self.offered_select),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX if queue < self.core.queues() => u32::from(QUEUE_SIZE),
            reg::VIRTIO_MMIO_QUEUE_READY => u32::from(self.core.queue_ready(queue)),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => interrupt_status,
            reg::VIRTIO_MMIO_STATUS => self.core.status(),
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.core.generation(),
            // All ones: there is no such shared memory.
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// The driver writes at `offset`. The interrupt acknowledgement is not handled here.
    pub(crate) fn write(&mut self, memory: &Memory, offset: u64, data: &[u8]) -> Effect {
        if let Some(at) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            self.core.write_config(at, data);
            return Effect::None;
        }
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return Effect::None };
        match offset as u32 {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.offered_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.accepted_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => {
                let select = self.accepted_select;
                self.core.accept(|accepted| set_half(accepted, select, value));
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY if (value as usize) < self.core.queues() => return Effect::Notify,
            reg::VIRTIO_MMIO_STATUS => {
                let effect = self.core.set_status(value);
                if effect == Effect::Reset {
                    (self.offered_select, self.accepted_select, self.queue_select) = (0, 0, 0);
                }
                return effect;
            }
            offset => return self.write_queue(memory, offset, value),
        }
        Effect::None
    }

    fn write_queue(&mut self, memory: &Memory, offset: u32, value: u32) -> Effect {
        let (field, select): (fn(&mut Description) -> &mut u64, _) = match offset {
            reg::VIRTIO_MMIO_QUEUE_READY => {
                return self.core.set_ready(memory, self.queue_select as usize, value == 1);
            }
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                return self.core.describe(self.queue_select as usize, |queue| queue.size = value);
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => (|queue| &mut queue.descriptors, 0),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => (|queue| &mut queue.descriptors, 1),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => (|queue| &mut queue.available, 0),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => (|queue| &mut queue.available, 1),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => (|queue| &mut queue.used, 0),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => (|queue| &mut queue.used, 1),
            _ => return Effect::None,
        };
        self.core.describe(self.queue_select as usize, |queue| set_half(field(queue), select, value))
    }
}
