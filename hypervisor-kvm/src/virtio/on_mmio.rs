//! A device on virtio-mmio, wired up: its registers, and an interrupt that is a line.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::VmFd;
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

use super::chain::Malformed;
use super::core::{Effect, Step};
use super::device::Device;
use super::mmio::{Mmio, MmioState};
use crate::error::{HostContext, Result};
use crate::layout;
use crate::memory::Memory;

/// The registers of the interrupt, which are used while requests are served, need no lock.
#[derive(Debug)]
pub(super) struct OnMmio {
    registers: Mutex<Mmio>,
    status: AtomicU32,
    interrupt: EventFd,
}

impl OnMmio {
    /// As the `n`th device of a machine.
    pub(super) fn new(vm: &VmFd, n: usize, device: impl Device + 'static) -> Result<Self> {
        let interrupt =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
        vm.register_irqfd(&interrupt, irq(n)).host("KVM did not take a device's interrupt")?;
        Ok(Self { registers: Mutex::new(Mmio::new(device)), status: AtomicU32::new(0), interrupt })
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
        memory: &Memory,
        registers: &MmioState,
        status: u32,
    ) -> Result<(), Malformed> {
        self.lock().restore(memory, registers)?;
        let pending = status & (reg::VIRTIO_MMIO_INT_VRING | reg::VIRTIO_MMIO_INT_CONFIG);
        if pending != 0 {
            self.raise(pending);
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

    pub(super) fn write(&self, memory: &Memory, offset: u64, data: &[u8]) -> Effect {
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
            Effect::Broken(_) => self.raise(reg::VIRTIO_MMIO_INT_CONFIG),
            Effect::None | Effect::Notify => {}
        }
        effect
    }

    /// See [`Device::ended`].
    pub(super) fn ended(&self) -> Option<Arc<OwnedFd>> {
        self.lock().ended()
    }

    pub(super) fn step(&self, memory: &Memory, queue: usize) -> Step {
        let mut registers = self.lock();
        self.tell(registers.step(memory, queue))
    }

    pub(super) fn settle(&self, memory: &Memory, queue: usize) -> Step {
        let mut registers = self.lock();
        self.tell(registers.settle(memory, queue))
    }

    /// Tells the driver of what was done. The registers are locked.
    fn tell(&self, step: Step) -> Step {
        match step {
            Step::Served { interrupt: true } => self.raise(reg::VIRTIO_MMIO_INT_VRING),
            Step::Broken(_) => self.raise(reg::VIRTIO_MMIO_INT_CONFIG),
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
    pub(super) fn refresh(&self) {
        if self.lock().refresh() {
            self.raise(reg::VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        // Fails only where the interrupt has been raised very often and not been seen.
        let _ = self.interrupt.write(1);
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
