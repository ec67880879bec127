//! A guest's and a network's accesses to a network device.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::virtio_net(bytes));
