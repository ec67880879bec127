//! A device on virtio-mmio, wired up: its registers, and an interrupt that is a line.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::VmFd;
use virtio_bindings::virtio_mmio as reg;

use super::chain::Malformed;
use super::core::{Effect, Step};
use super::device::Device;
use super::mmio::{Mmio, MmioState};
use crate::layout;
use crate::memory::Memory;

/// The registers of the interrupt, which are used while requests are served, need no lock.
#[derive(Debug)]
pub(super) struct OnMmio {
    registers: Mutex<Mmio>,
    status: AtomicU32,
    /// The line of the interrupt.
    irq: u32,
}

impl OnMmio {
    /// As the `n`th device of a machine.
    pub(super) fn new(n: usize, device: impl Device + 'static) -> Self {
        Self { registers: Mutex::new(Mmio::new(device)), status: AtomicU32::new(0), irq: irq(n) }
    }

    /// The registers and the interrupt status as they are now.
    pub(super) fn save(&self) -> (MmioState, u32) {
        let registers = self.lock();
        (registers.save(), self.status.load(Ordering::Acquire))
    }

    /// Goes on where a device was saved. An interrupt that the driver has not acknowledged is raised again: it
    /// may have been on its way.
    pub(super) fn restore(
        &self,
        vm: &VmFd,
        memory: &Memory,
        state: &MmioState,
        status: u32,
    ) -> Result<(), Malformed> {
        let mut registers = self.lock();
        registers.restore(memory, state)?;
        let pending = status & (reg::VIRTIO_MMIO_INT_VRING | reg::VIRTIO_MMIO_INT_CONFIG);
        if pending != 0 {
            self.raise(vm, &registers, pending);
        }
        Ok(())
    }

    pub(super) fn queues(&self) -> usize {
        self.lock().queues()
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let status = self.status.load(Ordering::Acquire);
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset == u64::from(reg::VIRTIO_MMIO_INTERRUPT_STATUS) => {
                *word = status.to_le_bytes();
            }
            _ => self.lock().read(offset, data, status),
        }
    }

    pub(super) fn write(&self, vm: &VmFd, memory: &Memory, offset: u64, data: &[u8]) -> Effect {
        if let (true, Ok(bits)) =
            (offset == u64::from(reg::VIRTIO_MMIO_INTERRUPT_ACK), <[u8; 4]>::try_from(data))
        {
            self.status.fetch_and(!u32::from_le_bytes(bits), Ordering::AcqRel);
            return Effect::None;
        }
        let mut registers = self.lock();
        let effect = registers.write(memory, offset, data);
        match effect {
            // Under the lock, so that no interrupt of before the reset follows it.
            Effect::Reset => self.status.store(0, Ordering::Release),
            Effect::Broken(_) => self.raise(vm, &registers, reg::VIRTIO_MMIO_INT_CONFIG),
            Effect::None | Effect::Notify => {}
        }
        effect
    }

    /// See [`Device::ended`].
    pub(super) fn ended(&self) -> Option<Arc<OwnedFd>> {
        self.lock().ended()
    }

    pub(super) fn step(&self, vm: &VmFd, memory: &Memory, queue: usize) -> Step {
        let mut registers = self.lock();
        let step = registers.step(memory, queue);
        self.tell(vm, &registers, step)
    }

    pub(super) fn settle(&self, vm: &VmFd, memory: &Memory, queue: usize) -> Step {
        let mut registers = self.lock();
        let step = registers.settle(memory, queue);
        self.tell(vm, &registers, step)
    }

    /// Tells the driver of what was done.
    fn tell(&self, vm: &VmFd, registers: &MutexGuard<'_, Mmio>, step: Step) -> Step {
        match step {
            Step::Served { interrupt: true } => self.raise(vm, registers, reg::VIRTIO_MMIO_INT_VRING),
            Step::Broken(_) => self.raise(vm, registers, reg::VIRTIO_MMIO_INT_CONFIG),
            Step::Served { interrupt: false } | Step::Idle => {}
        }
        step
    }

    /// See [`Device::due_in`].
    pub(super) fn due_in(&self) -> Option<Duration> {
        self.lock().due_in()
    }

    /// The machine has ended.
    pub(super) fn end(&self) {
        self.lock().end();
    }

    /// Tells the driver of a configuration that has changed.
    pub(super) fn refresh(&self, vm: &VmFd) {
        let mut registers = self.lock();
        if registers.refresh() {
            self.raise(vm, &registers, reg::VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// Raises the interrupt, which is an edge: the line goes up and down again. Who does so has the registers, so that no
    /// other's edge is in the middle of it, where it would be none.
    ///
    /// By a call and not by an eventfd (irqfd): of a line, KVM lets a thread of its own take that up, which has to be
    /// woken for every interrupt.
    fn raise(&self, vm: &VmFd, _registers: &MutexGuard<'_, Mmio>, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        for level in [true, false] {
            // Fails only for a line that there is not.
            let _ = vm.set_irq_line(self.irq, level);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Mmio> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the registers of the `n`th device are.
pub(crate) fn address(n: usize) -> u64 {
    layout::VIRTIO + n as u64 * layout::VIRTIO_LEN
}

/// The interrupt of the `n`th device.
pub(crate) fn irq(n: usize) -> u32 {
    layout::VIRTIO_IRQS[n]
}
