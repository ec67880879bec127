//! A guest's driver of a memory balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hypervisor_kvm::fuzzing::virtio_balloon(bytes));
