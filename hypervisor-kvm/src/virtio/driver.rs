//! A driver for tests: what drivers of all devices do in the same way.

use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::core::{Effect, Step};
use super::device::Device;
use super::mmio::Mmio;
use crate::memory::{self, Memory};

pub(super) const QUEUE_SIZE: u16 = 64;
/// From here on the memory is the test's.
pub(super) const BUFFERS: u64 = 0x4_0000;
/// The parts of a queue, from where it begins.
const QUEUE_LEN: u64 = 0x8000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

const NEXT: u16 = 1;
/// The flag of a descriptor that the device writes to.
pub(super) const WRITE: u16 = 2;

const EVENT_IDX: u64 = 1 << 29;
const NEEDS_RESET: u32 = 64;

pub(super) struct Driver {
    pub(super) memory: Memory,
    pub(super) device: Mmio,
    /// How many chains were made available to each queue.
    offered: Vec<u16>,
}

impl Driver {
    /// The driver of a device with so many queues, in a machine of 4 MiB. It accepts all that is offered but for
    /// the features in `without`, and event indices, so that all that is done asks for an interrupt.
    pub(super) fn new(device: impl Device + 'static, queues: usize, without: u64) -> Self {
        let memory = memory::allocate(NonZeroU32::new(4).unwrap()).unwrap();
        let mut driver = Self { memory, device: Mmio::new(device), offered: vec![0; queues] };
        driver.begin(without);
        driver
    }

    /// One that accepts event indices, too.
    pub(super) fn with_event_indices(device: impl Device + 'static, queues: usize) -> Self {
        let mut driver = Self::new(device, queues, 0);
        driver.begin_without(0);
        driver
    }

    /// Resets the device and begins anew.
    pub(super) fn begin(&mut self, without: u64) {
        self.begin_without(without | EVENT_IDX);
    }

    fn begin_without(&mut self, without: u64) {
        for status in [0, 1, 3] {
            self.set(reg::VIRTIO_MMIO_STATUS, status);
        }
        for half in 0..2 {
            self.set(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            let offered = self.get(reg::VIRTIO_MMIO_DEVICE_FEATURES);
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let without = (without >> (32 * half)) as u32;
            self.set(reg::VIRTIO_MMIO_DRIVER_FEATURES, offered & !without);
        }
        self.set(reg::VIRTIO_MMIO_STATUS, 11);
        for n in 0..self.offered.len() {
            let at = queue_at(n);
            self.memory.write_slice(&[0; QUEUE_LEN as usize], GuestAddress(at)).unwrap();
            self.set(reg::VIRTIO_MMIO_QUEUE_SEL, n as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into());
            self.set(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, at as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, (at + AVAILABLE) as u32);
            self.set(reg::VIRTIO_MMIO_QUEUE_USED_LOW, (at + USED) as u32);
            assert_eq!(self.set(reg::VIRTIO_MMIO_QUEUE_READY, 1), Effect::None);
        }
        assert_eq!(self.set(reg::VIRTIO_MMIO_STATUS, 15), Effect::Notify);
        self.offered.fill(0);
    }

    pub(super) fn set(&mut self, register: u32, value: u32) -> Effect {
        self.device.write(&self.memory, register.into(), &value.to_le_bytes())
    }

    pub(super) fn get(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.device.read(register.into(), &mut word, 0);
        u32::from_le_bytes(word)
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.get(reg::VIRTIO_MMIO_STATUS) & NEEDS_RESET != 0
    }

    pub(super) fn step(&mut self, queue: usize) -> Step {
        self.device.step(&self.memory, queue)
    }

    /// Writes the `n`th descriptor of a queue.
    pub(super) fn describe(&self, queue: usize, n: u16, (address, len, flags): (u64, u32, u16)) {
        let descriptor = queue_at(queue) + 16 * u64::from(n);
        self.memory.write_obj(address, GuestAddress(descriptor)).unwrap();
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(n + 1) << 48;
        self.memory.write_obj(rest, GuestAddress(descriptor + 8)).unwrap();
    }

    /// Makes a chain of these descriptors available, whose first is number `head`.
    pub(super) fn offer(&mut self, queue: usize, head: u16, chain: &[(u64, u32, u16)]) {
        let at = queue_at(queue);
        for (n, (address, len, flags)) in (head..).zip(chain.iter().copied()) {
            let next = if usize::from(n - head) + 1 < chain.len() { NEXT } else { 0 };
            self.describe(queue, n, (address, len, flags | next));
        }
        let sent = &mut self.offered[queue];
        let slot = at + AVAILABLE + 4 + 2 * u64::from(*sent % QUEUE_SIZE);
        *sent = sent.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory.write_obj(*sent, GuestAddress(at + AVAILABLE + 2)).unwrap();
    }

    /// Whether the device has asked, by the event index, to be notified of the next chain.
    pub(super) fn is_asked(&self, queue: usize) -> bool {
        let event = GuestAddress(queue_at(queue) + USED + 4 + 8 * u64::from(QUEUE_SIZE));
        self.memory.read_obj::<u16>(event).unwrap() == self.offered[queue]
    }

    /// How many chains of a queue were used.
    pub(super) fn used(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(queue_at(queue) + USED + 2)).unwrap()
    }

    /// The head of the `n`th chain that was used, and how many bytes were written to it.
    pub(super) fn used_chain(&self, queue: usize, n: u16) -> (u16, usize) {
        let element = GuestAddress(queue_at(queue) + USED + 4 + 8 * u64::from(n % QUEUE_SIZE));
        let [head, len] = self.memory.read_obj::<[u32; 2]>(element).unwrap();
        (head as u16, len as usize)
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// Steps until all that was begun has ended, and says what came of it in all.
pub(super) fn to_the_end<D>(
    device: &mut D,
    mut step: impl FnMut(&mut D) -> Step,
    ended: impl Fn(&mut D) -> Option<Arc<OwnedFd>>,
) -> Step {
    let mut all = Step::Idle;
    loop {
        match (step(device), all) {
            (Step::Idle, _) => {
                let Some(ended) = ended(device) else { return all };
                poll(&mut [PollFd::new(&ended, PollFlags::IN)], None).unwrap();
            }
            (broken @ Step::Broken(_), _) => return broken,
            (Step::Served { interrupt: false }, Step::Served { .. }) => {}
            (served, _) => all = served,
        }
    }
}

fn queue_at(n: usize) -> u64 {
    0x1000 + QUEUE_LEN * n as u64
}
