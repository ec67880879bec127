//! Devices as the guest sees them: virtio, on virtio-mmio or on PCI.
//!
//! [`block`] and other [`device`]s, the [`core`] that drives them and the registers in [`mmio`] and
//! [`pci`] are functions of what they are given; here, in [`on_mmio`] and in [`on_pci`] are the descriptors,
//! in [`serve`] what the thread does that drives them.

mod balloon;
#[cfg(test)]
mod balloon_tests;
mod block;
#[cfg(test)]
mod block_tests;
mod chain;
mod console;
#[cfg(test)]
mod console_tests;
mod core;
mod device;
#[cfg(test)]
mod driver;
mod half;
mod mmio;
mod net;
mod on_mmio;
mod on_pci;
mod pci;
#[cfg(test)]
mod pci_tests;
mod ring;
#[cfg(test)]
mod ring_tests;
mod rng;
mod serve;
mod state;
#[cfg(test)]
mod tests;
mod vsock;
#[cfg(test)]
mod vsock_tests;
#[cfg(test)]
mod wired_tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

pub(crate) use self::core::Effect;
#[cfg(any(test, fuzzing))]
pub(crate) use self::core::Step;
#[cfg(test)]
pub(crate) use self::pci::NOTIFY;
use crate::Transport;
use crate::error::{HostContext, Result, saved};
use crate::gate::Gate;
use crate::memory::Memory;
pub(crate) use balloon::{Balloon, Wish};
pub(crate) use block::{Block, check_descriptors};
use chain::Malformed;
pub(crate) use console::Console;
pub(crate) use device::{Device, Own};
pub use net::VhostNet;
pub(crate) use net::{KernelNet, Net, SharedSpares, Spares};
use on_mmio::OnMmio;
pub(crate) use on_mmio::{address, irq};
use on_pci::OnPci;
pub(crate) use rng::Rng;
use serve::descriptor_of;
pub(crate) use state::DeviceState;
pub(crate) use vsock::Vsock;
#[cfg(any(test, fuzzing))]
pub(crate) use {
    mmio::Mmio,
    pci::{Pci, RANGE_LEN},
    ring::{Ring, RingState, Taken},
};

/// A device: its registers, which any vCPU may access, and its requests, which one thread serves: its own, or
/// that of the vCPU whose driver notifies, where requests are few and done at once.
///
/// A request is served under the registers' lock, so that a reset waits for the one under way, as
/// the driver expects. The notification, which KVM handles, needs no lock.
#[derive(Debug)]
pub(crate) struct VirtioDevice {
    port: Port,
    memory: Memory,
    /// By which KVM wakes the device's own thread.
    notification: Option<EventFd>,
    /// It is to be served no longer.
    stopped: AtomicBool,
    /// A vCPU that served it had to stand still before all was done: see [`go_on`](Self::go_on).
    left: AtomicBool,
    /// Its configuration is to change with what is outside.
    stale: Arc<AtomicBool>,
    /// Whether that is so when a driver has come up, too: see [`telling`](Self::telling).
    tells: bool,
    /// Held by its thread while that waits for what is outside, and so holds it.
    waiting: Mutex<()>,
    /// A rule was broken before, or the like, so that a guest cannot fill the embedder's log.
    warned: AtomicBool,
}

/// By which transport the guest reaches it.
#[derive(Debug)]
enum Port {
    Mmio(OnMmio),
    Pci(Box<OnPci>),
}

