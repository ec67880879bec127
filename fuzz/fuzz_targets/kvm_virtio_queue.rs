//! What a guest's driver does with a queue, and what a device takes from it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::virtio_queue(bytes));
