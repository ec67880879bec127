//! How virtio devices are reached, and how many there may be.

use serde::{Deserialize, Serialize};

use crate::layout;

/// How the guest finds virtio devices and reaches them.
///
/// ```
/// use hypervisor_kvm::{Kvm, Transport};
/// use instance_core::machine::Hypervisor;
///
/// if let Ok(kvm) = Kvm::open() {
///     assert!(kvm.capabilities().max_disks < kvm.with_transport(Transport::Pci).capabilities().max_disks);
/// }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Transport {
    /// Each at an address and with an interrupt of its own, which ACPI names: the fastest to boot.
    #[default]
    Mmio,
    /// On a PCI bus, with interrupts that are messages (MSI-X).
    Pci,
}

impl Transport {
    /// How many virtio devices a machine may have.
    pub(crate) fn places(self) -> usize {
        match self {
            Self::Mmio => layout::VIRTIO_MAX,
            Self::Pci => layout::PCI_MAX,
        }
    }

    /// For how many disks and network ports of a machine there is room: that of an entropy device, a balloon and streams
    /// is kept, that of a virtio console where there is one.
    pub(crate) fn device_places(self, virtio_console: bool) -> usize {
        self.places() - 3 - usize::from(virtio_console)
    }
}