impl VirtioDevice {
    /// The `n`th device of a machine, which a thread is going to [`serve`](Self::serve).
    pub(crate) fn with_thread(
        vm: &VmFd,
        memory: &Memory,
        n: usize,
        transport: Transport,
        device: impl Device + 'static,
    ) -> Result<Self> {
        let notification = EventFd::new(libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
        let device = Self::new(memory, n, transport, device);
        let heard = match &device.port {
            Port::Mmio(_) => {
                let at = IoEventAddress::Mmio(address(n) + u64::from(reg::VIRTIO_MMIO_QUEUE_NOTIFY));
                // Whichever queue is notified: the thread looks at all of them.
                vm.register_ioevent(&notification, &at, NoDatamatch)
            }
            Port::Pci(port) => port.listen(vm, &notification),
        };
        heard.host("KVM did not take a device's notification")?;
        Ok(Self { notification: Some(notification), ..device })
    }

    /// The `n`th device of a machine, whose requests are served by the vCPU that notifies.
    pub(crate) fn new(
        memory: &Memory,
        n: usize,
        transport: Transport,
        device: impl Device + 'static,
    ) -> Self {
        let port = match transport {
            Transport::Mmio => Port::Mmio(OnMmio::new(n, device)),
            Transport::Pci => Port::Pci(Box::new(OnPci::new(n, device))),
        };
        Self::behind(port, memory)
    }

    /// A device on PCI that comes to a guest that is at work, and that a thread is going to serve.
    pub(crate) fn late(memory: &Memory, device: impl Device + 'static) -> Result<Self> {
        let notification = EventFd::new(libc::EFD_CLOEXEC).host("cannot make an eventfd")?;
        let device = Self::behind(Port::Pci(Box::new(OnPci::late(device))), memory);
        Ok(Self { notification: Some(notification), ..device })
    }

    /// The same for a driver that has to be told of its configuration when it has come up: Linux's of a console does not
    /// look at the size before it hears that it has changed.
    pub(crate) fn telling(self) -> Self {
        Self { tells: true, ..self }
    }

    fn behind(port: Port, memory: &Memory) -> Self {
        Self {
            port,
            memory: memory.clone(),
            notification: None,
            stopped: AtomicBool::new(false),
            left: AtomicBool::new(false),
            stale: Arc::default(),
            tells: false,
            waiting: Mutex::default(),
            warned: AtomicBool::new(false),
        }
    }

    /// Has its thread go home, of which the gate has to be told too, and KVM forget it: the guest has it no more.
    pub(crate) fn stop(&self, vm: &VmFd) {
        self.stopped.store(true, Ordering::Release);
        if let (Port::Pci(pci), Some(notification)) = (&self.port, &self.notification) {
            pci.stop_listening(vm, notification);
        }
        self.wake();
    }

    /// The device as it is now. Nothing may be under way.
    pub(crate) fn save(&self) -> DeviceState {
        match &self.port {
            Port::Mmio(mmio) => {
                let (registers, status) = mmio.save();
                DeviceState::Mmio(registers, status)
            }
            Port::Pci(pci) => DeviceState::Pci(pci.save()),
        }
    }

    /// Goes on, as a device that nobody has used yet, where another was saved. On PCI, KVM has to [hear](Self::listen) it then.
    pub(crate) fn restore(&self, vm: &VmFd, state: &DeviceState) -> Result<()> {
        let unfit = |why: Malformed| saved("a device of the saved machine does not fit").with_source(why);
        match (&self.port, state) {
            (Port::Mmio(mmio), DeviceState::Mmio(registers, status)) => {
                mmio.restore(vm, &self.memory, registers, *status).map_err(unfit)?;
            }
            (Port::Pci(pci), DeviceState::Pci(state)) => {
                pci.restore(&self.memory, state).map_err(unfit)?;
            }
            _ => return Err(unfit(Malformed("the device is on another transport"))),
        }
        // What the driver notified of may have been on its way, or under way.
        self.left.store(!self.needs_thread(), Ordering::Release);
        self.wake();
        Ok(())
    }

    /// Whether a thread has to [`serve`](Self::serve) it.
    pub(crate) fn needs_thread(&self) -> bool {
        self.notification.is_some()
    }

    /// How far `address` is into the registers of this device on PCI, if it is.
    pub(crate) fn pci_offset_of(&self, address: u64) -> Option<u64> {
        match &self.port {
            Port::Mmio(_) => None,
            Port::Pci(pci) => pci.offset_of(address),
        }
    }

    /// The guest reads a register.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        match &self.port {
            Port::Mmio(mmio) => mmio.read(offset, data),
            Port::Pci(pci) => pci.read(offset, data),
        }
    }

    /// The guest writes a register.
    pub(crate) fn write(&self, vm: &VmFd, gate: &Gate, offset: u64, data: &[u8]) {
        let effect = match &self.port {
            Port::Mmio(mmio) => mmio.write(vm, &self.memory, offset, data),
            Port::Pci(pci) => pci.write(vm, &self.memory, offset, data),
        };
        self.follow(vm, gate, effect);
    }

    /// The guest reads PCI's configuration space, where there is one.
    pub(crate) fn read_space(&self, at: usize, data: &mut [u8]) {
        if let Port::Pci(pci) = &self.port {
            pci.read_space(at, data);
        }
    }

    /// The guest writes to it. True if that has moved the registers: KVM has then to [hear](Self::listen) it elsewhere.
    pub(crate) fn write_space(&self, vm: &VmFd, gate: &Gate, at: usize, data: &[u8]) -> bool {
        let Port::Pci(pci) = &self.port else { return false };
        let (effect, moved) = pci.write_space(vm, &self.memory, at, data);
        self.follow(vm, gate, effect);
        moved
    }

    /// Has KVM hear the notifications of a device on PCI that is served by a thread where its registers are.
    pub(crate) fn listen(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let (Port::Pci(pci), Some(notification)) = (&self.port, &self.notification) else { return Ok(()) };
        let heard = pci.listen(vm, notification);
        // It may have been stopped meanwhile.
        if self.stopped.load(Ordering::Acquire) {
            pci.stop_listening(vm, notification);
        }
        heard
    }

    /// Has KVM hear it no more where its registers are no more and somebody's are, of those at `places`.
    pub(crate) fn let_go(&self, vm: &VmFd, places: &[u64]) {
        if let (Port::Pci(pci), Some(notification)) = (&self.port, &self.notification) {
            pci.let_go(vm, notification, places);
        }
    }

    /// Where the registers are on PCI, if they are anywhere.
    pub(crate) fn pci_address(&self) -> Option<u64> {
        match &self.port {
            Port::Mmio(_) => None,
            Port::Pci(pci) => pci.address(),
        }
    }

    /// Where KVM hears it on PCI, if it does.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn notified_at(&self) -> Option<u64> {
        match &self.port {
            Port::Mmio(_) => None,
            Port::Pci(pci) => pci.notified_at(),
        }
    }

    /// KVM does not hear it, as where a guest puts one device into the place of another. It does so as often as it likes.
    pub(crate) fn is_unheard(&self, error: kvm_ioctls::Error) {
        if self.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(%error, "KVM again did not take the new place of a device's notification");
        } else {
            tracing::warn!(%error, "KVM did not take the new place of a device's notification");
        }
    }

    fn follow(&self, vm: &VmFd, gate: &Gate, effect: Effect) {
        match effect {
            Effect::Notify if self.needs_thread() => {
                self.stale.fetch_or(self.tells, Ordering::AcqRel);
                self.wake();
            }
            Effect::Notify => self.serve_on_vcpu(vm, gate),
            Effect::Broken(why) => self.warn(why),
            Effect::None | Effect::Reset => {}
        }
    }

    /// Serves until there is nothing to do: a driver that was not told to notify of what it adds relies on that. Nobody who
    /// closes the gate waits for all of it.
    fn serve_on_vcpu(&self, vm: &VmFd, gate: &Gate) {
        while gate.is_open() {
            if !self.step(vm, gate) {
                return;
            }
        }
        self.left.store(true, Ordering::Release);
    }

    /// Goes on, on a vCPU that was at the gate, with what one had to leave there.
    pub(crate) fn go_on(&self, vm: &VmFd, gate: &Gate) {
        if self.left.swap(false, Ordering::AcqRel) {
            self.serve_on_vcpu(vm, gate);
        }
    }

    /// Takes up what has changed outside, and tells the driver. Waits for a request that is under way.
    pub(crate) fn refresh(&self, vm: &VmFd) {
        match &self.port {
            Port::Mmio(mmio) => mmio.refresh(vm),
            Port::Pci(pci) => pci.refresh(vm),
        }
    }

    /// The machine has ended.
    pub(crate) fn end(&self) {
        match &self.port {
            Port::Mmio(mmio) => mmio.end(),
            Port::Pci(pci) => pci.end(),
        }
        // A driver that is still there is told of what has ended by that, and the thread lets go of what is outside.
        self.wake();
        drop(self.wait_outside());
    }

    fn wait_outside(&self) -> MutexGuard<'_, ()> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What wakes [`serve`](Self::serve) when called, from any thread and also when the device is gone.
    pub(crate) fn waker(&self) -> Result<impl Fn() + Send + Sync + 'static> {
        let notification = self.notification.as_ref().map(EventFd::try_clone).transpose();
        let notification = notification.host("cannot duplicate an eventfd")?;
        Ok(move || {
            if let Some(notification) = &notification {
                let _ = notification.write(1);
            }
        })
    }

    /// What has [`serve`](Self::serve) [`refresh`](Self::refresh) when called: as the [`waker`](Self::waker).
    pub(crate) fn refresher(&self) -> Result<impl Fn() + Send + Sync + 'static> {
        let (stale, wake) = (self.stale.clone(), self.waker()?);
        Ok(move || {
            stale.store(true, Ordering::Release);
            wake();
        })
    }

    /// Has [`serve`](Self::serve) look at the queues and at the gate.
    pub(crate) fn wake(&self) {
        if let Some(notification) = &self.notification {
            // Fails only where the counter is full, and then it is being read.
            let _ = notification.write(1);
        }
    }

    fn queues(&self) -> usize {
        match &self.port {
            Port::Mmio(mmio) => mmio.queues(),
            Port::Pci(pci) => pci.queues(),
        }
    }

    fn warn(&self, why: Malformed) {
        if self.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(%why, "a guest's driver broke the rules again");
        } else {
            tracing::warn!(%why, "a guest's driver broke the rules; its device waits for a reset");
        }
    }
}
