//! Which device answers at which port or address.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use instance_core::machine::ExitCause;
use kvm_ioctls::VmFd;

use crate::error::{Result, saved};
use crate::gate::Gate;
use crate::memory::Memory;
use crate::pci::{self, Access, Bus};
use crate::power::Power;
use crate::rtc::Rtc;
use crate::saved::State;
use crate::serial::SerialPort;
use crate::slots::{Placed, Slots};
use crate::{generation, layout, panic};

const SERIAL: Range<u16> = layout::SERIAL_PORT..layout::SERIAL_PORT + 8;
const POWER: Range<u16> = layout::PM1_EVENT_PORT..layout::GPE_PORT + layout::GPE_LEN as u16;
const HOT_PLUG: Range<u16> = layout::HOT_PLUG_PORT..layout::HOT_PLUG_PORT + layout::HOT_PLUG_LEN;
const RTC: Range<u16> = layout::RTC_PORT..layout::RTC_PORT + 2;

/// The devices of a machine. Any vCPU may call at any time.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) serial: SerialPort,
    pub(crate) power: Power,
    pub(crate) rtc: Mutex<Rtc>,
    /// Where devices are on PCI.
    pub(crate) pci: Option<Bus>,
    pub(crate) virtio: Slots,
}

impl Devices {
    /// Goes on, as devices that nobody has used yet, where a machine's were saved.
    pub(crate) fn restore(&mut self, vm: &VmFd, memory: &Memory, state: &State) -> Result<()> {
        let fits = match (&mut self.pci, &state.pci) {
            (Some(bus), Some(state)) => bus.restore(state),
            (None, None) => true,
            _ => false,
        };
        let devices = self.virtio.all();
        if !fits || devices.len() != state.virtio.len() || !self.serial.restore(state.serial.clone()) {
            return Err(saved("the saved machine's devices are not those of a machine like this"));
        }
        self.power.restore(&state.power, |level| set_sci(vm, level));
        self.rtc.get_mut().unwrap_or_else(PoisonError::into_inner).clone_from(&state.rtc);
        self.virtio.restore(state.hot_plug);
        for (placed, at) in devices.iter().zip(&state.virtio) {
            placed.device.restore(vm, &at.state)?;
        }
        // A guest may have been about to have two change places.
        self.listen(vm);
        self.regenerate(vm, memory)
    }

