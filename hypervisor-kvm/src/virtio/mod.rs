//! Disks as the guest sees them: virtio block devices on virtio-mmio.
//!
//! [`chain`], [`block`] and [`mmio`] are functions of what they are given; here are the descriptors
//! and the thread that drive them.

mod block;
mod chain;
mod mmio;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use instance_core::machine::DiskSpec;
use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{HostContext, Result};
use crate::gate::Gate;
use crate::layout;
use crate::memory::Memory;
pub(crate) use block::Block;
use chain::Malformed;
use mmio::Effect;
pub(crate) use mmio::{Step, Transport};

/// A disk: its registers, which any vCPU may access, and its requests, which one thread serves.
///
/// A request is served under the registers' lock, so that a reset waits for the one under way, as
/// the driver expects. The registers of the interrupt, which are used while requests run, and the
/// notification, which KVM handles, need no lock.
#[derive(Debug)]
pub(crate) struct VirtioDisk {
    transport: Mutex<Transport>,
    memory: Memory,
    interrupt_status: AtomicU32,
    interrupt: EventFd,
    notification: EventFd,
    /// A rule was broken before, so that a guest cannot fill the embedder's log.
    warned: AtomicBool,
}

impl VirtioDisk {
    /// The `n`th disk of a machine.
    pub(crate) fn new(vm: &VmFd, memory: &Memory, n: usize, spec: &DiskSpec) -> Result<Self> {
        let interrupt =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
        vm.register_irqfd(&interrupt, irq(n)).host("KVM did not take a disk's interrupt")?;
        let notification = EventFd::new(libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
        let address = IoEventAddress::Mmio(address(n) + u64::from(reg::VIRTIO_MMIO_QUEUE_NOTIFY));
        vm.register_ioevent(&notification, &address, 0u32).host("KVM did not take a disk's notification")?;
        Ok(Self {
            transport: Mutex::new(Transport::new(Block::new(spec.disk.clone(), &spec.serial))),
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
        let mut transport = self.lock();
        match transport.write(&self.memory, offset, data) {
            Effect::None => {}
            Effect::Notify => self.wake(),
            // Under the lock, so that no interrupt of before the reset follows it.
            Effect::Reset => self.interrupt_status.store(0, Ordering::Release),
            Effect::Broken(why) => self.broken(why),
        }
    }

    /// Has [`serve`](Self::serve) look at the queue and at the gate.
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

    /// Serves one request; false if there is none.
    fn step(&self) -> bool {
        let mut transport = self.lock();
        match transport.step(&self.memory) {
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
            tracing::warn!(%why, "a guest's driver broke the rules; its disk waits for a reset");
        }
        self.raise(reg::VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.interrupt_status.fetch_or(bit, Ordering::AcqRel);
        // Fails only where the interrupt has been raised very often and not been seen.
        let _ = self.interrupt.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the registers of the `n`th disk are.
pub(crate) fn address(n: usize) -> u64 {
    layout::VIRTIO + n as u64 * layout::VIRTIO_LEN
}

/// The interrupt of the `n`th disk.
pub(crate) fn irq(n: usize) -> u32 {
    layout::VIRTIO_IRQ + n as u32
}
