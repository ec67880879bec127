//! A device on PCI, wired up: its registers, wherever the guest puts them, and interrupts that are
//! messages.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Malformed;
use super::core::{Effect, Step};
use super::device::Device;
use super::pci::{Done, NOTIFY, Pci, PciState, RANGE_LEN};
use crate::layout;
use crate::memory::Memory;
use crate::pci::msix::Message;

#[derive(Debug)]
pub(super) struct OnPci {
    registers: Mutex<Pci>,
    /// Where the registers are; [`NOWHERE`] while the guest does not want them anywhere.
    address: AtomicU64,
    /// Where KVM hears notifications, if it has come to that.
    notified_at: Mutex<Option<u64>>,
}

const NOWHERE: u64 = u64::MAX;

impl OnPci {
    /// As the `n`th device of a machine, from its beginning.
    pub(super) fn new(n: usize, device: impl Device + 'static) -> Self {
        Self::at(Some(layout::PCI_MEMORY + n as u32 * RANGE_LEN), device)
    }

    /// As a device that comes to a guest that is at work, which gives it its place.
    pub(super) fn late(device: impl Device + 'static) -> Self {
        Self::at(None, device)
    }

    fn at(address: Option<u32>, device: impl Device + 'static) -> Self {
        Self {
            registers: Mutex::new(Pci::new(device, address)),
            address: AtomicU64::new(address.map_or(NOWHERE, u64::from)),
            notified_at: Mutex::default(),
        }
    }

    /// Has KVM hear no notifications any more.
    pub(super) fn stop_listening(&self, vm: &VmFd, notification: &EventFd) {
        self.stop_listening_if(vm, notification, |_| true);
    }

    /// Has KVM hear none where the registers are no more, if that is among the places of devices.
    pub(super) fn let_go(&self, vm: &VmFd, notification: &EventFd, places: &[u64]) {
        let is_anothers = |before| self.address() != Some(before) && places.contains(&before);
        self.stop_listening_if(vm, notification, is_anothers);
    }

    fn stop_listening_if(&self, vm: &VmFd, notification: &EventFd, at: impl FnOnce(u64) -> bool) {
        let mut notified_at = self.notified_at.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = notified_at.take_if(|before| at(*before)) {
            let at = IoEventAddress::Mmio(before + NOTIFY);
            if let Err(error) = vm.unregister_ioevent(notification, &at, NoDatamatch) {
                tracing::warn!(%error, "KVM did not forget a device's notification");
            }
        }
    }

    /// The registers as they are now.
    pub(super) fn save(&self) -> PciState {
        self.lock().save()
    }

    /// Goes on where a device was saved. No interrupt was on its way: they are sent at once.
    pub(super) fn restore(&self, memory: &Memory, state: &PciState) -> Result<(), Malformed> {
        let mut registers = self.lock();
        registers.restore(memory, state)?;
        self.take_place(&registers);
        Ok(())
    }

    pub(super) fn queues(&self) -> usize {
        self.lock().queues()
    }

    /// Has KVM hear notifications where the driver makes them.
    ///
    /// While the registers are nowhere it hears them where they were, until another device is there and this one is to
    /// [`let_go`](Self::let_go): a guest that looks how many registers there are takes them away for a moment, once for each
    /// range that a function might have, and KVM waits for all processors each time it forgets or learns a place.
    pub(super) fn listen(&self, vm: &VmFd, notification: &EventFd) -> Result<(), kvm_ioctls::Error> {
        let mut notified_at = self.notified_at.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock: who has it next finds where the registers are by then.
        let Some(address) = self.address().filter(|address| *notified_at != Some(*address)) else {
            return Ok(());
        };
        let at = |address: u64| IoEventAddress::Mmio(address + NOTIFY);
        if let Some(before) = notified_at.take() {
            vm.unregister_ioevent(notification, &at(before), NoDatamatch)?;
        }
        vm.register_ioevent(notification, &at(address), NoDatamatch)?;
        *notified_at = Some(address);
        Ok(())
    }

    /// Where the registers are, if they are anywhere.
    pub(super) fn address(&self) -> Option<u64> {
        let address = self.address.load(Ordering::Acquire);
        (address != NOWHERE).then_some(address)
    }

    /// Where KVM hears notifications.
    #[cfg(any(test, fuzzing))]
    pub(super) fn notified_at(&self) -> Option<u64> {
        *self.notified_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far `address` is into the registers, if it is.
    pub(super) fn offset_of(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.address.load(Ordering::Acquire))?;
        (offset < u64::from(RANGE_LEN)).then_some(offset)
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    pub(super) fn write(&self, vm: &VmFd, memory: &Memory, offset: u64, data: &[u8]) -> Effect {
        let mut registers = self.lock();
        let done = registers.write(memory, offset, data);
        finish(vm, &mut registers, done)
    }

    pub(super) fn read_space(&self, at: usize, data: &mut [u8]) {
        self.lock().read_space(at, data);
    }

    /// The guest writes to the configuration space. Says, too, whether it has moved the registers by that.
    pub(super) fn write_space(&self, vm: &VmFd, memory: &Memory, at: usize, data: &[u8]) -> (Effect, bool) {
        let mut registers = self.lock();
        let done = registers.write_space(memory, at, data);
        let moved = self.take_place(&registers);
        (finish(vm, &mut registers, done), moved)
    }

    fn take_place(&self, registers: &Pci) -> bool {
        let address = registers.range().map_or(NOWHERE, |range| range.start);
        self.address.swap(address, Ordering::AcqRel) != address
    }

    /// See [`Device::ended`].
    pub(super) fn ended(&self) -> Option<Arc<OwnedFd>> {
        self.lock().ended()
    }

    pub(super) fn step(&self, vm: &VmFd, memory: &Memory, queue: usize) -> Step {
        let mut registers = self.lock();
        let step = registers.step(memory, queue);
        tell(vm, &mut registers, queue, step)
    }

    pub(super) fn settle(&self, vm: &VmFd, memory: &Memory, queue: usize) -> Step {
        let mut registers = self.lock();
        let step = registers.settle(memory, queue);
        tell(vm, &mut registers, queue, step)
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
            registers.config_message().into_iter().for_each(|message| send(vm, message));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pci> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the driver of what was done.
fn tell(vm: &VmFd, registers: &mut Pci, queue: usize, step: Step) -> Step {
    let message = match step {
        Step::Served { interrupt: true } => registers.queue_message(queue),
        Step::Broken(_) => registers.config_message(),
        Step::Served { interrupt: false } | Step::Idle => None,
    };
    if let Some(message) = message {
        send(vm, message);
    }
    step
}

fn finish(vm: &VmFd, registers: &mut Pci, done: Done) -> Effect {
    done.messages.into_iter().for_each(|message| send(vm, message));
    if let (Effect::Broken(_), Some(message)) = (done.effect, registers.config_message()) {
        send(vm, message);
    }
    done.effect
}

/// Sends an interrupt. The guest says where to, so that it may be to nobody.
fn send(vm: &VmFd, message: Message) {
    let msi = kvm_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    if let Err(error) = vm.signal_msi(msi) {
        tracing::debug!(%error, "KVM did not take an interrupt");
    }
}
