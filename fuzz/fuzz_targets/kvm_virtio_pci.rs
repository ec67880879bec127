//! A guest's accesses to a block device on PCI.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::virtio_pci(bytes));
