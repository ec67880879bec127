//! Devices as the guest sees them: virtio on virtio-mmio.
//!
//! [`block`] and other [`device`]s, the [`core`] that drives them and the registers in [`mmio`] are
//! functions of what they are given; here are the descriptors and the thread that drive them.

mod block;
mod chain;
mod core;
mod device;
mod mmio;
mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

use self::core::Effect;
pub(crate) use self::core::Step;
use crate::error::{HostContext, Result};
use crate::gate::Gate;
use crate::layout;
use crate::memory::Memory;
pub(crate) use block::Block;
use chain::Malformed;
pub(crate) use device::Device;
pub(crate) use mmio::Mmio;

/// A device: its registers, which any vCPU may access, and its requests, which one thread serves.
///
/// A request is served under the registers' lock, so that a reset waits for the one under way, as
/// the driver expects. The registers of the interrupt, which are used while requests run, and the
/// notification, which KVM handles, need no lock.
#[derive(Debug)]
pub(crate) struct VirtioDevice {
    registers: Mutex<Mmio>,
    memory: Memory,
    interrupt_status: AtomicU32,
    interrupt: EventFd,
    notification: EventFd,
    /// A rule was broken before, so that a guest cannot fill the embedder's log.
    warned: AtomicBool,
}

impl VirtioDevice {
    /// The `n`th device of a machine.
    pub(crate) fn new(vm: &VmFd, memory: &Memory, n: usize, device: impl Device + 'static) -> Result<Self> {
        let interrupt =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
        vm.register_irqfd(&interrupt, irq(n)).host("KVM did not take a device's interrupt")?;
        let notification = EventFd::new(libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
        let address = IoEventAddress::Mmio(address(n) + u64::from(reg::VIRTIO_MMIO_QUEUE_NOTIFY));
        // Whichever queue is notified: the thread looks at all of them.
        vm.register_ioevent(&notification, &address, NoDatamatch)
            .host("KVM did not take a device's notification")?;
        Ok(Self {
            registers: Mutex::new(Mmio::new(device)),
            memory: memory.clone(),
            interrupt_status: AtomicU32::new(0),
            interrupt,
            notification,
            warned: AtomicBool::new(false),
        })
    }

    /// The guest reads a register.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let status = self.interrupt_status.load(Ordering::Acquire);
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset == u64::from(reg::VIRTIO_MMIO_INTERRUPT_STATUS) => {
                *word = status.to_le_bytes()
            }
            _ => self.lock().read(offset, data, status),
        }
    }

    /// The guest writes a register.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        if let (true, Ok(bits)) =
            (offset == u64::from(reg::VIRTIO_MMIO_INTERRUPT_ACK), <[u8; 4]>::try_from(data))
        {
            self.interrupt_status.fetch_and(!u32::from_le_bytes(bits), Ordering::AcqRel);
            return;
        }
        let mut registers = self.lock();
        match registers.write(&self.memory, offset, data) {
            Effect::None => {}
            Effect::Notify => self.wake(),
            // Under the lock, so that no interrupt of before the reset follows it.
            Effect::Reset => self.interrupt_status.store(0, Ordering::Release),
            Effect::Broken(why) => self.broken(why),
        }
    }

    /// Has [`serve`](Self::serve) look at the queues and at the gate.
    pub(crate) fn wake(&self) {
        // Fails only where the counter is full, and then it is being read.
        let _ = self.notification.write(1);
    }

    /// Serves requests until the machine ends. One thread calls this.
    pub(crate) fn serve(&self, gate: &Gate) -> io::Result<()> {
        while gate.pass() {
            if self.step() {
                continue;
            }
            match self.notification.read() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Does a piece of work on each queue; false if there is none.
    fn step(&self) -> bool {
        let queues = self.lock().queues();
        // Each under a lock of its own, so that the driver gets in between.
        (0..queues).map(|queue| self.step_queue(queue)).fold(false, |any, worked| any | worked)
    }

    fn step_queue(&self, queue: usize) -> bool {
        let mut registers = self.lock();
        match registers.step(&self.memory, queue) {
            Step::Idle => return false,
            Step::Served { interrupt: true } => self.raise(reg::VIRTIO_MMIO_INT_VRING),
            Step::Served { interrupt: false } => {}
            Step::Broken(why) => self.broken(why),
        }
        true
    }

    fn broken(&self, why: Malformed) {
        if self.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(%why, "a guest's driver broke the rules again");
        } else {
            tracing::warn!(%why, "a guest's driver broke the rules; its device waits for a reset");
        }
        self.raise(reg::VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.interrupt_status.fetch_or(bit, Ordering::AcqRel);
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
    layout::VIRTIO_IRQ + n as u32
}
