//! How virtio devices are reached, and how many there may be.

use serde::{Deserialize, Serialize};

use crate::layout;

/// How the guest finds virtio devices and reaches them: [`Kvm::with_transport`](crate::Kvm::with_transport).
///
/// A guest on PCI searches a bus and sets up messages as it boots, and there is more for it to attack. For that it can be given
/// and asked for disks and network ports as it runs, and it has room for more of them.
///
/// ```
/// use hypervisor_kvm::{Kvm, Transport};
/// use instance_core::machine::Hypervisor;
///
/// if let Ok(kvm) = Kvm::open() {
///     let can = kvm.capabilities();
///     assert!(can.hot_plug, "it is on PCI");
///     let small = kvm.with_transport(Transport::Mmio).capabilities();
///     assert!(!small.hot_plug && small.max_disks < can.max_disks);
/// }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Transport {
    /// Each at an address and with an interrupt of its own, which ACPI names: no bus has to be searched. What a
    /// machine is made with is what it has: no volume is attached to an instance that runs.
    Mmio,
    /// On a PCI bus, with interrupts that are messages (MSI-X), as EC2's instances have their devices. Disks and network ports
    /// come and go while the machine runs.
    #[default]
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