    /// The guest reads I/O ports; where there is nothing, all bits read as ones.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if SERIAL.contains(&port) {
            // Every byte of a repeated or wide access comes from the one register.
            for byte in data {
                *byte = self.serial.read((port - SERIAL.start) as u8);
            }
        } else if POWER.contains(&port) {
            self.power.read(port, data);
        } else if port == layout::PANIC_PORT {
            data.fill(panic::EVENTS);
        } else if port == layout::I8042_PORT {
            data.fill(layout::I8042_STATUS);
        } else if port == RTC.start + 1 {
            data.fill(self.clock(|rtc, now| rtc.read(now)));
        } else if self.pci.is_some() && HOT_PLUG.contains(&port) {
            self.virtio.read(port, data);
        } else if let (Some(bus), true) = (&self.pci, pci::PORTS.contains(&port)) {
            if let Access::Device(number, at) = bus.read(port, data) {
                if let Some(placed) = self.pci_device(number) {
                    placed.device.read_space(at, data);
                }
            }
        }
    }

    /// The guest writes I/O ports, which may end the machine.
    pub(crate) fn port_write(
        &self,
        vm: &VmFd,
        gate: &Gate,
        port: u16,
        data: &[u8],
    ) -> ControlFlow<ExitCause> {
        if SERIAL.contains(&port) {
            for byte in data {
                self.serial.write((port - SERIAL.start) as u8, *byte);
            }
        } else if POWER.contains(&port) {
            self.power.write(port, data, |level| set_sci(vm, level))?;
        } else if port == layout::PANIC_PORT {
            data.iter().try_for_each(|event| panic::write(*event))?;
        } else if RTC.contains(&port) {
            self.clock(|rtc, now| write_clock(rtc, port, data, now));
        } else if self.pci.is_some() && HOT_PLUG.contains(&port) {
            if self.virtio.write(vm, port, data) {
                gate.nudge();
            }
        } else if let (Some(bus), true) = (&self.pci, pci::PORTS.contains(&port)) {
            if let Access::Device(number, at) = bus.write(port, data) {
                if self.pci_device(number).is_some_and(|placed| placed.device.write_space(vm, gate, at, data))
                {
                    self.listen(vm);
                }
            }
        }
        if is_reset(port, data) { ControlFlow::Break(ExitCause::Reset) } else { ControlFlow::Continue(()) }
    }

    /// The guest reads an address that is not RAM.
    pub(crate) fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((placed, offset)) = self.device_at(address) {
            placed.device.read(offset, data);
        }
    }

    /// The guest writes an address that is not RAM.
    pub(crate) fn memory_write(&self, vm: &VmFd, gate: &Gate, address: u64, data: &[u8]) {
        if let Some((placed, offset)) = self.device_at(address) {
            placed.device.write(vm, gate, offset, data);
        }
    }

    /// Goes on with what vCPUs had to leave when the gate was closed.
    pub(crate) fn go_on(&self, vm: &VmFd, gate: &Gate) {
        self.virtio.all().iter().for_each(|placed| placed.device.go_on(vm, gate));
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self, vm: &VmFd) {
        self.power.press_button(|level| set_sci(vm, level));
    }

    /// Tells the guest that devices have come or are to go.
    pub(crate) fn tell_of_hot_plug(&self, vm: &VmFd) {
        self.power.raise_event(layout::HOT_PLUG_GPE, |level| set_sci(vm, level));
    }

    /// Gives the guest a new generation id and tells it: it continues what was saved of another machine.
    fn regenerate(&self, vm: &VmFd, memory: &Memory) -> Result<()> {
        generation::write_new(memory)?;
        self.power.raise_event(layout::GENERATION_GPE, |level| set_sci(vm, level));
        Ok(())
    }

    /// Has KVM hear each device on PCI where it is, after one has moved: another may have waited for its place, or may still be
    /// heard where it was, and would take what is meant for who is there now.
    fn listen(&self, vm: &VmFd) {
        let devices = self.virtio.all();
        let places: Vec<u64> = devices.iter().filter_map(|placed| placed.device.pci_address()).collect();
        devices.iter().for_each(|placed| placed.device.let_go(vm, &places));
        for placed in devices.iter() {
            if let Err(error) = placed.device.listen(vm) {
                placed.device.is_unheard(error);
            }
        }
    }

    /// Uses the clock, which is told the host's time.
    fn clock<T>(&self, access: impl FnOnce(&mut Rtc, Duration) -> T) -> T {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        access(&mut self.rtc.lock().unwrap_or_else(PoisonError::into_inner), now)
    }

    fn device_at(&self, address: u64) -> Option<(Arc<Placed>, u64)> {
        if self.pci.is_some() {
            return self.virtio.find_map(|placed| placed.device.pci_offset_of(address));
        }
        let from_first = address.checked_sub(layout::VIRTIO)?;
        let placed = self.virtio.get((from_first / layout::VIRTIO_LEN) as usize)?;
        Some((placed, from_first % layout::VIRTIO_LEN))
    }

    /// Number 0 is the host bridge's.
    fn pci_device(&self, number: usize) -> Option<Arc<Placed>> {
        self.virtio.get(number.checked_sub(1)?)
    }
}

/// Whether a write resets the machine: by ACPI's register, or as the keyboard controller does.
fn is_reset(port: u16, data: &[u8]) -> bool {
    match (port, data) {
        (layout::RESET_PORT, &[value]) => value & layout::RESET_VALUE == layout::RESET_VALUE,
        (layout::I8042_PORT, &[command]) => command == layout::I8042_RESET,
        _ => false,
    }
}

/// Bytes from `port` on: a word for both ports chooses a register and writes it.
fn write_clock(rtc: &mut Rtc, port: u16, data: &[u8], now: Duration) {
    for (port, value) in (port..).zip(data) {
        match port - RTC.start {
            0 => rtc.select(*value),
            1 => rtc.write(*value, now),
            _ => {}
        }
    }
}

/// Sets the level of ACPI's interrupt.
fn set_sci(vm: &VmFd, level: bool) {
    if let Err(error) = vm.set_irq_line(layout::SCI_IRQ, level) {
        tracing::warn!(%error, "KVM did not set the ACPI interrupt");
    }
}

#[cfg(test)]
mod tests;
