//! What is saved of a device.

use serde::{Deserialize, Serialize};

use super::core::CoreState;
use super::device::Own;
use super::mmio::MmioState;
use super::pci::PciState;

/// A device as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DeviceState {
    /// Its registers, and the status of its interrupt.
    Mmio(MmioState, u32),
    Pci(PciState),
}

impl DeviceState {
    /// The device type.
    pub(crate) fn kind(&self) -> u32 {
        self.core().kind
    }

    /// How many queues there are.
    pub(crate) fn queues(&self) -> usize {
        self.core().queues()
    }

    /// What is the device's own.
    pub(crate) fn own(&self) -> &Own {
        &self.core().own
    }

    pub(crate) fn set_own(&mut self, own: Own) {
        match self {
            Self::Mmio(registers, _) => registers.core.own = own,
            Self::Pci(registers) => registers.core.own = own,
        }
    }

    /// The bytes of a disk, as its driver knows them; none where that is not said.
    pub(crate) fn disk_size(&self) -> Option<u64> {
        if let Own::Block(state) = self.own() { Some(state.size()) } else { None }
    }

    fn core(&self) -> &CoreState {
        match self {
            Self::Mmio(registers, _) => &registers.core,
            Self::Pci(registers) => &registers.core,
        }
    }
}
