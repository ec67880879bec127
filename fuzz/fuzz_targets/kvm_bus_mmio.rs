//! A guest's accesses to ports and addresses of a machine on virtio-mmio.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::bus_on_mmio(bytes));
