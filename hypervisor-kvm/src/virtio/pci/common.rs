//! The common configuration, `struct virtio_pci_common_cfg` (virtio 1.2, 4.1.4.3).

use super::super::core::Effect;
use super::super::half::{half, set_half};
use super::super::ring::Description;
use super::{NO_VECTOR, Pci};
use crate::memory::Memory;

// Where its fields are.
const OFFERED_SELECT: u64 = 0;
const OFFERED: u64 = 4;
const ACCEPTED_SELECT: u64 = 8;
const ACCEPTED: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
const QUEUES: u64 = 18;
const STATUS: u64 = 20;
const GENERATION: u64 = 21;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const DESCRIPTORS: u64 = 32;
const DESCRIPTORS_HIGH: u64 = 36;
const AVAILABLE: u64 = 40;
const AVAILABLE_HIGH: u64 = 44;
const USED: u64 = 48;
const USED_HIGH: u64 = 52;

impl Pci {
    /// A field of the common configuration, which is read in its own width (4.1.3.1); wider ones in halves.
    pub(super) fn read_common(&self, at: u64, data: &mut [u8]) {
        let queue = usize::from(self.queue_select);
        let described = self.core.described(queue);
        let of_queue = |value: fn(&Description) -> u64| described.map_or(0, value);
        let (value, width) = match at {
            OFFERED_SELECT => (self.offered_select.into(), 4),
            OFFERED => (half(self.core.offered(), self.offered_select).into(), 4),
            ACCEPTED_SELECT => (self.accepted_select.into(), 4),
            ACCEPTED => (half(self.core.accepted(), self.accepted_select).into(), 4),
            CONFIG_VECTOR => (self.config_vector.into(), 2),
            QUEUES => (self.core.queues() as u64, 2),
            STATUS => (self.core.status().into(), 1),
            GENERATION => (self.core.generation().into(), 1),
            QUEUE_SELECT => (self.queue_select.into(), 2),
            QUEUE_SIZE => (of_queue(|queue| queue.size.into()), 2),
            QUEUE_VECTOR => (self.queue_vectors.get(queue).copied().unwrap_or(NO_VECTOR).into(), 2),
            QUEUE_ENABLE => (self.core.queue_ready(queue).into(), 2),
            DESCRIPTORS => (of_queue(|queue| queue.descriptors), 8),
            DESCRIPTORS_HIGH => (of_queue(|queue| queue.descriptors) >> 32, 4),
            AVAILABLE => (of_queue(|queue| queue.available), 8),
            AVAILABLE_HIGH => (of_queue(|queue| queue.available) >> 32, 4),
            USED => (of_queue(|queue| queue.used), 8),
            USED_HIGH => (of_queue(|queue| queue.used) >> 32, 4),
            // Notifications are all at the first place.
            _ => (0, 8),
        };
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(&bytes[..width]).for_each(|(to, from)| *to = *from);
    }

    pub(super) fn write_common(&mut self, memory: &Memory, at: u64, data: &[u8]) -> Effect {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let value = u64::from_le_bytes(bytes);
        let queue = usize::from(self.queue_select);
        match (at, data.len()) {
            (OFFERED_SELECT, 4) => self.offered_select = value as u32,
            (ACCEPTED_SELECT, 4) => self.accepted_select = value as u32,
            (ACCEPTED, 4) => {
                let select = self.accepted_select;
                self.core.accept(|accepted| set_half(accepted, select, value as u32));
            }
            (CONFIG_VECTOR, 2) => self.config_vector = self.vector(value as u16),
            (STATUS, 1) => return self.set_status(value as u32),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_SIZE, 2) => {
                return self.core.describe(queue, |queue| queue.size = value as u32);
            }
            (QUEUE_VECTOR, 2) => {
                let vector = self.vector(value as u16);
                self.queue_vectors.iter_mut().skip(queue).take(1).for_each(|of_queue| *of_queue = vector);
            }
            // A driver never writes zero here (4.1.4.3.2): a queue ends with a reset.
            (QUEUE_ENABLE, 2) if value == 1 => {
                return self.core.set_ready(memory, queue, true);
            }
            (at, len @ (4 | 8)) => return self.write_address(at, len, value),
            _ => {}
        }
        Effect::None
    }

    fn write_address(&mut self, at: u64, len: usize, value: u64) -> Effect {
        let (field, high): (fn(&mut Description) -> &mut u64, bool) = match at {
            DESCRIPTORS => (|queue| &mut queue.descriptors, false),
            DESCRIPTORS_HIGH => (|queue| &mut queue.descriptors, true),
            AVAILABLE => (|queue| &mut queue.available, false),
            AVAILABLE_HIGH => (|queue| &mut queue.available, true),
            USED => (|queue| &mut queue.used, false),
            USED_HIGH => (|queue| &mut queue.used, true),
            _ => return Effect::None,
        };
        self.core.describe(usize::from(self.queue_select), |queue| match (len, high) {
            (8, false) => *field(queue) = value,
            _ => set_half(field(queue), u32::from(high), value as u32),
        })
    }

    fn set_status(&mut self, value: u32) -> Effect {
        let effect = self.core.set_status(value);
        if effect == Effect::Reset {
            (self.offered_select, self.accepted_select, self.queue_select) = (0, 0, 0);
            self.config_vector = NO_VECTOR;
            self.queue_vectors.fill(NO_VECTOR);
            self.msix.clear();
        }
        effect
    }
}
