//! A guest's accesses to ports and addresses of a machine with PCI.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::bus(bytes));
